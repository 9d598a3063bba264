"""Search methods, one module each. A module that has ``Options`` and ``search`` is a method, named as its file."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module
from types import ModuleType


def methods() -> dict[str, str]:
    """Every search method: name -> first line of its docstring."""
    modules = {info.name: import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}
    return {
        name: (module.__doc__ or "").strip().partition("\n")[0]
        for name, module in modules.items()
        if hasattr(module, "search") and hasattr(module, "Options")
    }


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
