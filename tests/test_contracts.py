"""The seven contracts: one home for each check, no reaching through, no arrows up."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same_codes import assert_same_codes

import speechlab
from speechlab.foundations.contracts import (
    Codec,
    CodeSpec,
    CodeSpecError,
    check_codes,
    frames_of,
    lengths_of,
    mask_of,
    samples_of,
)
from speechlab.tokenizer.codecs import TransformersCodec, UnitsCodec
from speechlab.tokenizer.export import OnnxTokenizer, export_onnx
from speechlab.tokenizer.teachers import MFCC, Units

ROOT = Path(speechlab.__file__).parent
MODULES = {
    p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p
    for p in ROOT.rglob("*.py")
    if p.name not in ("__init__.py", "_modidx.py", "docproc.py", "lesson.py")
}
FLOORS = {"foundations": 1, "tokenizer": 2, "pruning": 2, "lm": 3, "metis": 3, "tts": 3}
FLOORS |= {"studies": 4, "cli": 5, "reference": 0, "comments_in_help": 0}


def imports(name: str) -> set[str]:
    """The speechlab modules that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:  # nbdev makes imports of the library relative
                base = name.split(".")[: -node.level]
                target = ".".join([*base, *([node.module] if node.module else [])])
            else:
                target = (node.module or "").removeprefix("speechlab.")
            names = [target, *(f"{target}.{a.name}" for a in node.names)]
            found |= {n for n in names if n in MODULES}
    return found


def test_no_arrow_goes_up_and_siblings_do_not_meet():
    for name in MODULES:
        part = name.split(".")[0]
        for other in {target.split(".")[0] for target in imports(name)} - {part}:
            assert FLOORS[other] < FLOORS[part], f"{name} imports {other}"


def test_no_circle():
    graph, seen, stack = {name: imports(name) for name in MODULES}, {}, []

    def visit(name: str) -> None:
        stack.append(name)
        for other in graph[name]:
            assert other not in stack, " -> ".join([*stack, other])
            if other not in seen:
                visit(other)
        seen[stack.pop()] = True

    for name in graph:
        if name not in seen:
            visit(name)


def code_of(name: str) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = "" if isinstance(node.value.value, str) else node.value.value
    return ast.unparse(tree)


CODE = {name: code_of(name) for name in MODULES}


def places(pattern: str, but: tuple[str, ...] = ()) -> list[str]:
    """Modules whose code has a match, except some."""
    return [n for n, text in CODE.items() if re.search(pattern, text) and not n.startswith(but)]


def test_each_check_stands_once():
    for check in ("check_codes", "check_wav", "check_mask", "check_levels", "check_sample_rate"):
        assert places(rf"def _?{check}\(") == ["foundations.contracts"], check
    assert places(r"arange\([^()]*\)\s*<\s*\w*lengths") == ["foundations.contracts"]
    assert places(r"-\(-[^()]+ // [\w.]*hop", ("foundations.contracts",)) == []


def test_no_layer_is_asked_for_its_class_in_streaming():
    assert "isinstance(layer" not in CODE["tokenizer.streaming"]
    assert not re.search(
        r"isinstance\(\w+, \(?[A-Z]\w*(Conv|LSTM|Block)", CODE["tokenizer.streaming"]
    )


def test_one_way_to_ask_for_a_device():
    assert places(r"next\(\w[\w.]*\.parameters\(\)\)") == []
    assert places(r"def device_of\(") == ["foundations.contracts"]


def test_nothing_reaches_through_a_codec():
    """`.config.rvq` and `.quantizer` belong to the tokenizer's own files."""
    assert places(r"\.config\.rvq\b|\.quantizer\b", ("tokenizer.",)) == []


def test_no_literal_of_the_time_grid():
    """320 and 513 come from configs; a default of a config or parameter names them."""
    wrong = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                allowed |= {id(n) for n in ast.walk(node.value)}
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
                allowed |= {id(n) for default in defaults for n in ast.walk(default)}
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("CodeSpec",):
                allowed |= {id(n) for n in ast.walk(node)}
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
                allowed |= {id(n) for n in ast.walk(node.value)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and node.value in (320, 513)
                and id(node) not in allowed
            ):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong, wrong


def test_no_file_is_too_long():
    sizes = {n: len(p.read_text(encoding="utf-8").splitlines()) for n, p in MODULES.items()}
    assert {n: size for n, size in sizes.items() if size > 500} == {}


# A codec


