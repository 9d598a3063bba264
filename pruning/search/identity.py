"""What a request is known by: the same in every version, however its class is called and whatever fields it gets.

``digest_of`` identifies requests in a run's journal. ``draws_of`` is what random draws for a request, and the names of
the weights it leaves behind, are made from: the text that requests had in the first versions, so that results stay as
they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import numpy as np

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import (
    AuxiliaryTraining,
    Candidate,
    Distort,
    Evaluate,
    FineTune,
    MaskedLoss,
    Predict,
    Request,
    Score,
    Time,
)

KINDS: Mapping[type, str] = {
    Evaluate: "evaluation",
    FineTune: "finetune",
    Score: "score",
    MaskedLoss: "probe",
    Distort: "distort",
    AuxiliaryTraining: "learn",
    Time: "time",
    Predict: "predict",
}
"""What each kind of request is called in journals: for ever, whatever its class is called. ``Remaining`` is in none."""
FIRST_TEXTS: Mapping[type, tuple[str, tuple[str, ...]]] = {
    FineTune: ("FineTune", ("candidate", "epochs", "part", "write_back", "distill", "latency")),
    AuxiliaryTraining: ("Learn", ("kind", "epochs", "base", "options")),
    Score: ("Score", ("criterion", "base", "plan", "options")),
    Distort: ("Distort", ("plan", "removed", "base", "batch_size")),
    Candidate: ("Candidate", ("id", "plan", "origin", "parents", "base")),
    PruningPlan: ("PruningPlan", ("sizes", "kept")),
}
"""What the classes were called, and their fields, when results were first made from their texts."""
EXACT = 1 << 53
"""Whole numbers below it are the same as integers and as floats."""


def identity(request: Request) -> str:
    """Canonical JSON of a request: its kind, and every field that is not at its default.

    Names are sorted, plans and arrays stand as their digests, tuples as lists, and 1.0 as 1.

    Raises:
        TypeError: a field holds what has no canonical form.
    """
    said = {"kind": KINDS[type(request)], "request": _canonical(request)}
    return json.dumps(said, sort_keys=True, separators=(",", ":"))


def digest_of(request: Request) -> str:
    """16 hexadecimal digits that name a request's identity."""
    return hashlib.sha256(identity(request).encode()).hexdigest()[:16]


def draws_of(request: FineTune | AuxiliaryTraining | Score | Distort) -> str:
    """12 hexadecimal digits from which random draws for a request and names of its weights are made."""
    return hashlib.sha256(_first_text(request).encode()).hexdigest()[:12]


def _canonical(value: Any) -> Any:
    """A value in JSON's types, written in one way only."""
    match value:
        case None | bool() | str():
            return value
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            number = float(value)
            whole = number.is_integer() and abs(number) < EXACT
            return int(number) if whole else number if np.isfinite(number) else str(number)
        case PruningPlan():
            return value.digest
        case np.ndarray():
            content = f"{value.dtype.str} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes()
            return hashlib.sha256(content).hexdigest()
        case Mapping():
            return {str(name): _canonical(part) for name, part in value.items()}
        case tuple() | list():
            return [_canonical(part) for part in value]
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} has no canonical form")
    parts = {f.name: _canonical(getattr(value, f.name)) for f in fields(value)}
    return {f.name: parts[f.name] for f in fields(value) if not _is_default(f, getattr(value, f.name))}


def _is_default(field: Field[Any], value: Any) -> bool:
    if field.default is not MISSING:
        return bool(_canonical(field.default) == _canonical(value))
    return field.default_factory is not MISSING and bool(_canonical(field.default_factory()) == _canonical(value))


def _first_text(value: Any) -> str:
    """A value's ``repr`` as it was, and behind it each field that came later and is not at its default."""
    if type(value) not in FIRST_TEXTS:
        return repr(value)
    name, first = FIRST_TEXTS[type(value)]
    later = [f.name for f in fields(value) if f.name not in first and not _is_default(f, getattr(value, f.name))]
    return f"{name}({', '.join(f'{field}={_first_text(getattr(value, field))}' for field in (*first, *later))})"
