"""The whole tokeniser: shapes, batches, training, resume, files, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same_codes import assert_codes_agree, assert_same_codes
from test_training import run_processes

from speechlab.foundations.columns import Values
from speechlab.foundations.contracts import AudioError
from speechlab.foundations.judges import Recognizer, RecognizerConfig
from speechlab.foundations.models import ModelError, publish, read_config
from speechlab.foundations.recipes import Optim, Source, model_card
from speechlab.foundations.store import last_checkpoint
from speechlab.foundations.training import NonFiniteLoss, TrainConfig
from speechlab.tokenizer.codec_training import (
    CodecRecipe,
    judged,
    tokenizer_report,
    tokenizer_text,
)
from speechlab.tokenizer.discriminators import DiscriminatorsConfig
from speechlab.tokenizer.frame_codec import FrameCodecConfig
from speechlab.tokenizer.losses import LossWeights
from speechlab.tokenizer.rvq import RVQConfig
from speechlab.tokenizer.seanet import SEANetConfig
from speechlab.tokenizer.speech_tokenizer import CONFIGS, SpeechTokenizer, SpeechTokenizerConfig

RVQ = RVQConfig(dim=12, n_q=3, codebook_size=16, kmeans_iterations=2)
TINY = {
    "frames": SpeechTokenizerConfig(
        FrameCodecConfig(dim=12, width=16, encoder_blocks=1, decoder_blocks=1), RVQ, 10
    ),
    "seanet": SpeechTokenizerConfig(SEANetConfig(dim=12, n_filters=2, lstm_layers=1), RVQ, 10),
}
CRITICS = DiscriminatorsConfig((3,), 0, (256,), period_width=2, stft_width=2)
FAST = CodecRecipe(
    optim=Optim(2e-3, 0, 0.05, (0.8, 0.99)),
    loop=TrainConfig(8, log_every=1),
    batch_size=2,
    model=TINY["frames"],
    seconds=0.25,
    critics=CRITICS,
    quantise_from=0.25,
)
ALONE = replace(FAST, distill="none")  # without a teacher
each = pytest.mark.parametrize("name", TINY)


def model(name, seed=0):
    torch.manual_seed(seed)
    found = SpeechTokenizer(TINY[name]).train()
    found(noise(6400, batch=2))  # k-means start
    return found.eval()


def noise(samples, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return (0.2 * torch.randn(batch, 1, samples, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def taught(corpus):
    """The corpus with a fixed random feature for a teacher."""
    rng = torch.Generator().manual_seed(0)
    features = {
        entry.id: torch.randn(10, -(-entry.samples // 320), generator=rng).numpy()
        for entry in corpus.entries
    }
    return corpus.with_values("teacher", Values(features, 320))


@each
@given(samples=st.integers(1, 5000), n_q=st.integers(1, 3))
def test_any_length_and_level(name, samples, n_q):
    tokenizer = model(name)
    wav = noise(samples)
    codes = tokenizer.encode(wav, n_q)
    assert codes.shape == (1, n_q, -(-samples // 320))
    z = tokenizer.encoder.infer(wav)
    assert_codes_agree(tokenizer.quantizer, z, codes, tokenizer.encode(wav)[:, :n_q])
    sound = tokenizer.decode(codes, samples)
    assert sound.shape == wav.shape
    assert torch.isfinite(sound).all()
    assert sound.abs().max() <= 1


@each
def test_forward_is_encode_and_decode(name):
    tokenizer, wav = model(name), noise(5001, batch=2)
    with torch.no_grad():
        out = tokenizer(wav)
    assert_same_codes(tokenizer, wav, tokenizer.encode(wav))
    assert_same_codes(tokenizer, wav, out.codes)
    torch.testing.assert_close(out.wav.clamp(-1, 1), tokenizer.decode(out.codes, 5001))
    first = tokenizer.quantizer.decode(out.codes[:, :1]).transpose(1, 2)
    torch.testing.assert_close(out.semantic, tokenizer.transform(first))
    assert out.semantic.shape == (2, 16, 10)
    plain = tokenizer(wav, quantise=False)
    assert plain.codes is None
    assert plain.commit_loss == 0


@each
@given(lengths=st.lists(st.integers(1, 4000), min_size=2, max_size=4))
def test_batch_equals_each_alone(name, lengths):
    tokenizer = model(name)
    signals = [noise(n, seed=i) for i, n in enumerate(lengths)]
    longest = max(lengths)
    batch = torch.cat([torch.nn.functional.pad(s, (0, longest - s.shape[-1])) for s in signals])
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    junk = torch.where(
        mask[:, None], batch, torch.full_like(batch, 0.7)
    )  # padding may hold anything
    codes = tokenizer.encode(junk, mask=mask)
    sound = tokenizer.decode(codes, mask=codes[:, 0] >= 0)
    for row, signal in enumerate(signals):
        alone = tokenizer.encode(signal)
        count = alone.shape[-1]
        mine = codes[row : row + 1, :, :count]
        assert_codes_agree(tokenizer.quantizer, tokenizer.encoder.infer(signal), mine, alone)
        assert (codes[row, :, count:] == -1).all()
        found = sound[row : row + 1, :, : count * 320]
        torch.testing.assert_close(found, tokenizer.decode(mine), atol=1e-4, rtol=1e-3)
        assert not sound[row, :, count * 320 :].any()


@each
def test_save_and_load(name, tmp_path):
    tokenizer = model(name)
    tokenizer.save(tmp_path / "a")
    again = SpeechTokenizer.load(tmp_path / "a")
    assert again.config == tokenizer.config
    assert not again.training
    assert_same_codes(tokenizer, noise(3000), again.encode(noise(3000)))
    assert_same_codes(again, noise(3000), tokenizer.encode(noise(3000)))
    publish(tokenizer, tmp_path / "b", "# card")
    half = (tmp_path / "b" / "model.safetensors").stat().st_size
    assert half < 0.6 * (tmp_path / "a" / "model.safetensors").stat().st_size
    assert SpeechTokenizer.load(tmp_path / "b").encoder.training is False
    assert next(tokenizer.parameters()).dtype == torch.float32  # publishing leaves it as it was
    with pytest.raises(ModelError, match="no-such-model"):
        SpeechTokenizer.load("no-such-model")


@each
def test_later_levels_alone(name):
    """The official code's `st`: decode(codes[:, k:], first_level=k) leaves out those before."""
    tokenizer, wav = model(name), noise(6400)
    codes = tokenizer.encode(wav)
    with torch.no_grad():
        z = tokenizer.quantizer.codes_to_vectors(codes)[:, 1:].sum(dim=1)
        wanted = tokenizer.decoder(z).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes[:, 1:], first_level=1), wanted)
    assert not torch.allclose(tokenizer.decode(codes), wanted)
    for level in (-1, 3):
        with pytest.raises(ValueError, match=f"first_level is {level}"):
            tokenizer.decode(codes[:, :1], first_level=level)
    with pytest.raises(ValueError, match="codes has 4 levels"):
        tokenizer.decode(codes, first_level=1)


