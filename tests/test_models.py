"""Every model class refuses what does not fit, by name: one table over all classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import speechlab
from speechlab.foundations.contracts import CodeSpec
from speechlab.foundations.judges import (
    Recognizer,
    RecognizerConfig,
    SpeakerEncoder,
    SpeakerEncoderConfig,
)
from speechlab.foundations.models import (
    MODELS,
    Model,
    ModelError,
    model_folder,
    publish,
    rounded,
    shipped_models,
)
from speechlab.foundations.transformer import TransformerConfig
from speechlab.lm.gpt import GPT, GPTConfig
from speechlab.lm.hybrid import HybridConfig, HybridGPT
from speechlab.metis.acoustic import AcousticConfig, AcousticDecoder
from speechlab.metis.masked_lm import MaskedLM, MaskedLMConfig
from speechlab.metis.ssl_tokens import SSLTokenizer, SSLTokensConfig
from speechlab.tokenizer.export import OnnxTokenizer, export_onnx
from speechlab.tokenizer.frame_codec import FrameCodecConfig
from speechlab.tokenizer.rvq import ResidualVQ, RVQConfig
from speechlab.tokenizer.seanet import SEANetConfig
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from speechlab.tokenizer.teachers import Teacher, tiny_hubert
from speechlab.tts.fastspeech2 import FastSpeech2, FastSpeech2Config, FFTConfig
from speechlab.tts.vocoder import FramesConfig, HiFiGANConfig, Vocoder, VocoderConfig

RVQ = RVQConfig(dim=8, n_q=2, codebook_size=8, kmeans_iterations=0)
FRAMES = FrameCodecConfig(dim=8, width=8, encoder_blocks=1, decoder_blocks=1)
SEANET = SEANetConfig(dim=8, n_filters=2, strides=(4, 2), lstm_layers=1, bidirectional=False)
CODES, TOKENS = CodeSpec(16, 3), CodeSpec(9, 1)
BODY = TransformerConfig(dim=16, layers=2, heads=(2, 1), key_dim=4, ffn_dim=(16, 32), context=32)
MADE = {  # a small one of each class, and a nested key of its config
    "gpt": (lambda: GPT(GPTConfig(body=BODY)), "body"),
    "hybrid-gpt": (lambda: HybridGPT(HybridConfig(body=BODY)), "mel"),
    "recognizer": (lambda: Recognizer(RecognizerConfig(("a", "b"), width=8)), None),
    "residual-vq": (lambda: ResidualVQ(RVQ), None),
    "speaker-encoder": (lambda: SpeakerEncoder(SpeakerEncoderConfig(width=8, dim=4)), None),
    "speech-tokenizer": (
        lambda: SpeechTokenizer(SpeechTokenizerConfig(FRAMES, RVQ, 0)),
        "codec",
    ),
    "speech-tokenizer, seanet": (
        lambda: SpeechTokenizer(SpeechTokenizerConfig(SEANET, RVQ, 4)),
        "rvq",
    ),
    "ssl-tokens": (lambda: SSLTokenizer(SSLTokensConfig(4, 8, width=8, blocks=1)), None),
    "masked-lm": (lambda: MaskedLM(MaskedLMConfig(TOKENS, replace(BODY, condition_dim=8))), "body"),
    "acoustic-decoder": (
        lambda: AcousticDecoder(AcousticConfig(CODES, TOKENS, replace(BODY, condition_dim=8))),
        "body",
    ),
    "fastspeech2": (
        lambda: FastSpeech2(FastSpeech2Config(
            ("a", "b"), dim=8, encoder=FFTConfig(2, (1, 2), 4, 4, (8, 6), 3),
            decoder=FFTConfig(1, 1, 4, 4, 8, 3), predictor_hidden=(4, 6), postnet=(4,), bins=4)),
        "encoder",
    ),
    "vocoder": (lambda: Vocoder(VocoderConfig(net=FramesConfig(width=8, blocks=1))), "net"),
    "vocoder, hifigan": (
        lambda: Vocoder(VocoderConfig(net=HiFiGANConfig(channels=16, block_kernels=(3,)))),
        "mel",
    ),
}
each = pytest.mark.parametrize("name", MADE)


@pytest.fixture
def saved(name, tmp_path):
    """A model's folder and the model."""
    torch.manual_seed(0)
    model = MADE[name][0]().eval()
    return model.save(tmp_path / "model"), model