@pytest.fixture(scope="module")
def codecs(tmp_path_factory, corpus):
    """One of each kind, with what `decode` can do."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16}
    peer = transformers.EncodecModel(transformers.EncodecConfig(**small))
    ours = speechlab.load("encodec-small")
    found = {
        "ours": ours,
        "transformers": TransformersCodec(peer),
        "units": UnitsCodec(Units.fit(MFCC(), corpus.split("test")[:2], 16)),
    }
    if pytest.importorskip("onnxruntime"):
        found["onnx"] = OnnxTokenizer(export_onnx(ours, tmp_path_factory.mktemp("onnx")))
    return found


@pytest.mark.parametrize("name", ["ours", "transformers", "units", "onnx"])
def test_every_codec_keeps_the_contract(name, codecs, corpus):
    codec = codecs[name]
    assert isinstance(codec, Codec)
    spec = codec.spec
    assert isinstance(spec, CodeSpec)
    assert spec.fingerprint
    assert codec.device.type == "cpu"
    for method in ("encode", "decode"):
        wanted = list(inspect.signature(getattr(Codec, method)).parameters)[1:]
        found = list(inspect.signature(getattr(codec, method)).parameters)
        assert found[: len(wanted)] == wanted, method
    wav = corpus[0].wav[..., :16001]
    codes = codec.encode(wav)
    assert codes.shape == (1, spec.n_q, frames_of(16001, spec.hop_length))
    assert codes.dtype == torch.int64
    check_codes(codes, spec.codebook_size, spec.n_q, exact=True)
    lengths = torch.tensor([16001, 5000])
    both = torch.cat([wav, wav])
    masked = codec.encode(both, mask=mask_of(lengths, 16001))
    alone, frames = codec.encode(wav[..., :5000]), frames_of(5000, spec.hop_length)
    assert (masked[1, :, frames:] == -1).all()
    if name == "ours":
        assert_same_codes(codec, wav[..., :5000], masked[1:, :, :frames])
    else:
        assert torch.equal(masked[1:, :, :frames], alone)
    assert codec.encode(wav, n_q=1).shape[1] == 1
    for wrong in (0, spec.n_q + 1, 1.5):
        with pytest.raises(ValueError, match="n_q is"):
            codec.encode(wav, n_q=wrong)
    if name == "units":
        with pytest.raises(NotImplementedError):
            codec.decode(codes)
    else:
        made = codec.decode(codes, 16001)
        assert made.shape == wav.shape
        assert made.abs().max() <= 1
        with pytest.raises(ValueError, match="codes"):
            codec.decode(codes + spec.codebook_size)


def test_a_training_changes_the_fingerprint():
    torch.manual_seed(0)
    model = speechlab.load("encodec-small")
    before = model.spec
    with torch.no_grad():
        model.quantizer.levels[3].embed[0, 0] += 1e-3
    assert model.spec.fingerprint != before.fingerprint
    with pytest.raises(CodeSpecError, match="fingerprint"):
        before.check(model.spec)


@given(
    st.integers(2, 4096), st.integers(1, 32), st.integers(1000, 48000), st.integers(1, 2000),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_specs_travel(size, n_q, rate, hop, mark):
    spec = CodeSpec(size, n_q, rate, hop, mark, "x")
    assert CodeSpec.from_dict(spec.to_dict()) == spec
    spec.check(spec.levels(1))
    for name in ("codebook_size", "sample_rate", "hop_length"):
        other = CodeSpec.from_dict(spec.to_dict() | {name: spec.to_dict()[name] + 1})
        with pytest.raises(CodeSpecError, match=name):
            spec.check(other)
    assert abs(spec.frame_rate - rate / hop) < 1e-9


@given(st.integers(1, 10**7), st.integers(1, 4000))
def test_the_time_grid(samples, hop):
    frames = frames_of(samples, hop)
    assert samples_of(frames - 1, hop) < samples <= samples_of(frames, hop)
    assert int(frames_of(torch.tensor(samples), hop)) == frames


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_masks_and_lengths_say_the_same(sizes):
    lengths, total = torch.tensor(sizes), max(sizes) + 2
    mask = mask_of(lengths, total)
    assert torch.equal(lengths_of(mask, tuple(mask.shape)), lengths)
    broken = mask.clone()
    broken[0, -1] = True  # behind a hole
    with pytest.raises(ValueError, match="True from the start"):
        lengths_of(broken, tuple(mask.shape))


# What an import costs


def test_importing_the_tokeniser_costs_little():
    """It loads neither pictures nor judges nor pydantic."""
    import subprocess
    import sys

    script = (
        "import sys, speechlab.tokenizer.speech_tokenizer as m;"
        "heavy = {'matplotlib', 'speechlab.foundations.evaluation', 'transformers', 'datasets', "
        "'speechlab.foundations.display', 'pydantic', 'accelerate',"
        "'speechlab.foundations.judges'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_public_face():
    assert speechlab.__version__
    for name in speechlab.__all__:
        assert getattr(speechlab, name) is not None
    assert {"load", "load_wav", "save_wav", "embedded_corpus", "folder_corpus"} <= set(
        dir(speechlab)
    )
    assert (ROOT / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute"):
        speechlab.nothing  # noqa: B018
