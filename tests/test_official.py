"""Parity with the official `speechtokenizer` package, on the same random weights."""

from __future__ import annotations

import io
import math
import pickle

import pytest
import torch
from same_codes import assert_codes_agree

from benchmarks.codec import CONFIG as FULL
from benchmarks.codec import make_pair
from speechlab.foundations.store import CheckpointError
from speechlab.tokenizer.discriminators import (
    PeriodDiscriminator,
    ScaleDiscriminator,
    STFTDiscriminator,
)
from speechlab.tokenizer.official import load_official
from speechlab.tokenizer.speech_tokenizer import CONFIGS, SpeechTokenizer

official = pytest.importorskip("speechtokenizer", reason="the bench extra is not installed")

NARROW = FULL | {"n_filters": 4, "dimension": 64, "semantic_dimension": 48, "codebook_size": 128}
VARIANTS = {
    "narrow": NARROW,
    "snake": NARROW | {"activation": "Snake"},
    "two residual layers": NARROW | {"n_residual_layers": 2},
    "other strides, one direction": NARROW | {"strides": [5, 3, 2], "bidirectional": False},
    "no projection": NARROW | {"semantic_dimension": 64},
}
LENGTHS = (16001, 7399, 333)  # none is a multiple of a hop


def compare(peer, ours, length):
    wav = 0.3 * torch.rand(2, 1, length, generator=torch.Generator().manual_seed(length)) - 0.15
    with torch.no_grad():
        z, wanted = ours.encoder(wav), peer.encoder(wav)
        torch.testing.assert_close(z, wanted, atol=1e-5, rtol=1e-4)
        codes, theirs = ours.encode(wav), peer.encode(wav).transpose(0, 1)
        assert_codes_agree(ours.quantizer, z, codes, theirs)
        assert codes.unique().numel() > 10  # no trivial agreement
        sound, expected = ours.decode(codes), peer.decode(codes.transpose(0, 1))
        assert (sound - expected).abs().max() <= 1e-4
        rebuilt, _, feature = peer(wav)
        out = ours(wav)
        torch.testing.assert_close(out.semantic, feature, atol=1e-4, rtol=1e-4)
        assert (out.wav - rebuilt[..., :length]).abs().max() <= 1e-4
        assert sound.shape[-1] == rebuilt.shape[-1]  # theirs is not cut to the input's length


@pytest.mark.parametrize("name", VARIANTS)
def test_official_weights_give_official_outputs(tmp_path, name):
    if "semantic_dimension" in name or VARIANTS[name]["semantic_dimension"] == 64:
        peer, ours = make_pair(tmp_path, VARIANTS[name])
        wav = torch.randn(1, 1, 5001) * 0.1
        with torch.no_grad():
            torch.testing.assert_close(ours(wav).semantic, peer(wav)[2], atol=1e-5, rtol=1e-4)
        return
    peer, ours = make_pair(tmp_path, VARIANTS[name])
    for length in LENGTHS:
        compare(peer, ours, length)


def test_folding_weight_norm_changes_nothing(tmp_path):
    peer, ours = make_pair(tmp_path, NARROW)
    ours.fold()
    assert not [name for name, _ in ours.named_parameters() if "original" in name]
    for length in LENGTHS:
        compare(peer, ours, length)


@pytest.mark.slow
def test_full_size(tmp_path):
    peer, ours = make_pair(tmp_path, FULL)
    state = peer.state_dict()
    assert len(state) == 166  # as published
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    for length in LENGTHS:
        compare(peer, ours, length)


def test_the_official_config_is_the_published_topology():
    with torch.device("meta"):
        ours = SpeechTokenizer(CONFIGS["official"])
        peer = official.SpeechTokenizer(FULL)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    assert round(count / 1e6, 2) == 103.68


