"""The decoding loop: exact counts, what is given stays, rows alone, published rules, guidance."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.sampling import row_generators
from speechlab.metis import masks as M
from speechlab.metis.decoding import (
    PRESETS,
    Guidance,
    Moment,
    Rule,
    at_hidden,
    decode,
    even_counts,
    falling,
    guided,
    halton,
    keep_one,
    left_to_right,
    magnet_counts,
    warped_counts,
)
from speechlab.metis.schedules import SCHEDULES, Schedule

VOCABULARY = 11
MASK, PAD = VOCABULARY, VOCABULARY + 1


class Model:
    """Random logits that depend on every visible token of a row, and on nothing else."""

    def __init__(self, seed: int = 0, n: int = 64):
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY + 2, 16, generator=draw)
        self.table[PAD] = 0
        self.out = torch.randn(n, 16, VOCABULARY, generator=draw)

    def __call__(self, tokens):
        """(R, n) -> (R, n, V); a row at a time, so that a batch has the bits of its rows."""
        rows = []
        for row in tokens:
            near = self.table[row]
            near = near + 0.5 * F.pad(near[1:], (0, 0, 0, 1)) + 0.7 * F.pad(near[:-1], (0, 0, 1, 0))
            rows.append(torch.stack([v @ w for v, w in zip(near.tanh(), self.out)]))
        return torch.stack(rows)


COUNTS = {
    **{name: schedule.masked for name, schedule in SCHEDULES.items()},
    "own": Schedule(lambda t: t**1.7, "own").masked,
    "maskgit": keep_one(SCHEDULES["sine"].masked),
    "even": even_counts,
    "magnet": magnet_counts,
    "omnivoice": warped_counts(),
}


@given(
    st.sampled_from(sorted(COUNTS)), st.lists(st.integers(0, 90), min_size=1), st.integers(1, 40)
)
def test_counts_start_at_all_never_rise_and_end_at_none(name, counts, steps):
    left = COUNTS[name](torch.tensor(counts), steps)
    assert left.shape == (len(counts), steps + 1)
    assert left[:, 0].tolist() == counts
    assert not left[:, -1].any()
    assert (left.diff() <= 0).all()
    for row, count in zip(left, counts):  # rows do not see each other
        assert torch.equal(row, COUNTS[name](torch.tensor([count]), steps)[0])


DRAWN = st.sampled_from(
    [M.Everything(), M.Bernoulli(0.5), M.Exact(0.7), ~M.Prefix(4), M.Inpaint(0.2, 0.9),
     M.Periodic(3), M.Span(0.8, 2) | M.Suffix(2)]
)  # fmt: skip
RULES = st.builds(
    Rule,
    counts=st.sampled_from(list(COUNTS.values())),
    temperature=st.sampled_from([0.0, 0.7, falling(1.0)]),
    top_k=st.sampled_from([0, 3, 0.3]),
    top_p=st.sampled_from([1.0, 0.8]),
    score=st.sampled_from(["probability", "log_probability", "margin", "entropy", "constant"]),
    score_of=st.sampled_from(["logits", "tempered", "filtered"]),
    noise=st.sampled_from([0.0, 1.0, falling(4.5, "after")]),
    order=st.sampled_from([None, left_to_right, halton]),
)


@given(RULES, DRAWN, st.lists(st.integers(5, 20), min_size=1, max_size=3), st.integers(1, 30),
       st.integers(0, 99))  # fmt: skip
def test_any_rule_mask_length_and_number_of_steps(rule, mask, lengths, steps, seed):
    """Counts are exact per row, what is written stays, no [MASK] is left, rows alone are equal."""
    valid = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, valid.shape, generator=draw).masked_fill(~valid, PAD)
    hidden = mask(valid, draw)
    most = int(hidden.sum(1).max())
    if most == 0:
        return
    steps, shots = min(steps, most), []
    found = decode(
        at_hidden(Model()), tokens, hidden, MASK, rule, steps, seed, on_step=shots.append
    )
    left = rule.counts(hidden.sum(1), steps)
    assert torch.equal(found[~hidden], tokens[~hidden])
    assert (found[valid] < VOCABULARY).all()
    before = hidden
    for number, shot in enumerate(shots, 1):
        assert torch.equal(shot.hidden.sum(1), left[:, number])
        assert not (shot.hidden & ~before).any()
        assert torch.equal(shot.tokens[~shot.hidden], found[~shot.hidden])
        assert (shot.tokens[shot.hidden] == MASK).all()
        before = shot.hidden
    for row, length in enumerate(lengths):
        if hidden[row].any() and steps <= int(hidden[row].sum()):
            alone = decode(at_hidden(Model()), tokens[row : row + 1, :length],
                           hidden[row : row + 1, :length], MASK, rule, steps, seed,
                           first_row=row)  # fmt: skip
            assert torch.equal(alone[0], found[row, :length])


@given(st.floats(0.05, 1.0), st.integers(2, 20), st.integers(0, 99))
def test_remasking_keeps_the_counts_and_may_change_what_was_written(share, steps, seed):
    blank = torch.full((2, 24), MASK)
    shots, rule = [], Rule(score="log_probability", remask=share)
    found = decode(at_hidden(Model()), blank, blank == MASK, MASK, rule, steps, seed,
                   on_step=shots.append)  # fmt: skip
    left = rule.counts(torch.tensor([24, 24]), steps)
    for number, shot in enumerate(shots, 1):
        assert torch.equal(shot.hidden.sum(1), left[:, number])
    assert (found < VOCABULARY).all()


def test_remasking_happens():
    blank, shots = torch.full((4, 24), MASK), []
    decode(
        at_hidden(Model()), blank, blank == MASK, MASK, Rule(remask=0.5), 12, on_step=shots.append
    )
    again = [(b.hidden & ~a.hidden).any() for a, b in pairwise(shots)]
    assert any(again)


# The published rules, each as a plain loop over one row


def gumbel(u):
    return -torch.log(-torch.log(u.clamp(1e-20, 1 - 1e-7)))


def inverse(p, u):
    """The first token whose cumulative probability exceeds u."""
    total = p.double().cumsum(-1)
    return int(
        torch.searchsorted(total, torch.tensor([float(u) * float(total[-1])]).double(), right=True)
    )


def only_top(logits, k):
    kept = torch.full_like(logits, -math.inf)
    for v in logits.argsort(descending=True)[:k].tolist():
        kept[v] = logits[v]
    return kept


def nucleus(p, share):
    kept, total = torch.zeros_like(p), 0.0
    for v in p.argsort(descending=True).tolist():
        if total >= share:
            break
        kept[v] = p[v]
        total += float(p[v])
    return kept


def plain(name: str, model, n: int, steps: int, seed: int) -> list[int]:
    """The rule of a published system, for one row of n tokens, all hidden."""
    (draw,) = row_generators(seed, 1)
    u = torch.rand(n, steps, 2, generator=draw)
    x, hidden = torch.full((n,), MASK), list(range(n))
    for j in range(steps):
        logits = model(x.unsqueeze(0))[0]
        score, last = {}, j == steps - 1
        for i in hidden:
            p, g = logits[i].softmax(-1), gumbel(u[i, j, 1])
            if name in ("maskgit", "vampnet"):
                x[i] = inverse(p, u[i, j, 0])
                weight = 4.5 if name == "maskgit" else 1.0
                score[i] = p[x[i]].log() + weight * (1 - (j + 1) / steps) * g
            elif name == "soundstorm":
                x[i] = inverse(p, u[i, j, 0])
                score[i] = p[x[i]]
            elif name in ("metis", "maskgct"):
                t, top = 1 - j / steps, only_top(logits[i], math.ceil(0.02 * VOCABULARY))
                warmth = 0.2 if steps == 1 else 0.9 * t
                x[i] = (
                    top.argmax()
                    if last and steps > 1
                    else inverse((top / warmth).softmax(-1), u[i, j, 0])
                )
                score[i] = top.softmax(-1)[x[i]] + t * g
            elif name == "magnet":
                p = (logits[i] / max(3.0 * (steps - 1 - j) / steps, 1e-2)).softmax(-1)
                x[i] = inverse(nucleus(p, 0.9), u[i, j, 0])
                score[i] = p[x[i]]
            elif name == "llada":
                x[i] = p.argmax()
                score[i] = p[x[i]]
            elif name == "omnivoice":
                x[i] = p.argmax()
                score[i] = p.log().max() / 5.0 + g
        many = len(hidden)
        if name in ("maskgit", "vampnet"):
            again = max(1, min(many - 1, int(n * math.cos(math.pi / 2 * (j + 1) / steps) + 1e-9)))
        elif name in ("soundstorm", "metis", "maskgct"):
            again = int(n * math.sin(math.pi / 2 * (1 - (j + 1) / steps)) + 1e-9)
        elif name == "llada":
            again = many - (n // steps + (j < n % steps))
        elif name == "omnivoice":
            t = torch.linspace(0, 1, steps + 2)
            t = (0.1 * t / (1 - 0.9 * t)).tolist()
            again = many - min(math.ceil(n * (t[j + 1] - t[j])), many)
        if name == "magnet":  # spans of three, aligned
            spans = sorted({i // 3 for i in hidden})
            sure = {s: max(score[i] for i in hidden if i // 3 == s) for s in spans}
            total = -(-n // 3)
            keep = (
                0
                if last
                else max(int(total * math.cos(math.pi / 2 * (j + 1) / (steps - 1)) + 1e-9), 1)
            )
            again_spans = sorted(spans, key=lambda s: sure[s])[:keep]
            hidden = [i for i in hidden if i // 3 in again_spans]
        else:
            hidden = [] if last else sorted(sorted(hidden, key=lambda i: score[i])[:again])
        x[hidden] = MASK
    return x.tolist()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_presets_are_the_published_rules(name, steps):
    for seed, n in ((0, 9), (1, 30), (2, 30), (3, 16)):
        model, blank = Model(seed), torch.full((1, n), MASK)
        if name == "magnet" and steps > -(-n // 3):
            continue
        found = decode(at_hidden(model), blank, blank == MASK, MASK, PRESETS[name], steps, seed)
        assert found[0].tolist() == plain(name, model, n, steps, seed)


def test_a_wrong_preset_fails_that_test():
    model, blank = Model(0), torch.full((1, 30), MASK)
    wrong = Rule(PRESETS["maskgit"].counts, score="probability", noise=falling(4.5, "after"))
    found = decode(at_hidden(model), blank, blank == MASK, MASK, wrong, 9, 0)
    assert found[0].tolist() != plain("maskgit", model, 30, 9, 0)


# What it computes


def exact_model():
    """Masked conditionals of a random distribution over 3^4 words, by enumeration; float64."""
    words = torch.cartesian_prod(*[torch.arange(3)] * 4)
    truth = torch.rand(81, generator=torch.Generator().manual_seed(3), dtype=torch.float64).pow(4)
    truth /= truth.sum()

    def model(tokens):
        fits = ((tokens.unsqueeze(1) == words) | (tokens.unsqueeze(1) == 3)).all(-1)  # (R, 81)
        share = fits.double() * truth
        seen = F.one_hot(words, 3).double()  # (81, 4, 3)
        return (torch.einsum("rw,wnv->rnv", share, seen) / share.sum(1)[:, None, None]).log()

    return words, truth, model


def variation(found, words, truth):
    index = (found * 3 ** torch.arange(3, -1, -1)).sum(1)
    return float((torch.bincount(index, minlength=81) / len(found) - truth).abs().sum() / 2)


@pytest.mark.parametrize("rule", [Rule(even_counts, score="constant", noise=1.0),
                                  Rule(even_counts, order=left_to_right),
                                  Rule(even_counts, order=halton),
                                  Rule(even_counts, score="entropy"),
                                  Rule(even_counts, score="margin")])  # fmt: skip
def test_one_token_a_step_is_exact_and_one_step_is_not(rule):
    words, truth, model = exact_model()
    blank = torch.full((20_000, 4), 3)
    draw = torch.Generator().manual_seed(0)
    floor = variation(words[torch.multinomial(truth, 20_000, True, generator=draw)], words, truth)
    errors = [variation(decode(at_hidden(model), blank, blank == 3, 3, rule, s), words, truth)
              for s in (1, 4)]  # fmt: skip
    assert errors[1] < 1.7 * floor < errors[0] / 3


def test_keeping_likely_tokens_distorts_the_distribution():
    words, truth, model = exact_model()
    blank = torch.full((20_000, 4), 3)
    found = decode(at_hidden(model), blank, blank == 3, 3, Rule(even_counts), 4)
    assert variation(found, words, truth) > 0.1


def test_threshold_ends_early_and_at_zero_is_one_step():
    asked = []
    model = Model()

    def counting(query):
        asked.append(len(query.where))
        return at_hidden(model)(query)

    blank = torch.full((3, 20), MASK)
    decode(counting, blank, blank == MASK, MASK, Rule(threshold=0.0), 10)
    assert len(asked) == 1
    asked.clear()
    some = decode(counting, blank, blank == MASK, MASK, Rule(threshold=0.5), 10)
    assert sum(asked) < sum(Rule().counts(torch.tensor([20]), 10)[0, :-1].tolist()) * 3
    assert (some < VOCABULARY).all()


def test_only_hidden_places_of_unfinished_rows_are_asked_for():
    seen, blank = [], torch.full((2, 20), MASK)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0], mask[1, :3] = True, True
    model = Model()

    def tokens_to_logits(asked):
        seen.append((asked.rows.tolist(), len(asked.where)))
        return at_hidden(model)(asked)

    decode(tokens_to_logits, blank.clamp(max=5), mask, MASK, Rule(), 8)
    left = Rule().counts(torch.tensor([20, 3]), 8)
    assert [n for _, n in seen] == left[:, :-1].sum(0).tolist()
    assert [rows for rows, _ in seen] == [[r for r in (0, 1) if left[r, j]] for j in range(8)]


def test_the_mask_token_is_never_drawn():
    def model(tokens):
        return torch.zeros(*tokens.shape, VOCABULARY + 1).index_fill(-1, torch.tensor([MASK]), 9.0)

    blank = torch.full((2, 12), MASK)
    assert (decode(at_hidden(model), blank, blank == MASK, MASK, Rule(), 3) < VOCABULARY).all()


def test_bias_moves_the_order():
    """OmniVoice's penalty: coarse levels first."""
    blank, shots = torch.full((1, 20), MASK), []
    level = torch.arange(20) // 5
    decode(at_hidden(Model()), blank, blank == MASK, MASK, Rule(even_counts, noise=1.0), 4,
           bias=-1000.0 * level, on_step=shots.append)  # fmt: skip
    for number, shot in enumerate(shots, 1):
        assert shot.hidden[0].tolist() == (level >= number).tolist()


