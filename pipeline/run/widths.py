"""Which widths pay on a device, per channel group: the step of the search's widths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from secateur.device_profiles.layers import KINDS, LayerKind
from secateur.device_profiles.profile import Multiples
from secateur.device_profiles.staircase import FLOAT
from secateur.pruning.channels import ChannelGraph


def common_multiples(devices: Iterable[Multiples]) -> Multiples:
    """Per kind of layer, the least width that suits all devices: the least common multiple of theirs."""
    found = list(devices)
    return Multiples(**{kind: math.lcm(*(getattr(of, kind) for of in found)) for kind in KINDS})


def group_multiples(graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]], of: Multiples) -> dict[str, int]:
    """The channel multiple of every group: the smallest that suits every layer which makes or reads its channels.

    Where a layer has several channels per channel of the group (attention heads, a flatten), fewer do.

    Args:
        shapes: of the network's tensors, by name.
        of: the device's multiple per kind of layer.
    """
    return {
        group.name: math.lcm(
            *(
                getattr(of, kind) // math.gcd(getattr(of, kind), member.index.shape[1])
                for member in group.members
                if (kind := _kind(member.tensor, graph, shapes))
            )
        )
        for group in graph.groups
    }


def probed_in(ships: Sequence[str]) -> tuple[str, ...]:
    """The precisions in which widths have to pay, of those that may ship: integers have steps of their own."""
    if set(ships) <= {FLOAT}:
        return (FLOAT,)
    from secateur.export.quantize import precision  # imports onnx, which takes long

    return tuple(dict.fromkeys(name if precision(name).calibrated else FLOAT for name in ships))


STREAM = "residual stream"


def kinds_of_groups(graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Channel group -> its kind: the residual stream, or the kinds of layers that make or read its channels.

    Args:
        shapes: of the network's tensors, by name.
    """
    found = {}
    for group in graph.groups:
        layers = {_kind(member.tensor, graph, shapes) for member in group.members}
        found[group.name] = STREAM if group.name in graph.summed else " and ".join(k for k in KINDS if k in layers)
    return found


def _kind(tensor: str, graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]]) -> LayerKind | None:
    """The kind of layer a weight belongs to; None for what is no convolution or linear layer (a bias, a norm)."""
    shape = shapes[tensor]
    if len(shape) < 2:
        return None
    if len(shape) == 2:
        return "linear"
    if shape[1] == 1 and tensor in graph.scaled_groups:
        return "depthwise"
    return "pointwise" if math.prod(shape[2:]) == 1 else "conv"
