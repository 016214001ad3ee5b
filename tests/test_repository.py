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
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import speechlab
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
    f"speechlab.foundations.{m}"
    for m in (
        "machine",
        "audio",
        "phonemes",
        "corpus",
        "training",
        "judges",
        "evaluation",
        "transformer",
        "sampling",
    )
]
MODULES += [f"speechlab.lm.{m}" for m in ("patterns", "gpt", "hybrid", "music")]
MODULES += [
    f"speechlab.tokenizer.{m}"
    for m in (
        "rvq",
        "seanet",
        "losses",
        "discriminators",
        "teachers",
        "distillation",
        "speech_tokenizer",
        "benchmark",
        "conversion",
        "streaming",
        "files",
        "export",
    )
]


def test_api_page_shows_every_public_symbol():
    page = json.loads((ROOT / "nbs/reference/api.ipynb").read_text())
    shown = {
        name
        for cell in page["cells"]
        for name in re.findall(r"show_doc\((\w+)", "".join(cell["source"]))
    }
    for name in MODULES:
        wanted = public(importlib.import_module(name))
        assert wanted <= shown, sorted(wanted - shown)


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


def speechlab_command(*arguments: str) -> subprocess.CompletedProcess:
    code = "from speechlab.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_info():
    out = speechlab_command("info", "--json")
    report = json.loads(out.stdout)
    assert report["speechlab"] == speechlab.__version__
    assert Path(report["data"]).is_dir()
    assert {"device", "scale", "cache", "torch"} <= report.keys()


def test_corpus_commands(tmp_path, corpus):
    out = speechlab_command("corpus", "stats", "smoke", "--json")
    assert json.loads(out.stdout)["all"]["utterances"] == len(corpus)
    out = speechlab_command("corpus", "build", "smoke", "--export", str(tmp_path))
    assert out.returncode == 0
    assert len(list(tmp_path.rglob("*.flac"))) == len(corpus)
    out = speechlab_command("corpus", "stats", "--folder", str(tmp_path), "--json")
    assert json.loads(out.stdout)["all"]["utterances"] == len(corpus)


def test_training_commands(tmp_path):
    """Two steps of each; the folder then holds a model, a card and a report that agree."""
    for name in ("recognizer", "teacher", "speaker"):
        out = speechlab_command(
            "train", name, str(tmp_path / name), "--size", "smoke", "--steps", "2"
        )
        assert out.returncode == 0, out.stderr[-2000:]
        assert f"speechlab train {name}" in (tmp_path / name / "README.md").read_text()
    out = speechlab_command(
        *("train", "tokenizer", str(tmp_path / "codec"), "--size", "smoke", "--steps", "4"),
        *("--teacher", str(tmp_path / "teacher"), "--layer", "2", "--seconds", "0.5"),
    )
    assert out.returncode == 0, out.stderr[-2000:]
    out = speechlab_command("train", "teacher", str(tmp_path / "teacher"), "--seed", "7")
    assert out.returncode == 1
    assert "holds a run of" in out.stderr
    report = json.loads((tmp_path / "codec" / "report.json").read_text())
    card = (tmp_path / "codec" / "README.md").read_text()
    assert f"{report['mel_distance']['8']:.3f}" in card
    assert "layer 2" in card
    assert (tmp_path / "codec" / "model.safetensors").stat().st_size < 8_000_000


def test_resynth_command(tmp_path, corpus):
    from speechlab.foundations.audio import load_wav, save_wav

    save_wav(tmp_path / "in.flac", corpus[0].wav, 16000)
    command = ("resynth", str(tmp_path / "in.flac"), str(tmp_path / "out.wav"))
    out = speechlab_command(*command, "--n-q", "2", "--json")
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout)
    assert report["bits per second"] == 800
    wav, rate = load_wav(tmp_path / "out.wav")
    assert wav.shape == corpus[0].wav.shape
    assert rate == 16000
    all_levels = json.loads(speechlab_command(*command, "--json").stdout)
    assert all_levels["mel distance"] < report["mel distance"] < 0.6
    out = speechlab_command(*command, "--n-q", "9")
    assert out.returncode == 1
    assert "n_q is 9" in out.stderr
    out = speechlab_command("resynth", "/nowhere.wav", str(tmp_path / "x.wav"))
    assert out.returncode == 1
    assert "nowhere" in out.stderr


