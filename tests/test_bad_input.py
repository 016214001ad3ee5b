"""One table: every public function that takes audio or codes, and what it must refuse.

Each error must name the argument. A function added to the library without a row here fails
`test_every_public_function_has_rows`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

import speechlab
from speechlab.foundations import (
    audio,
    audio_files,
    contracts,
    display,
    evaluation,
    judges,
    outside_judges,
)
from speechlab.foundations.contracts import AudioError, CodeSpec
from speechlab.foundations.phonemes import Phone
from speechlab.foundations.transformer import TransformerConfig
from speechlab.lm import hybrid
from speechlab.tokenizer import codecs, files, losses, speech_tokenizer, streaming, teachers
from speechlab.tokenizer.frame_codec import FrameCodecConfig
from speechlab.tokenizer.rvq import ResidualVQ, RVQConfig
from speechlab.tts import alignment, mels, prosody

GOOD = torch.linspace(-0.5, 0.5, 16000).view(1, 1, -1)
TWO = GOOD.expand(2, 1, -1)
BAD_WAVS = {
    "a list": [0.1, 0.2],
    "empty": torch.zeros(1, 1, 0),
    "no signals": torch.zeros(0, 1, 16000),
    "two dimensions": torch.zeros(1, 16000),
    "stereo": torch.zeros(1, 2, 16000),
    "float64": torch.zeros(1, 1, 16000, dtype=torch.float64),
    "int16": torch.zeros(1, 1, 16000, dtype=torch.int16),
    "NaN": torch.full((1, 1, 16000), float("nan")),
    "infinite": torch.full((1, 1, 16000), float("inf")),
    "out of range": 3000 * GOOD,
}
TAKES_WAV = {
    "check_wav": contracts.check_wav,
    "save_wav": lambda wav: audio_files.save_wav("/nonexistent/a.wav", wav, 16000),
    "resample": lambda wav: audio.resample(wav, 16000, 8000),
    "to_mono": audio.to_mono,
    "loudness": lambda wav: audio.loudness(wav, 16000),
    "set_loudness": lambda wav: audio.set_loudness(wav, 16000),
    "log_mel": lambda wav: audio.log_mel(wav, 16000),
    "LogMel": audio.LogMel(16000),
    "plot_wav": lambda wav: display.plot_wav(wav, 16000),
    "play": lambda wav: display.play(wav, 16000),
    "compare_players": lambda wav: display.compare_players({"wav": wav}, 16000),
    "Player": lambda wav: display.Player({"wav": wav}, 16000),
    "encode_audio": lambda wav: audio_files.encode_audio(wav, 16000),
}
ANY_CHANNELS = {"resample", "to_mono"}  # stereo is their business


@pytest.mark.parametrize("kind", BAD_WAVS)
@pytest.mark.parametrize("name", TAKES_WAV)
def test_bad_wav(name, kind):
    if kind == "stereo" and name in ANY_CHANNELS:
        TAKES_WAV[name](BAD_WAVS[kind])
        return
    with pytest.raises(AudioError, match="wav"):
        TAKES_WAV[name](BAD_WAVS[kind])


def recognise(wav):
    config = judges.RecognizerConfig(("a",), width=4)
    return judges.Recognizer(config).eval().transcribe(wav)


def tiny_tokenizer():
    codec = FrameCodecConfig(width=8, encoder_blocks=1, decoder_blocks=1, causal=True)
    config = speech_tokenizer.SpeechTokenizerConfig(codec, RVQConfig(dim=64, codebook_size=4), 0)
    return speech_tokenizer.SpeechTokenizer(config).eval()


def tiny_units() -> codecs.UnitsCodec:
    """Units of MFCCs."""
    blank = torch.zeros(13)
    return codecs.UnitsCodec(
        teachers.Units(teachers.MFCC(), blank, blank + 1, torch.eye(13)[:2])
    )


def tiny_encodec() -> codecs.TransformersCodec:
    """An EnCodec of transformers."""
    import transformers

    sizes = {"num_filters": 4, "hidden_size": 8, "codebook_size": 4, "codebook_dim": 8}
    return codecs.TransformersCodec(transformers.EncodecModel(transformers.EncodecConfig(**sizes)))


def tiny_writer() -> hybrid.HybridGPT:
    """A hybrid for the tiny tokeniser."""
    body = TransformerConfig(16, 1, 2, context=128)
    config = hybrid.HybridConfig(
        CodeSpec(4, 8), levels=8, input_levels=1, pattern="depth", body=body, depth=body,
        mel=TransformerConfig(16, 1, 2, context=128),
    )  # fmt: skip
    return hybrid.HybridGPT(config).eval()


TAKES_MORE = {  # these name the argument in an AudioError or a ValueError
    "transcribe": recognise,
    "mel_distance": lambda wav: evaluation.mel_distance(wav, wav),
    "MFCC": lambda wav: teachers.MFCC()(wav),
    "Teacher": lambda wav: teachers.Teacher.untrained(width=16, layers=1)(wav),
}
PAIRS = {"time_loss", "check_pair"}  # training losses: see below
TAKES_MORE["time_loss"] = lambda wav: losses.time_loss(wav, wav)
TAKES_MORE["check_pair"] = lambda wav: losses.check_pair(wav, wav)
TAKES_MORE |= {
    "embed": lambda wav: judges.SpeakerEncoder().eval().embed(wav),
    "speaker_similarity": lambda wav: evaluation.speaker_similarity(
        judges.SpeakerEncoder().eval(), wav, GOOD
    ),
    "mel_cepstra": evaluation.mel_cepstra,
    "mel_cepstral_distortion": lambda wav: evaluation.mel_cepstral_distortion(wav, GOOD),
    "stoi": lambda wav: evaluation.stoi(wav, GOOD),
    "pesq": lambda wav: evaluation.pesq(wav, GOOD),
    "dnsmos": lambda wav: outside_judges.dnsmos(wav),
    "visqol": lambda wav: outside_judges.visqol(wav, wav),
    "pitch_error": lambda wav: evaluation.pitch_error(wav, GOOD),
    "encode_wav": lambda wav: files.encode_wav(tiny_tokenizer(), wav),
    "TokenizerStream": lambda wav: streaming.TokenizerStream(tiny_tokenizer()).encode(wav),
    "continue_wav": lambda wav: hybrid.continue_wav(tiny_writer(), tiny_tokenizer(), wav, 0.1),
    "CausalMel": lambda wav: hybrid.CausalMel()(wav),
    "SpeechTokenizer": lambda wav: tiny_tokenizer().encode(wav),
    "UnitsCodec": lambda wav: tiny_units().encode(wav),
    "TransformersCodec": lambda wav: tiny_encodec().encode(wav),
    "SpeechMel": lambda wav: mels.SpeechMel()(wav),
    "PitchTrack": lambda wav: prosody.PitchTrack()(wav),
    "EnergyTrack": lambda wav: prosody.EnergyTrack()(wav),
    "align": lambda wav: alignment.align(
        judges.Recognizer(judges.RecognizerConfig(("a",), width=4)), wav, [Phone("a", 0, 1)]
    ),
    "si_sdr": None,  # any shape: its own tests
}
INTERNAL = {  # of networks and codecs; their callers check
    "pad_for_frames", "change_speed", "change_voice", "in_rows", "write_sound", "judged",
    "centred",
}  # fmt: skip
TAKES_MORE |= dict.fromkeys(INTERNAL)


@pytest.mark.parametrize("kind", BAD_WAVS)
@pytest.mark.parametrize("name", [n for n, call in TAKES_MORE.items() if call])
def test_bad_wav_elsewhere(name, kind):
    if name in PAIRS and kind in ("stereo", "float64", "NaN", "infinite", "out of range"):
        return  # a loss compares whatever the network gives; the trainer stops at NaN
    with pytest.raises(ValueError, match="wav"):
        TAKES_MORE[name](BAD_WAVS[kind])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: audio.loudness(torch.zeros(1, 1, 16000), 16000), "wav is silent"),
        (lambda: audio.loudness(1e-6 * GOOD, 16000), "wav is too quiet"),
        (lambda: audio.loudness(GOOD[..., :3000], 16000), "wav has 3000 samples.*6400"),
        (lambda: audio.set_loudness(torch.sign(GOOD), 16000), "wav is clipped"),
        (lambda: audio.log_mel(GOOD[..., :100], 16000), "wav has 100 samples.*513"),
        (lambda: audio.log_mel(GOOD, 16000, center=False, n_fft=20000), "wav has 16000.*20000"),
        (lambda: contracts.check_sample_rate(0), "sample_rate is 0"),
        (lambda: contracts.check_sample_rate(16000.5), "sample_rate is 16000.5"),
        (lambda: contracts.check_sample_rate("16k"), "sample_rate is '16k'"),
        (lambda: audio.resample(GOOD, 16000, -1), "to_rate is -1"),
        (lambda: audio.resample(GOOD, 0, 8000), "from_rate is 0"),
        (lambda: audio.LogMel(16000, floor=0.0), "floor is 0"),
        (lambda: audio_files.save_wav("a.wav", TWO, 16000), "wav holds 2 signals"),
        (lambda: audio_files.encode_audio(TWO, 16000), "wav holds 2 signals"),
        (lambda: display.Player({}, 16000), "clips is empty"),
        (lambda: audio.mel_to_wav(torch.zeros(80, 10), 16000), "mel is"),
        (lambda: audio.mel_to_wav(torch.full((1, 80, 9), float("nan")), 16000), "mel contains NaN"),
        (lambda: display.plot_mel(torch.zeros(80, 10)), "mel is"),
        (lambda: display.plot_codes(torch.zeros(1, 8, 10)), "codes is"),
        (lambda: display.plot_codes([1, 2]), "codes is list"),
        (lambda: audio_files.load_wav(b""), "empty"),
        (lambda: audio_files.load_wav(b"RIFF"), "not readable"),
    ],
)
def test_bad_audio_arguments(call, words):
    with pytest.raises(AudioError, match=words):
        call()


@pytest.fixture(scope="module")
def quantiser():
    return ResidualVQ(RVQConfig(dim=4, n_q=3, codebook_size=16)).eval()


Z = torch.zeros(2, 4, 5)
CODES = torch.zeros(2, 3, 5, dtype=torch.long)
BAD_Z = {
    "z is list": [1.0],
    "z is torch.float32 \\(4, 5\\)": Z[0],
    "z is torch.float32 \\(2, 3, 5\\)": Z[:, :3],
    "z is torch.int64": Z.long(),
    "no dimension may be empty": Z[..., :0],
    "z contains NaN": Z + float("nan"),
    "z contains NaN or infinite": Z + float("inf"),
}
BAD_CODES = {
    "codes is list": [0],
    "codes is torch.float32": CODES.float(),
    "codes is torch.bool": CODES.bool(),
    "codes is torch.int64 \\(3, 5\\)": CODES[0],
    "no dimension may be empty": CODES[..., :0],
    "codes has 4 levels": torch.zeros(2, 4, 5, dtype=torch.long),
    "codes range from 16": CODES + 16,
    "codes range from -1": CODES - 1,
}


@pytest.mark.parametrize("words", BAD_Z)
@pytest.mark.parametrize("method", ["forward", "encode"])
def test_bad_vectors(quantiser, method, words):
    with pytest.raises(ValueError, match=words):
        getattr(quantiser, method)(BAD_Z[words])


@pytest.mark.parametrize("words", BAD_CODES)
@pytest.mark.parametrize("method", ["decode", "codes_to_vectors"])
def test_bad_codes(quantiser, method, words):
    with pytest.raises(ValueError, match=words):
        getattr(quantiser, method)(BAD_CODES[words])


def test_check_codes():
    """The one check that all of these share, and its options."""
    check, mask = contracts.check_codes, torch.tensor([[True] * 4 + [False]] * 2)
    assert check(CODES, 16, 3) is CODES
    with pytest.raises(ValueError, match="prompt has 3 levels; wanted 1 to 2"):
        check(CODES, 16, 2, name="prompt")
    assert check(CODES[:, :2], 16, 3) is not None
    with pytest.raises(ValueError, match="codes has 2 levels; wanted exactly 3"):
        check(CODES[:, :2], 16, 3, exact=True)
    assert check(CODES[..., :0], 16, 3, empty=True) is not None
    for nothing in (CODES[:0], CODES[:, :0]):
        with pytest.raises(ValueError, match="no dimension may be empty"):
            check(nothing, 16, empty=True)
    behind = CODES.clone()
    behind[..., 4] = -1
    assert check(behind, 16, mask=mask) is behind
    with pytest.raises(ValueError, match="codes range from -1 to 0"):
        check(behind, 16)
    behind[1, 2, 3] = 16
    with pytest.raises(ValueError, match=r"codes range from 0 to 16; they must lie in \[0, 15"):
        check(behind, 16, mask=mask)


@pytest.mark.parametrize("n_q", [0, 4, -1, 1.5, "2", True])
@pytest.mark.parametrize("method", ["forward", "encode"])
def test_bad_n_q(quantiser, method, n_q):
    with pytest.raises(ValueError, match="n_q is"):
        getattr(quantiser, method)(Z, n_q=n_q)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 5),
        torch.ones(2, 4, dtype=torch.bool),
        [True],
        torch.zeros(2, 5, dtype=torch.bool),
    ],
)
@pytest.mark.parametrize("method", ["forward", "encode", "decode", "codes_to_vectors"])
def test_bad_masks(quantiser, method, mask):
    with pytest.raises(ValueError, match="mask is"):
        getattr(quantiser, method)(Z if method in ("forward", "encode") else CODES, mask=mask)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_q": 0}, "n_q is 0"),
        ({"dim": 0}, "dim is 0"),
        ({"codebook": "x"}, "codebook is 'x'"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"codebook_size": -3}, "codebook_size is -3"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        RVQConfig(**settings)


TAKES_CODES = {  # tested above, or with what they are made for
    "check_codes", "code_sums", "plot_codes", "token_quality", "check_mel", "build", "pack_codes",
    "squeeze", "acoustic_loss",
}  # fmt: skip


def test_every_public_function_has_rows():
    """Functions with a wav argument are in the tables; those with codes have their tests."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(speechlab.__path__, "speechlab.")
        if not found.ispkg and hasattr(importlib.import_module(found.name), "__all__")
    ]
    assert {audio, audio_files, contracts, display, losses, hybrid, codecs} <= set(modules)
    taken = {"wav": set(), "codes": set()}
    for module in modules:
        for name in module.__all__:
            if inspect.isfunction(getattr(module, name)):
                for argument in taken.keys() & inspect.signature(getattr(module, name)).parameters:
                    taken[argument].add(name)
    assert taken["wav"] - set(TAKES_WAV) - set(TAKES_MORE) == set()
    assert taken["codes"] - TAKES_CODES == set()
    assert INTERNAL | {"si_sdr", "log_mel", "save_wav", "play", "continue_wav"} <= taken["wav"]
