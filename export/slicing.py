"""One exported template -> the ONNX of any plan in milliseconds.

Exporting costs seconds to tens of seconds, a search needs thousands of files. The dense model is exported once without
optimisation, which keeps the initializers' names equal to the state dict's; a plan then only cuts initializers. What
else knows a width is found once, by carrying shapes through the graph twice, dense and with one channel less per group:
constants of Reshape, Expand and Slice that must follow are rewritten so that they follow any plan.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from secateur.export.artifact import ExportedModel, describe
from secateur.export.errors import ExportError, TemplateError
from secateur.export.onnx_export import Example, export_onnx, export_proto, optimise, write_atomically
from secateur.export.shapes import follow_widths
from secateur.export.verify import Parity, verify_parity
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
        self._nodes = onnx.GraphProto()
        self._nodes.CopyFrom(proto.graph)
        del self._nodes.initializer[:]
        del self._nodes.value_info[:]
        rest = onnx.ModelProto()
        rest.CopyFrom(proto)
        rest.ClearField("graph")
        self._rest: bytes = rest.SerializeToString()
        scaled = _made_of(self._nodes.node, self._arrays, graph.scaled_groups)
        self._scaled = [
            (i, scaled[node.input[1]], next(k for k, a in enumerate(node.attribute) if a.name == "group"))
            for i, node in enumerate(self._nodes.node)
            if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in scaled
        ]

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

    def _pieces(self, plan: PruningPlan, state: State | None) -> list[bytes | memoryview]:
        cuts = self.graph.slices(plan)
        widths: dict[str, int] = {}
        parts: list[bytes | memoryview] = []
        for name, dense in self._arrays.items():
            value = None if state is None else state.get(name)
            if value is None and name not in cuts:
                parts += _field(_GRAPH_INITIALIZER, [self._tensors[name]])
            else:
                array = _cut(name, dense, cuts.get(name, {}), value)
                widths[name] = array.shape[0] if array.ndim else 0
                parts += _field(_GRAPH_INITIALIZER, _tensor(name, array, self._kinds[name]))
        nodes = self._with_groups(widths) if self._scaled else self._nodes
        return [self._rest, *_field(_MODEL_GRAPH, [nodes.SerializeToString(), *parts])]

    def _with_groups(self, widths: Mapping[str, int]) -> onnx.GraphProto:
        """A copy of the nodes in which depthwise convolutions have as many groups as filters are left.

        Args:
            widths: filters left per weight; those it does not name keep theirs.
        """
        graph = onnx.GraphProto()
        graph.CopyFrom(self._nodes)
        for i, weight, k in self._scaled:
            attribute = graph.node[i].attribute[k]
            dense = self._arrays[weight].shape[0]
            groups, rest = divmod(attribute.i * widths.get(weight, dense), dense)
            if rest:
                raise TemplateError(
                    f"{weight}: {attribute.i} convolution groups cannot follow {widths[weight]} filters"
                )
            attribute.i = groups
        return graph

    def check(
        self, plan: PruningPlan, pruned: torch.nn.Module, example_input: Example, tolerance: float = 1e-5
    ) -> Parity:
        """Cut to ``plan`` and compare with the torch model that was pruned by it.

        Raises:
            TemplateError: ONNX Runtime refuses the cut file, or its output differs.
        """
        data = self.slice(plan, pruned.state_dict())
        return _compare(data, pruned, example_input, tolerance)


def candidate_onnx(
    template: OnnxTemplate | None,
    pruned: torch.nn.Module,
    example_input: Example,
    plan: PruningPlan,
    path: str | Path,
    *,
    optimised: bool = False,
    tolerance: float = 1e-5,
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


_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5  # field numbers in onnx.proto, fixed for ever by protobuf's rules
_TENSOR_RAW_DATA = 9


def _field(number: int, payload: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """A length-delimited field of a protobuf message, in pieces, so that no weight is copied before it is written."""
    return [_varint(number << 3 | 2) + _varint(sum(len(part) for part in payload)), *payload]


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


def _tensor(name: str, array: Array, kind: int) -> list[bytes | memoryview]:
    """A serialised ``TensorProto`` in pieces.

    Args:
        kind: its ``data_type``.
    """
    head = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
    if array.dtype.kind not in "biuf" and array.dtype.itemsize == 1:  # several numbers in one byte, some of them
        raise TemplateError(f"{name}: initializers of type {onnx.TensorProto.DataType.Name(kind)} cannot be cut")
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return [head.SerializeToString(), *_field(_TENSOR_RAW_DATA, [little.reshape(-1).view(np.uint8).data])]


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
