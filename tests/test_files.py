"""Token files: packing, arithmetic coding, damage, folders, shards."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same_codes import assert_same_codes

from speechlab.foundations.audio import resample
from speechlab.foundations.audio_files import load_wav, save_wav
from speechlab.foundations.contracts import CodeSpec, CodeSpecError
from speechlab.foundations.models import ModelError
from speechlab.tokenizer import files, shards, tokens
from speechlab.tokenizer.frame_codec import FrameCodecConfig
from speechlab.tokenizer.speech_tokenizer import CONFIGS, SpeechTokenizer, SpeechTokenizerConfig
from speechlab.tokenizer.tokens import TokenFile, TokenFileError, from_bytes, to_bytes

SMALL = FrameCodecConfig(width=8, encoder_blocks=1, decoder_blocks=1, sample_rate=8000)
AT_8K = SpeechTokenizerConfig(SMALL, CONFIGS["small"].rvq, 0, 8000)


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.load("speechtokenizer-small")


@st.composite
def token_files(draw):
    n_q, frames = draw(st.integers(1, 9)), draw(st.integers(0, 30))
    size = draw(st.sampled_from([2, 3, 16, 256, 1000, 1024, 65536]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    few = draw(st.integers(1, size))
    codes = torch.from_numpy(rng.integers(few, size=(n_q, frames)))
    hop = draw(st.integers(1, 2000))
    samples = max(0, frames * hop - draw(st.integers(0, hop - 1)))
    name = draw(st.text(max_size=20))
    spec = CodeSpec(size, n_q, draw(st.integers(1, 2**31 - 1)), hop, 7, name)
    return TokenFile(codes, spec, samples)


@settings(max_examples=150)
@given(token_files(), st.booleans())
def test_files_come_back(file, entropy):
    again = from_bytes(to_bytes(file, entropy))
    assert torch.equal(again.codes, file.codes)
    assert again.samples == file.samples
    assert again.spec == replace(file.spec, name=again.spec.name)
    assert file.spec.name.startswith(again.spec.name)
    assert again.seconds == file.samples / file.spec.sample_rate


def test_packed_bits_are_those_of_the_codes():
    """Written out as a string of binary digits."""
    codes = np.random.default_rng(0).integers(1000, size=(3, 7))
    digits = "".join(format(int(c), "010b") for frame in codes.T for c in frame)
    digits += "0" * (-len(digits) % 8)
    wanted = bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
    assert tokens.pack_codes(codes, 1000) == wanted
    assert [tokens.bits_per_code(k) for k in (2, 3, 256, 257, 1024)] == [1, 2, 8, 9, 10]


@settings(max_examples=60)
@given(st.integers(2, 300), st.integers(1, 3), st.integers(0, 400), st.integers(0, 10**6))
def test_arithmetic_coding_comes_back(size, n_q, frames, seed):
    rng = np.random.default_rng(seed)
    skewed = (rng.random((n_q, frames)) ** rng.integers(1, 40) * size).astype(int)
    data = tokens.squeeze(skewed, size)
    assert (tokens.unsqueeze(data, n_q, frames, size) == skewed).all()


def test_long_runs_and_carries():
    """Runs make wide symbols and many carries; the counts are halved on the way."""
    codes = np.repeat(np.random.default_rng(0).integers(5, size=60), 200)[None]
    data = tokens.squeeze(codes, 5)
    assert (tokens.unsqueeze(data, *codes.shape, 5) == codes).all()
    assert 8 * len(data) / codes.size < 0.2


def test_bits_follow_the_model_that_both_sides_count():
    """The size is the sum of -log2 p under the same counts, within a few bytes."""
    codes = np.random.default_rng(1).integers(40, size=(1, 3000)) // 3
    model, before, bits = tokens._Counts(16), 0, 0.0
    for code in codes[0].tolist():
        table = model.table(before)
        bits -= np.log2((table[code + 1] - table[code]) / table[-1])
        model.count(code, before)
        before = code
    assert abs(8 * len(tokens.squeeze(codes, 16)) - bits) < 80


@pytest.fixture(scope="module")
def originals():
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(256, size=(8, 40)) // rng.integers(1, 30, size=(8, 1)))
    spec = CodeSpec(256, 8, 16000, 320, 123, "speechtokenizer-small")
    file = TokenFile(codes, spec, 40 * 320 - 7)
    return file, to_bytes(file), to_bytes(file, entropy=True)


def damaged(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:  # bits
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # truncated
        del out[rng.randrange(len(out)) :]
    elif kind == 2:  # longer
        out += rng.randbytes(rng.randint(1, 20))
    elif kind == 3:  # a block overwritten
        place = rng.randrange(len(out))
        out[place : place + 6] = rng.randbytes(6)
    elif kind == 4:  # somebody who knows the format: a wild header with a right checksum
        place = rng.randrange(4, 50)
        out[place] = rng.randrange(256)
        out[-4:] = struct.pack("<I", zlib.crc32(bytes(out[:-4])))
    else:
        out = bytearray(rng.randbytes(rng.randint(0, 300)))
    return bytes(out)


def test_ten_thousand_damaged_files(originals):
    """Every one is refused, or (with a forged checksum) read without a crash and within bounds."""
    file, *datas = originals
    rng, forged = random.Random(0), 0
    for number in range(10_000):
        data = datas[number % 2]
        bad = damaged(data, rng)
        try:
            found = from_bytes(bad)
        except TokenFileError:
            continue
        if bad == data:
            assert torch.equal(found.codes, file.codes)
            continue
        forged += 1  # only a forged checksum gets here
        assert bad[-4:] == struct.pack("<I", zlib.crc32(bad[:-4]))
        assert found.codes.numel() <= 64 * len(bad)
    assert forged < 2500


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    for start in (b"", b"SPT1", b"SPT1\x01\x00\x08\x00"):
        with pytest.raises(TokenFileError):
            from_bytes(start + data)


def test_claims_are_bounded():
    """A few bytes that promise a year of sound are refused before anything is unpacked."""
    for flags in (0, 1):
        head = tokens._HEADER.pack(b"SPT1", 2, flags, 8, 256, 16000, 320, 2**40, 2**48, 0, 0, 0)
        data = head + struct.pack("<Q", 5) + b"12345"
        with pytest.raises(TokenFileError, match="cannot be"):
            from_bytes(data + struct.pack("<I", zlib.crc32(data)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: b"RIFF" + d[4:], "not a speechlab token file"),
        (lambda d: d[:3], "too short"),
        (lambda d: d[:4] + b"\x01" + d[5:], "version 1"),
        (lambda d: d[:-20], "truncated"),
        (lambda d: d[:80] + bytes([d[80] ^ 1]) + d[81:], "checksum"),
    ],
)
def test_damage_is_named(originals, tmp_path, change, words):
    path = tmp_path / "a.spt"
    path.write_bytes(change(originals[1]))
    with pytest.raises(TokenFileError, match=words) as error:
        files.read_tokens(path)
    assert "a.spt" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codes": torch.zeros(8, 3)}, "codes is torch.float32"),
        ({"codes": torch.full((8, 3), 256)}, "codes range from 256 to 256; they must lie"),
        ({"codes": torch.full((8, 3), -1)}, "codes range from -1 to -1; they must lie"),
        ({"codes": torch.zeros(3, dtype=torch.long)}, "codes is"),
        ({"codes": torch.zeros(7, 3, dtype=torch.long)}, "codes has 7 levels; wanted exactly 8"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"codebook_size": 65537}, "codebook_size is 65537"),
        ({"samples": 5000}, "do not make 3 frames"),
        ({"hop_length": 0}, "hop_length is 0"),
        ({"hop_length": 1 << 31, "samples": 5 << 30}, f"hop_length {1 << 31}"),
    ],
)
def test_bad_token_files(settings, words):
    good = {"codes": torch.zeros(8, 3, dtype=torch.long), "codebook_size": 256}
    given = good | {"sample_rate": 16000, "hop_length": 320, "samples": 900} | settings
    with pytest.raises(ValueError, match=words):
        TokenFile(
            given["codes"],
            CodeSpec(given["codebook_size"], 8, given["sample_rate"], given["hop_length"]),
            given["samples"],
        )


# Sound


def test_wave_to_file_and_back(tokenizer, corpus, tmp_path):
    wav = corpus[0].wav
    file = files.encode_wav(tokenizer, wav)
    assert file.spec == tokenizer.spec
    assert file.spec.name == "speechtokenizer-small"
    assert_same_codes(tokenizer, wav, file.codes[None])
    path = files.write_tokens(tmp_path / "deep" / "a.spt", file, entropy=True)
    again = files.read_tokens(path)
    assert again.spec == file.spec
    assert torch.equal(again.codes, file.codes)
    rebuilt = files.decode_tokens(tokenizer, again)
    torch.testing.assert_close(rebuilt, tokenizer.decode(tokenizer.encode(wav), wav.shape[-1]))
    two = files.decode_tokens(tokenizer, again, 2)
    wanted = tokenizer.decode(tokenizer.encode(wav, 2), wav.shape[-1])
    torch.testing.assert_close(two, wanted)
    assert list(path.parent.iterdir()) == [path]  # no draft stays
    with pytest.raises(ValueError, match="2 signals"):
        files.encode_wav(tokenizer, wav.repeat(2, 1, 1))


def test_a_file_in_blocks_is_the_whole(tokenizer, corpus, tmp_path):
    wav = torch.cat([corpus[i].wav for i in range(8)], dim=-1)
    assert wav.shape[-1] > 12 * 16000  # more than a piece
    path = save_wav(tmp_path / "a.wav", wav, 16000)
    heard, _ = load_wav(path)
    file = files.encode_file(tokenizer, path, 5)
    assert (file.samples, file.spec) == (wav.shape[-1], tokenizer.spec.levels(5))
    assert_same_codes(tokenizer, heard, file.codes[None])
    target = files.decode_file(tokenizer, file, tmp_path / "b.wav")
    sound, rate = load_wav(target)
    assert rate == 16000
    torch.testing.assert_close(sound, files.decode_tokens(tokenizer, file), atol=1e-4, rtol=0)


def test_codes_of_another_tokenizer_are_refused(tokenizer, corpus, tmp_path):
    file, other = files.encode_wav(tokenizer, corpus[0].wav), SpeechTokenizer.load("encodec-small")
    words = r"another tokeniser \(speechtokenizer-small\): their fingerprint is [0-9a-f]{8}, wanted"
    with pytest.raises(CodeSpecError, match=words):
        files.decode_tokens(other, file)
    with pytest.raises(CodeSpecError, match=words):
        files.decode_file(other, file, tmp_path / "a.wav")
    assert list(tmp_path.iterdir()) == []
    assert tokenizer.spec == SpeechTokenizer.load("speechtokenizer-small").spec
    assert tokenizer.spec.fingerprint not in (0, other.spec.fingerprint)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_blocks_are_the_whole(tmp_path, corpus, rate):
    wav = torch.cat([corpus[i].wav for i in range(5)], dim=-1)
    path = save_wav(tmp_path / "a.flac", resample(wav, 16000, rate), rate)
    whole, _ = load_wav(path, 16000, resample_to_rate=True)
    for seconds in (0.7, 3.0, 100.0):
        blocks = list(files.read_blocks(path, 16000, seconds))
        found = torch.cat(blocks, dim=-1)
        assert found.shape == whole.shape
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
        assert len(blocks) > 1 or seconds == 100


def test_stereo_blocks_are_averaged(tmp_path):
    import soundfile

    left, right = (0.1 * np.random.default_rng(i).normal(size=4000) for i in range(2))
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    (found,) = files.read_blocks(tmp_path / "s.wav", 16000)
    np.testing.assert_allclose(found[0, 0], (left + right) / 2, atol=1e-6)


def test_bad_recordings(tmp_path, tokenizer):
    (tmp_path / "a.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not readable"):
        files.encode_file(tokenizer, tmp_path / "a.wav")
    import soundfile

    soundfile.write(tmp_path / "e.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match="0 of 0"):
        files.encode_file(tokenizer, tmp_path / "e.wav")
    soundfile.write(tmp_path / "n.wav", np.full(4000, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="NaN"):
        files.encode_file(tokenizer, tmp_path / "n.wav")
    whole = save_wav(tmp_path / "w.wav", torch.zeros(1, 1, 16000), 16000).read_bytes()
    (tmp_path / "half.wav").write_bytes(whole[:16000])
    with pytest.raises(ValueError, match="truncated"):
        files.encode_file(tokenizer, tmp_path / "half.wav")
    file = files.encode_wav(tokenizer, torch.zeros(1, 1, 16000))
    file = replace(file, spec=replace(file.spec, name="é" * 200))
    assert from_bytes(to_bytes(file)).spec.name == "é" * 127  # 255 bytes, no half letters
    with pytest.raises(ValueError, match="cannot write this ending"):
        files.decode_file(tokenizer, file, tmp_path / "a.m4a")


def test_a_failed_write_leaves_nothing(tmp_path, tokenizer, corpus, monkeypatch):
    file = files.encode_wav(tokenizer, corpus[0].wav)

    def broken(*arguments):
        raise RuntimeError("stop")
        yield

    monkeypatch.setattr(files, "decode_pieces", broken)
    with pytest.raises(RuntimeError, match="stop"):
        files.decode_file(tokenizer, file, tmp_path / "out.wav")
    assert list(tmp_path.iterdir()) == []


def test_folders_resume_and_report(tmp_path, corpus):
    for u in corpus[:4]:
        save_wav(tmp_path / "in" / u.speaker / f"{u.id}.flac", u.wav, 16000)
    (tmp_path / "in" / "bad.wav").write_bytes(b"RIFF")
    name, out = "speechtokenizer-small", tmp_path / "out"
    report = files.encode_folder(name, tmp_path / "in", out, workers=2)
    assert (report.done, report.skipped, len(report.failed)) == (4, 0, 1)
    assert "bad.wav" in next(iter(report.failed))
    made = sorted(out.rglob("*.spt"))
    assert made[0].name.endswith(".flac.spt")
    made[0].write_bytes(made[0].read_bytes()[:-1])  # damaged: made again
    report = files.encode_folder(name, tmp_path / "in", out)
    assert (report.done, report.again, report.skipped) == (0, 1, 3)
    report = files.encode_folder(name, tmp_path / "in", out, n_q=2)  # other settings: made again
    assert (report.again, report.skipped) == (4, 0)
    back = files.decode_folder(name, out, tmp_path / "back", workers=2)
    assert back.done == 4
    _, rate = load_wav(sorted((tmp_path / "back").rglob("*.wav"))[0])
    assert rate == 16000
    other = files.decode_folder("encodec-small", out, tmp_path / "other")
    assert len(other.failed) == 4
    assert all("another tokeniser" in reason for reason in other.failed.values())
    with pytest.raises(ModelError, match="did you mean"):
        files.encode_folder("speechtokeniser-small", tmp_path / "in", tmp_path / "x")
    (out / "twice").mkdir()
    for ending in ("flac", "wav"):  # a.flac and a.wav: both are kept apart
        (out / "twice" / f"a.{ending}.spt").write_bytes(made[1].read_bytes())
    named = files.decode_folder(None, out / "twice", tmp_path / "named")  # the files name the model
    assert named.done == 2
    assert {p.name for p in (tmp_path / "named").iterdir()} == {"a.flac.wav", "a.wav.wav"}
    with pytest.raises(TokenFileError, match=r"no \.spt files"):
        files.decode_folder(name, tmp_path / "in", tmp_path / "x")
    with pytest.raises(ValueError, match="no audio files"):
        files.encode_folder(name, out, tmp_path / "x")


def test_shards(tmp_path, tokenizer, corpus, monkeypatch):
    part = corpus[:5]
    paths = shards.write_shards(tokenizer, part, tmp_path, rows=2, n_q=3)
    assert len(paths) == 3
    found = shards.shard_corpus(tmp_path)
    assert [e.id for e in found.entries] == [e.id for e in part.entries]
    assert found.sample_rate == 16000
    codes = found.columns["codes"]
    assert codes.spec == tokenizer.spec.levels(3)
    for entry, u in zip(found.entries, part):
        assert_same_codes(tokenizer, u.wav, codes.cut(entry.id)[None])
        assert codes.cut(entry.id).shape[0] == 3
        assert (entry.speaker, entry.text, entry.samples) == (u.speaker, u.text, u.entry.samples)
    with pytest.raises(TokenFileError, match="no sound"):
        _ = found[0].wav
    before = [p.read_bytes() for p in paths]
    paths[1].unlink()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", None)  # nothing is encoded twice
        shards.write_shards(tokenizer, part, tmp_path, rows=2, n_q=3)
    assert [p.read_bytes() for p in paths] == before
    assert len(shards.write_shards(tokenizer, part, tmp_path, rows=5, n_q=2)) == 1
    assert len(shards.shard_corpus(tmp_path)) == 5  # the shards of the other run are gone
    shards.write_shards(tokenizer, part, tmp_path, rows=2, n_q=2)  # other settings: made again
    two = shards.shard_corpus(tmp_path).columns["codes"]
    assert two.spec.n_q == 2
    assert {len(two.cut(e.id)) for e in part.entries} == {2}
    with pytest.raises(TokenFileError, match="no tokens"):
        shards.shard_corpus(tmp_path / "nothing")


def test_shards_that_do_not_belong_together(tmp_path, tokenizer, corpus):
    import pyarrow
    import pyarrow.parquet

    (one,) = shards.write_shards(tokenizer, corpus[:2], tmp_path / "a", n_q=2)
    (two,) = shards.write_shards(tokenizer, corpus[2:4], tmp_path / "b", n_q=3)
    twice = tmp_path / "a" / "tokens-00001.parquet"
    for path, words in ((one, "2 utterances twice"), (two, "2 tokenisers")):
        twice.write_bytes(path.read_bytes())
        with pytest.raises(TokenFileError, match=words):
            shards.shard_corpus(tmp_path / "a")
    pyarrow.parquet.write_table(pyarrow.table({"id": ["x"]}), twice)
    with pytest.raises(TokenFileError, match="not a token shard"):
        shards.shard_corpus(tmp_path / "a")
    with pytest.raises(ValueError, match="corpus has 16000 Hz"):
        shards.write_shards(SpeechTokenizer(AT_8K), corpus[:2], tmp_path / "c")