# Guidance


def pair_model(tokens, rows, conditional):
    """Logits of two models, by flag."""
    one, other = Model(1)(tokens), Model(2)(tokens)
    return torch.where(conditional[:, None, None], one, other)


@pytest.mark.parametrize("name", PRESETS)
def test_no_guidance_is_the_conditional_model(name):
    blank = torch.full((2, 18), MASK)
    found = decode(
        guided(pair_model, Guidance(0.0, 0.75)), blank, blank == MASK, MASK, PRESETS[name], 5
    )
    wanted = decode(at_hidden(Model(1)), blank, blank == MASK, MASK, PRESETS[name], 5)
    assert torch.equal(found, wanted)


@given(st.floats(0.1, 5), st.floats(0, 1), st.sampled_from(["logits", "log_probability"]))
def test_guidance_of_a_row_is_its_own(scale, rescale, space):
    guidance = Guidance(scale, rescale, space)
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 8, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    lengths = (8, 5, 6)
    valid = torch.arange(8) < torch.tensor(lengths)[:, None]
    together = guidance.combine(one, other, scale, valid)
    for row, length in enumerate(lengths):
        a, b = one[row : row + 1, :length], other[row : row + 1, :length]
        alone = guidance.combine(a, b, scale)
        assert torch.allclose(together[row, :length], alone[0], atol=1e-9)
        if space == "logits":  # the published formula, by hand
            mixed = a + scale * (a - b)
            wanted = rescale * mixed * (a.std() / mixed.std()) + (1 - rescale) * mixed
            assert torch.allclose(alone, wanted)


