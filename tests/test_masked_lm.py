"""Metis' first stage: the model against loops, its loss, writing, Amphion's layout and defects."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.contracts import CodeSpec, mask_of
from speechlab.foundations.models import ModelError
from speechlab.foundations.sampling import row_generators
from speechlab.foundations.transformer import TransformerConfig
from speechlab.metis.amphion import from_amphion
from speechlab.metis.decoding import PRESETS, Asked, Guidance, Moment
from speechlab.metis.masked_lm import (
    MaskedLM,
    MaskedLMConfig,
    Masking,
    _Behind,
    filled_in,
    go_on,
    masked_lm_loss,
    time_features,
    write,
)
from speechlab.metis.schedules import SCHEDULES

VOCABULARY = 60
BODY = TransformerConfig(16, 2, 2, ffn_dim=24, epsilon=1e-6, condition_dim=16,
                         condition_shift=False, context=128)  # fmt: skip
CONFIG = MaskedLMConfig(CodeSpec(VOCABULARY, 1), BODY)


def loud(model, seed: int = 0):
    """Random weights large enough that everything matters; float64."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.4)
    return model.double().eval()


def amphion_state(layers: int = 2, dim: int = 16, wide: int = 24, seed: int = 0) -> dict:
    """Random tensors in the layout of a Metis base checkpoint, float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"mask_emb.weight": (1, dim), "cond_emb.weight": (VOCABULARY, dim),
              "to_logit.weight": (VOCABULARY, dim), "to_logit.bias": (VOCABULARY,),
              "diff_estimator.diff_step_mlp.0.weight": (4 * dim, dim),
              "diff_estimator.diff_step_mlp.0.bias": (4 * dim,),
              "diff_estimator.diff_step_mlp.2.weight": (dim, 4 * dim),
              "diff_estimator.diff_step_mlp.2.bias": (dim,)}  # fmt: skip
    norms = ["diff_estimator.norm"]
    for i in range(layers):
        name = f"diff_estimator.layers.{i}"
        norms += [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (dim, dim) for p in "qkvo"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (wide, dim) for p in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (dim, wide)
    for name in norms:
        shapes |= {f"{name}.to_weight.weight": (dim, dim), f"{name}.to_weight.bias": (dim,)}
    return {n: torch.randn(s, generator=draw).double() * 0.4 for n, s in shapes.items()}


def reference_hidden(state: dict, embedded, t: float, heads: int = 2):
    """(n, dim) embeddings to (n, dim), as Amphion's code computes it, in plain loops."""
    dim, n = embedded.shape[1], len(embedded)

    def linear(x, name, bias=True):
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if bias else y

    half = dim // 2
    rates = [math.exp(-k * math.log(10000) / (half - 1)) for k in range(half)]
    angles = [t * r for r in rates]
    clock = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)]).double()
    clock = linear(F.silu(linear(clock, "diff_estimator.diff_step_mlp.0")),
                   "diff_estimator.diff_step_mlp.2")  # fmt: skip

    def norm(x, name):
        scaled = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return linear(clock, f"{name}.to_weight") * scaled

    def turned(x, size):  # (n, size): rotate-half
        out = x.clone()
        for place in range(n):
            for k in range(size // 2):
                angle = place / 10000 ** (2 * k / size)
                a, b = x[place, k], x[place, k + size // 2]
                out[place, k] = a * math.cos(angle) - b * math.sin(angle)
                out[place, k + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x, index = embedded, 0
    while f"diff_estimator.layers.{index}.self_attn.q_proj.weight" in state:
        name, size = f"diff_estimator.layers.{index}", dim // heads
        y, parts = norm(x, f"{name}.input_layernorm"), []
        for h in range(heads):
            cut = slice(h * size, (h + 1) * size)
            q, k, v = (linear(y, f"{name}.self_attn.{p}_proj", False)[:, cut] for p in "qkv")
            weights = (turned(q, size) @ turned(k, size).T / math.sqrt(size)).softmax(-1)
            parts.append(weights @ v)
        x = x + linear(torch.cat(parts, 1), f"{name}.self_attn.o_proj", False)
        y = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (linear(y, f"{name}.mlp.{p}_proj", False) for p in ("gate", "up"))
        x = x + linear(F.silu(gate) * up, f"{name}.mlp.down_proj", False)
        index += 1
    return norm(x, "diff_estimator.norm")


@pytest.mark.parametrize("t", [1.0, 0.37, 0.0])
def test_amphions_layout_and_a_float64_loop(t):
    state = amphion_state()
    model = from_amphion(state, heads=2).double()
    tokens = torch.tensor([3, 60, 7, 60, 59, 0, 11])
    table = torch.cat([state["cond_emb.weight"], state["mask_emb.weight"]])
    wanted = reference_hidden(state, table[tokens], t)
    found = model.hidden(tokens.unsqueeze(0), torch.tensor([t]).double())
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)  # t passes through float32
    logits = wanted @ state["to_logit.weight"].T + state["to_logit.bias"]
    torch.testing.assert_close(model(tokens.unsqueeze(0), torch.tensor([t]).double())[0], logits,
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    clock = model.stack.time(time_features(torch.tensor([t]), 16).double())
    causal = model.stack.body(model.tokens(tokens)[None], causal=True, condition=clock)
    assert (causal[0] - wanted).abs().max() > 1e-2  # the test would notice a causal mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mask_emb.weight"), "lacks"),
        (lambda s: s.pop("diff_estimator.layers.1.mlp.up_proj.weight"), "lacks"),
        (lambda s: s.update({"phone_emb.weight": torch.zeros(3, 16)}), "what to do with"),
        (lambda s: s.update({"cond_adapter.gate_scale": torch.zeros(1)}), "what to do with"),
    ],
)
def test_another_checkpoint_is_refused(change, message):
    state = amphion_state()
    change(state)
    with pytest.raises(ModelError, match=message):
        from_amphion(state, heads=2)


def test_published_size_and_layout():
    with torch.device("meta"):
        model = MaskedLM(MaskedLMConfig.published())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 726
    assert len(amphion_state(layers=16)) == 186  # as the spec counts them


def test_norms_start_at_one_after_construction_and_after_loading(tmp_path):
    model = MaskedLM(CONFIG)
    for one in (model, MaskedLM.load(model.save(tmp_path))):
        steers = {n: p for n, p in one.named_parameters() if ".steer." in n}
        assert len(steers) == 2 * (2 * BODY.layers + 1)
        assert not any(p.any() for p in steers.values())
        assert one.tokens.weight.std() > 0.01


def test_padding_and_neighbours_are_not_seen():
    model = loud(MaskedLM(CONFIG))
    tokens, time = torch.randint(61, (3, 20)), torch.tensor([0.9, 0.5, 0.1])
    valid = torch.arange(20) < torch.tensor([[20], [9], [14]])
    both = model(tokens, time, valid)
    for row, n in enumerate((20, 9, 14)):
        alone = model(tokens[row : row + 1, :n], time[row : row + 1])
        torch.testing.assert_close(both[row : row + 1, :n], alone)


def test_frames_are_added():
    model = loud(MaskedLM(CONFIG))
    tokens, time = torch.randint(61, (1, 5)), torch.tensor([0.5])
    assert torch.equal(model(tokens, time, frames=torch.zeros(1, 5, 16)), model(tokens, time))
    assert not torch.equal(model(tokens, time, frames=torch.ones(1, 5, 16)), model(tokens, time))


# The loss


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 999),
       st.sampled_from(sorted(SCHEDULES)))  # fmt: skip
