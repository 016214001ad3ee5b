"""settings.ini and pyproject.toml, constraints, the equation register, the API page, the CLI."""

from __future__ import annotations

import configparser
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import speechlab
from speechlab.cli.main import COMMANDS, main
from speechlab.reference.equations import EQUATIONS

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_settings_match_pyproject():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    settings, project = settings["DEFAULT"], PYPROJECT["project"]
    assert settings["lib_name"] == project["name"]
    assert settings["version"] == speechlab.__version__
    assert settings["description"] == project["description"]
    assert project["requires-python"].startswith(f">={settings['min_python']}")
    assert settings["license"] == "apache2"
    assert project["license"] == "Apache-2.0"
    assert settings["tst_flags"].split() == ["notest", "cuda", "slow"]
    assert f'date-released: "{settings["version"]}"' not in (ROOT / "CITATION.cff").read_text()
    assert f"version: {settings['version']}" in (ROOT / "CITATION.cff").read_text()


def test_every_package_is_in_the_wheel():
    found = {"speechlab"} | {
        f"speechlab.{m.name}" for m in pkgutil.iter_modules(speechlab.__path__) if m.ispkg
    }
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    assert found <= listed
    assert {p for p in listed if not p.startswith("speechlab.data")} == found


def test_every_pin_satisfies_pyproject_and_names_no_host():
    from packaging.requirements import Requirement

    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    pins: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9.\-]+==[\w.]+( ; .+)?", line), line
            name, version = line.split(" ;")[0].split("==")
            pins.setdefault(name, []).append(version)
    groups = [
        PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"].values(),
    ]
    for requirement in (Requirement(r) for group in groups for r in group):
        if requirement.name != "speechlab":
            name = requirement.name.lower().replace("_", "-")
            assert any(requirement.specifier.contains(v) for v in pins[name]), requirement


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: f"{row.paper} {row.number} {row.what}")
def test_equation_register(row):
    """Each symbol can be imported, each test exists, each formula parses as TeX."""
    parts = row.symbol.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:cut]))
            break
        except ModuleNotFoundError:
            continue
    for name in parts[cut:]:
        target = getattr(target, name)
    assert callable(target)
    path, _, function = row.test.partition("::")
    assert f"def {function}(" in (ROOT / path).read_text()
    import pypandoc

    pypandoc.convert_text(
        f"${row.latex}$", "html", format="markdown", extra_args=["--mathml", "--fail-if-warnings"]
    )


def test_register_is_not_empty():
    assert ("SpeechTokenizer", "Eq. 7") in {(row.paper, row.number) for row in EQUATIONS}


def public(module) -> set[str]:
    """Names of the classes and functions that a module exports."""
    return {
        n
        for n in module.__all__
        if inspect.isclass(getattr(module, n)) or inspect.isfunction(getattr(module, n))
    }


MODULES = [
    m.name
    for m in pkgutil.walk_packages(speechlab.__path__, "speechlab.")
    if not m.ispkg
    and m.name.split(".")[1]
    not in (
        "_modidx",
        "comments_in_help",
        "docproc",
        "lesson",
        "reference",
    )
]


def public_methods(owner) -> set[str]:
    """Methods and properties that a class defines itself and that people may call."""
    kinds = (property, classmethod, staticmethod)
    return {
        name
        for name, value in vars(owner).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    }


def test_api_page_shows_every_public_symbol_and_method():
    """The README's calls, `SpeechTokenizer.encode` for one, were missing from it once."""
    page = json.loads((ROOT / "nbs/reference/api.ipynb").read_text())
    text = "\n".join("".join(cell["source"]) for cell in page["cells"])
    shown = set(re.findall(r"^#{2,5} `?([\w.]+)`?", text, re.M))
    for name in MODULES:
        module = importlib.import_module(name)
        for symbol in public(module):
            owner = getattr(module, symbol)
            assert symbol in shown, f"{name}.{symbol}"
            if inspect.isclass(owner) and not issubclass(owner, tuple):
                for method in public_methods(owner):
                    assert f"{symbol}.{method}" in shown, f"{name}.{symbol}.{method}"
    assert {"SpeechTokenizer.encode", "SpeechTokenizer.decode", "Corpus.split"} <= shown


