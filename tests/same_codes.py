"""When are codes the same? Where two code vectors are equally near, rounding may choose either."""

from __future__ import annotations

import torch
from torch import Tensor


def code_differences(
    quantizer,  # a ResidualVQ
    z: Tensor,  # (B, D, T), what was quantised
    codes: Tensor,  # (B, n_q, T), one choice
    others: Tensor,  # (B, n_q, T), another choice
    slack: float = 1e-5,
) -> tuple[int, int]:  # frames that differ by a tie, frames that differ otherwise
    """Per frame, look at the first level that differs: is the other choice (nearly) as near?

    In float64, d(chosen) - d(nearest) <= slack * (|r|^2 + |e|^2) must hold for both choices;
    deeper levels of that frame quantise another residual and say nothing.
    """
    assert codes.shape == others.shape
    ties = faults = 0
    different = (codes != others).any(dim=1)
    for row, frame in different.nonzero().tolist():
        residual = z[row, :, frame].double()
        for level, book in enumerate(quantizer.codebooks()):
            one, two = int(codes[row, level, frame]), int(others[row, level, frame])
            book = book.double()
            if one == two:
                residual = residual - book[one]
                continue
            distances = (residual - book).square().sum(dim=1)
            room = slack * (residual.square().sum() + book.square().sum(dim=1).max())
            near = all(distances[c] - distances.min() <= room for c in (one, two) if c >= 0)
            ties, faults = (ties + 1, faults) if near and min(one, two) >= 0 else (ties, faults + 1)
            break
    return ties, faults


def assert_codes_agree(quantizer, z: Tensor, codes: Tensor, others: Tensor, most=0.01) -> None:
    """All frames are the same, but for ties in fewer than `most` of them."""
    ties, faults = code_differences(quantizer, z, codes, others)
    frames = codes.shape[0] * codes.shape[2]
    assert not faults, f"{faults} of {frames} frames have codes that are not nearest"
    assert ties <= max(1, most * frames), f"{ties} ties in {frames} frames"


@torch.no_grad()
def assert_same_codes(model, wav: Tensor, others: Tensor, most=0.01) -> None:
    """The codes of a SpeechTokenizer for a wave, and others that should be the same."""
    z = model.encoder(wav)
    codes = model.quantizer.encode(z, others.shape[1])
    assert_codes_agree(model.quantizer, z, codes, others, most)
