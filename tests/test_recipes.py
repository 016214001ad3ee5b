"""Every training there is: refused when it differs, exact when resumed, able to overfit a batch."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import speechlab
from speechlab.cli.train import parse_run, recipes
from speechlab.foundations.columns import Column, Values, features_column, with_column
from speechlab.foundations.corpora import folder_corpus
from speechlab.foundations.corpus import embedded_corpus
from speechlab.foundations.models import Model
from speechlab.foundations.recipes import (
    Optim,
    Recipe,
    RunError,
    Source,
    check_run,
    differing,
    run_recipe,
)
from speechlab.foundations.training import NonFiniteLoss, TrainConfig
from speechlab.lm.gpt import GPTConfig
from speechlab.lm.hybrid import HybridConfig
from speechlab.metis.acoustic import AcousticConfig
from speechlab.metis.masked_lm import MaskedLMConfig, timed
from speechlab.tokenizer.frame_codec import FrameCodecConfig
from speechlab.tokenizer.rvq import RVQConfig
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizerConfig
from speechlab.tts.fastspeech2 import FastSpeech2Config, FFTConfig
from speechlab.tts.vocoder import FramesConfig, VocoderConfig

RECIPES = {name: presets["smoke"] for name, presets in recipes().items()}
each = pytest.mark.parametrize("name", RECIPES)
BODY = GPTConfig().body
TINY = SpeechTokenizerConfig(
    FrameCodecConfig(dim=16, width=32, encoder_blocks=1, decoder_blocks=1),
    RVQConfig(dim=16, n_q=2, codebook_size=32), 0,
)  # fmt: skip


def tiny(name: str, **changes) -> Recipe:
    """A recipe small enough for a test."""
    known = {
        "codec": {"model": TINY, "distill": "none", "seconds": 0.3},
        "teacher-ft": {"start": ""},
        "gpt": {"model": GPTConfig()},
        "hybrid": {"model": HybridConfig()},
        "metis": {"model": MaskedLMConfig(body=timed(32, 2, 2))},
        "metis-acoustic": {"model": AcousticConfig(body=timed(32, 2, 2))},
        "vocoder": {"model": VocoderConfig(net=FramesConfig(width=32, blocks=1)), "seconds": 0.256},
        "fastspeech2": {"model": FastSpeech2Config.small(
            dim=32, encoder=FFTConfig(1, 2, 8, 8, 32, 3), decoder=FFTConfig(1, 2, 8, 8, 32, 3))},
    }
    return replace(RECIPES[name], **(known.get(name, {}) | changes))


def leaves(value, place: str = ""):
    """(dotted name, owner, field) of every field of a dataclass, nested ones included."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        name = f"{place}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{name}.")
        else:
            yield name, value, field.name


