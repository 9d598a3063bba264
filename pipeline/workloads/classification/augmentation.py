"""Augmentation of labelled images: shifts and mirroring of whole batches, everything else image by image.

Image by image it is torchvision's ``transforms.v2``, on 8-bit pixels, in any process; on batches it is done where
training computes. All that is drawn for an image follows from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secateur.pipeline.workloads import Split
from secateur.pipeline.workloads.data.decode import Fitting, Picture, Pixels
from secateur.pipeline.workloads.data.seeds import part_of, seeded
from secateur.pipeline.workloads.data.sources import ArraySource, as_image

if TYPE_CHECKING:
    from torchvision.transforms import v2

Augment = Literal["none", "shift", "flip_shift", "random_resized_crop"]
SHIFTS = ("shift", "flip_shift")
"""What is done to batches."""
ASPECT = (3 / 4, 4 / 3)
"""How much wider or higher than the frame a crop may be, as in Szegedy et al. 2015 (arXiv 1409.4842), section 6."""
LOOKED_AT, SMALLEST_PHOTOGRAPH = 64, 64
"""So many training images say whether images are photographs, and half of them have short sides of so many pixels."""


def are_photographs(split: Split) -> bool:
    """Whether images come from files, differ in size, and are not tiny, by the first ones of a split."""
    if isinstance(split.source, ArraySource):
        return False
    sizes = [split.source.size(int(index)) for index in split.indices[:LOOKED_AT]]
    return len(set(sizes)) > 1 and float(np.median([min(size) for size in sizes])) >= SMALLEST_PHOTOGRAPH


@dataclass(frozen=True)
class ByImage:
    """What is done to every training image by itself.

    Args:
        fitting: how images are brought to one size where nothing is drawn.
        crop_scale: smallest and largest share of an image's area that is cut out and scaled to that size; None = what
            the fitting gives.
        flip: how likely a crop is mirrored.
        trivial: whether one of torchvision's changes of colour or geometry, of any strength, follows (TrivialAugment,
            Mueller and Hutter 2021, arXiv 2103.10158).
        erasing: how likely a rectangle is painted over at last (random erasing, Zhong et al. 2020, arXiv 1708.04896).
        colour: what it is painted with, 0..255 per channel.
    """

    fitting: Fitting
    crop_scale: tuple[float, float] | None
    flip: float
    trivial: bool
    erasing: float
    colour: Sequence[float]

    @property
    def does_anything(self) -> bool:
        return self.crop_scale is not None or self.trivial or self.erasing > 0

    def read(self, split: Split, where: Sequence[int], seeds: Sequence[int]) -> Pixels:
        """Shape (n, height, width, channels), uint8."""
        if self.crop_scale is not None:
            return np.stack([self(split.source.picture(i), seed) for i, seed in zip(where, seeds, strict=True)])
        fitted = split.source.read(np.asarray(where))
        return np.stack([self(as_image(pixels), seed) for pixels, seed in zip(fitted, seeds, strict=True)])

    def __call__(self, image: Image.Image, seed: int) -> Pixels:
        with seeded(seed):
            for change in self._changes:
                image = change(image)
            return self._erased(Picture(image).pixels)

    @cached_property
    def _changes(self) -> list[Any]:
        from torchvision.transforms import InterpolationMode, v2  # imported here: `validate` needs none of it

        method, (high, wide) = InterpolationMode(self.fitting.interpolation), self.fitting.size
        found: list[Any] = []
        if self.crop_scale is not None:
            ratio = (ASPECT[0] * wide / high, ASPECT[1] * wide / high)
            found += [v2.RandomResizedCrop((high, wide), self.crop_scale, ratio, method)]
            found += [v2.RandomHorizontalFlip(self.flip)]
        return [*found, v2.TrivialAugmentWide(interpolation=method)] if self.trivial else found

    @cached_property
    def _eraser(self) -> v2.RandomErasing:
        from torchvision.transforms import v2

        return v2.RandomErasing(self.erasing, value=[round(level) for level in self.colour])

    def _erased(self, pixels: Pixels) -> Pixels:
        if not self.erasing:
            return pixels
        erased = self._eraser(torch.from_numpy(pixels).permute(2, 0, 1))
        return cast(Pixels, erased.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Shifts:
    """Where images are moved to, each by itself.

    Args:
        down, across: shape (n,), pixels from the farthest shift up and to the left.
        mirrored: shape (n,), bool; None = none is.
    """

    down: Tensor
    across: Tensor
    mirrored: Tensor | None

    @classmethod
    def of(cls, seeds: Tensor, size: Sequence[int], flip: float) -> Shifts:
        """What seeds draw for images of a height and width.

        Args:
            flip: how likely an image is mirrored; 0 = none is.
        """
        down, across = ((part_of(seeds, i) * (2 * reach(side) + 1)).long() for i, side in enumerate(size))
        return cls(down, across, part_of(seeds, 2) < flip if flip else None)

    @classmethod
    def drawn(cls, num: int, size: Sequence[int], flip: float, generator: torch.Generator) -> Shifts:
        """The same, drawn one after the other."""
        reaches = [reach(side) for side in size]
        if reaches[0] == reaches[1]:
            down, across = torch.randint(0, 2 * reaches[0] + 1, (2, num, 1), generator=generator)
        else:
            down, across = (torch.randint(0, 2 * most + 1, (num, 1), generator=generator) for most in reaches)
        mirrored = torch.rand((num, 1), generator=generator)[:, 0] < flip if flip else None
        return cls(down[:, 0], across[:, 0], mirrored)

    def __call__(self, pixels: Tensor, fill: Tensor) -> Tensor:
        """Images of shape (n, height, width, channels), moved.

        Args:
            fill: shape (channels,), the colour that comes in.
        """
        n, high, wide, channels = pixels.shape
        device, down, across = pixels.device, reach(high), reach(wide)
        image, top, left = torch.arange(n, device=device), self.down.to(device), self.across.to(device)
        if self.mirrored is not None:  # what is mirrored after a shift was shifted the other way after mirroring
            mirrored = self.mirrored.to(device)
            pixels, image = torch.cat([pixels, pixels.flip(2)]), image + n * mirrored
            left = torch.where(mirrored, 2 * across - left, left)
        tall, broad = high + 2 * down, wide + 2 * across
        padded = fill.repeat(tall * broad).expand(len(pixels), -1).clone().view(-1, tall, broad, channels)
        padded[:, down : down + high, across : across + wide] = pixels
        starts = (image * tall + top)[:, None] * broad + left[:, None] + broad * torch.arange(high, device=device)
        rows = padded.view(-1).as_strided((padded.numel() // channels - wide + 1, wide * channels), (channels, 1))
        return torch.index_select(rows, 0, starts.flatten()).view(n, high, wide, channels)


def reach(side: int) -> int:
    """How far images are shifted at most, in pixels: an eighth of the side."""
    return max(1, side // 8)