def test_masks_of_the_loss(lengths, seed, schedule):
    valid = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    masking = Masking(schedule)
    t, mask, _ = masking.draw(valid, torch.Generator().manual_seed(seed))
    assert ((t > 0) & (t < 1)).all()
    assert not (mask & ~valid).any()
    assert mask.any(dim=1).all()


def test_shares_and_prompts_are_as_published():
    valid = torch.ones(6000, 100, dtype=torch.bool)
    _, mask, _ = Masking(prompt=0.0, least=0.0).draw(valid, torch.Generator().manual_seed(0))
    assert abs(mask.float().mean() - 2 / math.pi) < 0.01  # the mean of sin(pi t / 2)
    _, mask, _ = Masking(prompt=0.0, least=0.2).draw(valid, torch.Generator().manual_seed(0))
    assert mask.float().mean(1).min() > 0.05
    _, mask, _ = Masking(prompt=1.0, least=1.0).draw(valid, torch.Generator().manual_seed(0))
    kept = (~mask).sum(1)
    assert (mask.long().diff(dim=1) >= 0).all()  # the first are kept, the others hidden
    assert kept.min() == 0
    assert kept.max() == 40
    assert abs(kept.float().mean() - 20) < 0.6  # even from 0 to 40
    _, mask, _ = Masking(prompt=0.8, least=1.0).draw(valid, torch.Generator().manual_seed(0))
    assert abs(((~mask).sum(1) == 0).float().mean() - (0.2 + 0.8 / 41)) < 0.02  # a coin a row


