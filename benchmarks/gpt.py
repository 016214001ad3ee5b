"""Our GPT against transformers' GPT2LMHeadModel: the same weights, the same tokens.

    python benchmarks/gpt.py [--json] [--quick] [--threads N]

3.8 M parameters (4 layers of 256, a vocabulary of 1026). Generation is greedy, 16 tokens of prompt
and 256 new ones, with a cache on both sides, at batch 1 and 16; the tokens are compared first. It
runs on one thread: at this size a second one only costs. A training step is forward, backward and
AdamW on 8 x 256 tokens, in fp32 and under bf16 autocast; the logits are compared first. Rows that
end in "compiled" use torch.compile on both sides; "peer in fp32" compares our bf16 with its fp32.
"""

from __future__ import annotations

import warnings

import torch
import transformers
from common import interleaved, options, report, rows_for

from speechlab.foundations.recipes import Optim
from speechlab.foundations.sampling import Sampling
from speechlab.lm.generation import Generator
from speechlab.lm.gpt import GPT
from speechlab.lm.gpt_training import matrices_decay

CODES, PROMPT = 1024, 16


def make_pair(device: str = "cpu") -> tuple[GPT, transformers.GPT2LMHeadModel]:
    """The peer, with weights far enough from zero to be sure of its choices, and its copy."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=CODES + 2, n_positions=512, n_embd=256, n_layer=4, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=CODES + 1, eos_token_id=CODES,
        pad_token_id=CODES, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    peer = transformers.GPT2LMHeadModel(config).eval()
    return GPT.from_gpt2(peer).to(device), peer.to(device)


def generation(ours: GPT, peer, batch: int, new: int) -> dict:
    """Both ways to write `new` tokens after the same prompts."""
    prompts = torch.randint(CODES, (batch, 1, PROMPT))
    start = torch.full((batch, 1), CODES + 1)
    ids = torch.cat([start, prompts[:, 0]], dim=1).to(peer.device)
    greedy = Sampling(temperature=0)

    def mine() -> torch.Tensor:
        writer = Generator(ours, prompts, new, greedy, min_frames=new)
        for _ in writer:
            pass
        return torch.tensor([row.codes[0][PROMPT:] for row in writer.rows])

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            found = peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                min_new_tokens=new, suppress_tokens=[CODES + 1], use_cache=True,
            )  # fmt: skip
        return found[:, PROMPT + 1 :]

    same = (mine() == theirs()).float().mean()
    if same < 0.99:  # a tie may fall either way, and then all that follows differs
        warnings.warn(f"batch {batch}: only {same:.1%} of the tokens agree", stacklevel=2)
    return {"ours": mine, "transformers": theirs}


def training(ours: GPT, peer, bf16: bool, rows: int, length: int, compiled: bool) -> dict:
    """One optimiser step of each."""
    codes = torch.randint(CODES, (rows, 1, length))
    ids = torch.cat([torch.full((rows, 1), CODES + 1), codes[:, 0]], dim=1).to(peer.device)
    codes = codes.to(peer.device)
    optimizers = {
        "ours": matrices_decay(ours, Optim(1e-4, betas=(0.9, 0.95), weight_decay=0.1)),
        "theirs": torch.optim.AdamW(
            peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        ),
    }
    forward = {"ours": ours, "theirs": peer}
    if compiled:
        forward = {name: torch.compile(model) for name, model in forward.items()}

    wanted = torch.nn.functional.pad(codes[:, 0], (0, 1), value=CODES)  # then comes the end

    def loss_of(name: str) -> torch.Tensor:
        with torch.autocast(peer.device.type, torch.bfloat16, enabled=bf16):
            if name == "theirs":
                return forward[name](input_ids=ids, labels=ids).loss
            logits = forward[name](codes)[:, 0]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())

    def step(name: str) -> None:
        loss_of(name).backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)

    with torch.no_grad():  # the peer has logits of its start token too
        apart = (ours(codes)[:, 0] - peer(ids).logits[..., :-1]).abs().max()
    if apart > 1e-2:
        warnings.warn(f"logits differ by {float(apart):.4f}", stacklevel=2)
    return {"ours": lambda: step("ours"), "transformers": lambda: step("theirs")}


def main() -> None:
    chosen = options(__doc__)
    new, rounds, rows, length = (16, 1, 2, 32) if chosen.quick else (256, 7, 8, 256)
    results = []
    torch.set_num_threads(1)
    for batch in (1, 16):
        ours, peer = make_pair(chosen.device)
        times = interleaved(generation(ours, peer, batch, new), rounds)
        speeds = {name: batch * new / seconds for name, seconds in times.items()}
        for row in rows_for(f"generate, batch {batch}", times):
            row |= {"ours": speeds["ours"], "peer_value": speeds["transformers"], "unit": " tok/s"}
            results.append(row)  # the ratio stays: above 1, ours is faster
    torch.set_num_threads(chosen.threads)
    for name, bf16, compiled in (
        ("fp32", False, False),
        ("bf16", True, False),
        ("fp32, compiled", False, True),
        ("bf16, compiled", True, True),
    ):
        if chosen.quick and compiled:
            continue
        ours, peer = make_pair(chosen.device)
        calls = training(ours.train(), peer.train(), bf16, rows, length, compiled)
        times = interleaved(calls, rounds)
        results += rows_for(f"training step, {name}", times)
        if name == "fp32":
            plain = times["transformers"]
        elif name == "bf16":
            mixed = {"ours": times["ours"], "transformers": plain}
            results += rows_for("training step, bf16, peer in fp32", mixed)
    report(results, chosen.json, "transformers", device=chosen.device)


if __name__ == "__main__":
    main()
