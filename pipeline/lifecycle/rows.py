"""Published claims as rows: what each says, and the run files that repeat it (``pipeline/runs/reproduce/ROW``).

A row is ``row.yaml`` and a run file for each of its units, in one folder. A unit with a seed is one run of the product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.config.schema import RunFile, Section
from secateur.pipeline.errors import UserError

ROWS = Path(__file__).parents[1] / "runs" / "reproduce"
ROW_FILE = "row.yaml"
ALL = "all"
"""Overrides of a profile that hold for every unit."""
Profile = Literal["cpu", "gpu"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
COMPUTE: Mapping[Profile, str] = {"cpu": "cpu", "gpu": "cuda"}
Figure = Literal["drop_pp", "macs_removed", "params_removed", "speedup", "hypervolume"]
RATIOS = ("speedup", "hypervolume")
"""Figures that are compared with another unit's by their ratio, the others by their difference."""


class Bound(Section):
    """What a goal asks of a figure, as the mean over seeds."""

    figure: Figure
    """drop_pp = accuracy lost, in percentage points; macs_removed, params_removed = fractions; speedup = on the device
    ``local``; hypervolume = of the search's front."""
    unit: str
    """Whose figure."""
    at_most: float | None = None
    at_least: float | None = None
    over: str | None = None
    """Another unit: what is bounded is the ratio to its speedup or hypervolume, or the difference to another figure."""

    @model_validator(mode="after")
    def _bounds_one_side(self) -> Bound:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("set at_most or at_least, one of them")
        return self


class Row(Section):
    """A published claim, and what is aimed at here."""

    claim: str
    """In a sentence."""
    source: str
    """The publication."""
    published: Mapping[Figure, float] = {}
    """Its figures."""
    order: Annotated[int, Field(ge=1)]
    """Its place in the queue: what says most per hour comes first."""
    units: tuple[str, ...]
    """The run files of the folder, by name, in the order in which they are run; the first is the claim's method."""
    shared: Mapping[str, str] = {}
    """Controls whose run file is another row's: the unit's name here -> ``ROW/UNIT``."""
    seeds: Annotated[int, Field(ge=1)] = 1
    """How many, unless the command says so."""
    goal: Mapping[Profile, tuple[Bound, ...]]
    """What has to hold; without ``gpu`` that of ``cpu`` holds there too."""
    profiles: Mapping[Profile, Mapping[str, Mapping[str, Any]]] = {}
    """Overrides of the run files: profile -> unit or ``all`` -> key -> value."""
    needs: tuple[str, ...]
    """Files and folders under SECATEUR_DATA, and where they come from."""
    not_here: str = ""
    """Why it was not run for the table in docs/results.md, where that cannot be changed: ``no data``."""
    other_pixels: str = ""
    """A file beside the rows with the test images whose pixels here are not the originals; figures are given without
    them too."""

    @model_validator(mode="after")
    def _names_its_units(self) -> Row:
        named = {*self.units, *self.shared}
        used = {unit for bounds in self.goal.values() for bound in bounds for unit in (bound.unit, bound.over)}
        used |= {unit for overrides in self.profiles.values() for unit in overrides}
        if foreign := sorted(used - named - {None, ALL}, key=str):
            raise ValueError(f"names units that are neither in units nor in shared: {', '.join(map(str, foreign))}")
        if "cpu" not in self.goal:
            raise ValueError("goal says nothing for cpu")
        return self


@dataclass(frozen=True)
class Unit:
    """One run of a row.

    Args:
        row: its name.
        name: of the run file, without its suffix.
        profile: which overrides hold.
    """

    row: str
    name: str
    seed: int
    profile: Profile

    def __str__(self) -> str:
        return f"{self.row}/{self.label}"

    @property
    def label(self) -> str:
        """Its folder in the row's results."""
        return f"{self.name}-s{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """Of its run file, as ``--set`` takes them."""
        given = read_row(self.row).profiles.get(self.profile, {})
        chosen = {"compute": COMPUTE[self.profile], **given.get(ALL, {}), **given.get(self.name, {})}
        return [f"{key}={json.dumps(value)}" for key, value in {**chosen, "seed": self.seed}.items()]

    def config(self, more: Sequence[str] = ()) -> RunFile:
        """Its run file with the overrides of its profile.

        Raises:
            UserError: it is not valid.
        """
        return load_run_file(ROWS / self.row / f"{self.name}.yaml", [*self.overrides, *more])


def row_names() -> list[str]:
    """All rows, in the order of the queue."""
    names = [file.parent.name for file in ROWS.glob(f"*/{ROW_FILE}")]
    return sorted(names, key=lambda name: (read_row(name).order, name))


def read_row(name: str) -> Row:
    """A row by name.

    Raises:
        UserError: there is none of this name, or its file is not valid.
    """
    file = ROWS / name / ROW_FILE
    if Path(name).name != name or not file.is_file():
        known = ", ".join(sorted(entry.parent.name for entry in ROWS.glob(f"*/{ROW_FILE}")))
        raise UserError(f"there is no row {name!r}; known: {known}")
    try:
        return Row.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{file}: {error}") from error


def other_pixels(row: Row) -> frozenset[int]:
    """Test images whose pixels here are not the originals, by their places in the test split."""
    if not row.other_pixels:
        return frozenset()
    content: Any = yaml.safe_load((ROWS / row.other_pixels).read_text(encoding="utf-8"))
    return frozenset(content["test"])


def units_of(name: str, profile: Profile, seeds: int | None = None) -> list[Unit]:
    """The units of a row, all of one seed before the next."""
    row = read_row(name)
    return [Unit(name, unit, seed, profile) for seed in range(seeds or row.seeds) for unit in row.units]
