"""What a report is made of, as plain data: sections of sentences, tiles, charts and tables; all that renderers know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
"""What a mark of a chart stands for: ``x`` and ``y`` (``x2``, ``y2`` of marks that reach from one place to another),
``role`` (its colour), ``tip`` (what is said of it), and whatever else the numbers' table or an interaction needs."""
Mark = Literal["points", "line", "step", "bars", "spans", "rules", "cells", "ticks", "regions"]
Format = Literal["", "%"]


@dataclass(frozen=True)
class Axis:
    """An axis.

    Args:
        title: with its unit; it is drawn.
        scale: ``names`` = one place for each name, in the order given.
        zero: whether the axis begins at zero.
        domain: its ends; None = as the data has it.
        shown: how ticks are written.
        names: of a scale of names.
    """

    title: str
    scale: Literal["linear", "log", "names"] = "linear"
    zero: bool = False
    domain: tuple[float, float] | None = None
    shown: Format = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ramp:
    """What a colour from pale to dark stands for.

    Args:
        title: with its unit.
        low, high: what is written at both ends.
    """

    title: str
    low: str
    high: str


@dataclass(frozen=True)
class Least:
    """A slider that hides marks whose ``size`` is below it.

    Args:
        title: what ``size`` is.
        unit: of it.
        start: where it begins.
    """

    title: str
    unit: str
    start: float = 0.0


@dataclass(frozen=True)
class Layer:
    """Marks of one kind.

    Args:
        rows: what is drawn.
        every: what there is, where not all of it is drawn; None = all is.
    """

    mark: Mark
    rows: Sequence[Row]
    every: Sequence[Row] | None = None


@dataclass(frozen=True)
class Chart:
    """A chart with two axes.

    Args:
        layers: from the back to the front.
        describes: for people who do not see it.
        switch: further x axes by their key; rows then have ``xs``, an x for each.
        height: pixels, 0 = by the number of names.
        grouped: whether bars of one name stand side by side, one for each role.
        pinned: whether a click on a point shows its widths.
        ramp: of cells, and of bars whose rows have a ``fill`` of their own.
        least: of marks that can be hidden by their ``size``.
    """

    x: Axis
    y: Axis
    layers: Sequence[Layer]
    describes: str
    switch: Mapping[str, Axis] | None = None
    height: int = 280
    grouped: bool = False
    pinned: bool = False
    ramp: Ramp | None = None
    least: Least | None = None

    @property
    def roles(self) -> list[str]:
        """Roles of what is drawn, in the order in which they are explained."""
        return list(dict.fromkeys(row["role"] for layer in self.layers for row in layer.rows if row.get("role")))


@dataclass(frozen=True)
class Table:
    """A table as people read it.

    Args:
        columns: titles; one that ends with ``|`` holds numbers.
        rows: texts.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple(title.removesuffix("|") for title in self.columns)

    def is_numeric(self, column: int) -> bool:
        return self.columns[column].endswith("|")


@dataclass(frozen=True)
class Figure:
    """A chart with the same as a table.

    Args:
        name: of the chart, unique in a report.
        note: what has to be said of it.
    """

    name: str
    title: str
    chart: Chart
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first.

    Args:
        detail: its interval, or what it is compared with.
    """

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Picture:
    """An image of the data.

    Args:
        source: a data URI.
        alt: what is to be seen, in words.
    """

    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Text to be copied."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Args:
        sentence: what it says, in one sentence on top.
        state: what the sentence means.
        text: further sentences, a paragraph each.
        missing: what was not measured, and why, for the last section.
    """

    title: str
    sentence: str
    state: Literal["", "good", "bad"] = ""
    tiles: Sequence[Tile] = ()
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    code: Sequence[Code] = ()
    downloads: bool = False
    missing: Sequence[str] = ()


def nothing(title: str, reason: str, *missing: str) -> Section:
    """A section that has only a sentence to say."""
    return Section(title, reason, missing=missing or (f"{title}: {reason}",))
