"""Batches of a training: which images every step sees, in which order, and how they are altered.

The order follows from the training's seed and the epoch's number, what is drawn for an image from these and the image,
what is drawn for a batch from these and the step. So a training that was killed goes on with the same batches, in the
middle of an epoch too; and neither how many processes read images, nor how many train, changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.errors import UserError
from secateur.pipeline.training.reading import Reader, reader_of
from secateur.pipeline.workloads import Split, Workload
from secateur.pipeline.workloads.data.seeds import draw, seeded

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

        Raises:
            UserError: an image cannot be read.
            SurroundingsError: a process that reads images died.
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
    """The batches of a training on a split; nothing is read before the first one is asked for.

    Args:
        rank: which of the processes this one is, from 0.
        world_size: how many processes train together; ``recipe.batch_size`` is that of all of them.

    Raises:
        UserError: the recipe mixes images whose classes cannot be mixed.
    """
    reader = reader_of(workload, split, recipe, compute, world_size)
    mix = mixing_of(workload, recipe)
    return _Drawn(workload, len(split), recipe.batch_size, seed, compute, rank, world_size, mix, reader)


def sizes_of(num_images: int, batch_size: int) -> list[int]:
    """Images in each batch of an epoch, shape ``(batches,)``.

    The last batch has what is left over. One image alone joins the batch before: where a map is one pixel, batch norm
    has nothing to normalise an image by.
    """
    whole, left = divmod(num_images, batch_size)
    if left == 1 and whole and batch_size > 1:
        return [batch_size] * (whole - 1) + [batch_size + 1]
    return [batch_size] * whole + [left] * (left > 0)


def mixing_of(workload: Workload, recipe: Recipe) -> Callable[[Tensor, Tensor], Batch] | None:
    """What mixes the images of a batch in pairs, and their classes in the same share; None = nothing does.

    mixup: Zhang et al. 2018, arXiv 1710.09412; CutMix: Yun et al. 2019, arXiv 1905.04899.

    Raises:
        UserError: the images are not of one class each.
    """
    check_mixing(workload, recipe)
    if not (recipe.mixup or recipe.cutmix):
        return None
    from torchvision.transforms import v2  # imported here: it takes long

    kinds = {v2.MixUp: recipe.mixup, v2.CutMix: recipe.cutmix}
    made: list[Any] = [kind(alpha=alpha, num_classes=workload.num_classes) for kind, alpha in kinds.items() if alpha]
    return made[0] if len(made) == 1 else v2.RandomChoice(made)  # type: ignore[no-any-return]


def check_mixing(workload: Workload, recipe: Recipe) -> None:
    """See that a recipe mixes images only where they are of one class each.

    Raises:
        UserError: it mixes others.
    """
    if (recipe.mixup or recipe.cutmix) and workload.num_classes is None:
        raise UserError(
            "mixup and cutmix mix two images and their classes, so they need images of one class each, as "
            "classification has them; set both to 0 in the recipe"
        )


@dataclass(frozen=True)
class _Part:
    """What a process has of a batch.

    Args:
        read: positions in the split of what it reads, at least one.
        used: those of them that it trains on; one before may be mixed into the first of these.
    """

    read: Tensor
    used: slice


@dataclass(frozen=True)
class _Drawn:
    """Batches that are drawn from seeds, whoever reads them."""

    workload: Workload
    num_images: int
    batch_size: int
    seed: int
    compute: torch.device
    rank: int
    world_size: int
    mix: Callable[[Tensor, Tensor], Batch] | None
    reader: Reader

    def __len__(self) -> int:
        return len(sizes_of(self.num_images, self.batch_size))

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, number))
        order = torch.randperm(self.num_images, generator=generator)
        images, steps = draw(self.num_images, generator), draw(len(self), generator).tolist()
        sizes = sizes_of(self.num_images, self.batch_size)
        parts = [self._part(chosen) for chosen in torch.split(order, sizes)[first_step:]]
        read = self.reader.read([(part.read, images[part.read]) for part in parts])
        for part, step_seed, (pixels, targets, seeds) in zip(parts, steps[first_step:], read, strict=True):
            batch = self._mixed(self.workload.prepare(pixels, targets, seeds, self.compute), step_seed)
            yield batch[0][part.used], batch[1][part.used]

    def _mixed(self, batch: Batch, seed: int) -> Batch:
        if self.mix is None:
            return batch
        with seeded(seed):
            images, targets = self.mix(*batch)
        return images.contiguous(memory_format=torch.channels_last), targets

    def close(self) -> None:
        self.reader.close()

    def _part(self, chosen: Tensor) -> _Part:
        """This process's part of a batch; images are mixed with the one before, so that is read as well."""
        places = torch.arange(len(chosen)).tensor_split(self.world_size)[self.rank]
        if self.world_size == 1:
            return _Part(chosen, slice(None))
        if not len(places):
            return _Part(chosen[:1], slice(0, 0))
        if self.mix is None:
            return _Part(chosen[places], slice(None))
        return _Part(chosen[torch.cat([places[:1] - 1, places])], slice(1, None))


def epoch_seed(seed: int, number: int) -> int:
    """What all randomness of an epoch begins with."""
    return seed * 100_003 + number