def test_the_loss_is_the_mean_nll_of_hidden_tokens():
    model = loud(MaskedLM(CONFIG))
    tokens = torch.randint(60, (3, 12))
    valid = torch.arange(12) < torch.tensor([[12], [7], [9]])
    loss, metrics = masked_lm_loss(model, tokens, valid, Masking(), model.mask_id,
                                   torch.Generator().manual_seed(4))  # fmt: skip
    t, mask, _ = Masking().draw(valid, torch.Generator().manual_seed(4))
    total = count = right = 0
    for row in range(3):
        n = int(valid[row].sum())
        seen = tokens[row, :n].masked_fill(mask[row, :n], 60).unsqueeze(0)
        log_p = model(seen, t[row : row + 1])[0].log_softmax(-1)
        for i in range(n):
            if mask[row, i]:
                total, count = total - log_p[i, tokens[row, i]].item(), count + 1
                right += int(log_p[i].argmax() == tokens[row, i])
    assert abs(float(loss) - total / count) < 1e-5
    assert abs(float(metrics["right"]) - right / count) < 1e-6


def test_one_batch_overfits():
    torch.manual_seed(0)
    model = MaskedLM(CONFIG)
    tokens, valid = torch.randint(60, (4, 12)), torch.ones(4, 12, dtype=torch.bool)
    optimizer, draw = torch.optim.Adam(model.parameters(), 5e-3), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(400):
        loss, _ = masked_lm_loss(
            model, tokens, valid, Masking(prompt=1.0, least=0.0), model.mask_id, draw
        )
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert sum(losses[-20:]) / 20 < 2.0


# Writing