def test_the_api_page_is_up_to_date():
    command = [sys.executable, ".ci/make_api.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_symbols_have_docstrings():
    for name in MODULES:
        module = importlib.import_module(name)
        for symbol in public(module):
            assert inspect.getdoc(getattr(module, symbol)), f"{name}.{symbol}"


def test_no_registry_hosts_in_tracked_files():
    hosts = "|".join(
        ("pypi" + r"\.org", "python" + "hosted", r"registry\." + "npmjs", r"deb\." + "debian")
    )
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.split():
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".yml", ".txt", ".ini", ".ipynb", ".cff")
            and path.exists()
        ):
            assert not re.search(hosts, path.read_text(encoding="utf-8")), name


# The command line


def test_the_entry_point_is_installed():
    """Once for real: the script of the package, its exit code and its time."""
    script = Path(sys.executable).parent / "speechlab"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, speechlab.__version__)
    started = time.perf_counter()
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "torch" not in done.stderr
    assert time.perf_counter() - started < 5  # loads no torch; under half a second when idle
    done = subprocess.run(
        [script, "encode", "/nowhere", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "speechlab: /nowhere: no such file or folder"


def test_info(command):
    out = command("info", "--json")
    report = json.loads(out.stdout)
    assert report["speechlab"] == speechlab.__version__
    assert Path(report["data"]).is_dir()
    assert {"device", "scale", "cache", "torch"} <= report.keys()


def test_corpus_commands(tmp_path, corpus, command):
    out = command("corpus", "stats", "smoke", "--json")
    assert json.loads(out.stdout)["all"]["utterances"] == len(corpus)
    out = command("corpus", "build", "smoke", "--export", str(tmp_path))
    assert out.returncode == 0
    assert len(list(tmp_path.rglob("*.flac"))) == len(corpus)
    out = command("corpus", "stats", "--folder", str(tmp_path), "--json")
    assert json.loads(out.stdout)["all"]["utterances"] == len(corpus)


def test_training_commands(tmp_path, command):
    """A preset, an option, an interruption; the folder then holds a model, a card and a report."""
    out = str(tmp_path / "reader")
    options = ("recognizer", "smoke", "--loop.steps", "3", "--width", "8", "--out", out)
    done = command("train", *options, "--until", "2")
    assert done.returncode == 0, done.stderr
    assert "stopped at step 2" in done.stdout
    done = command("train", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "reader" / "report.json").read_text())
    card = (tmp_path / "reader" / "README.md").read_text()
    assert f"{report['phone error rate'][0]:.1%}" in card
    assert "3 steps" in card
    done = command(
        "train", "recognizer", "smoke", "--loop.steps", "4", "--width", "8", "--out", out
    )
    assert done.returncode == 1
    assert "loop.steps is 3 there, 4 here" in done.stderr
    assert "did you mean codec" in command("train", "codecs").stderr
    assert "did you mean cpu" in command("train", "codec", "cpus").stderr
    assert "presets: smoke, cpu" in command("train").stdout


def test_a_wrong_command_names_the_nearest(command):
    assert "did you mean encode" in command("encod").stderr
    assert "did you mean corpus stats or corpus check or corpus build" in command("corpus").stderr
    with pytest.raises(ValueError, match="no command"):  # --debug shows the traceback
        main(["encod", "--debug"])


def test_reproduce_lists_the_studies(command):
    shown = command("reproduce").stdout
    for name in ("hybrid_speech", "hybrid_music", "distillation", "slmtokbench"):
        assert f"  {name} " in shown
    assert "did you mean distillation" in command("reproduce", "distilation").stderr


def test_continue_command(tmp_path, corpus, command):
    from speechlab.foundations.audio_files import load_wav, save_wav

    save_wav(tmp_path / "in.flac", corpus[0].wav[..., :16000], 16000)
    files = (str(tmp_path / "in.flac"), str(tmp_path / "out.wav"))
    done = command(
        "continue", *files, "--model", "gpt-small", "--seconds", "0.2", "--at-least", "0.2"
    )
    assert "50 frames of prompt, 10 new ones" in done.stdout, done.stderr
    assert load_wav(tmp_path / "out.wav")[0].shape[-1] == 60 * 320


def test_babble_command(tmp_path, corpus, command):
    from speechlab.foundations.audio_files import load_wav, save_wav

    save_wav(tmp_path / "in.flac", corpus[0].wav[..., :16000], 16000)
    target = str(tmp_path / "out.wav")
    babble = ("babble", target, "--seconds", "0.4", "--steps", "4")
    done = command(*babble, "--like", str(tmp_path / "in.flac"))
    assert "0.40 s" in done.stdout, done.stderr
    assert load_wav(target)[0].shape == (1, 1, 6400)
    assert "--force overwrites" in command(*babble).stderr
    assert "seconds is 0.0" in command(*babble[:2], "--force", "--seconds", "0").stderr


def test_resynth_command(tmp_path, corpus, command):
    from speechlab.foundations.audio_files import load_wav, save_wav

    save_wav(tmp_path / "in.flac", corpus[0].wav, 16000)
    resynth = ("resynth", str(tmp_path / "in.flac"), str(tmp_path / "out.wav"))
    out = command(*resynth, "--n-q", "2", "--json")
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout)
    assert report["bits per second"] == 800
    wav, rate = load_wav(tmp_path / "out.wav")
    assert wav.shape == corpus[0].wav.shape
    assert rate == 16000
    assert "--force overwrites" in command(*resynth).stderr
    all_levels = json.loads(command(*resynth, "--json", "--force").stdout)
    assert all_levels["mel distance"] < report["mel distance"] < 0.6
    out = command(*resynth, "--n-q", "9", "--force")
    assert out.returncode == 1
    assert "n_q is 9" in out.stderr
    out = command("resynth", "/nowhere.wav", str(tmp_path / "x.wav"))
    assert out.returncode == 1
    assert "nowhere" in out.stderr


