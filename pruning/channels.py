"""Channel groups of a model, found by running it once with a label on every channel.

Every index of every dimension of every parameter and buffer gets one integer label. The model runs once, eagerly,
on an example input; each ATen operator carries labels from its inputs to its outputs and ties those that must be
kept or removed together (``pruning.rules``). The connected components of tied labels are the channels; channels
that touch the same tensor dimensions form a ``ChannelGroup``. What reaches a model output, or an operator without
a rule, is frozen: unknown means "not pruned".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.plan import BoolArray, ChannelGroup, IntArray, Member, PruningPlan
from pruning.rules import Factor, Propagation, macs_of, written_by

OPAQUE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Modules that check tensor sizes against their constructor's: their own tensors are frozen."""


class PruningError(ValueError):
    """A model cannot be traced, pruned, saved or loaded; the message says what was expected and what came."""


@dataclass(frozen=True)
class Frozen:
    """Channels that no plan removes.

    Args:
        layer: the layer that produces them.
        tensor: its tensor whose dimension ``dim`` holds them.
        size: how many.
        reason: why, with the operator and the module that decided it.
        macs_share: fraction of the network's MACs spent in the layer.
    """

    layer: str
    tensor: str
    dim: int
    size: int
    reason: str
    macs_share: float


@dataclass(frozen=True, eq=False)
class Products:
    """A quantity that is a sum of products of dimension lengths.

    Args:
        scale: shape ``(terms,)``; constant factor of each term.
        factors: shape ``(terms, most factors)``; positions in ``Lengths``, 0 = no factor.
    """

    scale: IntArray
    factors: IntArray


