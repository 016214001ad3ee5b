"""What the docs site adds to a lesson; nbdev runs it through `procs` in settings.ini.

A header with hardware, minutes, prerequisites and links; folded exercise solutions; no widget views,
which a static page cannot show. `rm_export` and `add_show_docs` are switched off in settings.ini:
in a course the code is the page. The API pages show signatures.
"""

from __future__ import annotations

from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor

__all__ = ["LessonProc", "header"]

WIDGET = "application/vnd.jupyter.widget-view+json"


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


class LessonProc(Processor):
    """Runs after nbdev's own processors, when the front matter is the first cell."""

    def begin(self):
        front = getattr(self.nb, "frontmatter_", {})
        if "hardware" in front and getattr(self.nb, "path_", None):
            path = (
                Path(self.nb.path_).resolve().relative_to(Path(get_config().config_path).resolve())
            )
            self.nb.cells.insert(1, mk_cell(header(front, path.as_posix()), "markdown"))

    def cell(self, cell):
        if cell.cell_type != "code":
            return
        if all(line.startswith("#|") or not line.strip() for line in cell.source.splitlines()):
            cell.source = None  # only directives, such as default_exp; nbdev then drops the cell
            return
        outputs = cell.get("outputs", [])
        cell.outputs = [o for o in outputs if WIDGET not in o.get("data", {})]
        for data in (output.get("data", {}) for output in cell.outputs):
            if "text/markdown" in data:  # show_doc's links to source lines it does not know
                data["text/markdown"] = "".join(data["text/markdown"]).replace("#LNone", "")
        if "#| exercise: solution" in cell.source or "solution" in cell.directives_.get(
            "exercise", []
        ):
            cell.source = f'#| code-fold: true\n#| code-summary: "Solution"\n{cell.source}'
