"""What the benchmarks share: interleaved timing, rows, options and the report."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from speechlab.foundations.machine import device_name, library_versions, wait_for_device


def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call, run in turn, after one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            wait_for_device()
            start = time.perf_counter()
            call()
            wait_for_device()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def rows_for(case: str, values: dict[str, float], unit: str = "s") -> list[dict]:
    """One row per peer; smaller values are better, so a ratio above 1 means that ours is."""
    return [
        {
            "case": case,
            "ours": values["ours"],
            "peer": name,
            "peer_value": value,
            "unit": unit,
            "ratio": value / values["ours"],
        }
        for name, value in values.items()
        if name != "ours"
    ]


def options(description: str) -> argparse.Namespace:
    """The command line of a benchmark; also sets the number of threads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and few")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    found = parser.parse_args()
    if found.device == "auto":
        found.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(found.threads)
    return found


def report(rows: list[dict], as_json: bool, *packages: str, device: str = "cpu") -> None:
    """Print what was measured, and on what."""
    found = {
        "machine": device_name(device),
        "rows": rows,
        "versions": library_versions("speechlab", "torch", *packages),
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(found["machine"], found["versions"])
    for row in rows:
        print(
            f"{row['case']:40} ours {row['ours']:9.4f}{row['unit']}  {row['peer']:26} "
            f"{row['peer_value']:9.4f}{row['unit']}  ratio {row['ratio']:.2f}"
        )