@dataclass(frozen=True, eq=False)
class Lengths:
    """Dimension lengths as functions of the group widths: ``constant + per_width @ widths``.

    Args:
        constant: shape ``(dims,)``; entry 0 is the constant 1.
        per_width: shape ``(dims, groups)``.
    """

    constant: IntArray
    per_width: IntArray


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What can be pruned in a network, what cannot and why.

    Args:
        groups: prunable groups in network order of the producing layer.
        frozen: producing layers whose channels stay, in network order.
        shapes: every parameter and buffer of the traced model, by name.
        aliases: further names of tied tensors -> the name that ``groups`` uses.
        scaled_groups: convolution weights whose ``groups`` shrinks in proportion with dimension 0 (depthwise);
            for other convolutions ``groups`` stays constant.
        normalising: group name -> operators that normalise over its channels, so that removing some changes the rest.
        unknown: operator without a rule -> the modules that called it on channels.
        batch: images in the example input; costs are divided by it.
        lengths: dimension lengths the costs are made of.
        macs, params, activation_bytes: the costs, over the whole batch.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    scaled_groups: frozenset[str]
    normalising: Mapping[str, tuple[str, ...]]
    unknown: Mapping[str, tuple[str, ...]]
    batch: int
    lengths: Lengths = field(repr=False)
    macs: Products = field(repr=False)
    params: Products = field(repr=False)
    activation_bytes: Products = field(repr=False)

    @classmethod
    def trace(cls, model: nn.Module, *example_inputs: Any, **kwargs: Any) -> ChannelGraph:
        """Run the model once in eval mode and find its channel groups. The model is left as it was.

        Args:
            model: any module whose forward runs on the example.
            example_inputs: positional arguments of the forward; the first dimension of the first tensor is the batch.
            kwargs: keyword arguments of the forward.

        Raises:
            PruningError: the forward fails on the example; says in which module and with which shapes.
        """
        tracer = _Tracer(model)
        with undisturbed(model), _modules_entered(model) as entered:
            try:
                with _ChunkMode(tracer.labels), tracer:
                    tracer.entered = entered
                    outputs = model(*example_inputs, **kwargs)
            except Exception as error:
                shapes = ", ".join(f"{path} {tuple(t.shape)}" for path, t in named_tensors((example_inputs, kwargs)))
                raise PruningError(
                    f"the model fails on the example input, in module {entered.last!r} "
                    f"({entered.last_type}), given {shapes or 'no tensor'}: {type(error).__name__}: {error}"
                ) from error
        for path, tensor in named_tensors(outputs):
            for dim in tracer.labels.of(tensor):
                tracer.labels.freeze(dim, f"reaches the model's output{path}")
        return tracer.graph(batch_size(example_inputs, kwargs))

    def group(self, name: str) -> ChannelGroup:
        """A group by name.

        Raises:
            PruningError: there is no such group; lists the known ones.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise PruningError(f"no channel group {name!r}; the network has {[g.name for g in self.groups]}")

    def slices(self, plan: PruningPlan) -> dict[str, dict[int, IntArray]]:
        """Per tensor that loses entries (all names of tied tensors): dimension -> sorted kept positions.

        Raises:
            PlanError: the plan belongs to another network.
        """
        plan.validate(self)
        kept: dict[str, dict[int, BoolArray]] = defaultdict(dict)
        for group in self.groups:
            if len(plan.kept[group.name]) == group.size:
                continue
            removed = ~plan.mask(group.name)
            for member in group.members:
                size = self.shapes[member.tensor][member.dim]
                mask = kept[member.tensor].setdefault(member.dim, np.ones(size, dtype=bool))
                mask[member.index[removed].ravel()] = False
        result = {name: {d: np.flatnonzero(mask) for d, mask in dims.items()} for name, dims in kept.items()}
        return result | {alias: result[name] for alias, name in self.aliases.items() if name in result}

    def report(self) -> str:
        """The groups, what is frozen and why, and operators without a rule, as plain text."""
        lines = [f"{len(self.groups)} channel groups, {sum(g.size for g in self.groups)} channels"]
        rows: list[tuple[str, ...]] = []
        for group in self.groups:
            readers = list(dict.fromkeys(layer_of(m.tensor) for m in group.members if m.reads))
            more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
            rows.append((group.name, str(group.size), ", ".join(readers[:3]) + more))
        lines += _table(("group", "channels", "read by"), rows)
        share = sum({f.layer: f.macs_share for f in self.frozen}.values())
        lines += ["", f"frozen: the output channels of {len(self.frozen)} layers with {share:.1%} of the MACs"]
        rows = [(f.layer, str(f.size), f"{f.macs_share:.1%}", f.reason) for f in self.frozen]
        lines += _table(("layer", "channels", "MACs", "why"), rows) if rows else []
        if self.unknown:
            lines += ["", "operators without a rule (what they touch is frozen):"]
            lines += [f"  {name}: in {', '.join(where)}" for name, where in self.unknown.items()]
        if self.normalising:
            lines += ["", "normalised over channels (removal changes the channels that stay):"]
            lines += [f"  {name}: {', '.join(where)}" for name, where in self.normalising.items()]
        return "\n".join(lines)


def layer_of(tensor: str) -> str:
    """``layer1.0.conv1.weight`` -> ``layer1.0.conv1``; a parameter of the model itself keeps its name."""
    return tensor.rpartition(".")[0] or tensor


def named_tensors(value: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested lists, tuples, mappings and plain objects, with their paths (``[0]['boxes']``).

    ``above`` holds the ids of the containers around ``value``, so that cycles end.
    """
    if id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{path}[{key!r}]", above)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{path}[{i}]", above)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        for key, item in vars(value).items():
            yield from named_tensors(item, f"{path}.{key}", above)


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers by their first name, and the further names of tied ones -> the first."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                tensors[name] = tensor
    return tensors, aliases


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Images in the inputs of a forward: the length of a list of images, else the first tensor's first dimension."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)) and value:
            return len(value)
        if isinstance(value, Tensor) and value.ndim > 0:
            return max(1, value.shape[0])
    return 1


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes, buffers and torch's random state are put back afterwards.

    ``nn.MultiheadAttention`` runs as a composition of operators meanwhile, not as one fused operator.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([d.index for d in devices]), torch.no_grad():
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, training in modes:
                module.training = training
            for buffer, before, version in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


