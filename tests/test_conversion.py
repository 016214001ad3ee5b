"""One-shot voice conversion, separation scores, the mixing desk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from same_codes import assert_same_codes

from speechlab.foundations.corpus import Corpus
from speechlab.foundations.evaluation import speaker_similarity
from speechlab.foundations.judges import SpeakerEncoder
from speechlab.tokenizer.conversion import (
    MixingDesk,
    convert,
    convert_codes,
    level_vectors,
    matching_frames,
    separation,
)
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.load("speechtokenizer-small")


def test_levels_come_from_where_they_should(tokenizer):
    generator = torch.Generator().manual_seed(0)
    source, reference = (torch.randint(256, (1, 8, n), generator=generator) for n in (30, 11))
    cycled = convert_codes(tokenizer, source, reference, align="cycle")
    for t in range(30):
        assert cycled[0, 0, t] == source[0, 0, t]
        assert torch.equal(cycled[0, 1:, t], reference[0, 1:, t % 11])
    matched = convert_codes(tokenizer, source, reference, 4)
    assert matched.shape == (1, 4, 30)
    columns = {tuple(c.tolist()) for c in reference[0, 1:4].T}
    assert {tuple(c.tolist()) for c in matched[0, 1:].T} <= columns
    assert torch.equal(convert_codes(tokenizer, source, reference, 1), source[:, :1])


def test_matching_is_the_nearest_window():
    generator = torch.Generator().manual_seed(1)
    source, reference = (torch.randn(3, n, generator=generator) for n in (12, 9))
    found = matching_frames(source, reference, neighbours=1)

    def window(x, t):
        places = [min(max(t + o, 0), x.shape[1] - 1) for o in (-1, 0, 1)]
        return x[:, places].double()

    for t in range(12):
        distances = [
            float((window(source, t) - window(reference, s)).square().sum()) for s in range(9)
        ]
        assert int(found[t]) == int(np.argmin(distances))


def test_conversion_moves_the_voice(tokenizer, corpus):
    voice = SpeakerEncoder.load("speaker-encoder")
    moved = []
    for i in range(4):
        source, reference = corpus.split("test")[i], corpus.split("test")[i + 4]
        made = convert(tokenizer, source.wav, reference.wav)
        assert made.shape == source.wav.shape
        plain = tokenizer.decode(tokenizer.encode(source.wav), source.samples)
        before, after = (speaker_similarity(voice, w, reference.wav) for w in (plain, made))
        moved.append(after - before)
    assert np.mean(moved) > 0.1


def test_bad_conversions(tokenizer, corpus):
    codes = tokenizer.encode(corpus[0].wav)
    with pytest.raises(ValueError, match="align is 'x'"):
        convert_codes(tokenizer, codes, codes, align="x")
    for levels in (0, 9):
        with pytest.raises(ValueError, match=f"levels is {levels}"):
            convert_codes(tokenizer, codes, codes, levels)
    with pytest.raises(ValueError, match="reference range from"):
        convert_codes(tokenizer, codes, codes + 300)
    with pytest.raises(ValueError, match="source holds 2 signals"):
        convert_codes(tokenizer, codes.repeat(2, 1, 1), codes)
    with pytest.raises(ValueError, match="source is a list"):
        convert(tokenizer, [0.0], corpus[0].wav)
    with pytest.raises(ValueError, match="reference has shape"):
        convert(tokenizer, corpus[0].wav, corpus[0].wav[0])


def test_separation_counts_neighbours_by_hand():
    rng = np.random.default_rng(0)
    vectors, labels, groups = (
        rng.normal(size=(40, 3)),
        rng.integers(3, size=40),
        rng.integers(8, size=40),
    )
    found = separation(vectors, labels, groups, neighbours=3)
    right = 0
    for i in range(40):
        others = [j for j in range(40) if groups[j] != groups[i]]
        others.sort(key=lambda j: float(((vectors[i] - vectors[j]) ** 2).sum()))
        votes = [int(labels[j]) for j in others[:3]]
        best = max(sorted(set(labels.tolist())), key=votes.count)
        right += best == labels[i]
    assert found.accuracy == pytest.approx(right / 40)
    assert found.chance == np.bincount(labels).max() / 40


def test_level_vectors_are_means_of_code_vectors(tokenizer, corpus):
    part = corpus[:3]
    vectors, labels, _ = level_vectors(tokenizer, part, 1, 8)
    codes = tokenizer.encode(part[1].wav)
    z = tokenizer.quantizer.codes_to_vectors(codes)[0, 1:].sum(dim=0).mean(dim=1)
    np.testing.assert_allclose(vectors[1], z.numpy(), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [e.speaker for e in part.entries]
    phones, symbols, where = level_vectors(tokenizer, part, 0, 1, ["pau", "s", "t", "n"])
    assert set(symbols) <= {"s", "t", "n"}
    assert phones.shape == (len(symbols), 64)
    assert set(where) <= {0, 1, 2}


def test_mixing_desk(tokenizer, corpus):
    clips = {"one": corpus[0].wav[..., :20000], "two": corpus[1].wav}
    desk = MixingDesk(tokenizer, clips)
    assert_same_codes(tokenizer, clips["one"], desk.codes["one"])
    assert_same_codes(tokenizer, clips["two"], desk.codes["two"])
    plain = tokenizer.decode(desk.codes["one"], 20000)
    assert torch.equal(desk.mix("one", "two", 8, 8, "match"), plain)
    converted = convert(tokenizer, clips["one"], clips["two"])
    assert torch.equal(desk.mix("one", "two", 1, 8, "match"), converted)
    page = desk.static(
        [("one", "two", 1, 8, "cycle"), ("one", "two", 8, 8, "match")], "words"
    ).html()
    assert "one 1–1, two 2–8, cycle" in page
    assert "one, 8 levels" in page
    box = desk.widget()
    slider = next(c for c in box.children if getattr(c, "description", "") == "levels in all")
    slider.value = 2  # the player follows without an error
    with pytest.raises(ValueError, match="mixing takes two"):
        MixingDesk(tokenizer, {"one": corpus[0].wav})


def test_conversion_needs_no_phones(tokenizer, corpus):
    assert isinstance(corpus, Corpus)
    noise = 0.1 * torch.randn(1, 1, 5000, generator=torch.Generator().manual_seed(0))
    assert convert(tokenizer, noise.clamp(-1, 1), corpus[0].wav[..., :400]).shape == noise.shape
