"""What the docs site adds to a lesson; nbdev runs it through `procs` in settings.ini.

A header with hardware, minutes, prerequisites and links; folded exercise solutions and set-up cells;
links to symbols that stay on the site; no widget views, which a static page cannot show.
`rm_export` and `add_show_docs` are switched off in settings.ini: in a course the code is the page.
The API page shows signatures.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor

from ._modidx import d as index

__all__ = ["LessonProc", "header", "only_imports", "relative_links", "setup_cells"]

WIDGET = "application/vnd.jupyter.widget-view+json"
RICH = {"text/markdown", "image/png", "text/html"}  # a player, a picture, a table
FIRST = re.compile(r"^## (Hear|See) it first", re.M)
HEADING = re.compile(r"^(#{2,4}) (\S+)$", re.M)
API = "reference/api.ipynb"


def header(front: dict, path: str) -> str:
    """The box under a lesson's title, in Quarto markdown. `path` is relative to the repository."""
    config = get_config()
    notebook = f"https://github.com/{config.user}/{config.repo}/blob/{config.branch}/{path}"
    colab = notebook.replace("https://github.com/", "https://colab.research.google.com/github/")
    return (
        "::: {.lesson-header}\n"
        f"**Hardware:** {front['hardware']} · **Minutes:** {front['minutes']} · "
        f"**Needs:** {front['prerequisites']}\n\n"
        f"[Open in Colab]({colab}) · [Notebook on GitHub]({notebook})\n"
        ":::"
    )


def only_imports(source: str) -> bool:
    """Whether a cell does nothing but import."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic
        return False
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def setup_cells(cells: list) -> set[int]:
    """Ids of the cells to fold: what only imports, and what comes before the first result.

    The first result is the first output under 'Hear it first' that is more than printed text.
    """
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source]
    setup = {id(cell) for cell in code if only_imports(cell.source)}
    heard = [c.cell_type == "markdown" and bool(FIRST.search(c.source or "")) for c in cells]
    if True in heard:
        for cell in cells:
            if any(RICH & set(output.get("data", {})) for output in cell.get("outputs", [])):
                break
            setup.add(id(cell))
    return setup


def api_headings(text: str) -> list[tuple[str, str]]:
    """Full name and id of each heading of the API page. A second `convert` gets its module's name."""
    module, taken, rows = "", set(), []
    for level, name in HEADING.findall(text):
        name = name.replace("\\", "")
        module = name if level == "##" else module
        full = name if level == "##" else f"{module}.{name}"
        rows.append((full, full if name in taken else name))
        taken.add(rows[-1][1])
    return rows


@functools.cache
def api_anchors() -> dict[str, str]:
    """Where the API page shows a symbol: full name -> id of its heading."""
    book = json.loads((Path(get_config().nbs_path) / API).read_text(encoding="utf-8"))
    return dict(api_headings("\n".join("".join(cell["source"]) for cell in book["cells"])))


@functools.cache
def symbols() -> dict[str, list[str]]:
    """What nbdev's links mean: page and anchor -> full names, without `speechlab.`"""
    found: dict[str, list[str]] = {}
    for module in index["syms"].values():
        for full, (place, _) in module.items():
            found.setdefault(place, []).append(full.removeprefix("speechlab."))
    return found


def relative_links(text: str, page: str) -> str:
    """Markdown whose links to symbols lead to the API page of this site, wherever it is served.

    nbdev links a name in backticks to the full address in settings.ini. A private name, and the
    bare name of a command (`info`, `train`), are left as plain code.
    """
    config = get_config()
    host = re.escape(f"{config.doc_host}{config.doc_baseurl}".rstrip("/"))
    to_api = "" if page == API else os.path.relpath(API, Path(page).parent).replace(os.sep, "/")

    def link(found: re.Match) -> str:
        shown = found[1].removesuffix("()")
        names = symbols().get(found[2], [])
        full = next((n for n in names if n.endswith(shown)), names[0] if names else "")
        command = full.startswith("cli.") and "." not in shown
        anchor = None if command else api_anchors().get(full)
        return f"[`{found[1]}`]({to_api}#{anchor})" if anchor else f"`{found[1]}`"

    return re.sub(rf"\[`([^`]+)`\]\({host}/([^)\s]+)\)", link, text)


class LessonProc(Processor):
    """Runs after nbdev's own processors, when the front matter is the first cell."""

    def begin(self):
        front = getattr(self.nb, "frontmatter_", {})
        self.page, self.setup = "", setup_cells(self.nb.cells)
        if not getattr(self.nb, "path_", None):
            return
        path = Path(self.nb.path_).resolve()
        self.page = path.relative_to(Path(get_config().nbs_path).resolve()).as_posix()
        if self.page == API:
            self.add_ids()
        if "hardware" in front:
            path = path.relative_to(Path(get_config().config_path).resolve())
            self.nb.cells.insert(1, mk_cell(header(front, path.as_posix()), "markdown"))

    def add_ids(self):
        """Ids of the API page's headings: the names themselves, as JupyterLab has them."""
        ids = iter(api_anchors().values())
        for cell in self.nb.cells:
            if cell.cell_type == "markdown":
                cell.source = HEADING.sub(lambda found: f"{found[0]} {{#{next(ids)}}}", cell.source)

    def cell(self, cell):
        if cell.cell_type == "markdown" and cell.source:
            cell.source = relative_links(cell.source, self.page)
        if cell.cell_type != "code":
            return
        if all(line.startswith("#|") or not line.strip() for line in cell.source.splitlines()):
            cell.source = None  # only directives, such as default_exp; nbdev then drops the cell
            return
        outputs = cell.get("outputs", [])
        cell.outputs = [o for o in outputs if WIDGET not in o.get("data", {})]
        for data in (output.get("data", {}) for output in cell.outputs):
            if "text/markdown" in data:
                text = "".join(data["text/markdown"])
                data["text/markdown"] = relative_links(text, self.page)
        if "#| exercise: solution" in cell.source or "solution" in cell.directives_.get(
            "exercise", []
        ):
            cell.source = f'#| code-fold: true\n#| code-summary: "Solution"\n{cell.source}'
        elif id(cell) in self.setup:
            cell.source = f'#| code-fold: true\n#| code-summary: "set-up"\n{cell.source}'
