"""Graphs equal the tokeniser: plain, exported, compiled, in onnxruntime."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from speechlab.tokenizer.export import (
    OnnxTokenizer,
    export_onnx,
    export_programs,
    graphs,
)
from speechlab.tokenizer.seanet import FrameCodecConfig, SEANetConfig
from speechlab.tokenizer.speech_tokenizer import (
    CONFIGS,
    SpeechTokenizer,
    SpeechTokenizerConfig,
)

RVQ = replace(CONFIGS["small"].rvq, n_q=4, codebook_size=16)
CODECS = {
    "small": FrameCodecConfig(width=24, encoder_blocks=1, decoder_blocks=1),
    "causal": FrameCodecConfig(width=24, encoder_blocks=1, decoder_blocks=1, causal=True),
    "seanet": SEANetConfig(dim=64, n_filters=4, strides=(4, 4)),
}


def noise(*shape: int) -> torch.Tensor:
    return (0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


@pytest.fixture(params=CODECS)
def tokenizer(request):
    torch.manual_seed(0)
    model = SpeechTokenizer(SpeechTokenizerConfig(CODECS[request.param], RVQ, 0))
    with torch.no_grad():
        model.train()(noise(4, 1, 16000))
    return model.eval()


def agree(tokenizer, wav, encode, decode, least=0.98):
    codes = tokenizer.encode(wav)
    assert len(codes.unique()) > 10
    found = encode(wav)
    assert found.shape == codes.shape
    assert float((found == codes).float().mean()) >= least
    torch.testing.assert_close(decode(codes), tokenizer.decode(codes), atol=1e-3, rtol=0)


def test_graphs(tokenizer):
    encoder, decoder = graphs(tokenizer)
    trains = [p.requires_grad for p in tokenizer.parameters()]
    assert all(trains)  # the caller's own model stays as it was
    folded, _ = graphs(tokenizer.fold())
    with torch.no_grad():
        assert torch.equal(folded(noise(1, 1, 6400)), encoder(noise(1, 1, 6400)))
    with torch.no_grad():
        agree(tokenizer, noise(2, 1, 9000), encoder, decoder)


def test_exported_programs(tokenizer):
    fixed = tokenizer.config.codec.kind == "seanet"
    encoder, decoder = (program.module() for program in export_programs(tokenizer, 40))
    hop = tokenizer.config.hop_length
    for batch, frames in ((2, 40),) if fixed else ((2, 40), (1, 77), (3, 5)):
        with torch.no_grad():
            agree(tokenizer, noise(batch, 1, frames * hop), encoder, decoder)


def test_onnx(tokenizer, tmp_path):
    graph = OnnxTokenizer(export_onnx(tokenizer, tmp_path), threads=1)
    for batch, samples in ((1, 4001), (3, 16000), (1, 12800)):
        agree(tokenizer, noise(batch, 1, samples), graph.encode, graph.decode)
    with pytest.raises(ValueError, match="wav has"):
        graph.encode(noise(1, 1, graph.hop_length))
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "decoder.onnx", "encoder.onnx"}
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    with pytest.raises(ValueError, match="codes has 2 levels"):
        graph.decode(torch.zeros(1, 2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"wav is torch\.float64"):
        graph.encode(noise(1, 1, 999).double())


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("cl"), reason="no C++ compiler")
def test_compiled():
    torch.manual_seed(0)
    config = SpeechTokenizerConfig(CODECS["small"], RVQ, 0)
    tokenizer = SpeechTokenizer(config)
    with torch.no_grad():
        tokenizer.train()(noise(4, 1, 16000))
    tokenizer.eval()
    encoder, decoder = (torch.compile(half) for half in graphs(tokenizer))
    with torch.no_grad():
        agree(tokenizer, noise(1, 1, 9600), encoder, decoder)