def test_token_commands(tmp_path, corpus):
    """Encode, decode and convert files and folders; errors name the file."""
    from speechlab.foundations.audio import load_wav, save_wav

    a, b = (save_wav(tmp_path / "in" / f"{i}.flac", corpus[i].wav, 16000) for i in range(2))
    spt, out = tmp_path / "a.spt", tmp_path / "a.wav"
    done = speechlab_command("encode", str(a), str(spt), "--entropy", "--n-q", "4")
    assert "4 levels" in done.stdout, done.stderr
    assert speechlab_command("decode", str(spt), str(out)).returncode == 0
    assert load_wav(out)[0].shape == corpus[0].wav.shape
    done = speechlab_command("decode", str(spt), str(out), "--model", "encodec-small")
    assert done.returncode == 1
    assert "another tokeniser" in done.stderr
    spt.write_bytes(spt.read_bytes()[:-3])
    done = speechlab_command("decode", str(spt), str(out))
    assert done.returncode == 1
    assert "a.spt" in done.stderr
    assert "truncated" in done.stderr
    done = speechlab_command("convert", str(a), str(out), "--like", str(b), "--levels", "4")
    assert "similarity to the wanted voice" in done.stdout, done.stderr
    assert load_wav(out)[0].shape == corpus[0].wav.shape
    (tmp_path / "in" / "bad.wav").write_bytes(b"no")
    folders = (str(tmp_path / "in"), str(tmp_path / "tokens"))
    done = speechlab_command("encode", *folders)
    assert done.returncode == 1
    assert "2 done, 0 there already, 1 failed" in done.stdout
    assert "bad.wav" in done.stderr
    (tmp_path / "in" / "bad.wav").unlink()
    assert "0 done, 2 there already, 0 failed" in speechlab_command("encode", *folders).stdout
    back = speechlab_command("decode", folders[1], str(tmp_path / "back"))
    assert "2 done" in back.stdout, back.stderr
    shards = speechlab_command("encode", folders[0], str(tmp_path / "shards"), "--parquet")
    assert "2 utterances in 1 shards" in shards.stdout, shards.stderr
    assert "no such file" in speechlab_command("encode", "/nowhere.wav", str(spt)).stderr
    assert "takes a folder" in speechlab_command("encode", str(a), str(spt), "--parquet").stderr


def test_bench_and_export_commands(tmp_path):
    pytest.importorskip("onnxruntime")
    out = speechlab_command(
        *("bench", "tokens", str(tmp_path / "bench"), "--codec", "one=encodec-small", "--corpus"),
        *("smoke", "--levels", "1", "--seeds", "1", "--steps", "2", "--width", "4"),
    )
    assert "| one | RVQ-1 |" in out.stdout, out.stderr[-2000:]
    made = {p.name for p in (tmp_path / "bench").iterdir()}
    assert made == {"table.md", "result.json", "figure.png", "rows.jsonl"}
    assert json.loads((tmp_path / "bench" / "result.json").read_text())["rows"][0]["codec"] == "one"
    bad = speechlab_command(
        "bench", "tokens", str(tmp_path), "--codec", "x", "--corpus", "/nowhere"
    )
    assert bad.returncode == 1
    assert "--corpus is" in bad.stderr
    out = speechlab_command("export", str(tmp_path / "onnx"))
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
    assert total <= 60_000_000


def test_errors_are_one_line():
    out = speechlab_command("corpus", "stats", "--folder", "/nowhere")
    assert out.returncode == 1
    assert out.stderr.startswith("speechlab: /nowhere: no audio files")
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("corpus",),
        ("corpus", "build"),
        ("corpus", "stats"),
        ("info",),
        ("train",),
        ("train", "tokenizer"),
        ("train", "teacher"),
        ("train", "recognizer"),
        ("train", "speaker"),
        ("train", "gpt"),
        ("continue",),
        ("resynth",),
        ("convert",),
        ("encode",),
        ("decode",),
        ("bench",),
        ("bench", "tokens"),
        ("export",),
    ],
)
def test_help_is_worth_reading(command):
    out = speechlab_command(*command, "--help")
    assert out.returncode == 0
    assert len(out.stdout) > 150