def reference_loop(state, prompt, length: int, steps: int, cfg: float, rescale: float, seed: int):
    """Metis' reverse_diffusion for one row; the draw is ours (inverse transform, same numbers)."""
    (draw,) = row_generators(seed, 1)
    u = torch.rand(length, steps, 2, generator=draw)
    table = torch.cat([state["cond_emb.weight"], state["mask_emb.weight"]])
    mask, seq = [True] * length, [0] * length
    times = [1 - i / steps for i in range(steps)] + [0.0]
    for i in range(steps):
        current = torch.tensor([VOCABULARY if m else s for m, s in zip(mask, seq)])
        whole = table[torch.cat([prompt, current])]
        embeds = reference_hidden(state, whole, times[i])[len(prompt) :]
        if cfg > 0:
            blind = reference_hidden(state, table[current], times[i])
            std = embeds.std()
            embeds = embeds + cfg * (embeds - blind)
            embeds = rescale * embeds * std / embeds.std() + (1 - rescale) * embeds
        logits = embeds @ state["to_logit.weight"].T + state["to_logit.bias"]
        scores = {}
        for place in range(length):
            if not mask[place]:
                continue
            k = math.ceil((1 - 0.98) * VOCABULARY)
            top = torch.full((VOCABULARY,), -math.inf).double()
            best = logits[place].topk(k).indices
            top[best] = logits[place][best]
            warmth = 0.2 if steps == 1 else max(0.9 * times[i], 1e-3)
            if i == steps - 1 and steps > 1:
                seq[place] = int(top.argmax())
            else:
                total = (top / warmth).softmax(-1).cumsum(-1)
                wanted = (u[place, i, 0].double() * total[-1]).view(1)
                seq[place] = int(torch.searchsorted(total, wanted, right=True))
            noise = -torch.log(-torch.log(u[place, i, 1].clamp(1e-20, 1 - 1e-7)))
            scores[place] = float(top.softmax(-1)[seq[place]] + times[i] * noise)
        many = int(math.sin(math.pi / 2 * times[i + 1]) * length + 1e-9)
        again = set(sorted(scores, key=lambda p: scores[p])[:many])
        mask = [place in again for place in range(length)]
        if not many:
            break
    return seq


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize(("cfg", "rescale"), [(0.0, 0.0), (2.5, 0.75)])
def test_the_reference_loop_writes_our_tokens(steps, cfg, rescale):
    state = amphion_state(seed=steps)
    model, length = from_amphion(state, heads=2).double(), 26
    prompt = torch.randint(VOCABULARY, (9,), generator=torch.Generator().manual_seed(1))
    wanted = reference_loop(state, prompt, length, steps, cfg, rescale, seed=5)
    found = go_on(model, [prompt], length, PRESETS["metis"], steps, Guidance(cfg, rescale), seed=5)
    assert found[0].tolist() == wanted


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 15)), min_size=2, max_size=4),
       st.integers(1, 9), st.sampled_from([0.0, 2.5]))  # fmt: skip
def test_a_ragged_batch_equals_its_rows(shapes, steps, scale):
    """One count, one std and one coin a batch are the reference's defects; ours are a row's own."""
    model = loud(MaskedLM(CONFIG))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCABULARY, (p,), generator=draw) for p, _ in shapes]
    lengths = [n for _, n in shapes]
    steps, options = min(steps, max(lengths)), (PRESETS["metis"], Guidance(scale, 0.75))
    found = go_on(model, prompts, lengths, options[0], steps, options[1], seed=3)
    for row, (prompt, n) in enumerate(zip(prompts, lengths)):
        if steps > n:
            continue
        tokens = torch.cat([prompt, torch.full((n,), model.mask_id)]).unsqueeze(0)
        given = (torch.arange(tokens.shape[1]) < len(prompt)).unsqueeze(0)
        alone = write(model, tokens, ~given, options[0], steps, options[1], prompt=given, seed=3,
                      first_row=row)  # fmt: skip
        assert torch.equal(alone[0, len(prompt) :], found[row])
        assert torch.equal(alone[0, : len(prompt)], prompt)


def test_the_prompt_matters_and_guidance_makes_it_matter_more():
    model = loud(MaskedLM(CONFIG))
    one, other = torch.randint(60, (2, 12))
    found = [go_on(model, [p], 20, PRESETS["llada"], 5)[0] for p in (one, other)]
    assert not torch.equal(*found)
    blind = go_on(model, [one[:0]], 20, PRESETS["llada"], 5, Guidance(2.5))[0]
    assert torch.equal(
        blind, go_on(model, [one[:0]], 20, PRESETS["llada"], 5)[0]
    )  # nothing to drop


