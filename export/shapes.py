"""Constants of an ONNX graph that know a width: find them, and make them follow any width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from secateur.export.artifact import opset_of
from secateur.export.errors import TemplateError

Shape = tuple[int, ...]
Array = npt.NDArray[Any]
END = int(np.iinfo(np.int64).max)
NOT_EVALUATED = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
NOT_EVALUATED |= {"If", "Loop", "Scan", "SequenceMap"}
BROADCASTS = {"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"}
MOST_VALUES = 4096  # numbers that a value may have to be followed: shapes, scales, ranges, positions of channels


def follow_widths(proto: onnx.ModelProto, dense: Mapping[str, Shape], probe: Mapping[str, Shape]) -> None:
    """Rewrite constant shape operands so that the graph holds for any width of its initializers.

    The graph is walked once with both sets of shapes; a dimension that differs is a width.

    Args:
        proto: changed in place.
        dense: shape per initializer.
        probe: the same with one channel less per group.

    Raises:
        TemplateError: an operand knows a width in a way that is not understood.
    """
    _simplify(proto.graph)
    _sequences_to_split(proto.graph)
    a, b = _Side.of(proto, dense), _Side.of(proto, probe)
    a.grouped.update(node.input[0] for node in proto.graph.node if node.op_type == "InstanceNormalization")
    partners = _partners(proto.graph)
    static: set[str] = set()  # values made of constants only: the ones that cannot follow by themselves
    nodes: list[onnx.NodeProto] = []
    for node in list(proto.graph.node):
        a.infer(node)
        new: list[onnx.NodeProto] = []
        if len(node.input) > 1 and static.issuperset(filter(None, node.input[1:])):
            new = _expand_like(node, partners.get(node.output[0], []), a, b) or _rewrite(node, a, b)
        nodes += [*new, node]
        for each in [*new, node]:
            b.infer(each)
        if not b.consistent and a.consistent:
            raise TemplateError(f"the shapes of {node.op_type} {node.output[0]} do not follow the widths")
        if node.op_type != "Shape" and all(name in static for name in node.input if name):
            static.update(node.output)
    for port in proto.graph.output:
        if a.shape(port.name) != b.shape(port.name):
            raise TemplateError(f"output {port.name} changes its shape with the widths")
    del proto.graph.node[:]
    proto.graph.node.extend(_alive(nodes, {port.name for port in proto.graph.output}))


@dataclass
class _Side:
    """Types and small values of one walk.

    Args:
        grouped: values normalised per index of dimension 1, which holds groups of channels, or channels.
    """

    opset: int
    types: dict[str, TypeProto]
    values: dict[str, Array] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)
    consistent: bool = True

    @classmethod
    def of(cls, proto: onnx.ModelProto, initializers: Mapping[str, Shape]) -> _Side:
        types = {port.name: port.type for port in proto.graph.input}
        for tensor in proto.graph.initializer:
            types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, initializers[tensor.name])
        return cls(opset_of(proto), types)

    def infer(self, node: onnx.NodeProto) -> None:
        """Add the node's outputs, as far as they can be known."""
        self._evaluate(node)
        inputs = [name for name in node.input if name]
        if node.domain not in ("", "ai.onnx") or not all(name in self.types for name in inputs):
            return
        data = {name: numpy_helper.from_array(self.values[name]) for name in inputs if name in self.values}
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        known = {name: self.types[name] for name in inputs}
        try:
            outputs = onnx.shape_inference.infer_node_outputs(
                schema, node, known, data, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10
            )
        except onnx.shape_inference.InferenceError:
            self.consistent = False
            return
        self.consistent = True
        self.types.update(outputs)

    def shape(self, name: str) -> Shape | None:
        """None where it is not fully known."""
        kind = self.types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        dims = kind.tensor_type.shape.dim
        return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None

    def _evaluate(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Shape":
            shape = self.shape(node.input[0])
            if shape is not None:
                start, end = _attribute(node, "start", 0), _attribute(node, "end", len(shape))
                self.values[node.output[0]] = np.array(shape[start:end], dtype=np.int64)
        elif node.op_type == "Constant":
            self._keep(node, [_constant_of(node)])
        elif node.op_type not in NOT_EVALUATED and all(name in self.values for name in node.input if name):
            feed = {name: self.values[name] for name in node.input if name}
            try:
                results = ReferenceEvaluator(_with_opset(node, self.opset)).run(None, feed)
            except Exception:  # noqa: BLE001 - it raises whatever NumPy does; an unknown value is not followed
                return
            self._keep(node, results)

    def _keep(self, node: onnx.NodeProto, results: Sequence[Any]) -> None:
        for name, result in zip(node.output, results, strict=True):
            if (
                isinstance(result, (np.ndarray, np.generic))
                and result.dtype.kind in "ibf"
                and result.size <= MOST_VALUES
            ):
                self.values[name] = np.asarray(result)


def _rewrite(node: onnx.NodeProto, a: _Side, b: _Side) -> list[onnx.NodeProto]:
    """Make a node with constant operands follow its first input; returns the new nodes it needs in front of it."""
    s, s2 = a.shape(node.input[0]), b.shape(node.input[0])
    operands = [a.values.get(name) for name in node.input[1:] if name]
    if s is None or s2 is None or s == s2 or any(value is None for value in operands) or node.op_type not in REWRITES:
        return []
    return REWRITES[node.op_type](node, a, s, s2)


def _reshape(node: onnx.NodeProto, a: _Side, s: Shape, s2: Shape) -> list[onnx.NodeProto]:
    t = a.shape(node.output[0])
    if t is None:
        return []
    _drop(node, "allowzero")
    groups = (1,) if node.output[0] in a.grouped else ()
    target = _reshape_target(s, s2, t, node.output[0], groups)
    if target.count(-1) < 2:
        return [_constant(node, 1, target)]
    source = {
        j: [i for i in left if s[i] != s2[i]] for left, right in _segments(s, t) for j in right if target[j] == -1
    }
    if any(len(dims) > 1 for dims in source.values()):
        raise TemplateError(f"{node.output[0]}: several dimensions of the reshape {s} -> {t} depend on widths")
    sizes = np.array([t[j] if j in source else d for j, d in enumerate(target)])
    return _proportional(node, [1], [sizes], [source[j][0] if j in source else None for j in range(len(t))], s, s2)


def _expand(node: onnx.NodeProto, a: _Side, s: Shape, s2: Shape) -> list[onnx.NodeProto]:
    target = [int(d) for d in a.values[node.input[1]]]
    offset = len(target) - len(s)
    follow = [1 if i >= offset and d == s[i - offset] else d for i, d in enumerate(target)]
    return [_constant(node, 1, follow)]


def _expand_like(node: onnx.NodeProto, partners: Sequence[str], a: _Side, b: _Side) -> list[onnx.NodeProto]:
    """An Expand along a width, in front of arithmetic with a tensor of that shape (``expand_as``): follow the tensor.

    Args:
        partners: the other operands of that arithmetic.
    """
    if node.op_type != "Expand":
        return []
    s, t = a.shape(node.input[0]), a.shape(node.output[0])
    for partner in partners:
        narrow = b.shape(partner)
        if s is None or t is None or narrow is None or partner == node.output[0] or a.shape(partner) != t:
            continue
        given = (1,) * (len(t) - len(s)) + s
        if any(i != k != j for i, j, k in zip(given, narrow, t, strict=True)):
            node.input[1] = f"{node.output[0]}_follow"
            return [helper.make_node("Shape", [partner], [node.input[1]])]
    return []


def _partners(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Values that arithmetic reads together with each output of an Expand."""
    partners: dict[str, list[str]] = {node.output[0]: [] for node in graph.node if node.op_type == "Expand"}
    for node in graph.node:
        for name in node.input if node.op_type in BROADCASTS else ():
            if name in partners:
                partners[name] += [other for other in node.input if other != name]
    return partners


def _gather(node: onnx.NodeProto, a: _Side, s: Shape, s2: Shape) -> list[onnx.NodeProto]:
    """Taking everything in order is a reshape (how exporters spell ``as_strided``); else no width may be indexed."""
    axis = _attribute(node, "axis", 0) % len(s)
    if s[axis] == s2[axis]:
        return []
    indices = a.values[node.input[1]]
    if len(s) > 1 or not np.array_equal(indices.ravel(), np.arange(s[0])):
        raise TemplateError(f"{node.output[0]}: picks fixed positions of a pruned dimension")
    node.CopyFrom(helper.make_node("Reshape", node.input, node.output))
    return [_constant(node, 1, _reshape_target(s, s2, indices.shape, node.output[0]))]


def _resize(node: onnx.NodeProto, a: _Side, s: Shape, s2: Shape) -> list[onnx.NodeProto]:
    if len(node.input) < 4 or not node.input[3] or any(attribute.name == "axes" for attribute in node.attribute):
        return []
    axes = [i if s[i] != s2[i] else None for i in range(len(s))]
    return _proportional(node, [3], [a.values[node.input[3]]], axes, s, s2)


def _instance_norm(node: onnx.NodeProto, a: _Side, s: Shape, s2: Shape) -> list[onnx.NodeProto]:
    """A scale and a bias that are one number each (those of a group norm, which scales later) get the new length."""
    scale, bias = (a.values[name] for name in node.input[1:3])
    if s[1] == s2[1] or np.ptp(scale) or np.ptp(bias):
        return []
    name = f"{node.output[0]}_follow"
    new = [helper.make_node("Shape", [node.input[0]], [f"{name}_groups"], start=1, end=2)]
    for k, value in ((1, scale), (2, bias)):
        one = helper.make_node("Constant", [], [f"{name}_{k}_value"], value=numpy_helper.from_array(value[:1]))
        new += [one, helper.make_node("Expand", [f"{name}_{k}_value", f"{name}_groups"], [f"{name}_{k}"])]
        node.input[k] = f"{name}_{k}"
    return new


def _split(node: onnx.NodeProto, a: _Side, s: Shape, s2: Shape) -> list[onnx.NodeProto]:
    axis = _attribute(node, "axis", 0) % len(s)
    sizes = a.values[node.input[1]] if len(node.input) > 1 else np.array([])
    if s[axis] == s2[axis] or not sizes.size:
        return []
    return _proportional(node, [1], [sizes], [axis] * len(sizes), s, s2)


def _reshape_target(s: Shape, s2: Shape, t: Shape, name: str, groups: Sequence[int] = ()) -> list[int]:
    """Target that follows: dense input ``s`` -> ``t``; with the narrower input ``s2`` only widths of ``t`` shrink.

    Args:
        groups: dimensions of ``t`` that hold a number of groups where they are no dimension of ``s`` unchanged.

    Returns:
        per dimension its size, 0 = copied from the input, -1 = to be inferred (there may be several).
    """
    target = list(t)
    for left, right in _segments(s, t):
        if all(s[i] == s2[i] for i in left):
            continue
        total = prod(s2[i] for i in left)
        fits = [j for j in right if total % (prod(t[k] for k in right if k != j)) == 0]
        fits = [j for j in fits if t[j] > 1 and (j not in groups or right == [j])]
        if not fits:
            raise TemplateError(f"{name}: no single dimension of the reshape {s} -> {t} follows {s2}")
        j = min(fits, key=lambda k: (t[k], -k))  # the probe removes single channels or heads: the least that can go
        target[j] = 0 if left == right == [j] else -1
    return target


def _segments(s: Shape, t: Shape) -> list[tuple[list[int], list[int]]]:
    """Dimensions of ``s`` and of ``t`` in the smallest runs of equal product."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(s) and j < len(t):
        left, right = [i], [j]
        while (p := prod(s[k] for k in left)) != (q := prod(t[k] for k in right)):
            if p < q:
                left.append(left[-1] + 1)
            else:
                right.append(right[-1] + 1)
        runs.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    if runs:  # trailing ones
        runs[-1][0].extend(range(i, len(s)))
        runs[-1][1].extend(range(j, len(t)))
    return runs


def _slice(node: onnx.NodeProto, a: _Side, s: Shape, s2: Shape) -> list[onnx.NodeProto]:
    """A slice along a width takes all of it, or a part that grows and shrinks with it (one of equal chunks)."""
    starts, ends = a.values[node.input[1]], a.values[node.input[2]]
    axes = a.values[node.input[3]] if len(node.input) > 3 else np.arange(len(starts))
    steps = a.values[node.input[4]] if len(node.input) > 4 else np.ones(len(starts), dtype=np.int64)
    axes = axes % len(s)
    pruned = np.array([s[axis] != s2[axis] for axis in axes])
    if not pruned.any():
        return []
    lengths = np.array([s[axis] for axis in axes])
    first = np.where(starts < 0, np.maximum(starts + lengths, 0), np.minimum(starts, lengths))
    last = np.where(ends < 0, np.maximum(ends + lengths, 0), np.minimum(ends, lengths))
    whole = (steps > 0) & (first == 0) & (last == lengths)
    if np.all(whole | ~pruned):
        return [_constant(node, 2, np.where(pruned, END, ends).tolist())]
    if np.any(steps[pruned] != 1) or np.any(steps <= 0):
        raise TemplateError(f"{node.output[0]}: takes fixed positions of a pruned dimension")
    return _proportional(node, [1, 2], [first, last], axes.tolist(), s, s2)


def _proportional(
    node: onnx.NodeProto, operands: list[int], values: list[Array], axes: Sequence[int | None], s: Shape, s2: Shape
) -> list[onnx.NodeProto]:
    """Let positions along dimensions of the first input keep their share: position x new length // dense length.

    Args:
        operands: which inputs of the node hold positions.
        values: of each of these, shape ``(positions,)``.
        axes: shape ``(positions,)``; the dimension that a position is along, None = it stays.
    """
    places = [0 if axis is None else axis + 1 for axis in axes]  # in the shape with a 1 in front
    dense, narrow = np.array([1, *s])[places], np.array([1, *s2])[places]
    if any(np.any(value * narrow % dense) for value in values):
        raise TemplateError(f"{node.output[0]}: takes fixed positions of a pruned dimension")
    name = f"{node.output[0]}_follow"
    new = [helper.make_node("Shape", [node.input[0]], [f"{name}_shape"])]
    new += [_named(f"{name}_one", [1]), _named(f"{name}_places", places), _named(f"{name}_dense", dense.tolist())]
    new += [helper.make_node("Concat", [f"{name}_one", f"{name}_shape"], [f"{name}_all"], axis=0)]
    new += [helper.make_node("Gather", [f"{name}_all", f"{name}_places"], [f"{name}_lengths"], axis=0)]
    for k, value in zip(operands, values, strict=True):
        new += [
            _named(f"{name}_{k}_value", value.tolist()),
            helper.make_node("Mul", [f"{name}_{k}_value", f"{name}_lengths"], [f"{name}_{k}_product"]),
            helper.make_node("Div", [f"{name}_{k}_product", f"{name}_dense"], [f"{name}_{k}"]),
        ]
        node.input[k] = f"{name}_{k}"
    return new


REWRITES: dict[str, Callable[[onnx.NodeProto, _Side, Shape, Shape], list[onnx.NodeProto]]] = {
    "Expand": _expand,
    "Gather": _gather,
    "InstanceNormalization": _instance_norm,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
}


def _simplify(graph: onnx.GraphProto) -> None:
    """Undo the unoptimised export's spellings that keep ONNX Runtime from fusing, so that a cut file runs as fast as
    an optimised export: casts of constants (in front of Clip) and convolution biases made of zeros."""
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info]}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    values = {node.output[0]: _constant_of(node) for node in graph.node if node.op_type == "Constant"}
    zeros: set[str] = set()
    for node in graph.node:
        if node.op_type == "CastLike" and node.input[0] in values and kinds.get(node.input[1]):
            value = values[node.input[0]].astype(helper.tensor_dtype_to_np_dtype(kinds[node.input[1]]))
            values[node.output[0]] = value
            tensor = numpy_helper.from_array(value)
            node.CopyFrom(helper.make_node("Constant", [], node.output, value=tensor))
        elif node.op_type == "Expand" and node.input[0] in values and not values[node.input[0]].any():
            zeros.add(node.output[0])
        elif node.op_type == "Conv" and len(node.input) == 3 and node.input[2] in zeros:
            del node.input[2]


