"""Check the docs without Quarto: nbdev, then nbconvert, then pandoc with warnings as errors.

Also: each figure has an alternative text, each relative link leads to a file, each page of the site
is in the sidebar, and no page asks the network for anything.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pypandoc
import yaml
from nbconvert import MarkdownExporter
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LOADS = re.compile(r"<(?:script|img|audio|link|iframe)[^>]+(?:src|href)=[\"'](https?:[^\"']+)")


def figure_problems(book: nbformat.NotebookNode) -> list[str]:
    """Cells that show a figure but carry no `fig-alt`."""
    return [
        f"cell {index} shows a figure without #| fig-alt"
        for index, cell in enumerate(book.cells)
        if cell.cell_type == "code"
        and "fig-alt" not in cell.source
        and any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]


def link_problems(text: str, page: Path, root: Path) -> list[str]:
    """Relative links to files that do not exist."""
    broken = []
    for target in LINK.findall(text):
        name = target.split("#")[0]
        if name and not re.match(r"[a-z]+:", name) and not (page.parent / name).exists():
            broken.append(f"link to {target}, which is not below {root.name}/")
    return broken


def page_problems(page: Path, root: Path) -> list[str]:
    """Everything wrong with one processed notebook."""
    book = nbformat.read(page, as_version=4)
    problems = figure_problems(book)
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    problems += link_problems(prose, page, root)
    text, _ = MarkdownExporter().from_notebook_node(book)
    problems += [f"the page loads {address}" for address in LOADS.findall(text)]
    try:
        pypandoc.convert_text(
            text, "html", format="markdown", extra_args=["--mathml", "--fail-if-warnings"]
        )
    except RuntimeError as error:
        problems.append(f"pandoc: {str(error).strip()[-500:]}")
    return problems


def sidebar_pages(node) -> set[str]:
    """All notebooks named in the sidebar of _quarto.yml."""
    if isinstance(node, str):
        return {node}
    children = node if isinstance(node, list) else node.get("contents", [])
    return set().union(*(sidebar_pages(child) for child in children)) if children else set()


def main() -> None:
    processed = Path(proc_nbs(force=True, n_workers=2))
    pages = sorted(
        p for p in processed.rglob("*.ipynb") if not any(x.startswith(".") for x in p.parts)
    )
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    listed = sidebar_pages(config["website"]["sidebar"]["contents"])
    found = {str(p.relative_to(processed)) for p in pages}
    problems = [f"{name}: in the sidebar, but no such page" for name in sorted(listed - found)]
    problems += [f"{name}: not in the sidebar of _quarto.yml" for name in sorted(found - listed)]
    for page in pages:
        problems += [
            f"{page.relative_to(processed)}: {what}" for what in page_problems(page, processed)
        ]
    for readme in ("README.md", "CONTRIBUTING.md"):
        problems += [
            f"{readme}: {what}"
            for what in link_problems((ROOT / readme).read_text(), ROOT / readme, ROOT)
        ]
    print(
        "\n".join(problems)
        or f"{len(pages)} pages: processed, converted, links and figures checked"
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