def test_guidance_uses_one_forward_and_only_in_its_interval():
    sizes = []

    def model(tokens, rows, conditional):
        sizes.append(len(tokens))
        return pair_model(tokens, rows, conditional)

    blank = torch.full((2, 18), MASK)
    decode(guided(model, Guidance(2.0, interval=(0.5, 1.0))), blank, blank == MASK, MASK, Rule(), 4)
    assert sizes == [4, 4, 4, 2]  # times 1, .75, .5, .25
    annealed = Guidance(lambda moment: 10 * moment.before + 1 - moment.before)
    assert [annealed.at(Moment(j, 2)) for j in range(2)] == [10, 5.5]


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(2, 9, dtype=torch.bool)}, "mask hides nothing"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10}, "at most 9 tokens of a row"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, "shaped as tokens"),
        ({"tokens": torch.zeros(2, 9)}, "whole numbers"),
        ({"tokens_to_logits": lambda asked: torch.zeros(3, 4)}, r"\(18, V\) is wanted"),
        ({"rule": Rule(lambda n, s: n.unsqueeze(-1).expand(-1, s + 1))}, "end at 0"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "tokens_to_logits": at_hidden(Model()),
        "tokens": torch.full((2, 9), MASK),
        "mask": torch.ones(2, 9, dtype=torch.bool),
        "mask_id": MASK,
        "rule": Rule(),
        "steps": 3,
    }
    with pytest.raises(ValueError, match=message):
        decode(**(arguments | change))
    with pytest.raises(ValueError, match="interval is"):
        Guidance(interval=(0.9, 0.1))
    with pytest.raises(ValueError, match="rescale is 2"):
        Guidance(rescale=2)


