"""Precisions: how the numbers of an exported network are stored and computed. Another one is one entry of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from secateur.export.errors import ExportError


@dataclass(frozen=True)
class Precision:
    """How to make a network of a precision, and what it may differ by.

    Args:
        make: the exported network in fp32 -> the one of this precision.
        tolerance: the relative error that fp32 may have -> the one that this precision may have.
        facts: what is known of it, for reports.
    """

    make: Callable[[onnx.ModelProto], onnx.ModelProto]
    tolerance: Callable[[float], float]
    facts: Mapping[str, Any] = field(default_factory=dict)


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(lambda network: network, lambda tolerance: tolerance, {"weight_bits": 32, "activation_bits": 32}),
}
"""By the name that a device profile's ``precision`` has."""


def precision(name: str) -> Precision:
    """A precision by its name.

    Raises:
        ExportError: there is none; lists those that there are.
    """
    if name not in PRECISIONS:
        raise ExportError(f"networks cannot be exported in {name!r} so far; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
