"""Peak memory of coding an hour against a minute, from file to tokens to file.

    python benchmarks/long_audio.py [--json] [--quick] [--threads N]

A fresh process each: `encode_file` reads a FLAC recording in blocks, `decode_file` writes a WAV in
blocks. The recording is made here, also in blocks, from utterances of the embedded corpus. For
each tokeniser: peak memory in MiB for one minute and for one hour (--quick: four minutes), and the
seconds it took. The hour may need at most 300 MiB more.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import soundfile
from common import options, report

from speechlab.foundations.corpus import embedded_corpus

ONE_RUN = """
import pathlib, sys, time, torch
torch.set_num_threads(int(sys.argv[3]))
from speechlab.tokenizer.files import decode_file, encode_file
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer
tokenizer, start = SpeechTokenizer.load(sys.argv[1]), time.perf_counter()
tokens = encode_file(tokenizer, sys.argv[2])
middle = time.perf_counter()
decode_file(tokenizer, tokens, sys.argv[2] + ".wav")
done = time.perf_counter()
status = pathlib.Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(peak, middle - start, done - middle, tokens.seconds)
"""


def write_recording(path: Path, seconds: int) -> None:
    """Utterances one after the other, until the wanted length is there."""
    corpus, left, index = embedded_corpus("smoke"), seconds * 16000, 0
    with soundfile.SoundFile(path, "w", 16000, 1, "PCM_16") as file:
        while left > 0:
            wav = corpus[index % len(corpus)].wav[0, 0, :left].numpy()
            file.write(wav)
            left, index = left - len(wav), index + 1


def measure(name: str, path: Path, threads: int) -> tuple[float, ...]:
    """Peak MiB, seconds to encode, seconds to decode, seconds of audio; of a fresh process."""
    command = [sys.executable, "-c", ONE_RUN, name, str(path), str(threads)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(map(float, found.stdout.split()[-4:]))


def main() -> None:
    settings = options(__doc__)
    long, rows = 240 if settings.quick else 3600, []
    with tempfile.TemporaryDirectory() as folder:
        paths = {60: Path(folder) / "minute.flac", long: Path(folder) / "long.flac"}
        for seconds, path in paths.items():
            write_recording(path, seconds)
        for name in ("speechtokenizer-small", "small-causal"):
            minute, hour = (measure(name, path, settings.threads) for path in paths.values())
            rows.append(
                {
                    "case": f"peak memory, {name}, {long} s", "ours": hour[0], "peer": "60 s",
                    "peer_value": minute[0], "unit": "MiB", "ratio": minute[0] / hour[0],
                }
            )  # fmt: skip
            for what, place in (("encode", 1), ("decode", 2)):
                rows.append(
                    {
                        "case": f"{what}, {name}, {long} s", "ours": hour[place],
                        "peer": "the audio itself", "peer_value": hour[3], "unit": "s",
                        "ratio": hour[3] / hour[place],
                    }
                )  # fmt: skip
            if hour[0] - minute[0] > 300:
                raise SystemExit(
                    f"{name}: {hour[0] - minute[0]:.0f} MiB more for the long recording"
                )
    report(rows, settings.json)


if __name__ == "__main__":
    main()
