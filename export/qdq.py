"""int8 as ONNX Runtime computes it: a network quantised once, and its numbers made anew from other weights.

A file is quantised by ``onnxruntime.quantization``: QuantizeLinear and DequantizeLinear around every operator that has
an 8-bit kernel, ranges of activations as the smallest and largest value met in calibration, weights per channel. What
of it follows from weights alone (8-bit weights, their scales, 32-bit biases) is made anew by ``Requantiser`` in
milliseconds, by the same rules, while the ranges of activations stay.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from secateur.export.errors import ExportError, TemplateError

Array = npt.NDArray[Any]
QUANTISED, DEQUANTISED = "_quantized", "_DequantizeLinear_Output"
"""What the quantiser appends to the names of a weight's 8-bit numbers, and of what they stand for."""
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators with weights that are quantised."""
RULES = 2
"""Of what is quantised at all; raise it when they change, for templates that are kept."""
MOST_FLAT = 0.5
"""Share of calibration images that may be empty."""
ROOM = 1.0001
"""By how much a bias's largest 32-bit number stays below what fits, as in the quantiser."""


@dataclass(frozen=True)
class Scheme:
    """Number types of an int8 network.

    Args:
        activation, weight: names of ``onnxruntime.quantization.QuantType``.
        bits: of a weight: with 7, sums of two products fit into 16 bits.
        why: when it is the right one.
    """

    activation: str
    weight: str
    bits: int
    why: str


SCHEMES: Mapping[str, Scheme] = {
    "U8S8": Scheme("QUInt8", "QInt8", 8, "x86 with VNNI instructions, and ARM"),
    "U8S7": Scheme("QUInt8", "QInt8", 7, "x86 without VNNI, whose kernels clip sums of two 8-bit products to 16 bits"),
    "U8U8": Scheme("QUInt8", "QUInt8", 8, "x86 without VNNI: exact with all 8 bits, and slower"),
    "S8S8": Scheme("QInt8", "QInt8", 8, "ARM, where it measures faster; slower than float on x86"),
}
"""By name, activations first: U and S for unsigned and signed, then the bits."""
DEFAULT_SCHEME = "U8S8"


def most_careful(schemes: Iterable[str]) -> str:
    """Of number types, those that lose most in the files: the ones for kernels that can do least."""
    return min(schemes, key=lambda name: (SCHEMES[name].bits, list(SCHEMES).index(name)))


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a network is quantised with.

    Args:
        images: inputs that the ranges of activations are taken from, shape ``(samples, ...)``, float32.
        scheme: a name of ``SCHEMES``.
        floats: weights whose layers stay in float, by the names of the state dict.
        names: of the images, for errors; empty = they have none.

    Raises:
        ExportError: the images say nothing of ranges, or there is no such scheme.
    """

    images: Array
    scheme: str = "U8S8"
    floats: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ExportError(f"unknown int8 scheme {self.scheme!r}; known: {', '.join(SCHEMES)}")
        if fault := calibration_fault(self.images, self.names):
            raise ExportError(f"int8: the calibration images {fault}")


def calibration_fault(images: Array, names: Sequence[str] = ()) -> str:
    """What is wrong with calibration images, as the end of a sentence; empty where nothing is.

    Args:
        names: of the images; empty = they have none.
    """
    if images.ndim < 2 or not images.size:
        return f"are missing: their array has the shape {images.shape}"

    def first(found: Any) -> str:
        index = int(np.argmax(found))
        return f"image {index} ({names[index]})" if index < len(names) else f"image {index}"

    values = images.reshape(len(images), -1)
    infinite = ~np.isfinite(values).all(axis=1)
    if infinite.any():
        return (
            f"have NaN or infinite numbers, the first one in {first(infinite)}; look at how it is read, and at mean "
            "and std of the data"
        )
    if images.min() == images.max():
        return f"are all the same number ({images.min():g}), which says nothing of ranges; look at how they are read"
    flat = np.ptp(values, axis=1) == 0
    if flat.mean() > MOST_FLAT:
        return (
            f"say little of ranges: {int(flat.sum())} of {len(images)} are one number each, the first one "
            f"{first(flat)}; look at how they are read, or take empty ones out of the training images"
        )
    return ""


def quantise(network: onnx.ModelProto, calibration: Calibration) -> onnx.ModelProto:
    """A network in int8 with ranges from calibration.

    Args:
        network: clean (``secateur.export.folding``), with names of nodes, one input and a fixed batch size.

    Raises:
        ExportError: it has several inputs, the images do not fit it, or ONNX Runtime cannot quantise it.
    """
    port = _only_input(network)
    shape = [d.dim_value for d in port.type.tensor_type.shape.dim]
    if list(calibration.images.shape[1:]) != shape[1:]:
        raise ExportError(
            f"int8: calibration images have the shape {calibration.images.shape[1:]}, the network takes "
            f"{tuple(shape[1:])}"
        )
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    scheme = SCHEMES[calibration.scheme]
    marked = onnx.ModelProto()
    marked.CopyFrom(network)
    mark = marked.metadata_props.add()
    mark.key, mark.value = "onnx.quant.pre_process", "onnxruntime.quant"  # it is clean; else the quantiser warns
    kept = [node.name for node in network.graph.node if not calibration.floats.isdisjoint(node.input)]
    kept += [*_of_weights_alone(network.graph), *_behind_the_last_layers(network.graph)]
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder, _quiet():
        file = Path(folder) / "quantised.onnx"
        try:
            quantize_static(
                marked,
                file,
                _Reader(calibration.images.astype(np.float32, copy=False), port.name, shape[0]),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=scheme.bits < 8,
                activation_type=QuantType[scheme.activation],
                weight_type=QuantType[scheme.weight],
                nodes_to_exclude=kept,
            )
            made = onnx.load(file)
        except Exception as error:  # it raises whatever ONNX, NumPy and ONNX Runtime do
            raise ExportError(f"ONNX Runtime cannot quantise the network: {_first_line(error)}") from error
    del made.metadata_props[:]
    return made


def _of_weights_alone(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that see no image: arithmetic of weights and shapes.

    They stay in float. (The quantiser would wait for ever for the scale of a slice of a bias.)
    """
    known = {tensor.name for tensor in graph.initializer}
    names = []
    for node in graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
            names.append(node.name)
    return names


