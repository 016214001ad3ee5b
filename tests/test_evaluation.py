"""Phone labels, purity and PNMI, mel distance, recogniser."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.evaluation import (
    PhoneRecognizer,
    RecognizerConfig,
    code_quality,
    ctc_loss,
    mel_distance,
    phone_error_rate,
    phone_frames,
    phone_symbols,
    phone_targets,
    spoken_phones,
    token_quality,
    train_recognizer,
)


def test_phone_frames_are_those_of_the_middle_sample(corpus):
    symbols = phone_symbols(corpus)
    for entry in corpus.entries[:8]:
        labels = phone_frames(entry, symbols)
        assert len(labels) == -(-entry.samples // 320)
        for frame, label in enumerate(labels):
            middle = min(frame * 320 + 160, entry.samples - 1)
            (phone,) = [p for p in entry.phones if p.start <= middle < p.end]
            assert symbols[label] == phone.ipa
    assert (phone_frames(entry, ["only this"]) == -1).all()
    with pytest.raises(ValueError, match="has no phones"):
        phone_frames(entry.__class__("x", 16000), symbols)


@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 4)), min_size=1, max_size=200))
def test_token_quality_matches_counting(pairs):
    codes, labels = map(np.array, zip(*pairs))
    seen = [(c, p) for c, p in pairs if p >= 0]
    if not seen:
        with pytest.raises(ValueError, match="no frame"):
            token_quality(codes, labels)
        return
    total, joint = len(seen), Counter(seen)
    by_code, by_phone = Counter(c for c, _ in seen), Counter(p for _, p in seen)
    best = sum(max(joint[c, p] for p in by_phone) for c in by_code) / total
    information = sum(
        n / total * math.log(n * total / (by_code[c] * by_phone[p])) for (c, p), n in joint.items()
    )
    entropy = -sum(n / total * math.log(n / total) for n in by_phone.values())
    found = token_quality(codes, labels)
    assert found.purity == pytest.approx(best)
    assert found.frames == total
    assert found.codes_used == len(by_code)
    if entropy > 0:
        assert found.pnmi == pytest.approx(information / entropy, abs=1e-9)


def test_pnmi_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(9, size=500)
    codes = np.where(rng.random(500) < 0.6, labels, rng.integers(20, size=500))
    found = token_quality(codes, labels).pnmi
    entropy = metrics.mutual_info_score(labels, labels)
    assert found == pytest.approx(metrics.mutual_info_score(codes, labels) / entropy)
    assert found == pytest.approx(metrics.homogeneity_score(labels, codes))


def test_code_quality_of_perfect_and_shuffled_codes(corpus):
    symbols, part = phone_symbols(corpus), corpus[:6]
    answers = {tuple(u.wav[0, 0, :50].tolist()): phone_frames(u.entry, symbols) for u in part}

    def perfect(wav):
        return torch.from_numpy(answers[tuple(wav[0, 0, :50].tolist())])

    assert code_quality(perfect, part, symbols).purity == pytest.approx(1)
    assert code_quality(perfect, part, symbols, shuffled=True).purity < 0.5
    with pytest.raises(ValueError, match="codes for"):
        code_quality(lambda wav: torch.zeros(3), part, symbols)
    with pytest.raises(ValueError, match="as many"):
        token_quality(np.zeros(3, int), np.zeros(4, int))


def test_mel_distance(tone):
    assert mel_distance(tone, tone) == 0
    assert mel_distance(tone, -tone) < 1e-5
    silence = torch.zeros_like(tone)
    loud = mel_distance(tone, silence)
    assert loud > mel_distance(tone, 0.5 * tone) > 0
    with pytest.raises(ValueError, match="rebuilt"):
        mel_distance(tone, tone[..., 1:])


def test_ctc_loss_is_that_of_all_paths():
    """Sum the probabilities of every path that spells the target, by enumeration."""
    from itertools import product

    scores = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    targets, frames = [[1, 2], [2]], torch.tensor([4, 3])
    total = 0.0
    for row, target in enumerate(targets):
        probability = 0.0
        for path in product(range(3), repeat=int(frames[row])):
            merged = [s for i, s in enumerate(path) if i == 0 or s != path[i - 1]]
            if [s for s in merged if s] == target:
                probability += math.exp(sum(float(scores[row, t, s]) for t, s in enumerate(path)))
        total -= math.log(probability) / len(target) / 2
    assert float(ctc_loss(scores, frames, targets)) == pytest.approx(total, rel=1e-4)


def test_transcription_merges_and_drops_blanks(monkeypatch):
    model = PhoneRecognizer(RecognizerConfig(("a", "b"), width=4)).eval()
    path = torch.tensor([1, 1, 0, 1, 2, 2, 0, 0])
    scores = torch.nn.functional.one_hot(path, 3).float()[None]
    monkeypatch.setattr(model, "forward", lambda wav, lengths=None: scores)
    assert model.transcribe(torch.zeros(1, 1, 7 * 320)) == [["a", "a", "b"]]


def test_recogniser_trains_and_is_stored(tmp_path, corpus):
    model = train_recognizer(corpus, tmp_path / "run", steps=4, batch_size=4, width=8)
    assert model.config.symbols == tuple(sorted(corpus.phone_counts()))
    model.save_pretrained(tmp_path / "model")
    again = PhoneRecognizer.from_pretrained(tmp_path / "model")
    wav = corpus[0].wav
    torch.testing.assert_close(again(wav), model(wav))
    one = phone_error_rate(model, corpus[:2])
    assert one >= 0
    silent = phone_error_rate(model, corpus[:2], lambda wav: torch.zeros_like(wav))
    assert silent >= 0
    known, part = phone_targets(corpus)
    entry = part.entries[0]
    assert [model.config.symbols[n - 1] for n in known[entry.id]] == spoken_phones(entry)


def test_the_shipped_recogniser_reads_unseen_speech(corpus):
    recognizer = PhoneRecognizer.from_pretrained("phone-recognizer")
    test = corpus.split("test")
    error = phone_error_rate(recognizer, test)
    assert error < 0.3
    noise = torch.Generator().manual_seed(0)
    disturbed = phone_error_rate(
        recognizer, test, lambda w: (w + 0.3 * torch.randn(w.shape, generator=noise)).clamp(-1, 1)
    )
    assert disturbed > error + 0.2


def test_padding_hardly_matters(corpus):
    """The last frames meet zeros instead of a mirror image; the rest is the same."""
    torch.manual_seed(0)
    model = PhoneRecognizer(RecognizerConfig(("a", "b"), width=8, layers=1)).eval()
    wav = corpus[0].wav[..., :16000]
    padded = torch.nn.functional.pad(wav, (0, 8000))
    with torch.no_grad():
        alone, batch = model(wav), model(padded, torch.tensor([16000]))
    assert (alone - batch[:, : alone.shape[1]]).abs()[:, :40].max() < 0.05
