"""Scenes of digits: handwritten digits at random places on noisy backgrounds, for a detector without a download."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import digit_pixels
from secateur.pipeline.workloads.data.decode import Pixels
from secateur.pipeline.workloads.data.scenes import SEARCH_FRACTION, Boxes, Flags, Indices, SceneData
from secateur.pipeline.workloads.data.sources import Sizes

KEPT_BYTES = 256 << 20
"""Digit scenes are kept in memory up to this size."""


@dataclass(frozen=True)
class _Paste:
    """A digit in a scene: which image, where its ink goes (pixels), and its colour."""

    digit: int
    left: int
    top: int
    width: int
    height: int
    colour: npt.NDArray[np.float32]


class DigitScenes:
    """Digits of scikit-learn (8x8; UCI, Alpaydin and Kaynak 1998) at random places on noisy, textured backgrounds.

    The scenes of a split show only digit images of its own. A box holds exactly the ink of its digit.

    Args:
        counts: how many scenes each split has; they follow each other in this order.
        size: side of a scene, in pixels.
        objects: the most digits in one scene; the least is 1.
        seed: every scene depends on this and its index alone.
    """

    classes = tuple(str(digit) for digit in range(10))
    notes: tuple[str, ...] = ()

    def __init__(self, counts: Sequence[int], size: int, objects: int, seed: int) -> None:
        self.ink, self.labels = _bundled_digits()
        self.size, self.objects, self.seed = size, objects, seed
        shares = np.cumsum(counts) / sum(counts)
        mixed = np.random.default_rng(0).permutation(len(self.ink))
        pools = np.split(mixed, np.round(shares[:-1] * len(mixed)).astype(int))
        self.pools = [pool for pool, count in zip(pools, counts, strict=True) for _ in range(count)]
        self.layouts = [self._layout(index) for index in range(len(self.pools))]
        self.keys = [f"scene {index}" for index in range(len(self.pools))]
        self.sizes: Sizes = {(size, size): len(self.pools)}
        made = hashlib.sha256(f"{tuple(counts)} {size} {objects} {seed}".encode())
        made.update(b"".join(ink.tobytes() for ink in self.ink) + self.labels.tobytes())
        made.update(self.boxes(0).tobytes() + self._draw(len(self.pools) - 1).tobytes())  # how scenes are made
        self.contents = [hashlib.sha256(made.digest() + key.encode()).digest() for key in self.keys]
        self._kept: dict[int, Pixels] | None = {} if 3 * size * size * len(self.pools) <= KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self.layouts)

    def read(self, indices: Indices) -> list[Pixels]:
        """Scenes; drawn once, and kept where there is room for all."""
        if self._kept is None:
            return [self._draw(int(index)) for index in indices]
        for index in indices:
            if int(index) not in self._kept:
                self._kept[int(index)] = self._draw(int(index))
        return [self._kept[int(index)] for index in indices]

    def boxes(self, index: int) -> Boxes:
        rows = [(p.left, p.top, p.left + p.width, p.top + p.height, self.labels[p.digit]) for p in self.layouts[index]]
        return np.array(rows, dtype=np.float32)

    def difficult(self, index: int) -> Flags:
        return np.zeros(len(self.layouts[index]), dtype=bool)

    def _layout(self, index: int) -> list[_Paste]:
        """One to ``objects`` digits that hardly overlap; those for which there is no room are left away."""
        rng = np.random.default_rng((self.seed, index, 0))
        placed: list[_Paste] = []
        for _ in range(int(rng.integers(1, self.objects + 1))):
            digit = int(rng.choice(self.pools[index]))
            for _ in range(20):
                paste = self._place(digit, rng)
                if all(_share(paste, other) < 0.1 for other in placed):
                    placed.append(paste)
                    break
        return placed

    def _place(self, digit: int, rng: np.random.Generator) -> _Paste:
        rows, columns = self.ink[digit].shape
        height = round(self.size * float(rng.uniform(0.18, 0.45)))
        width = max(3, round(height * columns / rows))
        left, top = (int(rng.integers(0, self.size - side + 1)) for side in (width, height))
        colour = rng.uniform(0.55, 1.0) * rng.uniform(180, 255, 3)
        return _Paste(digit, left, top, width, height, colour.astype(np.float32))

    def _draw(self, index: int) -> Pixels:
        """Coarse patches of dim colour, noise over all, digits blended in."""
        rng = np.random.default_rng((self.seed, index, 1))
        patches = rng.integers(0, 90, (6, 6, 3), dtype=np.uint8)
        canvas = np.asarray(Image.fromarray(patches).resize((self.size, self.size), Image.Resampling.BICUBIC))
        canvas = canvas.astype(np.float32)
        for paste in self.layouts[index]:
            shape = Image.fromarray(self.ink[paste.digit])
            cover = np.asarray(shape.resize((paste.width, paste.height), Image.Resampling.BILINEAR))[..., None] / 255
            part = canvas[paste.top : paste.top + paste.height, paste.left : paste.left + paste.width]
            part += cover * (paste.colour - part)
        canvas += rng.standard_normal((self.size, self.size, 1), dtype=np.float32) * float(rng.uniform(4, 16))
        return canvas.clip(0, 255).astype(np.uint8)


@functools.cache
def _bundled_digits() -> tuple[list[Pixels], Indices]:
    """The ink of all 1,797 digits, and which digit each is."""
    images, labels = digit_pixels.read()
    return [_ink(image) for image in images], labels


def _ink(image: npt.NDArray[np.float64]) -> Pixels:
    """An 8x8 digit (0..16) cut down to the rows and columns that hold ink, 0..255."""
    rows, columns = (np.flatnonzero((image >= 4).any(axis)) for axis in (1, 0))
    inked = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.round(inked * (255 / 16)).astype(np.uint8)


def _share(a: _Paste, b: _Paste) -> float:
    """The part of the smaller digit's box that the other's covers."""
    wide = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    high = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    return max(wide, 0) * max(high, 0) / min(a.width * a.height, b.width * b.height)


def load(
    num: int, size: int, objects: int, seed: int, search_fraction: float | None, test_fraction: float
) -> SceneData:
    """Scenes, whose splits follow each other; each shows digit images of its own.

    Args:
        num: scenes, all splits together.
        size: side of a scene, in pixels.
        objects: the most digits in one scene.

    Raises:
        UserError: none would be left to train on.
    """
    num_test = max(1, round(test_fraction * num))
    num_search = max(1, round((search_fraction or SEARCH_FRACTION) * (num - num_test)))
    counts = (num - num_test - num_search, num_search, num_test)
    if counts[0] < 1:
        raise UserError(f"{num} scenes leave none to train on; use more, or lower search_ and test_fraction")
    source = DigitScenes(counts, size, objects, seed)
    train, search, test = np.split(np.arange(num, dtype=np.int64), np.cumsum(counts)[:2])
    return SceneData.of(source, {"train": train, "search": search, "test": test})
