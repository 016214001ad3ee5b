"""Masked generation: schedules, times, masks, Eq. 1 and the bound, against enumeration."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.metis.schedules import (
    SCHEDULES,
    Schedule,
    hide,
    likelihood_bound,
    masked_nll,
    sample_times,
)

each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@each
def test_ends_and_inverse(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    share = schedule(t)
    assert float(share[0]) == 0
    assert float(share[-1]) == pytest.approx(1)
    assert (share.diff() > 0).all()
    torch.testing.assert_close(schedule.inverse(share), t, atol=1e-7, rtol=0)  # flat at an end


@each
def test_slope_is_the_difference_quotient(schedule):
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    step = 1e-6
    wanted = (schedule(t + step) - schedule(t - step)) / (2 * step)
    torch.testing.assert_close(schedule.slope(t), wanted, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(schedule.weight(t), wanted / schedule(t), rtol=1e-5, atol=1e-8)
    with torch.no_grad():  # in evaluation, too
        torch.testing.assert_close(schedule.slope(t), wanted, rtol=1e-5, atol=1e-8)


@given(
    name=st.sampled_from(sorted(SCHEDULES)), counts=st.lists(st.integers(0, 3000), min_size=1),
    steps=st.integers(1, 70),
)  # fmt: skip
def test_counts_are_the_floors(name, counts, steps):
    schedule = SCHEDULES[name]
    found = schedule.masked(torch.tensor(counts), steps)
    assert found.shape == (len(counts), steps + 1)
    for n, row in zip(counts, found.tolist()):
        assert row[0] == n
        assert row[-1] == 0
        assert row == sorted(row, reverse=True)
        for j in range(1, steps):
            exact = n * float(schedule(torch.tensor(1 - j / steps, dtype=torch.float64)))
            assert row[j] == math.floor(exact + 1e-9)
        assert schedule.masked(n, steps).tolist() == row  # a row alone


def test_any_callable_is_a_schedule():
    own = Schedule(lambda t: t**3, "cube")
    assert own.masked(8, 2).tolist() == [8, 1, 0]
    assert float(own.weight(torch.tensor([0.5], dtype=torch.float64))) == pytest.approx(6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Schedule(lambda t: 1 - t), "must be 0 and 1"),
        (lambda: Schedule(lambda t: t / t), "must be 0 and 1"),
        (lambda: Schedule(lambda t: t + 0.2 * torch.sin(2 * torch.pi * t)), "never fall"),
        (lambda: Schedule(lambda t: 1.0), "501"),
        (lambda: SCHEDULES["sine"].masked(5, 0), "steps is 0"),
        (lambda: SCHEDULES["sine"].masked(-5, 2), "count"),
        (lambda: SCHEDULES["sine"].masked(torch.tensor([1.5]), 2), "count"),
        (lambda: sample_times(0), "count is 0"),
        (lambda: hide(torch.zeros(2, 3, dtype=torch.bool), torch.ones(2)), "valid"),
        (lambda: hide(torch.ones(2, 3), torch.ones(2)), "valid"),
        (lambda: hide(torch.ones(2, 3, dtype=torch.bool), torch.ones(3)), "share"),
        (lambda: masked_nll(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3)), "logits are"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@given(st.integers(1, 64), st.integers(0, 10**6))
def test_spread_times_hit_every_slot_once(count, seed):
    t = sample_times(count, torch.Generator().manual_seed(seed))
    slots = (t.double() * count - float(t.min()) * count).round().long() % count
    assert sorted(slots.tolist()) == list(range(count))


def test_each_time_is_uniform():
    generator = torch.Generator().manual_seed(0)
    for spread in (True, False):
        t = torch.stack([sample_times(4, generator, spread) for _ in range(20_000)])
        for row in t.T:
            shares = torch.histc(row, 10, 0, 1) / len(row)
            assert (shares - 0.1).abs().max() < 0.012


def test_masks_hide_valid_tokens_at_the_asked_rate():
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(12) < torch.tensor([[12], [5]]).repeat(20_000, 1)
    share = torch.tensor([0.4, 0.1]).repeat(20_000)
    mask = hide(valid, share, generator)
    assert not (mask & ~valid).any()
    assert mask.any(dim=1).all()
    for row, n, p in ((0, 12, 0.4), (1, 5, 0.1)):
        wanted = p + (1 - p) ** n / n  # rows that would hide none hide one
        assert float(mask[row::2, :n].float().mean()) == pytest.approx(wanted, abs=0.006)
    floored = hide(valid, share, generator, least=0.5)
    assert float(floored[1::2, :5].float().mean()) == pytest.approx(0.5 + 0.5**5 / 5, abs=0.006)


# Eq. 1 and the bound, on everything there is

N, SIZE = 3, 3


def probabilities(seed: int) -> torch.Tensor:
    """A distribution over all sequences of N tokens, (SIZE,) * N, float64."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand((SIZE,) * N, generator=generator, dtype=torch.float64) ** 4 + 1e-3
    return p / p.sum()


