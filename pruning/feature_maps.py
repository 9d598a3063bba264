"""How alike channels are: cosine distances between their mean feature maps.

The distances that ACP clusters (Chang, Lu, Xue, Xu, Wei, Applied Intelligence 2022, arXiv 2101.06407): the maps of a
layer are averaged over some images, and each channel's mean map is one vector.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.pruning.channels import ChannelGraph, layer_of
from secateur.pruning.plan import IntArray, Member
from secateur.pruning.rules import weight_name
from secateur.pruning.saliency import Look
from secateur.pruning.tracer import Entered, modules_entered, tensors_of, undisturbed

FloatArray = npt.NDArray[np.float64]

LAYERS = (
    {"linear": (0, 1)} | {f"conv{n}d": (0, 1) for n in (1, 2, 3)} | {f"conv_transpose{n}d": (1, 0) for n in (1, 2, 3)}
)
"""Torch function -> dimensions of its weight that hold the output's and the input's channels."""


def feature_distance(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[Any],
    *,
    after_activation: bool = False,
    concat: int = 1,
    max_positions: int = 1444,
) -> dict[str, FloatArray]:
    """Cosine distances between channels' mean feature maps. The model is left as it was.

    The maps are those of the layers that produce a group, as they come out of the convolution or product, before batch
    norm. Where several layers produce a group (the stages of a residual network), their distances are averaged, so that
    a radius means the same everywhere; depthwise convolutions, which only pass channels on, are left out. A layer that
    runs several times per image (a head that is shared between scales) has the maps of all its runs side by side. A
    layer whose maps have one position (after a flatten) is described by its values on single images.

    A group none of whose layers is seen (weights used by fused attention, or outside of convolutions and products) gets
    the cosine distances between the weights that produce its channels.

    Args:
        model: the traced network, or one of its shapes.
        graph: its channel groups.
        batches: images, shape ``(n, ...)``, or what else the forward takes (a list of images); a tuple is several
            positional arguments. On the model's device.
        after_activation: the maps that the layers reading a group are given instead (after norm and activation).
        concat: parts the images are dealt into; maps are averaged within each part and put side by side.
        max_positions: positions of a map; larger ones are average-pooled.

    Returns:
        Group name -> shape ``(size, size)``, in 0..2, symmetric, zero on the diagonal. Channels whose maps are zero are
        at distance 0 from one another and 1 from all others.

    Raises:
        ValueError: there are no images, an argument is below 1, or feature maps are not finite (names the group).
    """
    if concat < 1 or max_positions < 1:
        raise ValueError(f"concat and max_positions must be 1 or more, got {concat} and {max_positions}")
    with undisturbed(model), modules_entered(model) as entered:
        tensors = tensors_of(model)[0]
        watched = {g.name: _watched(Look(g, tensors, {}), graph, after_activation) for g in graph.groups}
        maps = _Maps(tensors, watched.values(), entered, concat, max_positions)
        num_batches = 0
        for batch in batches:
            maps.begin()
            with maps:
                model(*batch if isinstance(batch, tuple) else (batch,))
            num_batches += 1
        if num_batches == 0:
            raise ValueError("feature maps need images: there is no batch")
        return {g.name: _distance(Look(g, tensors, {}), watched[g.name], maps) for g in graph.groups}


def cosine_distance(vectors: Tensor) -> FloatArray:
    """Shape ``(n, k) -> (n, n)``; zero vectors are at distance 0 from one another and 1 from all others."""
    vectors = vectors.double()
    norms = vectors.norm(dim=1, keepdim=True)
    zero = norms[:, 0] <= 1e-12 * norms.max()
    unit = torch.where(zero[:, None], 0, vectors / norms.clamp_min(1e-300))
    distance = (1 - unit @ unit.T).clamp(0, 2)
    distance = (distance + distance.T) / 2
    distance[distance < 1e-12] = 0  # equal channels, up to rounding
    distance[zero[:, None] & zero[None]] = 0
    distance.fill_diagonal_(0)
    result: FloatArray = distance.cpu().numpy()
    return result


Sides = list[list[Member]]
"""Where a group's maps may be taken: the first list of members that are seen in a forward."""


def _watched(look: Look, graph: ChannelGraph, after_activation: bool) -> Sides:
    """The readers, if their inputs are wanted; then the producers, without those that pass channels on one by one."""
    mixing = [m for m in look.producers if m.tensor not in graph.scaled_groups]
    return [look.readers] * after_activation + [mixing or look.producers]


def _distance(look: Look, sides: Sides, maps: _Maps) -> FloatArray:
    """Shape ``(size, size)``: the mean over the layers that were seen; of weights, where none was."""
    seen = [[v for member in members if (v := maps.vectors(member)) is not None] for members in sides]
    vectors = next(filter(None, seen), None) or [torch.cat([look.rows(m) for m in look.producers], dim=1)]
    if not all(bool(v.isfinite().all()) for v in vectors):
        raise ValueError(f"feature maps of {look.group.name!r} are not finite; look at the weights and the images")
    mean: FloatArray = np.mean([cosine_distance(v) for v in vectors], axis=0)
    return mean


def _rows(values: Tensor, index: IntArray) -> Tensor:
    """The entries that belong to each channel side by side, shape ``(positions, n) -> (size, k n)``."""
    return values[torch.from_numpy(index).to(values.device)].flatten(1)


