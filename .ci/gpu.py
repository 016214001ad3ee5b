"""Work for a borrowed GPU: `make gpu BUDGET=540 TO=folder`, then `make gpu-apply FROM=folder`.

One ordered list, the most valuable first: the tests that need CUDA, the benchmarks, then trainings,
studies and lessons. Each entry has a folder of its own below runs/gpu, so that a training that was
stopped goes on; what is done is not done again until its command changes. The budget is in seconds:
nothing starts that cannot end in it, and what is running at its end is stopped. TO gets the
results as archive parts of at most 15 MiB.

    python .ci/gpu.py run --budget 540 --out FOLDER    (--rehearse: smoke sizes, on any device)
    python .ci/gpu.py apply FOLDER                     results, checkpoints, executed pages
    python .ci/gpu.py wheels                           packages for a machine without network
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "gpu"  # a rehearsal has another: see main
PART = 15 << 20  # bytes of an archive part
LIMIT = 56 << 20  # bytes that come back
GRACE = 20.0  # seconds for a stopped training to write its checkpoint
WHEELS = (  # what the course needs and a machine with torch, transformers, accelerate may lack
    "audioread", "cffi", "datasets", "dill", "docstring-parser", "espeakng-loader", "execnb",
    "fastcore", "ipykernel", "ipython", "ipywidgets", "jiwer", "jupyter-client", "jupyter-core",
    "lazy-loader", "librosa", "msgpack", "multiprocess", "nbclient", "nbformat", "num2words",
    "docopt", "platformdirs", "pooch", "pydantic", "pydantic-core", "pystoi", "pyzmq", "rapidfuzz",
    "soundfile", "soxr", "speechtokenizer", "tornado", "traitlets", "typeguard", "tyro",
    "vector-quantize-pytorch", "beartype", "einx", "annotated-types", "typing-inspection",
    "lion-pytorch", "fastjsonschema", "jsonschema", "jsonschema-specifications", "referencing",
    "rpds-py", "comm", "jedi", "parso", "prompt-toolkit", "wcwidth", "frozendict", "decorator",
    "nbdev", "ghapi", "matplotlib-inline", "stack-data", "executing", "asttokens", "pure-eval",
    "pexpect", "ptyprocess", "nest-asyncio", "debugpy", "ipython-pygments-lexers",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command of the list."""

    name: str
    seconds: int  # that it needs on a GPU; with less left it is not started
    command: tuple[str, ...]
    resumes: bool = False  # stopped by the budget, it goes on next time: started with any time left
    keeps: tuple[str, ...] = ()  # what comes back, relative to the root


def steps(rehearse: bool) -> list[Step]:
    """The list, by value. A rehearsal has the same entries at smoke size."""
    quick = ("--quick",) if rehearse else ()
    size = "smoke" if rehearse else "gpu"
    found = [
        Step("tests", 150, ("-m", "pytest", "-m", "cuda", "-n0", "tests")),
        *(
            Step(f"benchmark-{name}", 60,
                 (f"benchmarks/{name}.py", "--json", "--device", "auto", *quick))
            for name in ("codec", "gpt")
        ),
    ]  # fmt: skip
    command = ("-c", "from speechlab.cli.main import main; main()")
    home = WORK.relative_to(ROOT)
    for name in ("codec", "gpt", "teacher"):
        place = f"{home}/{name}"
        kept = tuple(f"{place}/{f}" for f in ("config.json", "model.safetensors", "report.json",
                                              "README.md", "run"))  # fmt: skip
        found.append(Step(f"train-{name}", 30, (*command, "train", name, size, "--out", place),
                          True, kept))  # fmt: skip
    for name in ("distillation", "slmtokbench"):
        out = f"{home}/results/{name}.json"
        asked = ("reproduce", name, "--scale", size, "--folder", f"{home}/studies", "--out", out)
        found.append(Step(f"study-{name}", 30, (*command, *asked), True, (out, f"{home}/studies")))
    page = "nbs/tokenizer/01_rvq.ipynb"
    asked = (".ci/run_notebook.py", "--flags", "cuda slow", page)
    asked = (*asked, "--scratch") if rehearse else asked
    found.append(Step("lesson-rvq", 240, asked, keeps=(page,)))
    return found


def run_step(step: Step, seconds: float, environment: dict[str, str]) -> tuple[str, float]:
    """("done", "stopped" or "failed", seconds); output goes to the step's log."""
    started = time.monotonic()
    with open(WORK / f"{step.name}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, env=environment, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        state = "stopped"
        try:
            state = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            for kind, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, 5)):  # Ctrl-C saves
                try:
                    os.killpg(process.pid, kind)
                    process.wait(wait)
                    break
                except (subprocess.TimeoutExpired, ProcessLookupError):
                    continue
    return state, time.monotonic() - started


def run(budget: float, out: Path, rehearse: bool) -> int:
    """Work through the list; 0 if nothing failed."""
    ends = time.monotonic() + budget
    import torch

    if not rehearse and not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU, and PyTorch sees none. `--rehearse` tries it without.")
        return 1
    WORK.mkdir(parents=True, exist_ok=True)
    book = WORK / "done.json"
    done = json.loads(book.read_text()) if book.exists() else {}
    scale = "smoke" if rehearse else "gpu"
    environment = os.environ | {"SPEECHLAB_SCALE": scale, "SPEECHLAB_REHEARSE": str(int(rehearse))}
    failed, made = [], []
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for step in steps(rehearse):
        left = ends - time.monotonic() - GRACE - 15  # to stop it, and to pack
        mark = " ".join([commit, *step.command] if step.name == "tests" else step.command)
        if done.get(step.name, {}).get("command") == mark:
            print(f"{step.name}: done before", flush=True)
            continue
        if left < (30 if step.resumes else step.seconds * (0.2 if rehearse else 1.0)):
            print(f"{step.name}: not started, {left:.0f} s are left", flush=True)
            continue
        state, seconds = run_step(step, left, environment)
        print(f"{step.name}: {state} after {seconds:.0f} s", flush=True)
        if state == "done":
            done[step.name] = {"command": mark, "seconds": round(seconds)}
            book.write_text(json.dumps(done, indent=1))
        failed += [step.name] * (state == "failed")
        made += step.keeps if state == "done" and not step.resumes else ()
    pack(out, [*made, *(name for s in steps(rehearse) if s.resumes for name in s.keeps)])
    for name in failed:
        print(f"--- {name}\n" + "\n".join((WORK / f"{name}.log").read_text().splitlines()[-30:]))
    return int(bool(failed))


