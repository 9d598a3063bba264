"""How labels travel through ATen operators: one table of small functions.

Every index along a prunable dimension carries an integer label. A rule reads the labels of an operator's inputs,
ties the labels that must be kept or removed together, and labels the outputs. To teach the tracer an operator, add
its name to ``RULES`` (and to ``MACS`` if it multiplies and accumulates); an operator without a rule freezes every
label it touches, unless torch marks it as elementwise. Where the code states a size (``view``, ``split``, a slice) a
rule goes on as if the size followed the width and says so (``Propagation.state``); ``pruning.trial`` then finds out
whether it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from pruning.plan import IntArray

Dim = IntArray | None
"""Labels along one dimension, shape ``(length,)``; None = a dimension of fixed length (batch, space, constants)."""

Labels = tuple[Dim, ...]
Edge = tuple[IntArray, IntArray]
"""Labels that are tied pair by pair, each of shape ``(pairs,)``."""

Arguments = Mapping[str, Any]
"""Arguments of an ATen call by the names in its schema, defaults filled in."""


T = TypeVar("T")


class TensorMap(Generic[T]):
    """Values of live tensors, by identity; those of dead ones are dropped soon, because they may hold tensors."""

    SLACK = 64
    """Entries that may be added before dead ones are looked for."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Any, T]] = {}
        self._limit = self.SLACK

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        reference = torch._C._WeakTensorRef(tensor)  # type: ignore[attr-defined]
        self._entries[id(tensor)] = (reference, value)
        if len(self._entries) >= self._limit:
            self._entries = {key: entry for key, entry in self._entries.items() if not entry[0].expired()}
            self._limit = len(self._entries) + self.SLACK

    def get(self, tensor: Tensor) -> T | None:
        """The value, or None."""
        entry = self._entries.get(id(tensor))
        return None if entry is None or entry[0].expired() else entry[1]


