"""Build nbs/reference/api.ipynb from the modules: every public class, function and method.

python .ci/make_api.py            write the page
python .ci/make_api.py --check    exit with 1 if the page is out of date

The page is Markdown only: nothing has to run when the site is built. Signatures are shown as they
stand in the source; the comments beside parameters (docments) become the last column of a table.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import textwrap
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from fastcore.docments import docments

import speechlab

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "reference" / "api.ipynb"
PARTS = ("foundations", "tokenizer", "lm", "metis", "tts", "studies", "cli")
COLUMNS = 90  # of a signature
LONGEST = 44  # characters of a default; what is longer gets an ellipsis
METHODS = (property, classmethod, staticmethod, functools.cached_property)
SHOWN_MARKS = {"property", "cached_property", "classmethod", "staticmethod", "contextmanager"}
FRONT = """# API
> Every public class, function and method, with shapes, units and defaults.

- kind: reference
- hardware: any
- minutes: smoke 1, cpu 1, gpu 1
- prerequisites: none
- order: 90"""
INTRODUCTION = """A section a module, in the order of the floors: foundations, tokenizer, language \
models, masked models, studies, command line. The names that `import speechlab` offers come first. \
The page is made from the source by `.ci/make_api.py`."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Row:
    """A parameter, a field or a result."""

    name: str
    type: str = ""
    default: str = ""
    comment: str = ""
    star: str = ""  # "*" or "**" before the name
    kind: str = ""  # "/" for positional-only, "*" for keyword-only


