"""Comparisons of sizes in a model's code (``if self.a != self.b``): a branch may turn at some widths.

A comparison that a pruned network answers otherwise than the dense one is a hint where a trial fails, and a doubt where
it does not. So each one is tried at widths at which it turns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.pruning.channels import Assembly
from secateur.pruning.lines import running_line
from secateur.pruning.plan import IntArray, PruningPlan

NAMES = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison of two integers, at least one of which follows a width.

    Args:
        name: ``eq``, ``ne``, ``lt``, ``le``, ``gt`` or ``ge``.
        left, right: the integers, which may know where they come from.
        dense: what it gives in the unpruned network.
        turned: whether it gave something else.
        line: line of the model's code.
    """

    name: str
    left: Any
    right: Any
    dense: bool
    turned: bool
    line: str


_seen: ContextVar[list[Comparison] | None] = ContextVar("comparisons", default=None)


@contextmanager
def comparisons_noted() -> Iterator[list[Comparison]]:
    """Keep the comparisons that are made meanwhile."""
    found: list[Comparison] = []
    token = _seen.set(found)
    try:
        yield found
    finally:
        _seen.reset(token)


def note_comparisons(kind: type[int]) -> None:
    """Let the integers of a class, which have a value ``dense`` too, note their comparisons."""

    def noting(name: str) -> Any:
        compare, own = getattr(operator, name), getattr(int, f"__{name}__")

        def method(self: Any, other: Any) -> Any:
            result, found = own(self, other), _seen.get()
            if found is not None and isinstance(other, int):
                dense = compare(self.dense, getattr(other, "dense", int(other)))
                found.append(Comparison(name, self, other, dense, dense is not result, running_line()))
            return result

        return method

    for name in NAMES:
        setattr(kind, f"__{name}__", noting(name))
    kind.__hash__ = int.__hash__  # type: ignore[method-assign]


def turning_plan(
    comparison: Comparison, sides: tuple[IntArray | int, IntArray | int], assembly: Assembly, plan: PruningPlan
) -> PruningPlan | None:
    """A plan under which a comparison gives another answer than in the dense network; None if none is found.

    Args:
        sides: per side the labels that are counted, or a number.
        plan: the widths of all groups but those that matter.
    """
    groups = assembly.graph.groups
    terms = []
    for side in sides:
        own = np.array([-1]) if isinstance(side, int) else assembly.group[side]
        counts = {int(g): int((own == g).sum()) // groups[g].size for g in np.unique(own) if g >= 0}
        constant = side if isinstance(side, int) else int((own < 0).sum())
        terms.append((constant, counts))
    varied = [max(counts, key=lambda g: counts[g], default=None) for _, counts in terms]
    axes = [g for g in dict.fromkeys(varied) if g is not None]
    if not axes:
        return None
    widths = np.meshgrid(*(np.arange(1, groups[g].size + 1) for g in axes), indexing="ij")
    values = []
    for constant, counts in terms:
        others = sum(n * plan.widths[groups[g].name] for g, n in counts.items() if g not in axes)
        values.append(constant + others + sum(counts.get(g, 0) * w for g, w in zip(axes, widths, strict=True)))
    turned = np.argwhere(getattr(operator, comparison.name)(*np.broadcast_arrays(*values)) != comparison.dense)
    if len(turned) == 0:
        return None
    most = turned[np.argmax(turned.sum(1))]
    return plan.replace({groups[g].name: range(int(w) + 1) for g, w in zip(axes, most, strict=True)})
