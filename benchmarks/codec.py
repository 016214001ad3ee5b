"""Encode and decode: ours against the official SpeechTokenizer, same weights, published size.

    python benchmarks/codec.py [--json] [--quick] [--threads N]

The official model gets random weights and codebooks, ours loads its files. Codes must be equal and
waves within 1e-4 before anything is timed. Then ours (weights folded, gradients off) and the
official code (as its README uses it, under no_grad) take turns on ten seconds of audio. Peak memory
is that of a fresh process which loads one of the two and runs it once. Ratios above 1: ours wins.
Last, the exported `speechtokenizer-small` in ONNX Runtime beside the same model in PyTorch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from common import interleaved, options, report, rows_for

from speechlab.tokenizer.export import OnnxTokenizer, export_onnx
from speechlab.tokenizer.official import load_official
from speechlab.tokenizer.precision import at_precision
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer

warnings.filterwarnings("ignore")
CONFIG = {
    "n_filters": 64,
    "strides": [8, 5, 4, 2],
    "dimension": 1024,
    "semantic_dimension": 768,
    "bidirectional": True,
    "dilation_base": 2,
    "residual_kernel_size": 3,
    "n_residual_layers": 1,
    "lstm_layers": 2,
    "activation": "ELU",
    "sample_rate": 16000,
    "n_q": 8,
    "codebook_size": 1024,
}
PEER = "official SpeechTokenizer"

ONE_RUN = """
import pathlib, resource, sys, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(int(sys.argv[4]))
which, folder, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3])
from speechlab.tokenizer.official import load_official  # both: the same imports
from speechtokenizer import SpeechTokenizer
files = f"{folder}/config.json", f"{folder}/SpeechTokenizer.pt"
torch.manual_seed(0)
wav = (torch.rand(1, 1, 16000 * seconds) - 0.5) * 0.2
with torch.no_grad():
    if which == "ours":
        model = load_official(*files).fold()
    else:
        model = SpeechTokenizer.load_from_checkpoint(*files).eval()
    model.decode(model.encode(wav))
status = pathlib.Path("/proc/self/status")  # ru_maxrss would start from the parent's peak
if status.exists():
    (line,) = [row for row in status.read_text().splitlines() if row.startswith("VmHWM")]
    print(int(line.split()[1]) / 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def make_pair(
    folder: str | Path, settings: dict = CONFIG
) -> tuple[torch.nn.Module, SpeechTokenizer]:
    """The official model with random weights, written to its files, and ours, read from them."""
    from speechtokenizer import SpeechTokenizer as Official

    torch.manual_seed(0)
    peer = Official(settings).eval()
    for layer in peer.quantizer.vq.layers:  # codebooks are zero before k-means
        layer._codebook.embed.normal_().mul_(0.05)
        layer._codebook.inited.fill_(1)
    config, checkpoint = Path(folder) / "config.json", Path(folder) / "SpeechTokenizer.pt"
    config.write_text(json.dumps(settings))
    torch.save(peer.state_dict(), checkpoint)
    return peer, load_official(config, checkpoint)


def peak_memory(which: str, folder: str, seconds: int, threads: int) -> float:
    """MiB of a fresh process that encodes and decodes once."""
    command = [sys.executable, "-c", ONE_RUN, which, folder, str(seconds), str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def fewer_bits(ours: SpeechTokenizer, peer, wav: torch.Tensor, case: str, rounds: int) -> list:
    """The fast tier beside the official code: time, and the share of the codes that stay."""
    rows, codes = [], ours.encode(wav)
    here = wav.device.type == "cpu"
    chosen = ["int8"] * here  # bf16 without hardware for it takes minutes
    chosen += ["bf16"] * (not here or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for precision in chosen:
        fast = at_precision(ours, precision)
        times = interleaved(
            {"ours": lambda f=fast: f.encode(wav), PEER: lambda: peer.encode(wav)}, rounds
        )
        rows += rows_for(f"encode {precision} {case}", times)
        times = interleaved(
            {"ours": lambda f=fast: f.decode(codes),
             PEER: lambda: peer.decode(codes.transpose(0, 1))}, rounds,
        )  # fmt: skip
        rows += rows_for(f"decode {precision} {case}", times)
        share = (fast.encode(wav) == codes).float().mean().item()
        (equal,) = rows_for(f"equal codes, {precision}, random weights", {"ours": share, "fp32": 1})
        rows.append(equal | {"unit": "", "ratio": share})  # a share: more is better
    return rows


def onnx_rows(seconds: int, rounds: int, threads: int) -> list[dict]:
    """The small tokeniser's graphs in ONNX Runtime; the peer is PyTorch."""
    tokenizer = SpeechTokenizer.load("speechtokenizer-small")
    with tempfile.TemporaryDirectory() as folder:
        graph = OnnxTokenizer(export_onnx(tokenizer, folder), threads)
        wav = (torch.rand(1, 1, 16000 * seconds) - 0.5) * 0.2
        codes = tokenizer.encode(wav)
        if (graph.encode(wav) == codes).float().mean() < 0.99:
            raise SystemExit("codes of the graph differ: nothing to compare")
        rows = []
        for name, one, other in (
            ("encode", lambda: graph.encode(wav), lambda: tokenizer.encode(wav)),
            ("decode", lambda: graph.decode(codes), lambda: tokenizer.decode(codes)),
        ):
            times = interleaved({"ours": one, "the same in PyTorch": other}, rounds)
            rows += rows_for(f"ONNX {name}, small, {seconds} s, {threads} threads", times)
    return rows


@torch.no_grad()
def main() -> None:
    chosen = options(__doc__)
    seconds, rounds = (2, 3) if chosen.quick else (10, 7)
    with tempfile.TemporaryDirectory() as folder:
        peer, ours = make_pair(folder)
        ours.fold().to(chosen.device), peer.to(chosen.device)
        wav = ((torch.rand(1, 1, 16000 * seconds) - 0.5) * 0.2).to(chosen.device)
        codes, theirs = ours.encode(wav), peer.encode(wav)
        on_cpu = chosen.device == "cpu"  # a GPU sums in another order
        if (codes[0] == theirs[:, 0]).float().mean() < (1.0 if on_cpu else 0.99):
            raise SystemExit("codes differ: nothing to compare")
        most = 1e-4 if on_cpu else 1e-3
        if (ours.decode(codes) - peer.decode(codes.transpose(0, 1))).abs().max() > most:
            raise SystemExit("waves differ: nothing to compare")
        place = f"{chosen.threads} threads" if on_cpu else chosen.device
        case = f"of {seconds} s, batch 1, {place}"
        times = interleaved(
            {"ours": lambda: ours.encode(wav), PEER: lambda: peer.encode(wav)}, rounds
        )
        rows = rows_for(f"encode {case}", times)
        times = interleaved(
            {"ours": lambda: ours.decode(codes), PEER: lambda: peer.decode(theirs)}, rounds
        )
        rows += rows_for(f"decode {case}", times)
        rows += fewer_bits(ours, peer, wav, case, min(rounds, 2))
        if on_cpu:
            peaks = {
                name: peak_memory(name, folder, seconds, chosen.threads) for name in ("ours", PEER)
            }
            rows += rows_for(f"peak memory of a process, {seconds} s", peaks, "MiB")
    if on_cpu:
        rows += onnx_rows(seconds, rounds, chosen.threads)
    report(rows, chosen.json, "speechtokenizer", "onnxruntime", device=chosen.device)


if __name__ == "__main__":
    main()
