"""Data sets of ``torchvision.datasets`` by class name, downloaded on first use.

Their splits are torchvision's own: ``train``, ``test``, and ``val`` as the search split, or as the test split where
there is no ``test``. Sets whose images are files are read by the same decoder as everything else.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.content import Damaged, Reading, look, without_damaged
from secateur.pipeline.workloads.data.notes import Tally
from secateur.pipeline.workloads.data.paths import under_data
from secateur.pipeline.workloads.data.sources import (
    ArraySource,
    DatasetSource,
    FileSource,
    ImageData,
    ImageSource,
    Labels,
    Wanted,
    check_labels,
)

LABELS = ("targets", "labels", "_labels", "y")
"""What data sets call the class of every image."""
FILES = ("samples", "imgs", "_samples", "_image_files", "_images", "images")
"""What they call their image files, alone or as (file, class)."""
CLASSES = ("classes", "categories")
BY_FLAG: Mapping[str, Mapping[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
CARVED: Mapping[str, Mapping[str, Any]] = {"train": {}}


def _named(train: str, test: str, val: str | None = None, key: str = "split") -> Mapping[str, Mapping[str, Any]]:
    parts = {"train": train, "val": val, "test": test}
    return {part: {key: word} for part, word in parts.items() if word is not None}


PARTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST", "USPS"), BY_FLAG),
    **dict.fromkeys(("SVHN", "STL10", "StanfordCars", "Food101"), _named("train", "test")),
    **dict.fromkeys(("GTSRB", "FER2013", "LFWPeople"), _named("train", "test")),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _named("train", "test", "val")),
    **dict.fromkeys(("ImageNet", "Imagenette", "CLEVRClassification"), _named("train", "val")),
    **dict.fromkeys(("EuroSAT", "Caltech101", "Caltech256", "SUN397", "SEMEION"), CARVED),
    "Country211": _named("train", "test", "valid"),
    "OxfordIIITPet": _named("trainval", "test"),
    "Places365": _named("train-standard", "val"),
    "INaturalist": _named("2021_train", "2021_valid", key="version"),
}
"""Data set -> its parts, and the arguments that name them; what has no ``test`` is carved. Others are asked for their
splits by the usual words."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {"EMNIST": {"split": "balanced"}, "Caltech101": {"target_type": "category"}}
"""Further arguments that a data set needs."""
KEYS, NEEDS = ("dataset", "path", "download", "classes", "damaged", "options"), ("dataset", "path")


def looks_like(path: Path) -> str | None:
    """Nothing: what lies in a folder does not tell which data set it is; ``data.dataset`` does."""
    del path
    return None


def load_images(options: Any, wanted: Wanted, reading: Reading) -> ImageData:
    """The same as ``load``, of a ``data`` section.

    Raises:
        UserError: as ``load``.
    """
    root = under_data(options.path)
    return load(
        options.dataset, root, options.download, wanted, options.classes, options.damaged, reading, options.options
    )


def load(
    name: str,
    root: Path,
    download: bool,
    wanted: Wanted,
    classes: Sequence[str] | None,
    damaged: Damaged,
    reading: Reading,
    options: Mapping[str, Any] | None = None,
) -> ImageData:
    """The splits of a data set.

    Args:
        name: of its class in ``torchvision.datasets``.
        wanted: size and channels of the images.
        classes: names of the classes, by label; None = the data set's own.
        options: further arguments of its class (``small`` of Places365, ``split`` of EMNIST).

    Raises:
        UserError: there is no such data set; it is not there and could not be downloaded; or it is none for
            classification.
    """
    factory, tally = _factory(name), Tally()
    opened = _splits(name, factory, root, download, options or {})
    names = classes or _class_names(opened["train"])
    labels = {part: _labels(name, dataset) for part, dataset in opened.items()}
    found = check_labels(labels["train"], names, f"torchvision's {name}", tally)
    for part, own in labels.items():
        if len(own) and own.max() >= len(found):
            raise UserError(
                f"torchvision's {name} ({part}) has a label {own.max()}, and {number_of(len(found), 'class(es)')} "
                "to train on"
            )
    sources = {
        part: _source(f"{name} {part}", dataset, labels[part], wanted, damaged, reading, tally)
        for part, dataset in opened.items()
    }
    crop = not isinstance(sources["train"], ArraySource)
    return ImageData(
        sources["train"],
        found,
        sources.get("val"),
        sources.get("test"),
        named=names is not None,
        fitting=wanted.fitting if crop else None,
        tally=tally,
    )


def _factory(name: str) -> Any:
    import torchvision.datasets as zoo

    found = getattr(zoo, name, None)
    if not (inspect.isclass(found) and issubclass(found, zoo.VisionDataset) and name != "VisionDataset"):
        close = difflib.get_close_matches(name, zoo.__all__, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"torchvision.datasets has no {name!r}; try CIFAR10, CIFAR100, MNIST or SVHN{hint}")
    return found