def test_bad_input():
    model = MaskedLM(CONFIG).eval()
    rule, prompt = PRESETS["metis"], torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="context is 128"):
        go_on(model, [prompt], 130, rule, 4)
    with pytest.raises(ValueError, match="from 0 to 59"):
        go_on(model, [prompt + 60], 4, rule, 2)
    with pytest.raises(ValueError, match="1 numbers of 1 or more"):
        go_on(model, [prompt], [4, 5], rule, 2)
    with pytest.raises(ValueError, match="give `prompt`"):
        write(model, prompt[None], torch.ones(1, 5).bool(), rule, 2, Guidance(2.0))
    with pytest.raises(ValueError, match="mask hides nothing"):
        write(model, prompt[None], torch.zeros(1, 5).bool(), rule, 2)
    with pytest.raises(ValueError, match="no condition_dim"):
        MaskedLM(MaskedLMConfig(CodeSpec(9, 1), replace(BODY, condition_dim=None)))
    with pytest.raises(ValueError, match="tokens have 2 levels"):
        MaskedLMConfig(CodeSpec(9, 2))
    with pytest.raises(ValueError, match="schedule is 'arctan'"):
        Masking("arctan")
    with pytest.raises(ValueError, match="rows are empty"):
        filled_in(MaskedLM(CONFIG), [])
    with pytest.raises(ValueError, match="least is 2"):
        Masking(least=2)


def test_a_prompt_may_be_all_but_one_token():
    valid = mask_of(torch.tensor([5, 1, 3]), 5)
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        _, mask, prompt = Masking(prompt=1.0, prompt_share=1.0).draw(valid, draw)
        assert mask.any(dim=1).all()
        assert not (mask & prompt).any()
        assert not (mask & ~valid).any()


def test_filled_in_equals_a_loop_and_a_model_that_knows_frequencies_only():
    """Constant logits: NLL is the cross-entropy, and the bound is it times the number of tokens."""
    weights = torch.linspace(0, 2, VOCABULARY)

    class Constant(torch.nn.Module):
        config, mask_id = CONFIG, VOCABULARY
        tokens = torch.nn.Embedding(VOCABULARY + 1, 2)

        def forward(self, tokens, time):
            return weights.expand(*tokens.shape, -1)

    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (n,), generator=draw) for n in (400, 700)]
    found = filled_in(Constant(), rows, draws=64)
    each = -weights.log_softmax(0)[torch.cat(rows)].mean()
    for part in found["hidden"].values():
        assert abs(part["nll"] - float(each)) < 0.1
    wanted = float(each) / math.log(2) * 50
    assert found["bits_per_second"] == pytest.approx(wanted, rel=0.05)
    for schedule in ("linear", "cosine"):
        again = filled_in(Constant(), rows, draws=64, schedule=schedule)
        assert again["bits_per_second"] == pytest.approx(wanted, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=3))
def test_a_dropped_prompt_is_a_hidden_one(shapes):
    """What is behind it moves to the front; only distances count. Frames move along."""
    model, draw = loud(MaskedLM(CONFIG)), torch.Generator().manual_seed(0)
    starts, ends = (torch.tensor(n) for n in zip(*((p, p + n) for p, n in shapes)))
    n = int(ends.max())
    valid, prompt = mask_of(ends, n), mask_of(starts, n)
    tokens = torch.randint(VOCABULARY, (len(shapes), n), generator=draw)
    frames = torch.randn(len(shapes), n, 16, generator=draw).double()
    asked = Asked(tokens, torch.arange(len(shapes)), torch.arange(1), Moment(0, 2))
    time, behind = torch.full((len(shapes),), 0.7).double(), valid & ~prompt
    hidden = model.hidden(tokens, time, behind, frames)
    dropped = _Behind(prompt, valid).hidden(model, asked, time, frames)
    apart = (dropped - hidden)[behind].abs().max()
    assert apart < 1e-4  # rotary tables are float32