class Propagation:
    """Labels of the live tensors, and what the operators seen so far say about them.

    Args:
        rules: further rules by operator name, or others than those of ``RULES``.
    """

    def __init__(self, rules: Mapping[str, Rule] | None = None) -> None:
        self.where = ""
        """Path of the module that is running."""
        self.operator = ""
        self.function = ""
        """Name of the torch function that runs this operator (``chunk`` and ``split`` both run ``split``)."""
        self.inferred: int | None = None
        """Position of the -1 in the sizes given to a view."""
        self.num_labels = 0
        self.edges: list[Edge] = []
        self.grouped: list[Grouped] = []
        self.frozen: list[tuple[IntArray, str]] = []
        self.stated: list[tuple[IntArray, str]] = []
        self.reads: list[IntArray] = []
        self.normalising: list[tuple[IntArray, str]] = []
        self.mixed: list[IntArray] = []
        """Labels over which an operator without weights sums, normalises or picks."""
        self.unknown: dict[str, list[str]] = {}
        self.scaled_groups: dict[str, None] = {}
        self.used: dict[str, None] = {}
        self.unread: list[Unread] = []
        """Empty tensors that no operator has read: what would follow did not run on the example."""
        self.relabelled: list[Tensor] = []
        """Tensors that got labels after they were made, by the running operator."""
        self.rules: Mapping[str, Rule] = RULES if rules is None else {**RULES, **rules}
        self._notes: TensorMap[_Note] = TensorMap()

    def fresh(self, size: int) -> IntArray:
        """New labels, shape ``(size,)``."""
        start = self.num_labels
        self.num_labels += size
        return np.arange(start, self.num_labels, dtype=np.int64)

    def register(self, name: str, tensor: Tensor) -> Labels:
        """Label every dimension of a parameter or buffer that has more than one entry."""
        labels = tuple(self.fresh(n) if n > 1 else None for n in tensor.shape)
        self.set(tensor, labels)
        self._note(tensor).source = name
        return labels

    def _note(self, tensor: Tensor) -> _Note:
        """What is known about a tensor, to be added to."""
        note = self._notes.get(tensor)
        if note is None:
            self._notes[tensor] = note = _Note((None,) * tensor.ndim)
        return note

    def source(self, tensor: Tensor) -> str | None:
        """Name of the parameter a tensor is computed from, if it is computed from parameters only."""
        note = self._notes.get(tensor)
        return None if note is None else note.source

    def of(self, tensor: Tensor) -> Labels:
        note = self._notes.get(tensor)
        return (None,) * tensor.ndim if note is None else note.labels

    def is_labelled(self, tensor: Tensor) -> bool:
        note = self._notes.get(tensor)
        return note is not None and note.is_labelled

    def set(self, tensor: Tensor, labels: Iterable[Dim]) -> None:
        labels, shape = tuple(labels), tensor.shape
        assert len(labels) == len(shape), (self.operator, shape)
        for dim, n in zip(labels, shape, strict=True):
            assert dim is None or len(dim) == n, self.operator
        note = self._note(tensor)
        note.labels = labels
        note.is_labelled = any(dim is not None for dim in labels)

    def tie(self, *dims: Dim) -> Dim:
        """Dimensions that face each other index by index. One of fixed length among them freezes the others."""
        labelled = [dim for dim in dims if dim is not None]
        if not labelled:
            return None
        if len(labelled) < len(dims):
            for dim in labelled:
                self.freeze(dim, f"{self.here} joins it with a dimension of fixed size (an input or a constant)")
            return None
        self.edges += [(labelled[0], dim) for dim in labelled[1:] if dim is not labelled[0]]
        return labelled[0]

    def tie_rows(self, dim: Dim, rows: int) -> None:
        """Tie the indices that have the same place in each of ``rows`` equal parts of a dimension."""
        if dim is not None and rows > 1:
            parts = dim.reshape(rows, -1)
            self.edges.append((np.tile(parts[0], rows - 1), parts[1:].ravel()))

    def freeze(self, dim: Dim, reason: str) -> None:
        """Keep these labels whatever the plan; with an empty reason the report does not mention them."""
        if dim is not None:
            self.frozen.append((dim, reason))

    def state(self, dim: Dim) -> None:
        """The code gives the length of this dimension (or a part of it) as a number that may not follow the width."""
        if dim is not None:
            self.stated.append((dim, f"{self.here} gets a size from the code"))

    def depend(self, tensor: Tensor, dim: Dim) -> None:
        """The tensor holds positions along ``dim``: whoever reads it freezes the labels."""
        if dim is not None:
            self._note(tensor).positions = dim

    def part(self, tensor: Tensor, whole: Tensor, dims: Sequence[int], where: int, positions: slice | int) -> None:
        """The tensor is a view of ``whole``; its dimension i is ``dims[i]``, cut at ``positions`` of ``where``."""
        self._note(tensor).part = (whole, tuple(dims), where, positions)

    def written(self, tensor: Tensor) -> None:
        """Labels written into a tensor; those written into a view reach the tensor it is a view of."""
        for dim in self.of(tensor):
            self.state(dim)
        if (part := self._note(tensor).part) is None:
            return
        whole, dims, where, positions = part
        labels, new = list(self.of(whole)), self.of(tensor)
        if len(dims) != tensor.ndim:
            for dim in new:
                self.freeze(dim, f"{self.here} writes it into a view")
            return
        for d, dim in zip(dims, new, strict=True):
            if dim is None:
                continue
            if d == where:
                before = labels[d]
                full = _fixed(self, whole.shape[d], "") if before is None else before.copy()
                full[positions] = dim
                labels[d] = full
            else:
                labels[d] = dim if labels[d] is None else self.tie(labels[d], dim)
        self.set(whole, labels)
        self.relabelled.append(whole)
        self.written(whole)

    def read(self, tensor: Tensor, d: int) -> None:
        """Mark a dimension as summed over, if the tensor is a weight."""
        if (dim := self.of(tensor)[d]) is not None and self.source(tensor) is not None:
            self.reads.append(dim)

    def normalise(self, dim: Dim) -> None:
        """Mark labels whose removal changes the values of the channels that stay (a mean over channels ...)."""
        if dim is not None:
            self.normalising.append((dim, self.here))
            self.mixed.append(dim)

    def contract(self, a: Tensor, a_dim: int, b: Tensor, b_dim: int) -> None:
        """A dimension of ``a`` multiplied with one of ``b`` and summed over."""
        dim = self.tie(self.of(a)[a_dim], self.of(b)[b_dim])
        if dim is not None and self.source(a) is None and self.source(b) is None:
            self.mixed.append(dim)
        if self.source(b) is None:
            self.read(a, a_dim)
        if self.source(a) is None:
            self.read(b, b_dim)

    @property
    def here(self) -> str:
        return f"{self.operator} in {self.where or 'the model itself'}"

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Arguments:
        """Carry labels through one ATen call; returns its arguments by name."""
        operator = operator_of(func)
        self.operator = operator.name
        arguments = operator.bind(args, kwargs)
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(kwargs.values())
        labelled, source, made_of_parameters = False, None, bool(inputs)
        for tensor in inputs:
            if (note := self._notes.get(tensor)) is None:
                made_of_parameters = False
                continue
            labelled = labelled or note.is_labelled
            if note.source is None:
                made_of_parameters = False
            else:
                self.used.setdefault(note.source)
                source = source or note.source
            if note.positions is not None:
                self.freeze(note.positions, f"{self.here} reads positions of channels")
        if labelled or self.operator in ALWAYS:
            before = self.of(inputs[0])
            rule = self.rules.get(self.operator)
            if rule is not None:
                rule(self, arguments, out)
            elif operator.is_pointwise:
                elementwise(self, arguments, out)
            else:
                self.unknown.setdefault(self.operator, []).append(self.where)
                for dim in (dim for tensor in inputs for dim in self.of(tensor)):
                    self.freeze(dim, f"operator {self.here} has no rule")
            if out is inputs[0] and any(a is not b for a, b in zip(before, self.of(out), strict=True)):
                self.written(out)
        elif operator.is_view and isinstance(out, Tensor):
            self._note(out).part = (inputs[0], (), -1, -1)
        if self.unread:
            for tensor in inputs:
                if (note := self._notes.get(tensor)) is not None and note.unread is not None:
                    self.unread.remove(note.unread)
                    note.unread = None
        for tensor in tensors_in((out,)):
            if tensor.numel() == 0 and self.is_labelled(tensor):
                unread = self._note(tensor).unread = Unread(self.of(tensor), self.here)
                self.unread.append(unread)
            if made_of_parameters and self.source(tensor) is None:
                self._note(tensor).source = source
        return arguments


Rule = Callable[[Propagation, Arguments, Any], None]


@dataclass(eq=False, slots=True)
class _Note:
    """What is known about a tensor.

    Args:
        labels: per dimension.
        is_labelled: whether some dimension has labels.
        source: name of the parameter it is computed from, if it is computed from parameters only.
        positions: labels of the dimension along which its values are positions.
        part: what it is a view of (``Propagation.part``).
        unread: set while it is empty and nothing has read it.
    """

    labels: Labels
    is_labelled: bool = False
    source: str | None = None
    positions: Dim = None
    part: tuple[Tensor, tuple[int, ...], int, slice | int] | None = None
    unread: Unread | None = None


@dataclass(frozen=True, eq=False)
class Unread:
    """Labels of an empty tensor, and the operator that made it."""

    labels: Labels
    here: str