class _Entered:
    """The stack of running modules, and the last one entered."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.stack = [""]
        self.last = ""
        self.last_type = type(model).__name__


@contextmanager
def _modules_entered(model: nn.Module) -> Iterator[_Entered]:
    entered = _Entered(model)

    def enter(module: nn.Module, _: object) -> None:
        if module in entered.names:
            entered.last, entered.last_type = entered.names[module], type(module).__name__
        entered.stack.append(entered.names.get(module, entered.stack[-1]))

    def leave(_: nn.Module, __: object, ___: object) -> None:
        entered.stack.pop()

    handles = [
        nn_module.register_module_forward_pre_hook(enter),
        nn_module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


class _ChunkMode(TorchFunctionMode):
    """Tells ``chunk(n)`` (parts follow the width) from ``split(size)`` (a number written in the code)."""

    def __init__(self, labels: Propagation) -> None:
        super().__init__()
        self.labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.labels.in_chunk = func in (torch.chunk, Tensor.chunk)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.labels.in_chunk = False


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a model with labels and turns what was recorded into a ``ChannelGraph``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = Propagation()
        self.tensors, self.aliases = tensors_of(model)
        self.places = [
            (name, d, labels)
            for name, tensor in self.tensors.items()
            for d, labels in enumerate(self.labels.register(name, tensor))
            if labels is not None
        ]
        self.dims: list[IntArray] = [labels for _, _, labels in self.places]
        self.dim_ids = {id(labels): i for i, labels in enumerate(self.dims)}
        self.macs: list[tuple[int, list[int], str | None]] = []
        self.bytes: list[tuple[int, list[int]]] = []
        self.entered = _Entered(model)
        self.model = model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.labels.where = self.entered.stack[-1]
        arguments = self.labels.call(func, args, kwargs or {}, out)
        for product in macs_of(func, arguments, out):
            layer = next((s for t, _ in product if (s := self.labels.source(t)) is not None), None)
            self.macs.append((*self._product(product), layer))
        for tensor in written_by(func, out):
            scale, factors = self._product([(tensor, d) for d in range(tensor.ndim)])
            self.bytes.append((scale * tensor.element_size(), factors))
        return out

    def _product(self, factors: list[Factor]) -> tuple[int, list[int]]:
        """Constant factor and the labelled dimensions (positions in ``dims``) of a product of lengths."""
        scale, labelled = 1, []
        for tensor, d in factors:
            labels = self.labels.of(tensor)[d]
            if labels is None:
                scale *= tensor.shape[d]
            else:
                if id(labels) not in self.dim_ids:
                    self.dim_ids[id(labels)] = len(self.dims)
                    self.dims.append(labels)
                labelled.append(self.dim_ids[id(labels)])
        return scale, labelled

    def graph(self, batch: int) -> ChannelGraph:
        """What was recorded, put together."""
        self._freeze_unused()
        classes = components(self.labels.num_labels, self.labels.edges)
        reasons = self._reasons(classes)
        reads = self._read_places()
        order = {name: i for i, name in enumerate(self.labels.used)}
        parameters = {name for name, _ in self.model.named_parameters()}
        rank = np.full(self.labels.num_labels, -1, dtype=np.int64)
        place_classes = [classes[labels] for _, _, labels in self.places]
        prunable: list[tuple[tuple[int, int], str, _Family, tuple[Member, ...]]] = []
        frozen: list[tuple[tuple[int, int], Frozen]] = []
        macs = self._macs_by_tensor()
        for family in families(classes, self.dims, reasons):
            places = [int(i) for i in family.dims if i < len(self.places)]
            producers = [i for i in places if i not in reads and self.places[i][0] in parameters]
            if not producers or family.reason == "":
                continue
            first = min(producers, key=lambda i: (order.get(self.places[i][0], len(order)), i))
            tensor, dim, _ = self.places[first]
            inside = np.isin(place_classes[first], family.classes)
            produced = place_classes[first][inside]
            channels = produced[np.sort(np.unique(produced, return_index=True)[1])]
            key = (order.get(tensor, len(order)), int(np.argmax(inside)))
            if family.reason is None and len(channels) > 1:
                rank[channels] = np.arange(len(channels))
                prunable.append(
                    (key, tensor, family, tuple(self._member(i, rank[place_classes[i]], i in reads) for i in places))
                )
                rank[channels] = -1
            else:
                reason = family.reason or "its channels can only go all together"
                frozen.append(
                    (key, Frozen(layer_of(tensor), tensor, dim, int(inside.sum()), reason, macs.get(tensor, 0)))
                )
        prunable.sort(key=lambda item: item[0])
        groups = _name_groups([(tensor, members) for _, tensor, _, members in prunable])
        return ChannelGraph(
            groups=groups,
            frozen=_merge_frozen([entry for _, entry in sorted(frozen, key=lambda item: item[0])]),
            shapes={name: tuple(tensor.shape) for name, tensor in self.tensors.items()},
            aliases=self.aliases,
            scaled_groups=self._with_aliases(self.labels.scaled_groups),
            normalising=self._normalising(groups, [family for _, _, family, _ in prunable], classes),
            unknown={name: tuple(dict.fromkeys(where)) for name, where in self.labels.unknown.items()},
            batch=batch,
            lengths=self._lengths(groups, [family for _, _, family, _ in prunable]),
            macs=_products([(scale, factors) for scale, factors, _ in self.macs]),
            params=_products([self._product([(p, d) for d in range(p.ndim)]) for p in self.model.parameters()]),
            activation_bytes=_products(self.bytes),
        )

    def _freeze_unused(self) -> None:
        for name, dim, unused in self.places:
            if name not in self.labels.used:
                self.labels.freeze(unused, "never used on the example input" if dim == 0 else "")
        for path, module in self.model.named_modules():
            if isinstance(module, OPAQUE):
                for parameter in module.parameters():
                    for labels in self.labels.of(parameter):
                        self.labels.freeze(
                            labels, f"{type(module).__name__} {path} takes its sizes from its constructor"
                        )

    def _reasons(self, classes: IntArray) -> dict[int, str]:
        """Why a class is frozen: the first reason given for one of its labels."""
        reasons: dict[int, str] = {}
        for labels, reason in self.labels.frozen:
            for c in np.unique(classes[labels]).tolist():
                reasons[c] = reasons.get(c) or reason
        return reasons

    def _read_places(self) -> set[int]:
        starts = np.array([labels[0] for _, _, labels in self.places], dtype=np.int64)
        read = [np.unique(np.searchsorted(starts, labels, side="right") - 1) for labels in self.labels.reads]
        return set(np.concatenate(read).tolist()) if read else set()

    def _macs_by_tensor(self) -> dict[str, float]:
        """Fraction of the dense network's MACs per weight."""
        macs: dict[str, float] = defaultdict(float)
        for scale, factors, tensor in self.macs:
            macs[tensor or ""] += scale * float(np.prod([len(self.dims[i]) for i in factors]))
        total = sum(macs.values()) or 1.0
        return {name: value / total for name, value in macs.items()}

    def _member(self, place: int, channel: IntArray, reads: bool) -> Member:
        """One member; ``channel``, shape ``(length,)``, is the channel each position belongs to or -1."""
        tensor, dim, _ = self.places[place]
        positions = np.flatnonzero(channel >= 0)
        by_channel = positions[np.argsort(channel[positions], kind="stable")]
        return Member(tensor, dim, by_channel.reshape(channel.max() + 1, -1), reads)

    def _normalising(
        self, groups: Sequence[ChannelGroup], members: Sequence[_Family], classes: IntArray
    ) -> dict[str, tuple[str, ...]]:
        group_of = {
            c: group.name for group, family in zip(groups, members, strict=True) for c in family.classes.tolist()
        }
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for labels, where in self.labels.normalising:
            for c in np.unique(classes[labels]).tolist():
                if c in group_of:
                    found[group_of[c]].setdefault(where)
        return {name: tuple(where) for name, where in found.items()}

    def _lengths(self, groups: Sequence[ChannelGroup], members: Sequence[_Family]) -> Lengths:
        per_width = np.zeros((1 + len(self.dims), len(groups)), dtype=np.int64)
        for g, family in enumerate(members):
            per_width[1 + family.dims, g] = family.counts
        dense = np.array([1, *(len(labels) for labels in self.dims)], dtype=np.int64)
        return Lengths(dense - per_width @ np.array([g.size for g in groups], dtype=np.int64), per_width)

    def _with_aliases(self, names: Mapping[str, None]) -> frozenset[str]:
        return frozenset(names) | {alias for alias, name in self.aliases.items() if name in names}


