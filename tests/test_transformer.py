"""The transformer against loops, transformers' GPT-2 and Llama, and itself in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlab.foundations.positions import attention_mask, rope_table, rotate
from speechlab.foundations.transformer import (
    AdaptiveNorm,
    Attention,
    Block,
    KVCache,
    RMSNorm,
    Transformer,
    TransformerConfig,
)
from speechlab.foundations.transformer_tools import (
    attention_maps,
    copy_gpt2_layer,
    copy_llama_layer,
    flops_per_position,
)

X = torch.randn(1, 3, 32)
KINDS = {
    "llama": TransformerConfig(32, 2, 4, context=64),
    "gpt2": TransformerConfig.gpt2(dim=32, layers=2, heads=4, context=64),
    "shared heads": TransformerConfig(32, 2, 4, kv_heads=2, context=64),
    "other sizes": TransformerConfig(32, 2, 4, key_dim=6, value_dim=10, context=64),
    "qk norm": TransformerConfig(32, 2, 4, qk_norm=True, context=64),
    "no positions": TransformerConfig(32, 2, 4, positions="none", activation="gelu", context=64),
    "layers differ": TransformerConfig(
        32, 2, heads=(4, 2), kv_heads=(2, 1), key_dim=(8, 6), value_dim=(5, 8), ffn_dim=(48, 16),
        context=64,
    ),
}  # fmt: skip


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that attention is far from uniform."""
    for weight in model.parameters():
        weight.data.mul_(4) if weight.dim() > 1 else None
    return model.eval()


def make(kind: str) -> Transformer:
    torch.manual_seed(0)
    return loud(Transformer(KINDS[kind]))


def test_rms_norm_is_the_formula():
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    norm = RMSNorm(16).double()
    torch.nn.init.normal_(norm.weight)
    rows = []
    for row in x.flatten(0, 1):
        mean = sum(float(v) ** 2 for v in row) / 16
        rows.append(row / math.sqrt(mean + 1e-5) * norm.weight)
    torch.testing.assert_close(norm(x).flatten(0, 1), torch.stack(rows))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_adaptive_norm(kind):
    norm, x = AdaptiveNorm(16, 5, kind), torch.randn(2, 7, 16)
    condition = torch.randn(2, 5)
    plain = RMSNorm(16)(x) if kind == "rms" else torch.nn.functional.layer_norm(x, (16,))
    torch.testing.assert_close(norm(x, condition), plain)  # zero at the start
    torch.nn.init.normal_(norm.steer.weight)
    scale, shift = norm.steer(condition).chunk(2, dim=-1)
    torch.testing.assert_close(
        norm(x, condition), plain * (1 + scale[:, None]) + shift[:, None], rtol=1e-4, atol=1e-4
    )
    each = condition.unsqueeze(1).expand(-1, 7, -1)  # one condition a position
    torch.testing.assert_close(norm(x, each), norm(x, condition))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 40), st.sampled_from([2, 8, 64]))
def test_rope_sees_distances_only(p, distance, shift, dim):
    cos, sin = rope_table(160, dim)
    a, b = torch.randn(2, dim, generator=torch.Generator().manual_seed(p))

    def meet(one: int, two: int) -> float:
        turned = [rotate(v.view(1, 1, 1, -1), cos[i].view(1, -1), sin[i].view(1, -1))
                  for v, i in ((a, one), (b, two))]  # fmt: skip
        return float((turned[0] * turned[1]).sum())

    assert math.isclose(meet(p, p + distance), meet(p + shift, p + shift + distance), abs_tol=2e-4)


def test_rope_is_a_rotation_of_complex_pairs():
    x, (cos, sin) = torch.randn(2, 3, 9, 8), rope_table(9, 8)
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    for t in range(9):
        for i in range(4):
            angle = t * 10000 ** (-2 * i / 8)
            pairs[:, :, t, i] *= complex(math.cos(angle), math.sin(angle))
    wanted = torch.cat([pairs.real, pairs.imag], dim=-1).float()
    torch.testing.assert_close(rotate(x, cos, sin), wanted, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 8), st.integers(0, 8), st.booleans(), st.integers(0, 8), st.integers(0, 7))
