"""Labelled images of one kind of source each: arrays in memory, files, and torchvision's data sets."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import decode
from secateur.pipeline.workloads.data.content import Damaged, Reading, Seen, look, read_file, read_size, without_damaged
from secateur.pipeline.workloads.data.decode import Fitting, Pixels
from secateur.pipeline.workloads.data.decoded import Decoded, threads
from secateur.pipeline.workloads.data.notes import Tally

Labels = npt.NDArray[np.int64]
Sizes = Mapping[tuple[int, int], int]
SIDE = 224
"""Of images in files, where neither the run file nor the network says one."""
USUAL = Fitting((SIDE, SIDE))


@dataclass(frozen=True)
class Wanted:
    """How images shall come out.

    Args:
        size: height and width in pixels, of the run file; None = as stored for arrays, as ``usual`` for files.
        channels: 1 or 3; None = as stored for arrays, 3 for files.
        usual: how images in files are brought to one size for the network.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None
    usual: Fitting = USUAL

    @property
    def fitting(self) -> Fitting:
        """Of images in files: what is cut away stays the same share of an image, whatever its size."""
        if self.size is None:
            return self.usual
        share = 1.0 if self.usual.short is None else self.usual.short / min(self.usual.size)
        return replace(self.usual, size=self.size, short=None if share == 1 else round(min(self.size) * share))


class ImageSource(Protocol):
    """Labelled images, read when needed."""

    @property
    def labels(self) -> Labels:
        """Shape (n,): the class of every image."""

    @property
    def contents(self) -> Sequence[bytes]:
        """A digest of every image's content: of a file's bytes, or of an array's pixels."""

    @property
    def places(self) -> Sequence[str]:
        """What every image is called to the user."""

    @property
    def sizes(self) -> Sizes:
        """(width, height) of the images as a person sees them -> how many have it."""

    def __len__(self) -> int: ...

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """Images of shape (n, height, width, channels), uint8."""

    def picture(self, index: int) -> Image.Image:
        """An image at its own size, in mode RGB or L."""

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of an image as a person sees it."""

    # A source may have ``in_memory``: reading costs next to nothing; and ``keep(indices, room)`` and ``forget()``: keep
    # these images in so many bytes of memory, that forked processes share, once they are decoded.


@dataclass(frozen=True)
class ImageData:
    """Images with labels, as a format brings them, before they are split.

    Args:
        train: images to train on; a part of them becomes the search split, and the test split, where there is none.
        search, test: splits that the data has itself.
        classes: their names, by index; the indices as text where the data has no names.
        named: whether it has.
        fitting: how images are brought to one size; None = they are stretched to it, or have it.
        tally: what was found on the way.
    """

    train: ImageSource
    classes: tuple[str, ...]
    search: ImageSource | None = None
    test: ImageSource | None = None
    named: bool = True
    fitting: Fitting | None = None
    tally: Tally = field(default_factory=Tally)


class ArraySource:
    """Images held as one array of shape (n, height, width, channels), uint8; may be memory-mapped.

    With ``channels`` grey images are repeated (3) or coloured ones turned grey (1; ITU-R BT.601 luma).

    Args:
        name: what the array is called to the user.
        contents: where they are known already.
    """

    def __init__(
        self,
        images: Pixels,
        labels: Labels,
        size: tuple[int, int] | None,
        channels: int | None,
        name: str = "image",
        contents: Sequence[bytes] | None = None,
    ) -> None:
        if images.ndim == 3:
            images = images[..., None]
        self.images, self.labels, self.size_wanted, self.channels = images, labels, size, channels
        self.contents = contents_of(images) if contents is None else contents
        self.places = [f"{name} {index}" for index in range(len(images))]
        self.sizes: Sizes = {(images.shape[2], images.shape[1]): len(images)}

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        images = self._coloured(np.asarray(self.images[indices]))
        if self.size_wanted is not None and images.shape[1:3] != self.size_wanted:
            images = np.stack([_stretched(image, self.size_wanted) for image in images])
        return images

    @property
    def in_memory(self) -> bool:
        """Whether reading is no more than copying."""
        return self.size_wanted in (None, self.images.shape[1:3]) and not isinstance(self.images, np.memmap)

    def picture(self, index: int) -> Image.Image:
        return as_image(self._coloured(np.asarray(self.images[index : index + 1]))[0])

    def size(self, index: int) -> tuple[int, int]:
        del index
        return self.images.shape[2], self.images.shape[1]

    def _coloured(self, images: Pixels) -> Pixels:
        if self.channels == 3 and images.shape[3] == 1:
            images = np.repeat(images, 3, axis=3)
        if self.channels == 1 and images.shape[3] == 3:
            images = decode.luma(images)
        return images


class FileSource:
    """Images that are files, decoded when read.

    Args:
        files, labels: of all files that were looked at, shape ``(files,)``.
        seen: what each of them is.
        places: what each is called to the user.
        chosen: those that are images of this source.
        wanted: how they shall come out.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Labels,
        seen: Sequence[Seen],
        places: Sequence[str],
        chosen: Sequence[int],
        wanted: Wanted,
    ) -> None:
        self.files, self.labels = [files[i] for i in chosen], labels[chosen]
        self.contents, self.places = [seen[i].digest for i in chosen], [places[i] for i in chosen]
        self.fitting, self.grey = wanted.fitting, wanted.channels == 1
        self._sizes = [seen[i].size for i in chosen]
        self.sizes: Sizes = Counter(size for size in self._sizes if size != (0, 0))
        self._decoded: Decoded | None = None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        with ThreadPoolExecutor(threads()) as pool:
            return np.stack(list(pool.map(self._read_one, indices.tolist())))

    def picture(self, index: int) -> Image.Image:
        if self._decoded is None:
            return read_file(self.files[index], self.grey).image
        return as_image(self._decoded.get(index, lambda: read_file(self.files[index], self.grey).pixels))

    def keep(self, indices: npt.NDArray[np.int64], room: int) -> None:
        if self._decoded is None:
            self._decoded = Decoded({i: self.size(i) for i in indices.tolist()}, 1 if self.grey else 3, room)

    def forget(self) -> None:
        self._decoded = None

    def size(self, index: int) -> tuple[int, int]:
        return self._sizes[index] if self._sizes[index] != (0, 0) else read_size(self.files[index])

    def _read_one(self, index: int) -> Pixels:
        return decode.Picture(self.fitting(self.picture(index))).pixels


