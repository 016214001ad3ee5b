"""The lesson contract: every notebook is held to it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
CELL_LINES, EXPORT_LINES, COLUMNS = 15, 230, 100  # an exported class is one cell
FIRST_LINES = 40  # of code before the first sound, picture or number
SECTIONS = (
    r"(Hear|See) it first",
    r"What you will build",
    r"([\d.]+ )?The experiment",
    r"Exercises",
    r"Self-check",
    r"In the library",
    r"Limits",
    r"References",
)


class Notebook:
    """A notebook's front matter and cells, as plain strings."""

    def __init__(self, path: Path):
        self.path = path
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in self.cells:
            cell["source"] = "".join(cell["source"])
        first = self.cells[0]["source"]
        self.front = dict(re.findall(r"^- (\w+): (.+)$", first, re.M))
        self.title = re.match(r"# (.+)", first)
        self.claim = re.search(r"^> (.+)", first, re.M)
        self.code = [c for c in self.cells if c["cell_type"] == "code"]
        self.prose = "\n".join(c["source"] for c in self.cells if c["cell_type"] == "markdown")

    @property
    def is_lesson(self) -> bool:
        return self.front.get("kind") == "lesson"


ALL = {str(p.relative_to(ROOT / "nbs")): Notebook(p) for p in NOTEBOOKS}
LESSONS = {name: book for name, book in ALL.items() if book.is_lesson}
each = pytest.mark.parametrize("book", ALL.values(), ids=ALL.keys())
each_lesson = pytest.mark.parametrize("book", LESSONS.values(), ids=LESSONS.keys())


def exported(cell) -> bool:
    return bool(re.search(r"^#\| exporti?\b", cell["source"], re.M))


def code_lines(source: str) -> int:
    """Lines of code, without blank lines, comments and docstrings."""
    kept = [
        line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    try:
        tree = ast.parse("\n".join(kept))
    except SyntaxError:  # a magic
        return len(kept)
    docs = [
        n.body[0]
        for n in ast.walk(tree)
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n)
    ]
    return len(kept) - sum(doc.end_lineno - doc.lineno + 1 for doc in docs)


def only_imports(source: str) -> bool:
    """Whether a cell does nothing but import; the site folds such cells."""
    tree = ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.M))
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body)


def test_there_are_lessons():
    assert {
        "00_start.ipynb",
        "foundations/01_audio.ipynb",
        "foundations/03_corpus.ipynb",
        "foundations/04_training.ipynb",
        "tokenizer/01_rvq.ipynb",
    } <= LESSONS.keys()


@each
def test_front_matter(book):
    assert book.title
    assert book.claim
    assert {"kind", "hardware", "minutes", "prerequisites", "order"} <= book.front.keys()
    if book.is_lesson:
        assert set(re.findall(r"smoke|cpu|gpu", book.front["minutes"])) == {"smoke", "cpu", "gpu"}