@dataclass(frozen=True, eq=False)
class Grouped:
    """A grouped convolution may lose whole groups, or the same places in every group.

    Args:
        weight: name of its weight, if it is a parameter or computed from one.
        groups: how many.
        inputs, outputs: labels of the channels, shape ``(in,)`` and ``(out,)``.
        per_group: labels of the weight's dimension of input channels per group.
    """

    weight: str | None
    groups: int
    inputs: Dim
    outputs: IntArray
    per_group: Dim

    @property
    def num_per_group(self) -> int:
        return 0 if self.inputs is None else len(self.inputs) // self.groups

    def tie_groups(self) -> list[Edge]:
        """Edges under which whole groups go."""
        edges, firsts = [], []
        for dim in (self.inputs, self.outputs):
            assert dim is not None
            parts = dim.reshape(self.groups, -1)
            firsts.append(parts[:, 0])
            edges.append((np.repeat(parts[:, 0], parts.shape[1] - 1), parts[:, 1:].ravel()))
        return [*edges, (firsts[0], firsts[1])]

    def tie_places(self) -> list[Edge]:
        """Edges under which the same places go in every group."""
        edges = []
        for dim in (self.inputs, self.outputs):
            if dim is not None:
                parts = dim.reshape(self.groups, -1)
                edges.append((np.tile(parts[0], self.groups - 1), parts[1:].ravel()))
        if self.inputs is not None and self.per_group is not None:
            edges.append((self.inputs, np.tile(self.per_group, self.groups)))
        return edges


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among values and in their lists and tuples, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


@dataclass(frozen=True, eq=False, slots=True)
class Operator:
    """What the schema of an ATen operator says.

    Args:
        name: ``relu`` for ``aten::relu_``; operators of other libraries keep their prefix (``torchvision::nms``).
        arguments: names of its arguments.
        defaults: the same names, with their default values or None.
        is_pointwise: whether PyTorch tags it as elementwise.
        is_view: whether its output shares memory with its input and is not written by it.
        allocates: whether its outputs are new memory, neither views nor in-place results.
    """

    name: str
    arguments: tuple[str, ...]
    defaults: Arguments
    is_pointwise: bool
    is_view: bool
    allocates: bool

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments of a call by name, defaults filled in."""
        return {**self.defaults, **dict(zip(self.arguments, args, strict=False)), **kwargs}


@cache
def operator_of(func: Any) -> Operator:
    schema = func._schema
    name = str(schema.name).removeprefix("aten::")
    name = name if name.endswith("__") else name.removesuffix("_")
    defaults = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    alias = schema.returns[0].alias_info if schema.returns else None
    return Operator(
        name,
        tuple(defaults),
        defaults,
        is_pointwise=torch.Tag.pointwise in func.tags,
        is_view=alias is not None and not alias.is_write,
        allocates=bool(schema.returns) and alias is None and name != "_unsafe_view",
    )


# --- operators that keep the shape -------------------------------------------------------------------------------


def elementwise(p: Propagation, a: Arguments, out: Any) -> None:
    """Broadcast: dimensions that face each other are tied."""
    inputs = [(tuple(x.shape), p.of(x)) for x in tensors_in(a.values())]
    for result in tensors_in((out,)):
        dims = []
        for d, n in zip(range(-result.ndim, 0), result.shape, strict=True):
            facing = [x[d] for shape, x in inputs if n != 1 and len(shape) >= -d and shape[d] == n]
            dims.append(p.tie(*facing))
        p.set(result, dims)


def along(p: Propagation, a: Arguments, out: Any, *, normalises: bool = False) -> None:
    """Work along one or more dimensions (``dim`` / ``dims``) of ``self``; the result has the same shape or a part."""
    dims = list(p.of(a["self"]))
    chosen = a["dims"] if "dims" in a else a.get("dim")
    for d in range(len(dims)) if chosen is None else as_list(chosen):
        if normalises:
            p.normalise(dims[d])
        else:
            p.freeze(dims[d], f"{p.here} works along it")
    for result in tensors_in((out,)):
        p.set(result, [x if n == m else None for x, n, m in zip(dims, a["self"].shape, result.shape, strict=True)])


def flip(p: Propagation, a: Arguments, out: Any) -> None:
    dims = list(p.of(a["self"]))
    for d in a["dims"]:
        dims[d] = None if (x := dims[d]) is None else x[::-1].copy()
    p.set(out, dims)


def batch_norm(p: Propagation, a: Arguments, out: Any) -> None:
    """Per-channel affine map: input channels, weight, bias and running statistics face each other."""
    x = list(p.of(a["input"]))
    per_channel = [a.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    x[1] = p.tie(x[1], *(p.of(t)[0] for t in per_channel if t is not None))
    if a.get("training") or a.get("running_mean") is None:
        for dim in (x[0], *x[2:]):
            p.normalise(dim)
    result, *statistics = tensors_in((out,))
    p.set(result, x)
    for tensor in statistics:
        if tensor.shape == (result.shape[1],):
            p.set(tensor, (x[1],))


def layer_norm(p: Propagation, a: Arguments, out: Any) -> None:
    x = list(p.of(a["input"]))
    for d in range(-len(a["normalized_shape"]), 0):
        affine = [t for t in (a["weight"], a.get("bias")) if t is not None]
        if not affine:
            p.state(x[d])
        p.normalise(x[d])
        x[d] = p.tie(x[d], *(p.of(t)[d] for t in affine))
    p.set(tensors_in((out,))[0], x)


def group_norm(p: Propagation, a: Arguments, out: Any) -> None:
    """Each of the ``group`` parts loses the same places; one channel per part is a per-channel map."""
    x, groups = list(p.of(a["input"])), a["group"]
    affine = [t for t in (a["weight"], a["bias"]) if t is not None]
    if groups < a["C"]:
        p.tie_rows(x[1], groups)
        p.normalise(x[1])
    elif not affine:
        p.state(x[1])
    x[1] = p.tie(x[1], *(p.of(t)[0] for t in affine))
    result, *statistics = tensors_in((out,))
    p.set(result, x)
    for tensor in statistics:
        if groups == a["C"] and tensor.ndim == 2:
            p.set(tensor, (None, x[1]))


# --- operators that move dimensions ------------------------------------------------------------------------------


def permute(p: Propagation, a: Arguments, out: Any) -> None:
    x = p.of(a["self"])
    p.set(out, [x[d] for d in a["dims"]])


def transpose(p: Propagation, a: Arguments, out: Any) -> None:
    x = list(p.of(a["self"]))
    if len(x) > 1:
        i, j = a.get("dim0", 0), a.get("dim1", 1)
        x[i], x[j] = x[j], x[i]
    p.set(out, x)


STATING = {"view", "reshape", "unflatten", "expand", "repeat", "multi_head_attention_forward"}
"""Torch functions that are told sizes."""


def view(p: Propagation, a: Arguments, out: Any) -> None:
    """Merging repeats labels; splitting ties what must stay rectangular; anything else freezes."""
    x, before, after = p.of(a["self"]), a["self"].shape, out.shape
    result: list[Dim] = [None] * out.ndim
    if out.numel() == 0:
        for dim in x:
            p.freeze(dim, f"{p.here} gets an empty tensor")
        return
    is_weight = p.source(a["self"]) is not None
    for ins, outs in _segments(before, after):
        labelled = [i for i in ins if x[i] is not None]
        if len(labelled) > 1 and is_weight:  # kernels are flattened with the channels they belong to
            for i in (i for i in labelled if i > 1):
                p.freeze(x[i], "")
            labelled = [i for i in labelled if i <= 1] or labelled
        if len(labelled) > 1:
            for i in labelled:
                p.freeze(x[i], f"{p.here} mixes it with other dimensions")
        if len(labelled) != 1:
            continue
        dim, place = x[labelled[0]], ins.index(labelled[0])
        assert dim is not None
        if len(ins) == len(outs) == 1:
            o = outs[0]
            result[o] = dim
        else:
            shape = [-1 if k == place else 1 for k in range(len(ins))]
            full = np.broadcast_to(dim.reshape(shape), [before[i] for i in ins]).reshape([after[o] for o in outs])
            k, result_dim = _carrier(p, full, outs.index(p.inferred) if p.inferred in outs else None)
            o = outs[k]
            result[o] = result_dim
        if p.function in STATING and p.inferred != o:
            p.state(result[o])
    p.set(out, result)


def _carrier(p: Propagation, full: IntArray, inferred: int | None) -> tuple[int, IntArray]:
    """The axis of a labelled block that carries the labels, tied along all others.

    The only axis they vary along; else the one whose size the code leaves open; else the longest (ties: the last).
    """
    lines = [np.moveaxis(full, k, 0).reshape(full.shape[k], -1) for k in range(full.ndim)]
    for k, line in enumerate(lines):
        if (line == line[:, :1]).all():
            return k, line[:, 0].copy()
    axis = max(range(full.ndim), key=lambda k: (full.shape[k], k)) if inferred is None else inferred
    rows = np.moveaxis(full, axis, -1).reshape(-1, full.shape[axis])
    p.tie_rows(rows.ravel(), len(rows))
    return axis, rows[0].copy()


def _segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of equal product in two shapes; dimensions of length 1 belong to none."""
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (m := prod(before[i] for i in ins)) != (n := prod(after[o] for o in outs)):
            if m < n:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        yield ins, outs