@dataclass(frozen=True, eq=False)
class _Family:
    """Classes that touch the same dimensions equally often and are frozen for the same reason, if at all.

    Args:
        classes: shape ``(channels,)``.
        dims: shape ``(k,)``; the dimensions they touch, increasing.
        counts: shape ``(k,)``; positions per channel in each.
        reason: None = prunable.
    """

    classes: IntArray
    dims: IntArray
    counts: IntArray
    reason: str | None


def families(classes: IntArray, dims: Sequence[IntArray], reasons: Mapping[int, str]) -> list[_Family]:
    """Sort classes by the dimensions they touch.

    Args:
        classes: shape ``(labels,)``; class of each label.
        dims: labels of each dimension.
        reasons: frozen classes.
    """
    if not dims:
        return []
    pairs = np.concatenate([classes[labels] * len(dims) + d for d, labels in enumerate(dims)])
    pairs, counts = np.unique(pairs, return_counts=True)
    owner, touched = np.divmod(pairs, len(dims))
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    found: dict[tuple[bytes, bytes, str | None], list[int]] = defaultdict(list)
    for start, end in zip(starts, np.r_[starts[1:], len(owner)], strict=True):
        signature = (touched[start:end].tobytes(), counts[start:end].tobytes(), reasons.get(int(owner[start])))
        found[signature].append(int(owner[start]))
    return [
        _Family(np.array(owners), np.frombuffer(d, dtype=np.int64), np.frombuffer(k, dtype=np.int64), reason)
        for (d, k, reason), owners in found.items()
    ]


