"""The training loop and its checkpoints: schedules, kill -9, Ctrl-C, two processes, GAN steps."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from speechlab.foundations import store as S
from speechlab.foundations import training as T
from speechlab.foundations.batches import SegmentBatches

HERE = Path(__file__).parent


def small_trainer(folder, corpus, **settings) -> T.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(800, 8), nn.Dropout(0.2), nn.GELU(), nn.Linear(8, 1))
    config = T.TrainConfig(
        **({"steps": 12, "log_every": 3, "save_every": 4, "ema": 0.9} | settings)
    )
    return T.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        lambda m, b: (m(b.wav) - 1).pow(2).mean(),
        SegmentBatches(corpus, 0.05, 4),
        config,
        folder,
        T.cosine(config.steps, 2),
    )


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values()))


# Schedules


@given(st.integers(1, 200), st.integers(0, 400))
def test_noam_is_the_paper_up_to_scale(warmup, step):
    s, d = step + 1, 512
    paper = d**-0.5 * min(s**-0.5, s * warmup**-1.5)
    peak = d**-0.5 * warmup**-0.5
    assert math.isclose(T.noam(warmup)(step), paper / peak, rel_tol=1e-9)


@given(st.integers(2, 300), st.data())
def test_cosine_against_torch(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    schedule = T.cosine(steps, warmup, final=0.1)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=0.1)
    for step in range(warmup, steps):
        assert math.isclose(schedule(step), theirs.get_last_lr()[0], rel_tol=1e-6)
        optimizer.step()
        theirs.step()
    assert all(schedule(s) <= schedule(s + 1) for s in range(max(0, warmup - 1)))


def test_bad_settings():
    with pytest.raises(ValueError, match="warmup is 10"):
        T.cosine(10, 10)
    with pytest.raises(ValueError, match="warmup is 0"):
        T.noam(0)
    for name in ("steps", "accumulate", "log_every", "keep"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            T.TrainConfig(**({"steps": 5} | {name: 0}))
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        T.TrainConfig(steps=1, precision="fp8")


# Checkpoints

TREES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.text(max_size=4),
        st.integers(0, 4).map(lambda n: torch.arange(n) * 1.5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 9)), inner, max_size=3),
    ),
    max_leaves=8,
)


def equal_trees(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor) and torch.equal(one, other) and one.dtype == other.dtype
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal_trees(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(map(equal_trees, one, other))
        )
    return one == other and type(one) is type(other)


@given(TREES)
def test_any_tree_survives(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "a.safetensors"
    S.save_tree(path, {"tree": tree})
    assert equal_trees(S.load_tree(path)["tree"], tree)


def test_damaged_checkpoints_are_never_loaded(tmp_path):
    for step in (1, 2):
        S.save_checkpoint(tmp_path, step, {"step": step, "w": torch.randn(100)})
    newest = tmp_path / "step-00000002" / "state.safetensors"
    data = newest.read_bytes()
    for harmed in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b"", data[: len(data) // 2]):
        newest.write_bytes(harmed)
        with pytest.warns(UserWarning, match="skipped"):
            assert S.last_checkpoint(tmp_path).name == "step-00000001"
    newest.unlink()
    with pytest.warns(UserWarning, match="skipped"):
        assert S.last_checkpoint(tmp_path).name == "step-00000001"


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    S.save_checkpoint(tmp_path, 1, {"step": 1})

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(S, "save_tree", crash)
    with pytest.raises(OSError, match="no space"):
        S.save_checkpoint(tmp_path, 2, {"step": 2})
    assert S.last_checkpoint(tmp_path).name == "step-00000001"
    monkeypatch.undo()
    S.save_checkpoint(tmp_path, 3, {"step": 3})
    assert not list(tmp_path.glob(".saving-*"))


def test_only_the_newest_checkpoints_stay(tmp_path):
    for step in range(5):
        S.save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(S.CheckpointError, match="not a speechlab checkpoint"):
        S.load_tree(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"hello")
    with pytest.raises(S.CheckpointError, match="cannot be read"):
        S.load_tree(tmp_path / "b.safetensors")
    with pytest.raises(TypeError, match="cannot hold a object"):
        S.save_tree(tmp_path / "c", {"x": object()})


# Resuming


def test_resume_is_exact_in_process(tmp_path, corpus):
    whole = small_trainer(tmp_path / "a", corpus)
    whole.fit()
    small_trainer(tmp_path / "b", corpus).fit(until=6)
    second = small_trainer(tmp_path / "b", corpus)
    second.fit()
    assert same(whole.raw().state_dict(), second.raw().state_dict())
    assert same(whole.averaged["model"].state_dict(), second.averaged["model"].state_dict())
    assert [r["loss"] for r in whole.history] == [r["loss"] for r in second.history]
    rows = [
        json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows] == [3, 6, 9, 12]


KILLED = """
import os, sys, time
os.environ["SPEECHLAB_DEVICE"] = "cpu"
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_training import small_trainer
from speechlab.foundations.corpus import embedded_corpus
settings = dict(steps=60, save_every=5, workers={workers})
trainer = small_trainer({folder!r}, embedded_corpus("smoke"), **settings)
inner = trainer._step_function
def slow(trainer, batch):
    time.sleep({pause})
    return inner(trainer, batch)
