"""Learn speech generation by building it, then import what you built.

The public face; each name is imported when it is first used. The rest is in the parts:
`speechlab.foundations`, `speechlab.tokenizer`, `speechlab.lm`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .comments_in_help import install as _install

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .foundations.audio_files import load_wav, save_wav
    from .foundations.contracts import Codec, CodeSpec
    from .foundations.corpora import folder_corpus
    from .foundations.corpus import Corpus, embedded_corpus
    from .foundations.judges import Recognizer, SpeakerEncoder
    from .foundations.models import Model
    from .foundations.recipes import run_recipe
    from .lm.gpt import GPT
    from .lm.hybrid import HybridGPT
    from .tokenizer.export import OnnxTokenizer
    from .tokenizer.official import load_official
    from .tokenizer.speech_tokenizer import SpeechTokenizer
    from .tokenizer.teachers import Teacher

_HOMES = {
    "GPT": "lm.gpt",
    "HybridGPT": "lm.hybrid",
    "CodeSpec": "foundations.contracts",
    "Codec": "foundations.contracts",
    "Corpus": "foundations.corpus",
    "Model": "foundations.models",
    "OnnxTokenizer": "tokenizer.export",
    "Recognizer": "foundations.judges",
    "SpeakerEncoder": "foundations.judges",
    "SpeechTokenizer": "tokenizer.speech_tokenizer",
    "Teacher": "tokenizer.teachers",
    "embedded_corpus": "foundations.corpus",
    "folder_corpus": "foundations.corpora",
    "load_official": "tokenizer.official",
    "load_wav": "foundations.audio_files",
    "run_recipe": "foundations.recipes",
    "save_wav": "foundations.audio_files",
}
__all__ = ["__version__", "load", *sorted(_HOMES)]

# model_type in config.json -> the class that reads it
MODEL_HOMES = {
    "acoustic-decoder": ("metis.acoustic", "AcousticDecoder"),
    "fastspeech2": ("tts.fastspeech2", "FastSpeech2"),
    "gpt": ("lm.gpt", "GPT"),
    "hybrid-gpt": ("lm.hybrid", "HybridGPT"),
    "masked-lm": ("metis.masked_lm", "MaskedLM"),
    "onnx-codec": ("tokenizer.export", "OnnxTokenizer"),
    "recognizer": ("foundations.judges", "Recognizer"),
    "residual-vq": ("tokenizer.rvq", "ResidualVQ"),
    "speaker-encoder": ("foundations.judges", "SpeakerEncoder"),
    "ssl-tokens": ("metis.ssl_tokens", "SSLTokenizer"),
    "speech-tokenizer": ("tokenizer.speech_tokenizer", "SpeechTokenizer"),
    "vocoder": ("tts.vocoder", "Vocoder"),
}
MODEL_HOMES |= dict.fromkeys(
    ("hubert", "wavlm", "wav2vec2", "wav2vec2-bert"), ("tokenizer.teachers", "Teacher")
)


def load(name, device="cpu"):
    """A model of any class, folded and in eval mode: a folder, a shipped name, or a hub id.

    `config.json` says which class it is. Whatever does not fit raises `ModelError` by name.
    """
    from .foundations.models import Model, ModelError, config_type, model_folder

    folder = model_folder(name)
    kind = config_type(folder)
    if kind is None:
        Model.load(folder)  # says what is wrong with config.json
    if kind not in MODEL_HOMES:
        known = ", ".join(sorted(MODEL_HOMES))
        raise ModelError(f"{folder}: a model of type {kind!r}; known are {known}")
    module, owner = MODEL_HOMES[kind]
    found = getattr(importlib.import_module(f"{__name__}.{module}"), owner)
    if kind == "onnx-codec":
        return found(folder)
    model = found.load(name)
    return model.to(device)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