def another(value):
    """Some other value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, value[-1]) if value else ("x",)
    return 1  # None


@each
def test_every_changed_field_stops_a_resume_by_name(name, tmp_path):
    """All presets, all fields, all depths."""
    for preset, recipe in recipes()[name].items():
        folder = tmp_path / preset
        check_run(recipe, "key", folder)
        check_run(copy.deepcopy(recipe), "key", folder)  # the same again
        names = [place for place, _, _ in leaves(recipe)]
        assert len(names) > 15
        assert {"loop.steps", "loop.seed", "optim.lr", "data.size", "batch_size"} <= set(names)
        for number, place in enumerate(names):
            changed = copy.deepcopy(recipe)
            _, owner, field = list(leaves(changed))[number]
            object.__setattr__(owner, field, another(getattr(owner, field)))
            with pytest.raises(RunError) as error:
                check_run(changed, "key", folder)
            assert f"{place} is" in str(error.value)
        with pytest.raises(RunError, match="corpus is 'key' there, 'other' here"):
            check_run(recipe, "other", folder)


def test_other_columns_stop_a_resume(tmp_path):
    """Columns that a corpus brings along are part of what a run learned from."""
    recipe, corpus = tiny("codec"), embedded_corpus("smoke")
    values = {entry.id: np.zeros(3) for entry in corpus.entries}
    with_zeros = corpus.with_values("extra", Values(values))
    recipe.train(tmp_path, with_zeros, until=1)
    recipe.train(tmp_path, with_zeros, until=1)
    changed = values | {corpus.entries[-1].id: np.ones(3)}
    with pytest.raises(RunError, match=r"corpus is .*extra"):
        recipe.train(tmp_path, corpus.with_values("extra", Values(changed)), until=1)


def test_another_recipe_is_refused(tmp_path):
    check_run(RECIPES["codec"], "key", tmp_path)
    with pytest.raises(RunError, match="recipe is 'CodecRecipe' there, 'GPTRecipe' here"):
        check_run(RECIPES["gpt"], "key", tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        check_run(RECIPES["codec"], "key", tmp_path)


def test_differences_are_found_at_any_depth():
    assert differing({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == [
        "a.b is [1, 2] there, [1, 3] here"
    ]
    assert differing({"a": 1}, {}) == ["a is 1 there, None here"]
    assert differing({"a": 1}, {"a": 1}) == []


@each
def test_it_resumes_bit_for_bit(name, tmp_path):
    """Four steps, and two and two in another process's place: every weight and every metric."""
    recipe = tiny(name, loop=replace(RECIPES[name].loop, steps=4, log_every=1))
    whole, history = recipe.train(tmp_path / "whole")
    recipe.train(tmp_path / "parts", until=2)
    again, resumed = recipe.train(tmp_path / "parts")
    one, two = whole.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    drop = ("seconds",)
    assert [{k: v for k, v in r.items() if k not in drop} for r in history] == [
        {k: v for k, v in r.items() if k not in drop} for r in resumed
    ]
    other = replace(recipe, loop=replace(recipe.loop, seed=1)).train(tmp_path / "seed")[0]
    assert any(not torch.equal(one[key], other.state_dict()[key]) for key in one)


OVERFIT = {  # name -> what changes, the metric, and the share of its first value that must go
    "codec": (
        {"seconds": 3.0, "critics_from": 1.0, "quantise_from": 0.0, "optim": Optim(5e-3)},
        "mel",
        0.4,
    ),
    "teacher": ({"seconds": 3.0, "speeds": (1.0, 1.0), "optim": Optim(3e-3, 5)}, "loss", 0.25),
    "teacher-ft": ({"optim": Optim(5e-3, 5)}, "loss", 0.5),
    "recognizer": ({"optim": Optim(5e-3, 5), "width": 32}, "loss", 0.5),
    "speaker": ({"seconds": 3.0, "speeds": (1.0,), "optim": Optim(1e-2, 5)}, "loss", 0.5),
    "gpt": ({"optim": Optim(1e-2, 5)}, "loss", 0.4),
    "hybrid": ({"optim": Optim(1e-2, 5)}, "loss", 0.4),
    "ssl-tokens": ({"seconds": 3.0, "optim": Optim(5e-3, 5)}, "rebuild_loss", 0.3),
    "metis": ({"optim": Optim(1e-2, 5)}, "loss", 0.25),
    "metis-acoustic": ({"optim": Optim(1e-2, 5)}, "loss", 0.2),
    "vocoder": ({"seconds": 3.0, "critics_from": 1.0, "optim": Optim(5e-3)}, "mel", 0.3),
    "fastspeech2": ({"optim": Optim(1e-2, 5)}, "loss", 0.3),
}


@each
def test_it_overfits_one_batch(name, tmp_path):
    """The same two or four utterances, over and over: the loss must fall far."""
    changes, metric, share = OVERFIT[name]
    corpus = embedded_corpus("smoke").split("train")
    corpus = corpus[:4] if name == "speaker" else corpus[:2]
    loop = TrainConfig(60 if name != "recognizer" else 120, log_every=1, save_seconds=0)
    recipe = tiny(name, loop=loop, batch_size=len(corpus), **changes)
    _, history = recipe.train(tmp_path, corpus)
    first, last = history[0][metric], np.mean([row[metric] for row in history[-5:]])
    assert last < (1 - share) * first, (first, last)


