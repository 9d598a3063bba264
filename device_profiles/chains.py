"""The small networks that a probe times: equal layers of one kind, of one width."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from secateur.device_profiles.layers import KINDS, LayerKind

PIXELS = {"conv": 14, "pointwise": 28, "depthwise": 28, "linear": 14}
DEPTH = {"conv": 3, "pointwise": 4, "depthwise": 6, "linear": 4}


def chain(kind: LayerKind, width: int) -> onnx.ModelProto:
    """A network of equal layers of one kind, ``width`` channels wide from input to output; random weights."""
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
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{depth}")]
    graph = helper.make_graph(nodes, f"{kind}-{width}", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
