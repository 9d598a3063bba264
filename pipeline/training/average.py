"""The moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and batch-norm statistics (Polyak and Juditsky 1992).

    Args:
        model: a network; the average is a copy of it, ``.module``, and takes in its weights by ``update_parameters``.
        decay: share of the old average that a late step keeps; early steps keep (1 + step) / (10 + step), and the
            first begins with the network's weights.
    """

    @torch.no_grad()
    def update(averages: Tensors, values: Tensors, num_averaged: Tensor | int) -> None:
        step = int(num_averaged)  # kept on the CPU
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + step) / (10 + step)))
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
