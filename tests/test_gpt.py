"""The GPT of codes: what it sees, what it writes, what it reports."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same_codes import assert_same_codes

from speechlab.foundations.batches import BucketBatches, make_batch
from speechlab.foundations.columns import Values, codes_column, with_column
from speechlab.foundations.contracts import CodeSpec, CodeSpecError
from speechlab.foundations.corpus import Corpus, Entry
from speechlab.foundations.recipes import Optim
from speechlab.foundations.sampling import Sampling
from speechlab.foundations.training import TrainConfig
from speechlab.foundations.transformer import TransformerConfig
from speechlab.lm.generation import Generator, generate, stream
from speechlab.lm.gpt import (
    GPT,
    GPT_CONFIGS,
    GPT_PATTERNS,
    DepthDecoder,
    GPTConfig,
    NextTokenView,
    gpt_loss,
    token_nll,
)
from speechlab.lm.gpt_training import GPTRecipe, Learner, matrices_decay
from speechlab.lm.likelihood import describe_gpt, likelihood, likelihood_table
from speechlab.lm.patterns import make_pattern

HOP = 320
BODY = TransformerConfig(24, 2, 2, context=128)
INSIDE = TransformerConfig(16, 1, 2, context=8)


def make(pattern: str = "parallel", levels: int = 3, size: int = 20, seed: int = 0) -> GPT:
    """A model whose weights are large enough to have opinions."""
    torch.manual_seed(seed)
    config = GPTConfig(CodeSpec(size, levels), levels, pattern=pattern, body=BODY,
                       depth=INSIDE if pattern == "depth" else None)  # fmt: skip
    model = GPT(config).eval()
    for weight in model.parameters():
        weight.data.mul_(5) if weight.dim() > 1 else None
    return model


def no_sound(entry: Entry, start: int, stop: int):
    """Codes are all that these recordings have."""
    raise AssertionError(f"the sound of {entry.id} was read")


def coded_corpus(
    codes: list[torch.Tensor],  # each (levels, frames)
    size: int = 20,
    mels: list[torch.Tensor] | None = None,  # each (n_mels, frames)
    rest: int = 0,  # samples that the last frame lacks
    splits: tuple[str, ...] = ("train",),  # taken in turn
) -> Corpus:
    """A corpus without sound: `clip-0`, `clip-1`, … with the column of their codes."""
    entries = [
        Entry(f"clip-{i}", HOP * c.shape[1] - rest, split=splits[i % len(splits)])
        for i, c in enumerate(codes)
    ]
    about = {"spec": CodeSpec(size, len(codes[0]) if codes else 1, name="tiny").to_dict()}
    rows = {e.id: c.numpy().astype(np.int16) for e, c in zip(entries, codes)}
    corpus = Corpus(entries, no_sound, 16000, "clips", lambda entry: entry.id)
    corpus = corpus.with_values("codes", Values(rows, HOP, about=about))
    if mels is None:
        return corpus
    heard = {e.id: mel.numpy() for e, mel in zip(entries, mels)}
    return corpus.with_values("mel", Values(heard, HOP))


def clips(count: int = 12, levels: int = 1, size: int = 20, seed: int = 0, rest: int = 7) -> Corpus:
    """Random codes of random lengths; the last frame of each recording is incomplete."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 30, (count,), generator=rng).tolist()
    codes = [torch.randint(size, (levels, n), generator=rng) for n in lengths]
    return coded_corpus(codes, size, rest=rest)


def codes_in(corpus: Corpus) -> list[torch.Tensor]:
    """The codes of each recording, (levels, frames)."""
    return [corpus.columns["codes"].cut(entry.id) for entry in corpus.entries]


@pytest.mark.parametrize("pattern", GPT_PATTERNS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_logits_move_where_the_pattern_lets_them(pattern, data):
    model, layout = make(pattern).double(), make_pattern(pattern, 3, 6)
    codes = torch.randint(20, (1, 3, 6))
    t, q = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 2))
    other = codes.clone()
    other[0, q, t] = (other[0, q, t] + 1 + data.draw(st.integers(0, 17))) % 20
    with torch.no_grad():
        moved = (model(other) - model(codes))[0, :, :6, :20].abs().amax(-1) > 0
    for q2 in range(3):
        for t2 in range(6):
            assert bool(moved[q2, t2]) == bool(layout.visible(t2, q2)[q, t])