def test_the_table_has_every_class():
    """A new class that is not in the table fails here."""
    shipped = {kind for kind, owner in MODELS.items() if owner.__module__.startswith("speechlab")}
    assert shipped == {name.split(",")[0] for name in MADE}
    teachers = {"hubert", "wavlm", "wav2vec2", "wav2vec2-bert"}
    assert set(speechlab.MODEL_HOMES) == shipped | {"onnx-codec"} | teachers
    for kind in shipped:
        module, owner = speechlab.MODEL_HOMES[kind]
        assert MODELS[kind].__name__ == owner
        assert MODELS[kind].__module__ == f"speechlab.{module}"


@each
def test_it_comes_back(name, saved):
    folder, model = saved
    again = speechlab.load(folder)
    assert type(again) is type(model)
    assert again.config == model.config
    assert not again.training
    assert again.name == "model"
    wanted, found = model.copy().fold().state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@each
def test_another_class_is_refused(name, saved):
    folder, model = saved
    for other in {owner for owner in MODELS.values() if owner.__module__.startswith("speechlab")}:
        if not isinstance(model, other) and issubclass(other, Model):
            with pytest.raises(ModelError, match="model"):
                other.load(folder)


WRONG_TENSORS = {
    "missing": (lambda s, k: {n: v for n, v in s.items() if n != k}, "lacks tensors"),
    "renamed": (lambda s, k: {("x." + n if n == k else n): v for n, v in s.items()}, "lacks"),
    "extra": (lambda s, k: s | {"extra.weight": torch.zeros(1)}, "unknown tensors: extra.weight"),
    "shape": (lambda s, k: s | {k: torch.zeros(3, 2, 1, 1)}, "has shape"),
    "integer": (lambda s, k: s | {k: s[k].long()}, "is torch.int64"),
    "not finite": (lambda s, k: s | {k: torch.full_like(s[k], torch.nan)}, "NaN or infinite"),
}


@each
@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_wrong_tensors_are_refused_by_name(name, saved, wrong):
    folder, _ = saved
    path = folder / "model.safetensors"
    state = load_file(path)
    key = sorted(key for key, value in state.items() if value.is_floating_point())[0]
    change, text = WRONG_TENSORS[wrong]
    save_file({n: v.contiguous() for n, v in change(state, key).items()}, path)
    with pytest.raises(ModelError, match=text) as error:
        speechlab.load(folder)
    assert wrong == "extra" or key in str(error.value)
    assert str(path) in str(error.value)


@each
def test_prefixes_of_wrappers_are_taken_off(name, saved):
    folder, model = saved
    path = folder / "model.safetensors"
    for prefix in ("module.", "_orig_mod."):
        model.save(folder)
        save_file({prefix + n: v for n, v in load_file(path).items()}, path)
        assert type(speechlab.load(folder)) is type(model)


@each
def test_wrong_configs_are_refused_by_name(name, saved):
    folder, _ = saved
    path = folder / "config.json"
    about = json.loads(path.read_text())
    inner = MADE[name][1]

    def refused(changed, *words):
        path.write_text(json.dumps(changed))
        with pytest.raises(ModelError) as error:
            speechlab.load(folder)
        for word in (str(folder), *words):
            assert word in str(error.value), str(error.value)

    refused(about | {"widht": 3}, "unknown key 'widht'")
    if inner:
        refused(about | {inner: about[inner] | {"widht": 3}}, "unknown key", "widht")
        refused(about | {inner: 7}, inner)
    for key, value in about.items():
        if isinstance(value, int) and not isinstance(value, bool):
            refused(about | {key: "many"}, key)
            refused(about | {key: [1]}, key)
    refused({k: v for k, v in about.items() if k != "model_type"}, "no model_type")
    refused(about | {"model_type": "cat"}, "'cat'")
    for text in ("", "[]", "{", "null"):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"config.json"):
            speechlab.load(folder)


