"""Arrays: an ``.npz`` with ``images`` and ``labels``, or ``NAME_images.npy`` beside ``NAME_labels.npy``."""

from __future__ import annotations

import base64
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.device_profiles.wording import number_of
from secateur.pipeline.archives import check_archive
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.content import Reading, kept
from secateur.pipeline.workloads.data.decode import Pixels
from secateur.pipeline.workloads.data.notes import Tally
from secateur.pipeline.workloads.data.paths import find
from secateur.pipeline.workloads.data.sources import ArraySource, ImageData, Labels, Wanted, check_labels, contents_of

DAMAGED = (OSError, ValueError, EOFError, MemoryError, ArithmeticError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for files that are damaged, or whose headers lie; an array of objects is a ValueError."""
LARGE_BYTES = 64 << 20
"""The digests of larger arrays are remembered between runs."""


KEYS, NEEDS = ("train", "test", "classes"), ("train",)


def looks_like(path: Path) -> str | None:
    """What is seen where a path is a file of arrays, or a folder with ``train.npz`` or ``train_images.npy``."""
    if path.is_file():
        return f"arrays, {path.name}" if path.suffix == ".npz" or path.name.endswith("_images.npy") else None
    found = [name for name in ("train.npz", "train_images.npy") if (path / name).is_file()]
    return f"arrays, {found[0]}" if found else None


def found_in(path: Path) -> dict[str, str]:
    """The keys ``train`` and ``test`` that a path means that looks like arrays."""
    if path.is_file():
        return {"train": str(path)}
    files = {part: [path / f"{part}{suffix}" for suffix in (".npz", "_images.npy")] for part in ("train", "test")}
    found = {part: next(filter(Path.is_file, places), None) for part, places in files.items()}
    return {part: str(file) for part, file in found.items() if file is not None}


def load_images(options: Any, wanted: Wanted, reading: Reading) -> ImageData:
    """The same as ``load``, of a ``data`` section with ``train``, ``test`` and ``classes``.

    Raises:
        UserError: as ``load``.
    """
    del reading
    return load(options.train, options.test, wanted, options.classes)


def load(train: str, test: str | None, wanted: Wanted, classes: Sequence[str] | None) -> ImageData:
    """Images and labels from array files.

    Args:
        train, test: the files, or their stems.
        wanted: size and channels of the images; as stored where it does not say.
        classes: names of the classes, by label.

    Raises:
        UserError: a file is missing; is not uint8 NHWC images with one label each, from 0 without gaps; or those of
            the two files differ in size.
    """
    tally = Tally()
    opened = {name: _opened(path) for name, path in (("train", train), ("test", test)) if path}
    _check_shapes({name: images for name, (_, images, _) in opened.items()}, wanted)
    names = check_labels(opened["train"][2], classes, str(opened["train"][0]), tally)
    if "test" in opened:
        _check_test(opened["test"][2], len(names), str(opened["test"][0]))
    sources = {
        name: ArraySource(images, labels, wanted.size, wanted.channels, f"{name} image", _contents(file, images))
        for name, (file, images, labels) in opened.items()
    }
    return ImageData(sources["train"], names, test=sources.get("test"), named=classes is not None, tally=tally)


def _check_shapes(parts: dict[str, Pixels], wanted: Wanted) -> None:
    """See that all images can go into one network.

    Raises:
        UserError: they cannot.
    """
    shapes = {name: images.shape[1:3] for name, images in parts.items()}
    colours = {name: images.shape[3] if images.ndim == 4 else 1 for name, images in parts.items()}
    if wanted.size is None and len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {high}x{wide}" for name, (high, wide) in shapes.items())
        raise UserError(f"the images differ in size (height x width: {told}); set data.image_size to resize them all")
    if wanted.channels is None and len(set(colours.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in colours.items())
        raise UserError(f"the images differ in their number of channels ({told}); set data.channels")


def _check_test(labels: Labels, num_classes: int, what: str) -> None:
    if not len(labels):
        raise UserError(f"{what} has no images; leave data.test out to have a part of the training images held out")
    if labels.max() >= num_classes:
        raise UserError(
            f"{what} has a label {labels.max()}, and the training images have "
            f"{number_of(num_classes, 'class(es)')} (labels 0 to "
            f"{num_classes - 1}); name every class in data.classes, or correct the labels"
        )


def _opened(path: str) -> tuple[Path, Pixels, Labels]:
    """(file, images, labels)."""
    file, images, labels = _read(path)
    right = images.ndim in (3, 4) and (images.ndim == 3 or images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not right:
        raise UserError(
            f"{file}: expected images as uint8 of shape (n, height, width, 1 or 3), got {images.dtype} {images.shape}"
        )
    if 0 in images.shape[1:]:
        raise UserError(f"{file}: the images have no pixels (shape {images.shape})")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{file}: expected {len(images)} labels from 0, one whole number for each image, got {labels.dtype} "
            f"{labels.shape}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < 2**31:
        raise UserError(f"{file}: expected labels from 0, got {labels.min()} to {labels.max()}")
    return file, images, labels.astype(np.int64)


def _read(path: str) -> tuple[Path, npt.NDArray[Any], npt.NDArray[Any]]:
    if path.endswith(".npz"):
        file = find(path, "array file")
        check_archive(file, "save the arrays as NAME_images.npy and NAME_labels.npy, which are read in parts")
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
                return file, content["images"], content["labels"]
        except KeyError as error:
            raise UserError(f"{file} must hold the arrays 'images' and 'labels': {error}") from error
        except DAMAGED as error:
            raise UserError(f"{file} is not a readable .npz file: {error}") from error
    stem = path.removesuffix("_images.npy").removesuffix(".npy")
    file = find(f"{stem}_images.npy", "array file")
    try:
        with np.errstate(over="raise"):  # of a size that no file has
            images = np.load(file, mmap_mode="r", allow_pickle=False)
            return file, images, np.load(find(f"{stem}_labels.npy", "label file"), allow_pickle=False)
    except DAMAGED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} or its labels are not readable .npy files: {error}") from error


def _contents(file: Path, images: Pixels) -> Sequence[bytes]:
    """Digests of the images; of large arrays those remembered from the same file."""
    if images.nbytes < LARGE_BYTES:
        return contents_of(images)
    stamp = file.stat()
    key = f"arrays {file.absolute()} {stamp.st_size} {stamp.st_ino} {stamp.st_mtime_ns} {stamp.st_ctime_ns}"
    joined = base64.b64decode(kept(key, lambda: base64.b64encode(b"".join(contents_of(images))).decode()))
    return [joined[start : start + 32] for start in range(0, len(joined), 32)]