@each
def test_publishing(name, tmp_path):
    """`run_recipe` measures what it ships: weights, config, report and card, each once."""
    recipe = tiny(name, loop=replace(RECIPES[name].loop, steps=2))
    folder = tmp_path / "mine"
    run = run_recipe(recipe, folder)
    assert {p.name for p in folder.iterdir()} >= {
        "README.md", "config.json", "model.safetensors", "report.json", "run",
    }  # fmt: skip
    again = speechlab.load(folder)
    kind = again if isinstance(again, Model) else again.model
    mine, theirs = run.model.state_dict(), kind.state_dict()
    assert mine.keys() == theirs.keys()
    if isinstance(again, Model):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    report, card = (
        json.loads((folder / "report.json").read_text()),
        (folder / "README.md").read_text(),
    )
    assert report["facts"]["recipe"] == type(recipe).__name__
    for word in (
        "license: apache-2.0",
        "- data: Corpus(espeak-smoke",
        "- device:",
        "- training time:",
    ):
        assert word in card
    assert "2 steps" in card
    assert 'load("mine")' in card
    with pytest.raises(RunError, match=r"loop.steps is 2 there, 3 here"):
        run_recipe(replace(recipe, loop=replace(recipe.loop, steps=3)), folder)


def test_a_run_is_for_one_process(tmp_path):
    """The second process is told so, at once."""
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path),))
    holder.start()
    try:
        for _ in range(600):
            if (tmp_path / "held").exists():
                break
            multiprocessing.connection.wait([holder.sentinel], 0.1)
        with pytest.raises(RunError, match="in use by another process"):
            run_recipe(tiny("codec"), tmp_path)
    finally:
        holder.terminate()
        holder.join()


def _hold(folder: str) -> None:
    import time

    from speechlab.foundations.recipes import only_one

    with only_one(Path(folder) / "run"):
        (Path(folder) / "held").write_text("")
        time.sleep(120)


def test_a_nan_names_its_utterances_in_every_training(tmp_path, monkeypatch):
    """GPT training used to say 'Batch: unknown'."""
    from speechlab.lm import gpt_training

    real = gpt_training.gpt_loss

    def poisoned(model, batch):
        loss, metrics = real(model, batch)
        return loss * float("nan"), metrics

    monkeypatch.setattr(gpt_training, "gpt_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"Batch: train-\d+"):
        tiny("gpt").train(tmp_path)


# Columns


class Counting(torch.nn.Module):
    """Mean loudness of each frame; counts how often it is asked."""

    def __init__(self):
        super().__init__()
        self._asked = 0

    def forward(self, wav):
        self._asked += 1
        return wav.unfold(-1, 320, 320).abs().mean(-1)


@pytest.fixture
def recordings(tmp_path):
    """Three short WAV files."""
    rng = np.random.default_rng(0)
    for name in "abc":
        samples = (0.1 * rng.standard_normal(3200)).astype(np.float32)
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="PCM_16")
    return tmp_path


def test_one_changed_sample_rebuilds_a_column(recordings, tmp_path_factory):
    cache, module = tmp_path_factory.mktemp("cache"), Counting()

    def column() -> Column:
        return features_column("loud", module, 320)

    def build():
        corpus = folder_corpus(recordings)
        return corpus.key(), with_column(corpus, column(), cache).columns["loud"]

    key, before = build()
    assert module._asked == 3
    assert build()[0] == key
    assert module._asked == 3  # read, not computed
    wav, rate = soundfile.read(recordings / "b.wav", dtype="int16")
    wav[1700] += 1
    soundfile.write(recordings / "b.wav", wav, rate, subtype="PCM_16")  # same name, same length
    changed, after = build()
    assert changed != key
    assert module._asked == 6
    assert torch.equal(before.cut("a.wav"), after.cut("a.wav"))
    soundfile.write(recordings / "d.wav", wav, rate, subtype="PCM_16")
    assert build()[0] != changed