def expand(p: Propagation, a: Arguments, out: Any) -> None:
    x = p.of(a["self"])
    for dim, n in zip(reversed(x), reversed(a["size"]), strict=False):
        if n != -1:
            p.state(dim)
    dims = [*(None,) * (out.ndim - len(x)), *x]
    if p.function in ("expand_as", "normalize"):
        for d in range(-len(x), 0):
            if a["self"].shape[d] == 1 < out.shape[d]:
                dims[d] = p.fresh(out.shape[d])
    p.set(out, dims)


def repeat(p: Propagation, a: Arguments, out: Any) -> None:
    x = (None,) * (out.ndim - a["self"].ndim) + p.of(a["self"])
    p.set(out, [None if dim is None else np.tile(dim, n) for dim, n in zip(x, a["repeats"], strict=True)])


def as_strided(p: Propagation, a: Arguments, out: Any) -> None:
    """Only a dense tensor of the same shape (``adaptive_avg_pool2d`` restores channels-last so) is followed."""
    dense = [torch.empty_like(out, device="meta", memory_format=torch.contiguous_format).stride()]
    if out.ndim == 4:
        dense.append(torch.empty_like(out, device="meta", memory_format=torch.channels_last).stride())
    wide = [d for d, n in enumerate(out.shape) if n > 1]
    if out.shape == a["self"].shape and any(all(out.stride(d) == strides[d] for d in wide) for strides in dense):
        p.set(out, p.of(a["self"]))
    else:
        for dim in p.of(a["self"]):
            p.freeze(dim, f"{p.here} reads memory at positions written in the code")


def rot90(p: Propagation, a: Arguments, out: Any) -> None:
    x = list(p.of(a["self"]))
    for d in a["dims"]:
        p.freeze(x[d], f"{p.here} works along it")
        x[d] = None
    p.set(out, x)


def view_as_real(p: Propagation, a: Arguments, out: Any) -> None:
    p.set(out, (*p.of(a["self"]), None))


def view_as_complex(p: Propagation, a: Arguments, out: Any) -> None:
    *dims, parts = p.of(a["self"])
    p.freeze(parts, f"{p.here} works along it")
    p.set(out, dims)


