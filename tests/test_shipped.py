"""Shipped checkpoints give what they gave before the migration to strict models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from same_codes import assert_same_codes

from speechlab import load
from speechlab.foundations.models import shipped_models
from speechlab.lm.hybrid import CausalMel
from speechlab.metis.ssl_tokens import SpeechToTokens
from speechlab.tts.fastspeech2 import Prosody

BEFORE = load_file(Path(__file__).parent / "data" / "golden.safetensors")
CODECS = ("speechtokenizer-small", "encodec-small", "small-causal", "music-causal")


@pytest.fixture(scope="module")
def wav():
    """A second and a half of a gliding, pulsing tone with noise: the same on every machine."""
    t, rng = np.arange(24000) / 16000, np.random.default_rng(5)
    pitch = 110 + 40 * np.sin(2 * np.pi * 0.7 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    x = sum(np.sin(k * phase) / k for k in range(1, 12)) * (
        0.2 + 0.15 * np.sin(2 * np.pi * 2.3 * t)
    )
    x += 0.01 * rng.standard_normal(24000)
    x[8000:9600] = 0.002 * rng.standard_normal(1600)
    return torch.from_numpy((0.5 * x / np.abs(x).max()).astype(np.float32)).view(1, 1, -1)


@pytest.mark.parametrize("name", CODECS)
def test_codes_and_waves(name, wav):
    model, before = load(name), BEFORE[f"{name}.codes"].long()
    assert_same_codes(model, wav, before)
    made = model.decode(before, wav.shape[-1])
    torch.testing.assert_close(made, BEFORE[f"{name}.wav"].float(), atol=2e-3, rtol=0)


@torch.no_grad()
def test_language_models(wav):
    codes = BEFORE["small-causal.codes"][:, :, :20].long()
    gpt, hybrid = load("gpt-small"), load("hybrid-small")
    mel = CausalMel(**hybrid.config.framing)(wav)[..., :20]
    for name, logits in (("gpt-small", gpt(codes)), ("hybrid-small", hybrid(codes, None, mel))):
        wanted = BEFORE[f"{name}.logits"].float()
        torch.testing.assert_close(logits[..., :8, :], wanted, atol=2e-2, rtol=2e-3)
    assert gpt.config.codes == load("small-causal").spec


@torch.no_grad()
def test_judges_and_teachers(wav):
    for name in ("phone-recognizer", "character-recognizer"):
        found = load(name)(wav)[:, ::8]
        torch.testing.assert_close(found, BEFORE[f"{name}.scores"].float(), atol=2e-2, rtol=2e-3)
    found = load("speaker-encoder")(wav)
    torch.testing.assert_close(found, BEFORE["speaker-encoder.vector"].float(), atol=1e-3, rtol=0)
    for name in ("tiny-hubert", "tiny-hubert-ft"):
        found = load(name)(wav)[:, ::8]
        torch.testing.assert_close(found, BEFORE[f"{name}.features"].float(), atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_metis(wav):
    tokens = BEFORE["ssl-tokens-small.tokens"].long()
    reader = SpeechToTokens.load("ssl-tokens-small")
    assert (reader.encode(wav)[0, 0] == tokens).float().mean() > 0.95  # ties may fall either way
    rebuilt = reader.tokenizer.decode(tokens[None])[:, ::8]
    torch.testing.assert_close(rebuilt, BEFORE["ssl-tokens-small.features"].float(), atol=5e-3,
                               rtol=5e-3)  # fmt: skip
    for name, found in metis_logits(tokens).items():
        wanted = BEFORE[f"{name}.logits"].float()
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-3)
    assert load("metis-small").config.tokens == reader.spec
    assert load("metis-acoustic-small").config.codes == load("speechtokenizer-small").spec


def metis_logits(tokens) -> dict:
    """What both stages predict of hidden places, every eighth logit of a few."""
    writer, acoustic = load("metis-small"), load("metis-acoustic-small")
    codes, n = BEFORE["speechtokenizer-small.codes"].long(), len(tokens)
    mask, time = (torch.arange(n) % 3 == 0).unsqueeze(0), torch.tensor([0.4])
    hidden = tokens[None].masked_fill(mask, writer.mask_id)
    prompt = torch.arange(n).unsqueeze(0) < 10
    finer = acoustic(codes, 2, mask, time, tokens[None], prompt)
    return {"metis-small": writer(hidden, time)[:, ::9, ::8],
            "metis-acoustic-small": finer[:, ::9, ::8]}  # fmt: skip


@torch.no_grad()
def speech(mel: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What the voice draws of thirty phones, and the sound of some of it (or of a stored mel)."""
    phones = torch.stack([torch.arange(1, 31), torch.arange(30) % 3])[None]
    prosody = Prosody(torch.full((1, 30), 6), torch.full((1, 30), 5.0), torch.full((1, 30), -3.0))
    drawn = load("fastspeech2-small")(phones, torch.tensor([3]), None, prosody)
    mel = drawn.refined[..., 60:84] if mel is None else mel
    return {
        "fastspeech2-small.mel": drawn.refined[:, ::4, ::2],
        "fastspeech2-small.prosody": drawn.predicted,
        "vocoder-small.mel": mel,
        "vocoder-small.wav": load("vocoder-small")(mel)[..., ::3],
    }


def test_text_to_speech():
    found = speech(BEFORE["vocoder-small.mel"].float())
    for name, value in found.items():
        torch.testing.assert_close(value, BEFORE[name].float(), atol=5e-3, rtol=5e-3)
    assert load("vocoder-small").config.mel == load("fastspeech2-small").config.mel


def test_every_shipped_model_is_compared():
    assert set(shipped_models()) == {name.rsplit(".", 1)[0] for name in BEFORE}