trainer._step_function = slow
trainer.fit()
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_kill_minus_9_and_resume_gives_the_same_bits(tmp_path, workers):
    """A real process, killed in the middle of an epoch, then started again."""

    def start(folder, pause):
        code = KILLED.format(here=str(HERE), folder=str(folder), pause=pause, workers=workers)
        return subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True
        )

    assert start(tmp_path / "whole", 0).wait() == 0
    victim = start(tmp_path / "killed", 0.05)
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "step-00000010").exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.12)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    last = S.last_checkpoint(tmp_path / "killed")
    assert "step-00000010" <= last.name < "step-00000060"
    assert start(tmp_path / "killed", 0).wait() == 0
    one, two = (
        S.load_tree(tmp_path / n / "step-00000060" / "state.safetensors")
        for n in ("whole", "killed")
    )
    assert equal_trees(one["modules"], two["modules"])
    assert equal_trees(one["optimizers"], two["optimizers"])
    assert equal_trees(one["averaged"], two["averaged"])
    one, two = (T._from_bytes(tree["history"]) for tree in (one, two))
    assert [r["loss"] for r in one] == [r["loss"] for r in two]


def test_another_model_is_refused(tmp_path, corpus):
    small_trainer(tmp_path, corpus).fit(until=4)
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    other = T.Trainer(
        {"generator": model},
        {"generator": torch.optim.SGD(model.parameters(), lr=1)},
        lambda t, b: {},
        SegmentBatches(corpus, 0.05, 4),
        T.TrainConfig(steps=8),
        tmp_path,
    )
    with pytest.raises(S.CheckpointError, match="modules"):
        other.fit()


def test_only_damaged_checkpoints_are_no_fresh_start(tmp_path, corpus):
    """A run whose checkpoints are all damaged stops; nothing is deleted until that is asked for."""
    small_trainer(tmp_path, corpus).fit(until=8)
    folders = sorted(tmp_path.glob("step-*"))
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000008"]
    for folder in folders:
        (folder / "state.safetensors").write_bytes(b"harmed")
    rows = (tmp_path / "metrics.jsonl").read_text()
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(S.CheckpointError, match=r"step-00000004, step-00000008.*resume=False"),
    ):
        small_trainer(tmp_path, corpus).fit()
    assert sorted(tmp_path.glob("step-*")) == folders
    assert (tmp_path / "metrics.jsonl").read_text() == rows
    afresh = small_trainer(tmp_path, corpus)
    assert [row["step"] for row in afresh.fit(resume=False)] == [3, 6, 9, 12]
    assert not set(folders) & set(tmp_path.glob("step-0000000[0-7]"))


def stopped(trainer: T.Trainer, step: int, error: type = KeyboardInterrupt) -> T.Trainer:
    """A trainer that is stopped between two steps, once `step` of them are done."""
    inner = trainer._one_step

    def one_step(loader):
        if trainer.step == step:
            raise error
        return inner(loader)

    trainer._one_step = one_step
    return trainer


def test_an_interrupt_keeps_the_steps_so_far(tmp_path, corpus):
    """Ctrl-C after step 5 and before 6: five steps are on disk, and going on is exact."""
    whole = small_trainer(tmp_path / "whole", corpus)
    whole.fit()
    cut = stopped(small_trainer(tmp_path / "cut", corpus, save_every=0), 5)
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    assert S.last_checkpoint(tmp_path / "cut").name == "step-00000005"
    second = small_trainer(tmp_path / "cut", corpus, save_every=0)
    second.fit()
    assert same(whole.raw().state_dict(), second.raw().state_dict())
    assert [r["loss"] for r in whole.history] == [r["loss"] for r in second.history]


