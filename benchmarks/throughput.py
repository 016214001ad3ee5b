"""How fast codecs encode, decode and stream: ours beside SpeechTokenizer, EnCodec, DAC and Mimi.

    python benchmarks/throughput.py [--json] [--quick] [--threads N]

Ten seconds of audio, batch 1, at each codec's own rate. All models but our shipped ones have random
weights at their published size: weights do not change the time. Two kinds of rows: the published
SpeechTokenizer, ours against the official code, same weights and equal codes (see codec.py for the
check); and our small codecs against the published ones, which are much larger and made for real
speech: read those as what the course's codec costs, not as a contest. Ratios above 1: ours is
faster. The row of a folder: 64 utterances of 2 to 12 s at the published size, in length-sorted
padded batches of 32 as `speechlab encode` makes them, beside the same model one by one.
"""

from __future__ import annotations

import tempfile
import warnings

import torch
from codec import PEER, make_pair
from common import interleaved, options, report, rows_for

from speechlab.tokenizer.codecs import TransformersCodec
from speechlab.tokenizer.files import _encode_rows
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer
from speechlab.tokenizer.streaming import TokenizerStream

warnings.filterwarnings("ignore")


def transformers_codecs(quick: bool) -> dict[str, TransformersCodec]:
    """Published sizes with random weights: EnCodec 24 kHz, DAC 16 kHz, Mimi."""
    from transformers import (
        DacConfig,
        DacModel,
        EncodecConfig,
        EncodecModel,
        MimiConfig,
        MimiModel,
    )

    dac = DacConfig(
        downsampling_ratios=[2, 4, 5, 8], upsampling_ratios=[8, 5, 4, 2], n_codebooks=12,
        sampling_rate=16000,
    )  # fmt: skip
    models = {
        "EnCodec 24 kHz, 32 levels": EncodecModel(EncodecConfig()),
        "DAC 16 kHz, 12 levels": None if quick else DacModel(dac),
        "Mimi 24 kHz, 32 levels": MimiModel(MimiConfig()),
    }
    return {name: TransformersCodec(model) for name, model in models.items() if model}


def stream_all(model: SpeechTokenizer, wav: torch.Tensor, frames: int) -> torch.Tensor:
    """Encode and decode in pieces of so many frames."""
    stream, state, back, sound = TokenizerStream(model), None, None, []
    for piece in wav.split(frames * model.spec.hop_length, dim=-1):
        codes, state = stream.encode(piece, state)
        heard, back = stream.decode(codes, back)
        sound.append(heard)
    return torch.cat(sound, dim=-1)


def folder_rows(model: SpeechTokenizer, quick: bool) -> list[dict]:
    """Many utterances in batches of like length, and one by one; codes compared first."""
    generator = torch.Generator().manual_seed(0)
    count, rounds = (4, 1) if quick else (64, 2)
    sizes = ((torch.rand(count, generator=generator) * 10 + 2) * 16000).int().tolist()
    sizes = [n // 8 for n in sizes] if quick else sizes
    wavs = [(torch.rand(1, n, generator=generator) - 0.5) * 0.2 for n in sorted(sizes)[::-1]]

    def alone() -> list[torch.Tensor]:
        return [model.encode(wav[None])[0] for wav in wavs]

    def batched() -> list[torch.Tensor]:
        found = []
        for first in range(0, count, 32):
            found += _encode_rows(model, wavs[first : first + 32], None)
        return found

    pairs = zip(alone(), batched())
    same = torch.cat([(a == b[:, : a.shape[1]]).float().mean(0) for a, b in pairs]).mean()
    if same < 0.999:
        raise SystemExit(f"only {same:.2%} of the codes are equal: nothing is timed")
    times = interleaved({"ours": batched, "one by one": alone}, rounds)
    return rows_for(f"encode {count} utterances, published size, batched", times)


@torch.no_grad()
def main() -> None:
    settings = options(__doc__)
    seconds, rounds = (1, 1) if settings.quick else (10, 5)
    torch.manual_seed(0)
    wav = ((torch.rand(1, 1, 24000 * seconds) - 0.5) * 0.2).clamp(-1, 1)
    narrow = wav[..., : 16000 * seconds]
    small = SpeechTokenizer.load("speechtokenizer-small")
    causal = SpeechTokenizer.load("small-causal")
    codes = small.encode(narrow)
    encode = {"ours": lambda: small.encode(narrow)}
    decode = {"ours": lambda: small.decode(codes)}
    for name, codec in transformers_codecs(settings.quick).items():
        sound = wav if codec.spec.sample_rate == 24000 else narrow
        found = codec.encode(sound)
        encode[name] = lambda c=codec, s=sound: c.encode(s)
        decode[name] = lambda c=codec, f=found, s=sound: c.decode(f, s.shape[-1])
    with tempfile.TemporaryDirectory() as folder:
        official, published = make_pair(folder)
    published = published.fold()
    theirs = official.encode(narrow)
    if not torch.equal(published.encode(narrow)[0], theirs[:, 0]):
        raise SystemExit("codes differ: nothing is timed")
    encode[PEER] = lambda: official.encode(narrow)
    decode[PEER] = lambda: official.decode(theirs)
    rows = rows_for(f"encode {seconds} s, ours: small", interleaved(encode, rounds))
    rows += rows_for(f"decode {seconds} s, ours: small", interleaved(decode, rounds))
    both = {
        "ours": lambda: published.decode(published.encode(narrow)),
        PEER: lambda: official.decode(official.encode(narrow)),
    }
    rows += rows_for(f"encode and decode {seconds} s, published size", interleaved(both, rounds))
    assert (stream_all(causal, narrow, 5) - causal.decode(causal.encode(narrow))).abs().max() < 1e-5
    offline = "small-causal, at once"
    for frames in (1, 5, 25):
        calls = {
            "ours": lambda n=frames: stream_all(causal, narrow, n),
            offline: lambda: causal.decode(causal.encode(narrow)),
        }
        case = f"stream {seconds} s, pieces of {20 * frames} ms"
        rows += rows_for(case, interleaved(calls, rounds))
    rows += folder_rows(published, settings.quick)
    report(rows, settings.json, "transformers", "speechtokenizer")


if __name__ == "__main__":
    main()