def test_named_configs():
    assert CONFIGS["official"].bits_per_second == 4000
    assert CONFIGS["small"].bits_per_second == 3200
    assert all(c.hop_length == 320 for c in CONFIGS.values())
    for config in (*TINY.values(), *CONFIGS.values()):
        assert read_config(SpeechTokenizerConfig, json.dumps(asdict(config))) == config


@each
@pytest.mark.parametrize("balance", [False, True])
def test_training_resumes_bit_for_bit(name, balance, tmp_path, taught):
    """Both optimisers, codebooks and balancer: 8 steps at once, or 3 + 1 + 4."""
    recipe = replace(FAST, balance=balance, model=TINY[name])

    def trainer(folder):
        return recipe.trainer(recipe.columns(taught), tmp_path / folder)

    whole = trainer("whole")
    whole.fit()
    for stop in (3, 4, 8):
        parts = trainer("parts")
        parts.fit(until=stop)
    one, two = whole.state(), parts.state()
    assert one["step"] == two["step"] == 8
    for module in ("generator", "critics"):
        for key, value in one["modules"][module].items():
            assert torch.equal(value, two["modules"][module][key]), (module, key)
        moments = one["optimizers"][module]["state"]
        assert moments
        for key, state in moments.items():
            other = two["optimizers"][module]["state"][key]
            assert all(torch.equal(state[k], other[k]) for k in ("exp_avg", "exp_avg_sq"))
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in whole.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in parts.history
    ]
    assert {"critics", "adversarial", "feature", "distill", "mel"} <= whole.history[-1].keys()
    assert "critics" not in whole.history[0]


