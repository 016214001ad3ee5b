"""Attacks: thousands of damaged files, and processes killed in the middle of their work.

A few of each run with the tests. `SPEECHLAB_ATTACKS=1 pytest tests/test_attacks.py` runs them all:
20,000 damaged files and 200 kills, about half an hour.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from processes import SESSION, processes

from speechlab import load
from speechlab.foundations.audio_files import load_wav, save_wav
from speechlab.foundations.contracts import AudioError
from speechlab.foundations.models import ModelError
from speechlab.tokenizer import files
from speechlab.tokenizer.tokens import TokenFileError, from_bytes, to_bytes

ALL = bool(os.environ.get("SPEECHLAB_ATTACKS"))
DAMAGED = 4000 if ALL else 100  # of each kind
KILLS = 67 if ALL else 3  # of each kind of work
MODEL = "speechtokenizer-small"


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One of the things that happen to files, or that somebody does to their headers."""
    out, kind = bytearray(data), rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[rng.randrange(len(out)) :]
    elif kind == 2:
        out += rng.randbytes(rng.randint(1, 40))
    elif kind == 3:  # in the header
        place = rng.randrange(min(len(out), 80))
        out[place : place + 4] = rng.choice([b"\xff" * 4, bytes(4), rng.randbytes(4), b"\x7f" * 4])
    elif kind == 4:
        start, stop = sorted(rng.sample(range(len(out)), 2))
        out[start:stop] = out[start:stop] * rng.randint(0, 2)
    else:
        out = bytearray(rng.randbytes(rng.randint(0, 300)))
    return bytes(out)


def bounded(call, *known: type[Exception]) -> None:
    """Run a call: it may succeed or raise a known error, within 2 s and 500 MB more than before."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        call()
    except known:
        pass
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "aiff", "w64", "caf", "au", "nist"])
def test_damaged_recordings(kind):
    wave = 0.3 * np.sin(np.arange(6000) / 9)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16000, format=kind.upper())
    data, rng = buffer.getvalue(), random.Random(kind)
    for _ in range(DAMAGED):
        bad = damaged(data, rng)
        bounded(lambda bad=bad: load_wav(bad, 16000, True, True), AudioError)


def test_damaged_token_files():
    tokenizer, rng = load(MODEL), random.Random(0)
    wav = (0.3 * torch.sin(torch.arange(16000) / 9)).view(1, 1, -1)
    file = files.encode_wav(tokenizer, wav)
    originals = [to_bytes(file), to_bytes(file, entropy=True)]
    for number in range(DAMAGED):
        bad = damaged(originals[number % 2], rng)
        if number % 3 and len(bad) > 4:  # somebody who knows how to compute a checksum
            bad = bad[:-4] + struct.pack("<I", zlib.crc32(bad[:-4]))
        bounded(lambda bad=bad: from_bytes(bad), TokenFileError)


def mangled(node, rng: random.Random):
    """A config with one value, somewhere inside, replaced, lost or added."""
    if isinstance(node, dict) and node and (rng.random() < 0.6 or any(
        isinstance(value, dict) for value in node.values())):  # fmt: skip
        key = rng.choice(sorted(node))
        changed = dict(node)
        if isinstance(node[key], dict) and rng.random() < 0.8:
            changed[key] = mangled(node[key], rng)
        elif rng.random() < 0.15:
            del changed[key]
        elif rng.random() < 0.15:
            changed[key + "x"] = 1
        else:
            wild = [None, "x", -1, 0, 1, 3, 2.5, 1e308, [], {}, True, 10**6, 10**9, 2**63, [1] * 9]
            changed[key] = rng.choice(wild)
        return changed
    return rng.choice([None, [], 3, "x", {}])


@pytest.mark.parametrize("name", ["speechtokenizer-small", "gpt-small", "hybrid-small"])
def test_mangled_configs(name, tmp_path):
    """Sizes that a config declares are built only once they are seen to be those of the file."""
    folder, rng = Path(shutil.copytree(data_folder(name), tmp_path / "m")), random.Random(name)
    about = json.loads((folder / "config.json").read_text())
    load(folder)  # imports what it needs
    for _ in range(DAMAGED):
        (folder / "config.json").write_text(json.dumps(mangled(about, rng)))
        bounded(lambda: load(folder), ModelError)


@pytest.mark.parametrize("name", ["speechtokenizer-small"])
def test_damaged_weights(name, tmp_path):
    """The header of a safetensors file is JSON with offsets: lengths and shapes may be anything."""
    folder, rng = Path(shutil.copytree(data_folder(name), tmp_path / "m")), random.Random(name)
    load(folder)
    data = (folder / "model.safetensors").read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    for number in range(DAMAGED):
        head = bytearray(data[: 8 + size])
        if number % 4 == 0:
            head[:8] = struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**40, 2**63 - 1]))
        else:
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(8, len(head))
                likely = b'0123456789"[]{},:-eFI'
                head[place] = rng.choice(likely) if number % 2 else rng.randrange(256)
        rest = data[8 + size :] if number % 3 else data[8 + size : -rng.randint(1, 5000)]
        (folder / "model.safetensors").write_bytes(bytes(head) + rest)
        bounded(lambda: load(folder), ModelError)


def data_folder(name: str) -> Path:
    from speechlab.foundations.models import model_folder

    return model_folder(name)


# Kill -9

WORK = {
    "encode": """
