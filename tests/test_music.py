"""The synthesised music: what it promises about pitch, splits and repeatability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlab.foundations.music import (
    HELD_OUT,
    MAJOR,
    MINOR,
    MUSIC_SIZES,
    PROGRESSIONS,
    Note,
    Timbre,
    compose,
    make_band,
    music_corpus,
    render,
)

PLAIN = dict.fromkeys(("melody", "chords", "bass"), Timbre(1.0, 1.0, 0.01, 9.0, 0.0, 0.0))


@given(st.integers(40, 90))
@settings(max_examples=15, deadline=None)
def test_a_note_has_its_pitch(pitch):
    tone = render([Note(0.0, 1.2, pitch, 1.0, "melody")], PLAIN)[0, 0]
    spectrum = torch.fft.rfft(tone[800:16800] * torch.hann_window(16000)).abs()
    assert abs(int(spectrum.argmax()) - 440 * 2 ** ((pitch - 69) / 12)) <= 1.5


def test_no_harmonic_folds_back():
    """A4 at 3 kHz has three harmonics below 1500 Hz, and nothing else."""
    tone = render([Note(0.0, 1.0, 69, 1.0, "melody")], PLAIN, 3000)[0, 0]
    spectrum = torch.fft.rfft(tone[150:3150] * torch.hann_window(3000)).abs()
    near = torch.zeros(len(spectrum), dtype=torch.bool)
    for k in (1, 2, 3):
        near[440 * k - 8 : 440 * k + 9] = True
    assert spectrum[~near].max() < 0.02 * spectrum.max()


def test_even_harmonics_and_envelope():
    clarinet = Timbre(1.0, 0.0, 0.05, 0.1, 0.0, 0.0)
    tone = render([Note(0.0, 1.0, 69, 1.0, "melody")], {"melody": clarinet})[0, 0]
    spectrum = torch.fft.rfft(tone[800:8800] * torch.hann_window(8000)).abs()
    assert spectrum[438:443].max() < 0.02 * spectrum[218:223].max()
    loud = [float(tone[s : s + 160].abs().max()) for s in (800, 2400, 4000)]
    assert loud[1] / loud[0] == pytest.approx(np.exp(-1), rel=0.15)
    assert loud[2] / loud[1] == pytest.approx(np.exp(-1), rel=0.15)


@given(st.integers(0, 10_000), st.sampled_from(["train", "valid", "test"]))
@settings(max_examples=40, deadline=None)
def test_pieces_follow_their_progression(seed, split):
    """Bass notes are the roots of a progression that the split may use, in one key."""
    notes = compose(seed, split)
    bass = [n.pitch for n in sorted((n for n in notes if n.part == "bass"), key=lambda n: n.start)]
    allowed = PROGRESSIONS[:-HELD_OUT] if split == "train" else PROGRESSIONS[-HELD_OUT:]
    fits = [
        degrees for degrees in allowed for scale in (MAJOR, MINOR) for tonic in range(20, 50)
        if [tonic + scale[d] for d in degrees] == bass
    ]  # fmt: skip
    assert fits
    classes = {n.pitch % 12 for n in notes}
    assert any(classes <= {(t + s) % 12 for s in scale} for scale in (MAJOR, MINOR)
               for t in range(12))  # fmt: skip
    assert max(n.start + n.seconds for n in notes) < 7


def test_splits_share_neither_bands_nor_progressions():
    corpus = music_corpus("smoke")
    counts = {name: len(corpus.split(name)) for name in ("train", "valid", "test")}
    assert tuple(counts.values()) == MUSIC_SIZES["smoke"]
    assert not set(corpus.split("train").speakers) & set(corpus.split("test").speakers)
    assert len(set(PROGRESSIONS)) == len(PROGRESSIONS)


def test_reading_is_repeatable_and_whole():
    one, two = music_corpus("smoke"), music_corpus("smoke")
    for index in (0, 25, 33):
        wav = one[index].wav
        assert wav.shape[-1] == one.entries[index].samples
        assert torch.equal(wav, two[index].wav)
        assert torch.equal(one.read(index, 100, 900), wav[..., 100:900])
        assert 0.6 < float(wav.abs().max()) <= 0.7001
    assert make_band(3) == make_band(3) != make_band(4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compose(0, "live"), "split is 'live'"),
        (lambda: render([], PLAIN), "notes is empty"),
        (lambda: render(compose(0), PLAIN, 0), "sample_rate is 0"),
        (lambda: music_corpus("vast"), "size is 'vast'"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
