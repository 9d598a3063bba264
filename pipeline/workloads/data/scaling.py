"""Pixels as networks take them."""

from __future__ import annotations

import torch
from torch import Tensor


class Scaling:
    """Takes the mean away and divides by the deviation; both are brought to a device once, not with every batch.

    Args:
        mean, std: shape (1, channels, 1, 1), in the unit of the pixels.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self._parts = {mean.device: (mean, std)}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels of shape (n, channels, height, width), as float32."""
        mean, std = self._on(pixels.device)
        return (pixels.float() - mean).div_(std)

    def colour(self, device: torch.device) -> Tensor:
        """The mean, rounded to an 8-bit colour, shape (channels,)."""
        return self._on(device)[0].flatten().round().to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._parts:
            mean, std = next(iter(self._parts.values()))
            self._parts[device] = (mean.to(device), std.to(device))
        return self._parts[device]