def labelled_files(
    parts: Mapping[str, tuple[Sequence[Path], Sequence[int]]],
    root: Path,
    names: tuple[str, ...],
    what: str,
    wanted: Wanted,
    damaged: Damaged,
    reading: Reading,
    tally: Tally,
    called: Mapping[Path, str] | None = None,
) -> ImageData:
    """The images in files that can be used; all of them are looked at together.

    Args:
        parts: ``train``, and perhaps ``val`` and ``test`` -> files, and the class of each.
        root: what the places of files are told from.
        names: of the classes, by index.
        what: where the labels come from, for errors.
        called: what files are called to the user, where they have other names than their own.

    Raises:
        UserError: images are damaged, and are not to be left out; or there are none of a class's index.
    """
    files = [file for own, _ in parts.values() for file in own]
    labels = np.array([label for _, own in parts.values() for label in own], dtype=np.int64)
    roles = [role for role, (own, _) in parts.items() for _ in own]
    places = [called[file] if called else os.path.relpath(file, root) for file in files]
    seen = look(files, reading.about(damaged))
    kept = without_damaged(places, seen, damaged, tally)
    sources = {}
    for role in parts:
        chosen = [i for i in kept if roles[i] == role]
        sources[role] = FileSource(files, labels, seen, places, chosen, wanted)
    check_labels(sources["train"].labels, names, what, tally)
    return ImageData(
        sources["train"], names, sources.get("val"), sources.get("test"), fitting=wanted.fitting, tally=tally
    )


class DatasetSource:
    """A torchvision data set that yields (PIL image, label), whose images are in no files of their own.

    Args:
        contents: digests of the images' pixels.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Labels,
        fitting: Fitting,
        channels: int | None,
        contents: Sequence[bytes],
        places: Sequence[str],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        self.dataset, self.labels, self.fitting = dataset, labels, fitting
        self.mode = "L" if channels == 1 else "RGB"
        self.contents, self.places = contents, places
        self._sizes = sizes
        self.sizes: Sizes = Counter(sizes)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        return np.stack([decode.Picture(self.fitting(self.picture(int(i)))).pixels for i in indices])

    def picture(self, index: int) -> Image.Image:
        return self.dataset[index][0].convert(self.mode)  # type: ignore[no-any-return]

    def size(self, index: int) -> tuple[int, int]:
        return self._sizes[index]


def contents_of(images: npt.NDArray[Any]) -> list[bytes]:
    """A digest of the pixels of each image of an array."""
    return [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]


def check_labels(labels: Labels, classes: Sequence[str] | None, what: str, tally: Tally) -> tuple[str, ...]:
    """The names of the classes that labels from 0 stand for.

    Args:
        labels: shape (n,), of the training images.
        classes: the names that the run file or the data gives; None = there are none.
        what: where the labels come from, for errors.

    Raises:
        UserError: a label is below 0 or beyond the names; or, without names, a class between has no image: the labels
            begin with 1, or have a gap.
    """
    if not len(labels):
        raise UserError(f"{what} has no images")
    present, counts = np.unique(labels, return_counts=True)
    if present[0] < 0:
        raise UserError(f"{what}: labels count from 0, found {present[0]} ({counts[0]:,} of {len(labels):,} images)")
    if classes is not None:
        if present[-1] >= len(classes):
            raise UserError(
                f"{what}: there are {len(classes)} class names and a label {present[-1]}; name all classes in "
                "data.classes, in the order of their labels from 0"
            )
        missing = sorted(set(range(len(classes))) - set(present.tolist()))
        tally.add("class(es) without an image to train on", *(classes[label] for label in missing))
        return tuple(classes)
    if present[-1] >= len(present):
        gaps = _gaps(present)
        begin = f"; if they were meant to begin with 0, subtract {present[0]}" if present[0] > 0 else ""
        raise UserError(
            f"{what}: {len(present)} labels occur, from {present[0]} to {present[-1]}, so no image has {gaps}. Labels "
            f"are the indices of classes, from 0 without gaps{begin}; to keep classes without images, name every class "
            "in data.classes"
        )
    return tuple(str(label) for label in present.tolist())


def _gaps(present: npt.NDArray[np.int64]) -> str:
    """The first labels that do not occur."""
    wanted = [label for label in range(int(min(present[-1], len(present) + 3))) if label not in set(present.tolist())]
    return ", ".join(str(label) for label in wanted[:3]) + (" ..." if present[-1] >= len(present) + 3 else "")


def _stretched(image: Pixels, size: tuple[int, int]) -> Pixels:
    return decode.Picture(decode.stretch(as_image(image), size)).pixels


def as_image(pixels: Pixels) -> Image.Image:
    """An array of shape (height, width, 3 or 1) as an image in mode RGB or L."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
