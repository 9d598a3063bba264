"""Typer's help, without what it imports for other uses: rich's Markdown and tracebacks, a third of its time."""

from __future__ import annotations

import sys
from types import ModuleType

UNUSED = ("rich.markdown", "rich.traceback")
"""Our help is no Markdown, and our errors are no tracebacks of typer's."""


class StandIn(ModuleType):
    """A module in which every name is a class that nobody makes anything of."""

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


def import_formatter() -> None:
    """Import what typer shows help with; the modules left out are imported by whoever else wants them."""
    missing = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update({name: StandIn(name) for name in missing})
    try:
        import typer.rich_utils  # noqa: F401
    finally:
        for name in missing:
            del sys.modules[name]