def _splits(name: str, factory: Any, root: Path, download: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """The data set's parts: ``train``, and ``val`` and ``test`` where it has them."""
    takes = _arguments(factory)
    foreign = sorted(set(options) - takes)
    if foreign:
        own = sorted(takes - {"root", "transform", "target_transform", "transforms", "loader", "download"})
        raise UserError(
            f"torchvision's {name} does not take data.options {', '.join(foreign)}; it takes {', '.join(own) or 'none'}"
        )
    choices, guessed = PARTS.get(name), name not in PARTS
    if choices is None:
        if "train" in takes:
            choices = BY_FLAG
        else:
            choices = {part: {"split": part} for part in ("train", "val", "test")} if "split" in takes else CARVED
    found: dict[str, Any] = {}
    for part, choice in choices.items():
        given = {**DEFAULTS.get(name, {}), **choice, **options}
        try:
            found[part] = _made(factory, str(root), given, download and "download" in takes)
        except Exception as error:  # data sets raise what their files and downloads raise
            if part != "train" and guessed and _has_no_split(error, part):
                continue
            raise UserError(
                f"torchvision's {name} ({part}) is not usable under {root}: {error}. Put the files there, set "
                "data.download: true on a machine with a network, or name arrays or a folder instead"
            ) from error
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")
    return found


def _made(factory: Any, root: str, given: Mapping[str, Any], download: bool) -> Any:
    """A data set from the files that are there, and else from those that it downloads."""
    offline = {"download": False} if "download" in _arguments(factory) else {}
    try:
        return factory(root, **offline, **given)
    except Exception:
        if not download:
            raise
    return factory(root, download=True, **given)


def _arguments(factory: Any) -> set[str]:
    """The names that a class takes, those that it hands on to the class above it included."""
    found: set[str] = set()
    for kind in inspect.getmro(factory):
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found - {"self"}


def _has_no_split(error: Exception, part: str) -> bool:
    """Whether a data set refused the name of a split, rather than failed to read it."""
    return isinstance(error, ValueError | KeyError | AssertionError) and (
        "split" in str(error).lower() or part in str(error)
    )


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    for attribute in CLASSES:
        found = getattr(dataset, attribute, None)
        if isinstance(found, list | tuple) and found:
            return tuple(", ".join(n) if isinstance(n, list | tuple) else str(n) for n in found)
    indices = getattr(dataset, "class_to_idx", None)
    if isinstance(indices, dict) and sorted(indices.values()) == list(range(len(indices))):
        return tuple(str(name) for name in sorted(indices, key=indices.__getitem__))
    return None


def _labels(name: str, dataset: Any) -> Labels:
    """The class of every image.

    Raises:
        UserError: the data set has none: it is made for another task.
    """
    found = next((v for a in LABELS if (v := getattr(dataset, a, None)) is not None), None)
    if found is None:
        pairs = _pairs(dataset)
        found = [label for _, label in pairs] if pairs is not None else None
    try:
        labels = np.asarray(found)
        if name == "QMNIST" and labels.ndim == 2:
            labels = labels[:, 0]  # the others say who wrote the digit
        if found is None or labels.ndim != 1 or len(labels) != len(dataset) or labels.dtype.kind not in "iu":
            raise ValueError
    except (ValueError, TypeError) as error:
        raise UserError(
            f"torchvision's {name} does not tell the class of every image, so it cannot be used for classification"
        ) from error
    return labels.astype(np.int64)


def _pairs(dataset: Any) -> Sequence[tuple[Any, int]] | None:
    """(file, class) of every image, where the data set keeps such a list."""
    for attribute in FILES:
        found = getattr(dataset, attribute, None)
        if isinstance(found, list | tuple) and found and isinstance(found[0], tuple) and len(found[0]) == 2:
            return found
    return None


def _files(dataset: Any) -> list[Path] | None:
    """The image file of every image; None where images are in no files of their own."""
    for attribute in FILES:
        found = getattr(dataset, attribute, None)
        if not isinstance(found, list | tuple) or not found or len(found) != len(dataset):
            continue
        paths = [entry[0] if isinstance(entry, tuple) else entry for entry in found]
        if all(isinstance(path, str | Path) for path in paths) and Path(paths[0]).is_file():
            return [Path(path) for path in paths]
    return None


def _source(
    name: str,
    dataset: Any,
    labels: Labels,
    wanted: Wanted,
    damaged: Damaged,
    reading: Reading,
    tally: Tally,
) -> ImageSource:
    pixels: Any = getattr(dataset, "data", None)
    pixels = pixels.numpy() if hasattr(pixels, "numpy") else pixels
    if isinstance(pixels, np.ndarray) and pixels.ndim == 4 and pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)  # SVHN and STL10 keep channels first
    if isinstance(pixels, np.ndarray) and pixels.ndim in (3, 4) and pixels.dtype == np.uint8:
        return ArraySource(pixels, labels, wanted.size, wanted.channels, name)
    files = _files(dataset)
    if files is None:
        return _decoded(name, dataset, labels, wanted, reading)
    places = [os.path.relpath(file, dataset.root) for file in files]
    seen = look(files, reading.about(damaged))
    chosen = without_damaged(places, seen, damaged, tally)
    return FileSource(files, labels, seen, places, chosen, wanted)


def _decoded(name: str, dataset: Any, labels: Labels, wanted: Wanted, reading: Reading) -> DatasetSource:
    """Images that only the data set itself can give: all of them are decoded once, for their content."""
    contents, sizes = [], []
    with reading.progress.stage(f"Look at the images of {name}") as report:
        for index in range(len(dataset)):
            image = dataset[index][0]
            if not hasattr(image, "convert"):
                raise UserError(f"torchvision's {name} gives no pictures, so it cannot be used for classification")
            contents.append(hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).digest())
            sizes.append(image.size)
            report(index + 1, len(dataset))
    places = [f"{name} image {index}" for index in range(len(dataset))]
    return DatasetSource(dataset, labels, wanted.fitting, wanted.channels, contents, places, sizes)
