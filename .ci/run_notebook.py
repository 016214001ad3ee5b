"""Execute notebooks in place, keep their outputs, and clean them: `make run NB=nbs/…ipynb`.

Cells flagged `#| cuda`, `#| slow` or `#| notest` keep the outputs they have, unless the flag is
given with `--flags`. Progress bars and widget views, which say nothing in a stored page, are
dropped. With `--scratch` nothing is written: the notebooks are only executed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FLAGS = {"cuda", "slow", "notest"}
ROOT = Path(__file__).resolve().parent.parent


def directives(source: str) -> set[str]:
    """Names of the `#| name: value` lines of a cell."""
    lines = [line[2:].strip() for line in source.splitlines() if line.startswith("#|")]
    return {line.split(":")[0].split()[0] for line in lines if line}


def worth_keeping(output: dict) -> bool:
    """Whether a stored page has use for this output."""
    if output.get("output_type") == "stream":
        return output.get("name") != "stderr"
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def execute(path: Path, flags: set[str], timeout: int, scratch: bool) -> float:
    """Run one notebook from its first cell to its last; return the seconds it took."""
    os.environ.pop("MPLBACKEND", None)  # another backend than the kernel's own shows no figure
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(
        book,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    started = time.perf_counter()
    with client.setup_kernel():
        for index, cell in enumerate(book.cells):
            if cell.cell_type == "code" and not (directives(cell.source) & FLAGS) - flags:
                client.execute_cell(cell, index)
                cell.outputs = [o for o in cell.outputs if worth_keeping(o)]
    seconds = time.perf_counter() - started
    if not scratch:
        nbformat.write(book, path)  # sources and outputs as lists of lines: diffs stay small
        if shutil.which("nbdev_clean"):  # a borrowed machine may lack it
            subprocess.run(["nbdev_clean", "--fname", str(path)], check=True, cwd=ROOT)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="space-separated flags of cells to run as well")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a cell may take")
    parser.add_argument("--scratch", action="store_true", help="write nothing")
    options = parser.parse_args()
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
    for path in options.notebooks:
        print(f"{path} … ", end="", flush=True)
        seconds = execute(
            path.resolve(), set(options.flags.split()), options.timeout, options.scratch
        )
        print(f"{seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
