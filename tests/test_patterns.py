"""Patterns: complete, invertible, and honest about what is seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.lm.patterns import (
    PATTERNS,
    Pattern,
    build,
    frame_table,
    make_pattern,
    plot_pattern,
    revert,
)

BUILDABLE = ("parallel", "delay", "partial delay", "flatten", "depth")
sizes = {"levels": st.integers(1, 9), "frames": st.integers(1, 20)}


@pytest.mark.parametrize("name", BUILDABLE)
@given(**sizes)
def test_revert_undoes_build(name, levels, frames):
    codes = torch.randint(50, (2, levels, frames))
    laid = build(codes, name, 99)
    assert laid.shape[2] == len(make_pattern(name, levels, frames))
    assert torch.equal(revert(laid, name, frames), codes)
    assert sorted(laid[laid != 99].tolist()) == sorted(codes.flatten().tolist())


@pytest.mark.parametrize("name", PATTERNS)
@given(**sizes)
def test_pick_up_undoes_lay_out(name, levels, frames):
    pattern, codes = make_pattern(name, levels, frames), torch.randint(50, (2, levels, frames))
    laid, real = pattern.lay_out(codes, 99)
    assert laid.shape[1] == len(pattern) and real.shape == laid.shape[1:]
    assert torch.equal(pattern.pick_up(laid), codes)
    assert (laid[:, ~real] == 99).all() and int(real.sum()) == levels * frames
    for step, places in enumerate(pattern.steps):
        wanted = [int(codes[0, q, t]) for t, q in places]
        assert laid[0, step, : len(places)].tolist() == wanted


def test_tables_kept_in_inference_mode_serve_in_training():
    with torch.inference_mode():
        build(torch.zeros(1, 5, 37).long(), "delay", 9)
        revert(torch.zeros(1, 5, 41, 3), "delay", 37)
    x = torch.zeros(1, 5, 41, 3, requires_grad=True)
    revert(x, "delay", 37).sum().backward()
    assert x.grad.sum() == 5 * 37 * 3


@pytest.mark.parametrize("name", BUILDABLE)
def test_revert_takes_logits(name):
    codes = torch.randint(50, (2, 3, 7))
    laid = build(codes, name, 50)
    found = revert(torch.nn.functional.one_hot(laid, 51), name, 7)
    assert torch.equal(found.argmax(-1), codes)


@pytest.mark.parametrize("name", PATTERNS)
@given(**sizes)
def test_steps_are_as_many_as_published(name, levels, frames):
    steps = {
        "flatten": levels * frames, "parallel": frames, "depth": frames,
        "delay": frames + levels - 1, "partial delay": frames + (levels > 1),
        "coarse first": frames + levels - 1, "grouped": -(-frames // 2),
    }  # fmt: skip
    pattern = make_pattern(name, levels, frames)
    assert len(pattern) == steps[name]
    assert pattern.passes == steps[name] + ((levels - 1) * frames if name == "depth" else 0)


@pytest.mark.parametrize("name", PATTERNS)
@given(data=st.data(), **sizes)
def test_nobody_sees_what_is_written_later(name, levels, frames, data):
    """Visibility is a strict order: not oneself, never mutual, and complete for flatten."""
    pattern = make_pattern(name, levels, frames)
    place = [data.draw(st.tuples(st.integers(0, frames - 1), st.integers(0, levels - 1)))
             for _ in range(2)]  # fmt: skip
    (t, q), (t2, q2) = place
    one, two = pattern.visible(t, q), pattern.visible(t2, q2)
    assert not one[q, t]
    assert not (one[q2, t2] and two[q, t])
    if name in ("flatten", "depth") and place[0] != place[1]:
        assert one[q2, t2] or two[q, t]
        assert bool(one[q2, t2]) == ((t2, q2) < (t, q))


def test_delay_by_hand():
    codes = torch.arange(6).view(1, 2, 3)
    assert build(codes, "delay", -1)[0].tolist() == [[0, 1, 2, -1], [-1, 3, 4, 5]]
    assert build(codes, "flatten", -1)[0].tolist() == [
        [0, -1, 1, -1, 2, -1], [-1, 3, -1, 4, -1, 5],
    ]  # fmt: skip
    assert frame_table("delay", 2, 3).tolist() == [[0, -1], [1, 0], [2, 1], [-1, 2]]


def test_plot_says_what_is_seen():
    ax = plot_pattern(make_pattern("delay", 3, 4), (2, 1))
    image = ax.images[0].get_array()
    assert image[1, 2] == 1.0 and image[0, 2] > 0 and image[2, 0] > 0
    assert image[0, 3] == image[2, 1] == 0  # written in the same step


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_pattern("zigzag", 2, 3), "pattern is 'zigzag'"),
        (lambda: make_pattern("delay", 0, 3), "levels 0"),
        (lambda: build(torch.zeros(1, 2, 3), "delay", 9), "integer tensor"),
        (lambda: build(torch.zeros(1, 2, 0).long(), "delay", 9), "no dimension may be empty"),
        (lambda: build(torch.zeros(1, 2, 3).long(), "coarse first", 9), "several frames"),
        (lambda: revert(torch.zeros(1, 2, 3).long(), "delay", 3), "3 steps; 3 frames need 4"),
        (lambda: Pattern("half", 1, 2, (((0, 0),),)), "must occur once"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
