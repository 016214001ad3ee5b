"""Sampling against plain loops, and its independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.sampling import (
    Sampler,
    Sampling,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repeats,
)

rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30)


@given(rows, st.integers(1, 40))
def test_top_k_by_sorting(row, k):
    kept = keep_top_k(torch.tensor([row]), k)[0].isfinite()
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert set(kept.nonzero().flatten().tolist()) == set(order[:k])


@given(rows, st.floats(0.01, 1.0))
def test_top_p_by_loop(row, p):
    logits = torch.tensor([row])
    share = logits.softmax(-1)[0].tolist()
    kept = keep_top_p(logits, p)[0].isfinite()
    total, order = 0.0, sorted(range(len(row)), key=lambda i: (-row[i], i))
    for index in order:
        if abs(total - p) < 1e-5:  # on the edge rounding decides
            return
        assert bool(kept[index]) == (total < p)
        total += share[index]


@given(rows, st.floats(0.0, 1.0))
def test_min_p_by_loop(row, p):
    logits = torch.tensor([row])
    kept, share = keep_min_p(logits, p)[0].isfinite(), logits.double().softmax(-1)[0]
    for index, value in enumerate(share.tolist()):
        if abs(value - p * float(share.max())) > 1e-6:
            assert bool(kept[index]) == (value > p * float(share.max()))
    assert kept.any()


def test_filters_do_not_change_their_input_and_keep_the_rest_in_proportion():
    logits = torch.randn(4, 20)
    before = logits.clone()
    for cut in (keep_top_k(logits, 5), keep_top_p(logits, 0.5), keep_min_p(logits, 0.3)):
        kept = cut.isfinite()
        assert torch.equal(cut[kept], logits[kept]) and not kept.all()
    assert torch.equal(logits, before)


def test_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, history = torch.randn(3, 12), torch.randint(12, (3, 5))
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone())
    torch.testing.assert_close(penalise_repeats(logits, history, 1.7), wanted)
    nothing = torch.full((3, 5), -1)
    assert torch.equal(penalise_repeats(logits, nothing, 1.7), logits)


@given(rows, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_sum(row, uniform):
    p = torch.tensor(row, dtype=torch.float64).softmax(-1).tolist()
    token, total = int(draw(torch.tensor([row]), torch.tensor([uniform]))[0]), sum(p)
    before = sum(p[:token])
    assert before - 1e-6 <= uniform * total <= before + p[token] + 1e-6
    assert p[token] > 0


def test_draw_never_takes_the_impossible():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for uniform in (0.0, 0.25, 0.499999, 0.5, 0.75, 1 - 2**-24):
        assert int(draw(logits, torch.tensor([uniform]))[0]) in (1, 3)


def test_shares_are_the_probabilities():
    logits = 2 * torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    sampler, counts = Sampler(seed=3, batch=1), torch.zeros(8)
    for _ in range(4000):
        counts[int(sampler(logits)[0])] += 1
    chi = ((counts - 4000 * logits.softmax(-1)[0]) ** 2 / (4000 * logits.softmax(-1)[0])).sum()
    assert chi < 24.3  # 99.9 % of the chi-squared distribution with 7 degrees of freedom


RULES = [
    Sampling(),
    Sampling(0.7, top_k=5),
    Sampling(top_p=0.6, min_p=0.05),
    Sampling(penalty=1.5, window=4),
    Sampling(top_p=0.5, repeat_ratio=0.2, window=5),
    Sampling(0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_batch_draws_what_its_rows_draw_alone(rule):
    torch.manual_seed(0)
    logits, histories = torch.randn(6, 3, 9), [torch.full((3, 6), -1)]
    together = Sampler(rule, 5, 3)
    alone = [Sampler(rule, 5, 1, first_row=i) for i in range(3)]
    for step in range(6):
        history = histories[-1]
        tokens = together(logits[step], history)
        each = [alone[i](logits[step, i : i + 1], history[i : i + 1])[0] for i in range(3)]
        assert tokens.tolist() == [int(token) for token in each]
        histories.append(torch.cat([history[:, 1:], tokens[:, None]], dim=1))


def test_no_two_seeds_share_a_stream():
    """Rows of neighbouring seeds draw different numbers."""
    logits = torch.zeros(3, 1000)
    drawn = torch.cat([Sampler(Sampling(), seed, 3)(logits) for seed in range(20)])
    assert len(drawn.unique()) > 50  # of 60; equal streams would give 22


def test_leaving_rows_do_not_move_the_others():
    logits = torch.randn(5, 3, 9)
    whole, part = Sampler(seed=1, batch=3), Sampler(seed=1, batch=3)
    wanted = [whole(step)[2] for step in logits]
    found = [part(step)[2] for step in logits[:2]]
    part.select(torch.tensor([False, False, True]))
    found += [part(step[2:])[0] for step in logits[2:]]
    assert found == wanted


def test_repetition_aware_redraws_from_everything():
    """The nucleus is token 0 alone; once it fills the window, others can be drawn."""
    logits = torch.tensor([[3.0] + [0.0] * 9])
    rule = Sampling(top_p=0.5, repeat_ratio=0.1, window=10)
    fresh, full = torch.full((1, 10), 5), torch.zeros(1, 10, dtype=torch.long)
    assert all(int(Sampler(rule, s)(logits, fresh)[0]) == 0 for s in range(50))
    drawn = [int(Sampler(rule, s)(logits, full)[0]) for s in range(200)]
    share = sum(token != 0 for token in drawn) / 200
    wanted = 1 - float(logits.softmax(-1)[0, 0])
    assert abs(share - wanted) < 0.12
    assert Sampling.valle2() == Sampling(top_k=25, top_p=0.8, window=10, repeat_ratio=0.1)


def test_temperature():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    found = Sampling(0.5).filtered(logits).softmax(-1)
    torch.testing.assert_close(found, (logits / 0.5).softmax(-1))
    assert int(Sampler(Sampling(1e-40))(logits)[0]) == 2
    assert int(Sampler(Sampling(0))(logits)[0]) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Sampling(-0.1), "temperature is -0.1"),
        (lambda: Sampling(float("nan")), "temperature is nan"),
        (lambda: Sampling(top_k=-1), "top_k is -1"),
        (lambda: Sampling(top_p=1.2), "top_p is 1.2"),
        (lambda: Sampling(min_p=-1), "min_p is -1"),
        (lambda: Sampling(penalty=0), "penalty is 0"),
        (lambda: Sampling(repeat_ratio=2), "repeat_ratio is 2"),
        (lambda: keep_top_k(torch.zeros(1, 3), 0), "top_k is 0"),
        (lambda: Sampler()(torch.tensor([[math.nan, 1.0]])), "logits hold NaN"),
        (lambda: Sampler()(torch.full((1, 3), -math.inf)), "row of -inf"),
        (lambda: Sampler(Sampling(0))(torch.tensor([[math.inf, 1.0]])), r"\+inf"),
        (lambda: Sampler(batch=2)(torch.zeros(1, 3)), "1 rows, the sampler 2"),
        (lambda: Sampler()(torch.zeros(3)), r"\(B, V\)"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