def components(size: int, edges: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """Smallest index of the connected component of each of ``size`` nodes, shape ``(size,)``.

    Each round hooks every root with a smaller neighbour onto it and flattens the trees, so the number of
    roots at least halves: O(log n) rounds of array operations.
    """
    root = np.arange(size, dtype=np.int64)
    if not edges:
        return root
    a, b = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    while True:
        a, b = root[a], root[b]
        open_ = a != b
        if not open_.any():
            return root
        a, b = a[open_], b[open_]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, higher := root[root]):
            root = higher


def _name_groups(found: Sequence[tuple[str, tuple[Member, ...]]]) -> tuple[ChannelGroup, ...]:
    groups: list[ChannelGroup] = []
    seen: dict[str, int] = defaultdict(int)
    for tensor, members in found:
        layer = layer_of(tensor)
        seen[layer] += 1
        name = layer if seen[layer] == 1 else f"{layer}#{seen[layer]}"
        groups.append(ChannelGroup(name, len(members[0].index), members))
    return tuple(groups)


def _merge_frozen(entries: Sequence[Frozen]) -> tuple[Frozen, ...]:
    """One entry per layer and reason."""
    merged: dict[tuple[str, str], Frozen] = {}
    for entry in entries:
        key = (entry.layer, entry.reason)
        if (before := merged.get(key)) is None:
            merged[key] = entry
        elif (before.tensor, before.dim) == (entry.tensor, entry.dim):
            merged[key] = replace(before, size=before.size + entry.size)
    return tuple(merged.values())


def _products(terms: Sequence[tuple[int, list[int]]]) -> Products:
    """Terms with the same factors are added up."""
    total: dict[tuple[int, ...], int] = defaultdict(int)
    for scale, factors in terms:
        total[tuple(sorted(factors))] += scale
    table = np.zeros((len(total), max(map(len, total), default=0)), dtype=np.int64)
    for row, factors_ in zip(table, total, strict=True):
        row[: len(factors_)] = np.array(factors_, dtype=np.int64) + 1
    return Products(np.array(list(total.values()), dtype=np.int64), table)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)
    ]