@dataclass
class Source:
    """A module, its definitions by qualified name, and its comments by line."""

    module: object
    text: str
    lines: list[bytes]
    nodes: dict[str, ast.AST] = field(default_factory=dict)
    comments: dict[int, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    @functools.cache
    def of(cls, name: str) -> Source:
        module = importlib.import_module(name)
        text = Path(module.__file__).read_text(encoding="utf-8")
        source = cls(module, text, text.encode().split(b"\n"))
        source.index(ast.parse(source.text).body, "")
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT:
                source.comments[token.start[0]] = token.start[1], token.string.lstrip("# ")
        return source

    def index(self, body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                self.nodes[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                self.index(node.body, f"{prefix}{node.name}.")

    def code(self, node: ast.AST | None) -> str:
        """The source of a node on one line."""
        if node is None:
            return ""
        # as ast.get_source_segment, which splits the whole text again for every node
        part = self.lines[node.lineno - 1 : node.end_lineno]
        part[-1] = part[-1][: node.end_col_offset]
        part[0] = part[0][node.col_offset :]
        text = re.sub(r"\s+", " ", b" ".join(part).decode())
        text = re.sub(r"([\[({]) | (?=[\])}])", r"\1", text)
        return re.sub(r",(?=[\])}])", "", text)

    def type(self, node: ast.AST | None) -> str:
        """An annotation; without quotes where a class names itself."""
        return self.code(node).strip("\"'")

    def comment(self, node: ast.AST) -> str:
        """The comment at the end of a field's lines, or on the lines of its own above it."""
        if node.end_lineno in self.comments:
            return self.comments[node.end_lineno][1]
        line, found = node.lineno - 1, []
        while line in self.comments and self.comments[line][0] == node.col_offset:
            found.insert(0, self.comments[line][1])
            line -= 1
        return " ".join(found)


# Reading


def shortened(default: str) -> str:
    """A default value that fits a signature."""
    if len(default) <= LONGEST:
        return default
    call = re.match(r"[\w.]+\(", default)
    return f"{call[0]}…)" if call and default.endswith(")") else f"{default[: LONGEST - 1]}…"


def google_arguments(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring without its `Args:` block, and what the block says of each name."""
    found = re.search(r"^Args:\n((?: +.*\n?|\n)+)", doc, re.M)
    if not found:
        return doc, {}
    block = textwrap.dedent(found[1])
    pairs = re.findall(r"^(\w+): (.+(?:\n +.+)*)", block, re.M)
    rest = doc[: found.start()] + doc[found.end() :]
    return rest.strip(), {name: re.sub(r"\s+", " ", text) for name, text in pairs}


def plain(function):
    """The function under decorators, `property` and `classmethod`."""
    if isinstance(function, property):
        function = function.fget
    elif isinstance(function, functools.cached_property):
        function = function.func
    elif isinstance(function, classmethod | staticmethod):
        function = function.__func__
    return inspect.unwrap(function)


def parameters(source: Source, node: Function, function, bound: bool) -> list[Row]:
    """The parameters of a function; the last row is its result."""
    notes = docments(function, full=True, args_kwargs=True) if function else {}
    notes = {name: (note.docment or "").strip() for name, note in notes.items()}
    notes |= google_arguments(inspect.getdoc(function) or "")[1] if function else {}
    given, rows = node.args, []
    listed = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(listed) - len(given.defaults)) + given.defaults
    for i, (arg, default) in enumerate(zip(listed, defaults)):
        kind = "/" if i < len(given.posonlyargs) else ""
        rows.append(Row(arg.arg, source.type(arg.annotation), source.code(default), kind=kind))
    if given.vararg:
        rows.append(Row(given.vararg.arg, source.type(given.vararg.annotation), star="*"))
    for arg, default in zip(given.kwonlyargs, given.kw_defaults):
        rows.append(Row(arg.arg, source.type(arg.annotation), source.code(default), kind="*"))
    if given.kwarg:
        rows.append(Row(given.kwarg.arg, source.type(given.kwarg.annotation), star="**"))
    rows = rows[1:] if bound else rows
    for row in rows:
        row.comment = notes.get(row.name, "")
    return [*rows, Row("return", source.type(node.returns), comment=notes.get("return", ""))]


def ours(owner: type) -> list[type]:
    """The classes of speechlab that a class stands on, itself first."""
    return [c for c in owner.__mro__ if c.__module__.split(".")[0] == "speechlab"]


def fields(owner: type) -> list[Row]:
    """The annotated attributes of a class and of those it stands on: a dataclass' fields."""
    rows: dict[str, Row] = {}
    for each in reversed(ours(owner)):
        source = Source.of(each.__module__)
        for node in source.nodes[each.__qualname__].body:
            if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
                default = source.code(node.value)
                factory = re.search(r"^field\(.*default_factory=([\w.]+)", default)
                if factory:
                    made = {"list": "[]", "dict": "{}", "tuple": "()", "set": "set()"}
                    default = made.get(factory[1], f"{factory[1]}()")
                row = Row(node.target.id, source.type(node.annotation), default)
                inherited = rows[row.name].comment if row.name in rows else ""
                row.comment = source.comment(node) or inherited
                rows[row.name] = row
    if dataclasses.is_dataclass(owner):
        return [rows[f.name] for f in dataclasses.fields(owner) if f.init and f.name in rows]
    return list(rows.values())


def constructor(owner: type) -> list[Row] | None:
    """The parameters of a class when it is called; None if they say nothing."""
    if issubclass(owner, enum.Enum) or getattr(owner, "_is_protocol", False):
        return None
    if dataclasses.is_dataclass(owner) or issubclass(owner, tuple):
        return fields(owner)
    for each in owner.__mro__:
        if "__init__" in vars(each) and each.__module__.startswith("speechlab"):
            source = Source.of(each.__module__)
            node = source.nodes[f"{each.__qualname__}.__init__"]
            return parameters(source, node, vars(each)["__init__"], True)[:-1]
        if "__init__" in vars(each):
            return None
    return None


def methods(owner: type) -> list[str]:
    """The public methods and properties that a class defines itself, and `__call__`."""
    return [
        name
        for name, value in vars(owner).items()
        if (not name.startswith("_") or name == "__call__")
        and (inspect.isfunction(plain(value)) or isinstance(value, METHODS))
    ]


def own_doc(owner: type | None, thing) -> str:
    """The docstring of a thing itself, or of the method of speechlab that it replaces."""
    doc = getattr(thing, "__doc__", None) or ""
    name = getattr(thing, "__name__", "")
    if not doc and owner is not None:
        doc = next((vars(c)[name].__doc__ or "" for c in ours(owner)[1:] if name in vars(c)), "")
    return inspect.cleandoc(doc)


# Writing


def escaped(text: str, table: bool = False) -> str:
    """Prose whose characters Markdown, Quarto and Jupyter leave as they are."""
    parts = re.split(r"(`+[^`]+`+)", text)
    for i, part in enumerate(parts):
        if i % 2:
            if table and "|" in part:
                inside = part.strip("`").replace("&", "&amp;").replace("<", "&lt;")
                parts[i] = f"<code>{inside.replace('|', '&#124;')}</code>"
        else:
            part = re.sub(r"([*~^@$\\])", r"\\\1", part).replace("<", "&lt;")
            part = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", part)
            parts[i] = part.replace("|", "&#124;") if table else part
    return "".join(parts)


def prose(doc: str) -> str:
    """A docstring as Markdown; indented blocks stay as they are."""
    lines = [line if line.startswith("    ") else escaped(line) for line in doc.splitlines()]
    return re.sub(r"(?m)^(?![-*] |\d+\. |\s|$)(.+)\n(?=[-*] |\d+\. )", r"\1\n\n", "\n".join(lines))


def coded(text: str) -> str:
    """Code in the cell of a table."""
    if not text:
        return ""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    safe = re.sub(r"([*_~^@$\\`\[\]])", r"\\\1", safe)
    return f"<code>{safe}</code>"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table without its empty columns; the last one with words is the widest."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    wide = ("meaning", "value", "what it is")
    lines = [[head[i] for i in kept], ["-" * (9 if head[i] in wide else 4) for i in kept]]
    lines += [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parameter_table(rows: list[Row], first: str = "parameter") -> str:
    """Types, defaults and comments; nothing if the signature says it all."""
    shown = [row for row in rows if row.name != "return" or row.comment]
    if not any(row.comment for row in shown) and first == "parameter":
        return ""
    cells = []
    for row in shown:
        name = "*returns*" if row.name == "return" else coded(row.star + row.name)
        comment = escaped(row.comment, table=True)
        cells.append((name, coded(row.type), coded(shortened(row.default)), comment))
    return table((first, "type", "default", "meaning"), cells)


def signature(name: str, rows: list[Row], marks: list[str] = ()) -> str:
    """A signature in lines of at most 90 columns."""
    pieces, result = [], ""
    for i, row in enumerate(rows):
        if row.name == "return":
            result = f" -> {row.type}" if row.type else ""
            continue
        if row.kind == "*" and not any(r.kind == "*" or r.star == "*" for r in rows[:i]):
            pieces.append("*")
        piece = row.star + row.name + (f": {row.type}" if row.type else "")
        if row.default:
            piece += (" = " if row.type else "=") + shortened(row.default)
        pieces.append(piece)
        if row.kind == "/" and (i + 1 == len(rows) or rows[i + 1].kind != "/"):
            pieces.append("/")
    line = f"{name}({', '.join(pieces)}){result}"
    if len(line) > COLUMNS and pieces:
        layout = {"width": COLUMNS, "break_long_words": False, "break_on_hyphens": False}
        inner = [
            textwrap.fill(p + ",", initial_indent=" " * 4, subsequent_indent=" " * 8, **layout)
            for p in pieces
        ]
        line = "\n".join([f"{name}(", *inner, f"){result}"])
    return "\n".join(["```python", *(f"@{mark}" for mark in marks), line, "```"])


def heading(level: int, name: str) -> str:
    return "#" * level + " " + re.sub(r"(?<![^.])__|__$", r"\\_\\_", name)


def joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def function_entry(source: Source, name: str, value, owner: type | None = None) -> str:
    """A function, or a method when it has an owner."""
    node, function = source.nodes.get(name), plain(value)
    doc = google_arguments(own_doc(owner, function))[0]
    level = 3 if owner is None else 4
    if not isinstance(node, Function):  # an alias: `name = other`
        return joined(heading(level, name), prose(doc))
    marks = [re.split(r"[.(]", source.code(d))[-1] for d in node.decorator_list]
    marks = [mark for mark in marks if mark in SHOWN_MARKS]
    bound = owner is not None and "staticmethod" not in marks
    rows = parameters(source, node, function, bound)
    if {"property", "cached_property"} & set(marks):
        result = f": {rows[-1].type}" if rows[-1].type else ""
        shown = f"```python\n@property\n{name}{result}\n```"
        doc = joined(doc, rows[-1].comment)
        return joined(heading(level, name), shown, prose(doc))
    called = name.removesuffix(".__call__")
    shown = signature(called, rows, marks)
    return joined(heading(level, name), shown, prose(doc), parameter_table(rows))


def class_entry(source: Source, name: str, owner: type) -> str:
    """A class with its fields or parameters, its members and its methods."""
    rows = constructor(owner)
    doc = inspect.cleandoc(vars(owner).get("__doc__") or "")
    doc = "" if doc.startswith(f"{name}(") else doc  # what `dataclass` and NamedTuple write
    written = [source.code(base) for base in source.nodes[name].bases]
    bases = f"Stands on {', '.join(f'`{base}`' for base in written)}." if written else ""
    shown = signature(name, rows) if rows is not None else ""
    if issubclass(owner, enum.Enum):
        members = [(coded(m.name), coded(repr(m.value))) for m in owner]
        shown, details = "", table(("member", "value"), members)
    elif rows is None or dataclasses.is_dataclass(owner) or issubclass(owner, tuple):
        listed = fields(owner)
        details = parameter_table(listed, "field") if listed else ""
    else:
        details = parameter_table(rows)
    entries = [
        function_entry(source, f"{name}.{method}", vars(owner)[method], owner)
        for method in methods(owner)
    ]
    return joined(heading(3, name), shown, prose(doc), bases, details, *entries)


def cell(key: str, text: str) -> dict:
    """A Markdown cell whose id depends on what it shows, so that diffs stay small."""
    return {
        "cell_type": "markdown",
        "id": hashlib.sha256(key.encode()).hexdigest()[:8],
        "metadata": {},
        "source": text.splitlines(keepends=True),
    }


def first_line(doc: str | None) -> str:
    return (inspect.cleandoc(doc or "").splitlines() or [""])[0]


def notebook_of(source: Source) -> str:
    """A link to the page that builds a module."""
    found = re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", source.text)
    if not found:
        return ""
    page = json.loads((ROOT / "nbs" / f"{found[1]}.ipynb").read_text(encoding="utf-8"))
    title = re.match(r"# (.+)", "".join(page["cells"][0]["source"]))[1]
    return f"Built in [{title}](../{found[1]}.ipynb)."


def module_cells(name: str) -> list[dict]:
    """The section of one module."""
    source, cells = Source.of(name), []
    values = []
    for symbol in source.module.__all__:
        value = getattr(source.module, symbol)
        if inspect.isclass(value) and symbol in source.nodes:
            cells.append(cell(f"{name}.{symbol}", class_entry(source, symbol, value)))
        elif isinstance(source.nodes.get(symbol), Function):
            cells.append(cell(f"{name}.{symbol}", function_entry(source, symbol, value)))
        else:
            values.append(symbol)
    also = f"Values: {', '.join(coded(v) for v in values)}." if values else ""
    title = name.removeprefix("speechlab.")
    about = joined(first_line(source.module.__doc__), notebook_of(source), also)
    return [cell(name, joined(f"## {title}", about)), *cells] if cells or values else []


def face_cells() -> list[dict]:
    """What `import speechlab` offers."""
    rows = []
    for name in speechlab.__all__:
        home = speechlab._HOMES.get(name)
        if home:
            what = first_line(getattr(speechlab, name).__doc__)
            link = f"[<code>{name.replace('_', chr(92) + '_')}</code>](#{name})"
            rows.append((link, escaped(what, table=True), f"[{home}](#{home})"))
    source = Source.of("speechlab")
    about = joined(
        "## speechlab", first_line(speechlab.__doc__), table(("name", "what it is", "from"), rows)
    )
    load = function_entry(source, "load", speechlab.load)
    return [cell("speechlab", about), cell("speechlab.load", load)]


def modules() -> list[str]:
    """The modules of the library, part by part."""
    return [
        found.name
        for part in PARTS
        for found in pkgutil.walk_packages(
            importlib.import_module(f"speechlab.{part}").__path__, f"speechlab.{part}."
        )
    ]


def page() -> str:
    """The notebook as `nbdev_clean` leaves it."""
    cells = [cell("front", FRONT), cell("introduction", INTRODUCTION), *face_cells()]
    for name in modules():
        cells += module_cells(name)
    ids = [c["id"] for c in cells]
    assert len(ids) == len(set(ids)), "two cells have one id"
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    made = page()
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        print(f"{PAGE.relative_to(ROOT)} is out of date: run python .ci/make_api.py")
        sys.exit(1)


if __name__ == "__main__":
    main()