def _behind_the_last_layers(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes whose results reach no layer any more: they bring outputs into shape, and stay in float.

    A detector joins boxes and scores there: in 8 bits they would share one range, and most of its steps would be lost.
    """
    stored, wanted, names = {tensor.name for tensor in graph.initializer}, set[str](), []
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output) or (node.op_type in LAYERS and not stored.isdisjoint(node.input)):
            wanted.update(node.input)
        else:
            names.append(node.name)
    return names


class _Reader:
    """Calibration images one batch at a time, as the quantiser asks for them."""

    def __init__(self, images: Array, port: str, batch: int) -> None:
        whole = len(images) // batch * batch or len(images)
        self._batches = iter([{port: images[i : i + batch]} for i in range(0, whole, batch)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self._batches

    def __next__(self) -> dict[str, Array]:
        return next(self._batches)


class Requantiser:
    """Makes what a quantised network has of weights anew, from other weights, by the rules it was made by.

    Args:
        made: what ``quantise`` gave.
        dense: the float network's initializers, which it was made of.

    Raises:
        TemplateError: a quantised number comes from no such initializer.
    """

    def __init__(self, made: onnx.ModelProto, scheme: str, dense: Mapping[str, Array]) -> None:
        self.numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
        self._reduced = SCHEMES[scheme].bits < 8
        dequantised = {n.output[0]: n for n in made.graph.node if n.op_type == "DequantizeLinear"}
        stored = {out: node for out, node in dequantised.items() if node.input[0] in self.numbers}
        self.weights: dict[str, _Weight] = {}
        self.biases: list[_Bias] = []
        for node in stored.values():
            name = node.input[0].removesuffix(QUANTISED)
            if name not in dense:
                raise TemplateError(f"the quantiser made numbers of {name}, which the network does not have")
            if self.numbers[node.input[0]].dtype != np.int32:
                self.weights[name] = _Weight.of(node, self.numbers, dense[name], self._reduced)
        for node in made.graph.node:
            bias = stored.get(node.input[2]) if len(node.input) > 2 else None
            if bias is None or self.numbers[bias.input[0]].dtype != np.int32:
                continue
            data, weight = dequantised[node.input[0]], dequantised[node.input[1]]
            beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0) if node.op_type == "Gemm" else 1.0
            scale, own = float(self.numbers[data.input[1]]) * beta, self.numbers[weight.input[1]]
            of = weight.input[0].removesuffix(QUANTISED) if node.input[1] in stored else ""
            self.biases.append(_Bias(bias.input[0].removesuffix(QUANTISED), of, scale, own))

    def limits(self, weight: _Weight) -> tuple[int, int, int]:
        """The smallest and largest number that a weight is stored in, and what 0 is stored as where it is symmetric."""
        least, most = _limits(weight.dtype, self._reduced, weight.symmetric)
        return int(least), int(most), round((least + most) / 2)

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The quantised network's initializers.

        Args:
            arrays: the float network's, cut to one plan; every batch norm is in its convolution.
        """
        made = {name: arrays.get(name, number) for name, number in self.numbers.items()}
        scales = {}
        for name, weight in self.weights.items():
            low, high = weight.range_of(arrays[name])
            scales[name] = weight.parameters(low, high, self._reduced)
        for bias in self.biases:
            if bias.weight:
                scale, zero = scales[bias.weight]
                scales[bias.weight] = bias.fitting(scale, arrays[bias.name]), zero
        for name, weight in self.weights.items():
            made |= weight.numbers(name, arrays[name], *scales[name])
        for bias in self.biases:
            made |= bias.numbers(arrays[bias.name], scales[bias.weight][0] if bias.weight else bias.computed)
        return made


@dataclass(frozen=True)
class _Weight:
    """How a float initializer is stored in 8 bits.

    Args:
        axis: of the channels that have a scale each; None = there is one scale.
        symmetric: whether 0 is stored as the middle.
    """

    dtype: np.dtype[Any]
    axis: int | None
    symmetric: bool

    @classmethod
    def of(cls, node: onnx.NodeProto, numbers: Mapping[str, Array], dense: Array, reduced: bool) -> _Weight:
        """Of a DequantizeLinear, the file's initializers, and what they stand for."""
        stored, scale = numbers[node.input[0]], numbers[node.input[1]]
        if scale.ndim == 1:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % max(1, stored.ndim)
            return cls(stored.dtype, axis, True)
        ways = [cls(stored.dtype, None, symmetric) for symmetric in (True, False)]
        scales = [float(way.parameters(*way.range_of(dense), reduced)[0]) for way in ways]
        return min(zip(ways, scales, strict=True), key=lambda pair: abs(pair[1] - float(scale)))[0]

    def range_of(self, array: Array) -> tuple[Array, Array]:
        """Smallest and largest number, 0 among them: of each channel, or of all."""
        others = None if self.axis is None else tuple(d for d in range(array.ndim) if d != self.axis)
        zero = np.float32(0)
        return array.min(axis=others, initial=zero), array.max(axis=others, initial=zero)

    def parameters(self, low: Array, high: Array, reduced: bool) -> tuple[Array, Array]:
        """Scales (float32) and what 0 is stored as; 1 and 0 for a channel of zeros.

        Args:
            reduced: to 7 bits.
        """
        least, most = _limits(self.dtype, reduced, self.symmetric)
        if self.symmetric:
            high = np.maximum(-low, high)
            low = -high
        wide = (high.astype(np.float64) - low.astype(np.float64)) / (most - least)
        dead = wide < np.finfo(np.float32).tiny
        scale = np.where(dead, 1.0, wide)
        middle = np.round((least + most) / 2.0) if self.symmetric else np.round(least - low / scale)
        return scale.astype(np.float32), np.where(dead, 0, middle).astype(self.dtype)

    def numbers(self, name: str, array: Array, scale: Array, zero: Array) -> dict[str, Array]:
        """The initializers that stand for one in float, by name."""
        shape = [1] * array.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        stored = np.divide(array, scale.reshape(shape), dtype=np.float32)
        np.rint(stored, out=stored)
        if zero.any():
            stored += zero.reshape(shape).astype(np.float32)
        if self.dtype.kind == "u" or not self.symmetric:
            limits = np.iinfo(self.dtype)
            np.clip(stored, limits.min, limits.max, out=stored)
        return {f"{name}{QUANTISED}": stored.astype(self.dtype), f"{name}_scale": scale, f"{name}_zero_point": zero}


@dataclass(frozen=True, eq=False)
class _Bias:
    """A bias in 32 bits, which has the product of two scales.

    Args:
        name: of the float initializer.
        weight: that of its layer; empty where the weight is computed (standardised, say).
        scale: of the layer's input.
        computed: the scale of a computed weight.
    """

    name: str
    weight: str
    scale: float
    computed: Array

    def fitting(self, scale: Array, bias: Array) -> Array:
        """The weight's scales, raised where the bias would not fit into 32 bits otherwise (near-dead channels)."""
        largest = np.abs(bias) if scale.ndim else np.abs(bias).max(initial=0.0)
        product = np.float64(self.scale) * scale.astype(np.float64)
        least = ROOM * 2.0 * largest.astype(np.float64) / (2.0**32 - 2)
        ratio = np.where((product < least) & (product > 0), least / np.where(product > 0, product, 1.0), 1.0)
        return np.asarray((scale.astype(np.float64) * ratio).astype(np.float32))

    def numbers(self, bias: Array, scale: Array) -> dict[str, Array]:
        """The initializers that stand for the bias, by name."""
        own = np.asarray(np.float32(self.scale) * scale, dtype=np.float32)
        limits = np.iinfo(np.int32)
        stored = np.clip(np.round(bias.astype(np.float64) / own.astype(np.float64)), limits.min, limits.max)
        name, zero = f"{self.name}{QUANTISED}", np.zeros(own.shape if own.size > 1 else (), np.int32)
        return {name: stored.astype(np.int32), f"{name}_scale": own.reshape(-1), f"{name}_zero_point": zero}


def _limits(dtype: np.dtype[Any], reduced: bool, symmetric: bool) -> tuple[float, float]:
    """Smallest and largest stored number."""
    if dtype.kind == "u":
        return (0.0, 127.0) if reduced else (0.0, 255.0)
    return (-64.0, 64.0) if reduced else (-127.0, 127.0) if symmetric else (-128.0, 127.0)


def _only_input(network: onnx.ModelProto) -> onnx.ValueInfoProto:
    if len(network.graph.input) != 1:
        ports = [port.name for port in network.graph.input]
        raise ExportError(f"int8: networks of one input are calibrated so far; this one has {ports}")
    return network.graph.input[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the quantiser says to the root logger, and without the handler that this would give it."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def others(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root.addHandler(handler)
    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)
        root.removeHandler(handler)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
