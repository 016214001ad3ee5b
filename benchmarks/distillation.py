"""The study of the distillation lesson: seven settings, three seeds, one budget.

    python benchmarks/distillation.py OUT.json [--steps N] [--seeds N] [--workers N] [--only NAME …]

Each setting trains the `small` codec on the same batches for the same number of steps, without
critics, and is measured on the test split: purity and PNMI of the first code, mel distance from
eight codes and from one. Finished runs are kept in OUT.json, so an interrupted study continues.
The last setting is a control: a teacher with random weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from speechlab.foundations.corpus import embedded_corpus
from speechlab.foundations.evaluation import phone_symbols
from speechlab.foundations.machine import device_name, library_versions
from speechlab.tokenizer.distillation import Distiller
from speechlab.tokenizer.speech_tokenizer import (
    CONFIGS,
    TokenizerTraining,
    tokenizer_report,
    train_tokenizer,
)
from speechlab.tokenizer.teachers import Teacher

SETTINGS = {  # name -> teacher, layer, kind
    "no distillation": None,
    "D axis, self-supervised": ("tiny-hubert", "average", "d_axis"),
    "D axis, one layer": ("tiny-hubert-ft", 4, "d_axis"),
    "D axis, average": ("tiny-hubert-ft", "average", "d_axis"),
    "T axis, average": ("tiny-hubert-ft", "average", "t_axis"),
    "pseudo-labels": ("tiny-hubert-ft", 4, "pseudo_label"),
    "control: untrained teacher": ("untrained", "average", "d_axis"),
}


def one_run(job: tuple[str, int, int]) -> dict:
    """Train and measure one setting with one seed, on one thread."""
    name, seed, steps = job
    torch.set_num_threads(1)
    corpus = embedded_corpus("cpu")
    distiller, setting = None, SETTINGS[name]
    if setting:
        source, layer, kind = setting
        make = Teacher.untrained if source == "untrained" else Teacher.from_pretrained
        teacher = make(layer=layer) if source == "untrained" else make(source, layer)
        distiller = Distiller(corpus.split("train"), teacher, kind)
    training = TokenizerTraining(steps=steps, critics_from=1.0, seed=seed)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model, history = train_tokenizer(corpus, folder, CONFIGS["small"], training, distiller)
    found = tokenizer_report(model, corpus.split("test"), phone_symbols(corpus), levels=(1, 8))
    return {
        "name": name,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - started, 1),
        "purity": found["level_1"]["purity"],
        "pnmi": found["level_1"]["pnmi"],
        "codes_used": found["level_1"]["codes_used"],
        "pnmi_level_2": found["level_2"]["pnmi"],
        "mel_1": found["mel_distance"][1],
        "mel_8": found["mel_distance"][8],
        "distill": history[-1].get("distill"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="some settings")
    chosen = parser.parse_args()
    training = TokenizerTraining(steps=chosen.steps, critics_from=1.0)
    study = {
        "made_on": device_name("cpu"),
        "threads": "1 per training",
        "steps": chosen.steps,
        "seconds_of_audio_per_step": training.seconds * training.batch_size,
        "training": {k: v for k, v in asdict(training).items() if k not in ("critics", "seed")},
        "versions": library_versions(),
        "rows": {name: [] for name in SETTINGS},
    }
    if chosen.out.exists():
        old = json.loads(chosen.out.read_text())
        if old["steps"] == chosen.steps:
            study["rows"] |= old["rows"]
    jobs = [
        (name, seed, chosen.steps)
        for seed in range(chosen.seeds)
        for name in chosen.only
        if seed not in [row["seed"] for row in study["rows"][name]]
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(chosen.workers, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(one_run, jobs):
            study["rows"][row.pop("name")].append(row)
            for rows in study["rows"].values():
                rows.sort(key=lambda r: r["seed"])
            chosen.out.write_text(json.dumps(study, indent=1) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
