"""Check the docs without Quarto: nbdev, then nbconvert, then pandoc with warnings as errors.

Also: each figure has an alternative text, each relative link leads to a file and each link into the
API page to a heading; the sidebar has every page, with the lessons in the order of the index; no
page, and nothing that _quarto.yml or a style sheet names, asks the network for anything; no page
links to the address of the published site; the API page is what `make_api.py` makes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pypandoc
import yaml
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LOADS = re.compile(
    r"<(?:script|img|audio|video|source|link|iframe|object|embed)\b[^>]+?"
    r"(?:src|href|data)=[\"']((?:https?:)?//[^\"']+)"
    r"|!\[[^\]]*\]\(((?:https?:)?//[^)]+)\)"
    r"|(?:@import\s+|url\(\s*)[\"']?((?:https?:)?//[^\"')\s;]+)"
)
NETWORK = re.compile(r"(?:https?:)?//\S+|\bcdn\b")
WORDS = {"site-url", "repo-url", "href", "left", "right", "center", "description"}  # not loaded
API = "reference/api.ipynb"


def figure_problems(book: nbformat.NotebookNode) -> list[str]:
    """Cells that show a figure but carry no `fig-alt`."""
    return [
        f"cell {index} shows a figure without #| fig-alt"
        for index, cell in enumerate(book.cells)
        if cell.cell_type == "code"
        and "fig-alt" not in cell.source
        and any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]


def site_address() -> str:
    """Where settings.ini says that the site is published."""
    config = get_config()
    return f"{config.doc_host}{config.doc_baseurl}"


def loads(text: str) -> list[str]:
    """What a page or a style sheet fetches from the network."""
    return [f"loads {next(filter(None, found))}" for found in LOADS.findall(text)]


def lines(book: nbformat.NotebookNode) -> list[str]:
    """All that a page shows: its cells and their outputs, line by line."""
    shown = [cell.source for cell in book.cells]
    for output in (o for cell in book.cells for o in cell.get("outputs", [])):
        shown += [output.get("text", ""), *map(str, output.get("data", {}).values())]
    return "\n".join(shown).splitlines()


def configured(node, key: str = "") -> list[str]:
    """Addresses in _quarto.yml that a browser would fetch; links and words are not fetched."""
    if isinstance(node, dict):
        return [a for name, value in node.items() for a in configured(value, str(name))]
    if isinstance(node, list):
        return [a for value in node for a in configured(value, key)]
    return NETWORK.findall(str(node)) if key not in WORDS else []


def theme_problems(config: dict) -> list[str]:
    """Style sheets that load something, and themes whose fonts are not switched off."""
    problems = [f"_quarto.yml: loads {address}" for address in configured(config)]
    page = config["format"]["html"]
    method = page.get("html-math-method", "mathjax")
    if method not in ("mathml", "plain") and not (isinstance(method, dict) and "url" in method):
        problems.append(f"_quarto.yml: html-math-method {method} comes from a CDN")
    themes = page.get("theme", "cosmo")
    for name, sheets in (themes if isinstance(themes, dict) else {"theme": themes}).items():
        sheets = [sheets] if isinstance(sheets, str) else sheets
        texts = [(ROOT / "nbs" / s).read_text() for s in sheets if s.endswith(".scss")]
        defaults = [part.split("/*--")[0] for t in texts for part in t.split("scss:defaults")[1:]]
        if not any(re.search(r"^\$web-font-path:\s*false;", part, re.M) for part in defaults):
            problems.append(f"_quarto.yml: the {name} theme loads its fonts from Google")
    for sheet in sorted((ROOT / "nbs" / "assets").rglob("*.*css")):
        text = re.sub(r"(?<!:)//.*", "", sheet.read_text())
        problems += [f"{sheet.relative_to(ROOT)}: {what}" for what in loads(sheet.read_text())]
        problems += [
            f"{sheet.relative_to(ROOT)}: names {address}"
            for address in re.findall(r"https?://\S+", text)
        ]
    return problems


def order_problems(config: dict, processed: Path) -> list[str]:
    """The lessons in the index: numbered from 1, in the sidebar's order, with their own minutes."""
    index = "".join(
        cell.source + "\n" for cell in nbformat.read(processed / "index.ipynb", 4).cells
    )
    rows = re.findall(r"^\| (\d+) \| \[.+?\]\((\S+)\) \|.+\| (.+?) \| (\d+) \|$", index, re.M)
    fronts = {name: front_matter(ROOT / "nbs" / name) for _, name, *_ in rows}
    names = [name for _, name, *_ in rows]
    places = [p for p in sidebar_pages(config["website"]["sidebar"]["contents"]) if p in names]
    problems = [] if names and names == places else ["index.ipynb: not in the sidebar's order"]
    if [int(number) for number, *_ in rows] != list(range(1, len(rows) + 1)):
        problems.append("index.ipynb: lessons are not numbered from 1")
    for _, name, hardware, minutes in rows:
        front = fronts[name]
        if front["hardware"] != hardware or f"cpu {minutes}," not in front["minutes"]:
            problems.append(f"index.ipynb: {name} says {front['hardware']}, {front['minutes']}")
    return problems


