"""Recogniser, CTC, speaker encoder, and their counterparts from transformers."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from speechlab.foundations.batches import BucketBatches
from speechlab.foundations.columns import Values, at_rate, with_column
from speechlab.foundations.ctc import (
    CHARACTERS,
    ctc_fits,
    ctc_loss,
    ctc_symbols,
    joined,
    least_frames,
    normalise_text,
    spoken,
    symbols_column,
)
from speechlab.foundations.judge_training import RecognizerRecipe, SpeakerRecipe, VoiceLoss
from speechlab.foundations.judges import (
    Recognizer,
    RecognizerConfig,
    SpeakerEncoder,
    SpeakerEncoderConfig,
    change_voice,
    collapse,
    equal_error_rate,
    speaker_pairs,
    voice_loss,
)
from speechlab.foundations.models import ModelError
from speechlab.foundations.outside_judges import (
    WavLMSpeaker,
    WhisperRecognizer,
    load_recognizer,
    load_speaker_encoder,
)
from speechlab.foundations.recipes import Optim
from speechlab.foundations.training import TrainConfig


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
    sizes = torch.tensor([2, 1])
    for padding in (0, 1, 99):  # padded with anything
        padded = torch.tensor([[1, 2], [2, padding]])
        assert float(ctc_loss(scores, frames, padded, sizes)) == pytest.approx(total, rel=1e-4)


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
    recipe = RecognizerRecipe(
        loop=TrainConfig(4), batch_size=4, units=units, width=8, speeds=(0.9, 1.0, 1.1)
    )
    model, history = recipe.train(tmp_path / "run", corpus)
    assert model.config.symbols == ctc_symbols(corpus, units)
    assert model.config.units == units
    assert np.isfinite(history[-1]["loss"])
    model.save(tmp_path / "model")
    again = load_recognizer(tmp_path / "model")
    torch.testing.assert_close(again(corpus[0].wav), model(corpus[0].wav))
    coded = recipe.columns(corpus)
    for entry in coded.entries[:3]:
        numbers = coded.columns["symbols"].cut(entry.id).tolist()
        assert [model.config.symbols[n - 1] for n in numbers] == spoken(entry, units)
        assert model.reference(entry) == joined(spoken(entry, units), units)


def test_symbols_travel_in_batches(corpus):
    """Padded to the longest text; symbols that are not listed are left out."""
    symbols = ctc_symbols(corpus)
    coded = with_column(corpus, symbols_column(symbols), "")
    batch = BucketBatches(coded, 4, sound=False)[1]
    by_id = {entry.id: entry for entry in corpus.entries}
    for row, name in enumerate(batch.ids):
        numbers = batch["symbols"][row, : int(batch.sizes["symbols"][row])].tolist()
        assert [symbols[n - 1] for n in numbers] == spoken(by_id[name])
    few = with_column(corpus, symbols_column(symbols[:5]), "").columns["symbols"]
    for entry in corpus.entries[:4]:
        wanted = [symbols.index(s) + 1 for s in spoken(entry) if s in symbols[:5]]
        assert few.cut(entry.id).tolist() == wanted


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


def test_voices_are_numbered_by_speaker_and_speed(monkeypatch):
    """Each speed makes new voices of the old ones; the labels say which."""
    torch.manual_seed(0)
    names, speeds = ("anna", "ben", "cem"), (1.0, 0.8)
    loss = VoiceLoss(SpeakerEncoder(SpeakerEncoderConfig(width=8, dim=4)), names, speeds)
    assert loss.voices.shape == (6, 4)
    seen = set()

    def noted(embedding, voices, labels):
        assert embedding.shape == (3, 4)
        assert voices is loss.voices
        seen.add(tuple(labels.tolist()))
        return voice_loss(embedding, voices, labels)

    monkeypatch.setattr("speechlab.foundations.judge_training.voice_loss", noted)
    wav = 0.1 * torch.randn(3, 1, 8000)
    for _ in range(12):
        found, right = loss(wav, torch.tensor([8000, 7000, 6000]), ["cem", "anna", "ben"])
        assert torch.isfinite(found)
        assert 0 <= float(right) <= 1
    assert seen == {(2, 0, 1), (5, 3, 4)}


def test_speaker_encoder_trains(tmp_path, corpus):
    recipe = SpeakerRecipe(
        optim=Optim(2e-3, 0, weight_decay=0.05), loop=TrainConfig(3), batch_size=4,
        model=SpeakerEncoderConfig(width=8, dim=8), seconds=1.0,
    )  # fmt: skip
    model, history = recipe.train(tmp_path / "run", corpus)
    assert {"loss", "right"} <= history[-1].keys()
    model.save(tmp_path / "model")
    again = load_speaker_encoder(tmp_path / "model")
    torch.testing.assert_close(again.embed(corpus[0].wav), model.embed(corpus[0].wav))
    same, different = speaker_pairs(model, corpus[:10])
    assert len(same) + len(different) == 45
    one = corpus.filter(lambda e: e.speaker == corpus.entries[0].speaker)
    with pytest.raises(ValueError, match="one speaker"):
        replace(recipe, loop=TrainConfig(1)).train(tmp_path / "other", one)


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
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["feature_extractor.weight"]  # transformers would fill it with noise
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks tensors: feature_extractor\.weight"):
        load_speaker_encoder(tmp_path)
    path.write_bytes(b"damaged")
    with pytest.raises(ModelError):
        load_speaker_encoder(tmp_path)


def test_the_recogniser_counts_frames_at_the_rate_of_its_corpus(tmp_path, corpus):
    """At 8 kHz a frame is 160 samples: scores and counted frames must agree."""
    part = at_rate(corpus, 8000)
    recipe = RecognizerRecipe(loop=TrainConfig(1), batch_size=2, width=8)
    trainer = recipe.trainer(recipe.columns(part), tmp_path)
    with patch("speechlab.foundations.judge_training.ctc_loss") as loss:
        recipe._loss(8000, trainer.raw(), trainer.batches[0])
    scores, frames = loss.call_args.args[:2]
    assert int(frames.max()) == scores.shape[1]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=10))
def test_least_frames(numbers):
    """A frame for each symbol, and a blank between equal neighbours; one fewer is impossible."""
    least = least_frames(numbers)
    assert least == len(numbers) + sum(a == b for a, b in pairwise(numbers))
    scores = torch.zeros(1, least, 4).log_softmax(-1)
    targets, sizes = torch.tensor([numbers]), torch.tensor([len(numbers)])
    assert torch.isfinite(ctc_loss(scores, torch.tensor([least]), targets, sizes))
    if least > 1:
        assert torch.isinf(ctc_loss(scores, torch.tensor([least - 1]), targets, sizes))


def at_hop(hop: float):
    """Frames of an utterance at a hop."""
    return lambda entry: int(entry.samples / hop)


def test_texts_that_do_not_fit_are_left_out(corpus):
    part = corpus.split("train")
    coded = with_column(part, symbols_column(CHARACTERS, "characters"), "")
    known = {e.id: coded.columns["symbols"].cut(e.id).numpy() for e in part.entries}
    hop = {e.id: e.samples / least_frames(known[e.id].tolist()) for e in part.entries}
    first = min(hop, key=hop.get)  # the text that is said fastest
    assert least_frames(known[first].tolist()) > len(known[first])  # with a blank between equals
    most = hop[first] * (1 - 1e-9)  # the last hop at which all fit
    assert len(ctc_fits(coded, at_hop(most))) == len(part)
    with pytest.warns(UserWarning, match="1 of"):
        some = ctc_fits(coded, at_hop(hop[first] * 1.0001))
    assert len(some) == len(part) - 1
    assert first not in {e.id for e in some.entries}
    with pytest.raises(ValueError, match="cannot spell"):
        ctc_fits(coded, at_hop(10**9))
    silent = known | {first: known[first][:0]}  # one says nothing: no text, and no warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = ctc_fits(part.with_values("symbols", Values(silent)), at_hop(most))
    assert {e.id for e in rest.entries} == set(known) - {first}


def test_changed_voices_stay_in_range():
    """The resampling filter overshoots full scale, which log_mel would refuse."""
    loud = torch.sign(torch.sin(torch.arange(16000) / 9)).view(1, 1, -1) * 0.99
    wav, _ = change_voice(loud, torch.tensor([16000]), 16000, 1.15)
    assert wav.abs().max() <= 1
