"""Run by the tests in one or two gloo processes: trains, and prints what came out.

python two_processes.py WORLD FOLDER linear|rvq|tokenizer|gpt
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp


def worker(rank: int, world: int, folder: str, what: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ["TEST_PORT"],
    }
    torch.set_num_threads(1)
    if what == "rvq":
        result = train_rvq(rank, world)
    else:
        trainings = {"linear": train_linear, "tokenizer": train_codec, "gpt": train_language_model}
        result = trainings[what](Path(folder))
    torch.save(result, Path(folder) / f"{what}-{world}-{rank}.pt")


def train_linear(folder: Path) -> dict:
    """A small model on the shared loop; DDP averages the gradients."""
    from speechlab.foundations.batches import SegmentBatches
    from speechlab.foundations.corpus import embedded_corpus
    from speechlab.foundations.training import TrainConfig, Trainer, cosine

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1600, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    batches = SegmentBatches(embedded_corpus("smoke"), 0.1, 4)
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        lambda m, b: (m(b.wav) - 1).pow(2).mean(),
        batches,
        TrainConfig(steps=6, accumulate=2, log_every=2, save_every=3),
        folder / f"run-{os.environ['WORLD_SIZE']}",
        cosine(6, 2),
    )
    history = trainer.fit()
    return {"weights": trainer.raw().state_dict(), "loss": [row["loss"] for row in history]}


def train_codec(folder: Path) -> dict:
    """A tokeniser with critics and distillation, without random choices; both optimisers step."""
    from speechlab.foundations.columns import Values
    from speechlab.foundations.corpus import embedded_corpus
    from speechlab.foundations.recipes import Optim
    from speechlab.foundations.training import TrainConfig
    from speechlab.tokenizer.codec_training import CodecRecipe
    from speechlab.tokenizer.discriminators import DiscriminatorsConfig
    from speechlab.tokenizer.frame_codec import FrameCodecConfig
    from speechlab.tokenizer.rvq import RVQConfig
    from speechlab.tokenizer.speech_tokenizer import SpeechTokenizerConfig

    corpus, rng = embedded_corpus("smoke"), torch.Generator().manual_seed(0)
    features = {
        entry.id: torch.randn(10, -(-entry.samples // 320), generator=rng).numpy()
        for entry in corpus.entries
    }
    recipe = CodecRecipe(
        optim=Optim(2e-3, 0, 0.05, (0.8, 0.99)),
        loop=TrainConfig(steps=6, log_every=2),
        batch_size=4,
        model=SpeechTokenizerConfig(
            FrameCodecConfig(dim=12, width=16, encoder_blocks=1, decoder_blocks=1),
            RVQConfig(dim=12, n_q=2, codebook_size=8, kmeans_iterations=0, revive_below=0.0),
            0,
        ),
        seconds=0.25,
        distill="t_axis",
        critics=DiscriminatorsConfig((3,), 0, (256,), period_width=2, stft_width=2),
        quantise_from=0.3,  # from the third step on
    )
    corpus = recipe.columns(corpus.with_values("teacher", Values(features, 320)))
    trainer = recipe.trainer(corpus, folder / f"run-{os.environ['WORLD_SIZE']}")
    history = trainer.fit()
    inner = [[row[n] if row["step"] > 2 else 0.0 for n in ("commit", "distill")] for row in history]
    losses = torch.tensor([[row["mel"], *more] for row, more in zip(history, inner)])
    weights = trainer.raw("generator").state_dict() | trainer.raw("critics").state_dict()
    return {"weights": weights, "losses": losses}


def train_language_model(folder: Path) -> dict:
    """A GPT on recordings of one length, whose mean over a batch is the mean over its shares."""
    from test_gpt import coded_corpus

    from speechlab.foundations.recipes import Optim
    from speechlab.foundations.training import TrainConfig
    from speechlab.foundations.transformer import TransformerConfig
    from speechlab.lm.gpt import GPTConfig
    from speechlab.lm.gpt_training import GPTRecipe
    from speechlab.lm.likelihood import likelihood

    rng = torch.Generator().manual_seed(0)
    corpus = coded_corpus([torch.randint(8, (1, 12), generator=rng) for _ in range(16)], 8)
    recipe = GPTRecipe(
        optim=Optim(1e-2, 1, 0.1, (0.9, 0.95), 0.1),
        loop=TrainConfig(6),
        batch_size=4,
        model=GPTConfig(body=TransformerConfig(16, 1, 2, context=32)),
    )
    model, history = recipe.train(folder / f"run-{os.environ['WORLD_SIZE']}", corpus)
    nll = likelihood(model, corpus).level()["nll"]
    return {"weights": model.state_dict(), "nll": nll, "train": history[-1]["nll"]}


def train_rvq(rank: int, world: int) -> dict:
    """Codebooks on shares of one batch: first without random choices, then with all of them."""
    import torch.distributed as dist

    from speechlab.tokenizer.rvq import ResidualVQ, RVQConfig

    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for name, settings in {
        "fixed": {"kmeans_iterations": 0, "revive_below": 0.0},
        "random": {"kmeans_iterations": 5, "revive_below": 0.5, "decay": 0.9},
    }.items():
        torch.manual_seed(0)
        rvq = ResidualVQ(RVQConfig(dim=4, n_q=3, codebook_size=16, **settings))
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(100 + rank)  # ranks draw differently, as in real training
        for _ in range(30):
            z = torch.randn(4, 4, 25, generator=generator) + 1
            rvq(z[rank::world])
        found[name] = dict(rvq.state_dict().items())
    if world > 1:
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    world, folder, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if world == 1:
        worker(0, 1, folder, what)
    else:
        mp.spawn(worker, (world, folder, what), nprocs=world)
