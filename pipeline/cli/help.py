"""Typer's help, without the third of its time that goes into what it does not show.

That is what it imports for other uses (rich's Markdown and tracebacks), and the parameters of other commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from copy import copy
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typer import Typer
    from typer.models import CommandInfo

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


def completed_words() -> list[str]:
    """The words of the command line that a shell wants completed; none where it wants nothing."""
    if not any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ):
        return []
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()


def narrowed(app: Typer, words: Sequence[str]) -> Typer:
    """The same commands, of which only those that a command line names have parameters: typer reads those of all.

    Args:
        app: is left as it is.
        words: of the command line; what is no command's name is passed over.
    """
    narrow = copy(app)
    narrow.registered_commands = [
        command if _name(command) in words else _listed(command) for command in app.registered_commands
    ]
    narrow.registered_groups = [copy(group) for group in app.registered_groups]
    for group in narrow.registered_groups:
        assert group.typer_instance is not None
        group.typer_instance = narrowed(group.typer_instance, words)
    return narrow


def _name(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__


def _listed(command: CommandInfo) -> CommandInfo:
    """A command that has a name and a text, and is never called."""

    def nothing() -> None: ...

    nothing.__name__, nothing.__doc__ = _name(command), getattr(command.callback, "__doc__", None)
    listed = copy(command)
    listed.callback = nothing
    return listed
