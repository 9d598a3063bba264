"""Channel groups, pruning plans and the space of plans: pure data made of names and numbers, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

PLAN_FORMAT = 1


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
    """A traced network, as far as plans are concerned: ``pruning.channels.ChannelGraph``."""

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
            repeated or out of range. All faults are reported together.
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        faults = [f"{name}: named in sizes or kept only" for name in sorted(self.sizes.keys() ^ self.kept.keys())]
        for name in sorted(self.sizes.keys() & self.kept.keys()):
            size, kept = self.sizes[name], self.kept[name]
            if not kept:
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
        return PruningPlan(self.sizes, {**self.kept, **{n: tuple(int(i) for i in k) for n, k in kept.items()}})

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
            data = json.loads(text)
            if data["format"] != PLAN_FORMAT:
                raise PlanError(f"pruning plan of format {data['format']!r}; this version reads format {PLAN_FORMAT}")
            sizes = {name: int(group["of"]) for name, group in data["groups"].items()}
            kept = {name: from_ranges(group["keep"]) for name, group in data["groups"].items()}
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"not a pruning plan written by PruningPlan.to_json: {error!r}") from error
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


def from_ranges(text: str) -> tuple[int, ...]:
    """``"0-2,5"`` -> ``(0, 1, 2, 5)``."""
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return tuple(indices)


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose: the prunable groups and the widths allowed for each.

    Args:
        sizes: channels per prunable group in the unpruned network, in network order.
        allowed: per group, the allowed widths in increasing order; the last one is the full size.
        full: the plan that removes nothing, over *all* groups of the network (frozen ones included).
    """

    sizes: Mapping[str, int]
    allowed: Mapping[str, tuple[int, ...]]
    full: PruningPlan = field(repr=False)

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
        return cls(sizes, allowed, PruningPlan.full(groups))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

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
