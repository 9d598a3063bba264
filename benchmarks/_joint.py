"""Widths and precision of layers chosen together, against plans chosen in float that are then quantised as a whole.

Both choose among the same uniform plans, without training: some shares of the channels, widths rounded up to 8 and
16, batch norm recalibrated. Accuracies that choose are of every other image; the rest judge. For each plan on the front
of accuracy and latency in float, quantised, the fastest of all (plan, precision) is taken whose accuracy is no lower,
and both are timed again in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

from torch import Tensor

from secateur.export.quantize import layers_in_float
from secateur.pipeline.run.layer_precisions import mixtures
from secateur.pruning import PruningPlan

KEEPS, MULTIPLES = (0.95, 0.88), (8, 16)
LEAST = 0.5
"""Of the unpruned network's top-1: plans that keep less of it in integers are compared with nothing."""
FLOAT, INTEGERS = "fp32", "int8"


class Bench(Protocol):
    """One network in float and in integers, as ``benchmarks.precision`` has it."""

    full: PruningPlan

    def plan(self, keep: float, multiple: int, *, up: bool = False) -> PruningPlan: ...
    def pruned(self, plan: PruningPlan) -> dict[str, Tensor]: ...
    def file(self, plan: PruningPlan, state: dict[str, Tensor] | None, floats: Iterable[str] | None) -> bytes: ...
    def halves(self, file: bytes) -> tuple[float, float]: ...
    def ratio(self, file: bytes, reference: bytes) -> float: ...
    def sensitivity(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Point:
    """A plan in a precision.

    Args:
        chosen_by, judged_by: top-1 in percent, on every other image and on the rest.
        latency: over that of the unpruned network in fp32.
    """

    plan: str
    precision: str
    chosen_by: float
    judged_by: float
    latency: float


def joint(name: str, made: Callable[[], Bench], found: Callable[[str, Callable[[], Any]], Any]) -> dict[str, float]:
    """``joint_gain``, ``joint_gain_widths``, and how top-1 differs on images that chose nothing (percentage points).

    Args:
        found: gives a figure by its name, computed where it is not known.
    """
    errors = found(f"{name} sensitivity", lambda: made().sensitivity())
    precisions = (FLOAT, *mixtures(INTEGERS, errors))
    shares = {"whole": (1.0, 1), **{f"{keep:g} up to x{m}": (keep, m) for keep in KEEPS for m in MULTIPLES}}

    @cache
    def cut(title: str) -> tuple[PruningPlan, dict[str, Tensor] | None]:
        bench, (keep, multiple) = made(), shares[title]
        plan = bench.full if keep == 1 else bench.plan(keep, multiple, up=True)
        return plan, None if keep == 1 else bench.pruned(plan)

    def file(title: str, precision: str) -> bytes:
        return made().file(*cut(title), None if precision == FLOAT else layers_in_float(precision))

    def measured(title: str, precision: str) -> list[float]:
        content = file(title, precision)
        return [*made().halves(content), made().ratio(content, file("whole", FLOAT))]

    def over(one: Point, other: Point) -> float:
        return made().ratio(file(one.plan, one.precision), file(other.plan, other.precision))

    points = [
        Point(title, precision, *found(f"{name} {title}, {precision}", partial(measured, title, precision)))
        for title in shares
        for precision in precisions
    ]
    starts = [start for start in quantised_front(points) if start.chosen_by >= LEAST * points[0].chosen_by]
    gains: dict[str, list[float]] = {"every layer": [], "widths alone": []}
    apart = []
    for start in starts:
        for what, among in (("every layer", points), ("widths alone", [p for p in points if p.precision == INTEGERS])):
            best = fastest(among, start.chosen_by)
            again = partial(
                lambda a, b: made().ratio(file(a.plan, a.precision), file(b.plan, b.precision)), start, best
            )
            pair = f"{name} {start.plan}, {start.precision} over {best.plan}, {best.precision}"
            gains[what].append(1.0 if best == start else found(pair, again))
            apart += [best.judged_by - start.judged_by] if what == "every layer" else []
    return {
        "joint_gain": statistics.median(gains["every layer"]),
        "joint_gain_widths": statistics.median(gains["widths alone"]),
        "joint_top1_pp": statistics.mean(apart),
    }


def quantised_front(points: Sequence[Point]) -> list[Point]:
    """The plans that nothing beats in float, in integers."""
    in_float = [point for point in points if point.precision == FLOAT]
    front = {
        point.plan
        for point in in_float
        if not any(o.chosen_by >= point.chosen_by and o.latency < point.latency for o in in_float if o != point)
    }
    return [point for point in points if point.plan in front and point.precision == INTEGERS]


def fastest(points: Iterable[Point], least: float) -> Point:
    """Of those of an accuracy at least."""
    return min((point for point in points if point.chosen_by >= least), key=lambda point: point.latency)
