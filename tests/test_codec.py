"""Encoders and decoders: lengths, masks, causality, pieces, receptive field."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from same_codes import assert_codes_agree, assert_same_codes

from speechlab.foundations.batches import pad_last
from speechlab.foundations.contracts import frames_of, mask_of
from speechlab.foundations.convolution import (
    Activation,
    PaddedConv,
    PaddedConvTranspose,
    pad_ends,
    pad_rows,
)
from speechlab.foundations.models import fold_weight_norm, read_config
from speechlab.tokenizer.frame_codec import FrameCodecConfig, make_codec
from speechlab.tokenizer.rvq import ResidualVQ, RVQConfig
from speechlab.tokenizer.seanet import SEANetConfig, receptive_field
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer, SpeechTokenizerConfig

NARROW = {"dim": 12, "n_filters": 2}
CONFIGS = {
    "official form": SEANetConfig(**NARROW),
    "causal": SEANetConfig(**NARROW, lstm_layers=0, causal=True, pad_mode="constant"),
    "causal with LSTM": SEANetConfig(
        **NARROW, lstm_layers=1, bidirectional=False, causal=True, pad_mode="constant"
    ),
    "Snake, two residual": SEANetConfig(**NARROW, activation="Snake", n_residual_layers=2),
    "odd strides": SEANetConfig(**NARROW, strides=(5, 3, 7), lstm_layers=0),
    "frames": FrameCodecConfig(dim=12, width=16, encoder_blocks=2, decoder_blocks=2),
    "causal frames": FrameCodecConfig(
        dim=12, width=16, encoder_blocks=2, decoder_blocks=2, causal=True
    ),
}
each = pytest.mark.parametrize("name", CONFIGS)


def codec(name):
    torch.manual_seed(0)
    encoder, decoder = make_codec(CONFIGS[name])
    return encoder.eval(), decoder.eval(), CONFIGS[name].hop_length


def noise(samples, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(batch, 1, samples, generator=generator)


@each
@given(samples=st.integers(1, 4000))
def test_any_length_gives_exact_frames(name, samples):
    encoder, decoder, hop = codec(name)
    with torch.no_grad():
        z = encoder(noise(samples))
        assert z.shape == (1, 12, -(-samples // hop))
        assert decoder(z).shape == (1, 1, z.shape[-1] * hop)
        assert torch.isfinite(z).all()


@each
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=4))
def test_a_padded_batch_equals_each_alone(name, lengths):
    encoder, decoder, hop = codec(name)
    signals = [noise(n, seed=i) for i, n in enumerate(lengths)]
    batch = torch.cat([F.pad(s, (0, max(lengths) - s.shape[-1])) for s in signals])
    sizes = torch.tensor(lengths)
    with torch.no_grad():
        z = encoder(batch, sizes)
        frames = -(-sizes // hop)
        sound = decoder(z, frames)
        for row, signal in enumerate(signals):
            alone, count = encoder(signal), int(frames[row])
            torch.testing.assert_close(z[row : row + 1, :, :count], alone, atol=1e-4, rtol=1e-3)
            assert (z[row, :, count:] == 0).all()
            wanted = decoder(alone)
            found = sound[row : row + 1, :, : count * hop]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
            assert (sound[row, :, count * hop :] == 0).all()


@pytest.mark.parametrize("name", ["causal", "causal with LSTM", "causal frames"])
@given(frame=st.integers(1, 8), seed=st.integers(0, 99))
def test_causal_forms_do_not_see_the_future(name, frame, seed):
    encoder, decoder, hop = codec(name)
    wav, changed = noise(3000, seed), noise(3000, seed)
    cut = frame * hop
    changed[..., cut:] = noise(3000 - cut, seed + 100) if cut < 3000 else changed[..., cut:]
    with torch.no_grad():
        one, two = encoder(wav), encoder(changed)
        assert torch.equal(one[..., :frame], two[..., :frame])
        assert not torch.equal(one, two) or cut >= 3000
        later = one.clone()
        later[..., frame:] += 1
        assert torch.equal(decoder(one)[..., :cut], decoder(later)[..., :cut])


def test_centred_forms_do_see_the_future():
    """The test above could not fail if nothing depended on anything."""
    for name in ("official form", "frames"):
        encoder, _, hop = codec(name)
        wav, changed = noise(3000), noise(3000)
        changed[..., 3 * hop :] = 0
        with torch.no_grad():
            assert not torch.equal(encoder(wav)[..., :3], encoder(changed)[..., :3])


@each
@pytest.mark.parametrize("samples", [31999, 32001, 70000, 96005])
def test_pieces_equal_one_pass(name, samples):
    encoder, decoder, _ = codec(name)
    wav = noise(samples)
    whole = encoder(wav)
    sound = decoder(whole)
    with torch.no_grad():
        torch.testing.assert_close(encoder.infer(wav), whole.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(decoder.infer(whole), sound.detach(), atol=1e-5, rtol=1e-4)


@each
@settings(max_examples=10)
@given(st.lists(st.integers(1, 90_000), min_size=2, max_size=4), st.booleans())
def test_pieces_of_ragged_rows_equal_each_alone(name, lengths, together):
    """Rows end before, at and behind the seams; one that has ended leaves the batch."""
    encoder, decoder, hop = codec(name)
    if together:  # as on a GPU; the processor takes one row after the other
        encoder._row_by_row = decoder._row_by_row = lambda x: False
    rows = [noise(n) for n in (32_000, *lengths)]
    wav, sizes = pad_last([row[0] for row in rows])
    with torch.no_grad():
        z = encoder.infer(wav, sizes)
        frames = frames_of(sizes, hop)
        sound = decoder.infer(z, frames)
        for row, mine, heard, n in zip(rows, z, sound, frames.tolist()):
            alone = encoder(row)[0]
            torch.testing.assert_close(mine[:, :n], alone, atol=1e-5, rtol=1e-4)
            wanted = decoder(alone[None])[0]
            torch.testing.assert_close(heard[:, : n * hop], wanted, atol=1e-5, rtol=1e-3)
            assert not mine[:, n:].any()
            assert not heard[:, n * hop :].any()


@each
def test_gradients_change_no_number(name):
    """One pass is one pass, whether gradients are wanted or not."""
    encoder, decoder, _ = codec(name)
    wav = noise(40001)
    whole, pieces = encoder(wav), encoder.infer(wav)
    sound, parts = decoder(whole), decoder.infer(whole)
    with torch.no_grad():
        torch.testing.assert_close(encoder(wav), whole.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(encoder.infer(wav), pieces.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(decoder(whole), sound.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(decoder.infer(whole), parts.detach(), atol=1e-6, rtol=1e-5)


@each
def test_folding_changes_nothing(name):
    encoder, decoder, _ = codec(name)
    with torch.no_grad():
        before = decoder(encoder(noise(2500)))
        fold_weight_norm(encoder)
        fold_weight_norm(decoder)
        torch.testing.assert_close(decoder(encoder(noise(2500))), before, atol=1e-6, rtol=1e-5)
    for half in (encoder, decoder):
        assert not [key for key in half.state_dict() if "parametrizations" in key]


@given(
    length=st.integers(1, 40), left=st.integers(0, 9), right=st.integers(0, 9), seed=st.integers(0)
)
def test_padding_is_reflection(length, left, right, seed):
    """Against an index written as in the definition, sample by sample."""
    x = torch.randn(1, 2, length, generator=torch.Generator().manual_seed(seed % 1000)).double()
    padded = pad_ends(x, left, right)
    longer = F.pad(x, (0, max(0, max(left, right) + 1 - length)))
    last = longer.shape[-1] - 1
    for place in range(left + length + right):
        source = abs(place - left)
        source = source if source <= last else 2 * last - source
        assert torch.equal(padded[..., place], longer[..., source])
    if max(left, right) < length:
        assert torch.equal(padded, F.pad(x, (left, right), mode="reflect"))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    left=st.integers(0, 6),
    right=st.integers(0, 6),
    stride=st.integers(1, 5),
)
def test_row_padding_equals_padding_alone(lengths, left, right, stride):
    sizes = torch.tensor(lengths)
    x = torch.randn(len(lengths), 2, max(lengths)) * mask_of(sizes, max(lengths))[:, None]
    together = pad_rows(x, left, right, sizes, stride)
    for row, length in enumerate(lengths):
        alone = pad_ends(x[row : row + 1, :, :length], left, right + (-length % stride))
        assert torch.equal(together[row, :, : alone.shape[-1]], alone[0])


def test_elu_is_elu_and_leaves_its_input_alone():
    layer = Activation("ELU", 3)
    x = torch.randn(1, 3, 70_001) * 5
    kept = x.clone()
    lengths = torch.tensor([70_001])
    found, same = layer(x, lengths)
    torch.testing.assert_close(found, F.elu(kept), atol=1e-6, rtol=1e-5)
    assert torch.equal(x, kept)
    assert same is lengths
    transposed = torch.randn(50, 40).T
    torch.testing.assert_close(layer(transposed)[0], F.elu(transposed), atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.step(x)[0], found)


def test_receptive_field_is_what_a_gradient_sees():
    for strides, layers in (((8, 5, 4, 2), 1), ((5, 2), 2), ((4, 3), 1)):
        config = SEANetConfig(
            dim=4, n_filters=2, strides=strides, n_residual_layers=layers, lstm_layers=0
        )
        torch.manual_seed(0)
        encoder = make_codec(config)[0].double()
        samples = 4 * receptive_field(config)
        wav = torch.randn(1, 1, samples, dtype=torch.double, requires_grad=True)
        z = encoder(wav)
        z[0, :, z.shape[-1] // 2].sum().backward()
        seen = wav.grad[0, 0].nonzero().flatten()
        assert int(seen.max() - seen.min()) + 1 == receptive_field(config)


def test_transposed_convolution_upsamples_exactly():
    for stride in (2, 3, 8):
        for causal in (False, True):
            layer = PaddedConvTranspose(2, 3, stride, causal)
            assert layer(torch.randn(1, 2, 9))[0].shape == (1, 3, 9 * stride)


def test_dilated_convolution_keeps_the_length():
    for causal in (False, True):
        layer = PaddedConv(2, 2, 3, dilation=4, causal=causal)
        assert layer(torch.randn(1, 2, 21))[0].shape == (1, 2, 21)


def from_json(text):
    return read_config(SpeechTokenizerConfig, text)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SEANetConfig(dim=0), "dim is 0"),
        (lambda: SEANetConfig(strides=(1, 4)), "strides is"),
        (lambda: SEANetConfig(strides=()), "strides is"),
        (lambda: SEANetConfig(pad_mode="zeros"), "pad_mode is 'zeros'"),
        (lambda: SEANetConfig(causal=True), "reflection looks ahead"),
        (
            lambda: SEANetConfig(causal=True, pad_mode="constant"),
            "bidirectional LSTM is not causal",
        ),
        (lambda: make_codec(SEANetConfig(activation="ReLU")), "activation is 'ReLU'"),
        (lambda: FrameCodecConfig(n_fft=400), "n_fft 400"),
        (lambda: FrameCodecConfig(kernel_size=4), "kernel_size is 4"),
        (lambda: FrameCodecConfig(width=0), "width is 0"),
        (lambda: from_json('{"codec": {"kind": "wavelet"}}'), "codec.*kind.*'seanet'"),
        (lambda: from_json('{"codec": {"kind": null}}'), "codec.*kind.*'seanet'"),
    ],
)
def test_bad_settings(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# The helper by which tests compare codes


def quantizer():
    """Two levels; the first two codes of each are as far from 0 on either side."""
    torch.manual_seed(0)
    rvq = ResidualVQ(RVQConfig(dim=4, n_q=2, codebook_size=8, kmeans_iterations=0)).eval()
    for level in rvq.levels:
        level.embed.copy_(F.normalize(torch.randn(8, 4), dim=1) * 3)
        level.embed[:2] = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    return rvq


def test_a_planted_fault_is_found():
    rvq, z = quantizer(), torch.randn(2, 4, 150, generator=torch.Generator().manual_seed(1))
    codes = rvq.encode(z)
    assert_codes_agree(rvq, z, codes, codes.clone())
    for row, level, frame in ((0, 0, 0), (1, 0, 149), (0, 1, 77), (1, 1, 5)):
        residual = z[row, :, frame] - sum(rvq.codebooks()[i][codes[row, i, frame]]
                                          for i in range(level))  # fmt: skip
        far = int((rvq.codebooks()[level] - residual).square().sum(dim=1).argmax())
        for wrong in (far, -1):
            others = codes.clone()
            others[row, level, frame] = wrong
            for pair in ((codes, others), (others, codes)):
                with pytest.raises(AssertionError, match="1 of 300 frames"):
                    assert_codes_agree(rvq, z, *pair)
    with pytest.raises(AssertionError):
        assert_codes_agree(rvq, z, codes, codes[..., :-1])


def test_a_planted_tie_passes_but_not_many():
    rvq, z = quantizer(), torch.randn(1, 4, 300, generator=torch.Generator().manual_seed(1))
    z[..., 9] = 0  # as far from code 0 as from code 1
    codes = rvq.encode(z)
    others = codes.clone()
    others[0, 0, 9] = 1 - codes[0, 0, 9]  # the other side; what follows quantises another rest
    others[0, 1, 9] = (others[0, 1, 9] + 1) % 8
    assert_codes_agree(rvq, z, codes, others)
    assert_codes_agree(rvq, z, others, codes)
    z[0, 0, 9] = 1e-3  # a thousandth off the middle is no tie
    with pytest.raises(AssertionError, match="1 of 300 frames"):
        assert_codes_agree(rvq, z, codes, others)
    ties = torch.zeros_like(z)
    codes = rvq.encode(ties)
    with pytest.raises(AssertionError, match="300 ties in 300 frames"):
        assert_codes_agree(rvq, ties, codes, torch.cat([1 - codes[:, :1], codes[:, 1:]], dim=1))


def test_a_planted_fault_is_found_through_a_model():
    torch.manual_seed(0)
    rvq = RVQConfig(dim=12, n_q=3, codebook_size=16)
    model = SpeechTokenizer(SpeechTokenizerConfig(CONFIGS["frames"], rvq, 0))
    with torch.no_grad():
        model.train()(noise(32000, seed=9, batch=2).clamp(-1, 1))
    model.eval()
    wav = noise(32000).clamp(-1, 1)
    codes = model.encode(wav)
    assert_same_codes(model, wav, codes)
    z = model.encoder(wav)[0, :, 40]
    far = (model.codebooks()[0] - z).square().sum(dim=1).argmax()
    codes[0, 0, 40] = far
    with pytest.raises(AssertionError, match="1 of 100 frames"):
        assert_same_codes(model, wav, codes)
