"""SSL tokens and Metis' recipes: unit codes, rows alone, what a training leaves, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.columns import features_column, with_column
from speechlab.metis.masked_lm import MaskedLMConfig
from speechlab.metis.metis_training import (
    MASKED_LM_RECIPES,
    SSL_TOKENS_RECIPES,
    SpeechToTokens,
)
from speechlab.metis.ssl_tokens import SSLTokenizer, SSLTokensConfig
from speechlab.tokenizer.teachers import TEACHER_HOP, Teacher, teacher_column

CONFIG = SSLTokensConfig(features=12, vocabulary=16, width=24, blocks=1)


def trained(steps: int = 30) -> SSLTokenizer:
    torch.manual_seed(0)
    model, features = SSLTokenizer(CONFIG), torch.randn(4, 12, 60) * 3 + 1
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
    model, features = trained(5), torch.randn(len(lengths), 12, max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    both = model.encode(features, mask)
    assert (both[~mask] == -1).all()
    for row, n in enumerate(lengths):
        assert torch.equal(both[row, :n], model.encode(features[row : row + 1, :, :n])[0])


def test_masked_frames_have_no_part_in_the_loss():
    model, features = trained(), torch.randn(1, 12, 30)
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
    """Tokeniser, its tokens as a column, and the masked model on them; killed and continued."""
    from speechlab.metis import metis_training

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

    both = SpeechToTokens(teacher, whole)
    tokens = features_column("ssl", both, TEACHER_HOP, dtype="int16")
    spoken = with_column(corpus, tokens)
    assert spoken.columns["ssl"].cut(corpus.entries[0].id).max() < 32
    small = replace(MASKED_LM_RECIPES["smoke"], model=MaskedLMConfig(32))
    first, _ = small.train(tmp_path / "lm", spoken, until=2)
    second, rows = small.train(tmp_path / "lm", spoken)
    assert [row["step"] for row in rows][-1] == 4
    assert 2 < rows[-1]["loss"] < 5
    assert not torch.equal(first.out.weight, second.out.weight)


def test_tokens_of_another_vocabulary_are_refused(known, monkeypatch):
    from speechlab.metis import metis_training

    teacher, _, corpus = known
    found = SpeechToTokens(teacher, SSLTokenizer(replace(CONFIG, features=32)))
    monkeypatch.setattr(metis_training.SpeechToTokens, "load", classmethod(lambda *_: found))
    with pytest.raises(ValueError, match=r"model\.vocabulary is 512, the tokens of"):
        MASKED_LM_RECIPES["smoke"].columns(corpus)
