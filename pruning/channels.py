"""Channel groups of a model, found by running it once with a label on every channel.

Every index of every dimension of every parameter and buffer gets one integer label. The model runs once, eagerly,
on an example input; each ATen operator carries labels from its inputs to its outputs and ties those that must be
kept or removed together (``secateur.pruning.rules``). The connected components of tied labels are the channels;
channels that touch the same tensor dimensions form a ``ChannelGroup``. What reaches a model output, or an operator
without a rule, is frozen: unknown means "not pruned".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod

import numpy as np
from torch import Tensor

from secateur.device_profiles.wording import number_of
from secateur.pruning.plan import BoolArray, ChannelGroup, IntArray, Member, PruningPlan
from secateur.pruning.rules import Rule, weight_name
from secateur.pruning.snapshot import Remade
from secateur.pruning.tracer import PruningError, Tracer


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
class Followed:
    """A size that a module keeps as an attribute and that has to follow the widths.

    Args:
        module: path of the module.
        name: its attribute.
        index: position in the attribute, if that is a tuple or list.
        value: the size in the unpruned network.
        dim: position in ``Lengths`` of the dimension it follows.
        length: length of that dimension in the unpruned network.
    """

    module: str
    name: str
    index: int | None
    value: int
    dim: int
    length: int


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What can be pruned in a network, what cannot and why.

    Args:
        groups: prunable groups in network order of the producing layer.
        frozen: producing layers whose channels stay, in network order.
        shapes: every parameter and buffer of the traced model, by name.
        aliases: further names of tied tensors -> the name that ``groups`` uses.
        scaled_groups: convolution weights whose ``groups`` shrinks in proportion with dimension 0 (depthwise ones, and
            those that lose whole groups); for other convolutions ``groups`` stays constant.
        normalising: group name -> operators that normalise over its channels, so that removing some changes the rest.
        summed: names of groups whose channels a residual sum carries, the stream of a network; the others are inner.
        mixed: whether an operator without weights sums, normalises or picks over channels of a group.
        rules: the user's rules the model was traced with.
        unknown: operator without a rule -> the modules that called it on channels.
        batch: images in the example input; costs are divided by it.
        followed: sizes kept by modules that follow the widths.
        remade: attributes and buffers that the forward makes anew: caches, features that are kept.
        lengths: dimension lengths the costs are made of.
        macs, params, activation_bytes: the costs, over the whole batch.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    scaled_groups: frozenset[str]
    normalising: Mapping[str, tuple[str, ...]]
    summed: frozenset[str]
    mixed: bool
    rules: Mapping[str, Rule] | None = field(repr=False)
    unknown: Mapping[str, tuple[str, ...]]
    batch: int
    followed: tuple[Followed, ...]
    remade: tuple[Remade, ...] = field(repr=False)
    lengths: Lengths = field(repr=False)
    macs: Products = field(repr=False)
    params: Products = field(repr=False)
    activation_bytes: Products = field(repr=False)

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

    def _unknown_row(self, name: str, where: Sequence[str]) -> tuple[str, ...]:
        entries = {f.layer: f for f in self.frozen if f.reason.startswith(f"operator {name} in ")}
        share = sum(f.macs_share for f in entries.values())
        macs = share * float((self.macs.scale * np.prod(self._dense(self.macs), axis=1)).sum()) / self.batch
        called = ", ".join(path or "the model itself" for path in where)
        return name, called, ", ".join(entries) or "none", f"{share:.1%} ({macs:,.0f})"

    def _dense(self, products: Products) -> IntArray:
        """Lengths in the unpruned network, shape ``(terms, most factors)``."""
        sizes = np.array([group.size for group in self.groups], dtype=np.int64)
        lengths: IntArray = self.lengths.constant + self.lengths.per_width @ sizes
        return lengths[products.factors]

    def report(self) -> str:
        """The groups, what is frozen and why, and operators without a rule, as plain text."""
        lines = [
            f"{number_of(len(self.groups), 'channel group(s)')}, "
            f"{number_of(sum(g.size for g in self.groups), 'channel(s)')}"
        ]
        rows: list[tuple[str, ...]] = []
        for group in self.groups:
            readers = list(dict.fromkeys(layer_of(m.tensor) for m in group.members if m.reads))
            more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
            rows.append((group.name, str(group.size), ", ".join(readers[:3]) + more))
        lines += _table(("group", "channels", "read by"), rows)
        if self.summed:
            names = [group.name for group in self.groups if group.name in self.summed]
            lines += ["", "carried by residual sums (the stream; the other groups are inner):", f"  {', '.join(names)}"]
        share = sum({f.layer: f.macs_share for f in self.frozen}.values())
        lines += [
            "",
            f"frozen: the output channels of {number_of(len(self.frozen), 'layer(s)')} with {share:.1%} of the MACs",
        ]
        rows = [(f.layer, str(f.size), f"{f.macs_share:.1%}", f.reason) for f in self.frozen]
        lines += _table(("layer", "channels", "MACs", "why"), rows) if rows else []
        if self.unknown:
            lines += ["", "operators without a rule (what they touch is frozen):"]
            rows = [self._unknown_row(name, where) for name, where in self.unknown.items()]
            lines += _table(("operator", "called in", "layers frozen", "MACs kept from pruning"), rows)
        if self.normalising:
            lines += ["", "normalised over channels (removal changes the channels that stay):"]
            lines += [f"  {name}: {', '.join(where)}" for name, where in self.normalising.items()]
        return "\n".join(lines)


def layer_of(tensor: str) -> str:
    """``layer1.0.conv1.weight`` -> ``layer1.0.conv1``; a parameter of the model itself keeps its name."""
    return weight_name(tensor).rpartition(".")[0] or tensor


def freeze_layers(tracer: Tracer, patterns: Iterable[str]) -> None:
    """Freeze the output channels of the layers that match, or lie in a module that matches.

    Raises:
        PruningError: a pattern matches no layer with parameters.
    """
    reads = _read_places(tracer)
    for pattern in patterns:
        found = False
        for i, (tensor, _, labels) in enumerate(tracer.places):
            parts = tensor.split(".")
            if any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1)):
                found = True
                if i not in reads:
                    tracer.labels.freeze(labels, f"frozen by name ({pattern})")
        if not found:
            layers = list(dict.fromkeys(layer_of(tensor) for tensor, _, _ in tracer.places))
            raise PruningError(f"freeze: {pattern!r} matches no layer; the network has {', '.join(layers)}")


@dataclass(frozen=True, eq=False)
class Assembly:
    """A graph, and which channel each label of the tracer became.

    Args:
        graph: the graph.
        group: shape ``(labels,)``; position of its group, -1 = frozen.
        channel: shape ``(labels,)``; channel within the group.
    """

    graph: ChannelGraph
    group: IntArray
    channel: IntArray

    def kept(self, plan: PruningPlan) -> BoolArray:
        """Which labels a plan keeps, shape ``(labels,)``."""
        kept = np.ones(len(self.group), dtype=bool)
        if self.graph.groups:
            masks = [plan.mask(group.name) for group in self.graph.groups]
            starts = np.cumsum([0, *map(len, masks)])
            inside = self.group >= 0
            kept[inside] = np.concatenate(masks)[starts[self.group[inside]] + self.channel[inside]]
        return kept


def assemble(tracer: Tracer, batch: int, attributes: Sequence[Followed] = ()) -> Assembly:
    """Put together what a run has shown.

    Args:
        batch: images in the example input.
        attributes: sizes that modules keep, and the dimensions they follow.
    """
    return _Assembler(tracer).graph(batch, attributes)


def _read_places(tracer: Tracer) -> set[int]:
    """Positions in ``tracer.places`` of the dimensions that are summed over."""
    starts = np.array([labels[0] for _, _, labels in tracer.places], dtype=np.int64)
    read = [np.unique(np.searchsorted(starts, labels, side="right") - 1) for labels in tracer.labels.reads]
    return set(np.concatenate(read).tolist()) if read else set()


class _Assembler:
    """Turns what a ``Tracer`` recorded into a ``ChannelGraph``."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.labels, self.places, self.dims = tracer.labels, tracer.places, tracer.dims
        self.tensors, self.model, self.aliases = tracer.tensors, tracer.model, tracer.aliases

    def graph(self, batch: int, attributes: Sequence[Followed]) -> Assembly:
        classes, whole_groups, reasons = self._classes()
        reads = _read_places(self.tracer)
        order = {name: i for i, name in enumerate(self.labels.used)}
        parameters = self.tracer.parameters
        rank = np.full(self.labels.num_labels, -1, dtype=np.int64)
        prunable: list[tuple[tuple[int, int], str, _Family]] = []
        frozen: list[tuple[tuple[int, int], Frozen]] = []
        macs = self._macs_by_tensor()
        sorted_out, family_of = families(classes, self.dims, reasons)
        for f, family in enumerate(sorted_out):
            producers = [i for i in self._places_of(family) if i not in reads and self.places[i][0] in parameters]
            if not producers or family.reason == "":
                continue
            first = min(producers, key=lambda i: (order.get(self.places[i][0], len(order)), i))
            tensor, dim, labels = self.places[first]
            place_classes = classes[labels]
            inside = family_of[place_classes] == f
            channels = place_classes[inside]
            if len(channels) > len(family.classes):
                channels = channels[np.sort(np.unique(channels, return_index=True)[1])]
            key = (order.get(tensor, len(order)), int(np.argmax(inside)))
            if family.reason is None and len(channels) > 1:
                rank[channels] = np.arange(len(channels))
                prunable.append((key, tensor, family))
            else:
                reason = family.reason or "its channels can only go all together"
                for tensor, dim, labels in (self.places[i] for i in producers):
                    inside = family_of[classes[labels]] == f
                    key = (order.get(tensor, len(order)), int(np.argmax(inside)))
                    entry = Frozen(layer_of(tensor), tensor, dim, int(inside.sum()), reason, macs.get(tensor, 0))
                    frozen.append((key, entry))
        prunable.sort(key=lambda item: item[0])
        found = [family for _, _, family in prunable]
        group = np.full(self.labels.num_labels, -1, dtype=np.int64)
        for g, family in enumerate(found):
            group[family.classes] = g
        group, rank = group[classes], rank[classes]
        members = self._members(found, group, rank, reads)
        groups = _name_groups([(tensor, own) for (_, tensor, _), own in zip(prunable, members, strict=True)])
        graph = ChannelGraph(
            groups=groups,
            frozen=_merge_frozen([entry for _, entry in sorted(frozen, key=lambda item: item[0])]),
            shapes={name: tuple(tensor.shape) for name, tensor in self.tensors.items()},
            aliases=self.aliases,
            scaled_groups=self._with_aliases([*self.labels.scaled_groups, *map(weight_name, whole_groups)]),
            normalising=self._normalising(groups, group),
            summed=frozenset(groups[g].name for labels in self.labels.sums for g in set(group[labels].tolist()) - {-1}),
            mixed=any((group[labels] >= 0).any() for labels in self.labels.mixed),
            rules=self.tracer.rules,
            unknown={name: tuple(dict.fromkeys(where)) for name, where in self.labels.unknown.items()},
            batch=batch,
            followed=tuple(attributes),
            remade=self.tracer.remade,
            lengths=self._lengths(groups, found),
            macs=_products([(scale, factors) for scale, factors, _ in self.tracer.macs]),
            params=_products([self._numel(self.tensors[name]) for name in self.tensors if name in parameters]),
            activation_bytes=_products(self.tracer.bytes),
        )
        return Assembly(graph, group, rank)

    def _classes(self) -> tuple[IntArray, list[str], _Reasons]:
        """Class of each label, weights of convolutions that lose whole groups, and why classes are frozen.

        A grouped convolution with more groups than channels per group loses whole groups if nothing speaks against
        it, otherwise the same places in every group.
        """
        whole = [g for g in self.labels.grouped if g.weight and g.inputs is not None and g.groups > g.num_per_group]
        while True:
            rows = [g for g in self.labels.grouped if g not in whole]
            edges = [*self.labels.edges, *(edge for g in whole for edge in g.tie_groups())]
            edges += [edge for g in rows for edge in g.tie_places()]
            frozen = [*self.labels.frozen]
            frozen += [(g.per_group, "") for g in whole if g.per_group is not None]
            frozen += [
                (g.per_group, f"the inputs of {g.weight} have a fixed number")
                for g in rows
                if g.per_group is not None and g.inputs is None
            ]
            classes = components(self.labels.num_labels, edges)
            reasons = _reasons(classes, frozen)
            stuck = [
                g
                for g in whole
                if len(found := np.unique(classes[g.outputs])) < g.groups or (reasons.code[found] >= 0).any()
            ]
            if not stuck:
                return classes, [g.weight for g in whole if g.weight], reasons
            whole = [g for g in whole if g not in stuck]

    def _numel(self, tensor: Tensor) -> tuple[int, list[int]]:
        return self.tracer.product([(tensor, d) for d in range(tensor.ndim)])

    def _macs_by_tensor(self) -> dict[str, float]:
        """Fraction of the dense network's MACs per weight."""
        macs: dict[str, float] = defaultdict(float)
        for scale, factors, tensor in self.tracer.macs:
            macs[tensor or ""] += scale * float(prod(len(self.dims[i]) for i in factors))
        total = sum(macs.values()) or 1.0
        return {name: value / total for name, value in macs.items()}

    def _places_of(self, family: _Family) -> list[int]:
        return [i for i in family.dims.tolist() if i < len(self.places)]

    def _members(
        self, found: Sequence[_Family], group: IntArray, rank: IntArray, reads: set[int]
    ) -> list[tuple[Member, ...]]:
        """Members of each group.

        Args:
            group, rank: shape ``(labels,)``; position in ``found`` (-1 = frozen), and channel within the group.
            reads: places that are summed over.
        """
        members: list[list[Member]] = [[] for _ in found]
        for i in sorted({i for family in found for i in self._places_of(family)}):
            tensor, dim, labels = self.places[i]
            owner = group[labels]
            by_channel = np.argsort(owner * len(group) + rank[labels], kind="stable")
            owner = owner[by_channel]
            cuts = [0, *(np.flatnonzero(owner[1:] != owner[:-1]) + 1).tolist(), len(owner)]
            for start, end in pairwise(cuts):
                if (g := owner[start]) >= 0:
                    positions = by_channel[start:end].reshape(len(found[g].classes), -1)
                    members[g].append(Member(tensor, dim, positions, i in reads))
        return [tuple(own) for own in members]

    def _normalising(self, groups: Sequence[ChannelGroup], group: IntArray) -> dict[str, tuple[str, ...]]:
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for labels, where in self.labels.normalising:
            for g in set(group[labels].tolist()) - {-1}:
                found[groups[g].name].setdefault(where)
        return {name: tuple(where) for name, where in found.items()}

    def _lengths(self, groups: Sequence[ChannelGroup], members: Sequence[_Family]) -> Lengths:
        per_width = np.zeros((1 + len(self.dims), len(groups)), dtype=np.int64)
        for g, family in enumerate(members):
            per_width[1 + family.dims, g] = family.counts
        dense = np.array([1, *(len(labels) for labels in self.dims)], dtype=np.int64)
        return Lengths(dense - per_width @ np.array([g.size for g in groups], dtype=np.int64), per_width)

    def _with_aliases(self, names: Iterable[str]) -> frozenset[str]:
        own = frozenset(names)
        return own | {alias for alias, name in self.aliases.items() if name in own}


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


