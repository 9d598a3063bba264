"""One exported template -> the ONNX of any plan in milliseconds.

Exporting costs seconds to tens of seconds, a search needs thousands of files. The dense model is exported once without
optimisation, which keeps the initializers' names equal to the state dict's; a plan then only cuts initializers. What
else knows a width is found once, by carrying shapes through the graph twice, dense and with one channel less per group:
constants of Reshape, Expand and Slice that must follow are rewritten so that they follow any plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from secateur.export import pieces
from secateur.export.artifact import ExportedModel, describe
from secateur.export.errors import ExportError, TemplateError
from secateur.export.onnx_export import Example, export_onnx, export_proto, optimise, write_atomically
from secateur.export.shapes import follow_widths
from secateur.export.verify import TOLERANCE, Parity, verify_parity
from secateur.pruning.plan import ChannelGroup, PruningPlan

Array = npt.NDArray[Any]
State = Mapping[str, "Array | torch.Tensor"]
log = logging.getLogger(__name__)


class Sliceable(Protocol):
    """What slicing needs of a ``secateur.pruning.channels.ChannelGraph``."""

    @property
    def groups(self) -> Sequence[ChannelGroup]: ...

    @property
    def scaled_groups(self) -> Collection[str]:
        """Weights of the convolutions whose ``groups`` shrink with dim 0 of the weight."""
        ...

    def slices(self, plan: PruningPlan) -> Mapping[str, Mapping[int, npt.NDArray[np.int64]]]:
        """Tensor name -> dimension -> kept positions."""
        ...


class OnnxTemplate:
    """The dense model as ONNX, ready to be cut. Build it with ``OnnxTemplate.export``."""

    def __init__(self, proto: onnx.ModelProto, graph: Sliceable) -> None:
        self.graph = graph
        self._arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        probe = PruningPlan.full(graph.groups).replace({g.name: range(max(1, g.size - 1)) for g in graph.groups})
        cuts = graph.slices(probe)
        missing = sorted(cuts.keys() - self._arrays.keys())
        if missing:
            raise TemplateError(f"the exported file has no initializers {missing[:5]}: folded, renamed or unused")
        follow_widths(
            proto,
            dense={name: array.shape for name, array in self._arrays.items()},
            probe={name: _pruned_shape(array, cuts.get(name, {})) for name, array in self._arrays.items()},
        )
        self._tensors = {tensor.name: tensor.SerializeToString() for tensor in proto.graph.initializer}
        self._kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        self._rest, self._nodes = without_initializers(proto)
        shapes = {name: array.shape for name, array in self._arrays.items()}
        self._scaled = scaled_convolutions(self._nodes, shapes, graph.scaled_groups)

    @classmethod
    def export(
        cls, model: torch.nn.Module, example_input: Example, graph: Sliceable, path: str | Path | None = None
    ) -> Self:
        """Export the dense model (and write it to ``path``, if given).

        Raises:
            TemplateError: the exported file cannot be cut; the reason is in the message.
            ExportError: the model cannot be exported at all.
        """
        proto = export_proto(model, example_input, optimize=False)
        state = model.state_dict()
        for tensor in proto.graph.initializer:
            if tensor.name in state and tuple(tensor.dims) != tuple(state[tensor.name].shape):
                raise TemplateError(
                    f"{tensor.name} is stored as {tuple(tensor.dims)}, the model has {tuple(state[tensor.name].shape)}"
                )
        if path is not None:
            write_atomically(Path(path), proto.SerializeToString())
        return cls(proto, graph)

    @classmethod
    def load(cls, path: str | Path, graph: Sliceable) -> Self:
        """Read the template that ``export`` wrote for this graph.

        Raises:
            TemplateError: the file is damaged, or of another network.
        """
        try:
            proto = onnx.load(path)
            onnx.checker.check_model(proto)
        except (OSError, DecodeError, onnx.checker.ValidationError) as error:
            raise TemplateError(f"cannot read template {path}: {error}") from error
        return cls(proto, graph)

    def proto(self) -> onnx.ModelProto:
        """The dense model, whose constants follow widths."""
        return onnx.load_model_from_string(self.slice(PruningPlan.full(self.graph.groups)))

    @cached_property
    def structure(self) -> str:
        """64 hexadecimal digits that name operators and shapes, whatever the weights and whoever exported them."""
        graph = self._nodes
        ports = [[v.name, *(d.dim_value for d in v.type.tensor_type.shape.dim)] for v in (*graph.input, *graph.output)]
        nodes = [
            [n.op_type, *n.input, *n.output, *(a.SerializeToString(deterministic=True).hex() for a in n.attribute)]
            for n in graph.node
        ]
        tensors = [[name, str(array.dtype), *array.shape] for name, array in self._arrays.items()]
        return hashlib.sha256(json.dumps([ports, nodes, tensors]).encode()).hexdigest()

    def slice(self, plan: PruningPlan, state: State | None = None) -> bytes:
        """The ONNX file of a plan.

        Args:
            state: other weights than the template's, each tensor dense or already cut (a pruned, fine-tuned model's
                state dict); tensors it does not name keep the template's values.

        Raises:
            TemplateError: a tensor of ``state`` fits neither the dense nor the pruned model.
        """
        return b"".join(self._pieces(plan, state))

    def write(self, plan: PruningPlan, path: str | Path, state: State | None = None) -> None:
        """``slice`` to a file, which appears whole or not at all.

        Raises:
            TemplateError: a tensor of ``state`` fits neither the dense nor the pruned model.
        """
        write_atomically(Path(path), *self._pieces(plan, state))

    def arrays(self, plan: PruningPlan, state: State | None = None) -> dict[str, Array]:
        """The initializers of a plan, by name; those that are as in the dense network are the template's own.

        Raises:
            TemplateError: a tensor of ``state`` fits neither the dense nor the pruned model.
        """
        cuts, arrays = self.graph.slices(plan), dict(self._arrays)
        for name, dense in self._arrays.items():
            value = None if state is None else state.get(name)
            if value is not None or name in cuts:
                arrays[name] = _cut(name, dense, cuts.get(name, {}), value)
        return arrays

    def _pieces(self, plan: PruningPlan, state: State | None) -> pieces.Pieces:
        arrays, parts = self.arrays(plan, state), []
        for name, array in arrays.items():
            if array is self._arrays[name]:
                parts += pieces.unchanged(self._tensors[name])
            else:
                parts += pieces.initializer(name, array, self._kinds[name])
        return pieces.model(self._rest, with_groups(self._nodes, self._scaled, arrays), parts)

    def check(
        self, plan: PruningPlan, pruned: torch.nn.Module, example_input: Example, tolerance: float = TOLERANCE
    ) -> Parity:
        """Cut to ``plan`` and compare with the torch model that was pruned by it.

        Raises:
            TemplateError: ONNX Runtime refuses the cut file, or its output differs.
        """
        data = self.slice(plan, pruned.state_dict())
        return _compare(data, pruned, example_input, tolerance)


@dataclass(frozen=True)
class ScaledConvolution:
    """A convolution whose number of groups follows its filters.

    Args:
        node: its position among the nodes.
        attribute: that of ``group`` among its attributes.
        weight: the initializer that its filters are of.
        filters, groups: of the dense network.
    """

    node: int
    attribute: int
    weight: str
    filters: int
    groups: int


def scaled_convolutions(
    nodes: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], weights: Collection[str]
) -> list[ScaledConvolution]:
    """The convolutions whose number of groups follows their filters.

    Args:
        shapes: of all initializers, dense.
        weights: initializers that their filters are made of.
    """
    scaled = _made_of(nodes.node, shapes, weights)
    found = []
    for i, node in enumerate(nodes.node):
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in scaled:
            weight = scaled[node.input[1]]
            k = next(k for k, a in enumerate(node.attribute) if a.name == "group")
            found.append(ScaledConvolution(i, k, weight, shapes[weight][0], node.attribute[k].i))
    return found


def with_groups(
    nodes: onnx.GraphProto, scaled: Sequence[ScaledConvolution], arrays: Mapping[str, Array]
) -> onnx.GraphProto:
    """The nodes, or a copy in which depthwise convolutions have as many groups as filters are left.

    Args:
        arrays: the initializers of the plan.

    Raises:
        TemplateError: no whole number of groups has that many filters.
    """
    if not scaled:
        return nodes
    graph = onnx.GraphProto()
    graph.CopyFrom(nodes)
    for each in scaled:
        filters = arrays[each.weight].shape[0]
        groups, rest = divmod(each.groups * filters, each.filters)
        if rest:
            raise TemplateError(f"{each.weight}: {each.groups} convolution groups cannot follow {filters} filters")
        graph.node[each.node].attribute[each.attribute].i = groups
    return graph


def without_initializers(proto: onnx.ModelProto) -> tuple[bytes, onnx.GraphProto]:
    """The serialised model without its graph, and the graph without initializers."""
    nodes, rest = onnx.GraphProto(), onnx.ModelProto()
    nodes.CopyFrom(proto.graph)
    del nodes.initializer[:]
    del nodes.value_info[:]
    rest.CopyFrom(proto)
    rest.ClearField("graph")
    return rest.SerializeToString(), nodes


def candidate_onnx(
    template: OnnxTemplate | None,
    pruned: torch.nn.Module,
    example_input: Example,
    plan: PruningPlan,
    path: str | Path,
    *,
    optimised: bool = False,
    tolerance: float = TOLERANCE,
) -> ExportedModel:
    """The ONNX file of a pruned model: cut from the template and compared with the model, or exported afresh.

    Args:
        template: of the dense model; None = always export.
        pruned: the model that ``plan`` made, with the weights to write.
        optimised: fold constants and fuse, as ``export_onnx`` does, in a file that is cut.
        tolerance: on the relative error; a cut file beyond it is thrown away.

    Raises:
        ExportError: the model cannot be exported either.
    """
    path = Path(path)
    if template is not None:
        try:
            data = template.slice(plan, pruned.state_dict())
            if optimised:
                data = optimise(onnx.load_model_from_string(data)).SerializeToString()
            _compare(data, pruned, example_input, tolerance)
            write_atomically(path, data)
            return describe(path, plan_digest=plan.digest)
        except TemplateError as error:
            log.warning("cannot cut the ONNX template for plan %s, exporting the model: %s", plan.digest, error)
    return export_onnx(pruned, example_input, path, plan_digest=plan.digest)


def _compare(data: bytes, pruned: torch.nn.Module, example_input: Example, tolerance: float) -> Parity:
    try:
        parity = verify_parity(data, pruned, [example_input], tolerance)
    except ExportError as error:
        raise TemplateError(str(error)) from error
    if not parity.ok:
        raise TemplateError(f"the cut file computes something else than the pruned model: {parity.reason}")
    return parity


def _made_of(nodes: Iterable[onnx.NodeProto], initializers: Iterable[str], weights: Collection[str]) -> dict[str, str]:
    """Values made of initializers alone (standardised weights, say) -> the one of ``weights`` they are made of."""
    origin = {name: name if name in weights else "" for name in initializers}
    for node in nodes:
        inputs = [name for name in node.input if name]
        if all(name in origin for name in inputs):
            origin.update(dict.fromkeys(node.output, next((origin[name] for name in inputs if origin[name]), "")))
    return {name: weight for name, weight in origin.items() if weight}


def _cut(
    name: str, dense: Array, cuts: Mapping[int, npt.NDArray[np.int64]], value: Array | torch.Tensor | None = None
) -> Array:
    """``value`` (default: ``dense``) without the removed positions."""
    if value is None:
        array = dense
    elif isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy().astype(dense.dtype, copy=False)
    else:
        array = np.asarray(value, dtype=dense.dtype)
    pruned = _pruned_shape(dense, cuts)
    if array.shape == pruned:
        return array
    if array.shape != dense.shape:
        raise TemplateError(f"{name} has shape {array.shape}; neither the dense {dense.shape} nor the pruned {pruned}")
    for dim, kept in sorted(cuts.items(), key=lambda cut: len(cut[1]) / dense.shape[cut[0]]):
        array = array.take(kept, axis=dim)
    return array


def _pruned_shape(dense: Array, cuts: Mapping[int, npt.NDArray[np.int64]]) -> tuple[int, ...]:
    return tuple(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(dense.shape))