@dataclass
class _Mean:
    """Sums of one layer's maps in one of its runs per image.

    Args:
        shape: positions the maps are pooled to.
        sums: shape ``(parts, channels, positions)``.
        counts: shape ``(parts,)``, maps in each sum.
    """

    shape: tuple[int, ...]
    sums: Tensor
    counts: Tensor

    def add(self, maps: Tensor) -> None:
        """Deal out maps of shape ``(rows, channels, positions)``, one after the other."""
        parts, start = len(self.counts), int(self.counts.sum())
        for first in range(min(parts, len(maps))):
            dealt = maps[first::parts]
            self.sums[(start + first) % parts] += dealt.sum(dim=0, dtype=torch.float64)
            self.counts[(start + first) % parts] += len(dealt)

    def value(self) -> Tensor:
        """Shape ``(channels, parts * positions)``; parts without a map are zero."""
        return (self.sums / self.counts.clamp_min(1)[:, None, None]).movedim(0, 1).flatten(1)


Side = tuple[str, int]
"""A weight, and its dimension that holds the output's or the input's channels."""


class _Maps(TorchFunctionMode):
    """Averages what goes into or comes out of convolutions and products with the weights of channel groups."""

    def __init__(
        self, tensors: Mapping[str, Tensor], watched: Iterable[Sides], entered: Entered, concat: int, max_positions: int
    ) -> None:
        super().__init__()
        self.entered, self.concat, self.max_positions = entered, concat, max_positions
        self.means: dict[Side, list[_Mean]] = {}
        self.width: dict[Side, int] = {}
        """Positions per channel along the dimension, more than 1 after a flatten."""
        self.by_weight: dict[int, list[str]] = defaultdict(list)
        self.by_module: dict[str, list[str]] = defaultdict(list)
        self.runs: dict[Side, int] = defaultdict(int)
        for member in (member for sides in watched for members in sides for member in members):
            self.means[member.tensor, member.dim] = []
            self.width[member.tensor, member.dim] = member.index.shape[1]
            self.by_weight[id(tensors[member.tensor])].append(member.tensor)
            if weight_name(member.tensor).rpartition(".")[2] == "weight":
                self.by_module[layer_of(member.tensor)].append(member.tensor)

    def begin(self) -> None:
        """A forward begins."""
        self.runs.clear()

    def vectors(self, member: Member) -> Tensor | None:
        """Shape ``(size, k)``: each channel's mean maps in one layer; None if the layer was not seen."""
        means = self.means[member.tensor, member.dim]
        return torch.cat([_rows(mean.value(), member.index) for mean in means], dim=1) if means else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        dims = LAYERS.get(func.__name__)
        if dims is not None:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._see(weight, dims, out, x)
        return out

    def _see(self, weight: Tensor, dims: tuple[int, int], out: Tensor, x: Tensor) -> None:
        """Add the maps of one run to those of the groups whose weight this is."""
        names = self.by_weight.get(id(weight))
        if names is None and not isinstance(weight, nn.Parameter):  # made from the module's own (a parametrization)
            names = self.by_module.get(self.entered.stack[-1])
        if weight.ndim < 2:
            return
        axis = -1 if dims == (0, 1) and weight.ndim == 2 else 1 - weight.ndim  # of the channels, from the end
        for name in dict.fromkeys(names or ()):
            for dim, tensor in zip(dims, (out, x), strict=True):
                if (name, dim) in self.means and tensor.shape[axis] == weight.shape[dim]:  # not so in grouped ones
                    self._add((name, dim), tensor.detach(), axis)

    def _add(self, side: Side, tensor: Tensor, axis: int) -> None:
        """Add the maps of one run, channels along ``axis``."""
        means, run = self.means[side], self.runs[side]
        self.runs[side] += 1
        lone = tensor.ndim == -axis  # no batch dimension
        maps = (tensor[None] if lone else tensor).movedim(axis, 1)
        if run == len(means):
            shape = _pooled(tuple(maps.shape[2:]), self.max_positions)
            parts = self.concat if math.prod(shape) * self.width[side] > 1 else self.max_positions
            sums = torch.zeros(parts, maps.shape[1], math.prod(shape), dtype=torch.float64, device=maps.device)
            means.append(_Mean(shape, sums, sums.new_zeros(parts)))
        pooled = _pool(maps.float(), means[run].shape)
        means[run].add(pooled.reshape(*pooled.shape[:2], -1))


def _pooled(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """Positions to pool to: the same sides, shrunk by one factor, with at most ``most`` in all."""
    if math.prod(shape) <= most:
        return tuple(shape)
    if len(shape) != 2:
        return (most,)
    factor = math.sqrt(most / math.prod(shape))
    height = max(1, math.floor(shape[0] * factor))
    return height, max(1, min(math.floor(shape[1] * factor), most // height))


def _pool(maps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Average pooling of shape ``(rows, channels, ...)`` to the given positions."""
    if tuple(maps.shape[2:]) == shape:
        return maps
    if len(shape) == 2:
        return F.adaptive_avg_pool2d(maps, shape)
    pooled: Tensor = F.adaptive_avg_pool1d(maps.flatten(2), math.prod(shape))
    return pooled
