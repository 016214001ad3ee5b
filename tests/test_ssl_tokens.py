"""SSL tokens and Metis' recipes: unit codes, rows alone, what a training leaves, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.batches import pad_last
from speechlab.foundations.columns import at_rate, codes_column, with_column
from speechlab.foundations.contracts import Codec, frames_of, mask_of
from speechlab.metis import metis_training
from speechlab.metis.metis_training import (
    ACOUSTIC_RECIPES,
    MASKED_LM_RECIPES,
    SSL_TOKENS_RECIPES,
)
from speechlab.metis.ssl_tokens import SpeechToTokens, SSLTokenizer, SSLTokensConfig
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer
from speechlab.tokenizer.teachers import Teacher, teacher_column

CONFIG = SSLTokensConfig(features=12, vocabulary=16, width=24, blocks=1)
WIDE = replace(CONFIG, kernel=7, blocks=2)  # padding can reach a frame here


def trained(steps: int = 30, config: SSLTokensConfig = CONFIG) -> SSLTokenizer:
    torch.manual_seed(0)
    model, features = SSLTokenizer(config), torch.randn(4, 12, 60) * 3 + 1
    model.measure_features(features.transpose(0, 1).flatten(1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        out = model(features)
        optimizer.zero_grad(), (out.rebuild_loss + 0.25 * out.commit_loss).backward()
        optimizer.step()
    return model.eval()


def test_codes_have_length_one_and_the_nearest_by_angle_is_taken():
    model, features = trained(), torch.randn(2, 12, 40)
    book = model.bottleneck.levels[0].embed
    torch.testing.assert_close(book.norm(dim=1), torch.ones(16))
    z = model._codes_of(model.normalised(features), None)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2, 40))
    wanted = torch.einsum("bdn,kd->bkn", z, book).argmax(dim=1)
    assert torch.equal(model.encode(features), wanted)


def test_features_are_normalised_and_come_back_in_their_own_scale():
    model = trained()
    features = torch.randn(1, 12, 500) * 3 + 1
    normal = model.normalised(features)
    assert abs(normal.mean()) < 0.2
    assert abs(normal.std() - 1) < 0.1
    out = model(features)
    rebuilt = model.decode(model.encode(features))
    torch.testing.assert_close(model.normalised(rebuilt), out.features.detach())
    loss = (model.normalised(rebuilt) - normal).square().mean()
    torch.testing.assert_close(loss, out.rebuild_loss.detach())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_a_padded_row_has_the_tokens_it_has_alone(lengths):
    model, features = trained(5, WIDE), torch.randn(len(lengths), 12, max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    both = model.encode(features, mask)
    assert (both[~mask] == -1).all()
    for row, n in enumerate(lengths):
        assert torch.equal(both[row, :n], model.encode(features[row : row + 1, :, :n])[0])


def test_masked_frames_have_no_part_in_the_loss():
    model, features = trained(config=WIDE), torch.randn(1, 12, 30)
    mask = torch.arange(40).unsqueeze(0) < 30
    padded = F.pad(features, (0, 10), value=99.0)
    torch.testing.assert_close(model(padded, mask).rebuild_loss, model(features).rebuild_loss)


def test_save_and_load(tmp_path):
    model, features = trained(), torch.randn(1, 12, 30)
    again = SSLTokenizer.load(model.save(tmp_path))
    assert torch.equal(again.encode(features), model.encode(features))
    assert again.config == CONFIG


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(B, 12, n\) is wanted"):
        trained(1)(torch.randn(1, 9, 5))
    for features in (torch.randn(12, 1), torch.randn(9, 5), torch.randn(1, 12, 5)):
        with pytest.raises(ValueError, match="with two frames or more"):
            trained(1).measure_features(features)
    with pytest.raises(ValueError, match="kernel is 4"):
        SSLTokensConfig(kernel=4)
    with pytest.raises(ValueError, match="vocabulary is 0"):
        SSLTokensConfig(vocabulary=0)


def test_published_sizes():
    config = SSLTokensConfig.published()
    assert (config.vocabulary, config.code_dim, config.layer) == (8192, 8, 17)


@pytest.fixture(scope="module")
def known(corpus):
    """The smoke corpus with an untrained teacher's features, and a tokeniser trained on them."""
    teacher = Teacher.untrained(width=32, layers=1)
    recipe = SSL_TOKENS_RECIPES["smoke"]
    return teacher, recipe, with_column(corpus, teacher_column(teacher))


