"""Class folders: ``PATH/train/CLASS/image.jpg``, and the same under ``val`` and ``test`` where they are there.

Without folders of splits, ``PATH/CLASS/image.jpg``, the test split is carved out of all images. Classes are the folders
of ``train`` by name, as torchvision's ``ImageFolder`` has them. ``test`` is the test split and
``val`` the search split; a ``val`` without a ``test`` is the test split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.content import Damaged, Reading
from secateur.pipeline.workloads.data.decode import SUFFIXES
from secateur.pipeline.workloads.data.listing import folders_in, images_below, is_hidden, is_image, parts_of, same_name
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.paths import find_folder
from secateur.pipeline.workloads.data.sources import ImageData, Wanted, labelled_files

KEYS, NEEDS = ("path", "classes", "damaged"), ("path",)


def looks_like(path: Path) -> str | None:
    """What is seen where a path is a folder of class folders, with or without folders of splits above them."""
    if not path.is_dir():
        return None
    folders, others = parts_of(path)
    classes = folders_in(folders["train"]) if "train" in folders else [] if folders else others
    return "class folders" if sum(map(_holds_images, classes)) > 1 else None


def _holds_images(folder: Path) -> bool:
    return any(is_image(file.name) and not is_hidden(file.name) for file in folder.rglob("*"))


def load_images(options: Any, wanted: Wanted, reading: Reading) -> ImageData:
    """The same as ``load``, of a ``data`` section with ``path``, ``classes`` and ``damaged``.

    Raises:
        UserError: as ``load``.
    """
    return load(options.path, wanted, options.classes, options.damaged, reading)


def load(
    path: str,
    wanted: Wanted,
    classes: Sequence[str] | None,
    damaged: Damaged,
    reading: Reading,
) -> ImageData:
    """The images of a folder of class folders.

    Args:
        wanted: size and channels of the images.
        classes: names of the class folders in the order of their indices; None = those there, sorted.
        damaged: what is done about images that cannot be decoded.

    Raises:
        UserError: the folder, its ``train`` folder, classes or images are missing; the classes differ; or images are
            damaged.
    """
    root, tally = find_folder(path, "folder of images"), Tally()
    folders, others = parts_of(root)
    if not folders and len([folder for folder in others if _holds_images(folder)]) > 1:
        folders, others = {"train": root}, []
    if "train" not in folders:
        there = ", ".join(folder.name for folder in [*folders.values(), *others][:5]) or "no folders"
        raise UserError(
            f"{root} has no folder 'train' (it has {there}); expected {root}/train/CLASS/image.jpg, or at least two "
            "folders CLASS with images and nothing else"
        )
    for folder in others:
        unused = images_below(folder, root, Tally())
        tally.add(
            "image(s) in folders of no split was|were not used", *(str(file.relative_to(root)) for file in unused)
        )
    parts = {role: _listed(folder, root, tally) for role, folder in folders.items()}
    names = _classes(parts["train"], classes, folders["train"])
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        tally.say(f"the folder {folders['val'].name} serves as test split, as there is no folder test")
    found = {role: _labelled(part, names, folders[_origin(role, folders)]) for role, part in parts.items()}
    return labelled_files(found, root, names, str(folders["train"]), wanted, damaged, reading, tally)


def _origin(role: str, folders: Mapping[str, Path]) -> str:
    """The folder of a split: a ``val`` may serve as ``test``."""
    return role if role in folders else "val"


def _listed(folder: Path, root: Path, tally: Tally) -> dict[str, list[Path]]:
    """Class folder -> its images; files beside the class folders are counted."""
    loose = [entry.name for entry in folder.iterdir() if not entry.is_dir() and not is_hidden(entry.name)]
    tally.add("file(s) beside the class folders was|were not used", *sorted(f"{folder.name}/{name}" for name in loose))
    hidden = [entry for entry in folder.iterdir() if entry.is_dir() and is_hidden(entry.name)]
    for scrap in sorted(hidden):
        copies = [str(file.relative_to(root)) for file in sorted(scrap.rglob("*")) if is_image(file.name)]
        tally.add("file(s) that is|are hidden, or in hidden folders, was|were not used", *copies)
    subs = folders_in(folder)
    listed = {same_name(sub.name): images_below(sub, root, tally) for sub in subs}
    if len(listed) < len(subs):
        raise UserError(f"{folder} has two class folders whose names look the same (accents written in two ways)")
    return listed


def _classes(train: Mapping[str, list[Path]], wanted: Sequence[str] | None, folder: Path) -> tuple[str, ...]:
    """Names of the classes, by index.

    Raises:
        UserError: fewer than two; one has no image; or the run file names others than there are.
    """
    if wanted is not None:
        foreign = [name for name in train if name not in {same_name(one) for one in wanted}]
        if foreign:
            raise UserError(
                f"{folder} has the class folders {some(foreign)}, which data.classes does not name; name every class, "
                "or move the folder elsewhere"
            )
        return tuple(wanted)
    if len(train) < 2:
        raise UserError(f"{folder} needs one folder per class and at least two classes; found {list(train)}")
    empty = [name for name, files in train.items() if not files]
    if len(empty) == len(train):
        raise UserError(f"no images ({', '.join(sorted(SUFFIXES))}) in the class folders of {folder}")
    if empty:
        raise UserError(
            f"{number_of(len(empty), 'class folder(s)')} of {folder} with no image "
            f"({', '.join(sorted(SUFFIXES))}): {some(empty)}. "
            "Remove them, add images, or name every class in data.classes"
        )
    return tuple(train)


def _labelled(part: Mapping[str, list[Path]], classes: Sequence[str], folder: Path) -> tuple[list[Path], list[int]]:
    places = {same_name(name): index for index, name in enumerate(classes)}
    unknown = [name for name in part if name not in places]
    if unknown:
        raise UserError(
            f"{folder} has classes that the training data does not have: {some(unknown)}; "
            f"{known(list(classes), unknown[0])}"
        )
    files = [(file, places[name]) for name, images in part.items() for file in images]
    if not files:
        raise UserError(f"no images ({', '.join(sorted(SUFFIXES))}) in the class folders of {folder}")
    return [file for file, _ in files], [label for _, label in files]