def test_critics_and_codec_move_only_in_their_own_steps(tmp_path, taught):
    trainer = replace(FAST, critics_from=1.0).trainer(taught, tmp_path)
    critics = {k: v.clone() for k, v in trainer.raw("critics").state_dict().items()}
    codec = {k: v.clone() for k, v in trainer.raw("generator").state_dict().items()}
    trainer.fit()
    assert all(torch.equal(critics[k], v) for k, v in trainer.raw("critics").state_dict().items())
    moved = [
        k for k, v in trainer.raw("generator").named_parameters() if not torch.equal(codec[k], v)
    ]
    assert len(moved) == len(list(trainer.raw("generator").parameters()))  # also the projection


def test_the_loss_falls(tmp_path, corpus):
    recipe = replace(
        ALONE, optim=Optim(4e-3, 6, 0.05, (0.8, 0.99)), loop=TrainConfig(60), batch_size=4,
        critics_from=1.0,
    )  # fmt: skip
    _, history = recipe.train(tmp_path, corpus)
    assert history[-1]["mel"] < 0.8 * history[0]["mel"]


def test_the_generator_descends_eq_8(tmp_path, taught, monkeypatch):
    """What is back-propagated is the weighted sum of all six terms that the step reports.

    Weights that share no factor: a term left out, twice in, or under another's weight would show.
    """
    shares = {"time": 0.7, "mel": 1.1, "adversarial": 1.3, "feature": 1.7, "commit": 1.9,
              "distill": 2.3}  # fmt: skip
    recipe = replace(FAST, weights=LossWeights(**shares), quantise_from=0.0, critics_from=0.0)
    trainer = recipe.trainer(taught, tmp_path)
    update, losses, rows = trainer.update, [], []
    step = trainer._step_function

    def seen(name, loss):
        losses.extend([float(loss.detach())] * (name == "generator"))
        return update(name, loss)

    monkeypatch.setattr(trainer, "update", seen)
    monkeypatch.setattr(trainer, "_step_function", lambda *a: rows.append(step(*a)) or rows[-1])
    trainer.fit(3)
    assert len(losses) == len(rows) == 3
    for loss, terms in zip(losses, rows):
        wanted = sum(share * float(terms[name]) for name, share in shares.items())
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert all(float(terms[name]) > 0 for name in shares)


@pytest.mark.parametrize("where", ["mel", "distill"])
def test_nan_stops_training_by_name(tmp_path, taught, where):
    """The step, the batch and the last good checkpoint are named, and the checkpoint is whole."""
    loop = TrainConfig(8, log_every=1, save_every=2)
    recipe = replace(FAST, loop=loop, critics_from=1.0)
    trainer = recipe.trainer(taught, tmp_path)
    if where == "distill":
        trainer.raw("generator").distiller.register_forward_hook(
            lambda module, given, loss: loss * float("nan") if trainer.step >= 5 else loss
        )
    else:
        weight = trainer.raw("generator").tokenizer.decoder.head.weight

        class Poisoned(type(trainer.batches)):
            def __getitem__(self, step):
                if step == 5:
                    with torch.no_grad():
                        weight[0, 0] = float("inf")
                return super().__getitem__(step)

        trainer.batches.__class__ = Poisoned
    with pytest.raises(NonFiniteLoss) as error:
        trainer.fit()
    text = str(error.value)
    assert "step 5" in text
    assert "step-00000004" in text
    assert any(entry.id in text for entry in taught.entries)
    found = last_checkpoint(tmp_path)
    assert found.name == "step-00000004"
    again = recipe.trainer(taught, tmp_path)
    again.fit()  # goes on from there, and ends well
    assert again.step == 8


