"""Where labelled images come from: bundled digits, torchvision's data sets, folders, and plain arrays.

Relative paths are looked for in the working directory and then under the folder ``SECATEUR_DATA``.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.archives import check_archive
from pipeline.errors import UserError
from pipeline.workloads import ImageSource

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""The only decoders that are tried, whatever a file is called: Pillow has some that start other programs (EPS)."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged, are no images, or are too large to be meant."""
DAMAGED = (OSError, ValueError, EOFError, MemoryError, ArithmeticError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for files that are damaged, or whose headers lie; an array of objects is a ValueError."""


@dataclass(frozen=True)
class ImageData:
    """Sources of training and test images, with what a model must know of them.

    Args:
        test: None where the data has no test split of its own; one is then carved out of ``train``.
        fingerprint: names the content.
    """

    train: ImageSource
    test: ImageSource | None
    num_classes: int
    fingerprint: str


class ArraySource:
    """Images held as one array of shape (n, height, width, channels), uint8; may be memory-mapped.

    With ``channels`` grey images are repeated (3) or coloured ones turned grey (1; ITU-R BT.601 luma).
    """

    def __init__(self, images: Pixels, labels: Labels, size: int | None, channels: int | None) -> None:
        if images.ndim == 3:
            images = images[..., None]
        self.images, self.labels, self.size, self.channels = images, labels, size, channels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        images: Pixels = np.asarray(self.images[indices])
        if self.channels == 3 and images.shape[3] == 1:
            images = np.repeat(images, 3, axis=3)
        if self.channels == 1 and images.shape[3] == 3:
            images = np.round(images @ np.array([0.299, 0.587, 0.114]))[..., None].astype(np.uint8)
        if self.size is not None and images.shape[1:3] != (self.size, self.size):
            images = np.stack([_resize(image, self.size) for image in images])
        return images


class FileSource:
    """Images that are files, decoded when read: short side scaled to ``size``, centre cropped."""

    def __init__(self, files: list[Path], labels: Labels, size: int, channels: int | None) -> None:
        self.files, self.labels, self.size = files, labels, size
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self._decode, [self.files[int(i)] for i in indices])))

    def _decode(self, path: Path) -> Pixels:
        try:
            with Image.open(path, formats=FORMATS) as image:
                return _fit(image.convert(self.mode), self.size)
        except UNREADABLE as error:
            raise UserError(f"cannot read image {path}: {error}; remove or replace the file") from error


class DatasetSource:
    """A torchvision data set that yields (PIL image, label)."""

    def __init__(self, dataset: Any, labels: Labels, size: int, channels: int | None) -> None:
        self.dataset, self.labels, self.size = dataset, labels, size
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        return np.stack([_fit(self.dataset[int(i)][0].convert(self.mode), self.size) for i in indices])


def load_digits(size: int | None, channels: int | None) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (UCI; Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits as bundled

    data = bundled()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    return ImageData(ArraySource(images, labels, size or 8, channels), None, 10, _digest(images, labels))


def load_torchvision(name: str, root: Path, download: bool, size: int | None, channels: int | None) -> ImageData:
    """A data set of ``torchvision.datasets`` by class name, downloaded on first use.

    Raises:
        UserError: no such data set, or it is not there and could not be downloaded.
    """
    import torchvision.datasets as zoo

    factory = getattr(zoo, name, None)
    if factory is None:
        raise UserError(f"torchvision.datasets has no {name!r}; try CIFAR10, CIFAR100, MNIST or SVHN")
    import inspect

    by_flag = "train" in inspect.signature(factory).parameters
    sources: list[ImageSource] = []
    prints = []
    for part in ("train", "test"):
        choice: dict[str, Any] = {"train": part == "train"} if by_flag else {"split": part}
        try:
            dataset = factory(str(root), download=download, **choice)
        except (RuntimeError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"torchvision's {name} ({part}) is not usable under {root}: {error}. Put the files there, set "
                "data.download: true on a machine with a network, or name arrays or a folder instead"
            ) from error
        labels = np.asarray(getattr(dataset, "targets", getattr(dataset, "labels", None)), dtype=np.int64)
        pixels: Any = getattr(dataset, "data", None)
        pixels = pixels.numpy() if hasattr(pixels, "numpy") else pixels
        if isinstance(pixels, np.ndarray) and pixels.ndim == 4 and pixels.shape[1] == 3:
            pixels = pixels.transpose(0, 2, 3, 1)  # SVHN and STL10 keep channels first
        if isinstance(pixels, np.ndarray) and pixels.ndim in (3, 4) and pixels.shape[1] == pixels.shape[2]:
            sources.append(ArraySource(pixels, labels, size, channels))
            prints.append(_digest(pixels, labels))
        else:
            sources.append(DatasetSource(dataset, labels, size or 224, channels))
            prints.append(_digest(labels))
    return ImageData(sources[0], sources[1], int(sources[0].labels.max()) + 1, f"{name}:{'-'.join(prints)}")


def load_folder(path: str, size: int | None, channels: int | None) -> ImageData:
    """``path/train/CLASS/*.jpg`` and, optionally, ``path/test`` or ``path/val`` alike.

    Raises:
        UserError: the folder, its ``train`` folder, classes or images are missing, or the classes differ.
    """
    root = find(path, "folder of images")
    train = root / "train"
    if not train.is_dir():
        raise UserError(f"{root} has no folder 'train'; expected {root}/train/CLASS/image.jpg")
    classes = sorted(p.name for p in train.iterdir() if p.is_dir())
    if len(classes) < 2:
        raise UserError(f"{train} needs one folder per class and at least two classes; found {classes}")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    parts: list[ImageSource] = []
    listing = hashlib.sha256()
    for folder in [train] + ([held_out] if held_out else []):
        unknown = sorted({p.name for p in folder.iterdir() if p.is_dir()} - set(classes))
        if unknown:
            raise UserError(f"{folder} has classes that {train} does not have: {unknown[:5]}")
        files = [
            (p, label)
            for label, name in enumerate(classes)
            for p in sorted(folder.joinpath(name).rglob("*"))
            if p.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise UserError(f"no images ({', '.join(SUFFIXES)}) in the class folders of {folder}")
        for file, _ in files:
            listing.update(f"{file.relative_to(root)}:{file.stat().st_size}\n".encode())
        labels = np.array([label for _, label in files], dtype=np.int64)
        parts.append(FileSource([p for p, _ in files], labels, size or 224, channels))
    return ImageData(parts[0], parts[1] if held_out else None, len(classes), listing.hexdigest()[:16])


def load_arrays(train: str, test: str | None, size: int | None, channels: int | None) -> ImageData:
    """Arrays: an ``.npz`` with ``images`` and ``labels``, or ``NAME_images.npy`` beside ``NAME_labels.npy``.

    Raises:
        UserError: a file is missing, or is not uint8 NHWC images with one label each.
    """
    pairs = [_arrays(path) for path in (train, test) if path]
    prints = "-".join(_digest(*pair) for pair in pairs)
    sources = [ArraySource(images, labels, size, channels) for images, labels in pairs]
    classes = 1 + max(int(labels.max()) for _, labels in pairs)
    return ImageData(sources[0], sources[1] if test else None, classes, prints)


def _arrays(path: str) -> tuple[Pixels, Labels]:
    if path.endswith(".npz"):
        file = find(path, "array file")
        check_archive(file, "save the arrays as NAME_images.npy and NAME_labels.npy, which are read in parts")
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
                images, labels = content["images"], content["labels"]
        except KeyError as error:
            raise UserError(f"{file} must hold the arrays 'images' and 'labels': {error}") from error
        except DAMAGED as error:
            raise UserError(f"{file} is not a readable .npz file: {error}") from error
    else:
        stem = path.removesuffix("_images.npy").removesuffix(".npy")
        file = find(f"{stem}_images.npy", "array file")
        try:
            with np.errstate(over="raise"):  # of a size that no file has
                images = np.load(file, mmap_mode="r", allow_pickle=False)
                labels = np.load(find(f"{stem}_labels.npy", "label file"), allow_pickle=False)
        except DAMAGED as error:
            raise UserError(f"{file} or its labels are not readable .npy files: {error}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(
            f"{file}: expected images as uint8 of shape (n, height, width, 1 or 3), got {images.dtype} {images.shape}"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise UserError(f"{file}: expected {len(images)} labels from 0, got {labels.dtype} {labels.shape}")
    return images, labels.astype(np.int64)


def under_data(path: str) -> Path:
    """Where a data set is, or is to be downloaded to: as given, or under ``SECATEUR_DATA`` if it is not there."""
    given, data = Path(path).expanduser(), os.environ.get("SECATEUR_DATA")
    return given if given.is_absolute() or given.exists() or not data else Path(data).expanduser() / path


def find(path: str, what: str) -> Path:
    """A file or folder of the run file: as given, or under ``SECATEUR_DATA``.

    Raises:
        UserError: it is in neither place; names both.
    """
    tried = [Path(path).expanduser()]
    if not tried[0].is_absolute() and (data := os.environ.get("SECATEUR_DATA")):
        tried.append(Path(data).expanduser() / path)
    for candidate in tried:
        if candidate.exists():
            return candidate
    hint = "" if len(tried) > 1 or tried[0].is_absolute() else "; set SECATEUR_DATA to the folder that holds your data"
    raise UserError(f"{what} not found: tried {' and '.join(str(p.absolute()) for p in tried)}{hint}")


def _digest(*arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        for start in range(0, len(array), 4096):
            digest.update(np.ascontiguousarray(array[start : start + 4096]).tobytes())
    return digest.hexdigest()[:16]


def _resize(image: Pixels, size: int) -> Pixels:
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return resized[..., None] if resized.ndim == 2 else resized


def _fit(image: Image.Image, size: int) -> Pixels:
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - size) // 2, (high - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels[..., None] if pixels.ndim == 2 else pixels
