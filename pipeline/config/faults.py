"""One report of everything that is wrong with a run file: each fault with its place and line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from secateur.device_profiles.plain_yaml import Place
from secateur.device_profiles.wording import cut, number_of, printable, shown
from secateur.pipeline.errors import UserError

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's names for a key that a schema does not know."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a run file, at one place; ``where``: a line of the file, or ``--set``."""

    place: Place
    message: str
    where: str = ""

    def __str__(self) -> str:
        place = printable(".".join(cut(str(part)) for part in self.place)) or "the file"
        return f"{place}{f' ({self.where})' if self.where else ''}: {self.message}"


class FaultsError(UserError):
    """Everything wrong with a run file, in one message.

    Args:
        name: of the run file, as a user knows it.
    """

    def __init__(self, name: str, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        listing = "\n".join(f"  {fault}" for fault in faults)
        super().__init__(f"{name} has {number_of(len(faults), 'fault(s)')}:\n{listing}")


def known(names: Sequence[str], wrong: str) -> str:
    """``"known: a, b; did you mean a?"``"""
    close = difflib.get_close_matches(str(wrong), list(names), n=1)
    return f"known: {', '.join(names)}" + (f"; did you mean {close[0]!r}?" if close else "")


class Report:
    """The faults found so far; what is wrong with a place already is not told again in other words.

    Args:
        faults: those found before anything was checked.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.faults = list(faults)

    def tells_of(self, place: Place) -> bool:
        """Whether a fault of this very place is told."""
        return any(fault.place == place for fault in self.faults)

    def add(self, fault: Fault) -> None:
        """Tell a fault, unless another one of its place is told."""
        if not self.tells_of(fault.place):
            self.faults.append(fault)

    def check(self, schema: Any, data: object, place: Place = ()) -> Any:
        """What ``schema`` makes of ``data``, which stands at ``place``; None = it has faults, which are told."""
        try:
            return TypeAdapter(schema).validate_python(data)
        except ValidationError as error:
            details = error.errors()
        for detail in details:  # of a union's branches the first one is told
            fault = _fault(schema, detail, place)
            above = [fault.place[:end] for end in range(len(place) + 1, len(fault.place))]
            if not any(map(self.tells_of, above)):
                self.add(fault)
        unknown = {detail["loc"][0] for detail in details if len(detail["loc"]) == 1 and detail["type"] in UNKNOWN_KEY}
        if unknown and isinstance(data, dict):  # they may hide faults of the keys that are known
            self.check(schema, {key: value for key, value in data.items() if key not in unknown}, place)
        return None

    def located(self, origins: Mapping[Place, str]) -> list[Fault]:
        """The faults with where each place, or its nearest parent, was given; a default was given nowhere."""
        return [replace(fault, where=_origin(origins, fault.place)) for fault in self.faults]


def _fault(schema: Any, detail: Mapping[str, Any], prefix: Place) -> Fault:
    """One of pydantic's errors in our words."""
    path = detail["loc"]
    place = (*prefix, *(part for part in path if not _is_union_tag(part)))
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in UNKNOWN_KEY:
        message = f"unknown key; {known(_field_names(schema, path[:-1]), str(path[-1]))}"
    elif detail["type"] not in ("missing", "value_error"):
        message = f"{message}, got {shown(detail['input'])}"
    return Fault(place, message)


def _is_union_tag(part: object) -> bool:
    """Pydantic puts the class or type of a union's branch into the place of a fault; users do not write those."""
    return isinstance(part, str) and (
        part[:1].isupper() or part in ("float", "int", "str") or "[" in part or "constrained-" in part
    )


def _field_names(schema: Any, path: Sequence[str | int]) -> list[str]:
    """Keys that the part of ``schema`` at ``path`` knows."""
    for part in path:
        if isinstance(schema, type) and issubclass(schema, BaseModel) and part in schema.model_fields:
            schema = schema.model_fields[str(part)].annotation
        models = [a for a in get_args(schema) if isinstance(a, type) and issubclass(a, BaseModel)]
        if models:
            schema = next((m for m in models if m.__name__ == part), models[0])
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return list(schema.model_fields)
    return [f.name for f in fields(schema)] if is_dataclass(schema) else []


def _origin(origins: Mapping[Place, str], place: Place) -> str:
    """Where a place, or its nearest parent, was given."""
    while place and place not in origins:
        place = place[:-1]
    return origins.get(place, "")