def _sequences_to_split(graph: onnx.GraphProto) -> None:
    """SplitToSequence into equal parts, picked by constant SequenceAt -> Split, which follows any width."""
    values = {node.output[0]: _constant_of(node) for node in graph.node if node.op_type == "Constant"}
    producer = {output: node for node in graph.node for output in node.output}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.value_info]}
    renamed: dict[str, str] = {}
    for node in graph.node:
        picks = [user for user in graph.node if user.op_type == "SequenceAt" and user.input[0] in node.output]
        if node.op_type != "SplitToSequence" or not all(pick.input[1] in values for pick in picks):
            continue
        length = shapes.get(node.input[0], {_attribute(node, "axis", 0): 0})[_attribute(node, "axis", 0)]
        sizes = _static_list(node.input[1], producer, values)
        if not length or not sizes or len(set(sizes)) > 1 or length % sizes[0]:
            continue
        outputs = [f"{node.output[0]}_{i}" for i in range(length // sizes[0])]
        renamed.update({pick.output[0]: outputs[int(values[pick.input[1]].item())] for pick in picks})
        axis = _attribute(node, "axis", 0)
        node.CopyFrom(helper.make_node("Split", node.input[:1], outputs, axis=axis, num_outputs=len(outputs)))
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = renamed.get(name, name)
    for node in [node for node in graph.node if node.op_type == "SequenceAt" and node.output[0] in renamed]:
        graph.node.remove(node)


def _static_list(name: str, producer: Mapping[str, onnx.NodeProto], values: Mapping[str, Array]) -> list[int]:
    """Integers given as one constant, or as a concatenation of constants; empty if they are neither."""
    if name in values:
        return [int(v) for v in np.ravel(values[name])]
    node = producer.get(name)
    if node is None or node.op_type != "Concat" or not all(part in values for part in node.input):
        return []
    return [int(v) for part in node.input for v in np.ravel(values[part])]


def _constant_of(node: onnx.NodeProto) -> Array:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return np.asarray(numpy_helper.to_array(value))
    return np.array(
        value, dtype=np.float32 if "float" in attribute.name else np.int64 if "int" in attribute.name else None
    )


def _with_opset(node: onnx.NodeProto, opset: int) -> onnx.ModelProto:
    """A model of one node."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.input if name]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output]
    graph = helper.make_graph([node], "node", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _constant(node: onnx.NodeProto, operand: int, values: list[int]) -> onnx.NodeProto:
    """A new constant, made operand number ``operand`` of the node."""
    node.input[operand] = f"{node.output[0]}_follow"
    return _named(node.input[operand], values)


def _named(name: str, values: list[int]) -> onnx.NodeProto:
    """A constant of 64-bit integers."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, dtype=np.int64)))


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _drop(node: onnx.NodeProto, name: str) -> None:
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)


def _alive(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the wanted values depend on, in order."""
    alive: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            alive.append(node)
            wanted = wanted | set(node.input)
    return alive[::-1]