@dataclass(frozen=True, eq=False)
class _Reasons:
    """Why classes are frozen.

    Args:
        code: shape ``(labels,)``; per class a position in ``texts``, -1 = not frozen.
        texts: the reasons.
    """

    code: IntArray
    texts: tuple[str, ...]


def _reasons(classes: IntArray, frozen: Sequence[tuple[IntArray, str]]) -> _Reasons:
    """Why a class is frozen: the first reason given for one of its labels, empty ones last."""
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for _, text in frozen))}
    code = np.full(len(classes), -1, dtype=np.int64)
    entries = sorted(frozen, key=lambda entry: entry[1] == "")
    if entries:
        labels = np.concatenate([labels for labels, _ in entries])
        codes = np.repeat([texts[text] for _, text in entries], [len(labels) for labels, _ in entries])
        code[classes[labels[::-1]]] = codes[::-1]  # of several values for one class the last one stays
    return _Reasons(code, tuple(texts))


def families(classes: IntArray, dims: Sequence[IntArray], reasons: _Reasons) -> tuple[list[_Family], IntArray]:
    """Sort classes by the dimensions they touch.

    Args:
        classes: shape ``(labels,)``; class of each label.
        dims: labels of each dimension.
        reasons: why classes are frozen.

    Returns:
        The families, by their smallest class, and the family of each class, shape ``(labels,)``, -1 = none.
    """
    family_of = np.full(len(classes), -1, dtype=np.int64)
    if not dims:
        return [], family_of
    owner = classes[np.concatenate(dims)]
    touched = np.repeat(np.arange(len(dims)), [len(labels) for labels in dims])
    random = np.random.default_rng(0).integers(1 << 63, size=(2, len(dims)), dtype=np.uint64)
    signature = np.zeros(
        (2, len(classes)), dtype=np.uint64
    )  # equal sums of random numbers: equal dimensions and counts
    for sums, numbers in zip(signature, random, strict=True):
        np.add.at(sums, owner, numbers[touched])
    present = np.zeros(len(classes), dtype=bool)
    present[owner] = True
    owners = np.flatnonzero(present)
    keys = np.stack([*signature[:, owners].astype(np.int64), reasons.code[owners]])
    order = np.lexsort(keys)
    fresh = np.flatnonzero((np.diff(keys[:, order]) != 0).any(axis=0)) + 1
    owners = owners[order]
    members = sorted((owners[start:end] for start, end in pairwise([0, *fresh, len(order)])), key=lambda own: own[0])
    family_of[[own[0] for own in members]] = np.arange(len(members))  # one class tells the dimensions of all
    telling = np.flatnonzero(family_of[owner] >= 0)
    pairs, counts = np.unique(family_of[owner[telling]] * len(dims) + touched[telling], return_counts=True)
    number, place = np.divmod(pairs, len(dims))
    cuts = np.searchsorted(number, np.arange(len(members) + 1))
    found = []
    for f, own in enumerate(members):
        family_of[own] = f
        one = slice(cuts[f], cuts[f + 1])
        code = reasons.code[own[0]]
        found.append(_Family(own, place[one], counts[one], reasons.texts[code] if code >= 0 else None))
    return found, family_of


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
