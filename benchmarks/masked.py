"""Our masked decoding against the published loop written plainly: same weights, same tokens.

    python benchmarks/masked.py [--json] [--quick] [--threads N]

A Metis-like model (6 layers of 256, 1024 tokens), random weights, 25 steps, prompts of 100 tokens
and 150 new ones. The peer is Metis' loop in plain torch, with its blocks in the layout of the
published checkpoints: queries, keys and values apart, two forwards a step for guidance, logits of
every place, one row at a time, since its mask counts are those of row 0. The tokens are compared
first. Guidance is 2.5 with rescale .75, as published for text to speech; 0 means one forward.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from common import interleaved, options, report, rows_for

from speechlab.foundations.contracts import CodeSpec
from speechlab.foundations.sampling import row_generators
from speechlab.metis.amphion import from_amphion
from speechlab.metis.decoding import PRESETS, Guidance
from speechlab.metis.masked_lm import MaskedLM, MaskedLMConfig, go_on, timed

VOCABULARY, DIM, LAYERS, HEADS, WIDE = 1024, 256, 6, 4, 768


def random_state() -> dict[str, torch.Tensor]:
    """Weights in the published layout, large enough that choices are sure."""
    torch.manual_seed(0)
    state = {"mask_emb.weight": torch.randn(1, DIM),
             "cond_emb.weight": torch.randn(VOCABULARY, DIM),
             "to_logit.weight": torch.randn(VOCABULARY, DIM) / 4,
             "to_logit.bias": torch.zeros(VOCABULARY)}  # fmt: skip
    sizes = {"diff_step_mlp.0": (4 * DIM, DIM), "diff_step_mlp.2": (DIM, 4 * DIM)}
    for i in range(LAYERS):
        sizes |= {f"layers.{i}.self_attn.{p}_proj": (DIM, DIM) for p in "qkvo"}
        sizes |= {f"layers.{i}.mlp.{p}_proj": (WIDE, DIM) for p in ("gate", "up")}
        sizes[f"layers.{i}.mlp.down_proj"] = (DIM, WIDE)
    for name, (rows, columns) in sizes.items():
        weight = torch.randn(rows, columns) / math.sqrt(columns)
        state[f"diff_estimator.{name}.weight"] = weight
        if "step" in name:
            state[f"diff_estimator.{name}.bias"] = torch.zeros(rows)
    norms = [f"layers.{i}.{n}" for i in range(LAYERS)
             for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    for name in (*norms, "norm"):
        state[f"diff_estimator.{name}.to_weight.weight"] = torch.randn(DIM, DIM) * 0.02
        state[f"diff_estimator.{name}.to_weight.bias"] = torch.ones(DIM)
    return state


class Published:
    """The reference's forward and its reverse diffusion for one row; the noise is ours."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state
        rates = 1e4 ** (-torch.arange(0, DIM // HEADS, 2) / (DIM // HEADS))
        angles = torch.outer(torch.arange(1024.0), rates).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.state.get(f"diff_estimator.{name}.bias")
        return F.linear(x, self.state[f"diff_estimator.{name}.weight"], bias)

    def norm(self, x: torch.Tensor, clock: torch.Tensor, name: str) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * self.linear(clock, f"{name}.to_weight").unsqueeze(1)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        n = x.shape[2]
        return x * self.cos[:n] + torch.cat([-second, first], dim=-1) * self.sin[:n]

    def hidden(self, tokens: torch.Tensor, t: float) -> torch.Tensor:
        table = torch.cat([self.state["cond_emb.weight"], self.state["mask_emb.weight"]])
        x, half = table[tokens], DIM // 2
        rates = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        clock = torch.cat([(t * rates).sin(), (t * rates).cos()]).unsqueeze(0)
        clock = self.linear(F.silu(self.linear(clock, "diff_step_mlp.0")), "diff_step_mlp.2")
        for i in range(LAYERS):
            y = self.norm(x, clock, f"layers.{i}.input_layernorm")
            q, k, v = (self.linear(y, f"layers.{i}.self_attn.{p}_proj")
                       .unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in "qkv")  # fmt: skip
            y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
            x = x + self.linear(y.transpose(1, 2).flatten(2), f"layers.{i}.self_attn.o_proj")
            y = self.norm(x, clock, f"layers.{i}.post_attention_layernorm")
            gate, up = (self.linear(y, f"layers.{i}.mlp.{p}_proj") for p in ("gate", "up"))
            x = x + self.linear(F.silu(gate) * up, f"layers.{i}.mlp.down_proj")
        return self.norm(x, clock, "norm")

    def write(self, prompt, length: int, steps: int, scale: float, seed: int, row: int):
        (draw,) = row_generators(seed, 1, row)
        noise = torch.rand(length, steps, 2, generator=draw)
        seq = torch.zeros(1, length, dtype=torch.long)
        mask = torch.ones(1, length, dtype=torch.bool)
        for i in range(steps):
            t, after = 1 - i / steps, 1 - (i + 1) / steps
            current = seq.masked_fill(mask, VOCABULARY)
            embeds = self.hidden(torch.cat([prompt[None], current], dim=1), t)[:, len(prompt) :]
            if scale:
                bare, std = self.hidden(current, t), embeds.std()
                embeds = embeds + scale * (embeds - bare)
                embeds = 0.75 * embeds * std / embeds.std() + 0.25 * embeds
            logits = F.linear(embeds, self.state["to_logit.weight"], self.state["to_logit.bias"])
            kept = logits.topk(math.ceil(0.02 * VOCABULARY), dim=-1)
            top = torch.full_like(logits, -math.inf).scatter(2, kept.indices, kept.values)
            if i == steps - 1:
                chosen = top.argmax(dim=-1)
            else:
                total = (top.double() / max(0.9 * t, 1e-3)).softmax(-1).cumsum(-1)
                wanted = noise[:, i, 0].double().unsqueeze(-1) * total[0, :, -1:]
                chosen = torch.searchsorted(total[0], wanted, right=True).squeeze(-1).unsqueeze(0)
                chosen = chosen.clamp(max=VOCABULARY - 1)
            seq = torch.where(mask, chosen, seq)
            score = top.softmax(-1).gather(2, chosen.unsqueeze(-1)).squeeze(-1)
            score = score - t * (-noise[:, i, 1].clamp(1e-20, 1 - 1e-7).log()).log()
            score = score.masked_fill(~mask, math.inf)
            many = int(math.sin(math.pi / 2 * after) * length + 1e-9) if after > 0 else 0
            lowest = score.argsort(dim=1, stable=True)[:, :many]
            mask = torch.zeros_like(mask).scatter(1, lowest, True)
        return seq[0]


def pair(model: MaskedLM, peer: Published, rows: int, guidance: float, sizes, steps: int) -> dict:
    """Both ways to write after the same prompts."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (p,), generator=draw) for p, _ in sizes[:rows]]
    lengths, rule = [n for _, n in sizes[:rows]], PRESETS["metis"]

    @torch.inference_mode()
    def mine():
        return go_on(model, prompts, lengths, rule, steps, Guidance(guidance, 0.75), seed=2)

    @torch.inference_mode()
    def theirs():
        return [peer.write(p, n, steps, guidance, 2, row)
                for row, (p, n) in enumerate(zip(prompts, lengths))]  # fmt: skip

    same = torch.cat([(a == b).float() for a, b in zip(mine(), theirs())]).mean()
    if same < 0.99:  # a tie may fall either way, and then what follows differs
        warnings.warn(f"{rows} rows: only {same:.1%} of the tokens agree", stacklevel=2)
    return {"ours": mine, "published loop": theirs}


def main() -> None:
    chosen = options(__doc__)
    state = random_state()
    model, peer = from_amphion(state, HEADS), Published(state)
    assert model.config == MaskedLMConfig(
        CodeSpec(VOCABULARY, 1, name="amphion"),
        timed(DIM, LAYERS, HEADS, ffn_dim=WIDE, epsilon=1e-6, context=4096),
    )
    steps, rounds = (3, 1) if chosen.quick else (25, 5)
    even, ragged = [(100, 150)] * 8, [(60 + 20 * i, 200 - 20 * i) for i in range(8)]
    results = []
    for rows, guidance, sizes, name in (
        (1, 2.5, even, "1 row, guidance 2.5"),
        (1, 0.0, even, "1 row, guidance 0"),
        (8, 2.5, even, "8 rows, guidance 2.5"),
        (8, 2.5, ragged, "8 ragged rows, guidance 2.5"),
    ):
        times = interleaved(pair(model, peer, rows, guidance, sizes, steps), rounds)
        results += rows_for(name, times)
    report(results, chosen.json, "published loop")


if __name__ == "__main__":
    main()
