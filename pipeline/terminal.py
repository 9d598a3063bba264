"""The terminal: the only module that prints. What it is given is shown as it is, and never read as markup.

A text of a user's (a path, a name, an error of a device) may hold brackets, control characters, or bytes that are no
UTF-8: it is shown with escapes for what no terminal shows, in any encoding. Styles are given beside a text, not in it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

EXIT_BROKEN_PIPE = 128 + 13
"""As of a program that a closed pipe ended (``secateur list methods | head -1``)."""


def literal(text: str) -> str:
    """A text with escapes for what no terminal shows; line breaks stay."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    # That package takes longer to import than most commands take.
    from secateur.device_profiles.wording import printable_lines

    return printable_lines(text)


def one_line(text: object) -> str:
    """The same of a text in one line: a file name may hold line breaks."""
    if str(text).isprintable():
        return str(text)
    from secateur.device_profiles.wording import printable

    return printable(text)


def command(*words: object) -> str:
    """``secateur.device_profiles.wording.command``: a command that can be pasted, whatever is in its words."""
    from secateur.device_profiles.wording import command as made

    return made(*words)


class Terminal(Console):
    """A console to which every text is only text."""

    def __init__(self, *, stderr: bool = False, **settings: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """What rich calls for every text: of a line, a cell, a title."""
        return super().render_str(literal(text), **{**settings, "markup": False, "emoji": False})

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print; lines are not broken, so that commands and paths can be copied."""
        lines = all(isinstance(o, str | Text) for o in objects)
        super().print(*objects, **{"soft_wrap": lines, **settings})

    def labelled(self, label: str, style: str, text: str) -> None:
        """A line whose first word has a style."""
        self.print(Text.assemble((f"{label}:", style), f" {literal(text)}"))

    def data(self, data: object) -> None:
        """JSON for programs: nothing but ASCII, and null for what is no number, which JSON has no word for."""
        self.print(json.dumps(_finite(data), indent=2, allow_nan=False))

    @property
    def is_attended(self) -> bool:
        """Whether a person can be asked here."""
        return sys.stdin is not None and sys.stdin.isatty() and self.file.isatty()

    def confirmed(self, question: str) -> bool:
        """Ask a person; anything but y or yes is a no."""
        try:
            return self.input(Text(f"{literal(question)} [y/N] ")).strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def asked(self, question: str) -> str:
        """What a person answers; empty where it is nothing."""
        try:
            return self.input(Text(f"{literal(question)} ")).strip()
        except EOFError:
            return ""

    def on_broken_pipe(self) -> NoReturn:
        """Whoever read the output has seen enough: no error, and nothing more is written.

        Raises:
            SystemExit: with ``EXIT_BROKEN_PIPE``.
        """
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_BROKEN_PIPE)


def _finite(data: Any) -> Any:
    """The same with None in the place of NaN and infinity."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def table(*columns: str, title: str = "", right: Collection[str] = (), **settings: Any) -> Table:
    """A table; its cells are texts.

    Args:
        columns: the headings.
        right: headings of columns that are aligned on the right.
    """
    made = Cells(title=one_line(title) or None, title_justify="left", **settings)
    for heading in columns:
        made.add_column(one_line(heading), justify="right" if heading in right else "left", overflow="fold")
    return made


class Cells(Table):
    """A table with one line a text."""

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        super().add_row(*(one_line(cell) if isinstance(cell, str) else cell for cell in cells), **settings)


def use_any_encoding() -> None:
    """Let the standard streams show as an escape what their encoding does not have, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


out, err = Terminal(), Terminal(stderr=True)
