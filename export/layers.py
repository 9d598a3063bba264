"""The layer table of a network, read from its ONNX template: what the latency model needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import onnx
from onnx import shape_inference

from secateur.device_profiles.layers import LayerKind, LayerTable
from secateur.export.slicing import OnnxTemplate, Sliceable
from secateur.pruning.plan import PruningPlan


def layer_table(template: OnnxTemplate) -> LayerTable:
    """Every convolution and every linear layer with weights of its own, in the order of the graph."""
    graph = template.graph
    proto = shape_inference.infer_shapes(onnx.load_from_string(template.slice(PruningPlan.full(graph.groups))))
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    values = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
    origin = {name: (name, False) for name in weights}  # value -> the weight it is, and whether transposed
    rows = []
    for node in proto.graph.node:
        if node.op_type == "Transpose" and len(weights.get(node.input[0], ())) == 2:
            origin[node.output[0]] = node.input[0], True
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.input) > 1 and node.input[1] in origin:
            name, transposed = origin[node.input[1]]
            rows.append(_layer(node, name, weights[name], transposed, shapes))
    names, kinds, taps, pixels, in_pixels, dims = zip(*rows, strict=True) if rows else ((),) * 6
    constant, per_width = _widths(graph, names, dims, weights)
    return LayerTable(
        tuple(names),
        tuple(kinds),
        np.array(taps, dtype=np.int64),
        np.array(pixels, dtype=np.int64),
        np.array(in_pixels, dtype=np.int64),
        tuple(group.name for group in graph.groups),
        constant,
        per_width,
    )


def _layer(
    node: onnx.NodeProto, name: str, weight: tuple[int, ...], transposed: bool, shapes: Mapping[str, list[int]]
) -> tuple[str, LayerKind, int, int, int, tuple[int, int]]:
    """Name, kind, taps, pixels out and in, and which dimensions of the weight are inputs and outputs."""
    x, y = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
    if node.op_type != "Conv":
        transposed ^= any(a.name == "transB" and a.i for a in node.attribute)
        rows = max(1, prod(y[1:-1]))
        return name, "linear", 1, rows, rows, (1, 0) if transposed else (0, 1)
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    taps = prod(weight[2:])
    kind: LayerKind = "depthwise" if groups > 1 and weight[1] == 1 else "pointwise" if taps == 1 else "conv"
    return name, kind, taps, prod(y[2:]), prod(x[2:]), (1, 0)


def _widths(
    graph: Sliceable, names: tuple[str, ...], dims: tuple[tuple[int, int], ...], weights: Mapping[str, tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """``constant`` and ``per_width`` of the table."""
    rows: dict[tuple[str, int], list[tuple[int, int]]] = {}  # several where layers share a weight
    for i, (name, pair) in enumerate(zip(names, dims, strict=True)):
        for c, d in enumerate(pair):
            rows.setdefault((name, d), []).append((i, c))
    per_width = np.zeros((len(names), 2, len(graph.groups)), dtype=np.int64)
    constant = np.array([[weights[n][d] for d in pair] for n, pair in zip(names, dims, strict=True)], dtype=np.int64)
    constant = constant.reshape(len(names), 2)
    for column, group in enumerate(graph.groups):
        for member in group.members:
            for i, c in rows.get((member.tensor, member.dim), ()):
                per_width[i, c, column] += member.index.shape[1]
                constant[i, c] -= member.index.size
    return constant, per_width