def test_ctrl_c_in_the_middle_of_a_step(tmp_path, corpus):
    """Where training spends its time: the signal comes while a loss is computed."""
    whole = small_trainer(tmp_path / "whole", corpus)
    whole.fit()
    trainer = small_trainer(tmp_path / "cut", corpus, save_every=0)
    inner = trainer._step_function

    def step(trainer, batch):
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)
        return inner(trainer, batch)

    trainer._step_function = step
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    found = S.last_checkpoint(tmp_path / "cut")
    assert found is not None and found.name in ("step-00000005", "step-00000006")
    second = small_trainer(tmp_path / "cut", corpus, save_every=0)
    second.fit()
    assert same(whole.raw().state_dict(), second.raw().state_dict())


def test_an_error_saves_nothing(tmp_path, corpus):
    """Only Ctrl-C saves: what an error leaves behind may be what caused it."""
    with pytest.raises(ZeroDivisionError):
        stopped(small_trainer(tmp_path, corpus), 5, ZeroDivisionError).fit()
    assert S.last_checkpoint(tmp_path).name == "step-00000004"


def test_half_a_step_is_never_saved(tmp_path, corpus):
    """Ctrl-C between the updates of two optimisers: no checkpoint of that moment."""
    whole = gan(tmp_path / "whole", corpus, steps=6)
    whole.fit()
    trainer = gan(tmp_path / "cut", corpus, steps=6, save_every=2)
    inner = trainer.update

    def update(name, loss):
        if (trainer.step, name) == (3, "generator"):
            raise KeyboardInterrupt
        inner(name, loss)

    trainer.update = update
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert S.last_checkpoint(tmp_path / "cut").name == "step-00000002"
    second = gan(tmp_path / "cut", corpus, steps=6)
    second.fit()
    for name in ("generator", "discriminator"):
        assert same(whole.raw(name).state_dict(), second.raw(name).state_dict())


@pytest.mark.parametrize(("seconds", "wanted"), [(120.0, [3, 6, 9, 12]), (0.0, [12])])
def test_checkpoints_come_by_the_clock(tmp_path, corpus, monkeypatch, seconds, wanted):
    """Steps of 50 seconds: a checkpoint where more than 120 have passed since the last."""
    assert T.TrainConfig(steps=1).save_seconds == 120
    trainer = small_trainer(tmp_path, corpus, save_every=0, save_seconds=seconds)
    clock = types.SimpleNamespace(
        monotonic=lambda: 50.0 * trainer.step, perf_counter=time.perf_counter
    )
    monkeypatch.setattr(T, "time", clock)
    save, saved, trainer._saved = trainer.save, [], 0.0

    def noted():
        saved.append(trainer.step)
        save()

    trainer.save = noted
    trainer.fit()
    assert saved == wanted


# Several optimisers


def gan(folder, corpus, **settings) -> T.Trainer:
    torch.manual_seed(0)
    modules = {"generator": nn.Linear(4, 800), "discriminator": nn.Linear(800, 1)}
    optimizers = {n: torch.optim.Adam(m.parameters(), lr=1e-3) for n, m in modules.items()}

    def step(trainer, batch):
        fake = trainer["generator"](torch.randn(len(batch), 1, 4))
        judge = trainer["discriminator"]
        d_loss = (1 - judge(batch.wav)).relu().mean() + (1 + judge(fake.detach())).relu().mean()
        trainer.update("discriminator", d_loss)
        with trainer.frozen("discriminator") as frozen:
            g_loss = (1 - frozen(fake)).relu().mean()
            trainer.update("generator", g_loss)
        return {"d_loss": d_loss, "g_loss": g_loss}

    return T.Trainer(
        modules,
        optimizers,
        step,
        SegmentBatches(corpus, 0.05, 4),
        T.TrainConfig(**({"steps": 10, "log_every": 5} | settings)),
        folder,
        {"generator": T.constant(3)},
    )


def test_two_optimisers_resume_exactly(tmp_path, corpus):
    whole = gan(tmp_path / "a", corpus)
    whole.fit()
    gan(tmp_path / "b", corpus).fit(until=5)
    second = gan(tmp_path / "b", corpus)
    second.fit()
    for name in ("generator", "discriminator"):
        assert same(whole.raw(name).state_dict(), second.raw(name).state_dict())
    assert {"d_loss", "g_loss", "lr_generator", "lr_discriminator"} <= set(whole.history[0])


