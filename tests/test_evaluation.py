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
    MEASURES,
    code_quality,
    error_counts,
    error_rate,
    evaluate,
    mel_cepstra,
    mel_cepstral_distortion,
    mel_distance,
    phone_frames,
    phone_symbols,
    pitch_error,
    si_sdr,
    speaker_ceiling,
    speaker_similarity,
    stoi,
    token_quality,
)
from speechlab.foundations.judges import Recognizer, SpeakerEncoder, SpeakerEncoderConfig
from speechlab.foundations.statistics import bootstrap, over_seeds, paired_difference


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


# Intervals


def test_bootstrap_is_a_ratio_of_sums_with_the_quantiles_of_resampled_ones():
    rng = np.random.default_rng(3)
    errors, words = rng.integers(0, 4, 30), rng.integers(3, 9, 30)
    found = bootstrap(errors, words, resamples=4000)
    assert found.value == pytest.approx(errors.sum() / words.sum())
    assert found.count == 30
    drawn = []
    for _ in range(4000):
        rows = rng.integers(30, size=30)
        drawn.append(errors[rows].sum() / words[rows].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40))
def test_bootstrap_holds_its_value_and_stays_inside_the_data(values):
    found = bootstrap(values, resamples=50)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.value == pytest.approx(np.mean(values), abs=1e-6)


def test_bootstrap_refuses_what_has_no_answer():
    assert math.isnan(bootstrap([0.5]).low)
    with pytest.raises(ValueError, match="values has shape"):
        bootstrap([])
    with pytest.raises(ValueError, match="values has shape"):
        bootstrap([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1, float("nan")])
    with pytest.raises(ValueError, match="positive"):
        bootstrap([1, 2], [0, 0])


def test_paired_difference_uses_the_pairs():
    hard = np.random.default_rng(0).normal(0, 10, 50)
    found = paired_difference(hard + 1, hard)
    assert found.low == pytest.approx(1)
    assert found.high == pytest.approx(1)


def test_intervals_over_seeds_are_students():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert math.isnan(over_seeds([1.0]).low)


# Errors


WORDS = st.lists(st.sampled_from(["a", "b", "cc"]), max_size=6)


@given(WORDS, WORDS)
def test_error_counts_are_edit_distances(wanted, heard):
    row = list(range(len(heard) + 1))
    for i, one in enumerate(wanted, 1):
        new = [i]
        for j, two in enumerate(heard, 1):
            new.append(min(row[j - 1] + (one != two), row[j] + 1, new[-1] + 1))
        row = new
    assert error_counts(" ".join(wanted), " ".join(heard)) == (row[-1], len(wanted))


def test_error_counts_of_characters():
    assert error_counts("abc", "abd", "character") == (1, 3)
    assert error_counts("", "ab", "character") == (2, 0)
    with pytest.raises(ValueError, match="per is"):
        error_counts("a", "a", "phone")


# Signals


@given(st.floats(-30, 40), st.floats(0.01, 20))
def test_si_sdr_is_the_ratio_it_was_made_with(decibel, scale):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    x, noise = x - x.mean(), noise - noise.mean()
    noise = noise - (noise @ x) / (x @ x) * x
    noise = noise / noise.norm() * x.norm() * 10 ** (-decibel / 20)
    assert float(si_sdr(x, scale * (x + noise))) == pytest.approx(decibel, abs=1e-4)


def test_si_sdr_ends(tone):
    assert float(si_sdr(tone, tone)) > 90
    assert torch.isfinite(si_sdr(tone, torch.zeros_like(tone))).all()
    assert torch.isfinite(si_sdr(torch.zeros_like(tone), tone)).all()
    assert float(si_sdr(tone, torch.zeros_like(tone))) == pytest.approx(-100)
    with pytest.raises(ValueError, match="rebuilt"):
        si_sdr(tone, tone[..., 1:])


def test_mcd_is_the_sum_of_cosines(corpus):
    """Cepstra by an explicit sum in float64, without scipy's transform."""
    from speechlab.foundations.audio import log_mel

    one, two = corpus[0].wav, 0.5 * corpus[0].wav.roll(300, -1)
    cepstra = []
    for wav in (one, two):
        mel = log_mel(wav, 16000, floor=1e-3)[0].double().numpy() * math.log(10)
        rows = np.array(
            [
                [
                    sum(m * math.cos(math.pi * d * (k + 0.5) / 80) for k, m in enumerate(frame))
                    for d in range(1, 14)
                ]
                for frame in mel.T[:20]
            ]
        )
        cepstra.append(rows * 2 / 80)  # so that 10 / ln 10 * sqrt(2 * sum of squares) is usual
    distance = np.sqrt(((cepstra[0] - cepstra[1]) ** 2).sum(axis=1)).mean()
    mine = mel_cepstra(one) - mel_cepstra(two)
    found = np.sqrt((mine[:20] ** 2).sum(axis=1) * 2 / 80).mean()
    assert found == pytest.approx(distance, rel=1e-6)
    assert mel_cepstral_distortion(one, one) == 0


