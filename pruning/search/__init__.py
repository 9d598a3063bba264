"""Search methods, one module each. A module that has ``Options`` and ``search`` is a method, named as its file."""

from __future__ import annotations

import difflib
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

IS_METHOD = re.compile(r"^(?:class|def|from .* import .*\b)\s*Options\b[\s\S]*^def search\(", re.MULTILINE)
"""The text of a method's module: it has ``Options``, and then ``search``."""
FIRST_LINE = re.compile(r'\A\s*"""\s*(.*)')


def methods() -> dict[str, str]:
    """Every search method: name -> first line of its docstring. Modules are read, not run: some import much."""
    texts = {
        info.name: Path(folder, f"{info.name}.py").read_text(encoding="utf-8")
        for folder in __path__
        for info in pkgutil.iter_modules([folder])
        if not info.ispkg
    }
    found = {name: FIRST_LINE.match(text) for name, text in texts.items() if IS_METHOD.search(text)}
    return {name: "" if line is None else line[1].rstrip('"').strip() for name, line in sorted(found.items())}


def load(name: str) -> ModuleType:
    """The module of a method: its ``Options`` and its ``search(problem, options)``.

    Raises:
        ValueError: there is no such method; lists the known ones and the nearest name.
    """
    known = sorted(methods())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown search method {name!r}{hint} Known methods: {', '.join(known)}")
    return import_module(f"{__name__}.{name}")