def test_recipes_train_resume_and_report(known, tmp_path, monkeypatch):
    """Tokeniser, its tokens as a column, and the two models on them; stopped and continued."""
    teacher, recipe, corpus = known
    monkeypatch.setattr(metis_training, "load_teacher", lambda config: teacher)
    whole, rows = recipe.train(tmp_path / "one", corpus)
    assert rows[-1]["step"] == 4
    recipe.train(tmp_path / "two", corpus, until=2)
    again, _ = recipe.train(tmp_path / "two", corpus)
    for one, other in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, other)
    report = recipe.measure(whole, corpus)
    assert 0 < report["PNMI"] < 1
    assert report["variance lost"] > 0.1
    assert "PNMI" in recipe.describe(whole, report)

    both = SpeechToTokens(teacher, whole, "mine")
    spoken = with_column(corpus, codes_column(both, name="ssl"))
    assert spoken.columns["ssl"].cut(corpus.entries[0].id).max() < 32
    spoken = with_column(spoken, codes_column(SpeechTokenizer.load("speechtokenizer-small")))
    for recipe in (MASKED_LM_RECIPES["smoke"], ACOUSTIC_RECIPES["smoke"]):
        folder = tmp_path / type(recipe).__name__
        whole, _ = recipe.train(tmp_path / f"{folder.name}-whole", spoken)
        first, _ = recipe.train(folder, spoken, until=2)
        second, rows = recipe.train(folder, spoken)
        assert [row["step"] for row in rows][-1] == 4
        assert all(torch.equal(*pair) for pair in zip(whole.parameters(), second.parameters()))
        assert second.config.tokens == both.spec
        assert any(not torch.equal(*pair) for pair in zip(first.parameters(), second.parameters()))
        report = recipe.measure(second, spoken)
        assert all(0 <= part["right"] <= 1 for part in report.get("hidden", report).values())
        assert "`mine`" in recipe.describe(second, report)


def test_speech_to_tokens_is_a_codec_without_a_way_back(known):
    teacher, _, corpus = known
    codec = SpeechToTokens(teacher, SSLTokenizer(replace(CONFIG, features=32)), "mine")
    assert isinstance(codec, Codec)
    assert codec.spec.frame_rate == 50
    assert codec.spec.fingerprint
    wavs = [corpus.read(i, 0, n) for i, n in ((0, 8000), (1, 5000))]
    both, mask = pad_last([w[0] for w in wavs])[0], mask_of(torch.tensor([8000, 5000]), 8000)
    found = codec.encode(both, mask=mask)
    assert found.shape == (2, 1, 25)
    for row, wav in zip(found, wavs):
        alone = codec.encode(wav)[0]
        assert torch.equal(row[:, : alone.shape[1]], alone)
        assert (row[:, alone.shape[1] :] == -1).all()
    with pytest.raises(NotImplementedError, match="AcousticDecoder"):
        codec.decode(found)


def test_tokens_are_read_at_16_khz_and_kept_on_the_grid_of_the_corpus(known, monkeypatch):
    teacher, _, corpus = known
    codec = SpeechToTokens(teacher, SSLTokenizer(replace(CONFIG, features=32)))
    monkeypatch.setattr(SpeechToTokens, "load", classmethod(lambda *_: codec))
    few = at_rate(corpus[:2], 24000)
    found = metis_training.with_tokens(few, "any").columns["ssl"]
    assert found.hop_length == 480
    for entry in few.entries:
        assert found.cut(entry.id).shape[1] == frames_of(entry.samples, 480)
