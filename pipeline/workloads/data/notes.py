"""What a user should know of the data: things that were found, counted, with the first places they were found at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from secateur.device_profiles.wording import number_of


@dataclass
class Tally:
    """Counts of what was found in the data.

    Args:
        found: what, as ``number_of`` takes it ("box(es) without area was|were dropped") -> the places.
        lines: what is no count.
    """

    found: dict[str, list[str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, what: str, *places: str) -> None:
        """Count ``what`` once for each of the places."""
        self.found.setdefault(what, []).extend(places)

    def say(self, line: str) -> None:
        """Something that is no count."""
        self.lines.append(line)

    def notes(self) -> tuple[str, ...]:
        """A line for each thing that was found at all."""
        counted = (f"{number_of(len(places), what)}: {some(places)}" for what, places in self.found.items() if places)
        return (*self.lines, *counted)


def some(places: Sequence[str], most: int = 3) -> str:
    """The first places, and how many more there are."""
    more = f" and {len(places) - most:,} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more
