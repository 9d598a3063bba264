"""Which layers lose most in 8 bits: each is quantised alone, and the outputs compared with those of floats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx

from secateur.export.qdq import DEQUANTISED
from secateur.export.quantised import QuantisedTemplate
from secateur.export.verify import open_session, run_session

Array = npt.NDArray[np.float32]


def sensitivity(template: QuantisedTemplate, images: Array) -> dict[str, float]:
    """The error that each layer brings into the unpruned network's outputs when it alone is in 8 bits.

    Args:
        images: shape ``(n, channels, height, width)``; a few tell.

    Returns:
        Layer, by the module's name, in the order of the network -> norm of the difference of the outputs over their
        norm.

    Raises:
        ExportError: ONNX Runtime cannot run such a network.
    """
    network, quantised = template.dense()
    expected = _outputs(network, images)
    scale = max(float(np.linalg.norm(expected)), 1e-12)
    return {
        layer_of(weight): float(np.linalg.norm(_outputs(alone, images) - expected)) / scale
        for weight, alone in _each_alone(network, quantised, template.layers)
    }


def layer_of(weight: str) -> str:
    """The module that a weight of the state dict belongs to; a parameter of another name stands for itself."""
    return weight.removesuffix(".weight")


def _each_alone(
    network: onnx.ModelProto, quantised: onnx.ModelProto, weights: tuple[str, ...]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The float network with one layer in 8 bits, for each of some layers, by its weight."""
    made_by = {out: node for node in quantised.graph.node for out in node.output}
    numbers = {tensor.name: tensor for tensor in quantised.graph.initializer}
    in_8_bits = {name: node for node in quantised.graph.node for name in node.input}
    for weight in weights:
        layer = in_8_bits[weight + DEQUANTISED]
        alone = onnx.ModelProto()
        alone.CopyFrom(network)
        own = next(i for i, node in enumerate(alone.graph.node) if node.name == layer.name)
        around: list[onnx.NodeProto] = []
        for position, name in enumerate(layer.input[:2]):  # a bias in 32 bits loses nothing
            dequantised = made_by.get(name)
            if dequantised is None or dequantised.op_type != "DequantizeLinear":
                continue
            if (source := made_by.get(dequantised.input[0])) is not None:  # an activation, not a weight
                rounded = onnx.NodeProto()
                rounded.CopyFrom(source)
                rounded.input[0] = alone.graph.node[own].input[position]
                around.append(rounded)
            around.append(dequantised)
            alone.graph.node[own].input[position] = name
        known = {tensor.name for tensor in alone.graph.initializer}
        wanted = [name for node in around for name in node.input if name in numbers and name not in known]
        alone.graph.initializer.extend(numbers[name] for name in dict.fromkeys(wanted))
        nodes = list(alone.graph.node)
        nodes[own:own] = around
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del alone.graph.node[:]
        alone.graph.node.extend(kept)
        yield weight, alone


def _outputs(network: onnx.ModelProto, images: Array) -> Array:
    session = open_session(network.SerializeToString())
    name = session.get_inputs()[0].name
    found = [run_session(session, {name: images[i : i + 1]}) for i in range(len(images))]
    return np.concatenate([output.ravel() for outputs in found for output in outputs])
