"""The metrics of a task of one's own: what it may return, and what is wrong with anything else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.custom.calls import kind

ROUNDING = 1e-6
"""How far a metric may lie outside of [0, 1] for its rounding."""
TAKEN = frozenset({"loss", "macs", "params", "size_bytes", "activation_bytes", "divergence", "divergence_score"})
"""Names of other metrics of a candidate; so are those with a unit of time."""
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Measure:
    """A metric as a task gives it.

    Args:
        unit: empty = a fraction.
        better: whether higher or lower values are.
    """

    value: float
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"


def judged(returned: Any, where: str) -> dict[str, Measure]:
    """The metrics that a task returned.

    Raises:
        UserError: they are anything else than what ``Task.metrics`` says; all that is wrong in one message.
    """
    if not isinstance(returned, Mapping) or not returned:
        raise UserError(f"{where} returned {kind(returned)}; return a mapping of names to values, the gate's first")
    wrong, found = list[str](), dict[str, Measure]()
    for position, (name, given) in enumerate(returned.items()):
        try:
            found[str(name)] = _measure(name, given, first=position == 0)
        except ValueError as error:
            wrong.append(f"{name!r}: {error}")
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}")
    return found


def _measure(name: Any, given: Any, *, first: bool) -> Measure:
    """One metric.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError("a name is made of small letters, digits and '_', and begins with a letter")
    if name in TAKEN or name.endswith("_ms") or name.startswith("latency_"):
        raise ValueError("this name is taken; choose another one")
    if first:
        value = _number(given)
        if value < -ROUNDING or value > 1 + ROUNDING:
            raise ValueError(
                f"the first metric is the gate's and must lie in [0, 1], higher is better; it is {value:g}: scale or "
                "cut it (an IoU; R2 cut at 0; exp(-error)), and give what people read as a further metric"
            )
        return Measure(min(1.0, max(0.0, value)) if not math.isnan(value) else value)
    fix = 'a further metric is (value, unit, "higher" or "lower"), such as (2.1, "mm", "lower")'
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise ValueError(f"{fix}; it is {kind(given)}")
    value, unit, better = given
    if not isinstance(unit, str) or not unit.isprintable() or len(unit) > 20 or better not in ("higher", "lower"):
        raise ValueError(f"{fix}; it is ({value}, {unit!r}, {better!r})")
    return Measure(_number(value), unit, better)


def _number(given: Any) -> float:
    """A number, or a tensor of one.

    Raises:
        ValueError: it is none.
    """
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a value is one number; it is {kind(given)}") from error