def test_mcd_has_the_usual_constant(corpus):
    """All of it: (10 / ln 10) * mean over frames of sqrt(2 * sum over d of the squared difference).

    A gain g moves each natural-log mel by ln g and so cepstrum 0 only; a tilt of a * cos(pi d
    (k + 1/2) / 80) over the bands moves cepstrum d by a, whose MCD is known without any cepstrum.
    """
    from speechlab.foundations import evaluation
    from speechlab.foundations.audio import log_mel

    wav, tilt, size = corpus[0].wav, 5, 0.2
    bands = np.cos(np.pi * tilt * (np.arange(80) + 0.5) / 80)

    def tilted(signal, *rest, **named):
        mel = log_mel(signal, *rest, **named)
        lift = size * torch.tensor(bands, dtype=torch.float32) / math.log(10)
        return mel + (signal is other) * lift[:, None]

    other = wav.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "log_mel", tilted)
        found = mel_cepstral_distortion(wav, other)
    assert found == pytest.approx(10 / math.log(10) * math.sqrt(2 * size**2), rel=1e-4)


def test_mcd_warps_other_lengths(corpus):
    wav = corpus[0].wav
    slow = torch.nn.functional.interpolate(wav, scale_factor=1.15)
    other = corpus[1].wav
    assert mel_cepstral_distortion(wav, slow) < mel_cepstral_distortion(wav, other)


def test_pitch_of_tones():
    time = torch.arange(12000) / 16000
    one, two = (0.3 * torch.sin(2 * math.pi * f * time).view(1, 1, -1) for f in (150.0, 300.0))
    found = pitch_error(one, two)
    assert found.cents == pytest.approx(1200, abs=25)
    assert found.hertz == pytest.approx(150, abs=4)
    assert pitch_error(one, one).voicing == 0
    noise = 0.1 * torch.randn(1, 1, 12000, generator=torch.Generator().manual_seed(0))
    assert pitch_error(one, noise).voicing > 0.5


def test_stoi_and_pesq_fall_with_noise(corpus):
    wav = corpus[0].wav
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    little, much = ((wav + level * noise).clamp(-1, 1) for level in (0.003, 0.1))
    assert stoi(wav, wav) > stoi(wav, little) > 0.9 > stoi(wav, much)
    pytest.importorskip("pesq")
    from speechlab.foundations.evaluation import pesq

    assert pesq(wav, wav) > 4.5 > pesq(wav, little) > pesq(wav, much)
    with pytest.raises(ValueError, match="sample_rate is 8000"):
        pesq(wav, wav, 8000)


# Everything together


def test_evaluate_gives_ceilings_and_measures(corpus):
    part = corpus[:6]
    reader = Recognizer.load("character-recognizer")
    voice = SpeakerEncoder.load("speaker-encoder")
    top = evaluate(part, None, reader, voice)
    assert top.estimates.keys() >= {"WER", "CER"}
    assert "mel distance" not in top.estimates
    same = evaluate(part, lambda wav: wav, reader, voice, ("mel distance", "SI-SDR"))
    assert same.estimates["WER"].value == top.estimates["WER"].value
    assert same.estimates["similarity"].value == pytest.approx(1, abs=1e-5)
    assert same.estimates["mel distance"].value == 0
    quiet = evaluate(part, lambda wav: 0.5 * wav, None, None, ("mel distance",))
    assert quiet.estimates.keys() == {"mel distance"}
    by_hand = [mel_distance(u.wav, 0.5 * u.wav) for u in part]
    assert quiet.values["mel distance"] == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="measures has"):
        evaluate(part, lambda wav: wav, measures=("loudness",))
    alone = {"mel distance", "MCD", "SI-SDR", "STOI", "PESQ", "F0"}
    assert alone | {"ViSQOL", "DNSMOS"} == MEASURES.keys()
    silent = evaluate(part, lambda wav: 0 * wav, None, None, ("F0",))
    assert len(silent.values["F0"]) == len(part)  # NaN: one for each utterance, for paired use
    assert "F0" not in silent.estimates
    other = SpeakerEncoder(SpeakerEncoderConfig(sample_rate=24000)).eval()
    with pytest.raises(ValueError, match="corpus has 16000 Hz, the judge hears 24000 Hz"):
        evaluate(part, None, None, other)


def test_error_rate_of_phones_is_the_recognisers(corpus):
    phones = Recognizer.load("phone-recognizer")
    part = corpus.split("test")
    errors = [error_counts(phones.reference(u.entry), phones.transcribe(u.wav)[0]) for u in part]
    found = error_rate(phones, part)
    assert found.value == pytest.approx(sum(e for e, _ in errors) / sum(n for _, n in errors))
    assert evaluate(part, None, phones).estimates["PER"] == found
    assert found.value < 0.3
    noise = torch.Generator().manual_seed(0)
    disturbed = error_rate(
        phones, part, lambda w: (w + 0.3 * torch.randn(w.shape, generator=noise)).clamp(-1, 1)
    )
    assert disturbed.value > found.value + 0.2


def test_the_shipped_speaker_encoder_knows_unseen_voices(corpus):
    voice = SpeakerEncoder.load("speaker-encoder")
    found = speaker_ceiling(voice, corpus)
    assert found["equal error rate"] < 0.1
    assert found["same voice"] > found["different voices"] + 0.3
    one = corpus[0].wav
    assert speaker_similarity(voice, one, one) == pytest.approx(1, abs=1e-5)
    assert speaker_similarity(voice, one, 0.3 * one) > 0.95


def test_real_speech_is_beyond_the_small_judges(real_speech):
    """The shipped recogniser fails on real recordings; the ceiling says so. STOI does not care."""
    from speechlab.foundations.corpora import ljspeech_corpus

    part = ljspeech_corpus(real_speech / "ljspeech", 16000, resample_to_rate=True)[:4]
    reader = Recognizer.load("character-recognizer")
    found = evaluate(part, lambda wav: wav, reader, None, ("STOI",))
    assert found.estimates["WER"].value > 0.5
    assert found.estimates["STOI"].value > 0.99