def pixel_shuffle(p: Propagation, a: Arguments, out: Any) -> None:
    """``(..., C r^2, H, W) -> (..., C, r H, r W)``: r^2 neighbours become one channel."""
    x = list(p.of(a["self"]))
    x[-3] = _blocks(p, x[-3], out.shape[-3])
    p.set(out, x)


def _blocks(p: Propagation, dim: Dim, number: int) -> Dim:
    """Runs of neighbours become one index each; their labels are tied."""
    if dim is None:
        return None
    blocks = dim.reshape(number, -1)
    p.tie_rows(blocks.T.ravel(), blocks.shape[1])
    return blocks[:, 0].copy()


# --- operators that join and cut ---------------------------------------------------------------------------------


def constant(p: Propagation, a: Arguments, out: Any) -> None:
    """``new_zeros`` and the like: sizes come from the code, nothing of the input."""


def cat(p: Propagation, a: Arguments, out: Any) -> None:
    parts = [t for t in a["tensors"] if t.ndim == out.ndim]
    where = a["dim"] % out.ndim
    dims = [p.tie(*(p.of(t)[d] for t in parts)) if d != where else None for d in range(out.ndim)]
    pieces = [p.of(t)[where] for t in parts]
    if any(piece is not None for piece in pieces):
        reason = f"{p.here} appends channels of fixed number"
        dims[where] = np.concatenate(
            [
                piece if piece is not None else _fixed(p, t.shape[where], reason)
                for piece, t in zip(pieces, parts, strict=True)
            ]
        )
    p.set(out, dims)


def stack(p: Propagation, a: Arguments, out: Any) -> None:
    parts, where = a["tensors"], a["dim"] % out.ndim
    dims = [p.tie(*facing) for facing in zip(*(p.of(t) for t in parts), strict=True)]
    p.set(out, [*dims[:where], None, *dims[where:]])


def _fixed(p: Propagation, size: int, reason: str) -> IntArray:
    labels = p.fresh(size)
    p.freeze(labels, reason)
    return labels