def test_mask_by_loops(queries, before, causal, prefix, padding):
    keys = queries + before
    valid = torch.arange(keys) >= min(padding, keys)
    mask = attention_mask(queries, keys, causal, valid[None], prefix)[0, 0]
    for row in range(queries):
        place = before + row
        for key in range(keys):
            seen = key <= place or not causal or key < prefix
            assert bool(mask[row, key]) == ((seen and bool(valid[key])) or key == place)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_matches_float64_loops(kind, index):
    config = KINDS[kind]
    torch.manual_seed(1)
    size = config.layer(index)
    layer, (heads_, kv_heads, d_k, d_v, _) = loud(Attention(config, size)).double(), size
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    q, k, v = layer.query_key_value(x)[0].split(layer.parts, dim=-1)
    q, k, v = q.view(6, heads_, d_k), k.view(6, kv_heads, d_k), v.view(6, kv_heads, d_v)
    if config.qk_norm:
        q, k = layer.query_norm(q), layer.key_norm(k)
    cos, sin = (table.double() for table in rope_table(6, d_k))
    rotation = (cos, sin) if config.positions == "rope" else None
    rows = []
    for t in range(6):
        heads = []
        for h in range(heads_):
            shared, scores = h // (heads_ // kv_heads), []
            for s in range(t + 1):
                one, two = q[t, h], k[s, shared]
                if rotation:
                    one = one * cos[t] + one.roll(d_k // 2) * sin[t]
                    two = two * cos[s] + two.roll(d_k // 2) * sin[s]
                scores.append(sum(float(a) * float(b) for a, b in zip(one, two)) / math.sqrt(d_k))
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            heads.append(sum(w / sum(weights) * v[s, shared] for s, w in enumerate(weights)))
        rows.append(torch.cat(heads))
    found = layer(x, rotation, causal=True)
    torch.testing.assert_close(found, layer.out(torch.stack(rows))[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_by_multihead_attention(bias):
    """torch's own module with other sizes of the memory, padding included."""
    config = TransformerConfig(32, 1, 4, bias=bias, positions="none", memory_dim=20)
    torch.manual_seed(0)
    mine = Attention(config, config.layer(0), 20).eval()
    theirs = torch.nn.MultiheadAttention(
        32, 4, kdim=20, vdim=20, bias=bias, batch_first=True
    ).eval()
    with torch.no_grad():
        theirs.q_proj_weight.copy_(mine.query.weight)
        theirs.k_proj_weight.copy_(mine.key_value.weight[:32])
        theirs.v_proj_weight.copy_(mine.key_value.weight[32:])
        theirs.out_proj.weight.copy_(mine.out.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([mine.query.bias, mine.key_value.bias]))
            theirs.out_proj.bias.copy_(mine.out.bias)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 20)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    wanted = theirs(x, memory, memory, key_padding_mask=~mask)[0]
    torch.testing.assert_close(mine.cross(x, memory, mask[:, None, None]), wanted)


@pytest.mark.parametrize("layers", [1, 3])
def test_gpt2_parity(layers):
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    theirs = loud(GPT2Model(GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=64,
                                       vocab_size=9)))  # fmt: skip
    mine = Transformer(TransformerConfig.gpt2(dim=32, layers=layers, heads=4, context=64)).eval()
    for block, layer in zip(mine.blocks, theirs.h):
        copy_gpt2_layer(block, layer)
    mine.places.load_state_dict(theirs.wpe.state_dict())
    mine.norm.load_state_dict(theirs.ln_f.state_dict())
    x = torch.randn(2, 30, 32)
    wanted = theirs(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(mine(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_parity(kv_heads):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    theirs = loud(LlamaModel(LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=2,
        intermediate_size=80, vocab_size=9, rms_norm_eps=1e-5, max_position_embeddings=64,
    )))  # fmt: skip
    mine = Transformer(TransformerConfig(32, 2, 4, kv_heads=kv_heads, ffn_dim=80)).eval()
    for block, layer in zip(mine.blocks, theirs.layers):
        copy_llama_layer(block, layer)
    mine.norm.load_state_dict(theirs.norm.state_dict())
    x = torch.randn(2, 30, 32)
    wanted = theirs(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(mine(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_chunks_with_a_cache_equal_one_pass(kind, data):
    model, x = make(kind), torch.randn(2, 20, 32)
    sizes = []
    while sum(sizes) < 20:
        sizes.append(data.draw(st.integers(1, 20 - sum(sizes))))
    cache = KVCache(model.config, 2)
    with torch.no_grad():
        parts = [model.step(piece, cache) for piece in x.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=1e-4, atol=1e-4)
    assert cache.length == 20


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_a_mask_equal_those_with_one(kind):
    """Single steps and first pieces need no mask; one that hides nothing changes nothing."""
    model, x = make(kind), torch.randn(2, 9, 32)
    caches = [KVCache(model.config, 2) for _ in range(2)]
    for first, last in ((0, 3), (3, 4), (4, 7), (7, 8), (8, 9)):
        short = model.step(x[:, first:last], caches[0])
        masked = model.step(x[:, first:last], caches[1], mask=torch.ones(2, last).bool())
        torch.testing.assert_close(short, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(short=st.integers(1, 12), more=st.integers(1, 5))
def test_left_padding_changes_nothing(kind, short, more):
    """A row that starts later, in a batch with a longer one, gives what it gives alone."""
    model = make(kind)
    long, own = torch.randn(1, 12 + more, 32), torch.randn(1, short + more, 32)
    padded = torch.cat([torch.full((1, 12 - short, 32), 9.0), own], dim=1)
    both = torch.cat([long, padded])
    cache = KVCache(model.config, 2, padding=torch.tensor([0, 12 - short]))
    with torch.no_grad():
        parts = [model.step(both[:, :12], cache)]
        parts += [model.step(both[:, t : t + 1], cache) for t in range(12, 12 + more)]
        found = torch.cat(parts, dim=1)
        torch.testing.assert_close(found[:1], model(long), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1:, 12 - short :], model(own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_right_padding_changes_nothing(causal):
    model, x = make("llama"), torch.randn(2, 9, 32)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    found = model(x.masked_fill(~mask[..., None], 1e3), causal=causal, mask=mask)
    torch.testing.assert_close(
        found[1, :5], model(x[1:, :5], causal=causal)[0], rtol=1e-4, atol=1e-4
    )
    assert torch.isfinite(found).all()


def test_a_prefix_is_seen_by_all_and_sees_no_later_position():
    model, x = make("llama"), torch.randn(1, 9, 32)
    other = x.clone()
    other[0, 3] = torch.randn(32)  # in the prefix of 4: everybody notices
    assert ((model(x, prefix=4) - model(other, prefix=4)).abs().amax(-1) > 1e-6).all()
    other = x.clone()
    other[0, 6] = torch.randn(32)  # behind it: positions 0 to 5 do not
    moved = (model(x, prefix=4) - model(other, prefix=4)).abs().amax(-1)[0]
    assert (moved[:6] == 0).all() and (moved[6:] > 1e-6).all()


def test_a_prefix_counts_real_positions():
    """In a row that is padded on the left, the prefix starts after the padding."""
    model, own = make("llama"), torch.randn(1, 8, 32)
    padded = torch.cat([torch.full((1, 4, 32), 9.0), own], dim=1)
    cache = KVCache(model.config, 1, padding=torch.tensor([4]))
    with torch.no_grad():
        found = model.step(padded, cache, prefix=3)[:, 4:]
        torch.testing.assert_close(found, model(own, prefix=3), rtol=1e-4, atol=1e-4)


def test_memory_in_the_cache_is_computed_once():
    torch.manual_seed(0)
    model = loud(Transformer(TransformerConfig(32, 2, 4, memory_dim=12, condition_dim=5)))
    x, memory, condition = torch.randn(2, 6, 32), torch.randn(2, 8, 12), torch.randn(2, 5)
    mask, cache = torch.arange(8) < torch.tensor([[8], [2]]), KVCache(model.config, 2)
    with torch.no_grad():
        wanted = model(x, memory=memory, memory_mask=mask, condition=condition)
        known = {"memory_mask": mask, "condition": condition}
        parts = [model.step(x[:, :2], cache, memory=memory, **known)]
        for t in range(2, 6):  # no memory given: the cache has it
            parts.append(model.step(x[:, t : t + 1], cache, **known))
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="memory is missing"):
        model(x, condition=condition)
    cache.reset()
    with pytest.raises(ValueError, match="memory is missing"):  # forgotten with the rest
        model.step(x, cache, condition=condition)
    other = memory.clone()
    other[1, 4] = 100.0  # masked
    torch.testing.assert_close(
        model(x, memory=other, memory_mask=mask, condition=condition), wanted, rtol=1e-4, atol=1e-4
    )


def test_cache_rows_can_be_kept_and_repeated():
    model, x = make("gpt2"), torch.randn(3, 5, 32)
    cache = KVCache(model.config, 3)
    with torch.no_grad():
        model.step(x, cache)
        cache.select(torch.tensor([2, 0, 2]))
        again = model.step(x[[2, 0, 2], :1], cache)
        wanted = model(torch.cat([x, x[:, :1]], dim=1))[[2, 0, 2], -1:]
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
    cache.reset(2)
    assert cache.length == 2
    with pytest.raises(ValueError, match="length is 3"):
        cache.reset(3)


def test_maps_are_the_attention():
    model, x = make("shared heads"), torch.randn(2, 7, 32)
    maps = torch.stack(attention_maps(model, x))
    assert maps.shape == (2, 2, 4, 7, 7)
    assert (maps.triu(1) == 0).all()
    block, h = model.blocks[0], model.blocks[0].attention_norm(x)
    v = block.attention._project(h, None)[2].repeat_interleave(2, dim=1)
    by_maps = block.attention.out(torch.einsum("bhqk,bhkd->bqhd", maps[0], v).flatten(2))
    found = block.attention(h, (model.cos_8[:7], model.sin_8[:7]), causal=True)
    torch.testing.assert_close(by_maps, found, rtol=1e-4, atol=1e-5)
    assert not any(b.attention._forward_pre_hooks for b in model.blocks)
    with pytest.raises(TypeError, match="cache"):  # maps are of whole sequences
        attention_maps(model, x, cache=KVCache(model.config, 2))
    assert not any(b.attention._forward_pre_hooks for b in model.blocks)


def test_bf16_autocast_keeps_the_residual_stream():
    model, kinds = make("llama"), []
    hook = model.blocks[1].register_forward_pre_hook(lambda _, args: kinds.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 4, 32).bfloat16())
    hook.remove()
    assert kinds == [torch.float32]


def test_flops_are_those_of_the_matrices():
    for config in KINDS.values():
        blocks = [Block(config, index) for index in range(config.layers)]
        named = [pair for block in blocks for pair in block.named_parameters()]
        weights = sum(w.numel() for n, w in named if w.dim() == 2)
        assert flops_per_position(config, 0) == 2 * weights
        sizes = [config.layer(index) for index in range(config.layers)]
        more = flops_per_position(config, 10) - flops_per_position(config, 0)
        assert more == 2 * 10 * sum(size.heads * (size.key + size.value) for size in sizes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TransformerConfig(dim=30, heads=4), "dim 30 is no multiple of heads 4"),
        (lambda: TransformerConfig(heads=4, kv_heads=3), "heads 4 is no multiple of kv_heads 3"),
        (lambda: TransformerConfig(dim=12, heads=4), "key_dim is 3.*even"),
        (lambda: TransformerConfig(norm="batch"), "norm is 'batch'"),
        (lambda: TransformerConfig(layers=0), "layers is 0"),
        (lambda: TransformerConfig(heads=4, kv_heads=-2), "kv_heads is -2"),
        (lambda: attention_mask(5, 3), "5 queries and 3 keys"),
        (
            lambda: make("llama").step(torch.randn(1, 3, 32), KVCache(KINDS["llama"], 2)),
            "x is 1 rows up to position 3, the cache holds 2 rows",
        ),
        (lambda: make("llama")(X, memory=X), "no memory_dim"),
        (
            lambda: Transformer(TransformerConfig(32, 1, 4, condition_dim=3))(X),
            "condition is missing",
        ),
        (lambda: TransformerConfig(32, 2, heads=(4, 2, 1)), "heads has 3 entries for 2 layers"),
        (lambda: TransformerConfig(32, 2, ffn_dim=(8, 0)), "ffn_dim is 0"),
        (lambda: make("llama")(torch.randn(1, 65, 32)), "65 positions.*context holds 64"),
        (lambda: make("llama")(torch.randn(1, 0, 32)), "T at least 1"),
        (lambda: make("llama")(torch.randn(1, 5, 31)), r"\(1, 5, 31\).*\(B, T, 32\)"),
        (
            lambda: make("llama")(torch.randn(2, 5, 32), mask=torch.ones(2, 4).bool()),
            r"mask has shape \(2, 4\); it must be \(2, 5\)",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_full_cache_is_an_error():
    model, cache = make("llama"), KVCache(KINDS["llama"], 1, capacity=4)
    model.step(torch.randn(1, 4, 32), cache)
    with pytest.raises(ValueError, match="position 5, the cache holds 1 rows and 4 positions"):
        model.step(torch.randn(1, 1, 32), cache)
