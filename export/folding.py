"""A graph that a quantiser understands: constants as initializers, batch norm in the weights before it, names kept.

The quantiser removes an activation only where its bounds are initializers, and joins a convolution with what follows it
only where no batch norm stands between them. Which weights a batch norm went into is written down, so that it can be
folded again with other weights, whatever plan they were cut to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Fold:
    """A batch norm (its initializers' names) and the convolution that it follows.

    Args:
        weight: of the convolution, filters in its first dimension.
        own_bias: of the convolution; empty where it has none.
        bias: of the convolution with the batch norm in it.
    """

    weight: str
    own_bias: str
    scale: str
    shift: str
    mean: str
    variance: str
    epsilon: float

    @property
    def bias(self) -> str:
        return self.own_bias or self.shift

    def apply(self, arrays: MutableMapping[str, Array]) -> None:
        """Put the batch norm into the convolution's weight and bias; its own arrays go.

        Args:
            arrays: by the initializers' names, cut to one plan.
        """
        scale, shift, mean, variance = (
            arrays.pop(name).astype(np.float64) for name in (self.scale, self.shift, self.mean, self.variance)
        )
        factor = scale / np.sqrt(variance + self.epsilon)
        weight = arrays[self.weight]
        own = arrays[self.own_bias].astype(np.float64) if self.own_bias else 0.0
        arrays[self.bias] = (shift + (own - mean) * factor).astype(np.float32)
        arrays[self.weight] = weight * factor.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))


def clean(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[Fold, ...]]:
    """A copy of a model that computes the same, and which batch norms went into which weights.

    A batch norm stays where something else reads its convolution, or where one of its arrays, or of the convolution's,
    has two readers.
    """
    cleaned = onnx.ModelProto()
    cleaned.CopyFrom(model)
    graph = cleaned.graph
    _constants_to_initializers(graph)
    folds = _fold(graph)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for fold in folds:
        fold.apply(arrays)
    read = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read)
    del graph.value_info[:]
    for node in graph.node:
        node.name = node.output[0]
    return cleaned, tuple(folds)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name != "sparse_value":
            value = helper.get_attribute_value(node.attribute[0])
            if not isinstance(value, onnx.TensorProto):
                kind = np.float32 if "float" in node.attribute[0].name else np.int64
                value = numpy_helper.from_array(np.array(value, dtype=kind))
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(kept)


def _fold(graph: onnx.GraphProto) -> list[Fold]:
    """Take the batch norms that can be folded out of the graph's nodes; its initializers stay as they are."""
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(port.name for port in graph.output)
    weights = {tensor.name for tensor in graph.initializer}
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    folds, gone = [], set()
    for i, node in enumerate(graph.node):
        convolution = convolutions.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if convolution is None or readers[node.input[0]] != 1:
            continue
        arrays = [*convolution.input[1:], *node.input[1:]]
        if not all(name in weights and readers[name] == 1 for name in arrays) or len(node.output) != 1:
            continue
        own = convolution.input[2] if len(convolution.input) > 2 else ""
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale, shift, mean, variance = node.input[1:]
        fold = Fold(convolution.input[1], own, scale, shift, mean, variance, epsilon)
        convolution.input[:] = [convolution.input[0], fold.weight, fold.bias]
        convolution.output[0] = node.output[0]
        folds.append(fold)
        gone.add(i)
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for i, n in enumerate(graph.node) if i not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    return folds


def folded(arrays: Mapping[str, Array], folds: tuple[Fold, ...]) -> dict[str, Array]:
    """Initializers, by name, with every batch norm in the convolution before it."""
    made = dict(arrays)
    for fold in folds:
        fold.apply(made)
    return made