def pad(p: Propagation, a: Arguments, out: Any) -> None:
    """Padding of a labelled dimension has an amount written in the code: its positions are frozen."""
    dims = list(p.of(a["self"]))
    for k in range(len(a["pad"]) // 2):
        before, after = a["pad"][2 * k : 2 * k + 2]
        d = len(dims) - 1 - k
        if (dim := dims[d]) is None or (before, after) == (0, 0):
            continue
        reason = f"{p.here} pads the channels by a number written in the code"
        if before < 0 or after < 0:
            p.freeze(dim, reason)
        dim = dim[max(0, -before) : len(dim) + min(0, after)]
        dims[d] = np.concatenate([_fixed(p, max(0, before), reason), dim, _fixed(p, max(0, after), reason)])
    p.set(out, dims)


def cut(p: Propagation, a: Arguments, out: Any) -> None:
    """``slice``, ``select``, ``split`` and ``unbind`` along one dimension; equal parts of a split are tied."""
    whole = a["self"]
    x, where = list(p.of(whole)), a["dim"] % whole.ndim
    dim, pieces = x[where], tensors_in((out,))
    if pieces[0].ndim < len(x):
        p.freeze(dim, f"{p.here} picks channels by position")
        parts: list[Dim] = [None] * len(pieces)
        places: list[slice | int] = [a["index"]] if "index" in a else list(range(len(pieces)))
    elif "step" in a:
        places = [slice(a["start"], a["end"], a["step"])]
        parts = [None if dim is None else dim[places[0]]]
        if dim is not None and len(pieces) and pieces[0].shape[where] < len(dim):
            p.state(dim)
    else:
        sizes = [piece.shape[where] for piece in pieces]
        ends = np.cumsum(sizes).tolist()
        places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        parts = [None if dim is None else dim[place] for place in places]
        if dim is not None and len(pieces) > 1:
            if len(set(sizes)) == 1 and (p.function == "chunk" or "split_size" in a):
                p.tie_rows(dim, len(sizes))
            if p.function != "chunk" or len(set(sizes)) > 1:
                p.state(dim)
    for piece, part, place in zip(pieces, parts, places, strict=True):
        kept = [d for d in range(len(x)) if d != where or piece.ndim == len(x)]
        p.set(piece, [part if d == where else x[d] for d in kept])
        p.part(piece, whole, kept, where, place)


def copy_into(p: Propagation, a: Arguments, out: Any) -> None:
    """``self`` takes the labels of what is copied into it."""
    old, new, source = p.of(out), [], a["src"]
    for d in range(-out.ndim, 0):
        faces = source.ndim >= -d and source.shape[d] == out.shape[d] != 1
        new.append(p.of(source)[d] if faces and p.of(source)[d] is not None else old[d])
        if faces and p.of(source)[d] is None:
            p.freeze(old[d], f"{p.here} overwrites it with a tensor of fixed size")
    p.set(out, new)


def index_put(p: Propagation, a: Arguments, out: Any) -> None:
    """Rows written by an index: the other dimensions face each other."""
    x, values = list(p.of(a["self"])), a["values"]
    used = _indexed(a["indices"])
    whole = [d for d in range(len(x)) if d not in used]
    simple = used == list(range(len(used)))
    for d in used if simple else range(len(x)):
        p.freeze(x[d], f"{p.here} picks channels by position")
    for d in range(values.ndim):
        faces = len(x) - values.ndim + d
        if not simple or faces not in whole:
            p.freeze(p.of(values)[d], f"{p.here} picks channels by position")
        elif (dim := p.of(values)[d]) is not None:
            p.state(dim)
            x[faces] = dim if x[faces] is None else p.tie(x[faces], dim)
            p.relabelled.append(out)
        elif values.shape[d] == out.shape[faces] != 1:
            p.freeze(x[faces], f"{p.here} overwrites it with a tensor of fixed size")
    p.set(out, x)


def glu(p: Propagation, a: Arguments, out: Any) -> None:
    """The first half of a dimension gated by the second: halves are tied."""
    dims = list(p.of(a["self"]))
    if (dim := dims[a["dim"]]) is not None:
        p.tie_rows(dim, 2)
        dims[a["dim"]] = dim[: len(dim) // 2]
    p.set(out, dims)


def index(p: Propagation, a: Arguments, out: Any) -> None:
    """Advanced indexing of unlabelled dimensions; labels among the indexed ones are frozen."""
    x, indices = list(p.of(a["self"])), a["indices"]
    used = _indexed(indices)
    touched = [x[i] for i in used] + [dim for idx in indices if idx is not None for dim in p.of(idx)]
    for dim in touched:
        p.freeze(dim, f"{p.here} picks channels by position")
    if used == list(range(used[0], used[-1] + 1)):
        new: list[Dim] = [None] * (out.ndim - len(x) + len(used))
        p.set(out, x[: used[0]] + new + x[used[-1] + 1 :])
    else:
        for dim in x:
            p.freeze(dim, f"{p.here} moves dimensions")


def _indexed(indices: Sequence[Tensor | None]) -> list[int]:
    """Dimensions that indices pick from; a mask picks from as many as it has itself."""
    used: list[int] = []
    d = 0
    for idx in indices:
        width = idx.ndim if idx is not None and idx.dtype in (torch.bool, torch.uint8) else 1
        used += range(d, d + width) if idx is not None else ()
        d += width
    return used


def embedding(p: Propagation, a: Arguments, out: Any) -> None:
    rows, features = p.of(a["weight"])
    p.freeze(rows, "")
    p.set(out, (None,) * (out.ndim - 1) + (features,))


# --- operators that reduce ---------------------------------------------------------------------------------------


def as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def reduce(p: Propagation, a: Arguments, out: Any, *, order: bool = False) -> None:
    """Reductions over ``dim``; over labels they normalise channels, and a result that is an index freezes when read."""
    x = list(p.of(a["self"]))
    over = {d % len(x) for d in as_list(a.get("dim"))} if a.get("dim") not in (None, []) else set(range(len(x)))
    for result in tensors_in((out,)):
        kept = [None if d in over else dim for d, dim in enumerate(x) if result.ndim == len(x) or d not in over]
        p.set(result, kept)
        for d in over if order and not result.is_floating_point() else ():
            p.depend(result, x[d])
    for d in over:
        p.normalise(x[d])


def spatial(p: Propagation, a: Arguments, out: Any, *, num_dims: int) -> None:
    """Pooling, resizing and padding over the last ``num_dims`` dimensions."""
    x = p.of(a["self"] if "self" in a else a["input"])
    for dim in x[-num_dims:]:
        p.freeze(dim, f"{p.here} works along it")
    for result in tensors_in((out,)):
        p.set(result, x[:-num_dims] + (None,) * num_dims)


def unfold_windows(p: Propagation, a: Arguments, out: Any) -> None:
    """``Tensor.unfold``: windows of one dimension become a last dimension."""
    x = list(p.of(a["self"]))
    p.freeze(x[a["dimension"]], f"{p.here} works along it")
    x[a["dimension"]] = None
    p.set(out, [*x, None])


def im2col(p: Propagation, a: Arguments, out: Any) -> None:
    """``(N, C, H, W) -> (N, C k, L)``: each channel becomes k neighbours."""
    x = p.of(a["self"])
    channels = x[-3]
    k = out.shape[-2] // a["self"].shape[-3]
    p.set(out, (*x[:-3], None if channels is None else np.repeat(channels, k), None))


def col2im(p: Propagation, a: Arguments, out: Any) -> None:
    """``(N, C k, L) -> (N, C, H, W)``: k neighbours become one channel."""
    x = p.of(a["self"])
    p.set(out, (*x[:-2], _blocks(p, x[-2], out.shape[-3]), None, None))


def pixel_unshuffle(p: Propagation, a: Arguments, out: Any) -> None:
    """``(..., C, r H, r W) -> (..., C r^2, H, W)``: each channel becomes r^2 neighbours."""
    x = list(p.of(a["self"]))
    x[-3] = None if (dim := x[-3]) is None else np.repeat(dim, a["downscale_factor"] ** 2)
    p.set(out, x)


def channel_shuffle(p: Propagation, a: Arguments, out: Any) -> None:
    """Channel (g, c) moves to (c, g); each of the groups loses the same places."""
    x = list(p.of(a["self"]))
    if (dim := x[1]) is not None:
        p.tie_rows(dim, a["groups"])
        x[1] = dim.reshape(a["groups"], -1).T.ravel().copy()
    p.set(out, x)


def grid_sampler(p: Propagation, a: Arguments, out: Any) -> None:
    x = p.of(a["input"])
    for dim in (*x[2:], *p.of(a["grid"])):
        p.freeze(dim, f"{p.here} works along it")
    p.set(out, (x[0], x[1]) + (None,) * (out.ndim - 2))


def weight_norm(p: Propagation, a: Arguments, out: Any) -> None:
    """``g v / |v|``, the norm over all dimensions but ``dim``; zeros add nothing to it."""
    v, g = p.of(a["v"]), p.of(a["g"])
    dims = [dim if g_dim is None else p.tie(dim, g_dim) for dim, g_dim in zip(v, g, strict=True)]
    p.mixed += [dim for dim in dims if dim is not None]
    weight, norms = tensors_in((out,))
    p.set(weight, dims)
    p.set(norms, g)


def roi_align(p: Propagation, a: Arguments, out: Any) -> None:
    for result in tensors_in((out,)):
        p.set(result, (None, p.of(a["input"])[1], None, None))


# --- operators that contract -------------------------------------------------------------------------------------


def convolution(p: Propagation, a: Arguments, out: Any) -> None:
    """Weight ``(out, in / groups, ...)``, transposed ``(in, out / groups, ...)``."""
    x, weight, groups = p.of(a["input"]), a["weight"], a["groups"]
    w = p.of(weight)
    for dim in w[2:]:
        p.freeze(dim, "")
    if any(dim is not None for dim in x[2:]):
        for dim in x[2:]:
            p.freeze(dim, f"{p.here} slides along it")
    channels = (_transposed if a["transposed"] else _direct)(p, x[1], weight, groups, a["input"].shape[1])
    if a["bias"] is not None:
        p.tie(channels, p.of(a["bias"])[0])
    p.set(out, (x[0], channels) + (None,) * (out.ndim - 2))


def _direct(p: Propagation, x: Dim, weight: Tensor, groups: int, num_inputs: int) -> Dim:
    w = p.of(weight)
    if groups > 1 and groups == num_inputs:
        _scale_groups(p, weight)
        p.tie(_repeated(x, weight.shape[0] // groups), w[0])
        return w[0]
    if groups > 1 and w[0] is not None:
        p.grouped.append(Grouped(p.source(weight), groups, x, w[0], w[1]))
    else:
        p.tie(x, w[1] if w[1] is None or groups == 1 else np.tile(w[1], groups))
        p.tie_rows(x, groups)
    p.read(weight, 1)
    return w[0]


def _repeated(dim: Dim, times: int) -> Dim:
    """Each label several times in a row."""
    return dim if dim is None or times == 1 else np.repeat(dim, times)


def _transposed(p: Propagation, x: Dim, weight: Tensor, groups: int, num_inputs: int) -> Dim:
    w = p.of(weight)
    p.tie(x, w[0])
    if groups > 1 and groups == num_inputs:
        _scale_groups(p, weight)
        p.freeze(w[1], "")
        return None if w[0] is None else np.repeat(w[0], weight.shape[1])
    p.tie_rows(w[0], groups)
    p.read(weight, 0)
    if w[1] is None and groups > 1:
        return _fixed(p, groups, f"{p.here} has one output per group")
    return None if w[1] is None else np.tile(w[1], groups)


def _scale_groups(p: Propagation, weight: Tensor) -> None:
    source = p.source(weight)
    if source is not None:
        p.scaled_groups.setdefault(weight_name(source))


def weight_name(parameter: str) -> str:
    """Name of the weight a parameter makes: ``a.parametrizations.weight.original1``, ``a.weight_v`` -> ``a.weight``."""
    layer, found, rest = parameter.partition(".parametrizations.")
    if found:
        return f"{layer}.{rest.partition('.')[0]}"
    for ending in ("_v", "_g", "_orig"):
        if parameter.endswith(f"weight{ending}"):
            return parameter.removesuffix(ending)
    return parameter


def matmul(p: Propagation, a: Arguments, out: Any, *, left: str, right: str, bias: str | None = None) -> None:
    """``(..., m, k) @ (..., k, n)``, both of the same rank (or a vector on the right), plus a broadcast bias."""
    x, y = a[left], a[right]
    p.contract(x, -1, y, -2 if y.ndim > 1 else 0)
    batch = [p.tie(*facing) for facing in zip(p.of(x)[:-2], p.of(y)[:-2], strict=False)]
    dims = [*batch, p.of(x)[-2]] + ([p.of(y)[-1]] if y.ndim > 1 else [])
    if bias is not None:
        add = p.of(a[bias])
        for d in range(-a[bias].ndim, 0):
            if a[bias].shape[d] == out.shape[d] != 1:
                dims[d] = p.tie(dims[d], add[d])
    p.set(out, dims)


def index_add(p: Propagation, a: Arguments, out: Any) -> None:
    """Rows added at places; the other dimensions face each other."""
    dims = list(p.of(a["self"]))
    for d, dim in enumerate(p.of(a["source"])):
        if d == a["dim"] % out.ndim:
            p.freeze(dims[d], f"{p.here} picks channels by position")
            p.freeze(dim, f"{p.here} picks channels by position")
        else:
            dims[d] = p.tie(dims[d], dim)
    p.set(out, dims)


def dot(p: Propagation, a: Arguments, out: Any, *, right: str = "tensor") -> None:
    p.contract(a["self"], 0, a[right], 0)


def deform_conv(p: Propagation, a: Arguments, out: Any) -> None:
    """A convolution at sampled places; the places themselves are no channels."""
    for name in ("offset", "mask") if a["use_mask"] else ("offset",):
        for dim in p.of(a[name]):
            p.freeze(dim, f"{p.here} reads places from it")
    convolution(p, {**a, "transposed": False}, out)


def linear(p: Propagation, a: Arguments, out: Any) -> None:
    p.contract(a["input"], -1, a["weight"], 1)
    channels = p.of(a["weight"])[0]
    if a["bias"] is not None:
        p.tie(channels, p.of(a["bias"])[0])
    p.set(out, (*p.of(a["input"])[:-1], channels))


def attention(p: Propagation, a: Arguments, out: Any) -> None:
    """``softmax(q k^T / sqrt(d)) v`` of ``(batch, heads, length, d)``; the scale follows d, so d normalises."""
    query, key, value = a["query"], a["key"], a["value"]
    q, k, v = p.of(query), p.of(key), p.of(value)
    p.normalise(p.tie(q[3], k[3]))
    p.normalise(p.tie(k[2], v[2]))
    heads = p.tie(q[1], k[1], v[1])
    for result in tensors_in((out,)):
        if result.shape == (*query.shape[:3], value.shape[3]):
            p.set(result, (p.tie(q[0], k[0], v[0]), heads, q[2], v[3]))
            return


_CARRY = (
    "clone detach alias lift_fresh lift_fresh_copy _to_copy contiguous fill zero masked_fill where dropout tril triu "
    "hardswish _prelu_kernel log_sigmoid_forward rrelu_with_noise"
)
_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like bernoulli native_dropout"
_VIEW = "view _unsafe_view reshape _reshape_alias flatten unflatten squeeze unsqueeze view_copy"
_REDUCE = "mean sum amax amin var std var_mean std_mean norm linalg_vector_norm prod logsumexp any all"
_SPATIAL = (
    "max_pool{}d max_pool{}d_with_indices avg_pool{}d adaptive_avg_pool{}d _adaptive_avg_pool{}d adaptive_max_pool{}d "
    "reflection_pad{}d replication_pad{}d upsample_nearest{}d _upsample_nearest_exact{}d upsample_linear{}d "
    "upsample_bilinear{}d upsample_bicubic{}d upsample_trilinear{}d _upsample_bilinear{}d_aa _upsample_bicubic{}d_aa "
    "lp_pool{}d fractional_max_pool{}d max_unpool{}d"
)
_BATCH_NORM = (
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_no_update _batch_norm_with_update miopen_batch_norm"
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention scaled_dot_product_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention"
)

CUTS = frozenset({"slice", "select", "split", "split_with_sizes", "unbind"})
"""Operators whose outputs are views that labels can be written through."""

ALWAYS = CUTS | {"expand"}
"""Operators whose rules have something to say on tensors without labels."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(f"{_CARRY} {_LIKE}".split(), elementwise),
    **dict.fromkeys(_VIEW.split(), view),
    **dict.fromkeys(_BATCH_NORM.split(), batch_norm),
    **dict.fromkeys(_ATTENTION.split(), attention),
    **dict.fromkeys(_REDUCE.split(), reduce),
    **dict.fromkeys(("max", "min", "argmax", "argmin", "median", "mode"), partial(reduce, order=True)),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), partial(along, normalises=True)),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), along),
    **dict.fromkeys(("cumsum", "roll", "sort", "topk", "index_select"), along),
    **{name: partial(spatial, num_dims=n) for n in (1, 2, 3) for name in _SPATIAL.format(*(n,) * 20).split()},
    **dict.fromkeys(CUTS, cut),
    **dict.fromkeys(("transpose", "t"), transpose),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"), constant),
    "glu": glu,
    "copy": copy_into,
    **dict.fromkeys(("index_put", "_index_put_impl"), index_put),
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "native_group_norm": group_norm,
    "permute": permute,
    "expand": expand,
    "repeat": repeat,
    "flip": flip,
    "as_strided": as_strided,
    "rot90": rot90,
    "view_as_real": view_as_real,
    "view_as_complex": view_as_complex,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "unfold": unfold_windows,
    "im2col": im2col,
    "col2im": col2im,
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
    "_weight_norm_interface": weight_norm,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
    "index": index,
    "embedding": embedding,
    "torchvision::roi_align": roi_align,
    "torchvision::roi_pool": roi_align,
    "torchvision::deform_conv2d": deform_conv,
    "convolution": convolution,
    "linear": linear,
    "mm": partial(matmul, left="self", right="mat2"),
    "bmm": partial(matmul, left="self", right="mat2"),
    "mv": partial(matmul, left="self", right="vec"),
    "index_add": index_add,
    "dot": dot,
    "vdot": partial(dot, right="other"),
    "addmm": partial(matmul, left="mat1", right="mat2", bias="self"),
    "baddbmm": partial(matmul, left="batch1", right="batch2", bias="self"),
}

Factor = tuple[Tensor, int]
"""A dimension of a tensor: its length is one factor of a number of MACs."""


def _all(tensor: Tensor, *, but: tuple[int, ...] = ()) -> list[Factor]:
    return [(tensor, d) for d in range(tensor.ndim) if d not in but]


def _macs_matmul(left: str, right: str) -> Callable[[Arguments, Any], list[list[Factor]]]:
    return lambda a, out: [_all(a[left]) + ([(a[right], a[right].ndim - 1)] if a[right].ndim > 1 else [])]


MACS: dict[str, Callable[[Arguments, Any], list[list[Factor]]]] = {
    "convolution": lambda a, out: [_all(a["input"] if a["transposed"] else out, but=(1,)) + _all(a["weight"])],
    "torchvision::deform_conv2d": lambda a, out: [_all(out, but=(1,)) + _all(a["weight"])],
    "linear": lambda a, out: [[*_all(a["input"]), (a["weight"], 0)]],
    "mm": _macs_matmul("self", "mat2"),
    "bmm": _macs_matmul("self", "mat2"),
    "mv": _macs_matmul("self", "vec"),
    "addmm": _macs_matmul("mat1", "mat2"),
    "baddbmm": _macs_matmul("batch1", "batch2"),
    **dict.fromkeys(
        _ATTENTION.split(),
        lambda a, out: [
            [*_all(a["query"]), (a["key"], 2)],
            [*_all(a["query"], but=(3,)), (a["key"], 2), (a["value"], 3)],
        ],
    ),
}
"""Operator -> products of dimension lengths that sum to its MACs."""


def macs_of(operator: Operator, arguments: Arguments, out: Any) -> list[list[Factor]]:
    products = MACS.get(operator.name)
    return [] if products is None else products(arguments, out)


def written_by(operator: Operator, out: Any) -> list[Tensor]:
    """Tensors an operator allocates: its outputs without views and in-place results."""
    return tensors_in((out,)) if operator.allocates else []
