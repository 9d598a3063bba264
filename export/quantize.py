"""Precisions: how the numbers of an exported network are stored and computed. Another one is one entry of the table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from secateur.export.errors import ExportError
from secateur.export.folding import clean
from secateur.export.qdq import Calibration, quantise


@dataclass(frozen=True)
class Precision:
    """How to make a network of a precision, and what it may differ by.

    Args:
        make: the exported network in fp32, and images to calibrate it with -> the one of this precision.
        tolerance: the relative error that fp32 may have -> the one that this precision may have; inf = the error says
            nothing, and the metric of the very file is what is compared.
        calibrated: whether it needs images, and is cut from a quantised template.
        facts: what is known of it, for reports.
    """

    make: Callable[[onnx.ModelProto, Calibration | None], onnx.ModelProto]
    tolerance: Callable[[float], float]
    calibrated: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


def _int8(network: onnx.ModelProto, calibration: Calibration | None) -> onnx.ModelProto:
    if calibration is None:
        raise ExportError("int8 needs images that the ranges of activations are taken from")
    return quantise(clean(network)[0], calibration)


def _fp16(network: onnx.ModelProto, _: Calibration | None) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16  # half a second
    from onnxscript import ir

    try:
        made: onnx.ModelProto = convert_float_to_float16(network, keep_io_types=True)
    except Exception as error:  # it raises whatever ONNX and NumPy do
        raise ExportError(f"ONNX Runtime cannot write the network in fp16: {error}") from error
    written = ir.from_proto(made)
    written.graph.sort()  # its casts stand behind what reads them
    return ir.to_proto(written)


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(
        lambda network, _: network, lambda tolerance: tolerance, facts={"weight_bits": 32, "activation_bits": 32}
    ),
    "fp16": Precision(
        _fp16,
        lambda tolerance: max(tolerance, 2e-2),
        facts={
            "weight_bits": 16,
            "activation_bits": 16,
            "note": "half the file; ONNX Runtime gains no speed by it on a CPU",
        },
    ),
    "int8": Precision(_int8, lambda _: float("inf"), calibrated=True, facts={"weight_bits": 8, "activation_bits": 8}),
}
"""By the name that a run file's ``precision`` has."""


EXCEPT = " except "


def precision(name: str) -> Precision:
    """A precision by its name, which may except layers that stay in float: ``int8 except conv1, layer1.0.conv2``.

    Raises:
        ExportError: there is none; lists those that there are.
    """
    kind, floats = kind_of(name), layers_in_float(name)
    if kind not in PRECISIONS or (floats and not PRECISIONS[kind].calibrated):
        raise ExportError(f"networks cannot be exported in {name!r} so far; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[kind]


def mixed(kind: str, layers: Iterable[str]) -> str:
    """The name of a precision in which some layers, by the names of their modules, stay in float."""
    named = ", ".join(layers)
    return f"{kind}{EXCEPT}{named}" if named else kind


def kind_of(name: str) -> str:
    """The entry of the table that a precision's name begins with."""
    return name.partition(EXCEPT)[0]


def layers_in_float(name: str) -> tuple[str, ...]:
    """The layers that a precision's name excepts."""
    return tuple(filter(None, name.partition(EXCEPT)[2].split(", ")))


def file_word(name: str) -> str:
    """A precision's name as a part of a file's."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{kind_of(name)}-{digest}" if layers_in_float(name) else name