def conditionals(joint: torch.Tensor, tokens: tuple, hidden: tuple) -> torch.Tensor:
    """log p(each token | the visible ones), (N, SIZE), by sums over the joint."""
    seen = joint[tuple(slice(None) if h else slice(t, t + 1) for t, h in zip(tokens, hidden))]
    rows = []
    for place in range(N):
        others = tuple(i for i in range(N) if i != place)
        row = seen.sum(dim=others)
        rows.append(row / row.sum() if hidden[place] else torch.ones(SIZE, dtype=torch.float64))
    return torch.stack(rows).log()


def patterns() -> list[tuple]:
    return [mask for mask in product([False, True], repeat=N) if any(mask)]


@each
def test_eq_1_is_its_expectation_by_enumeration(schedule):
    """Every mask's probability is integrated over t; then the same with t and masks drawn."""
    joint, tokens = probabilities(0), (2, 0, 1)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    wanted, masks, logits = 0.0, [], []
    for mask in patterns():
        table = conditionals(joint, tokens, mask)
        k, share = sum(mask), schedule(t)
        chance = float((share**k * (1 - share) ** (N - k)).mean())
        wanted -= chance * sum(float(table[i, tokens[i]]) for i in range(N) if mask[i])
        masks.append(mask), logits.append(table)
    rows = torch.tensor(masks)
    nll = masked_nll(torch.stack(logits), torch.tensor([tokens] * len(rows)), rows)
    k = rows.sum(dim=1)
    chances = schedule(t)[:, None] ** k * (1 - schedule(t)[:, None]) ** (N - k)
    assert float((chances * nll).sum(dim=1).mean()) == pytest.approx(wanted, rel=1e-9)
    drawn = torch.Generator().manual_seed(1)
    times = sample_times(100_000, drawn).double()
    hidden = torch.rand(100_000, N, generator=drawn) < schedule(times)[:, None]
    place = {mask: row for row, mask in enumerate(masks)}
    found = [float(nll[place[m]]) if any(m) else 0.0 for m in map(tuple, hidden.tolist())]
    assert sum(found) / len(found) == pytest.approx(wanted, rel=0.02)


def integrated(schedule, nll_of) -> float:
    """The bound by quadrature in u = gamma(t), so that the singular end is met from inside."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    t, total = schedule.inverse(u), 0.0
    for mask in patterns():
        k = sum(mask)
        chance = schedule(t) ** k * (1 - schedule(t)) ** (N - k)
        row = torch.full_like(t, nll_of(mask))
        weighted = likelihood_bound(row, t, schedule) / schedule.slope(t)  # dt = du / gamma'
        total += float((chance * weighted).mean())
    return total


@each
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_bounds_and_is_tight_for_one_distribution(schedule, seed):
    """The conditionals of one joint: equal to -log p. Of a mixture of models: above it."""
    joint = probabilities(seed)
    for tokens in ((0, 1, 2), (2, 2, 0)):
        def nll(mask, tables=(joint,), tokens=tokens):
            chosen = tables[sum(mask) % len(tables)]  # another model for another count
            table = conditionals(chosen, tokens, mask)
            return -sum(float(table[i, tokens[i]]) for i in range(N) if mask[i])

        exact = -math.log(float(joint[tokens]))
        assert integrated(schedule, nll) == pytest.approx(exact, rel=1e-4)
        both = (joint, probabilities(seed + 50))
        mixed = integrated(schedule, lambda mask, nll=nll, both=both: nll(mask, both))
        orders = []  # the any-order chain rule of the inconsistent model
        for order in permutations(range(N)):
            hidden, total = [True] * N, 0.0
            for place in order:
                table = conditionals(both[sum(hidden) % 2], tokens, tuple(hidden))
                total -= float(table[place, tokens[place]])
                hidden[place] = False
            orders.append(total)
        assert mixed == pytest.approx(sum(orders) / len(orders), rel=1e-4)
        average = -math.log(sum(math.exp(-x) for x in orders) / len(orders))
        assert mixed >= average - 1e-6  # Jensen: a bound on -log of the average order's p