def test_token_commands(tmp_path, corpus, command):
    """Encode, decode and convert files and folders; errors name the file."""
    from speechlab.foundations.audio_files import load_wav, save_wav

    a, b = (save_wav(tmp_path / "in" / f"{i}.flac", corpus[i].wav, 16000) for i in range(2))
    spt, out = tmp_path / "a.spt", tmp_path / "a.wav"
    done = command("encode", str(a), str(spt), "--entropy", "--n-q", "4")
    assert "4 levels" in done.stdout, done.stderr
    assert command("decode", str(spt), str(out)).returncode == 0
    assert load_wav(out)[0].shape == corpus[0].wav.shape
    assert "--force overwrites" in command("decode", str(spt), str(out)).stderr
    done = command("decode", str(spt), str(out), "--model", "encodec-small", "--force")
    assert done.returncode == 1
    assert "another tokeniser" in done.stderr
    spt.write_bytes(spt.read_bytes()[:-3])
    done = command("decode", str(spt), str(out), "--force")
    assert done.returncode == 1
    assert "a.spt" in done.stderr
    assert "truncated" in done.stderr
    done = command("convert", str(a), str(out), "--like", str(b), "--levels", "4", "--force")
    assert "similarity to the wanted voice" in done.stdout, done.stderr
    assert load_wav(out)[0].shape == corpus[0].wav.shape
    (tmp_path / "in" / "bad.wav").write_bytes(b"no")
    folders = (str(tmp_path / "in"), str(tmp_path / "tokens"))
    done = command("encode", *folders)
    assert done.returncode == 1
    assert "2 done, 0 there already, 1 failed" in done.stdout
    assert "bad.wav" in done.stderr
    (tmp_path / "in" / "bad.wav").unlink()
    assert "0 done, 2 there already, 0 failed" in command("encode", *folders).stdout
    back = command("decode", folders[1], str(tmp_path / "back"))
    assert "2 done" in back.stdout, back.stderr
    shards = command("encode", folders[0], str(tmp_path / "shards"), "--parquet")
    assert "2 utterances in 1 shards" in shards.stdout, shards.stderr
    assert "no such file" in command("encode", "/nowhere.wav", str(spt)).stderr
    assert "takes a folder" in command("encode", str(a), str(spt), "--parquet").stderr


