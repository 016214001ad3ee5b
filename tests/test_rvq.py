"""speechlab.tokenizer.rvq against float64 loops, vector-quantize-pytorch, the official code."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same_codes import assert_codes_agree

from speechlab import load
from speechlab.tokenizer.rvq import (
    Codebook,
    ResidualVQ,
    RVQConfig,
    code_perplexity,
    kmeans,
    nearest_codes,
)


def make(dim=6, n_q=4, size=16, **settings) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(
        RVQConfig(dim=dim, n_q=n_q, codebook_size=size, kmeans_iterations=0, **settings)
    )


def residual_loop(
    z: torch.Tensor, books: list[torch.Tensor]
) -> tuple[list[list[int]], torch.Tensor, float]:
    """Codes, sum of vectors and Eq. 7 for rows z (N, D), by loops in float64."""
    codes, total, loss = [], torch.zeros_like(z, dtype=torch.float64), 0.0
    for n, row in enumerate(z.double()):
        residual, mine = row.clone(), []
        for book in books:
            distances = [float(((residual - e) ** 2).sum()) for e in book.double()]
            best = min(range(len(distances)), key=distances.__getitem__)
            mine.append(best)
            loss += distances[best]
            residual = residual - book[best].double()
        codes.append(mine)
        total[n] = row - residual
    return codes, total, loss / z.numel()


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_forward_equals_the_loop(batch, frames, n_q, seed):
    """Codes, sum and commitment loss (SpeechTokenizer Eq. 7) against float64 loops."""
    rvq = make(n_q=n_q).eval()
    z = torch.randn(batch, 6, frames, generator=torch.Generator().manual_seed(seed))
    codes, total, loss = residual_loop(
        z.transpose(1, 2).reshape(-1, 6), [b.embed for b in rvq.levels]
    )
    out = rvq(z)
    wanted = torch.tensor(codes).view(batch, frames, n_q).transpose(1, 2)
    assert_codes_agree(rvq, z, out.codes, wanted)
    assert torch.allclose(out.quantized.transpose(1, 2).reshape(-1, 6).double(), total, atol=1e-5)
    assert abs(float(out.commit_loss) - loss) < 1e-5
    assert_codes_agree(rvq, z, rvq.encode(z), out.codes)
    assert torch.allclose(rvq.decode(out.codes), out.quantized, atol=1e-5)
    assert torch.allclose(rvq.codes_to_vectors(out.codes).sum(1), out.quantized, atol=1e-5)


def test_commitment_loss_matches_float64_loops():
    """The register's row for SpeechTokenizer Eq. 7."""
    rvq = make(n_q=8).eval()
    z = torch.randn(2, 6, 9)
    _, _, loss = residual_loop(z.transpose(1, 2).reshape(-1, 6), [b.embed for b in rvq.levels])
    assert abs(float(rvq(z).commit_loss) - loss) < 1e-5


def test_commitment_gradient_of_every_level():
    """d/dz of level i is 2 (z - sum of the first i vectors) / count: no level is cut off."""
    rvq = make(n_q=5).eval()
    z = torch.randn(1, 6, 7, requires_grad=True)
    vectors = rvq.codes_to_vectors(rvq.encode(z))
    losses = [rvq(z, n_q=n).commit_loss for n in range(1, 6)]
    before = torch.zeros(())
    for level, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss - before, z, retain_graph=True)
        expected = 2 * (z - vectors[:, : level + 1].sum(1)) / z.numel()
        assert torch.allclose(gradient, expected, atol=1e-6)
        assert gradient.norm() > 0
        before = loss


def test_straight_through_gradient_is_the_identity():
    rvq = make()
    z = torch.randn(2, 6, 5, requires_grad=True)
    weights = torch.randn(2, 6, 5)
    (rvq(z).quantized * weights).sum().backward()
    assert torch.equal(z.grad, weights)


# Peers


@pytest.fixture(scope="module")
def peers():
    """Ours, vector-quantize-pytorch and the official quantiser with equal codebooks; dim 32."""
    benchmark = importlib.import_module("benchmarks.rvq")
    benchmark_size = benchmark.SIZE
    benchmark.SIZE = 64
    torch.manual_seed(0)
    yield benchmark, benchmark.make_peers(32)
    benchmark.SIZE = benchmark_size


