"""The layers that take a network's time, as numbers: what predicts latency sees this and nothing of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
LayerKind = Literal["conv", "pointwise", "depthwise", "linear"]
KINDS: tuple[LayerKind, ...] = get_args(LayerKind)


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Convolutions and linear layers in the order they run, and how their sizes follow the channel groups' widths.

    Args:
        names: the layers' weights, shape ``(layers,)``.
        kinds: shape ``(layers,)``; ``conv`` = larger than 1 x 1 and not depthwise.
        taps: kernel positions of a filter (9 for 3 x 3), shape ``(layers,)``.
        pixels: output positions (height times width; rows of a linear layer), shape ``(layers,)``.
        in_pixels: input positions, shape ``(layers,)``.
        groups: names of the channel groups, in the order of width vectors.
        constant: input and output channels that no group owns, shape ``(layers, 2)``. Of a grouped convolution the
            input channels are those of one of its groups; a depthwise one has 1.
        per_width: channels per channel of a group, shape ``(layers, 2, groups)``.
    """

    names: tuple[str, ...]
    kinds: tuple[LayerKind, ...]
    taps: IntArray
    pixels: IntArray
    in_pixels: IntArray
    groups: tuple[str, ...]
    constant: IntArray
    per_width: IntArray

    def channels(self, widths: IntArray) -> IntArray:
        """Input and output channels of every layer, shape ``(plans, layers, 2)``.

        Args:
            widths: shape ``(plans, groups)``, in the order of ``groups``.
        """
        channels: IntArray = self.constant + np.einsum(
            "pg,lcg->plc", np.asarray(widths, dtype=np.int64), self.per_width
        )
        return channels

    @cached_property
    def varies(self) -> BoolArray:
        """Whether a layer's input and output channels follow the width of a group, shape ``(layers, 2)``."""
        found: BoolArray = (self.per_width != 0).any(axis=2)
        return found

    @cached_property
    def neighbours(self) -> FloatArray:
        """Shares of the layers that have channels in common with a layer, shape ``(layers, layers)``.

        Column ``j`` has ``1 / n`` at each of the ``n`` neighbours of layer ``j``, and is 0 where it has none.
        """
        touched = (self.per_width != 0).any(axis=1).astype(np.float64)
        common = (touched @ touched.T > 0).astype(np.float64)
        np.fill_diagonal(common, 0.0)
        shares: FloatArray = common / np.maximum(common.sum(axis=0), 1.0)
        return shares

    def kinds_of(self, group: str) -> set[LayerKind]:
        """The kinds of layers that produce or read the channels of a group."""
        column = self.groups.index(group)
        touched = (self.per_width[:, :, column] != 0).any(axis=1)
        return {kind for kind, hit in zip(self.kinds, touched, strict=True) if hit}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        arrays = {key: getattr(self, key).tolist() for key in ("taps", "pixels", "in_pixels", "constant", "per_width")}
        return {"names": list(self.names), "kinds": list(self.kinds), "groups": list(self.groups), **arrays}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` gave."""
        arrays = {
            key: np.array(data[key], dtype=np.int64) for key in ("taps", "pixels", "in_pixels", "constant", "per_width")
        }
        return cls(tuple(data["names"]), tuple(data["kinds"]), groups=tuple(data["groups"]), **arrays)