def test_losses_of_the_official_code():
    from speechtokenizer.trainer import loss as theirs

    from speechlab.tokenizer.distillation import d_axis_loss
    from speechlab.tokenizer.losses import adversarial_loss, discriminator_loss, feature_loss

    torch.manual_seed(0)
    real, fake = [[torch.randn(2, n) for n in (7, 5)] for _ in range(2)]
    maps, other = [[[torch.randn(2, 3, 4), torch.randn(2, 5)] for _ in range(2)] for _ in range(2)]
    assert torch.isclose(
        discriminator_loss(real, fake, "lsgan"), theirs.discriminator_loss(real, fake)
    )
    assert torch.isclose(adversarial_loss(fake, "lsgan"), theirs.adversarial_loss(fake))
    assert torch.isclose(
        feature_loss(maps, other, normalise=False), theirs.feature_loss(maps, other)
    )
    student, teacher = torch.randn(2, 9, 6), torch.randn(2, 9, 6)
    assert torch.isclose(
        d_axis_loss(student, teacher), theirs.d_axis_distill_loss(student, teacher)
    )


def same_weights(ours, peer):
    """Copy the peer's weights into ours, in order; both list their layers from input to output."""
    from torch.nn.utils import remove_weight_norm
    from torch.nn.utils.parametrize import remove_parametrizations

    mine = [*ours.convs, ours.score]
    peers = [m for m in peer.modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.Conv2d))]
    assert len(mine) == len(peers)
    for one, two in zip(mine, peers):
        if hasattr(two, "weight_g"):
            remove_weight_norm(two)
        if hasattr(one, "parametrizations"):
            remove_parametrizations(one, "weight")
        assert one.weight.shape == two.weight.shape
        assert (one.stride, one.padding, one.dilation) == (two.stride, two.padding, two.dilation)
        one.load_state_dict({"weight": two.weight.detach(), "bias": two.bias.detach()})


def test_critics_are_the_official_ones():
    from speechtokenizer import discriminators as theirs

    wav = torch.randn(2, 1, 4001, generator=torch.Generator().manual_seed(0)) * 0.1
    cases = [
        (PeriodDiscriminator(7), theirs.DiscriminatorP(7)),
        (ScaleDiscriminator(), theirs.DiscriminatorS()),
        (
            STFTDiscriminator(512),
            theirs.DiscriminatorSTFT(32, n_fft=512, hop_length=128, win_length=512),
        ),
    ]
    for ours, peer in cases:
        same_weights(ours, peer)
        with torch.no_grad():
            score, features = ours(wav)
            expected, maps = peer(wav)
        torch.testing.assert_close(score, expected.flatten(1), atol=1e-5, rtol=1e-4)
        assert len(features) == len(maps)
        for one, two in zip(features, maps):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


class Evil:
    """Unpickling this would call a function."""

    def __reduce__(self):
        return (print, ("a pickle ran code",))


def pickled(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), weights_only=True)


def test_an_official_model_goes_through_our_files(tmp_path):
    """Its config is hashable and comes back equal; a loaded model is saved and loaded again."""
    _, ours = make_pair(tmp_path, NARROW)
    hash(ours.config)
    ours.save(tmp_path / "a")
    again = SpeechTokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")  # its weights are folded
    assert SpeechTokenizer.load(tmp_path / "b").config == ours.config
    wav = 0.1 * torch.randn(1, 1, 3000)
    assert torch.equal(again.encode(wav), SpeechTokenizer.load(tmp_path / "b").encode(wav))


def test_foreign_checkpoints_are_refused(tmp_path, capsys):
    _, _ = make_pair(tmp_path, NARROW)
    config, checkpoint = tmp_path / "config.json", tmp_path / "SpeechTokenizer.pt"
    whole = checkpoint.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"RIFF" + whole[:100], pickle.dumps(Evil())):
        checkpoint.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"SpeechTokenizer\.pt"):
            load_official(config, checkpoint)
    torch.save({"encoder": Evil()}, checkpoint)
    with pytest.raises(CheckpointError, match="safely"):
        load_official(config, checkpoint)
    assert "ran code" not in capsys.readouterr().out
    torch.save({"encoder.model.0.conv.conv.bias": torch.zeros(3)}, checkpoint)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_official(config, checkpoint)
    state = pickled(whole)
    state[next(name for name in state if name.endswith("bias"))].fill_(math.nan)
    torch.save(state, checkpoint)
    with pytest.raises(CheckpointError, match="NaN"):
        load_official(config, checkpoint)
    torch.save([torch.zeros(3)], checkpoint)
    with pytest.raises(CheckpointError, match="dictionary"):
        load_official(config, checkpoint)
    checkpoint.write_bytes(whole)
    config.write_text("{}")
    with pytest.raises(CheckpointError, match="n_filters"):
        load_official(config, checkpoint)
