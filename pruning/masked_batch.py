"""Several masks of one network in one forward pass: every mask has a part of the batch to itself.

A channel that is gone is one that no layer reads any more, so each layer that reads a group gets its input times the
masks, one row per part of the batch. The network is prepared once, whatever the number of masks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import Member, PruningPlan
from secateur.pruning.tracer import tensors_of

READS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
"""Torch functions whose weight has the channels that it reads in dimension 1."""


class MaskedBatchError(ValueError):
    """The masks of this network cannot share a batch."""


def outputs_under_masks(
    network: nn.Module, graph: ChannelGraph, plans: Sequence[PruningPlan], images: Tensor
) -> list[Any]:
    """What the masked networks give for the same images, one answer per plan, in order.

    Args:
        network: of the unpruned shapes, in eval mode.
        graph: the channel groups.
        plans: what each mask keeps.
        images: shape ``(n, ...)``, as the network takes them.

    Raises:
        MaskedBatchError: zeros would not do, or something other than a linear layer or a plain convolution reads
            channels.
    """
    if graph.mixed or graph.aliases:
        raise MaskedBatchError("an operator without weights sees the removed channels, or weights are shared")
    masks = _masks(network, graph, plans)
    with _Masked(masks, len(plans)) as masked, torch.inference_mode():
        outputs = network(images.repeat(len(plans), *[1] * (images.ndim - 1)))
    if left := masks.keys() - masked.seen:
        raise MaskedBatchError(f"{len(left)} weights that read channels were not met in linear layers or convolutions")
    leaves, tree = pytree.tree_flatten(outputs)
    parts = [torch.split(leaf, len(images)) if isinstance(leaf, Tensor) else [leaf] * len(plans) for leaf in leaves]
    return [pytree.tree_unflatten(list(own), tree) for own in zip(*parts, strict=True)]


def _masks(network: nn.Module, graph: ChannelGraph, plans: Sequence[PruningPlan]) -> dict[int, Tensor]:
    """Identity of a weight -> its input's mask per plan, shape ``(plans, inputs)``; of groups that lose something."""
    tensors = tensors_of(network)[0]
    readers: Mapping[str, list[tuple[str, Member]]] = defaultdict(list)
    for group in graph.groups:
        if any(plan.widths[group.name] < group.size for plan in plans):
            for member in (m for m in group.members if m.reads):
                readers[member.tensor].append((group.name, member))
    masks = {}
    for tensor, members in readers.items():
        weight = tensors[tensor]
        if any(member.dim != 1 for _, member in members):
            raise MaskedBatchError(f"{tensor} does not read its channels in dimension 1")
        mask = torch.ones(len(plans), weight.shape[1], dtype=weight.dtype)
        for name, member in members:
            for row, plan in zip(mask, plans, strict=True):
                row[torch.from_numpy(member.index[~plan.mask(name)].ravel())] = 0
        masks[id(weight)] = mask.to(weight.device)
    return masks


class _Masked(TorchFunctionMode):
    """Multiplies what layers read by their masks.

    Args:
        masks: identity of a weight -> shape ``(parts, inputs)``.
        parts: of the batch.

    Attributes:
        seen: identities of the weights that were met.
    """

    def __init__(self, masks: Mapping[int, Tensor], parts: int) -> None:
        super().__init__()
        self.masks, self.parts, self.seen = masks, parts, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        mask = self.masks.get(id(args[1])) if name in READS and len(args) > 1 else None
        if mask is not None:
            self.seen.add(id(args[1]))
            args = (self._masked(args[0], mask, dim=-1 if name == "linear" else 1), *args[1:])
        return func(*args, **(kwargs or {}))

    def _masked(self, source: Tensor, mask: Tensor, dim: int) -> Tensor:
        """The input of a layer, each part of the batch times its row."""
        if source.shape[dim] != mask.shape[1] or len(source) % self.parts:
            raise MaskedBatchError("a convolution in groups, or one that does not see the batch, reads channels")
        rows = mask.repeat_interleave(len(source) // self.parts, dim=0)
        shape = [len(source), *[1] * (source.ndim - 1)]
        shape[dim] = mask.shape[1]
        return source * rows.view(shape)