def test_the_generator_step_leaves_no_gradient_in_the_discriminator(tmp_path, corpus):
    trainer = gan(tmp_path, corpus, steps=1)
    trainer.fit()
    assert all(p.grad is None for p in trainer.raw("discriminator").parameters())
    assert all(p.requires_grad for p in trainer.raw("discriminator").parameters())


# Loop details


def test_accumulation_equals_the_large_batch(tmp_path, corpus):
    def weights(batch_size, accumulate):
        torch.manual_seed(0)
        model = nn.Linear(800, 1)
        trainer = T.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda m, b: (m(b.wav) - 1).pow(2).mean(),
            SegmentBatches(corpus, 0.05, batch_size),
            T.TrainConfig(steps=4, accumulate=accumulate),
            tmp_path / str(accumulate),
        )
        trainer.fit()
        return trainer.raw().weight.detach()

    assert torch.allclose(weights(8, 1), weights(2, 4), atol=1e-6)


def test_clipping_and_schedule_reach_the_optimiser(tmp_path, corpus):
    torch.manual_seed(0)
    model = nn.Linear(800, 1)
    before = model.weight.detach().clone()
    trainer = T.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda m, b: 1e6 * (m(b.wav) - 1).pow(2).mean(),
        SegmentBatches(corpus, 0.05, 4),
        T.TrainConfig(steps=1, clip=0.5),
        tmp_path,
        T.constant(4),
    )
    trainer.fit()
    change = torch.cat([(trainer.raw().weight - before).flatten()]).norm()
    assert change <= 0.25 * 0.5 + 1e-6
    assert trainer.history[0]["lr"] == 0.25


def test_averaged_weights_follow_the_formula(tmp_path, corpus):
    trainer = small_trainer(tmp_path, corpus, steps=3)
    seen = []
    trainer.fit(until=1)
    seen.append(trainer.raw()[0].weight.detach().clone())
    trainer.fit(until=2)
    seen.append(trainer.raw()[0].weight.detach().clone())
    expected = 0.9 * seen[0] + 0.1 * seen[1]
    assert torch.allclose(trainer.averaged["model"].module[0].weight, expected, atol=1e-7)


def test_validation_runs_in_eval_mode(tmp_path, corpus):
    modes = []

    def validate(trainer):
        modes.append(trainer.raw().training)
        return {"valid_loss": 1.5}

    torch.manual_seed(0)
    model = nn.Linear(800, 1)
    trainer = T.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda m, b: m(b.wav).pow(2).mean(),
        SegmentBatches(corpus, 0.05, 4),
        T.TrainConfig(steps=6, log_every=2, validate_every=4),
        tmp_path,
        validate=validate,
    )
    history = trainer.fit()
    assert modes == [False, False]
    assert [(row["step"], "valid_loss" in row) for row in history] == [
        (2, False),
        (4, True),
        (6, True),
    ]
    assert trainer.raw().training is False


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_with_a_report(tmp_path, corpus, value):
    segments = SegmentBatches(corpus, 0.05, 4)
    torch.manual_seed(0)
    model = nn.Linear(800, 1)
    bad = segments[5].ids[0]

    def loss(m, batch):
        return m(batch.wav).pow(2).mean() * (float(value) if bad in batch.ids else 1)

    trainer = T.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss,
        segments,
        T.TrainConfig(steps=9, save_every=2),
        tmp_path,
    )
    with pytest.raises(T.NonFiniteLoss, match=rf"step 5.*{value}.*{bad}.*step-00000004"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in trainer.raw().parameters())


def test_bf16_trains(tmp_path, corpus):
    trainer = small_trainer(tmp_path, corpus, precision="bf16", steps=6)
    history = trainer.fit()
    assert all(math.isfinite(row["loss"]) for row in history)
    assert trainer.raw()[0].weight.dtype == torch.float32


def test_validation_does_not_wait_for_the_log(tmp_path, corpus):
    model = nn.Linear(800, 1)
    config = T.TrainConfig(steps=6, log_every=4, validate_every=3, ema=0.9)
    modes = []
    trainer = T.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda m, b: (m(b.wav).pow(2).mean(), {"vector": torch.arange(3.0)}),
        SegmentBatches(corpus, 0.05, 4),
        config,
        tmp_path,
        validate=lambda t: modes.append(t.averaged["model"].training) or {"v": 1},
    )
    assert [(r["step"], "v" in r) for r in trainer.fit()] == [(3, True), (4, False), (6, True)]
    assert modes == [False, False]
    assert trainer.history[0]["vector"] == 1


