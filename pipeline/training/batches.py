"""Batches of a training: which images every step sees, in which order, and how they are altered.

The order follows from the training's seed and the epoch's number, what is drawn for an image from these and the image:
so a training that was killed goes on with the same batches, in the middle of an epoch too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.workloads import Split, Workload
from secateur.pipeline.workloads.data.seeds import draw

Batch = tuple[Tensor, Tensor]
"""Images and targets, both on the compute device."""


class Batches(Protocol):
    """What a training loop iterates over.

    With several processes each gets its part of every batch: parts are consecutive, differ by one image at most, and
    together are the batch that one process alone would see. Where a batch has fewer images than there are processes,
    some parts are empty.
    """

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (from 0), from its step ``first_step`` on.

        It need not be exhausted; another epoch may be begun at any time, and ends the one before.
        """

    def close(self) -> None:
        """Give back what it holds: worker processes and memory. It may be called more than once."""


def batches_of(
    workload: Workload,
    split: Split,
    recipe: Recipe,
    *,
    seed: int,
    compute: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """The batches of a training on a split.

    Args:
        rank: which of the processes this one is, from 0.
        world_size: how many processes train together; ``recipe.batch_size`` is that of all of them.
    """
    return _InThisProcess(workload, split, recipe.batch_size, seed, compute, rank, world_size)


@dataclass(frozen=True)
class _InThisProcess:
    """Batches that are made when they are asked for."""

    workload: Workload
    split: Split
    batch_size: int
    seed: int
    compute: torch.device
    rank: int
    world_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, number))
        order = torch.randperm(len(self.split), generator=generator)
        seeds = draw(len(self.split), generator)
        for chosen in torch.split(order, self.batch_size)[first_step:]:
            part = chosen.tensor_split(self.world_size)[self.rank]
            images, targets = self.workload.read(self.split, part, seeds[part])
            yield self.workload.prepare(images, targets, seeds[part], self.compute)

    def close(self) -> None:
        pass


def epoch_seed(seed: int, number: int) -> int:
    """What all randomness of an epoch begins with."""
    return seed * 100_003 + number