def test_codes_and_outputs_equal_the_peers(peers):
    benchmark, models = peers
    z = torch.randn(1, 32, 300)
    rows = z.transpose(1, 2).contiguous()
    for model in models.values():
        model.eval()
    with torch.no_grad():
        codes = {name: benchmark.encode(name, model, z, rows) for name, model in models.items()}
        ours = models["ours"](z)
        lucid = models["vector-quantize-pytorch"](rows)[0].transpose(1, 2)
        official = models["official SpeechTokenizer"](z)[0]
    same = torch.ones(300, dtype=torch.bool)  # behind a tie, other vectors may follow
    for found in codes.values():
        assert_codes_agree(models["ours"], z, found[None], codes["ours"][None])
        same &= (found == codes["ours"]).all(dim=0)
    assert_codes_agree(models["ours"], z, ours.codes, codes["ours"][None])
    same &= (ours.codes[0] == codes["ours"]).all(dim=0)
    assert torch.allclose(ours.quantized[..., same], lucid[..., same], atol=1e-5)
    assert torch.allclose(ours.quantized[..., same], official[..., same], atol=1e-5)


def test_one_ema_step_equals_vector_quantize_pytorch():
    """Same codebooks, one batch: the updated codes agree (no ramp, no revival)."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    theirs = VectorQuantize(dim=8, codebook_size=16, decay=0.9, threshold_ema_dead_code=0)
    ours = make(8, 1, 16, decay=0.9, decay_ramp=1, revive_below=0)
    start = torch.randn(16, 8)
    with torch.no_grad():
        for tensor in (ours.levels[0].embed, ours.levels[0].embed_sum):
            tensor.copy_(start)
        theirs._codebook.embed.copy_(start[None])
        theirs._codebook.embed_avg.copy_(start[None])
        theirs._codebook.cluster_size.fill_(1)
        x = torch.randn(1, 200, 8)
        theirs(x)
        ours(x.transpose(1, 2))
    assert torch.allclose(ours.levels[0].embed, theirs._codebook.embed[0], atol=1e-5)


# The three fixes


def test_kmeans_start_survives_the_first_step():
    torch.manual_seed(0)
    x = torch.randn(2000, 5) + 5
    book = Codebook(RVQConfig(dim=5, n_q=1, codebook_size=32))
    book.start_from(x)
    before = (x - book.vectors(nearest_codes(x, book.embed))).pow(2).mean()
    book.follow(x, nearest_codes(x, book.embed))
    after = (x - book.vectors(nearest_codes(x, book.embed))).pow(2).mean()
    assert after <= 1.01 * before


@pytest.mark.parametrize("batch", [64, 4096])
@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_dead_codes_come_back_for_any_batch_size(batch, kind):
    torch.manual_seed(0)
    book = Codebook(RVQConfig(dim=5, n_q=1, codebook_size=32, decay=0.9, codebook=kind))
    book.start_from(torch.randn(1000, 5))
    with torch.no_grad():
        book.embed[:8] += 100
    book.embed_sum.copy_(book.embed * book.cluster_size[:, None])
    for _ in range(120):
        x = torch.randn(batch, 5)
        book.follow(x, nearest_codes(x, book.embed))
    x = torch.randn(5000, 5)
    assert (torch.bincount(nearest_codes(x, book.embed), minlength=32) > 0).sum() >= 31


def test_revival_can_be_switched_off():
    torch.manual_seed(0)
    book = Codebook(RVQConfig(dim=5, n_q=1, codebook_size=32, decay=0.99, revive_below=0.0))
    book.start_from(torch.randn(1000, 5))
    book.embed[0] += 100
    book.embed_sum.copy_(book.embed * book.cluster_size[:, None])
    for _ in range(60):
        x = torch.randn(200, 5)
        book.follow(x, nearest_codes(x, book.embed))
    assert book.embed[0].norm() > 50


# K-means


def test_kmeans_against_scikit_learn():
    """From the same start, Lloyd's iterations agree with scikit-learn's."""
    from sklearn.cluster import KMeans

    torch.manual_seed(1)
    x = torch.randn(500, 3)
    torch.manual_seed(2)
    codebook, counts = kmeans(x, 8, iterations=15)
    torch.manual_seed(2)
    permuted = x[torch.randperm(500)]  # the draws that kmeans makes: all rows, then its start
    start = permuted[torch.randperm(500)[:8]]
    theirs = KMeans(8, init=start.numpy(), n_init=1, max_iter=15, tol=0, algorithm="lloyd").fit(
        x.numpy()
    )
    assert torch.allclose(codebook, torch.from_numpy(theirs.cluster_centers_).float(), atol=0.02)
    assert int(counts.sum()) == 500


def test_kmeans_memory_is_bounded():
    """All differences of 4000 x 512 x 256 floats would be 2 GB; rows, codes and scores are not."""
    code = (
        "import torch, resource; from speechlab.tokenizer.rvq import kmeans;"
        "x = torch.randn(4000, 256); kmeans(x, 8, 1);"
        "a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; kmeans(x, 512, 2);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 100_000  # kB


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_fewer_vectors_than_codes(rows):
    rvq = ResidualVQ(RVQConfig(dim=4, n_q=2, codebook_size=16))
    out = rvq(torch.randn(1, 4, rows))
    assert torch.isfinite(out.quantized).all()
    assert all(torch.isfinite(level.embed).all() for level in rvq.levels)


# Masks, levels, dropout


@pytest.mark.parametrize("training", [True, False])
def test_masked_frames_change_nothing(training):
    """Padding changes no code, no vector, no statistic and no codebook."""
    one, two, start = make(decay_ramp=1), make(decay_ramp=1), make(decay_ramp=1)
    one.train(training)
    two.train(training)
    short, long = torch.randn(1, 6, 4), torch.randn(1, 6, 9)
    padded = torch.full((2, 6, 9), float("nan"))
    padded[0, :, :4], padded[1] = short[0], long[0]
    mask = torch.tensor([[True] * 4 + [False] * 5, [True] * 9])
    a = one(torch.where(mask[:, None], padded, torch.zeros(())), mask=mask)
    b = two(torch.cat([short, long], dim=-1))
    assert_codes_agree(start, short, a.codes[:1, :, :4], b.codes[..., :4])
    assert_codes_agree(start, long, a.codes[1:], b.codes[..., 4:])
    assert (a.codes[0, :, 4:] == -1).all()
    assert not a.quantized[0, :, 4:].any()
    assert torch.allclose(a.commit_loss, b.commit_loss)
    assert torch.equal(a.perplexity, b.perplexity)
    assert torch.allclose(one.levels[0].embed, two.levels[0].embed)
    codes = one.eval().encode(padded, mask=mask)
    assert (codes[0, :, 4:] == -1).all()
    assert_codes_agree(one, long, codes[1:], two.eval().encode(long))


def test_masked_codes_decode_with_the_mask_only():
    rvq = make().eval()
    mask = torch.tensor([[True, True, False]])
    codes = rvq.encode(torch.randn(1, 6, 3), mask=mask)
    with pytest.raises(ValueError, match="codes range from -1"):
        rvq.decode(codes)
    vectors = rvq.decode(codes, mask)
    assert not vectors[..., 2].any()
    assert vectors[..., :2].abs().sum() > 0
    assert torch.allclose(rvq.codes_to_vectors(codes, mask).sum(1), vectors, atol=1e-6)


def test_fewer_levels_are_a_prefix():
    rvq = make(n_q=6).eval()
    z = torch.randn(2, 6, 8)
    for n in range(1, 7):
        assert_codes_agree(rvq, z, rvq.encode(z, n_q=n), rvq.encode(z)[:, :n])
        assert torch.allclose(rvq(z, n_q=n).quantized, rvq.decode(rvq.encode(z)[:, :n]), atol=1e-5)


def test_dropout_is_per_sample_and_only_in_training():
    rvq = make(n_q=4, dropout=1.0)
    torch.manual_seed(3)
    codes = rvq(torch.randn(64, 6, 5)).codes
    depth = (codes >= 0).sum(dim=1)
    assert (depth == depth[:, :1]).all()
    assert set(depth[:, 0].tolist()) == {1, 2, 3, 4}
    used = codes >= 0
    assert (used[:, 1:] <= used[:, :-1]).all()
    assert (rvq.eval()(torch.randn(4, 6, 5)).codes >= 0).all()


def test_dropped_levels_add_nothing():
    rvq = make(n_q=4, dropout=1.0, revive_below=0, decay=1.0)
    before = [level.embed.clone() for level in rvq.levels]
    torch.manual_seed(3)
    out = rvq(torch.randn(8, 6, 5))
    for codes, vectors in zip(out.codes, out.quantized):
        depth = int((codes[:, 0] >= 0).sum())
        expected = sum(before[i][codes[i]] for i in range(depth)).T
        assert torch.allclose(vectors, expected, atol=1e-5)


# Statistics, gradient codebooks, saving


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any))
def test_perplexity_lies_between_one_and_the_codes_used(counts):
    value = float(code_perplexity(torch.tensor(counts).float()))
    assert 1 - 1e-4 <= value <= sum(c > 0 for c in counts) + 1e-3


def test_gradient_codebooks_learn():
    torch.manual_seed(0)
    rvq = ResidualVQ(
        RVQConfig(dim=4, n_q=2, codebook_size=16, codebook="gradient", kmeans_iterations=0)
    )
    optimizer = torch.optim.Adam(rvq.parameters(), lr=0.02)
    z = torch.randn(4, 4, 100) + 2
    losses = []
    for _ in range(150):
        out = rvq(z)
        optimizer.zero_grad()
        out.codebook_loss.backward()
        optimizer.step()
        losses.append(float(out.commit_loss))
    assert losses[-1] < 0.3 * losses[0]
    assert len(list(rvq.parameters())) == 2
    assert not list(make().parameters())


def test_evaluation_never_changes_the_codebooks():
    rvq = make().eval()
    before = {name: value.clone() for name, value in rvq.state_dict().items()}
    rvq(torch.randn(1, 6, 50))
    rvq.encode(torch.randn(1, 6, 50))
    rvq.train().encode(torch.randn(1, 6, 50))
    assert all(torch.equal(value, before[name]) for name, value in rvq.state_dict().items())


def test_save_and_load(tmp_path):
    rvq = make().eval()
    assert rvq.save(tmp_path) == tmp_path
    assert (tmp_path / "model.safetensors").exists()
    again = ResidualVQ.load(tmp_path)
    assert not again.training
    assert again.config == rvq.config
    z = torch.randn(1, 6, 20)
    assert torch.equal(again.encode(z), rvq.encode(z))  # the same numbers in the same order
    assert type(load(tmp_path)) is ResidualVQ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    rvq = make().to(dtype)
    out = rvq(torch.randn(1, 6, 20, dtype=dtype))
    assert out.quantized.dtype == dtype
    assert torch.isfinite(out.quantized).all()


def test_no_memory_grows_over_training_steps():
    rvq = make()
    for _ in range(3):
        rvq(torch.randn(1, 6, 50))
    tracemalloc.start()
    for _ in range(20):
        rvq(torch.randn(1, 6, 50))
    assert tracemalloc.get_traced_memory()[0] < 200_000
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_another_precision_and_autocast(dtype):
    """A float32 quantiser takes a bf16 encoder's output; autocast does not change its codes."""
    rvq = make().eval()
    z = torch.randn(1, 6, 20).to(dtype)
    assert rvq(z).quantized.dtype == dtype
    plain = rvq.encode(z.float())
    assert_codes_agree(rvq, z.float(), rvq.encode(z), plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = rvq.encode(z), rvq.encode(z.float())
    for codes in found:
        assert_codes_agree(rvq, z.float(), codes, plain)
    with torch.autocast("cpu", torch.bfloat16):
        out = rvq.train()(torch.nn.Conv1d(6, 6, 1)(torch.randn(1, 6, 20)))
    assert torch.isfinite(out.commit_loss)


def test_every_gradient_codebook_gets_a_gradient():
    """DDP demands it, whatever levels were dropped or left out."""
    rvq = make(codebook="gradient", dropout=1.0)
    rvq(torch.randn(1, 6, 5), n_q=1).codebook_loss.backward()
    assert all(parameter.grad is not None for parameter in rvq.parameters())
