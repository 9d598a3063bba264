"""The labels of live tensors, and what the operators seen so far say about them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from secateur.pruning.plan import IntArray
from secateur.pruning.rules.operators import Arguments, operator_of, tensors_in

Dim = IntArray | None
"""Labels along one dimension, shape ``(length,)``; None = a dimension of fixed length (batch, space, constants)."""

Labels = tuple[Dim, ...]
Edge = tuple[IntArray, IntArray]
"""Labels that are tied pair by pair, each of shape ``(pairs,)``."""

CUTS = frozenset({"slice", "select", "split", "split_with_sizes", "unbind"})
"""Operators whose outputs are views that labels can be written through."""

MAKES = frozenset({"zeros", "ones", "full", "empty", "eye", "new_zeros", "new_ones", "new_full", "new_empty"})
"""Operators that make a constant tensor, and the torch functions of the same names, which are told its shape."""

ALWAYS = CUTS | MAKES | {"expand", "repeat"}
"""Operators whose rules have something to say on tensors without labels."""

T = TypeVar("T")


class TensorMap(Generic[T]):
    """Values of live tensors, by identity; those of dead ones are dropped soon, because they may hold tensors."""

    SLACK = 64
    """Entries that may at least be added before dead ones are looked for."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Any, T]] = {}
        self._limit = self.SLACK

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        reference = torch._C._WeakTensorRef(tensor)  # type: ignore[attr-defined]
        self._entries[id(tensor)] = (reference, value)
        if len(self._entries) >= self._limit:
            self._entries = {key: entry for key, entry in self._entries.items() if not entry[0].expired()}
            self._limit = len(self._entries) + max(self.SLACK, len(self._entries) // 4)

    def get(self, tensor: Tensor) -> T | None:
        """The value, or None."""
        entry = self._entries.get(id(tensor))
        return None if entry is None or entry[0].expired() else entry[1]


BINS = "its places are numbered: bins of a distribution, of which an expected value is taken"


def numbers_places(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor gives the places along a dimension, and nothing else, equally spaced numbers (0, 1, 2 ...).

    What is multiplied with it and summed becomes an expected value: the bins of a distribution head, which mean nothing
    once some are missing. Weights that were trained or drawn are never equally spaced.
    """
    if tensor.shape[dim] < 4 or not tensor.numel() or not tensor.is_floating_point():
        return False
    places = tensor.detach().movedim(dim, -1)
    first, second, third, fourth = places[(0,) * (places.ndim - 1)][:4].tolist()
    if not second - first or abs((fourth - third) - (second - first)) > 1e-2 * abs(second - first):
        return False  # most weights: four entries tell
    steps = places[(0,) * (places.ndim - 1)].double().diff()
    if not steps[0] or not torch.allclose(steps, steps[0].expand_as(steps), rtol=1e-3, atol=0.0):
        return False
    return bool((places == places[(0,) * (places.ndim - 1)]).all())  # repeated for a batch, maybe


class Propagation:
    """Labels of the live tensors, and what the operators seen so far say about them.

    Args:
        rules: rules by operator name.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self.where = ""
        """Path of the module that is running."""
        self.operator = ""
        self.function = ""
        """Name of the torch function that runs this operator (``chunk`` and ``split`` both run ``split``)."""
        self.inferred: int | None = None
        """Position of the -1 in the sizes given to a view."""
        self.num_labels = 0
        self._open: list[int] = []
        """First and last labels of the dimensions that ``open`` made, in turn."""
        self.edges: list[Edge] = []
        self.grouped: list[Grouped] = []
        self.frozen: list[tuple[IntArray, str]] = []
        self.stated: list[tuple[IntArray, str]] = []
        self.reads: list[IntArray] = []
        self.normalising: list[tuple[IntArray, str]] = []
        self.mixed: list[IntArray] = []
        """Labels over which an operator without weights sums, normalises or picks."""
        self.sums: list[IntArray] = []
        """Labels of dimensions along which activations of different layers are added (``added``)."""
        self.unknown: dict[str, list[str]] = {}
        self.scaled_groups: dict[str, None] = {}
        self.used: dict[str, None] = {}
        self.unread: list[Unread] = []
        """Empty tensors that no operator has read: what would follow did not run on the example."""
        self.relabelled: list[Tensor] = []
        """Tensors that got labels after they were made, by the running operator."""
        self.rules = rules
        self._notes: TensorMap[_Note] = TensorMap()
        self.numbered: TensorMap[int] = TensorMap()
        """The dimension along which a product was taken with numbers of the places (``numbers_places``)."""

    def fresh(self, size: int) -> IntArray:
        """New labels, shape ``(size,)``."""
        start = self.num_labels
        self.num_labels += size
        return np.arange(start, self.num_labels, dtype=np.int64)

    def open(self, size: int) -> Dim:
        """New labels for a dimension whose length the code states: whether it is one of channels is seen later.

        They take the part of the first labels that they are tied to; facing a fixed dimension they are fixed as well.
        """
        if size < 2:
            return None
        labels = self.fresh(size)
        self._open += (int(labels[0]), int(labels[-1]))
        self.state(labels)
        return labels

    def is_open(self, dim: Dim) -> bool:
        """Whether ``open`` made the labels."""
        if dim is None:
            return False
        first = bisect_right(self._open, int(dim[0]))
        return first % 2 == 1 or (first > 0 and self._open[first - 1] == int(dim[0]))

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
        carrier = next((dim for dim in labelled if not self.is_open(dim)), labelled[0])
        self.edges += [(carrier, dim) for dim in labelled if dim is not carrier]
        return carrier

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

    def added(self, *dims: Dim) -> None:
        """Activations are added, and these dimensions face each other: different labels make it a residual sum.

        Equal labels are one layer's, as in ``x + x ** 3``; those that ``open`` made are an empty sum to begin with.
        """
        carried = [dim for dim in dims if dim is not None and not self.is_open(dim)]
        if any(not np.array_equal(carried[0], dim) for dim in carried[1:]):
            self.sums += carried

    def depend(self, tensor: Tensor, dim: Dim) -> None:
        """The tensor holds positions along ``dim``: whoever reads it freezes the labels."""
        if dim is not None:
            self._note(tensor).positions = dim

    def leave(self, tensor: Tensor, line: str) -> bool:
        """The tensor's values go to Python: what they came from is frozen. Whether they came from channels at all."""
        note = self._notes.get(tensor)
        if note is None:
            return False
        origins = [dim for dim in (*note.labels, note.positions, *note.origins.values()) if dim is not None]
        for dim in origins:
            self.freeze(dim, f"its values leave torch: {line}")
        return bool(origins)

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
                full = fixed(self, whole.shape[d], "") if before is None else before.copy()
                joined = dim if before is None else self.tie(dim, before[positions])
                full[positions] = dim if joined is None else joined
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
        if numbers_places(a, a_dim) or numbers_places(b, b_dim):
            self.freeze(dim, BINS)
        if dim is not None and self.source(a) is None and self.source(b) is None:
            self.mixed.append(dim)
        if self.source(b) is None:
            self.read(a, a_dim)
        if self.source(a) is None:
            self.read(b, b_dim)

    def enter(self, function: str, args: Sequence[Any]) -> None:
        """A torch function begins; the operators until the next call run in it."""
        self.function, self.inferred = function, None
        if function in ("view", "reshape"):
            sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
            self.inferred = next((i for i, n in enumerate(sizes) if isinstance(n, int) and n == -1), None)

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
        origins: dict[int, IntArray] = {}
        for tensor in inputs:
            if (note := self._notes.get(tensor)) is None:
                made_of_parameters = False
                continue
            labelled = labelled or note.is_labelled
            origins.update(note.origins)
            if note.is_labelled:
                origins.update((id(dim), dim) for dim in note.labels if dim is not None)
            if note.source is None:
                made_of_parameters = False
            else:
                self.used.setdefault(note.source)
                source = source or note.source
            if note.positions is not None:
                self.freeze(note.positions, f"{self.here} reads positions of channels")
        if labelled or self.operator in ALWAYS:
            before = self.of(inputs[0]) if inputs else ()
            rule = self.rules.get(self.operator)
            if rule is not None:
                rule(self, arguments, out)
            elif operator.is_pointwise:
                elementwise(self, arguments, out)
            else:
                self.unknown.setdefault(self.operator, []).append(self.where)
                for dim in (dim for tensor in inputs for dim in self.of(tensor)):
                    self.freeze(dim, f"operator {self.here} has no rule")
            if inputs and out is inputs[0] and any(a is not b for a, b in zip(before, self.of(out), strict=True)):
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
            if origins and not self.is_labelled(tensor):
                self._note(tensor).origins = origins
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
        origins: where it has no labels itself: those that it was computed from, by id.
        part: what it is a view of (``Propagation.part``).
        unread: set while it is empty and nothing has read it.
    """

    labels: Labels
    is_labelled: bool = False
    source: str | None = None
    positions: Dim = None
    origins: Mapping[int, IntArray] = field(default_factory=dict)
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


def elementwise(p: Propagation, a: Arguments, out: Any) -> None:
    """Broadcast: dimensions that face each other are tied."""
    inputs = [(tuple(x.shape), p.of(x)) for x in tensors_in(a.values())]
    for result in tensors_in((out,)):
        dims = []
        for d, n in zip(range(-result.ndim, 0), result.shape, strict=True):
            facing = [x[d] for shape, x in inputs if n != 1 and len(shape) >= -d and shape[d] == n]
            dims.append(p.tie(*facing))
        p.set(result, dims)


def total(p: Propagation, a: Arguments, out: Any) -> None:
    """Element by element, as ``add`` and its like; a bias or another parameter makes no residual sum."""
    addends = [x for x in tensors_in(a.values()) if p.source(x) is None]
    for d in range(-out.ndim, 0) if len(addends) > 1 else ():
        p.added(*(p.of(x)[d] for x in addends if x.ndim >= -d and x.shape[d] == out.shape[d] != 1))
    elementwise(p, a, out)


def fixed(p: Propagation, size: int, reason: str) -> IntArray:
    labels = p.fresh(size)
    p.freeze(labels, reason)
    return labels


def weight_name(parameter: str) -> str:
    """Name of the weight a parameter makes: ``a.parametrizations.weight.original1``, ``a.weight_v`` -> ``a.weight``."""
    layer, found, rest = parameter.partition(".parametrizations.")
    if found:
        return f"{layer}.{rest.partition('.')[0]}"
    for ending in ("_v", "_g", "_orig"):
        if parameter.endswith(f"weight{ending}"):
            return parameter.removesuffix(ending)
    return parameter


def as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
