"""What the docstrings say of every key: of a section those that follow its fields, of options those under ``Args:``."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator

ARGUMENT = re.compile(r"^ {4}(?P<names>\*{0,2}\w+(?:, \w+)*): (?P<text>.+(?:\n(?: {5,}.*|$))*)", re.MULTILINE)
"""An entry under ``Args:``, with the lines that continue it."""
WORDS = {"None": "null", "True": "true", "False": "false"}
"""Python's words -> those of a run file."""


@functools.cache
def meanings(kind: type) -> dict[str, str]:
    """Field -> what the docstrings of a class and of its parents say of it, in a run file's words; one line each."""
    said: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        said |= dict(_arguments(inspect.cleandoc(parent.__dict__.get("__doc__") or "")))
        said |= dict(_below_fields(parent))
    return {name: in_words_of_a_run_file(text) for name, text in said.items()}


def summary(kind: type) -> str:
    """The first paragraph of a class's docstring, in a run file's words."""
    return in_words_of_a_run_file((kind.__doc__ or "").strip().partition("\n\n")[0])


def in_words_of_a_run_file(text: str) -> str:
    """A docstring's text in one line, with ``null`` for ``None`` and single backticks."""
    line = " ".join(text.split()).replace("``", "`")
    return re.sub(r"\b(None|True|False)\b", lambda match: WORDS[match[0]], line)


def _arguments(docstring: str) -> Iterator[tuple[str, str]]:
    listed = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", docstring, re.MULTILINE)
    for entry in ARGUMENT.finditer(listed[1] if listed else ""):
        for name in entry["names"].split(", "):
            yield name, entry["text"]


def _below_fields(kind: type) -> Iterator[tuple[str, str]]:
    """Fields of a class with the string that stands below them in its source; classes without source have none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return
    definition = tree.body[0]
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            yield field.target.id, below.value.value
