"""Graphs equal the tokeniser: plain, exported, compiled, in onnxruntime."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from same_codes import assert_same_codes

from speechlab import load
from speechlab.foundations.contracts import Codec, mask_of
from speechlab.foundations.models import ModelError
from speechlab.tokenizer.export import OnnxTokenizer, export_onnx, export_programs, graphs
from speechlab.tokenizer.frame_codec import FrameCodecConfig
from speechlab.tokenizer.seanet import SEANetConfig
from speechlab.tokenizer.speech_tokenizer import CONFIGS, SpeechTokenizer, SpeechTokenizerConfig

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


def agree(tokenizer, wav, encode, decode):
    codes = tokenizer.encode(wav)
    assert len(codes.unique()) > 10
    found = encode(wav)
    assert found.shape == codes.shape
    assert_same_codes(tokenizer, wav, found)
    assert_same_codes(tokenizer, wav, codes)
    torch.testing.assert_close(decode(codes), tokenizer.decode(codes), atol=1e-3, rtol=0)


def test_graphs(tokenizer):
    encoder, decoder = graphs(tokenizer)
    trains = [p.requires_grad for p in tokenizer.parameters()]
    assert all(trains)  # the caller's own model stays as it was
    assert not [p for half in (encoder, decoder) for p in half.parameters() if p.requires_grad]
    folded, _ = graphs(tokenizer.fold())
    with torch.no_grad():
        assert_same_codes(tokenizer, noise(1, 1, 6400), folded(noise(1, 1, 6400)))
        assert torch.equal(folded(noise(1, 1, 6400)), encoder(noise(1, 1, 6400)))
        agree(tokenizer, noise(2, 1, 9000), encoder, decoder)


def test_exported_programs(tokenizer):
    fixed = tokenizer.config.codec.kind == "seanet"
    encoder, decoder = (program.module() for program in export_programs(tokenizer, 40))
    hop = tokenizer.spec.hop_length
    for batch, frames in ((2, 40),) if fixed else ((2, 40), (1, 77), (3, 5)):
        with torch.no_grad():
            agree(tokenizer, noise(batch, 1, frames * hop), encoder, decoder)


def test_onnx(tokenizer, tmp_path):
    graph = OnnxTokenizer(export_onnx(tokenizer, tmp_path), threads=1)
    for batch, samples in ((1, 4001), (3, 16000), (1, 12800)):
        agree(tokenizer, noise(batch, 1, samples), graph.encode, graph.decode)
    assert isinstance(graph, Codec)
    assert graph.spec == tokenizer.spec
    assert graph.device == torch.device("cpu")
    assert graph.encode(noise(1, 1, 4001), 2).shape[1] == 2
    assert_same_codes(tokenizer, noise(1, 1, 4001), graph.encode(noise(1, 1, 4001), 2))
    with pytest.raises(ValueError, match="wav has"):
        graph.encode(noise(1, 1, graph.spec.hop_length))
    names = {"config.json", "decoder.onnx", "encoder.onnx"}
    assert {p.name for p in tmp_path.iterdir()} >= names
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    with pytest.raises(ValueError, match="codes has 2 levels; wanted exactly 4"):
        graph.decode(torch.zeros(1, 2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"wav is torch\.float64"):
        graph.encode(noise(1, 1, 999).double())
    with pytest.raises(ValueError, match="n_q is 5"):
        graph.encode(noise(1, 1, 4001), 5)
    with pytest.raises(NotImplementedError, match="masks"):
        graph.decode(graph.encode(noise(1, 1, 4001)), mask=torch.ones(1, 13, dtype=torch.bool))
    rows_alone(tokenizer, graph)


def rows_alone(tokenizer, graph):
    """Masked rows get what they get alone."""
    hop = graph.spec.hop_length
    lengths = torch.tensor([9 * hop, 14 * hop + 3, 20 * hop])
    wav = noise(3, 1, 20 * hop)
    codes = graph.encode(wav, mask=mask_of(lengths, 20 * hop))
    assert codes.shape == (3, 4, 20)
    for row, length in enumerate(lengths.tolist()):
        frames, rows = -(-length // hop), slice(row, row + 1)
        assert (codes[row, :, frames:] == -1).all()
        assert_same_codes(tokenizer, wav[rows, :, :length], codes[rows, :, :frames])


def test_onnx_folders_are_read_strictly(tmp_path):
    torch.manual_seed(0)
    model = SpeechTokenizer(SpeechTokenizerConfig(CODECS["seanet"], RVQ, 0))
    with torch.no_grad():
        model.train()(noise(4, 1, 16000))
    export_onnx(model.eval(), tmp_path)
    assert isinstance(load(tmp_path), OnnxTokenizer)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    assert set(about) == {"model_type", "codes", "whole_frames"}
    assert (about["model_type"], about["codes"]) == ("onnx-codec", model.spec.to_dict())
    other = model.spec.to_dict() | {"fingerprint": model.spec.fingerprint ^ 1}
    for change, words in (
        ({"model_type": "speech-tokenizer"}, "a model of type 'speech-tokenizer', wanted"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"whole_frames": "yes"}, "whole_frames"),
        ({"codes": model.spec.to_dict() | {"n_q": 0}}, "n_q is 0"),
        ({"codes": model.spec.to_dict() | {"more": 0}}, r"unknown key 'codes\.more'"),
        ({"codes": other}, "its CodeSpec is not that of config"),
    ):
        path.write_text(json.dumps(about | change))
        with pytest.raises(ModelError, match=words):
            OnnxTokenizer(tmp_path)
    path.write_text(json.dumps({"model_type": "onnx-codec", "codes": about["codes"]}))
    with pytest.raises(ModelError, match="whole_frames"):
        OnnxTokenizer(tmp_path)
    path.write_text(json.dumps(about))
    (tmp_path / "decoder.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"decoder\.onnx"):
        OnnxTokenizer(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        OnnxTokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["speechtokenizer-small", "small-causal"])
def test_no_graph_has_a_dft(name, tmp_path):
    """ONNX Runtime computes DFT operators naively: they made the graphs five times slower."""
    onnx = pytest.importorskip("onnx")
    export_onnx(SpeechTokenizer.load(name), tmp_path)
    for path in tmp_path.glob("*.onnx"):
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert "MatMul" in kinds
        assert not kinds & {"DFT", "STFT", "FFT"}


@pytest.mark.parametrize("n_fft", [8, 16, 640, 1024])
def test_transforms_as_matrix_products(n_fft):
    """Against numpy's FFT in float64."""
    from speechlab.tokenizer.export import _MatrixDecoder, _MatrixEncoder
    from speechlab.tokenizer.frame_codec import FrameCodecConfig

    config = FrameCodecConfig(width=8, n_fft=n_fft, hop_length=n_fft // 2, n_mels=1)
    x = np.random.default_rng(0).normal(size=(3, 5, n_fft))
    spectrum = np.fft.rfft(x)
    found = _MatrixEncoder(config).magnitudes(torch.from_numpy(x).float())
    np.testing.assert_allclose(found, np.abs(spectrum), atol=1e-4)
    size, phase = (torch.from_numpy(f(spectrum)).float() for f in (np.abs, np.angle))
    back = _MatrixDecoder(config).inverse(size, phase)
    np.testing.assert_allclose(back, x * np.sqrt(n_fft), atol=1e-3)


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
