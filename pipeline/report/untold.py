"""What a report does not tell: machines, users, and where files lay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from secateur.pipeline.errors import placeless

PLACE = re.compile(r"^(?:/|~|[A-Za-z]:[\\/]).*?([^\\/]+)$")
"""A whole path of some machine, and its last part."""
UNTOLD = ("host", "host_sha256", "telemetry")
"""Facts that are left out: a machine's name, and what the page shows as charts."""
DATA = "data:"
"""How pictures begin."""
SIGNS = re.compile(r"[/\\]")
"""What every path has."""
T = TypeVar("T")


def untold(value: Any) -> Any:
    """Facts without names of machines, and with the last part of whole paths only."""
    if isinstance(value, Mapping):
        return {key: untold(each) for key, each in value.items() if key not in UNTOLD}
    if isinstance(value, list | tuple):
        return [untold(each) for each in value]
    if isinstance(value, str):
        whole = PLACE.match(value) if "\n" not in value else None
        return placeless(value) if whole is None else whole[1]
    return value


def placed_nowhere(part: T) -> T:
    """A part of a report with the last part of whole paths only, wherever they stand in its sentences."""
    return cast(T, _placed_nowhere(part))


def _placed_nowhere(part: Any) -> Any:
    if isinstance(part, str):
        return part if part.startswith(DATA) or not SIGNS.search(part) else placeless(part)
    if isinstance(part, Mapping):
        return {key: _placed_nowhere(each) for key, each in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(_placed_nowhere(each) for each in part)
    if is_dataclass(part):
        return replace(part, **{each.name: _placed_nowhere(getattr(part, each.name)) for each in fields(part)})  # type: ignore[type-var]
    return part
