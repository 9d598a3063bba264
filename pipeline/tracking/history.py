"""Who was champion of a device: what the entries in a registered model's tags tell.

An entry is written before the alias moves, and marked as done after. A process may die between the two: whether the
move of an unmarked entry took place is told by the next one, which names the champion it found, or by the alias.
Entries are numbered one after the other; the clock, which somebody may set back, is only shown.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.pipeline.tracking.schemas import MoveTag, checked, read_json

EVENTS = "secateur.event."
DIGITS = 17
"""Of an entry's number, so that keys sort as numbers do."""
PROMOTE, ROLLBACK, FOUND = "promote", "rollback", "found"


@dataclass(frozen=True)
class Event:
    """A move of a device's champion.

    Args:
        kind: ``promote``, ``rollback``, or ``found``: plain ``champion`` was this version, set by somebody else,
            before it was made to follow the device's again.
        previous: the champion it replaced; None = there was none.
        at: seconds since 1970, as the clock had it; nothing is ordered by it.
        done: whether the move took place (a process may have died between the entry and the move).
        run_id: of the MLflow run with the decision; empty where there is none.
    """

    kind: str
    device: str
    version: str
    previous: str | None
    at: float
    done: bool = True
    run_id: str = ""


def read_events(tags: Mapping[str, str]) -> list[Event]:
    """The entries among a registered model's tags, the oldest first; ``done`` where they are marked so."""
    events = []
    for _, text in sorted((key, text) for key, text in tags.items() if key.startswith(EVENTS)):
        with contextlib.suppress(ValueError):  # written by somebody else
            events.append(Event(**dict(checked(MoveTag, read_json(text)))))
    return events


def next_key(tags: Mapping[str, str]) -> str:
    """The key of the entry after those among a registered model's tags.

    Earlier versions took microseconds since 1970 for numbers; counting goes on from there.
    """
    numbers = [key.removeprefix(EVENTS).partition("-")[0] for key in tags if key.startswith(EVENTS)]
    number = max((int(digits) for digits in numbers if digits.isdecimal() and len(digits) <= DIGITS), default=0) + 1
    return f"{EVENTS}{number:0{DIGITS}d}-{secrets.token_hex(2)}"


def happened(events: Sequence[Event], current: str | None) -> list[Event]:
    """The entries of one device, each with whether its move took place.

    Args:
        current: the champion there is.
    """
    moves = [event for event in events if event.kind != FOUND]
    after = {id(e): then for e, then in zip(moves, [*(e.previous for e in moves[1:]), current], strict=False)}
    return [replace(e, done=e.done or e.kind == FOUND or e.version == after[id(e)]) for e in events]


def champions(events: Sequence[Event], current: str | None) -> list[str]:
    """The champions of one device that a roll-back can go through, the present one last.

    Whatever was champion is among them, whoever made it so, but for what a roll-back went away from.
    """
    stack: list[str] = []

    def reign(version: str | None) -> None:
        if version is not None and (not stack or stack[-1] != version):
            stack.append(version)

    for event in happened(events, current):
        if not event.done:
            continue
        if event.kind == FOUND:  # it was there beside the champion of that moment, which stays the present one
            stack.insert(max(0, len(stack) - 1), event.version)
            continue
        reign(event.previous)  # another one than before where somebody moved the alias by hand
        if event.kind == ROLLBACK and event.version in stack:
            while stack[-1] != event.version:
                stack.pop()
        reign(event.version)
    reign(current)
    return stack


def deleted_champion(events: Sequence[Event], current: str | None, exist: Collection[str]) -> str | None:
    """The champion of a device that is gone with its version; None where the device has one, or somebody removed it.

    Args:
        current: the champion there is.
        exist: the versions there are.
    """
    reign = champions(events, current)
    return reign[-1] if reign and reign[-1] not in exist else None


def is_known(version: str, events: Sequence[Event], current: str | None) -> bool:
    """Whether a roll-back can reach a version, or has just gone away from it."""
    moves = [event for event in happened(events, current) if event.done and event.kind != FOUND]
    return version in champions(events, current) or (bool(moves) and moves[-1].previous == version)
