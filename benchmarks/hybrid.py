"""The study of the hybrid lesson: what a GPT of codes gains from hearing mel slices, and why.

    python benchmarks/hybrid.py OUT.json [--data speech|music] [--steps N] [--seeds N] [--quick]

Every setting predicts level 1 of a causal codec on the same batches for the same number of steps,
with fewer or more inputs. The learning rate is chosen for the small and the large GPT on the
validation split. All is measured on the test split, whose voices (bands) no model has heard.
Finished runs are kept in OUT.json, so an interrupted study continues.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from speechlab.foundations.audio import log_mel
from speechlab.foundations.corpus import Corpus, embedded_corpus
from speechlab.foundations.machine import cache_folder, device_name, library_versions
from speechlab.foundations.transformer import TransformerConfig, flops_per_position
from speechlab.lm.gpt import GPT, Clips, GPTConfig, GPTTraining, likelihood, train_gpt
from speechlab.lm.hybrid import CausalMel, HybridConfig, HybridGPT, clip_mels
from speechlab.lm.music import music_corpus
from speechlab.tokenizer.files import fingerprint
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer

SMALL = TransformerConfig(dim=96, layers=3, heads=4, context=512)
LARGE = replace(SMALL, dim=256, layers=5)
MATCHED = replace(SMALL, ffn_dim=208)  # hybrid: as many parameters as SMALL
SAME_FLOPS = replace(SMALL, ffn_dim=264)  # tokens only: as many operations as the hybrid
SETTINGS = {  # name -> (body, levels heard, mel heard)
    "tokens": (SMALL, 1, None),
    "tokens, 10x": (LARGE, 1, None),
    "hybrid": (MATCHED, 1, "recording"),
    "tokens, same FLOPs": (SAME_FLOPS, 1, None),
    "mel of another recording": (MATCHED, 1, "another"),
    "mel one frame late": (MATCHED, 1, "late"),
    "levels 1-4 heard, no mel": (SMALL, 4, None),
    "mel decoded from level 1": (MATCHED, 1, "level 1"),
    "mel decoded from levels 1-4": (MATCHED, 1, "levels 1-4"),
    "mel decoded from levels 1-8": (MATCHED, 1, "levels 1-8"),
    "leak: centred frames": (MATCHED, 1, "centred"),
    "leak: off by one": (MATCHED, 1, "early"),
}
FED = {  # measured besides: a trained setting -> mels it is then given
    "hybrid": ("level 1", "levels 1-4", "levels 1-8"),
    "mel decoded from levels 1-4": ("level 1", "recording"),
    "mel decoded from levels 1-8": ("level 1", "recording"),
}
RATES = {"tokens": (2e-3, 4e-3, 8e-3, 1.6e-2), "tokens, 10x": (1e-3, 2e-3, 4e-3)}
SPLITS = {"speech": ("gpu", 13_000, 300, 600), "music": ("gpu", 3000, 100, 200)}
QUICK = {"speech": ("smoke", 32, 8, 8), "music": ("smoke", 24, 8, 8)}


def corpora(data: str, quick: bool) -> dict[str, Corpus]:
    """The recordings of each split."""
    size, *counts = (QUICK if quick else SPLITS)[data]
    corpus = embedded_corpus(size) if data == "speech" else music_corpus(size)
    return {name: corpus.split(name)[:n] for name, n in zip(("train", "valid", "test"), counts)}


def centred_mel(wav: torch.Tensor, framing: CausalMel) -> torch.Tensor:
    """The usual frames, centred on t * hop: they reach n_fft / 2 - hop past the end of token t."""
    hop, n_fft = framing.hop_length, framing.n_fft
    found = log_mel(wav, 16000, n_fft=n_fft, hop_length=hop, n_mels=framing.mel.n_mels)
    return found[..., : -(-wav.shape[-1] // hop)]


def prepare(corpus: Corpus, tokenizer: SpeechTokenizer, cache: Path) -> dict:
    """Codes and all kinds of mels of some recordings, computed once and kept."""
    if cache.exists():
        return torch.load(cache, mmap=True)
    clips = Clips.encode(tokenizer, corpus)
    hop, framing = tokenizer.config.hop_length, CausalMel(hop_length=tokenizer.config.hop_length)
    mels = {"recording": clip_mels(corpus, clips, framing)}
    mels["late"] = clip_mels(corpus, clips, CausalMel(hop_length=hop, lookahead=-hop))
    mels["early"] = clip_mels(corpus, clips, CausalMel(hop_length=hop, lookahead=hop))
    for name, levels in (("level 1", 1), ("levels 1-4", 4), ("levels 1-8", 8)):
        mels[name] = clip_mels(corpus, clips, framing, tokenizer, levels)
    mels["centred"] = [centred_mel(utterance.wav, framing)[0].half() for utterance in corpus]
    found = {"codes": clips.codes, "ids": clips.ids, "mels": mels}
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, cache)
    return found


def another(found: dict) -> list[torch.Tensor]:
    """For each recording the mel of one drawn at random, repeated where it is shorter.

    At random: neighbours would not do. In the music corpus the bands take turns, so the next
    piece's sound tells which band plays this one.
    """
    order = np.random.default_rng(0).permutation(len(found["ids"]))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    mels = []
    for index, codes in enumerate(found["codes"]):
        mel, frames = found["mels"]["recording"][other[index]], codes.shape[1]
        mels.append(mel.repeat(1, -(-frames // mel.shape[1]))[:, :frames])
    return mels


def make_clips(found: dict, heard: int, mel: str | None) -> Clips:
    """Recordings with the levels and the mels that a setting uses."""
    codes = [codes[:heard] for codes in found["codes"]]
    if mel == "another":
        return Clips(codes, found["ids"], another(found))
    return Clips(codes, found["ids"], found["mels"][mel] if mel else None)


def make_model(name: str, clips: Clips, seed: int) -> GPT:
    """An untrained model of a setting."""
    body, heard, mel = SETTINGS[name]
    torch.manual_seed(seed)
    if mel is None:
        return GPT(GPTConfig(input_levels=heard, body=body))
    return HybridGPT(HybridConfig(body=body)).fit_mel(clips)


def flops(name: str, frames: float) -> float:
    """Operations of one position in the forward pass."""
    body, _, mel = SETTINGS[name]
    total = flops_per_position(body, frames / 2) + 2 * body.dim * 257
    if mel:
        config = HybridConfig(body=body)
        total += flops_per_position(config.mel, frames / 2)
        total += 2 * config.n_mels * config.mel.dim + 2 * (body.dim + config.mel.dim) * body.dim
    return total


def one_run(name: str, seed: int, rate: float, steps: int, splits: dict, on: str) -> dict:
    """Train one setting and measure it on one split, with all the mels it is to be fed."""
    _, heard, mel = SETTINGS[name]
    clips = make_clips(splits["train"], heard, mel)
    model = make_model(name, clips, seed)
    batch = max(8, round(3840 / clips.lengths.mean()))  # recordings; about 3840 codes
    started = time.process_time()
    training = GPTTraining(steps, min(batch, len(clips)), rate, max(1, steps // 10), seed=seed)
    with TemporaryDirectory() as folder:
        model, history = train_gpt(model, clips, folder, training)
    seconds = time.process_time() - started
    found = likelihood(model, make_clips(splits[on], heard, mel))
    row = {
        "name": name, "seed": seed, "rate": rate, "on": on, "cpu_seconds": round(seconds, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "train_nll": history[-1]["nll"], **found.level(), "bits_per_second": found.bits_per_second,
        "mflops": flops(name, float(clips.lengths.mean())) / 1e6,
        "each": (found.nll[:, 0] / found.frames).round(4).tolist(),
        "frames": found.frames.tolist(), "fed": {},
    }  # fmt: skip
    for other in FED.get(name, ()) if on == "test" else ():
        row["fed"][other] = likelihood(model, make_clips(splits[on], heard, other)).level()
    return row


def by_voice(run: dict, corpus: Corpus) -> dict[str, float]:
    """NLL of each voice (or band) of the test split: the unit that intervals are over."""
    nll, frames = np.multiply(run["each"], run["frames"]), np.array(run["frames"])
    speakers = np.array([entry.speaker for entry in corpus.entries])
    return {
        voice: round(float(nll[speakers == voice].sum() / frames[speakers == voice].sum()), 5)
        for voice in sorted(set(speakers.tolist()))
    }


def make_report(data: str, codec: str, steps: int, parts: dict, runs: list[dict]) -> dict:
    """What is published of a study."""
    order = list(SETTINGS)
    final = [run for run in runs if run["on"] == "test"]
    final.sort(key=lambda run: (run["seed"], order.index(run["name"])))
    keys = ("name", "rate", "nll", "train_nll")
    return {
        "data": data, "codec": codec, "steps": steps, "machine": device_name("cpu"),
        "versions": library_versions("speechlab", "torch"),
        "splits": {name: repr(part) for name, part in parts.items()},
        "rates_tried": [{k: run[k] for k in keys} for run in runs if run["on"] == "valid"],
        "runs": [
            {k: v for k, v in run.items() if k not in ("each", "frames")}
            | {"by_voice": by_voice(run, parts["test"])}
            for run in final
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", choices=("speech", "music"), default="speech")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few and short")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, seeds = (4, 1) if options.quick else (options.steps, options.seeds)
    codec = {"speech": "small-causal", "music": "music-causal"}[options.data]
    tokenizer = SpeechTokenizer.from_pretrained(codec).fold()
    parts = corpora(options.data, options.quick)
    counts = "-".join(str(len(part)) for part in parts.values())
    place = cache_folder() / "hybrid" / f"{options.data}-{counts}-{fingerprint(tokenizer):08x}"
    splits = {name: prepare(part, tokenizer, place / f"{name}.pt") for name, part in parts.items()}
    raw = options.out.with_suffix(".runs.json")  # every run, with its recordings; not committed
    key = json.dumps([str(place.name), steps, {k: repr(v) for k, v in SETTINGS.items()}])
    kept = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {"key": key, "runs": []}
    if kept["key"] != key:
        raise SystemExit(f"{raw} holds runs of another study; delete it or choose another OUT")
    runs = kept["runs"]

    def run(name: str, seed: int, rate: float, steps: int, on: str) -> dict:
        for done in runs:
            if (done["name"], done["seed"], done["rate"], done["on"]) == (name, seed, rate, on):
                return done
        runs.append(one_run(name, seed, rate, steps, splits, on))
        raw.write_text(json.dumps(kept), encoding="utf-8")
        print(
            f"{name:28} seed {seed} rate {rate:g} on {on}: NLL {runs[-1]['nll']:.3f}, "
            f"train {runs[-1]['train_nll']:.3f}, {runs[-1]['cpu_seconds']:.0f} s",
            flush=True,
        )
        return runs[-1]

    chosen = {}
    for name, rates in RATES.items():
        tried = {rate: run(name, 0, rate, max(1, steps // 2), "valid")["nll"] for rate in rates}
        chosen[name] = min(tried, key=tried.get)
    for seed in range(seeds):
        for name in SETTINGS:
            rate = chosen[name if name in chosen else "tokens"]
            run(name, seed, rate, steps, "test")
    report = make_report(options.data, codec, steps, parts, runs)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
