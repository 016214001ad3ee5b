"""Every check of the repository, with a summary at the end: `make test`.

python .ci/checks.py [NAME …]     run all checks, or only those named
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SOURCES = ("nbs", "speechlab", "settings.ini", "pyproject.toml", "README.md")


def run(*command: str, **options) -> bool:
    """Run a tool of this environment; True if it exits with 0."""
    return (
        subprocess.run(
            [str(BIN / command[0]), *command[1:]], cwd=ROOT, check=False, **options
        ).returncode
        == 0
    )


def different_files(one: Path, other: Path) -> list[str]:
    """Files below two folders that differ or exist on one side only."""

    def listing(folder: Path) -> set[Path]:
        files = {p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".py", ".ipynb")}
        return {p for p in files if ".ipynb_checkpoints" not in p.parts}

    names = listing(one) | listing(other)
    same = filecmp.cmpfiles(one, other, [str(n) for n in names], shallow=False)[0]
    return sorted(str(n) for n in names if str(n) not in same)


def in_sync() -> bool:
    """`nbdev_export` and `nbdev_clean`, run on a copy, change nothing."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "speechlab"
        copy.mkdir()
        for source in SOURCES:
            path = ROOT / source
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            (shutil.copytree if path.is_dir() else shutil.copy)(
                path, copy / source, **({"ignore": ignored} if path.is_dir() else {})
            )
        for tool in ("nbdev_export", "nbdev_clean"):
            subprocess.run([str(BIN / tool)], cwd=copy, check=True)
        changed = [
            f"{part}/{f}"
            for part in ("nbs", "speechlab")
            for f in different_files(ROOT / part, copy / part)
        ]
    for path in changed:
        print(f"out of sync: {path} (run nbdev_export and nbdev_clean, and commit)")
    return not changed


def notebooks() -> bool:
    """All notebooks run from the first cell to the last, at smoke scale."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return run("nbdev_test", "--n_workers", "2", "--timing", env=os.environ | threads)


def pytest_in_two() -> bool:
    """The tests in two processes of one thread each; those of a module stay together."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    options = ("-n", "2", "--dist", "loadscope", "--durations", "10")
    return run("pytest", *options, env=os.environ | threads)


CHECKS: dict[str, Callable[[], bool]] = {
    "notebooks and package in sync": in_sync,
    "ruff": lambda: run("ruff", "check", "."),
    "notebooks run": notebooks,
    "pytest": pytest_in_two,
    "docs without Quarto": lambda: run("python", ".ci/docs_check.py"),
}


def main() -> None:
    os.environ |= {
        "SPEECHLAB_SCALE": "smoke",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    chosen = {
        name: check
        for name, check in CHECKS.items()
        if len(sys.argv) < 2 or any(word in name for word in sys.argv[1:])
    }
    results = {}
    for name, check in chosen.items():
        print(f"\n=== {name}", flush=True)
        start = time.perf_counter()
        results[name] = check(), time.perf_counter() - start
    print("\n=== summary")
    for name, (passed, seconds) in results.items():
        print(f"{'PASS' if passed else 'FAIL'}  {seconds:6.1f} s  {name}")
    failed = sum(not passed for passed, _ in results.values())
    print(f"{len(results) - failed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
