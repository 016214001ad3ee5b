"""Residual quantisers side by side: ours, vector-quantize-pytorch, the official SpeechTokenizer.

    python benchmarks/rvq.py [--json] [--quick] [--threads N]

All hold the same codebooks and see the same vectors. The codes are compared first; then the timings
are interleaved, and the median over rounds is taken. Ratios above 1 mean that ours is faster.
A last part trains ours and vector-quantize-pytorch for 500 EMA steps on the same batches and
compares the error, the codes used and the perplexity on held-out vectors: mel frames of unseen
voices, and normal vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from common import interleaved, options, report, rows_for

from speechlab.foundations.audio import LogMel
from speechlab.foundations.corpus import embedded_corpus
from speechlab.tokenizer.rvq import ResidualVQ, RVQConfig, code_perplexity

warnings.filterwarnings("ignore")
SIZE, LEVELS, DECAY = 1024, 8, 0.99


def make_peers(dim: int) -> dict[str, torch.nn.Module]:
    """The three quantisers with the same random codebooks, ready for inference and training."""
    from speechtokenizer.quantization import ResidualVectorQuantizer
    from vector_quantize_pytorch import ResidualVQ as LucidrainsRVQ

    ours = ResidualVQ(
        RVQConfig(dim=dim, n_q=LEVELS, codebook_size=SIZE, kmeans_iterations=0, revive_below=0)
    )
    lucid = LucidrainsRVQ(dim=dim, num_quantizers=LEVELS, codebook_size=SIZE, decay=DECAY)
    official = ResidualVectorQuantizer(
        dimension=dim,
        n_q=LEVELS,
        bins=SIZE,
        decay=DECAY,
        kmeans_init=False,
        threshold_ema_dead_code=0,
    )
    with torch.no_grad():
        for index in range(LEVELS):
            embed = torch.randn(SIZE, dim) * 0.8**index
            mine = ours.levels[index]
            mine.embed.copy_(embed)
            mine.embed_sum.copy_(embed)
            book = lucid.layers[index]._codebook
            book.embed.copy_(embed[None])
            book.embed_avg.copy_(embed[None])
            book.cluster_size.fill_(1)
            other = official.vq.layers[index]._codebook
            other.embed.copy_(embed)
            other.embed_avg.copy_(embed)
            other.cluster_size.fill_(1)
            other.inited.fill_(1)
    return {"ours": ours, "vector-quantize-pytorch": lucid, "official SpeechTokenizer": official}


def encode(name: str, model, z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Codes (LEVELS, N) of one quantiser; each gets the layout it takes."""
    if name == "ours":
        return model.encode(z)[0]
    if name.startswith("vector"):
        return model(rows)[1][0].T
    return model.vq.encode(z)[:, 0]


def train_step(name: str, model, z: torch.Tensor, rows: torch.Tensor) -> None:
    """Forward in training mode (with codebook update), backward of output and commitment."""
    leaf = (rows if name.startswith("vector") else z).clone().requires_grad_()
    if name == "ours":
        out = model(leaf)
        loss = out.quantized.mean() + out.commit_loss
    elif name.startswith("vector"):
        quantized, _, commit = model(leaf)
        loss = quantized.mean() + commit.sum()
    else:
        quantized, _, commit, _ = model(leaf)
        loss = quantized.mean() + commit.mean()
    loss.backward()


def speed(dim: int, count: int, rounds: int) -> list[dict]:
    """Inference and training step at one dimension, after the codes were compared."""
    torch.manual_seed(0)
    peers = make_peers(dim)
    z = torch.randn(1, dim, count)
    rows = z.transpose(1, 2).contiguous()
    with torch.no_grad():
        for model in peers.values():
            model.eval()
        codes = {name: encode(name, model, z, rows) for name, model in peers.items()}
        for name, found in codes.items():
            same = (found == codes["ours"]).float().mean().item()
            if same < 0.9999:  # rounding may break a tie
                raise SystemExit(f"dim {dim}: only {same:.4%} of the codes of {name} equal ours")
        calls = {n: (lambda n=n, m=m: encode(n, m, z, rows)) for n, m in peers.items()}
        found = rows_for(f"encode d{dim}", interleaved(calls, rounds))
    for model in peers.values():
        model.train()
    calls = {n: (lambda n=n, m=m: train_step(n, m, z, rows)) for n, m in peers.items()}
    return found + rows_for(f"training step d{dim}", interleaved(calls, rounds))


def batches_of(kind: str, seed: int) -> tuple[Callable[[int], torch.Tensor], torch.Tensor]:
    """A source of training rows (n, D), and held-out rows: mel frames or normal vectors."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal vectors":
        return lambda n: torch.randn(n, 32, generator=generator), torch.randn(
            16384, 32, generator=generator
        )
    corpus, to_mel = embedded_corpus("cpu"), LogMel(16000)
    train, test = (
        torch.cat([to_mel(u.wav) for u in part], dim=-1)[0].T
        for part in (corpus.split("train")[:500], corpus.split("test"))
    )
    mean, std = train.mean(dim=0), train.std()
    train, test = (train - mean) / std, (test - mean) / std
    return lambda n: train[torch.randint(len(train), (n,), generator=generator)], test


def quality(kind: str, steps: int, seed: int = 0, size: int = 256, levels: int = 4) -> list[dict]:
    """Both on the same batches with k-means start; error, use and perplexity on new data."""
    from vector_quantize_pytorch import ResidualVQ as LucidrainsRVQ

    draw, test = batches_of(kind, seed)
    dim = test.shape[1]
    torch.manual_seed(seed)
    ours = ResidualVQ(RVQConfig(dim=dim, n_q=levels, codebook_size=size))
    lucid = LucidrainsRVQ(
        dim=dim,
        num_quantizers=levels,
        codebook_size=size,
        decay=DECAY,
        kmeans_init=True,
        kmeans_iters=20,
    )
    with torch.no_grad():
        for _ in range(steps):
            batch = draw(2048)
            ours(batch.T[None])
            lucid(batch[None])
        ours.eval()
        lucid.eval()
        out, (theirs, codes, _) = ours(test.T[None]), lucid(test[None])
    results = {"ours": (out.quantized[0].T, out.codes[0]), "peer": (theirs[0], codes[0].T)}
    found = {}
    for name, (vectors, indices) in results.items():
        counts = torch.stack([torch.bincount(row, minlength=size) for row in indices]).float()
        found[name] = {
            "MSE": (vectors - test).pow(2).mean().item(),
            "codes used": (counts > 0).float().mean().item() * size,
            "perplexity": code_perplexity(counts).mean().item(),
        }
    return [
        {
            "case": f"{metric}, {kind}, seed {seed}",
            "ours": found["ours"][metric],
            "peer": "vector-quantize-pytorch",
            "peer_value": found["peer"][metric],
            "unit": "",
            "ratio": found["peer"][metric] / found["ours"][metric]
            if metric == "MSE"
            else found["ours"][metric] / found["peer"][metric],
        }
        for metric in found["ours"]
    ]


def main() -> None:
    chosen = options(__doc__)
    count, rounds = (1600, 3) if chosen.quick else (16000, 5)
    rows = [row for dim in (128, 1024) for row in speed(dim, count, rounds)]
    for kind in ("normal vectors",) if chosen.quick else ("mel frames", "normal vectors"):
        for seed in range(1 if chosen.quick else 3):
            rows += quality(kind, 60 if chosen.quick else 500, seed)
    report(rows, chosen.json, "vector-quantize-pytorch", "speechtokenizer")


if __name__ == "__main__":
    main()
