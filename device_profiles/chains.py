"""The small networks that a probe times: equal layers of one kind, of one width."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from secateur.device_profiles.layers import KINDS, LayerKind

PIXELS = {"conv": 14, "pointwise": 28, "depthwise": 28, "linear": 14}
DEPTH = {"conv": 3, "pointwise": 4, "depthwise": 6, "linear": 4}


INTEGERS = {"U": (TensorProto.UINT8, 128), "S": (TensorProto.INT8, 0)}
"""Letter of a scheme -> its numbers, and what stands for 0."""


def chain(kind: LayerKind, width: int, scheme: str = "") -> onnx.ModelProto:
    """A network of equal layers of one kind, ``width`` channels wide from input to output; random weights.

    Args:
        scheme: number types of activations and weights where it computes in 8 bits, as ``U8S8``; empty = in float.
    """
    rng = np.random.default_rng([width, KINDS.index(kind)])
    pixels, depth = PIXELS[kind], DEPTH[kind]
    shape = [1, pixels * pixels, width] if kind == "linear" else [1, width, pixels, pixels]
    size = {"conv": (width, width, 3, 3), "pointwise": (width, width, 1, 1), "depthwise": (width, 1, 3, 3)}
    weights, nodes = [], []
    for i in range(depth):
        values = rng.standard_normal(size.get(kind, (width, width))).astype(np.float32)
        weights.append(numpy_helper.from_array(values / np.float32(np.sqrt(9 * width)), f"weight{i}"))
        names = [f"x{i}", f"weight{i}"], [f"x{i + 1}"]
        if kind == "linear":
            nodes.append(helper.make_node("MatMul", *names))
        else:
            pads = [0] * 4 if kind == "pointwise" else [1] * 4
            nodes.append(helper.make_node("Conv", *names, pads=pads, group=width if kind == "depthwise" else 1))
    if scheme:
        nodes, weights = _in_integers(nodes, weights, scheme)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{depth}")]
    graph = helper.make_graph(nodes, f"{kind}-{width}", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _in_integers(
    nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], scheme: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The same layers between QuantizeLinear and DequantizeLinear; one scale for all, since only time counts.

    Args:
        scheme: as for ``chain``.
    """
    numbers, made = [numpy_helper.from_array(np.float32(1 / 32), "scale")], []
    for letter, name in ((scheme[0], "zero"), (scheme[2], "weight_zero")):
        kind, zero = INTEGERS[letter]
        numbers.append(numpy_helper.from_array(np.array(zero, helper.tensor_dtype_to_np_dtype(kind)), name))
    kind, zero = INTEGERS[scheme[2]]

    def rounded(value: str) -> str:
        made.append(helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{value}_q"]))
        made.append(helper.make_node("DequantizeLinear", [f"{value}_q", "scale", "zero"], [f"{value}_r"]))
        return f"{value}_r"

    for node, weight in zip(nodes, weights, strict=True):
        values = np.clip(np.rint(numpy_helper.to_array(weight) * 127), -60, 60) + zero
        stored = values.astype(helper.tensor_dtype_to_np_dtype(kind))
        numbers.append(numpy_helper.from_array(stored, f"{weight.name}_q"))
        made.append(
            helper.make_node("DequantizeLinear", [f"{weight.name}_q", "scale", "weight_zero"], [f"{weight.name}_r"])
        )
        node.input[:] = [rounded(node.input[0]), f"{weight.name}_r"]
        made.append(node)
    last = nodes[-1].output[0]
    nodes[-1].output[0] = "last"
    made[-1].output[0] = "last"
    made.append(helper.make_node("Identity", [rounded("last")], [last]))
    return made, numbers
