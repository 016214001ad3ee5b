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
    f"speechlab.foundations.{m}" for m in ("machine", "audio", "phonemes", "corpus", "training")
]
MODULES.append("speechlab.tokenizer.rvq")


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


def test_errors_are_one_line():
    out = speechlab_command("corpus", "stats", "--folder", "/nowhere")
    assert out.returncode == 1
    assert out.stderr.startswith("speechlab: /nowhere: no audio files")
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize(
    "command", [(), ("corpus",), ("corpus", "build"), ("corpus", "stats"), ("info",)]
)
def test_help_is_worth_reading(command):
    out = speechlab_command(*command, "--help")
    assert out.returncode == 0
    assert len(out.stdout) > 150
