"""Shared fixtures. Tests run on the CPU, at smoke scale, with one thread on CI's noisy cores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("SPEECHLAB_SCALE", "smoke")
os.environ.setdefault("SPEECHLAB_DEVICE", "cpu")

import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"

settings.register_profile("speechlab", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("speechlab")
if os.environ.get("CI"):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus():
    """The embedded corpus at smoke size, from the user's cache."""
    from speechlab.foundations.corpus import embedded_corpus

    return embedded_corpus("smoke")


@pytest.fixture
def tone():
    """Half a second of a 440 Hz tone, (1, 1, 8000) at 16 kHz."""
    return (0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 16000)).view(1, 1, -1)


@pytest.fixture(scope="session")
def real_speech():
    """The folder of real recordings; tests that ask for it are skipped where it is absent."""
    if not (REAL / "ljspeech" / "metadata.csv").exists():
        pytest.skip("no real recordings beside the checkout")
    return REAL


@dataclass
class Done:
    """How a command ended."""

    stdout: str
    stderr: str
    returncode: int


@pytest.fixture
def command(capsys):
    """Runs a command in this process: a subprocess would prove no more and import torch again."""

    def run(*arguments: str) -> Done:
        from speechlab.cli.main import main

        capsys.readouterr()
        code = 0
        try:
            main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return Done(said.out, said.err, code)

    return run