def test_metrics_may_come_and_go(tmp_path, corpus):
    model = nn.Linear(800, 1)

    def loss(m, batch):
        extra = {"early": 1.0} if trainer.step < 2 else {"late": 2.0}
        return m(batch.wav).pow(2).mean(), extra

    trainer = T.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss,
        SegmentBatches(corpus, 0.05, 4),
        T.TrainConfig(steps=4, log_every=4),
        tmp_path,
    )
    row = trainer.fit()[0]
    assert (row["early"], row["late"]) == (1, 2)


def test_starting_afresh_forgets_the_old_run(tmp_path, corpus):
    small_trainer(tmp_path, corpus).fit()
    small_trainer(tmp_path, corpus, steps=6, save_every=2).fit(resume=False)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000006"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]


def test_a_finished_run_returns_at_once(tmp_path, corpus):
    done = small_trainer(tmp_path, corpus).fit()
    assert small_trainer(tmp_path, corpus).fit() == done
    assert small_trainer(tmp_path, corpus).fit(until=4) == done
    assert small_trainer(tmp_path / "new", corpus).fit(until=0) == []


def test_an_optimiser_used_twice_keeps_its_rate(tmp_path, corpus):
    model = nn.Linear(800, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name in ("a", "b"):
        trainer = T.Trainer(
            model,
            optimizer,
            lambda m, b: m(b.wav).pow(2).mean(),
            SegmentBatches(corpus, 0.05, 4),
            T.TrainConfig(steps=4, log_every=1),
            tmp_path / name,
            T.cosine(4),
        )
        assert trainer.fit()[0]["lr"] == 0.1


def test_saving_a_step_again_never_loses_it(tmp_path, monkeypatch):
    S.save_checkpoint(tmp_path, 5, {"step": 5})
    S.save_checkpoint(tmp_path, 5, {"step": 5, "again": True})
    assert S.load_tree(S.last_checkpoint(tmp_path) / "state.safetensors")["again"]
    S.save_checkpoint(tmp_path, 3, {"step": 3}, keep=1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003"]


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    for step in (1, 2):
        S.save_checkpoint(tmp_path, step, {"step": step})
    (tmp_path / "step-00000002" / "state.safetensors").write_bytes(b"")
    S.save_checkpoint(tmp_path, 3, {"step": 3}, keep=2)
    assert (tmp_path / "step-00000001").exists()


# Two processes


def run_processes(world: int, folder: Path, what: str) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    subprocess.run(
        [sys.executable, str(HERE / "two_processes.py"), str(world), str(folder), what],
        check=True,
        env=os.environ | {"TEST_PORT": port},
        stderr=subprocess.PIPE,
    )
    return [
        torch.load(folder / f"{what}-{world}-{rank}.pt", weights_only=True) for rank in range(world)
    ]


def test_two_processes_equal_one(tmp_path):
    (one,) = run_processes(1, tmp_path, "linear")
    two = run_processes(2, tmp_path, "linear")
    for rank in range(2):
        for name, weight in one["weights"].items():
            assert torch.allclose(two[rank]["weights"][name], weight, atol=1e-5)
    assert all(abs(a - b) < 1e-5 for a, b in zip(one["loss"], two[0]["loss"]))


def test_two_processes_train_one_language_model(tmp_path):
    (one,) = run_processes(1, tmp_path, "gpt")
    two = run_processes(2, tmp_path, "gpt")
    for rank in range(2):
        for name, weight in one["weights"].items():
            assert torch.allclose(two[rank]["weights"][name], weight, atol=1e-4), name
    for name in ("nll", "train"):
        assert abs(one[name] - two[0][name]) < 1e-3


def test_codebooks_are_shared_by_processes(tmp_path):
    (one,) = run_processes(1, tmp_path, "rvq")
    two = run_processes(2, tmp_path, "rvq")
    for name, value in one["fixed"].items():
        assert torch.allclose(two[0]["fixed"][name].float(), value.float(), atol=1e-5)
    for name, value in two[0]["random"].items():
        assert torch.equal(two[1]["random"][name], value)
