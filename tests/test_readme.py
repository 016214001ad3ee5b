"""The README: short, and its code runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from speechlab.foundations.audio_files import load_wav, save_wav
from speechlab.foundations.corpus import embedded_corpus
from speechlab.tokenizer import codec_training

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def real_speech_lines(rows: list[dict]) -> list[str]:
    """The README's table of `data/results/real_speech.json`."""
    lines = ["| | | word error | similarity | DNSMOS | ViSQOL |", "|---|---|---|---|---|---|"]
    for row in rows:
        for title, values in row["found"].items():
            found = {name: value[0] for name, value in values.items()}
            cells = [f"{found['WER']:.1%}"]
            cells += [f"{found[n]:.2f}" if n in found else "" for n in ("similarity", "DNSMOS")]
            cells.append(f"{found['ViSQOL']:.2f}" if "ViSQOL" in found else "")
            if (row["corpus"], title) == ("LibriSpeech", "recordings"):
                cells[:2] = "", f"{found['similarity']:.2f} (others)"  # different speakers
            lines.append(f"| {row['corpus']} | {title} | {' | '.join(cells)} |")
    return lines


def test_its_results_are_those_of_the_file():
    file = ROOT / "data" / "results" / "real_speech.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [len(row["found"]) for row in rows] == [4, 4]
    assert "\n".join(real_speech_lines(rows)) in README


def test_it_is_short():
    assert len(README.splitlines()) < 140
    assert len(BLOCKS) == 5


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the snippets read: a recording and a folder of recordings with texts."""
    corpus = embedded_corpus("smoke")
    save_wav(tmp_path / "in.wav", corpus[0].wav, 16000)
    for split in ("train", "valid", "test"):
        for u in corpus.split(split)[:4]:
            path = save_wav(
                tmp_path / "my" / "recordings" / u.speaker / f"{u.id}.wav", u.wav, 16000
            )
            path.with_suffix(".txt").write_text(u.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPEECHLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_snippets_run_in_order(place, monkeypatch):
    """As a reader would paste them, but for the length of the training."""
    monkeypatch.setitem(codec_training.CODEC_RECIPES, "cpu", codec_training.CODEC_RECIPES["smoke"])
    scope: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), scope)
    assert load_wav(place / "out.wav")[0].shape == scope["wav"].shape
    names = {path.name for path in (place / "my-codec").iterdir()}
    assert {"config.json", "model.safetensors", "report.json", "README.md"} <= names
    assert scope["sound"].shape == (1, 1, 320)
    assert scope["made"].reasons[0] in ("end", "length", "repeats")
    assert torch.equal(scope["first"], scope["corpus"].columns["codes"].cut(scope["corpus"][0].id))
    assert {"WER", "CER", "similarity"} <= scope["report"].estimates.keys()


def test_every_command_in_it_exists():
    from speechlab.cli.main import COMMANDS

    for words in re.findall(r"`speechlab ([a-z]+)", README):
        assert any(command.split()[0] == words for command in COMMANDS), words