from speechlab.tokenizer.files import encode_folder
encode_folder("speechtokenizer-small", "in", "out", workers=WORKERS, batch_seconds=8)""",
    "column": """
from speechlab import folder_corpus, load
from speechlab.foundations.columns import codes_column, with_column
codec = load("speechtokenizer-small")
with_column(folder_corpus("in"), codes_column(codec), "columns")""",
    "training": """
from dataclasses import replace
from speechlab.foundations.judge_training import RECOGNIZER_RECIPES
from speechlab.foundations.recipes import run_recipe
recipe = RECOGNIZER_RECIPES["smoke"]
loop = replace(recipe.loop, steps=30, save_every=3)
run_recipe(replace(recipe, width=8, loop=loop), "run")""",
}


def finished(what: str, folder: Path) -> dict[str, bytes]:
    """What a work leaves when it is done, without what tells the time."""
    places = {"encode": "out/*.spt", "column": "columns/*/*", "training": "run/model.safetensors"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob(places[what])}


@pytest.mark.parametrize("what", WORK)
def test_kill_minus_9(what, tmp_path, corpus):
    """Killed again and again at random moments, the work ends as if it had not been."""
    for place in ("whole", "killed"):
        for i in range(12):
            wav = corpus[i % 8].wav.roll(100 * i)
            save_wav(tmp_path / place / "in" / f"{i}.wav", wav, 16000)
    script = "if __name__ == '__main__':\n" + "\n".join(
        f"    {line}" for line in WORK[what].replace("WORKERS", "2").strip().splitlines()
    )
    for place in ("whole", "killed"):
        (tmp_path / place / "work.py").write_text(script)

    def start(place: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "work.py"], cwd=tmp_path / place, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "SPEECHLAB_DEVICE": "cpu"},
        )  # fmt: skip

    started = time.monotonic()
    assert start("whole").wait() == 0
    seconds, rng, killed = time.monotonic() - started, random.Random(what), 0
    while killed < KILLS:
        parent = start("killed")
        try:
            parent.wait(seconds * rng.uniform(0.2, 1.0))
        except subprocess.TimeoutExpired:
            killed += 1
            parent.send_signal(signal.SIGKILL)
            parent.wait()
        else:  # it was done first: begin again, and strike sooner
            assert parent.returncode == 0
            seconds *= 0.8
            for made in ("out", "columns", "run"):
                shutil.rmtree(tmp_path / "killed" / made, ignore_errors=True)
        deadline = time.monotonic() + 20
        while processes(SESSION, parent.pid):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.1)
        for path in (tmp_path / "killed").glob("out/*.spt"):
            files.read_tokens(path)  # nothing half done under its name
    assert start("killed").wait() == 0
    whole, again = (finished(what, tmp_path / place) for place in ("whole", "killed"))
    assert whole
    assert whole.keys() == again.keys()
    if what != "encode":
        assert whole == again
    for name in whole if what == "encode" else ():  # after a kill other rows share a batch
        one, two = (files.read_tokens(tmp_path / place / name) for place in ("whole", "killed"))
        assert (one.spec, one.samples, one.source) == (two.spec, two.samples, two.source)
        assert (one.codes == two.codes).float().mean() > 0.99  # ties