def test_another_computation_is_another_column(recordings, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    corpus = folder_corpus(recordings)
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(1, 2, 320, 320)
    first = with_column(corpus, features_column("x", layer, 320), cache).columns["x"].cut("a.wav")
    with torch.no_grad():
        layer.weight[0, 0, 0] += 1
    second = with_column(corpus, features_column("x", layer, 320), cache).columns["x"].cut("a.wav")
    assert not torch.equal(first, second)
    keys = {features_column("x", layer, 320, settings).key for settings in (None, 1, "1", [1])}
    assert len(keys) == 4


def test_damage_is_found_and_mended(recordings, tmp_path_factory):
    cache, module = tmp_path_factory.mktemp("cache"), Counting()
    corpus = folder_corpus(recordings)
    wanted = with_column(corpus, features_column("x", module, 320), cache).columns["x"].cut("c.wav")
    (folder,) = (p for p in cache.iterdir() if p.is_dir())
    rng, noticed = np.random.default_rng(1), 0
    for number in range(40):
        path = folder / ("values.bin" if number % 2 else "index.json")
        data = bytearray(path.read_bytes())
        cut = number % 4 > 1
        data = data[: rng.integers(len(data))] if cut else data
        if not cut:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(data))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = with_column(corpus, features_column("x", module, 320), cache).columns["x"]
        noticed += any("damaged" in str(one.message) for one in told)
        assert torch.equal(found.cut("c.wav"), wanted), number
        assert (found.hop_length, found.fill) == (320, 0), number
    assert noticed >= 38  # a flipped letter in an unused key may do no harm


def test_a_batch_carries_everything(recordings):
    from speechlab.foundations.batches import BucketBatches, SegmentBatches

    corpus = with_column(folder_corpus(recordings), features_column("x", Counting(), 320), "")
    batch = SegmentBatches(corpus, 0.1, 3, multiple=320)[5]
    for row, (name, start) in enumerate(zip(batch.ids, batch.starts)):
        whole = corpus.columns["x"].cut(name)
        first = start // 320
        assert torch.equal(
            batch["x"][row, :, : int(batch.sizes["x"][row])], whole[:, first : first + 5]
        )
    with pytest.raises(KeyError, match="no column 'y'"):
        batch["y"]
    with pytest.raises(ValueError, match="multiple of 320"):
        [SegmentBatches(corpus, 0.1, 3)[step] for step in range(9)]
    moved = BucketBatches(corpus, 3, sound=False)[0].to("cpu")
    assert moved.wav is None
    assert moved["x"].shape == (3, 1, 10)


# The command line's options are the recipe's fields


@each
def test_every_field_is_an_option(name, capsys):
    with pytest.raises(SystemExit):
        parse_run(RECIPES[name], ["--help"], "x")
    shown = "".join(capsys.readouterr().out.split()).replace("_", "-")
    for place, _, _ in leaves(RECIPES[name]):
        if not place.startswith("model.codec."):  # one of two kinds
            assert "--" + place.replace("_", "-") in shown, place
    if name == "codec":  # the comments beside the fields are the help
        assert (
            "".join(["share", "of", "the", "steps", "from", "which", "critics", "take", "part"])
            in shown
        )


def test_an_option_reaches_the_recipe():
    arguments = ["--optim.lr", "0.5", "--out", "y", "--model.rvq.n-q", "3", "--data.kind", "music"]
    arguments += ["--model.codec.causal", "True"]
    recipe, out, until = parse_run(RECIPES["codec"], arguments, "speechlab train codec smoke")
    assert (out, until) == (Path("y"), None)
    assert type(recipe) is type(RECIPES["codec"])
    assert recipe.optim.lr == 0.5
    assert recipe.model.rvq.n_q == 3
    assert recipe.model.codec.causal
    assert recipe.data == Source("music", "smoke")
    assert recipe.loop == RECIPES["codec"].loop
    _, out, until = parse_run(recipe, ["--until", "3"], "speechlab train codec smoke")
    assert (out, until) == (Path("runs/codec-smoke"), 3)