# Masks


@given(DRAWN, st.lists(st.integers(3, 20), min_size=1, max_size=4), st.integers(0, 99))
def test_masks_stay_inside_and_deterministic_ones_ignore_the_neighbours(mask, lengths, seed):
    valid = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    found = mask(valid, torch.Generator().manual_seed(seed))
    assert not (found & ~valid).any()
    assert torch.equal(found, mask(valid, torch.Generator().manual_seed(seed)))
    assert torch.equal((~mask)(valid, torch.Generator().manual_seed(seed)), valid & ~found)
    if not isinstance(mask, (M.Bernoulli, M.Exact)) and "Span" not in repr(mask):
        for row, length in enumerate(lengths):
            assert torch.equal(found[row, :length], mask(valid[row : row + 1, :length])[0])


def test_masks_hide_what_they_say():
    valid = torch.ones(2, 3, 10, dtype=torch.bool)
    valid[1, :, 6:] = False
    assert (~M.Prefix(4))(valid)[0, 0].tolist() == [False] * 4 + [True] * 6
    assert M.Suffix(0.5)(valid)[1, 2].tolist() == [False] * 3 + [True] * 3 + [False] * 4
    assert M.Periodic(2)(valid)[0, 0].tolist() == [False, True] * 5
    assert M.Inpaint(0.5, 1.0)(valid).sum(-1).tolist() == [[5] * 3, [3] * 3]
    assert M.Levels([0, 2])(valid)[0].any(-1).tolist() == [True, False, True]
    exact = M.Exact(0.5)(valid, torch.Generator().manual_seed(0))
    assert exact.flatten(1).sum(1).tolist() == [15, 9]
    both = M.Levels([1]) & ~M.Prefix(2)
    assert both(valid).sum().item() == 8 + 4
    spans = M.Span(0.5, 3)(torch.ones(1, 300, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert (spans.view(100, 3).sum(1) % 3 == 0).all()
    assert 30 < int(spans.view(100, 3)[:, 0].sum()) < 70
    with pytest.raises(ValueError, match=r"levels \[3\]"):
        M.Levels([3])(valid)
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        M.Exact(1.5)
    with pytest.raises(ValueError, match="bool"):
        M.Prefix(2)(torch.ones(2, 5))