def test_damaged_weights_are_refused(tmp_path):
    folder = MADE["gpt"][0]().save(tmp_path / "m")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for bad in (data[:100], data[:-10], b"", b"not safetensors at all", data + b"x"):
        path.write_bytes(bad)
        with pytest.raises(ModelError, match="cannot be read"):
            speechlab.load(folder)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        speechlab.load(folder)


def test_teachers_are_as_strict(tmp_path):
    """A HuBERT of transformers: its own loader would fill holes with random weights."""
    hubert = tiny_hubert(32, 1)
    hubert.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    assert isinstance(speechlab.load(tmp_path), Teacher)
    key = "encoder.layers.0.attention.k_proj.weight"
    assert key in whole
    cases = {
        "lacks": {n: v for n, v in whole.items() if n != key},
        "unknown": whole | {"encoder.extra": torch.zeros(1)},
        "shape": whole | {key: torch.zeros(3, 3)},
    }
    for word, state in cases.items():
        save_file(state, path, {"format": "pt"})
        with pytest.raises(ModelError, match=word):
            Teacher.load(tmp_path)
    save_file(whole | {"lm_head.weight": torch.zeros(2, 2)}, path, {"format": "pt"})
    assert Teacher.load(tmp_path).size == 32  # the head of a training is left
    with pytest.raises(ModelError, match="a teacher is one of"):
        Teacher.load("gpt-small")


def test_onnx_is_as_strict(tmp_path):
    onnx = pytest.importorskip("onnxruntime")
    assert onnx
    tokenizer = speechlab.load("encodec-small")
    folder = export_onnx(tokenizer, tmp_path / "onnx")
    found = speechlab.load(folder)
    assert isinstance(found, OnnxTokenizer)
    assert found.spec == tokenizer.spec
    config = folder / "config.json"
    about = json.loads(config.read_text())
    wrong = {
        "unknown key 'more'": about | {"more": 1},
        "unknown key 'codes.more'": about | {"codes": about["codes"] | {"more": 1}},
        "codes.n_q": about | {"codes": about["codes"] | {"n_q": "8"}},
        "whole_frames": {k: v for k, v in about.items() if k != "whole_frames"},
        "CodeSpec is not that": about | {"codes": about["codes"] | {"fingerprint": 5}},
        "'cat'": about | {"model_type": "cat"},
    }
    for text, changed in wrong.items():
        config.write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=text):
            OnnxTokenizer(folder)
    config.write_text(json.dumps(about))
    (folder / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"decoder.onnx"):
        OnnxTokenizer(folder)
    with pytest.raises(ModelError, match="wanted 'onnx-codec'"):
        OnnxTokenizer(model_folder("encodec-small"))


def test_names():
    with pytest.raises(ModelError, match="did you mean speechtokenizer-small"):
        speechlab.load("speechtokenizer-smal")
    with pytest.raises(ModelError, match=r"shipped: .*gpt-small"):
        speechlab.load("nothing like it")
    with pytest.raises(ModelError, match="not to be had from the hub"):
        speechlab.load("nobody/nothing-of-this-name")
    assert len(shipped_models()) == 16
    for name in shipped_models():
        assert speechlab.load(name) is not None


@each
def test_what_is_published_is_what_was_measured(name, saved, tmp_path):
    _, model = saved
    folder = publish(model, tmp_path / "out", "# card", {"measure": 1})
    again = speechlab.load(folder)
    wanted = rounded(model).state_dict()
    assert all(torch.equal(wanted[key], value) for key, value in again.state_dict().items())
    assert json.loads((folder / "report.json").read_text()) == {"measure": 1}
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "report.json", "config.json", "model.safetensors"}
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, path  # everyone may read it
    sizes = load_file(folder / "model.safetensors")
    assert all(v.dtype == torch.float16 for v in sizes.values() if v.is_floating_point())


def test_a_copy_is_no_view():
    model = MADE["speech-tokenizer, seanet"][0]().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = model.copy().fold()
    for weight in other.parameters():
        weight.data.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()  # folding the copy left the original's parametrisation
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nothing_is_unpickled():
    """No torch.load without weights_only, no pickle, in the library."""
    for path in Path(speechlab.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
