"""Channel groups, pruning plans and the space of plans: pure data made of names and numbers, no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

PLAN_FORMAT = 1

MOST_CHANNELS = 2**22
"""Channels that all groups of a network may have; JSON that speaks of more is refused before any of it is expanded."""

RANGE = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")
"""An index or a range of a plan's JSON."""


class PlanError(ValueError):
    """A plan, or its JSON text, does not describe the channel groups it is used with."""


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor that loses entries when channels of a group are removed.

    Args:
        tensor: name of the parameter or buffer, as in ``state_dict``.
        dim: the dimension that shrinks.
        index: shape ``(size, k)``; row ``i`` holds the positions along ``dim`` that belong to channel ``i``
            (``k > 1`` after a flatten, or where grouped convolutions tie positions).
        reads: True where the dimension is summed over (a consumer's input channels), False where it
            produces or carries the channel.
    """

    tensor: str
    dim: int
    index: IntArray
    reads: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of several layers that are kept or removed together.

    Args:
        name: the layer that produces the channels (``layer1.0.conv1``).
        size: number of channels in the unpruned network.
        members: every tensor dimension that shrinks with the group.
    """

    name: str
    size: int
    members: tuple[Member, ...] = ()


class HasGroups(Protocol):
    """A traced network, as far as plans are concerned: ``secateur.pruning.channels.ChannelGraph``."""

    @property
    def groups(self) -> Sequence[ChannelGroup]: ...


@dataclass(frozen=True)
class PruningPlan:
    """Which channels of which group stay.

    Args:
        sizes: channels per group in the unpruned network.
        kept: per group, the kept channel indices, strictly increasing, at least one.

    Raises:
        PlanError: a group is named in only one of the two mappings, or its indices are empty, unsorted,
            repeated, out of range or no whole numbers. All faults are reported together.
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        alone = sorted(self.sizes.keys() ^ self.kept.keys(), key=str)
        faults = [f"{name}: named in sizes or kept only" for name in alone]
        for name in sorted(self.sizes.keys() & self.kept.keys(), key=str):
            size: Any = self.sizes[name]
            kept: Any = self.kept[name]
            if _not_whole((size,)) or size < 1:
                faults.append(f"{name}: a size must be a whole number from 1, got {size!r:.40}")
            elif not isinstance(kept, (tuple, list, range)):
                faults.append(f"{name}: kept indices must be a tuple, got {type(kept).__name__}")
            elif others := _not_whole(kept):
                faults.append(f"{name}: kept indices must be whole numbers, got {others[0]!r:.40}")
            elif not kept:
                faults.append(f"{name}: keeps no channel; a group keeps at least one")
            elif any(b <= a for a, b in pairwise(kept)):
                faults.append(f"{name}: kept indices must be strictly increasing")
            elif kept[0] < 0 or kept[-1] >= size:
                faults.append(f"{name}: kept indices must lie in 0..{size - 1}, got {kept[0]}..{kept[-1]}")
        if faults:
            raise PlanError("invalid pruning plan:\n  " + "\n  ".join(faults))

    @classmethod
    def full(cls, groups: Iterable[ChannelGroup]) -> PruningPlan:
        """The plan that removes nothing."""
        sizes = {group.name: group.size for group in groups}
        return cls(sizes, {name: tuple(range(size)) for name, size in sizes.items()})

    @classmethod
    def from_masks(cls, masks: Mapping[str, BoolArray]) -> PruningPlan:
        """Build from one boolean mask per group, shape ``(size,)``, True = keep."""
        return cls(
            {name: len(mask) for name, mask in masks.items()},
            {name: tuple(np.flatnonzero(mask).tolist()) for name, mask in masks.items()},
        )

    def replace(self, kept: Mapping[str, Iterable[int]]) -> PruningPlan:
        """The same plan with the kept indices of some groups exchanged."""
        return PruningPlan(self.sizes, {**self.kept, **{n: tuple(map(_plain, k)) for n, k in kept.items()}})

    def mask(self, name: str) -> BoolArray:
        """Boolean mask of one group, shape ``(size,)``, True = keep."""
        mask = np.zeros(self.sizes[name], dtype=bool)
        mask[list(self.kept[name])] = True
        return mask

    @cached_property
    def widths(self) -> dict[str, int]:
        """Channels left per group."""
        return {name: len(kept) for name, kept in self.kept.items()}

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name the plan's content, whatever the order of its groups."""
        text = json.dumps([[n, self.sizes[n], to_ranges(self.kept[n])] for n in sorted(self.kept)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_full(self) -> bool:
        """Whether nothing is removed."""
        return all(len(kept) == self.sizes[name] for name, kept in self.kept.items())

    def is_within(self, other: PruningPlan) -> bool:
        """Whether every channel kept here is kept in ``other`` too."""
        return self.sizes == other.sizes and all(set(k) <= set(other.kept[n]) for n, k in self.kept.items())

    def to_json(self) -> str:
        """One line of JSON; kept indices are written as ranges (``"0-7,9"``)."""
        groups = {n: {"of": self.sizes[n], "keep": to_ranges(kept)} for n, kept in self.kept.items()}
        return json.dumps({"format": PLAN_FORMAT, "groups": groups})

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read what ``to_json`` wrote.

        Raises:
            PlanError: the text is not JSON of this format, or the plan in it is invalid.
        """
        try:
            data = json.loads(text, object_pairs_hook=_without_repeats)
            if type(data["format"]) is not int or data["format"] != PLAN_FORMAT:
                raise PlanError(f"pruning plan of format {data['format']!r}; this version reads format {PLAN_FORMAT}")
            sizes = {name: _size_of(name, group) for name, group in data["groups"].items()}
            if (total := sum(sizes.values())) > MOST_CHANNELS:
                raise PlanError(f"the groups have {total} channels together, more than {MOST_CHANNELS}")
            kept = {name: _kept_of(name, data["groups"][name]["keep"], size) for name, size in sizes.items()}
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"not a pruning plan written by PruningPlan.to_json: {error!r:.200}") from error
        return cls(sizes, kept)

    def validate(self, graph: HasGroups) -> None:
        """Check that the plan is about exactly the groups of this network.

        Raises:
            PlanError: groups are missing, unknown or of another size; lists all of them.
        """
        sizes = {group.name: group.size for group in graph.groups}
        faults = [f"{n}: not in the plan" for n in sizes.keys() - self.sizes.keys()]
        faults += [f"{n}: no such channel group in this network" for n in self.sizes.keys() - sizes.keys()]
        faults += [
            f"{n}: {self.sizes[n]} channels in the plan, {sizes[n]} in the network"
            for n in sizes.keys() & self.sizes.keys()
            if sizes[n] != self.sizes[n]
        ]
        if faults:
            raise PlanError("the pruning plan belongs to another network:\n  " + "\n  ".join(sorted(faults)))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise PlanError(f"{repeated!r} stands twice in the pruning plan")
    return found


def to_ranges(indices: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` -> ``"0-2,5"``."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            first, last = indices[start], indices[i - 1]
            parts.append(f"{first}" if first == last else f"{first}-{last}")
            start = i
    return ",".join(parts)


def from_ranges(text: str, size: int | None = None) -> tuple[int, ...]:
    """``"0-2,5"`` -> ``(0, 1, 2, 5)``.

    Args:
        text: increasing indices and ranges.
        size: indices must be below it; None = any.

    Raises:
        PlanError: the text is no list of increasing ranges, or goes beyond ``size``; nothing of it is expanded then.
    """
    ranges: list[range] = []
    for part in text.split(","):
        if (found := RANGE.fullmatch(part)) is None:
            raise PlanError(f"{part[:40]!r} is no index and no range such as '0-7'")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or (ranges and first < ranges[-1].stop):
            raise PlanError(f"kept indices must be strictly increasing, got {part!r}")
        if size is not None and last >= size:
            raise PlanError(f"kept indices must lie in 0..{size - 1}, got {part!r}")
        ranges.append(range(first, last + 1))
    return tuple(chain.from_iterable(ranges))


def _size_of(name: str, group: Any) -> int:
    """Size of one group of a plan's JSON, which has kept indices too.

    Raises:
        PlanError: it is something else.
    """
    if not isinstance(group, dict) or not {"of", "keep"} <= group.keys():
        raise PlanError(f"{name}: expected {{'of': channels, 'keep': '0-7,9'}}, got {str(group)[:80]}")
    size: int = group["of"]
    if type(size) is not int or not 0 < size <= MOST_CHANNELS:
        raise PlanError(f"{name}: 'of' must be a number of channels from 1 to {MOST_CHANNELS}, got {str(size)[:40]}")
    if not isinstance(group["keep"], str):
        raise PlanError(f"{name}: 'keep' must be a text such as '0-7,9', got {str(group['keep'])[:40]}")
    return size


def _kept_of(name: str, keep: str, size: int) -> tuple[int, ...]:
    try:
        return from_ranges(keep, size)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from None


def _plain(index: Any) -> Any:
    """NumPy's whole numbers as Python's; anything else as it is, for the plan to refuse."""
    return int(index) if isinstance(index, np.integer) else index


def _not_whole(values: Iterable[Any]) -> list[Any]:
    """The first value that is no whole number of Python's or NumPy's (a boolean is none), if there is one."""
    kinds = {kind for kind in set(map(type, values)) if kind is bool or not issubclass(kind, (int, np.integer))}
    return [next(value for value in values if type(value) in kinds)] if kinds else []


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose: the prunable groups and the widths allowed for each.

    Args:
        sizes: channels per prunable group in the unpruned network, in network order.
        allowed: per group, the allowed widths in increasing order; the last one is the full size.
        full: the plan that removes nothing, over *all* groups of the network (frozen ones included).
        readers: layers that read a group's channels, where that is known: many for a residual stream.
    """

    sizes: Mapping[str, int]
    allowed: Mapping[str, tuple[int, ...]]
    full: PruningPlan = field(repr=False)
    readers: Mapping[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        groups: Sequence[ChannelGroup],
        *,
        channel_multiple: int | Mapping[str, int] = 1,
        min_keep_ratio: float = 0.0,
        frozen: Iterable[str] = (),
    ) -> SearchSpace:
        """Widths that are multiples of ``channel_multiple``, at least ``min_keep_ratio`` of the size.

        A group too small for two steps of the multiple uses the multiple halved until it has two
        (16 channels, multiple 16 -> widths 8 and 16), so that no group is left out by rounding.

        Args:
            channel_multiple: for all groups, or per group (1 where it names none).

        Raises:
            PlanError: ``frozen`` names a group that does not exist, or nothing is left to prune.
        """
        names = {group.name for group in groups}
        unknown = sorted(set(frozen) - names)
        if unknown:
            raise PlanError(f"cannot freeze unknown channel groups {unknown}; the network has {sorted(names)}")
        allowed = {}
        for group in groups:
            if group.name in set(frozen):
                continue
            step = channel_multiple if isinstance(channel_multiple, int) else channel_multiple.get(group.name, 1)
            while step > 1 and 2 * step > group.size:
                step //= 2
            least = max(1, min_keep_ratio * group.size)
            widths = [w for w in range(step, group.size, step) if w >= least] + [group.size]
            if len(widths) > 1:
                allowed[group.name] = tuple(widths)
        if not allowed:
            raise PlanError("the search space is empty: no channel group is left to prune")
        sizes = {group.name: group.size for group in groups if group.name in allowed}
        readers = {group.name: sum(member.reads for member in group.members) for group in groups}
        return cls(sizes, allowed, PruningPlan.full(groups), readers)

    @property
    def names(self) -> tuple[str, ...]:
        """The groups' names, in network order: that of every width vector."""
        return tuple(self.sizes)

    def over(self, names: Collection[str]) -> SearchSpace:
        """The same widths over some of the groups; the others keep all their channels.

        Raises:
            PlanError: none of them is in this space.
        """
        allowed = {name: widths for name, widths in self.allowed.items() if name in names}
        if not allowed:
            raise PlanError(f"none of {sorted(names)} can be pruned here; the search space has {list(self.names)}")
        return SearchSpace({name: self.sizes[name] for name in allowed}, allowed, self.full, self.readers)

    def in_multiples(self, multiple: int) -> SearchSpace:
        """Of these widths those that are multiples of a number too, and the full ones.

        Groups too small for two steps use the number halved until they have two, as in ``of``; a group that then has
        none of these widths but the full one keeps its own.
        """
        allowed = {}
        for name, widths in self.allowed.items():
            step = multiple
            while step > 1 and 2 * step > self.sizes[name]:
                step //= 2
            coarse = tuple(width for width in widths if width % step == 0 or width == self.sizes[name])
            allowed[name] = coarse if len(coarse) > 1 else widths
        return replace(self, allowed=allowed)

    def encode(self, plan: PruningPlan) -> IntArray:
        """Width vector of a plan, shape ``(groups,)``, in the order of ``names``."""
        return np.array([len(plan.kept[name]) for name in self.names], dtype=np.int64)

    def decode(self, widths: Sequence[int], saliency: Mapping[str, npt.NDArray[np.float64]]) -> PruningPlan:
        """Plan of a width vector: each group keeps its most salient channels (ties: lower index first).

        Args:
            widths: shape ``(groups,)``, in the order of ``names``.
            saliency: per group, shape ``(size,)``, higher = keep.
        """
        kept = {}
        for name, width in zip(self.names, widths, strict=True):
            order = np.argsort(-saliency[name], kind="stable")
            kept[name] = sorted(order[: int(width)].tolist())
        return self.full.replace(kept)

    def snap(self, name: str, width: float) -> int:
        """The allowed width nearest to ``width`` (ties: the smaller)."""
        return min(self.allowed[name], key=lambda w: (abs(w - width), w))

    def below(self, name: str, width: int) -> int:
        """The largest allowed width smaller than ``width``, or ``width`` itself if it is the smallest."""
        return max((w for w in self.allowed[name] if w < width), default=width)

    def above(self, name: str, width: int) -> int:
        """The smallest allowed width larger than ``width``, or ``width`` itself if it is the full one."""
        return min((w for w in self.allowed[name] if w > width), default=width)

    def smallest(self) -> PruningPlan:
        """Every group at its smallest allowed width (its first channels): the bound of what a search can reach."""
        return self.full.replace({name: range(self.allowed[name][0]) for name in self.names})