def test_two_processes_train_one_model(tmp_path):
    """Both hold the same weights, and learn as one does on the whole batch. (Not to the last bit:

    the mel loss has a root over the batch, and a root of a mean is no mean of roots.)
    """
    (one,) = run_processes(1, tmp_path, "tokenizer")
    two = run_processes(2, tmp_path, "tokenizer")
    for name, value in two[0]["weights"].items():
        assert torch.equal(two[1]["weights"][name], value), name
    torch.testing.assert_close(two[0]["losses"], one["losses"], rtol=0.2, atol=1e-2)
    start = one["losses"][0], two[0]["losses"][0]
    assert start[0][0] != one["losses"][-1][0]  # it did learn
    torch.testing.assert_close(start[1], start[0], rtol=0.02, atol=1e-3)


def test_report_and_card(corpus):
    from speechlab.foundations.evaluation import phone_symbols

    tokenizer = model("frames")
    recognizer = Recognizer(RecognizerConfig(("a", "b"), width=8)).eval()
    report = tokenizer_report(
        tokenizer, corpus[:3], phone_symbols(corpus), recognizer, levels=(1, 3, 8)
    )
    assert list(report["mel_distance"]) == [1, 3]
    assert set(report["phone_error_rate"]) == {"original", 1, 3}
    assert 0 <= report["level_1"]["pnmi"] <= 1
    assert tokenizer_text(tokenizer, json.loads(json.dumps(report))) == tokenizer_text(
        tokenizer, report
    )
    card = model_card("test", FAST, tokenizer, report | {"facts": {"data": "three sentences"}})
    for words in ("three sentences", f"{report['mel_distance'][3]:.3f}", "600 bit/s", "# test",
                  f"{report['level_2']['purity']:.3f}", "by d_axis", 'load("test")',
                  f"{report['phone_error_rate'][3]:.1%}"):  # fmt: skip
        assert words in card
    assert "no teacher" in model_card("test", ALONE, tokenizer, report)
    silent = corpus.entries[0].__class__("x", 16000)
    real = corpus.__class__([silent], lambda e, a, b: noise(b - a), 16000)
    assert set(tokenizer_report(tokenizer, real, [])) == {"mel_distance"}


GOOD = noise(3200)
LATE = torch.arange(3200)[None] > 5  # False at the start
BAD = [
    (lambda m: m.encode([0.1]), AudioError, "wav is a list"),
    (lambda m: m.encode(GOOD[..., :0]), AudioError, "wav has 0 samples"),
    (lambda m: m.encode(GOOD[0]), AudioError, "wav has shape"),
    (lambda m: m.encode(GOOD.expand(1, 2, -1)), AudioError, "wav has 2 channels"),
    (lambda m: m.encode(GOOD.double()), AudioError, "wav is torch.float64"),
    (lambda m: m.encode(GOOD + math.nan), AudioError, "wav contains NaN"),
    (lambda m: m.encode(30 * GOOD), AudioError, "wav peaks at"),
    (lambda m: m.encode(GOOD, n_q=4), ValueError, "n_q is 4"),
    (lambda m: m.encode(GOOD, n_q=0), ValueError, "n_q is 0"),
    (lambda m: m.encode(GOOD, mask=torch.ones(1, 3199).bool()), ValueError, "mask is"),
    (lambda m: m.encode(GOOD, mask=torch.ones(1, 3200)), ValueError, "mask is"),
    (lambda m: m.encode(GOOD, mask=LATE), ValueError, r"mask \(1, 3200\) must be True"),
    (lambda m: m.decode(torch.zeros(1, 3, 4)), ValueError, "codes is"),
    (lambda m: m.decode(torch.full((1, 3, 4), 16)), ValueError, "codes range"),
    (lambda m: m.decode(torch.zeros(1, 4, 4).long()), ValueError, "codes has 4 levels"),
    (lambda m: m.decode(torch.zeros(1, 3, 0).long()), ValueError, "may be empty"),
    (lambda m: m.decode(torch.zeros(1, 3, 4).long(), 1281), ValueError, "length is 1281"),
    (lambda m: m.decode(torch.zeros(1, 3, 4).long(), 960), ValueError, "length is 960"),
]


