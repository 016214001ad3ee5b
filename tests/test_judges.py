"""Recogniser, CTC, speaker encoder, and their counterparts from transformers."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.judges import (
    CHARACTERS,
    Recognizer,
    RecognizerConfig,
    SpeakerEncoder,
    SpeakerEncoderConfig,
    WavLMSpeaker,
    WhisperRecognizer,
    change_voice,
    collapse,
    ctc_fits,
    ctc_loss,
    ctc_symbols,
    ctc_targets,
    equal_error_rate,
    joined,
    load_recognizer,
    load_speaker_encoder,
    normalise_text,
    speaker_pairs,
    spoken,
    train_recognizer,
    train_speaker_encoder,
    voice_loss,
)


@given(st.text(max_size=40))
def test_normalised_text_is_made_of_characters_and_stays(text):
    found = normalise_text(text)
    assert set(found) <= set(CHARACTERS)
    assert normalise_text(found) == found
    assert found == found.strip()
    assert "  " not in found


def test_spoken_units(corpus):
    entry = corpus.entries[0]
    assert joined(spoken(entry, "characters"), "characters") == normalise_text(entry.text)
    assert "pau" not in spoken(entry)
    bare = entry.__class__("x", 16000)
    with pytest.raises(ValueError, match="has no text"):
        spoken(bare, "characters")
    with pytest.raises(ValueError, match="has no phones"):
        spoken(bare)
    with pytest.raises(ValueError, match="units is 'words'"):
        spoken(entry, "words")


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


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 4))
def test_collapse_merges_then_drops(path, padding):
    rows = torch.tensor([path + [1] * padding])
    wanted = [s for i, s in enumerate(path) if (i == 0 or s != path[i - 1]) and s]
    assert collapse(F.one_hot(rows, 3), torch.tensor([len(path)])) == [wanted]


def test_transcription_is_a_string(monkeypatch):
    path = torch.tensor([1, 1, 0, 1, 2, 2, 0, 0])
    scores = F.one_hot(path, 3).float()[None]
    wav = torch.zeros(1, 1, 7 * 320)
    for units, symbols, wanted in (
        ("phones", ("a", "b"), "a a b"),
        ("characters", ("a", " "), "aa"),
    ):
        model = Recognizer(RecognizerConfig(symbols, width=4, units=units)).eval()
        monkeypatch.setattr(model, "forward", lambda wav, lengths=None: scores)
        assert model.transcribe(wav) == [wanted]
    with pytest.raises(ValueError, match="units is"):
        RecognizerConfig(("a",), units="words")


@pytest.mark.parametrize("units", ["phones", "characters"])
def test_recogniser_trains_and_is_stored(tmp_path, corpus, units):
    model, history = train_recognizer(
        corpus, tmp_path / "run", 4, batch_size=4, units=units, width=8, speeds=(0.9, 1.0, 1.1)
    )
    assert model.config.symbols == ctc_symbols(corpus, units)
    assert np.isfinite(history[-1]["loss"])
    model.save_pretrained(tmp_path / "model")
    again = load_recognizer(tmp_path / "model")
    torch.testing.assert_close(again(corpus[0].wav), model(corpus[0].wav))
    known, part = ctc_targets(corpus, units)
    entry = part.entries[0]
    assert [model.config.symbols[n - 1] for n in known[entry.id]] == spoken(entry, units)
    assert model.reference(entry) == joined(spoken(entry, units), units)


def test_padding_hardly_matters(corpus):
    """The last frames meet zeros instead of a mirror image; the rest is the same."""
    torch.manual_seed(0)
    model = Recognizer(RecognizerConfig(("a", "b"), width=8, layers=1)).eval()
    wav = corpus[0].wav[..., :16000]
    padded = F.pad(wav, (0, 8000))
    with torch.no_grad():
        alone, batch = model(wav), model(padded, torch.tensor([16000]))
    assert (alone - batch[:, : alone.shape[1]]).abs()[:, :40].max() < 0.05


def test_a_changed_voice_is_shorter_and_higher(tone):
    wav, lengths = change_voice(tone, torch.tensor([8000]), 16000, 1.25)
    assert abs(int(lengths) - 6400) <= 1
    spectrum = torch.fft.rfft(wav[0, 0, :6400]).abs()
    assert int(spectrum.argmax()) * 16000 / 6400 == pytest.approx(550, abs=5)
    assert change_voice(tone, torch.tensor([8000]), 16000, 1)[0] is tone


# Voices


def test_embeddings_have_length_one_and_ignore_level_and_padding(corpus):
    torch.manual_seed(0)
    encoder = SpeakerEncoder().eval()
    waves = [corpus[i].wav for i in range(3)]
    lengths = torch.tensor([w.shape[-1] for w in waves])
    batch = torch.cat([F.pad(w, (0, int(lengths.max()) - w.shape[-1])) for w in waves])
    together = encoder.embed(batch, lengths)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    for row, wav in zip(together, waves):
        alone = encoder.embed(wav)[0]
        assert (row - alone).norm() < 0.02
        assert (encoder.embed(0.5 * wav)[0] - alone).norm() < 0.1


def test_statistics_are_those_of_the_valid_frames():
    """One convolution of kernel 1 and identity norms: mean and deviation by hand."""
    encoder = SpeakerEncoder(SpeakerEncoderConfig(width=8, dim=16)).eval()
    wav = 0.1 * torch.randn(1, 1, 16000, generator=torch.Generator().manual_seed(0))
    seen = {}
    encoder.out.register_forward_pre_hook(lambda m, x: seen.update(pooled=x[0]))
    encoder.norms[-1].register_forward_hook(lambda m, x, y: seen.update(frames=y))
    encoder.embed(wav)
    frames = seen["frames"][0, :100].double()  # 16000 samples: 100 whole frames
    wanted = torch.cat([frames.mean(dim=0), (frames.var(dim=0, unbiased=False) + 1e-5).sqrt()])
    torch.testing.assert_close(seen["pooled"][0].double(), wanted, rtol=1e-4, atol=1e-5)


@given(st.integers(2, 6), st.integers(1, 5), st.floats(0, 0.5))
def test_voice_loss_in_loops(classes, rows, margin):
    generator = torch.Generator().manual_seed(classes * 10 + rows)
    e = F.normalize(torch.randn(rows, 4, generator=generator), dim=1)
    w = torch.randn(classes, 4, generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    total = 0.0
    for row, label in zip(e.double(), y.tolist()):
        s = [float(row @ v / v.norm()) - margin * (k == label) for k, v in enumerate(w.double())]
        total += math.log(sum(math.exp(20 * v) for v in s)) - 20 * s[label]
    found, right = voice_loss(e, w, y, margin=margin)
    assert float(found) == pytest.approx(total / rows, rel=1e-3, abs=1e-4)
    assert 0 <= float(right) <= 1


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=30),
    st.lists(st.floats(-1, 1), min_size=1, max_size=30),
)
def test_equal_error_rate_by_trying_every_threshold(same, different):
    rate, _ = equal_error_rate(np.array(same), np.array(different))
    tried = []
    for cut in sorted({*same, *different}):
        refused = sum(v < cut for v in same) / len(same)
        accepted = sum(v >= cut for v in different) / len(different)
        tried.append((round(abs(refused - accepted), 9), (refused + accepted) / 2))
    closest = min(gap for gap, _ in tried)
    assert any(rate == pytest.approx(mean) for gap, mean in tried if gap == closest)
    with pytest.raises(ValueError, match="both are needed"):
        equal_error_rate(np.array(same), np.array([]))


def test_speaker_encoder_trains(tmp_path, corpus):
    model, history = train_speaker_encoder(
        corpus, tmp_path / "run", 3, 1.0, 4, config=SpeakerEncoderConfig(width=8, dim=8)
    )
    assert {"loss", "right"} <= history[-1].keys()
    model.save_pretrained(tmp_path / "model")
    again = load_speaker_encoder(tmp_path / "model")
    torch.testing.assert_close(again.embed(corpus[0].wav), model.embed(corpus[0].wav))
    same, different = speaker_pairs(model, corpus[:10])
    assert len(same) + len(different) == 45
    one = corpus.filter(lambda e: e.speaker == corpus.entries[0].speaker)
    with pytest.raises(ValueError, match="one speaker"):
        train_speaker_encoder(one, tmp_path / "other", 1)


# From transformers, small and random


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A folder with a tiny random Whisper, its tokenizer and its feature extractor."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("whisper")
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ"]
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary = {s: i for i, s in enumerate(letters + specials)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    config = WhisperConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, pad_token_id=len(letters), bos_token_id=len(letters),
        eos_token_id=len(letters), decoder_start_token_id=len(letters) + 1,
        suppress_tokens=None, begin_suppress_tokens=None, max_target_positions=24,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 12
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


def test_whisper_reads(whisper, corpus):
    judge = load_recognizer(whisper)
    assert isinstance(judge, WhisperRecognizer)
    texts = judge.transcribe(corpus[0].wav)
    assert len(texts) == 1
    assert isinstance(texts[0], str)
    assert judge.reference(corpus.entries[0]) == judge.normalise(corpus.entries[0].text)
    assert judge.normalise("It's  Twenty-One, OK?") == judge.normalise("it is 21 ok")
    with pytest.raises(ValueError, match="has no text"):
        judge.reference(corpus.entries[0].__class__("x", 16000))


def test_wavlm_compares(tmp_path, corpus):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16,) * 7, tdnn_dim=(16,) * 5, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, xvector_output_dim=24,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    judge = load_speaker_encoder(tmp_path)
    assert isinstance(judge, WavLMSpeaker)
    waves = [corpus[i].wav for i in range(2)]
    lengths = torch.tensor([w.shape[-1] for w in waves])
    batch = torch.cat([F.pad(w, (0, int(lengths.max()) - w.shape[-1])) for w in waves])
    together = judge.embed(batch, lengths)
    for row, wav in zip(together, waves):
        torch.testing.assert_close(row, judge.embed(wav)[0])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))


def test_texts_that_do_not_fit_are_left_out(corpus):
    known, part = ctc_targets(corpus, "characters")
    frames = {e.id: 500 for e in part.entries}
    assert len(ctc_fits(known, frames, part)) == len(part)
    first = part.entries[0].id
    repeats = sum(a == b for a, b in pairwise(known[first]))
    frames[first] = len(known[first]) + repeats
    assert len(ctc_fits(known, frames, part)) == len(part)
    frames[first] -= 1
    with pytest.warns(UserWarning, match="1 of"):
        assert len(ctc_fits(known, frames, part)) == len(part) - 1
    with pytest.raises(ValueError, match="cannot spell"):
        ctc_fits(known, dict.fromkeys(frames, 1), part)


def test_changed_voices_stay_in_range():
    """The resampling filter overshoots full scale, which log_mel would refuse."""
    loud = torch.sign(torch.sin(torch.arange(16000) / 9)).view(1, 1, -1) * 0.99
    wav, _ = change_voice(loud, torch.tensor([16000]), 16000, 1.15)
    assert wav.abs().max() <= 1