@each
def test_size_and_outputs(book):
    assert book.path.stat().st_size <= 1_000_000
    outputs = [o for c in book.code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert all(c["execution_count"] is None for c in book.code)


@each_lesson
def test_stored_outputs_come_from_a_real_run(book):
    """The largest scale that was run is printed by a stamp; smoke outputs are not published."""
    text = "".join("".join(o.get("text", [])) for c in book.code for o in c["outputs"])
    assert "smoke" not in re.findall(r"scale +(\w+)", text)
    if any("Stamp(" in c["source"] for c in book.code):
        assert re.search(r"scale (cpu|gpu|paper) \|", text)


@each_lesson
def test_sections_in_order(book):
    headings = re.findall(r"^#{2,3} (.+)$", book.prose, re.M)
    places = [next((i for i, h in enumerate(headings) if re.match(s, h)), None) for s in SECTIONS]
    assert None not in places, dict(zip(SECTIONS, places))
    assert places == sorted(places)
    assert places[0] == 0


@each_lesson
def test_result_comes_first(book):
    """A player or a picture among the outputs before 'What you will build'."""
    before = []
    for cell in book.cells:
        if "## What you will build" in cell["source"]:
            break
        before += [kind for o in cell.get("outputs", []) for kind in o.get("data", {})]
    assert {"text/markdown", "image/png"} & set(before)


def test_every_figure_is_stored():
    """A cell that promises a figure has one. (MPLBACKEND=agg once stored pages without any.)"""
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and "#| fig-alt" in source:
                kinds = {kind for o in cell["outputs"] for kind in o.get("data", {})}
                assert "image/png" in kinds, f"{path.name}: {source[:80]}"


@each_lesson
def test_little_code_comes_before_the_first_result(book):
    """Import cells aside, at most 40 lines of code before a sound, a picture or a number."""
    lines = 0
    for cell in book.code:
        if cell["outputs"]:
            break
        if "google.colab" not in cell["source"] and not only_imports(cell["source"]):
            lines += code_lines(cell["source"])
    assert lines <= FIRST_LINES


@each
def test_cells_are_small(book):
    for cell in book.code:
        most = EXPORT_LINES if exported(cell) else CELL_LINES if book.is_lesson else 25
        assert only_imports(cell["source"]) or code_lines(cell["source"]) <= most, (
            f"{code_lines(cell['source'])} lines:\n{cell['source'][:300]}"
        )
        for line in cell["source"].splitlines():
            assert len(line) <= COLUMNS or line.startswith("#| fig-alt"), line


@each_lesson
def test_a_check_or_a_picture_follows_every_export(book):
    """In the next two cells that are no exports: an assert, an error shown, a figure, a player."""
    for index, cell in enumerate(book.code):
        if not exported(cell) or not re.search(r"^(def|class) [a-zA-Z]", cell["source"], re.M):
            continue
        after = [c for c in book.code[index + 1 :] if not exported(c)][:2]
        shown = any(
            re.search(r"\bassert\b|show_error\(|fig-alt|play\(|players\(", c["source"])
            for c in after
        )
        assert shown, cell["source"][:200]


@each_lesson
def test_exercises(book):
    """Two or three, each with a stub, a visible test, a hint and a solution that faces it."""
    kinds = {"stub": [], "test": [], "solution": []}
    for cell in book.code:
        if found := re.match(r"#\| exercise: (\w+)", cell["source"]):
            kinds[found[1]].append(cell)
    count = len(kinds["stub"])
    assert count in (2, 3)
    assert len(kinds["test"]) == len(kinds["solution"]) == count
    assert len(re.findall(r"^### Exercise \d: .+ \(★+, \d+ min\)$", book.prose, re.M)) == count
    assert book.prose.count("<summary>Hint</summary>") == count
    for stub, test, solution in zip(*kinds.values()):
        assert "raise NotImplementedError" in stub["source"]
        name = re.search(r"def (test_\w+)\(", test["source"])[1]
        assert "attempt(" + name in test["source"]
        assert "assert" in test["source"]
        assert re.search(rf"^{name}\(\w+_solution\)", solution["source"], re.M)
        assert solution["metadata"].get("jupyter", {}).get("source_hidden")
        shown = "".join("".join(o.get("text", [])) for o in test["outputs"])
        assert "not written yet" in shown


@each_lesson
def test_self_check(book):
    part = book.prose.split("## Self-check")[1].split("\n## ")[0]
    assert len(re.findall(r"^\*\*\d\.", part, re.M)) == 3
    assert part.count("<summary>Answer</summary>") == 3


@each
def test_figures_have_alternative_texts(book):
    for cell in book.code:
        if any("image/png" in o.get("data", {}) for o in cell["outputs"]):
            assert re.search(r'^#\| fig-alt: "[^"]{30,}"$', cell["source"], re.M), cell["source"][
                :200
            ]


@each_lesson
def test_players_have_transcripts(book):
    for cell in book.code:
        for output in cell["outputs"]:
            page = "".join(output.get("data", {}).get("text/markdown", ""))
            if "<audio" in page:
                assert "<caption>" in page, cell["source"][:200]
                assert "http" not in page


@each
def test_cuda_cells_do_nothing_without_a_gpu(book):
    """`Run All` in JupyterLab runs them too."""
    for cell in book.code:
        if "#| cuda" in cell["source"]:
            assert "torch.cuda.is_available()" in cell["source"]


def test_names_do_not_collide():
    stems = [re.sub(r"^\d+_", "", p.stem) for p in NOTEBOOKS]
    assert len(stems) == len(set(stems))
    modules = [
        m
        for b in ALL.values()
        for c in b.code
        for m in re.findall(r"#\| default_exp (\S+)", c["source"])
    ]
    assert len(modules) == len(set(modules))
    for name, book in ALL.items():
        found = [m for c in book.code for m in re.findall(r"#\| default_exp (\S+)", c["source"])]
        mirror = re.sub(r"(^|/)\d+_", r"\1", name.removesuffix(".ipynb"))
        mirror = mirror.replace("/workshop/", "/").replace("/", ".")
        assert not found or found == [mirror]


def test_index_lists_every_page_and_readme_every_lesson():
    index, readme = ALL["index.ipynb"].prose, (ROOT / "README.md").read_text()
    for name in ALL.keys() - {"index.ipynb"}:
        assert f"({name})" in index or name.startswith(("reference/", "cli/")), name
    for name in LESSONS:
        assert f"(nbs/{name})" in readme


def test_orders_do_not_collide():
    """One numbering for the order of the lessons."""
    orders = [int(book.front["order"]) for book in LESSONS.values()]
    assert len(orders) == len(set(orders))
