"""speechlab.foundations.phonemes: exact times, fixed bytes, clean text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.phonemes import (
    ACCENTS,
    PAUSE,
    Phone,
    Request,
    Voice,
    _phones_from_events,
    clean_text,
    speak,
    speak_all,
)

TEXT = "The judge measured three yellow jackets, and then nothing."


@pytest.fixture(scope="module")
def spoken():
    return speak_all([Request(TEXT, accent=accent) for accent in ACCENTS])


def test_phones_tile_the_signal_in_each_accent(spoken):
    for said in spoken:
        assert said.phones[0].start == 0
        assert said.phones[-1].end == len(said.samples)
        assert all(a.end == b.start for a, b in zip(said.phones, said.phones[1:]))
        assert all(p.end > p.start for p in said.phones)
        assert not any(a.ipa == b.ipa == PAUSE for a, b in zip(said.phones, said.phones[1:]))


def test_pauses_are_quiet_and_vowels_are_loud(spoken):
    """The boundaries mean something: energy inside long vowels is far above that inside pauses."""
    for said in spoken:
        level = {True: [], False: []}
        for phone in said.phones:
            piece = said.samples[phone.start : phone.end].astype(float)
            if phone.ipa == PAUSE or phone.stress == 1:
                level[phone.ipa == PAUSE].append(np.sqrt(np.mean(piece**2)))
        assert min(level[False]) > 3 * np.median(level[True])


def test_the_same_call_gives_the_same_bytes():
    one, two = speak(TEXT), speak(TEXT)
    assert np.array_equal(one.samples, two.samples)
    assert one.phones == two.phones
    assert not np.array_equal(speak(TEXT, seed=1).samples, one.samples)


def test_no_digital_silence_and_no_clipping(spoken):
    for said in spoken:
        runs = np.abs(said.samples[:2000]).reshape(-1, 100).max(axis=1)
        assert runs.min() > 0
        assert np.abs(said.samples.astype(int)).max() < 32767
        assert abs(20 * np.log10(np.sqrt(np.mean((said.samples / 32768) ** 2))) + 26) < 1.5


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100])
def test_rates_keep_duration_and_boundaries(rate):
    base, other = (
        speak("A short test.", sample_rate=22050),
        speak("A short test.", sample_rate=rate),
    )
    assert len(other.samples) == -(-len(base.samples) * rate // 22050)
    assert other.phones[-1].end == len(other.samples)
    for a, b in zip(base.phones, other.phones):
        assert a.ipa == b.ipa
        assert abs(a.start / 22050 - b.start / rate) <= 1 / rate


def test_resampling_agrees_with_torchaudio():
    import torch
    import torchaudio

    base = speak("She sells sea shells.", sample_rate=22050).samples.astype(np.float32)
    ours = speak("She sells sea shells.", sample_rate=16000).samples.astype(np.float32)
    theirs = torchaudio.functional.resample(torch.from_numpy(base), 22050, 16000, 64).numpy()
    size = min(len(ours), len(theirs))
    assert np.corrcoef(ours[:size], theirs[:size])[0, 1] > 0.999


def test_words_follow_the_text(spoken):
    for said in spoken:
        assert [word for _, word in said.words][:3] == ["The", "judge", "measured"]
        assert all(a[0] < b[0] for a, b in zip(said.words, said.words[1:]))


@given(
    st.lists(st.tuples(st.integers(0, 500), st.sampled_from(["", "ˈæ", "t", "ˌoʊ"])), max_size=20)
)
def test_any_events_give_a_tiling(events):
    events = [(7, sample, 1, 0, name.encode()) for sample, name in sorted(events)]
    phones = _phones_from_events(events, 500, 0.7256)
    total = 500
    assert phones[0].start == 0
    assert phones[-1].end == total
    assert sum(p.end - p.start for p in phones) == total
    assert all(isinstance(p, Phone) and not set("ˈˌ") & set(p.ipa) for p in phones)


@pytest.mark.parametrize("text", ["", "   ", "...", "?!", "语音", "naïve café ☕", 7, None])
def test_unspeakable_text_is_refused(text):
    with pytest.raises(ValueError, match="text"):
        clean_text(text)


@given(st.text(max_size=60))
def test_clean_text_is_idempotent_or_refuses(text):
    try:
        clean = clean_text(text)
    except ValueError:
        return
    assert clean_text(clean) == clean
    assert clean.isascii()


def test_bad_requests():
    with pytest.raises(ValueError, match="accent is 'klingon'"):
        Request("Hello.", accent="klingon")
    with pytest.raises(ValueError, match=r"voice\.rate is 500"):
        Request("Hello.", Voice(rate=500))
    with pytest.raises(ValueError, match="requests is empty"):
        speak_all([])


def test_numbers_count_as_one_word():
    assert [word for _, word in speak("She has 25 cats.").words] == ["She", "has", "25", "cats"]


def test_bad_rates_are_named():
    for rate in (0, 16000.0):
        with pytest.raises(ValueError, match=f"sample_rate is {rate}"):
            speak("Hello.", sample_rate=rate)
