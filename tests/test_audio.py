"""Sound: audio, audio files and players, against SciPy, formulas, and damaged files."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations import audio, audio_files, containers, display
from speechlab.foundations.contracts import AudioError

KINDS = ("wav", "flac", "ogg", "mp3")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tone, tmp_path, kind):
    wav, rate = audio_files.load_wav(audio_files.save_wav(tmp_path / f"a.{kind}", tone, 16000))
    assert rate == 16000
    assert wav.dtype == torch.float32
    assert wav.shape[:2] == (1, 1)
    if kind in ("wav", "flac"):
        assert wav.shape == tone.shape
        assert (wav - tone).abs().max() <= 1 / 32768
    else:
        lag = torch.nn.functional.conv1d(wav, tone).abs().max()
        assert lag > 0.9 * tone.pow(2).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_never_load(tone, kind):
    data = audio_files.encode_audio(tone, 16000, kind)
    for keep in (0, 1, 20, 44, 60, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 1):
        with pytest.raises(AudioError):
            audio_files.load_wav(data[:keep])


@pytest.mark.parametrize("kind", ["flac", "ogg"])
@given(st.floats(0, 1), st.integers(0, 7))
def test_flipped_bits_give_the_sound_or_an_error(kind, where, bit):
    """FLAC and Ogg carry checksums: a flipped bit is refused, or changes nothing."""
    signal = (0.3 * torch.sin(torch.arange(4000) / 7)).view(1, 1, -1)
    data = bytearray(audio_files.encode_audio(signal, 16000, kind))
    whole, _ = audio_files.load_wav(bytes(data))
    data[min(len(data) - 1, int(where * len(data)))] ^= 1 << bit
    try:
        wav, _ = audio_files.load_wav(bytes(data))
    except AudioError:
        return
    assert torch.equal(wav, whole)


def test_ogg_checksum_matches_the_bitwise_definition():
    """Against the textbook shift register, on pages of many lengths."""
    for length in (0, 1, 27, 300):
        page, register = bytes(range(256)) * 2, 0
        page = page[:length]
        for byte in page:
            register ^= byte << 24
            for _ in range(8):
                register = (register << 1) ^ (0x04C11DB7 if register & 0x80000000 else 0)
                register &= 0xFFFFFFFF
        assert containers._ogg_crc(page) == register


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_S8"])
def test_flac_depths(tmp_path, subtype):
    samples = (np.random.default_rng(0).uniform(-0.5, 0.5, 1000) * 127).round() / 128
    soundfile.write(tmp_path / "a.flac", samples, 16000, subtype=subtype)
    wav, _ = audio_files.load_wav(tmp_path / "a.flac")
    assert np.allclose(wav.flatten().numpy(), samples, atol=1 / 128)


def test_wav_float_with_nan_is_refused(tmp_path):
    samples = np.zeros(1000, np.float32)
    samples[500] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        audio_files.load_wav(tmp_path / "a.wav")


def test_foreign_and_unchecked_formats(tmp_path, tone):
    (tmp_path / "a.wav").write_bytes(b"not audio at all" * 100)
    with pytest.raises(AudioError, match="not readable"):
        audio_files.load_wav(tmp_path / "a.wav")
    buffer = io.BytesIO()
    soundfile.write(buffer, tone.flatten().numpy(), 16000, format="VOC", subtype="PCM_16")
    with pytest.raises(AudioError, match="cannot be checked"):
        audio_files.load_wav(buffer.getvalue())
    with pytest.raises(AudioError, match="no such file"):
        audio_files.load_wav(tmp_path / "missing.wav")


def test_stereo_and_rate_only_when_asked(tmp_path, tone):
    both = np.stack([tone.flatten().numpy(), -0.5 * tone.flatten().numpy()], axis=1)
    soundfile.write(tmp_path / "a.wav", both, 16000)
    with pytest.raises(AudioError, match="2 channels"):
        audio_files.load_wav(tmp_path / "a.wav")
    mono, _ = audio_files.load_wav(tmp_path / "a.wav", mono=True)
    assert torch.allclose(mono, tone * 0.25, atol=1e-4)
    with pytest.raises(AudioError, match="16000 Hz, wanted 8000"):
        audio_files.load_wav(tmp_path / "a.wav", 8000, mono=True)
    converted, rate = audio_files.load_wav(
        tmp_path / "a.wav", 8000, resample_to_rate=True, mono=True
    )
    assert (rate, converted.shape[-1]) == (8000, 4000)


def test_parts_of_a_file(tmp_path, tone):
    path = audio_files.save_wav(tmp_path / "a.wav", tone, 16000)
    part, _ = audio_files.load_wav(path, start=0.1, seconds=0.2)
    assert torch.allclose(part, tone[..., 1600:4800], atol=1e-4)
    for start, seconds in ((0.4, 0.2), (0.6, None), (-0.1, None), (0.0, 0.0)):
        with pytest.raises(AudioError):
            audio_files.load_wav(path, start=start, seconds=seconds)


def test_saving_is_all_or_nothing(tmp_path, tone):
    with pytest.raises(AudioError, match="peaks"):
        audio_files.save_wav(tmp_path / "a.wav", tone * 10, 16000)
    with pytest.raises(AudioError, match="cannot write"):
        audio_files.save_wav(tmp_path / "a.xyz", tone, 16000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("source", "target"), [(22050, 16000), (16000, 24000), (48000, 16000)])
def test_resample_agrees_with_scipy_on_speech_band(source, target):
    rng = np.random.default_rng(0)
    band = scipy.signal.butter(8, 3000, fs=source, output="sos")
    x = 0.1 * scipy.signal.sosfiltfilt(band, rng.standard_normal(source // 2))
    theirs = scipy.signal.resample_poly(x, target, source, window=("kaiser", 12.0))
    ours = audio.resample(torch.from_numpy(x).float().view(1, 1, -1), source, target)[0, 0].numpy()
    middle = slice(target // 10, -target // 10)
    size = min(len(ours), len(theirs))
    assert len(ours) == math.ceil(len(x) * target / source)
    assert np.abs(ours[:size] - theirs[:size])[middle].max() < 2e-3


def test_log_mel_against_numpy():
    wav = 0.1 * torch.randn(1, 1, 4000).clamp(-3, 3)
    module = audio.LogMel(16000, n_fft=512, hop_length=160, n_mels=40, floor=1e-3)
    padded = np.pad(wav[0, 0].double().numpy(), 256, mode="reflect")
    window = scipy.signal.get_window("hann", 512)
    frames = np.stack([padded[i * 160 : i * 160 + 512] * window for i in range(4000 // 160 + 1)])
    spectrum = np.abs(np.fft.rfft(frames))
    hz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    bins = np.linspace(0, 8000, 257)
    up = (bins[:, None] - hz[:-2]) / (hz[1:-1] - hz[:-2])
    down = (hz[2:] - bins[:, None]) / (hz[2:] - hz[1:-1])
    bank = np.maximum(0, np.minimum(up, down))
    expected = np.log10(np.maximum(spectrum @ bank, 1e-3)).T
    assert np.allclose(module(wav)[0].numpy(), expected, atol=1e-4)


def test_dead_mel_filters_are_named():
    with pytest.warns(UserWarning, match=r"mel filters \[.*\] have no weight"):
        module = audio.LogMel(16000, n_fft=256, n_mels=80)
    assert len(module.dead_filters()) > 0
    assert len(audio.LogMel(16000).dead_filters()) == 0


def test_loudness_of_the_standard_tone():
    """BS.1770: a 997 Hz sine at full scale reads -3.01 LUFS."""
    t = torch.arange(48000 * 2) / 48000
    wav = torch.sin(2 * math.pi * 997 * t).view(1, 1, -1)
    assert abs(audio.loudness(wav, 48000).item() + 3.01) < 0.05


def test_set_loudness_refuses_to_clip(tone):
    with pytest.raises(AudioError, match="would clip; the highest"):
        audio.set_loudness(tone, 16000, target=0.0)
    square = torch.sign(tone)
    with pytest.raises(AudioError, match="clipped"):
        audio.set_loudness(square, 16000)


def test_mel_to_wav_is_deterministic_and_close(corpus):
    wav = corpus[0].wav
    mel = audio.log_mel(wav, 16000)
    state = torch.get_rng_state()
    one, two = (audio.mel_to_wav(mel, 16000, length=wav.shape[-1]) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.get_rng_state())
    assert (audio.log_mel(one, 16000) - mel).abs().mean() < 0.15


def test_player_is_offline_compressed_and_labelled(tone):
    bundle = display.play(tone, 16000, "a <tone>", "it's")._repr_mimebundle_()
    page = bundle["text/markdown"]
    assert "http" not in page
    assert "a &lt;tone&gt;" in page
    assert "data:audio/mpeg;base64," in page
    assert len(page) < tone.numel() * 2
    long = display.Player({"long": torch.zeros(1, 1, 160000)}, 16000, max_seconds=4)
    assert long.clips["long"].shape[-1] == 64000


def test_real_recordings(real_speech):
    for path in sorted((real_speech / "ljspeech" / "wavs").glob("*.wav"))[:3]:
        wav, rate = audio_files.load_wav(path, 22050)
        assert -45 < audio.loudness(wav, rate) < -10
    for path in sorted((real_speech / "librispeech_train-clean-100").glob("*.flac"))[:5]:
        assert audio_files.load_wav(path, 16000)[0].shape[-1] > 16000


def test_variable_mp3_without_length_is_refused():
    """Loud, then silent: frames of several bit rates. Without a Xing frame, no length."""
    wav = torch.cat([0.5 * torch.sin(torch.arange(16000) * 1.1), torch.zeros(64000)]).view(1, 1, -1)
    data = audio_files.encode_audio(wav, 16000, "mp3")
    assert abs(audio_files.load_wav(data)[0].shape[-1] - 80000) < 4000
    first = containers._mp3_frame_bytes(data[:4])
    with pytest.raises(AudioError, match="without a Xing header"):
        audio_files.load_wav(data[first:])


def test_a_tag_after_an_mp3_is_no_damage(tone):
    data = audio_files.encode_audio(tone, 16000, "mp3")
    assert torch.equal(
        audio_files.load_wav(data + b"APETAGEX" + bytes(100))[0], audio_files.load_wav(data)[0]
    )
    assert torch.equal(
        audio_files.load_wav(data + b"TAG" + bytes(125))[0], audio_files.load_wav(data)[0]
    )


@pytest.mark.parametrize("size", [b"\xff" * 4, bytes(4)])
def test_a_wav_without_length_is_read_to_its_end(tone, size):
    """A pipe writes ffffffff; a recorder that died leaves 0."""
    data = bytearray(audio_files.encode_audio(tone, 16000, "wav"))
    whole, _ = audio_files.load_wav(bytes(data))
    data[40:44] = size
    with pytest.warns(UserWarning, match="gives no length"):
        found, _ = audio_files.load_wav(bytes(data) + b"x")  # half a sample behind
    assert torch.equal(found, whole)


def test_float_wav_beyond_full_scale_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.linspace(-3000, 3000, 999), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"peaks at \+69.5 dBFS or more .*--normalise"):
        audio_files.load_wav(tmp_path / "a.wav")
    with pytest.warns(UserWarning, match=r"a.wav: scaled by -69.5 dB"):
        wav, _ = audio_files.load_wav(tmp_path / "a.wav", normalise=True)
    torch.testing.assert_close(wav.flatten(), torch.linspace(-1, 1, 999))


def test_caches_made_in_inference_mode_serve_in_training():
    with torch.inference_mode():
        audio.log_mel(torch.zeros(1, 1, 3000), 11025)
        audio.resample(torch.zeros(1, 1, 3000), 11025, 7000)
    wav = (0.1 * torch.randn(1, 1, 3000)).clamp(-1, 1).requires_grad_()
    (audio.log_mel(wav, 11025).sum() + audio.resample(wav, 11025, 7000).sum()).backward()
    assert torch.isfinite(wav.grad).all()


@pytest.mark.parametrize("rate", [16000, 20000, 96000])
def test_players_take_any_rate(rate):
    assert "audio/mpeg" in display.play(torch.zeros(1, 1, rate), rate).html()


def test_unwritable_rates_are_named(tone):
    with pytest.raises(AudioError, match="sample_rate=20000"):
        audio_files.encode_audio(tone, 20000, "mp3")
