"""Streams equal one pass; pieces equal one pass; an hour takes no more memory than a minute."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same_codes import assert_same_codes

from speechlab.foundations.convolution import map_past
from speechlab.tokenizer.frame_codec import FrameCodecConfig
from speechlab.tokenizer.seanet import SEANetConfig
from speechlab.tokenizer.speech_tokenizer import CONFIGS, SpeechTokenizer, SpeechTokenizerConfig
from speechlab.tokenizer.streaming import (
    StreamState,
    TokenizerStream,
    context_frames,
    decode_pieces,
    encode_pieces,
)

RVQ = replace(CONFIGS["small"].rvq, n_q=4, codebook_size=16)
PAST = {"dim": 64, "n_filters": 4, "causal": True, "pad_mode": "constant", "bidirectional": False}
CODECS = {
    "frames": FrameCodecConfig(width=24, encoder_blocks=2, decoder_blocks=2, causal=True),
    "frames, other hop": FrameCodecConfig(
        width=24, encoder_blocks=1, decoder_blocks=1, causal=True, hop_length=160, n_fft=640
    ),
    "seanet": SEANetConfig(strides=(5, 4), lstm_layers=2, **PAST),
    "seanet, dilated, no LSTM": SEANetConfig(
        strides=(4, 2, 3), lstm_layers=0, n_residual_layers=2, activation="Snake", **PAST
    ),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return (0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


@pytest.fixture(scope="module", params=CODECS)
def causal(request):
    """Random weights, codebooks that fit them: else every frame would get the same code."""
    torch.manual_seed(0)
    model = SpeechTokenizer(SpeechTokenizerConfig(CODECS[request.param], RVQ, 0))
    with torch.no_grad():
        model.train()(noise(4, 1, 32000, seed=9))
    return model.eval()


def run(stream, wav, sizes):
    codes, sound, state, back, place = [], [], None, None, 0
    for index, size in enumerate(sizes):
        last = index + 1 == len(sizes)
        piece = wav[..., place:] if last else wav[..., place : place + size]
        place += size
        found, state = stream.encode(piece, state, final=last)
        codes.append(found)
        if found.shape[-1]:
            heard, back = stream.decode(found, back)
            sound.append(heard)
    return torch.cat(codes, dim=-1), torch.cat(sound, dim=-1), state


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=6),
    rest=st.integers(0, 700),
    batch=st.integers(1, 2),
)
def test_a_stream_is_one_pass(causal, sizes, rest, batch):
    wav = noise(batch, 1, sum(sizes) + rest)
    if rest:
        sizes = [*sizes, rest]
    codes, sound, state = run(TokenizerStream(causal), wav, sizes)
    assert_same_codes(causal, wav, codes)
    torch.testing.assert_close(sound, causal.decode(codes), atol=1e-5, rtol=0)
    assert state.frames == codes.shape[-1]


def test_codes_tell_sounds_apart(causal):
    """Or the test above would prove nothing."""
    assert len(causal.encode(noise(1, 1, 16000))[0, 0].unique()) > 8


def test_final_may_come_with_nothing(causal):
    stream, wav = TokenizerStream(causal), noise(1, 1, 1001)
    first, state = stream.encode(wav)
    last, state = stream.encode(wav[..., :0], state, final=True)
    assert_same_codes(causal, wav, torch.cat([first, last], dim=-1))
    assert state.frames == -(-1001 // causal.spec.hop_length)


def test_state_is_explicit(causal):
    """Two callers of one stream do not meet; a stored state goes on where it was."""
    stream, one, two = TokenizerStream(causal), noise(1, 1, 6000), noise(1, 1, 6000, seed=1)
    _, a = stream.encode(one[..., :3000])
    _, b = stream.encode(two[..., :3000])
    before = StreamState(*map_past(torch.clone, [a.past, a.rest]), a.frames)
    more, _ = stream.encode(one[..., 3000:], a, final=True)
    kept = map_past(torch.equal, [a.past, a.rest], [before.past, before.rest])
    assert False not in flat(kept)  # not written to
    again, _ = stream.encode(one[..., 3000:], before, final=True)
    assert torch.equal(more, again)
    other, _ = stream.encode(two[..., 3000:], b, final=True)
    assert not torch.equal(more, other)
    tensors = [t for t in flat([a.past, a.rest]) if t is not None]
    assert a.bytes() == sum(t.numel() * t.element_size() for t in tensors) > 0


def flat(nested) -> list:
    """What nested lists hold."""
    if not isinstance(nested, list):
        return [nested]
    return [leaf for part in nested for leaf in flat(part)]


def test_rows_part_and_meet(causal):
    """Rows leave a batch and join another; each goes on as if it had been alone."""
    stream, hop = TokenizerStream(causal), causal.spec.hop_length
    wav = noise(3, 1, 20 * hop)
    codes, state = stream.encode(wav[..., : 8 * hop])
    sound, back = stream.decode(codes)
    alone = [state.select(torch.arange(3) == row) for row in range(3)]
    heard = [back.select(torch.arange(3) == row) for row in range(3)]
    order = [2, 0]
    joined = StreamState.join([alone[row] for row in order])
    assert joined.frames == 8
    more, _ = stream.encode(wav[order][..., 8 * hop :], joined, final=True)
    rest, _ = stream.decode(more, StreamState.join([heard[row] for row in order]))
    for place, row in enumerate(order):
        whole = torch.cat([codes[row : row + 1], more[place : place + 1]], dim=-1)
        assert_same_codes(causal, wav[row : row + 1], whole)
        played = torch.cat([sound[row : row + 1], rest[place : place + 1]], dim=-1)
        torch.testing.assert_close(played, causal.decode(whole), atol=1e-5, rtol=0)
    assert StreamState.join([None, None]) is None


def test_a_row_that_joins_starts_from_silence(causal):
    stream, hop = TokenizerStream(causal), causal.spec.hop_length
    wav = noise(2, 1, 8 * hop)
    codes, state = stream.encode(wav[:1, :, : 4 * hop])
    _, back = stream.decode(codes)
    found, _ = stream.encode(wav[..., 4 * hop :], StreamState.join([state, None]), final=True)
    assert_same_codes(causal, wav[:1], torch.cat([codes, found[:1]], dim=-1))
    assert_same_codes(causal, wav[1:, :, 4 * hop :], found[1:])
    sound, _ = stream.decode(found, StreamState.join([back, None]))
    torch.testing.assert_close(sound[1:], causal.decode(found[1:]), atol=1e-5, rtol=0)


def test_stream_takes_levels_and_refuses_other_codecs(causal, tone):
    stream = TokenizerStream(causal)
    codes, _ = stream.encode(tone, n_q=3)
    assert codes.shape[1] == 3
    with pytest.raises(ValueError, match=r"wav is torch\.float64"):
        stream.encode(tone.double())
    with pytest.raises(ValueError, match="wav has 0 samples"):
        stream.encode(tone[..., :0])
    with pytest.raises(ValueError, match="not causal"):
        TokenizerStream(SpeechTokenizer(CONFIGS["small"]))


LOCAL = {
    "small": FrameCodecConfig(width=24),
    "seanet without LSTM": SEANetConfig(dim=64, n_filters=4, strides=(5, 4), lstm_layers=0),
    "causal": CODECS["frames"],
    "causal seanet": CODECS["seanet"],
}


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("total", [100, 20000, 33333])
def test_pieces_are_one_pass(name, total):
    torch.manual_seed(0)
    model = SpeechTokenizer(SpeechTokenizerConfig(LOCAL[name], RVQ, 0))
    with torch.no_grad():
        model.train()(noise(4, 1, 32000, seed=9))
    model.eval()
    wav = noise(1, 1, total)
    for size, seconds in ((7777, 0.5), (total, 1.0), (97 if total < 200 else 999, 0.3)):
        codes = torch.cat(list(encode_pieces(model, wav.split(size, -1), seconds=seconds)), dim=-1)
        assert codes.shape == model.encode(wav).shape
        assert_same_codes(model, wav, codes)
        assert_same_codes(model, wav, model.encode(wav))
        sound = torch.cat(list(decode_pieces(model, codes.split(13, -1), seconds=seconds)), dim=-1)
        torch.testing.assert_close(sound, model.decode(codes), atol=1e-5, rtol=0)
    assert context_frames(model)[2] is (
        model.config.codec.kind == "frames" or name.endswith("out LSTM")
    )


def test_a_bidirectional_lstm_is_only_approximated():
    torch.manual_seed(0)
    config = SEANetConfig(dim=64, n_filters=4, strides=(5, 4))
    model = SpeechTokenizer(SpeechTokenizerConfig(config, RVQ, 0)).eval()
    assert context_frames(model)[2] is False
    wav = noise(1, 1, 16000)
    parts = list(encode_pieces(model, wav.split(4000, -1), seconds=0.2))
    assert torch.cat(parts, dim=-1).shape == model.encode(wav).shape


def test_long_audio_in_the_memory_of_short():
    """Peak memory of a process that codes ten minutes, against one minute; see benchmarks too."""
    code = """
import resource, sys, torch
torch.set_num_threads(1)
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer
from speechlab.tokenizer.streaming import encode_pieces, decode_pieces
model = SpeechTokenizer.load("speechtokenizer-small")
block = 0.1 * torch.randn(1, 1, 160000).clamp(-3, 3)
frames = samples = 0
def codes():
    global frames
    for part in encode_pieces(model, (block for _ in range(int(sys.argv[1])))):
        frames += part.shape[-1]
        yield part
for wav in decode_pieces(model, codes()):
    samples += wav.shape[-1]
assert frames * 320 == samples == 160000 * int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    pytest.importorskip("resource")
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, count], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for count in ("6", "60")
    ]
    assert peaks[1] - peaks[0] < 100