def front_matter(path: Path) -> dict[str, str]:
    """The fields in the first cell of a notebook."""
    return dict(re.findall(r"^- (\w+): (.+)$", nbformat.read(path, 4).cells[0].source, re.M))


def anchor_problems(pages: list[Path], processed: Path) -> list[str]:
    """Links into the API page that lead to no heading."""
    text = "\n".join(lines(nbformat.read(processed / API, 4)))
    ids = set(re.findall(r"^#{2,4} .+ \{#(\S+)\}$", text, re.M))
    problems = [
        f"{API}: no heading {a}" for a in re.findall(r"\]\(#(\S+?)\)", text) if a not in ids
    ]
    for page in pages:
        shown = "\n".join(lines(nbformat.read(page, 4)))
        problems += [
            f"{page.relative_to(processed)}: the API page has no heading {anchor}"
            for anchor in re.findall(r"\]\([\w./]*api\.ipynb#(\S+?)\)", shown)
            if anchor not in ids
        ]
    return problems


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
    problems += loads(text)
    site = site_address()
    problems += [
        f"an absolute link to the site: {line[:90]}" for line in lines(book) if site in line
    ]
    try:
        pypandoc.convert_text(
            text, "html", format="markdown", extra_args=["--mathml", "--fail-if-warnings"]
        )
    except RuntimeError as error:
        problems.append(f"pandoc: {str(error).strip()[-500:]}")
    return problems


def sidebar_pages(node) -> list[str]:
    """All notebooks named in the sidebar of _quarto.yml, in its order."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, list):
        return [page for child in node for page in sidebar_pages(child)]
    return [node["href"]] if "href" in node else sidebar_pages(node.get("contents", []))


def main() -> None:
    processed = Path(proc_nbs(force=True, n_workers=2))
    pages = sorted(
        p for p in processed.rglob("*.ipynb") if not any(x.startswith(".") for x in p.parts)
    )
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    pages_listed = sidebar_pages(config["website"]["sidebar"]["contents"])
    listed = set(pages_listed)
    found = {str(p.relative_to(processed)) for p in pages}
    problems = [f"{name}: in the sidebar, but no such page" for name in sorted(listed - found)]
    problems += [f"{name}: not in the sidebar of _quarto.yml" for name in sorted(found - listed)]
    problems += [f"{n}: twice in the sidebar" for n in listed if pages_listed.count(n) > 1]
    if config["website"].get("site-url") != site_address():
        problems.append(f"_quarto.yml: site-url is not {site_address()}, as settings.ini has it")
    problems += theme_problems(config) + order_problems(config, processed)
    problems += anchor_problems(pages, processed)
    command = [sys.executable, ".ci/make_api.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        problems.append((done.stdout + done.stderr).strip()[-1000:])
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