def test_bench_and_export_commands(tmp_path, command):
    pytest.importorskip("onnxruntime")
    out = command(
        *("bench", "tokens", str(tmp_path / "bench"), "--codec", "one=encodec-small", "--corpus"),
        *("smoke", "--levels", "1", "--seeds", "1", "--reader.steps", "2"),
        *("--reader.width", "4"),
    )
    assert "| one | RVQ-1 |" in out.stdout, out.stderr[-2000:]
    made = {p.name for p in (tmp_path / "bench").iterdir()}
    assert made == {"table.md", "result.json", "figure.png", "rows.jsonl"}
    assert json.loads((tmp_path / "bench" / "result.json").read_text())["rows"][0]["codec"] == "one"
    bad = command("bench", "tokens", str(tmp_path), "--codec", "x", "--corpus", "/nowhere")
    assert bad.returncode == 1
    assert "--corpus is" in bad.stderr
    out = command("export", str(tmp_path / "onnx"))
    assert out.returncode == 0, out.stderr[-2000:]
    assert {p.name for p in (tmp_path / "onnx").iterdir()} >= {"encoder.onnx", "decoder.onnx"}


def test_shipped_checkpoints_are_small_and_have_cards():
    folders = [p for p in (ROOT / "data" / "checkpoints").iterdir() if p.is_dir()]
    assert {p.name for p in folders} >= {
        "phone-recognizer",
        "tiny-hubert",
        "tiny-hubert-ft",
        "speechtokenizer-small",
        "encodec-small",
        "character-recognizer",
        "speaker-encoder",
        "small-causal",
        "music-causal",
        "gpt-small",
        "hybrid-small",
    }
    total = 0
    for folder in folders:
        size = (folder / "model.safetensors").stat().st_size
        total += size
        assert size <= 8_000_000, folder.name
        card = (folder / "README.md").read_text()
        for word in ("made by", "data", "device", "training time"):
            assert f"- {word}:" in card, (folder.name, word)
    assert total <= 64_000_000


def test_errors_are_one_line(command):
    out = command("corpus", "stats", "--folder", "/nowhere")
    assert out.returncode == 1
    assert out.stderr.startswith("speechlab: /nowhere: no such folder")
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("words", [*COMMANDS, "train codec"])
def test_help_is_worth_reading(words, command):
    done = command(*words.split(), "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 150


def test_top_level_help_names_every_command(command):
    shown = command("--help").stdout
    assert all(f"  {words} " in shown for words in COMMANDS)
    assert shown == command().stdout


def test_help_shows_the_comments_beside_parameters():
    """Of functions, methods and dataclasses; only of this package; installed once."""
    import io
    import json as other
    import pydoc

    from speechlab.comments_in_help import comments_of, install
    from speechlab.foundations.audio import resample
    from speechlab.foundations.training import TrainConfig
    from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer

    def shown(thing) -> str:
        text = io.StringIO()
        pydoc.doc(thing, output=text)
        return text.getvalue()

    install()
    assert shown(TrainConfig).count("steps: optimiser updates") == 1
    assert comments_of(SpeechTokenizer.encode)
    for name, comment in comments_of(SpeechTokenizer.encode).items():
        assert f"{name}: {comment}" in shown(SpeechTokenizer.encode)
    assert comments_of(resample)["returns"].startswith("(B,")
    assert comments_of(other.dumps) == {}
    assert shown(other.dumps)  # others are left alone
