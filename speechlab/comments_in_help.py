"""`help()` of this package's functions and dataclasses also shows the comments beside parameters.

A signature says `wav: Tensor`; the comment beside it says `(B, 1, T) float32`. Nothing is read before
`help()` is called.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import pydoc
import tokenize

__all__ = ["comments_of", "install"]


def comments_of(thing) -> dict[str, str]:
    "The comments beside a function's parameters and its return, or beside a dataclass's fields."
    plain = inspect.unwrap(thing) if callable(thing) else thing
    if not inspect.isfunction(plain) and not dataclasses.is_dataclass(plain):
        return {}
    try:
        lines = inspect.getsource(plain)
    except (OSError, TypeError):
        return {}
    if inspect.isfunction(plain):
        names = list(inspect.signature(plain).parameters)
        lines = lines[: _head_ends(lines)]
    else:
        names = [field.name for field in dataclasses.fields(plain)]
    found = {}
    for line in lines.splitlines():
        code, _, comment = (part.strip() for part in line.partition("  # "))
        name = code.lstrip("*").split(":")[0].split("=")[0].strip(" ,")
        if comment and name in names:
            found.setdefault(name, comment)
        elif comment and inspect.isfunction(plain) and code.startswith(")"):
            found["returns"] = comment
    return found


def _head_ends(source: str) -> int:
    "Where the line ends that ends a function's signature."
    depth, seen = 0, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        seen = seen or token.string == "def"
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token.string, 0)
        if seen and depth == 0 and token.string == ":":
            return sum(len(line) + 1 for line in source.splitlines()[: token.end[0]])
    return len(source)


def install(package: str = "speechlab") -> None:
    "Let `help()` show them."
    plain = pydoc._getdoc
    if getattr(plain, "__module__", "") == __name__:
        return

    def getdoc(thing):
        text = plain(thing)
        if not str(getattr(thing, "__module__", "")).startswith(package):
            return text
        rows = [f"{name}: {comment}" for name, comment in comments_of(thing).items()]
        return "\n".join([text or "", "", *rows]).strip() if rows else text

    pydoc._getdoc = getdoc