@pytest.mark.parametrize(("call", "kind", "words"), BAD)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call(model("frames"))


def test_silence_and_clipping_are_coded():
    for wav in (torch.zeros(1, 1, 3200), torch.sign(noise(3200))):
        for name in TINY:
            tokenizer = model(name)
            assert torch.isfinite(tokenizer.decode(tokenizer.encode(wav))).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SpeechTokenizerConfig(FrameCodecConfig(dim=8), RVQ), "codec.dim is 8"),
        (lambda: CodecRecipe(critics_from=2.0), "critics_from is 2.0"),
        (lambda: CodecRecipe(quantise_from=-0.1), "quantise_from is -0.1"),
        (lambda: CodecRecipe(Source(sample_rate=8000)), "data has 8000 Hz, the tokeniser 16000"),
    ],
)
def test_bad_settings(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_other_rates_are_refused(tmp_path, corpus):
    other = corpus.__class__(corpus.entries, corpus._read, 8000)
    with pytest.raises(ValueError, match="8000 Hz"):
        ALONE.trainer(other, tmp_path)


def test_official_recipe_runs(tmp_path, taught):
    """LSGAN, unnormalised features and the repository's weights: the official code's losses."""
    weights = LossWeights(500.0, 45.0, 1.0, 1.0, 10.0, 120.0)
    recipe = replace(
        FAST, model=TINY["seanet"], adversarial="lsgan", weights=weights,
        loop=TrainConfig(3, log_every=1), critics_from=0.0,
    )  # fmt: skip
    _, history = recipe.train(tmp_path, taught)
    assert {"adversarial", "feature", "distill", "commit"} <= history[-1].keys()
    assert all(math.isfinite(value) for value in history[-1].values())


def test_feature_matching_compares_within_one_state_of_the_critics(tmp_path, corpus):
    """A perfect reconstruction costs nothing, although the critics have just moved."""
    trainer = ALONE.trainer(corpus, tmp_path)
    trainer.fit(until=2)
    before = {k: v.clone() for k, v in trainer.raw("critics").state_dict().items()}
    wav = noise(4000, batch=2)
    trainer._last_of_group = True
    _, terms = judged(trainer, wav, wav.clone().requires_grad_(True))
    assert any(
        not torch.equal(before[k], v) for k, v in trainer.raw("critics").state_dict().items()
    )
    assert terms["feature"] == 0


def test_balancing_with_a_weight_of_zero(tmp_path, corpus):
    weights = LossWeights(time=0.0, adversarial=0.0)
    loop = TrainConfig(3, log_every=1)
    recipe = replace(ALONE, balance=True, weights=weights, critics_from=0.0, loop=loop)
    _, history = recipe.train(tmp_path, corpus)
    assert math.isfinite(history[-1]["mel"])


@each
def test_batches_padded_beyond_every_row(name):
    tokenizer, wav = model(name), noise(3200, batch=2)
    mask = torch.arange(3200) < torch.tensor([1000, 1500])[:, None]
    assert tokenizer.encode(wav, mask=mask).shape == (2, 3, 10)
    with torch.no_grad():
        assert tokenizer(wav, mask=mask).wav.shape == wav.shape