def files_of(place: Path) -> list[Path]:
    """The files of a folder, or the file itself; of checkpoints the newest only."""
    found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    steps = {p.parent: p.parent.parent for p in found if p.parent.name.startswith("step-")}
    newest = {home: max(s for s, h in steps.items() if h == home) for home in steps.values()}
    return [p for p in found if p.parent not in steps or newest[steps[p.parent]] == p.parent]


def pack(out: Path, names: list[str]) -> None:
    """What should come back, the most valuable first, as parts that fit through a narrow door."""
    out.mkdir(parents=True, exist_ok=True)
    logs = [str(path.relative_to(ROOT)) for path in [*WORK.glob("*.log"), WORK / "done.json"]]
    files = [file for name in dict.fromkeys([*logs, *names]) for file in files_of(ROOT / name)]
    files.sort(key=lambda file: "run" in file.relative_to(ROOT).parts)  # checkpoints come last
    whole, total, left = out / "gpu.tar.gz", 0, []
    with tarfile.open(whole, "w:gz") as archive:
        for file in files:
            size = file.stat().st_size
            if total + size > LIMIT:
                left.append(str(file.relative_to(ROOT)))
                continue
            total += size
            archive.add(file, file.relative_to(ROOT))
    if left:
        print(f"left out, {LIMIT >> 20} MiB are full: {', '.join(left[:5])} and {len(left)} in all")
    data = whole.read_bytes()
    whole.unlink()
    for number, start in enumerate(range(0, len(data), PART)):
        (out / f"gpu.tar.gz.{number:02d}").write_bytes(data[start : start + PART])
    print(f"{len(data) / 1e6:.1f} MB in {out}", flush=True)


def apply(source: Path) -> int:
    """Unpack what `run` packed: runs/gpu goes on, results and pages take their places."""
    parts = sorted(source.glob("gpu.tar.gz.*"))
    if not parts:
        print(f"{source}: no gpu.tar.gz.00 in this folder")
        return 1
    whole = source / "whole.tar.gz" if os.access(source, os.W_OK) else WORK / "whole.tar.gz"
    whole.parent.mkdir(parents=True, exist_ok=True)
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as archive:
        archive.extractall(ROOT, filter="data")
    whole.unlink()
    for log in sorted(WORK.glob("benchmark-*.log")):
        text = log.read_text()
        if '{\n "machine"' in text:
            found = json.JSONDecoder().raw_decode(text[text.rindex('{\n "machine"') :])[0]
            name = log.stem.removeprefix("benchmark-")
            target = ROOT / "data" / "results" / f"{name}_gpu_benchmark.json"
            target.write_text(json.dumps(found, indent=1) + "\n")
            print(f"wrote {target.relative_to(ROOT)}")
    for made in sorted(WORK.glob("results/*.json")):
        target = ROOT / "data" / "results" / f"{made.stem}_gpu.json"
        shutil.copy(made, target)
        print(f"wrote {target.relative_to(ROOT)}")
    print("trainings stand in runs/gpu; a finished one becomes a checkpoint when it is copied into "
          "data/checkpoints by hand")
    return 0


def wheels(python: str) -> int:
    """Download the packages of WHEELS, in the versions of constraints.txt, into .whl."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    known = dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line)
    wanted = [f"{name}=={known[name]}" for name in WHEELS if name in known]
    kinds = [f"--platform=manylinux{n}_x86_64" for n in ("_2_28", "_2_27", "_2_17", "2014")]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python,
               "--implementation", "cp", *kinds, "--platform=any", "-d", ".whl"]  # fmt: skip
    shutil.rmtree(ROOT / ".whl", ignore_errors=True)  # two versions of one would stop the install
    failed = [w for w in wanted if subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", *options, w], cwd=ROOT, check=False
    ).returncode]  # fmt: skip
    size = sum(path.stat().st_size for path in (ROOT / ".whl").glob("*.whl")) / 1e6
    print(f"{len(wanted) - len(failed)} packages, {size:.0f} MB in .whl; not found: {failed}")
    return 0


def install() -> None:
    """Make the wheels beside the checkout importable; nothing is installed for others."""
    made = sorted((ROOT / ".whl").glob("*.whl"))
    if not made:
        return
    target = Path("/tmp/speechlab-wheels")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
               "--no-compile", "--upgrade", "--target", str(target), *map(str, made)]  # fmt: skip
    subprocess.run(command, check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(target)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "apply", "wheels"])
    parser.add_argument("folder", nargs="?", type=Path, help="of apply")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-out")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--python", default="3.12", help="of the machine that wheels are for")
    chosen = parser.parse_args()
    if chosen.rehearse:
        global WORK
        WORK = ROOT / "runs" / "rehearsal"
    if chosen.what == "wheels":
        return wheels(chosen.python)
    if chosen.what == "apply":
        return apply(chosen.folder or chosen.out)
    install()
    return run(chosen.budget, chosen.out, chosen.rehearse)


if __name__ == "__main__":
    sys.exit(main())