@pytest.mark.parametrize("pattern", GPT_PATTERNS)
def test_a_padded_row_gives_what_it_gives_alone(pattern):
    model, codes = make(pattern), torch.randint(20, (2, 3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    found, alone = model(codes, mask)[1, :, :6], model(codes[1:, :, :5])[0]
    known = alone.isfinite()
    torch.testing.assert_close(found[known], alone[known], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", GPT_PATTERNS)
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    new=st.integers(1, 12), seed=st.integers(0, 1000), rule=st.sampled_from(
        [Sampling(), Sampling(0), Sampling(0.8, top_k=4, penalty=1.3, window=3),
         Sampling(top_p=0.6, repeat_ratio=0.3, window=4)]),
)  # fmt: skip
def test_cache_batch_and_stream_agree(pattern, lengths, new, seed, rule):
    """With a cache, without, one row at a time, frame by frame: the same codes."""
    model = make(pattern, seed=1)
    prompts = [torch.randint(20, (3, n)) for n in lengths]
    fast = generate(model, prompts, new, rule, seed, repeats=5)
    slow = generate(model, prompts, new, rule, seed, repeats=5, cached=False)
    assert fast.reasons == slow.reasons
    for row, (one, two, prompt) in enumerate(zip(fast.codes, slow.codes, prompts)):
        assert torch.equal(one, two)
        alone = generate(model, [prompt], new, rule, seed, repeats=5, first_row=row)
        assert torch.equal(one, alone.codes[0]) and alone.reasons[0] == fast.reasons[row]
        assert torch.equal(one[:, : prompt.shape[1]], prompt)
        assert one.shape[1] <= prompt.shape[1] + new
        assert int(one.max() if one.numel() else 0) < 20
    parts = list(stream(model, prompts[0].unsqueeze(0), new, rule, seed, repeats=5))
    streamed = torch.cat([prompts[0].unsqueeze(0), *parts], dim=2)[0]
    assert torch.equal(streamed, fast.codes[0])


@pytest.mark.parametrize("pattern", GPT_PATTERNS)
def test_greedy_codes_are_the_argmax_of_one_pass(pattern):
    model, prompt = make(pattern, seed=2), torch.randint(20, (1, 3, 4))
    codes = generate(model, prompt, 20, Sampling(0), min_frames=20).codes[0][None]
    with torch.no_grad():
        best = model(codes)[..., :20].argmax(-1)
    last = 24 - 2 * (pattern == "delay")  # what ends later than the codes sees another future
    assert torch.equal(best[:, :, 4:last], codes[:, :, 4:last])


def test_the_mean_of_samples_follows_the_model():
    """One step drawn many times has the probabilities of one pass."""
    model, prompt = make(levels=1), torch.randint(20, (1, 1, 3))
    drawn = generate(model, prompt.expand(3000, -1, -1), 1, min_frames=1).codes
    counts = torch.bincount(torch.stack([c[0, 3] for c in drawn]), minlength=20) / 3000
    p = model(prompt)[0, 0, 3, :20].softmax(-1)
    assert (counts - p).abs().max() < 0.04


def test_stops():
    model = make(levels=1)
    model.head.weight.data.zero_()
    always = model.head.weight.data
    hidden = model.step(torch.full((1, 1, 1), 21), None, model.caches(1))[0]
    always[20] = hidden  # the end is the likeliest at the first step
    found = generate(model, None, 9, Sampling(0))
    assert found.reasons == ["end"] and found.codes[0].shape == (1, 0)
    assert list(stream(model, None, 9, Sampling(0))) == []
    found = generate(model, None, 9, Sampling(0), min_frames=3)
    assert found.codes[0].shape[1] >= 3
    always.zero_()  # all equal: greedy says code 0 for ever
    assert generate(model, None, 9, Sampling(0)).reasons == ["length"]
    found = generate(model, None, 9, Sampling(0), repeats=4)
    assert found.reasons == ["repeats"] and found.codes[0].shape[1] == 4


def test_finished_rows_leave_the_batch():
    model, sizes = make(levels=1, seed=3), []
    step = model.step
    model.step = lambda sequence, *rest: sizes.append(len(sequence)) or step(sequence, *rest)
    found = generate(model, [torch.randint(20, (1, 5)) for _ in range(12)], 60, Sampling(2.0), 4)
    assert "end" in found.reasons
    assert sizes[0] == 12 > sizes[-1]
    assert sizes == sorted(sizes, reverse=True)


def test_depth_decoder_sees_coarser_levels_only():
    inside = DepthDecoder(INSIDE, 24, 4, 20).double()
    hidden, codes = torch.randn(5, 24).double(), torch.randint(20, (5, 4))
    for q in range(4):
        other = codes.clone()
        other[:, q] = (other[:, q] + 1) % 20
        moved = (inside(hidden, other) - inside(hidden, codes)).abs().amax((0, 2)) > 0
        assert moved.tolist() == [q < level for level in (1, 2, 3)]


def test_nll_by_hand_and_in_bits_per_second():
    model, data = make(levels=1), clips(5)
    found = likelihood(model, data, batch_size=2)
    for index, codes in enumerate(codes_in(data)):
        logp = model(codes[None])[0, 0].detach().double().log_softmax(-1)
        by_hand = -sum(float(logp[t, int(c)]) for t, c in enumerate(codes[0]))
        assert math.isclose(found.nll[index, 0], by_hand, rel_tol=1e-4)
        ranks = [int((logp[t] > logp[t, int(c)]).sum()) for t, c in enumerate(codes[0])]
        assert found.right[index, 0] == sum(r == 0 for r in ranks)
        assert found.among_ten[index, 0] == sum(r < 10 for r in ranks)
    assert found.frames.tolist() == [codes.shape[1] for codes in codes_in(data)]
    row = found.level()
    assert math.isclose(row["perplexity"], math.exp(row["nll"]))
    assert math.isclose(found.bits_per_second, 50 * row["nll"] / math.log(2))
    assert found.estimate().low < row["nll"] < found.estimate().high
    assert "| 1 |" in likelihood_table(found)


@pytest.mark.parametrize("pattern", GPT_PATTERNS)
def test_the_end_counts_in_the_loss_only_where_it_is_real(pattern):
    model, data = make(pattern), clips(3, levels=3)
    whole = data.lengths.tolist()
    rows = [(0, 0, 4 * HOP), (1, 0, whole[1]), (2, 0, min(4 * HOP, whole[2]))]
    assert whole[0] > 4 * HOP
    batch = make_batch(data, rows, sound=False)
    assert batch.ends.tolist() == [False, True, whole[2] <= 4 * HOP]
    nll, mask, _ = token_nll(model, batch)
    assert torch.isfinite(nll).all()
    for row, end in enumerate(batch.ends):
        frames = int(batch.valid("codes")[row].sum())
        assert frames == -(-rows[row][2] // HOP)
        assert mask[row, 0].sum() == frames + int(end)


def test_depth_loss_is_the_mean_over_levels():
    """With every frame chosen, the sampled loss is the full one, but for the weight of the ends."""
    model, data = make("depth"), clips(4, levels=3)
    model.config = replace(model.config, depth_share=1.0)
    rows = [(i, 0, HOP * (codes.shape[1] - 1)) for i, codes in enumerate(codes_in(data))]
    batch = make_batch(data, rows, sound=False)  # no ends
    assert not batch.ends.any()
    loss, metrics = gpt_loss(model, batch)
    nll, mask, _ = token_nll(model, batch)
    each = nll.sum((0, 2)) / mask.sum((0, 2))
    torch.testing.assert_close(loss, each.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["nll"], each[0], rtol=1e-4, atol=1e-4)


def test_training_learns_and_resumes(tmp_path):
    """A repeating sequence is learned; a run in two parts ends where one run ends."""
    pattern = torch.arange(40).remainder(5).view(1, -1)
    parts = [pattern[:, i : i + 20] for i in range(20)]
    data = coded_corpus(parts, 8, splits=("train",) * 4 + ("test",))
    recipe = GPTRecipe(
        optim=Optim(1e-2, 5, 0.1, (0.9, 0.95), 0.1),
        loop=TrainConfig(60, log_every=20, save_every=30),
        batch_size=8,
        model=GPTConfig(body=BODY),
    )
    model, history = recipe.train(tmp_path / "one", data)
    assert model.config.codes == data.columns["codes"].spec
    assert likelihood(model, data).level()["nll"] < 0.2 < history[0]["nll"]
    measured, held = recipe.measure(model, data), likelihood(model, data.split("test"))
    assert measured["level_1"]["nll"] == pytest.approx(held.level()["nll"])
    assert f"{measured['level_1']['nll']:.3f}" in recipe.describe(model, measured)
    recipe.train(tmp_path / "two", data, until=30)
    again, rest = recipe.train(tmp_path / "two", data)
    assert [row["step"] for row in rest] == [20, 40, 60]
    for one, two in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("pattern", "frames"), [("parallel", 39), ("delay", 37), ("flatten", 12)])
def test_training_cuts_what_the_context_cannot_hold(pattern, frames, tmp_path):
    """Long recordings train any pattern; one position is kept for the end."""
    data = coded_corpus([torch.randint(20, (3, n)) for n in (60, 61, 80, 5)])
    body = TransformerConfig(24, 1, 2, context=40)
    recipe = GPTRecipe(
        loop=TrainConfig(2), batch_size=4, model=GPTConfig(levels=3, pattern=pattern, body=body)
    )
    trainer = recipe.trainer(data, tmp_path)
    assert sorted(trainer.batches[0].sizes["codes"].tolist()) == [5, frames, frames, frames]
    assert len(recipe.train(tmp_path, data)[1]) == 1


@pytest.mark.parametrize("rest", [0, 7])
def test_batches_are_cut_and_repeatable(rest):
    data = clips(20, rest=rest)
    batches = BucketBatches(data, 4, seed=1, most=10 * HOP, multiple=HOP, sound=False)
    one, two = batches[3], batches[3]
    assert torch.equal(one["codes"], two["codes"]) and one["codes"].shape[2] <= 10
    known, cuts = dict(zip([e.id for e in data.entries], codes_in(data))), []
    for batch in map(batches.__getitem__, range(20)):
        for row, name in enumerate(batch.ids):
            whole = known[name][0].tolist()
            part = batch["codes"][row, 0][batch.valid("codes")[row]].tolist()
            starts = [i for i in range(len(whole)) if whole[i : i + len(part)] == part]
            assert batch.starts[row] // HOP in starts
            assert bool(batch.ends[row]) == (starts[-1] + len(part) == len(whole))
            if len(whole) > 10:
                cuts.append((batch.starts[row] == 0, bool(batch.ends[row])))
    starting, ending = zip(*cuts)
    assert any(starting) and any(ending)  # every part of a recording gets its turn


def test_shards_and_columns(tmp_path):
    """A model hears the same codes from shards, from a column, and from the tokeniser itself."""
    from speechlab.foundations.corpus import embedded_corpus
    from speechlab.tokenizer.shards import shard_corpus, write_shards
    from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer

    tokenizer = SpeechTokenizer.load("small-causal")
    corpus = embedded_corpus("smoke").split("test")[:3]
    write_shards(tokenizer, corpus, tmp_path, n_q=2)
    read, made = shard_corpus(tmp_path), with_column(corpus, codes_column(tokenizer, 2))
    assert [e.id for e in read.entries] == [e.id for e in made.entries]
    for one, two, utterance in zip(codes_in(read), codes_in(made), corpus):
        assert torch.equal(one, two)
        assert_same_codes(tokenizer, utterance.wav, one[None])
    config = GPTConfig(tokenizer.spec, levels=2, body=replace(BODY, context=512))
    model = GPT(config)
    found = [likelihood(model, part) for part in (read, made)]
    np.testing.assert_allclose(found[0].nll, found[1].nll, rtol=1e-5)
    first = likelihood(GPT(replace(config, levels=1)), read)  # hears the first level only
    assert first.nll.shape == (3, 1) and len(read[:2]) == 2


@pytest.mark.parametrize("body", [BODY, TransformerConfig.gpt2(dim=24, layers=2, heads=2)])
def test_matrices_decay_and_tables_do_not(body):
    model = GPT(replace(make("depth").config, body=body))
    optimizer = matrices_decay(model, Optim(1e-3, betas=(0.9, 0.95), weight_decay=0.1))
    decayed, free = optimizer.param_groups
    names = {id(w): n for n, w in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert all(g["betas"] == (0.9, 0.95) and g["lr"] == 1e-3 for g in (decayed, free))
    for w in decayed["params"]:
        assert w.dim() == 2 and not {"tokens", "places"} & set(names[id(w)].split("."))
    assert all(w.dim() == 1 or not names[id(w)].startswith("head") for w in free["params"])
    found = {id(w) for w in (*decayed["params"], *free["params"])}
    assert found == set(names)
    assert len(decayed["params"]) + len(free["params"]) == len(names)


@pytest.mark.parametrize("config", GPT_CONFIGS.values(), ids=GPT_CONFIGS)
def test_saved_and_loaded(config, tmp_path):
    if config.body.dim > 256:
        config = GPTConfig(CodeSpec(16, 2), levels=2, pattern="delay", body=BODY)
    model = GPT(config)
    model.save(tmp_path)
    again = GPT.load(tmp_path)
    assert again.config == config and not again.training
    assert f"Predicts {config.levels} levels" in describe_gpt(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_parity_with_gpt2():
    """The benchmark's pair: the same logits and the same greedy tokens."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    from gpt import CODES, make_pair

    ours, peer = make_pair()
    codes = torch.randint(CODES, (2, 1, 30))
    ids = torch.cat([torch.full((2, 1), CODES + 1), codes[:, 0]], dim=1)
    wanted = peer(ids).logits[..., :-1]
    torch.testing.assert_close(ours(codes)[:, 0], wanted, rtol=1e-3, atol=1e-3)
    theirs = peer.generate(ids, do_sample=False, max_new_tokens=20, min_new_tokens=20,
                           suppress_tokens=[CODES + 1])[:, 31:]  # fmt: skip
    found = generate(ours, codes, 20, Sampling(0), min_frames=20).codes
    assert torch.equal(torch.stack(found)[:, 0, 30:], theirs)


@pytest.mark.parametrize(("pattern", "frames"), [("parallel", 40), ("delay", 38), ("flatten", 13)])
def test_prompts_up_to_the_last_position(pattern, frames):
    """As many frames as the context of 40 positions holds, and not one more."""
    body = TransformerConfig(24, 1, 2, context=40)
    model = GPT(GPTConfig(CodeSpec(20, 3), 3, pattern=pattern, body=body)).eval()
    prompt = torch.randint(20, (1, 3, frames - 4))
    found = generate(model, prompt, 4, min_frames=9)
    assert found.codes[0].shape[1] == frames
    with pytest.raises(ValueError, match=f"holds {frames} frames"):
        generate(model, prompt, 5)


def test_training_goes_through_forward(tmp_path):
    """What distributed training wraps is called, not walked around."""
    data = clips(8)
    learner = torch.nn.ModuleDict({"inner": Learner(make(levels=1))})
    calls = []
    learner["inner"].register_forward_hook(lambda *_: calls.append(1))
    loss, _ = learner["inner"](BucketBatches(data, 4, multiple=HOP, sound=False)[0])
    loss.backward()
    assert calls and all(w.grad is not None for w in learner.parameters())
    recipe = GPTRecipe(loop=TrainConfig(1), batch_size=4, model=GPTConfig(body=BODY))
    trainer = recipe.trainer(data, tmp_path)
    calls.clear()
    trainer.modules["model"].register_forward_hook(lambda *_: calls.append(1))
    trainer.fit()
    assert len(calls) == 1


def test_int16_codes_are_codes():
    model, codes = make(levels=1), torch.randint(20, (1, 1, 9))
    assert torch.equal(model(codes.short()), model(codes))


def test_penalties_reach_the_finer_levels():
    """With a huge penalty no level of a depth model repeats itself within the window."""
    rule = Sampling(0, penalty=1e4, window=6)
    model = make("depth", seed=4)
    model.depth.heads.apply(lambda m: m.bias.data.add_(8) if hasattr(m, "bias") else None)
    codes = generate(model, torch.randint(20, (1, 3, 8)), 30, rule, min_frames=30).codes[0]
    for q in range(3):
        for t in range(8, 38):
            assert codes[q, t] not in codes[q, t - 6 : t]


def test_view_draws_the_expectation():
    model, codes = make(levels=1), torch.randint(20, (1, 1, 12))
    view = NextTokenView(model, codes)
    torch.testing.assert_close(view.expected, model(codes)[0, 0].softmax(-1))
    figure = view.draw(5, layer=2)
    bars = sorted((bar.get_height() for bar in figure.axes[0].patches), reverse=True)
    np.testing.assert_allclose(bars, view.expected[5].topk(10).values, rtol=1e-5)
    assert [seen.shape for seen in view.maps] == 2 * [(2, 13, 13)]
    view.draw(12)  # the end


BAD = [
    (lambda: GPTConfig(pattern="sideways"), "pattern is 'sideways'"),
    (lambda: GPTConfig(levels=4, pattern="depth"), "belong together"),
    (lambda: GPTConfig(levels=1, pattern="depth", depth=INSIDE), "at least 2 levels"),
    (lambda: GPTConfig(CodeSpec(1, 8)), "codebook_size 1"),
    (lambda: GPTConfig(CodeSpec(20, 2), levels=3), "1 to 2 levels"),
    (lambda: GPTConfig(levels=3, input_levels=2, pattern="delay"), "input_levels"),
    (lambda: make(levels=1)(torch.randint(20, (1, 2, 5))), "codes has 2 levels; wanted exactly 1"),
    (lambda: make(levels=1)(torch.full((1, 1, 5), 20)), r"codes range from 20 to 20.*\[0, 19\]"),
    (lambda: make(levels=1)(torch.full((1, 1, 5), -1)), "codes range from -1 to -1"),
    (lambda: make(levels=1)(torch.zeros(1, 1, 5)), "codes is torch.float32.*integer tensor"),
    (lambda: make(levels=1)(torch.zeros(1, 1, 200).long()), "201 positions.*context holds 128"),
    (
        lambda: make(levels=1)(torch.zeros(1, 1, 3).long(), torch.tensor([[False, True, True]])),
        r"mask \(1, 3\) must be True from the start",
    ),
    (lambda: generate(make(levels=1), torch.zeros(1, 1, 100).long(), 60), "100 frames.*holds 128"),
    (
        lambda: generate(make("flatten"), torch.zeros(1, 3, 30).long(), 20),
        "128 positions holds 42 frames",
    ),
    (lambda: generate(make(levels=1), []), "prompts are empty"),
    (lambda: generate(make(levels=1), None, 0), "max_frames is 0"),
    (lambda: generate(make(levels=1), torch.full((1, 1, 3), 25), 5), "prompt range from 25 to 25"),
    (lambda: generate(make(levels=1), torch.zeros(1, 2, 3).long(), 5), "prompt has 2 levels"),
    (lambda: generate(make(levels=1), torch.zeros(1, 1, 3), 5), "prompt is .*integer tensor"),
    (lambda: next(stream(make(levels=1), torch.zeros(2, 1, 3).long(), 5)), "prompt has 2 rows"),
    (
        lambda: Generator(GPT(GPTConfig(CodeSpec(20, 2), input_levels=2, body=BODY)), None, 5),
        "cannot hear what it writes",
    ),
    (lambda: BucketBatches(coded_corpus([]), 4, sound=False), "corpus is empty"),
    (
        lambda: GPTRecipe(batch_size=9, model=GPTConfig()).trainer(clips(8), Path("unused")),
        "batch_size 9 exceeds the corpus's 8",
    ),
    (lambda: likelihood(make(levels=3), clips(levels=2)), r"n_q is 3.*\[1, 2\]"),
    (
        lambda: NextTokenView(make(levels=1), torch.zeros(1, 1, 5).long()).draw(2, 3),
        "layers 1 to 2",
    ),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_codes_of_another_tokenizer_are_refused():
    model, spec = make(levels=1), CodeSpec(20, 1, fingerprint=7, name="ours")
    with pytest.raises(CodeSpecError, match="codebook_size is 21, wanted 20"):
        likelihood(model, clips(size=21))
    model.config = replace(model.config, codes=spec)
    data = clips(4)
    assert likelihood(model, data).nll.shape == (4, 1)  # of unknown origin
    data.columns["codes"].about["spec"] = replace(spec, fingerprint=8, name="theirs").to_dict()
    with pytest.raises(CodeSpecError, match=r"another tokeniser \(theirs\).*fingerprint.*ours"):
        likelihood(model, data)
