"""The dense network quantised once -> the int8 file of any plan in milliseconds.

The clean float template is quantised with ranges of the dense network's activations. A plan's file has the same nodes
and ranges; its weights are cut from the current state, batch norm is folded into them, and they are quantised anew, so
that statistics and fine-tuned weights count. (Cutting 8-bit weights instead would keep the dense network's batch norm.)
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from secateur.export import pieces
from secateur.export.errors import TemplateError
from secateur.export.folding import clean, folded
from secateur.export.onnx_export import write_atomically
from secateur.export.qdq import DEQUANTISED, LAYERS, QUANTISED, RULES, Calibration, Requantiser, quantise
from secateur.export.slicing import (
    OnnxTemplate,
    ScaledConvolution,
    Sliceable,
    State,
    scaled_convolutions,
    with_groups,
    without_initializers,
)
from secateur.pruning.plan import PruningPlan

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Steps:
    """The 8-bit numbers of a tensor: ``round(x / scale) + zero``, within ``least`` and ``most``."""

    scale: float
    zero: int
    least: int
    most: int


@dataclass(frozen=True)
class LayerSteps:
    """How a layer computes in 8 bits.

    Args:
        weight: its name in the state dict.
        input, output: activations; None = the output is not rounded behind this layer. It is behind the batch norm.
        norm: the module of the batch norm that is folded into it; empty = none.
        stored: the weight's; its scales follow from the weights themselves, one for each channel of dimension 0: the
            largest magnitude over half of ``most - least``.
    """

    weight: str
    input: Steps
    output: Steps | None
    norm: str
    stored: Steps


class QuantisedTemplate:
    """The dense network in int8, ready to be cut. Build it with ``QuantisedTemplate.make``.

    Args:
        template: the float network's.
        made: what ``quantise`` made of its clean graph.
        scheme: number types that it was made in.
        file: where it is kept; None = nowhere.

    Raises:
        TemplateError: the quantised file cannot be cut, or its numbers do not follow the rules they are made anew by.
    """

    def __init__(self, template: OnnxTemplate, made: onnx.ModelProto, scheme: str, file: Path | None = None) -> None:
        self.template, self.file = template, file
        graph, full = template.graph, PruningPlan.full(template.graph.groups)
        _, self._folds = clean(template.proto())
        dense = folded(template.arrays(full), self._folds)
        self._again = Requantiser(made, scheme, dense)
        self._check(made, self._again(dense))
        self._tensors = {tensor.name: tensor.SerializeToString() for tensor in made.graph.initializer}
        self._kinds = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
        self._rest, self._nodes = without_initializers(made)
        self._scaled = self._scaled_convolutions(graph, dense)

    @classmethod
    def make(cls, template: OnnxTemplate, calibration: Calibration, folder: Path | None = None) -> Self:
        """Quantise a template, or read what was made of the same network, images and scheme before.

        Args:
            folder: where files are kept, named by what they follow from.

        Raises:
            TemplateError: the quantised file cannot be cut.
            ExportError: the network cannot be quantised at all.
        """
        network, _ = clean(template.proto())
        file = folder and folder / f"template.int8-{key_of(network, calibration)}.onnx"
        if file and file.exists():
            with contextlib.suppress(TemplateError):
                return cls(template, _read(file), calibration.scheme, file)
        made = quantise(network, calibration)
        if file:
            write_atomically(file, made.SerializeToString())
        return cls(template, made, calibration.scheme, file)

    @classmethod
    def load(cls, template: OnnxTemplate, file: Path, scheme: str) -> Self:
        """What another process made of the same template.

        Raises:
            TemplateError: the file is damaged, or of another network.
        """
        return cls(template, _read(file), scheme, file)

    @property
    def layers(self) -> tuple[str, ...]:
        """The weights of quantised layers, in the order of the network."""
        order = {name: i for i, node in enumerate(self._nodes.node) for name in node.input}
        named = [name for name, weight in self._again.weights.items() if weight.axis is not None]
        return tuple(sorted(named, key=lambda name: order.get(name + DEQUANTISED, 0)))

    @cached_property
    def steps(self) -> tuple[LayerSteps, ...]:
        """How layers compute in 8 bits whose weights have a scale for each of their first dimension's channels."""
        _, made = self.dense()
        numbers = self._again.numbers
        rounding = {node.input[0]: node for node in made.graph.node if node.op_type == "QuantizeLinear"}
        source = {node.output[0]: node for node in made.graph.node if node.op_type == "DequantizeLinear"}
        norms = {fold.weight: fold.shift.rpartition(".")[0] for fold in self._folds}

        def of(node: onnx.NodeProto) -> Steps:
            scale, zero = numbers[node.input[1]], numbers[node.input[2]]
            limits = np.iinfo(zero.dtype)
            return Steps(float(scale), int(zero), int(limits.min), int(limits.max))

        found = []
        for node in made.graph.node:
            if len(node.input) < 2 or node.op_type not in LAYERS:
                continue
            name = node.input[1].removesuffix(DEQUANTISED)
            weight, data = self._again.weights.get(name), source.get(node.input[0])
            if weight is None or weight.axis != 0 or data is None or data.op_type != "DequantizeLinear":
                continue
            least, most, zero = self._again.limits(weight)
            after = rounding.get(node.output[0])
            output = None if after is None else of(after)
            found.append(LayerSteps(name, of(data), output, norms.get(name, ""), Steps(0.0, zero, least, most)))
        return tuple(found)

    def dense(self) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """The unpruned network in float, clean, and in int8; their nodes have the same names."""
        whole = self.slice(PruningPlan.full(self.template.graph.groups))
        return clean(self.template.proto())[0], onnx.load_model_from_string(whole)

    def slice(self, plan: PruningPlan, state: State | None = None) -> bytes:
        """The int8 file of a plan.

        Args:
            state: see ``OnnxTemplate.slice``.

        Raises:
            TemplateError: a tensor of ``state`` fits neither the dense nor the pruned model, or is not finite.
        """
        return b"".join(self._pieces(plan, state))

    def write(self, plan: PruningPlan, path: str | Path, state: State | None = None) -> None:
        """``slice`` to a file, which appears whole or not at all.

        Raises:
            TemplateError: as ``slice``.
        """
        write_atomically(Path(path), *self._pieces(plan, state))

    def _pieces(self, plan: PruningPlan, state: State | None) -> pieces.Pieces:
        floats = folded(self.template.arrays(plan, state), self._folds)
        for name in self._again.weights:
            if not np.isfinite(floats[name]).all():
                raise TemplateError(f"{name} has NaN or infinite numbers, which 8 bits cannot hold")
        parts: pieces.Pieces = []
        for name, array in self._again(floats).items():
            if array is self._again.numbers[name]:
                parts += pieces.unchanged(self._tensors[name])
            else:
                parts += pieces.initializer(name, array, self._kinds[name])
        return pieces.model(self._rest, with_groups(self._nodes, self._scaled, floats), parts)

    def _scaled_convolutions(self, graph: Sliceable, dense: Mapping[str, Array]) -> list[ScaledConvolution]:
        """As in a float file, with filters found behind the 8-bit numbers that they are stored in."""
        stored = {f"{name}{QUANTISED}": name for name in graph.scaled_groups}
        shapes = {n: dense[stored.get(n, n)].shape if stored.get(n, n) in dense else () for n in self._again.numbers}
        found = scaled_convolutions(self._nodes, shapes, {*stored, *graph.scaled_groups})
        return [replace(each, weight=stored.get(each.weight, each.weight)) for each in found]

    def _check(self, made: onnx.ModelProto, again: Mapping[str, Array]) -> None:
        """See that the quantiser's numbers are ours, but for scales that were raised for a bias."""
        for tensor in made.graph.initializer:
            theirs, ours = numpy_helper.to_array(tensor), again[tensor.name]
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                raise TemplateError(f"the quantiser stores {tensor.name} in another way than is known")
            if tensor.name.endswith("_scale") and np.any(ours < theirs * (1 - 1e-5)):
                raise TemplateError(f"the quantiser's {tensor.name} follows another rule than is known")


def key_of(network: onnx.ModelProto, calibration: Calibration) -> str:
    """16 hexadecimal digits for what a quantised network follows from, the quantiser's version included."""
    digest = hashlib.sha256(network.SerializeToString(deterministic=True))
    digest.update(np.ascontiguousarray(calibration.images).view(np.uint8).data)
    said = [
        onnxruntime.__version__,
        str(RULES),
        calibration.scheme,
        str(calibration.images.shape),
        *sorted(calibration.floats),
    ]
    digest.update("\n".join(said).encode())
    return digest.hexdigest()[:16]


def _read(file: Path) -> onnx.ModelProto:
    """A template file.

    Raises:
        TemplateError: it is damaged.
    """
    try:
        made = onnx.load(file)
        onnx.checker.check_model(made)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise TemplateError(f"cannot read template {file}: {error}") from error
    return made
