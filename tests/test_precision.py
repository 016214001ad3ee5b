"""Fewer bits: what changes, what does not, and who is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speechlab.foundations.audio_files import save_wav
from speechlab.foundations.batches import pad_last
from speechlab.foundations.columns import codes_column
from speechlab.foundations.contracts import mask_of
from speechlab.tokenizer import files
from speechlab.tokenizer.precision import at_precision
from speechlab.tokenizer.speech_tokenizer import CONFIGS, SpeechTokenizer

MODEL = "speechtokenizer-small"


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.load(MODEL)


@pytest.fixture(scope="module")
def with_lstm():
    torch.manual_seed(0)
    return SpeechTokenizer(CONFIGS["seanet-small"]).eval()


def test_float32_is_the_tokenizer_itself(tokenizer):
    assert at_precision(tokenizer, "fp32") is tokenizer


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_networks_are_rounded_and_the_original_is_not(with_lstm, corpus, precision):
    wav = corpus[0].wav
    before = with_lstm.encoder.infer(wav)
    other = at_precision(with_lstm, precision)
    z = other.encoder.infer(wav)
    error = (z - before).norm() / before.norm()
    assert z.dtype == torch.float32
    assert 1e-5 < error < 0.1  # rounded, and not wrong
    assert torch.equal(with_lstm.encoder.infer(wav), before)
    assert other.spec == with_lstm.spec
    assert other.quantizer is with_lstm.quantizer
    codes = other.encode(wav)
    assert torch.equal(codes, with_lstm.quantizer.encode(z))  # compared in float32
    sound = other.decode(codes)
    wanted = with_lstm.decode(codes)
    assert not torch.equal(sound, wanted)
    assert (sound - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_ragged_rows(with_lstm, corpus, precision):
    other = at_precision(with_lstm, precision)
    rows = [corpus[i].wav for i in range(3)]
    wav, sizes = pad_last([row[0] for row in rows])
    codes = other.encode(wav, None, mask_of(sizes, wav.shape[-1]))
    for row, mine in zip(rows, codes):
        alone = other.encode(row)[0]
        assert (mine[:, : alone.shape[1]] == alone).float().mean() > 0.9
        assert (mine[:, alone.shape[1] :] == -1).all()


def test_shipped_codes_agree(tokenizer, corpus):
    half = at_precision(tokenizer, "bf16")
    pairs = [(tokenizer.encode(u.wav)[0], half.encode(u.wav)[0]) for u in corpus[:6]]
    first = torch.cat([(a == b)[0].float() for a, b in pairs]).mean()
    assert 0.9 < first < 1.0  # 1.0 would mean that nothing was rounded


def test_refusals(tokenizer, with_lstm):
    with pytest.raises(ValueError, match="precision is 'fp8'; it must be one of: fp32, bf16, int8"):
        at_precision(tokenizer, "fp8")
    with pytest.raises(ValueError, match="this tokeniser has none"):
        at_precision(tokenizer, "int8")
    with pytest.raises(ValueError, match="cannot tell 8-bit weights apart"):
        codes_column(at_precision(with_lstm, "int8"))
    keys = {codes_column(at_precision(tokenizer, p)).key for p in ("fp32", "bf16")}
    assert len(keys) == 2  # a cache of one is not taken for the other's


def test_folders_are_made_again_at_another_precision(tmp_path, corpus):
    for u in corpus[:3]:
        save_wav(tmp_path / "in" / f"{u.id}.wav", u.wav, 16000)
    run = {"model": MODEL, "source": tmp_path / "in", "target": tmp_path / "out"}
    assert files.encode_folder(**run).done == 3
    assert files.encode_folder(**run).skipped == 3
    assert files.encode_folder(**run, precision="bf16").again == 3
    assert files.encode_folder(**run, precision="bf16").skipped == 3
    with pytest.raises(ValueError, match="int8 is for the LSTM"):
        files.encode_folder(**run, precision="int8")


# Batches of a folder


def lengths_in(batches) -> list[list[float]]:
    return [[float(source.stem.split("_")[1]) for source, _ in batch] for batch in batches]


def test_batches_are_sorted_and_bounded(tmp_path):
    seconds = [0.5, 31.0, 4.0, 4.1, 40.0, 3.9, 1.0, 0.9, 12.0] + [0.2] * 60
    jobs = []
    for number, length in enumerate(seconds):
        silence = torch.zeros(1, 1, int(8000 * length))
        path = save_wav(tmp_path / f"{number}_{length}.wav", silence, 8000)
        jobs.append((path, path.with_suffix(".spt")))
    (tmp_path / "bad_0.wav").write_bytes(b"RIFF")
    jobs.append((tmp_path / "bad_0.wav", tmp_path / "x.spt"))
    batches = files._in_batches(jobs, 13.0)
    assert sorted(job for batch in batches for job in batch) == sorted(jobs)
    lengths = lengths_in(batches)
    assert lengths[:2] == [[40.0], [31.0]]  # longer than WHOLE: alone
    assert all(len(batch) == 1 or len(batch) * batch[0] <= 13.0 for batch in lengths)
    assert max(map(len, lengths)) == 32
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert all(len(batch) == 1 for batch in files._in_batches(jobs, 0))  # one by one


def test_one_bad_recording_spoils_no_batch(tmp_path, tokenizer, corpus):
    paths = [save_wav(tmp_path / f"{i}.wav", corpus[i].wav, 16000) for i in range(3)]
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    paths.insert(1, tmp_path / "bad.wav")
    found = files.encode_files(tokenizer, paths, 3)
    assert "bad.wav" in str(found[1])
    for path, file in zip(paths, found):
        if path.name != "bad.wav":
            alone = files.encode_file(tokenizer, path, 3)
            assert (alone.codes == file.codes).float().mean() > 0.99  # ties may differ
            assert (alone.samples, alone.source) == (file.samples, file.source)
            assert alone.spec == file.spec


def test_no_memory_for_a_batch(tmp_path, tokenizer, corpus, monkeypatch):
    paths = [save_wav(tmp_path / f"{i}.wav", corpus[i].wav, 16000) for i in range(3)]
    whole, seen = tokenizer.encode, []

    def small(wav, n_q=None, mask=None):
        seen.append(len(wav))
        if len(wav) > 1:
            raise RuntimeError("out of memory")
        return whole(wav, n_q, mask)

    monkeypatch.setattr(tokenizer, "encode", small)
    found = files.encode_files(tokenizer, paths)
    assert seen == [3, 1, 1, 1]
    assert [file.samples for file in found] == [corpus[i].wav.shape[-1] for i in range(3)]


def test_two_processes_share_a_folder(tmp_path, corpus):
    """Two of gloo: the same files as one process makes, byte for byte."""
    for i in range(7):
        save_wav(tmp_path / "in" / f"{i}.wav", corpus[i].wav, 16000)
    (tmp_path / "in" / "bad.wav").write_bytes(b"RIFF")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command = str(Path(sys.executable).with_name("speechlab"))
    for count in (1, 2):
        work = [str(tmp_path / "in"), str(tmp_path / str(count)), "--batch-seconds", "6"]
        several = [*launch, "--nproc-per-node", "2"] if count == 2 else []
        ran = subprocess.run(
            [*several, command, "encode", *work], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "SPEECHLAB_DEVICE": "cpu"},
        )  # fmt: skip
        assert ran.returncode == 1, ran.stderr  # of the bad one
        assert ran.stdout.count("7 done, 0 there already, 1 failed") == 1  # one speaks
        assert ran.stderr.count("not readable as audio") == 1
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "12")
    assert len(one) == 7
    assert one == two


def test_a_recording_is_not_overwritten_by_its_copy(tmp_path, corpus):
    """`encode x x`, then `decode x x`: a.wav.spt would become a.wav."""
    path = save_wav(tmp_path / "a.wav", corpus[0].wav, 16000)
    before = path.read_bytes()
    files.encode_folder(MODEL, tmp_path, tmp_path)
    with pytest.raises(files.TokenFileError, match="may be the recording"):
        files.decode_folder(MODEL, tmp_path, tmp_path)
    assert path.read_bytes() == before
    assert files.decode_folder(MODEL, tmp_path, tmp_path, ending=".flac").done == 1


def test_plain_files_are_packed_when_asked(tmp_path, corpus):
    for u in corpus[:2]:
        save_wav(tmp_path / "in" / f"{u.id}.wav", u.wav, 16000)
    assert files.encode_folder(MODEL, tmp_path / "in", tmp_path / "out").done == 2
    packed = files.encode_folder(MODEL, tmp_path / "in", tmp_path / "out", entropy=True)
    assert packed.again == 2
    again = files.encode_folder(MODEL, tmp_path / "in", tmp_path / "out", entropy=True)
    assert again.skipped == 2


def test_a_name_that_is_too_long_fails_alone(tmp_path, corpus):
    (tmp_path / "in").mkdir()
    for name in ("a" * 249, "b"):
        save_wav(tmp_path / "x.wav", corpus[0].wav, 16000).rename(tmp_path / "in" / f"{name}.wav")
    report = files.encode_folder(MODEL, tmp_path / "in", tmp_path / "out")
    assert report.done == 1
    assert len(report.failed) == 1
