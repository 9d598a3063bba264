"""Class folders: ``PATH/train/CLASS/image.jpg``, and the same under ``val`` and ``test`` where they are there.

Classes are the folders of ``train`` by name, as torchvision's ``ImageFolder`` has them. ``test`` is the test split and
``val`` the search split; a ``val`` without a ``test`` is the test split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.content import Damaged, Reading, Seen, look, without_damaged
from secateur.pipeline.workloads.data.decode import SUFFIXES
from secateur.pipeline.workloads.data.listing import folders_in, images_below, is_hidden, is_image, parts_of, same_name
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.paths import find_folder
from secateur.pipeline.workloads.data.sources import FileSource, ImageData, Wanted, check_labels


@dataclass(frozen=True)
class _Part:
    """The image files of a split, with the class of each."""

    files: list[Path]
    labels: list[int]


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
    if "train" not in folders:
        there = ", ".join(folder.name for folder in [*folders.values(), *others][:5]) or "no folders"
        raise UserError(f"{root} has no folder 'train' (it has {there}); expected {root}/train/CLASS/image.jpg")
    for folder in others:
        unused = images_below(folder, root, Tally())
        tally.add("image(s) in folders of no split were not used", *(str(file.relative_to(root)) for file in unused))
    parts = {role: _listed(folder, root, tally) for role, folder in folders.items()}
    names = _classes(parts["train"], classes, folders["train"])
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        tally.say(f"the folder {folders['val'].name} serves as test split, as there is no folder test")
    found = {role: _labelled(part, names, folders[_origin(role, folders)]) for role, part in parts.items()}
    sources = _sources(found, root, wanted, damaged, reading, tally)
    check_labels(sources["train"].labels, names, str(folders["train"]), tally)
    return ImageData(
        sources["train"], names, sources.get("val"), sources.get("test"), fitting=wanted.fitting, tally=tally
    )


def _origin(role: str, folders: Mapping[str, Path]) -> str:
    """The folder of a split: a ``val`` may serve as ``test``."""
    return role if role in folders else "val"


def _listed(folder: Path, root: Path, tally: Tally) -> dict[str, list[Path]]:
    """Class folder -> its images; files beside the class folders are counted."""
    loose = [entry.name for entry in folder.iterdir() if not entry.is_dir() and not is_hidden(entry.name)]
    tally.add("file(s) beside the class folders were not used", *sorted(f"{folder.name}/{name}" for name in loose))
    hidden = [entry for entry in folder.iterdir() if entry.is_dir() and is_hidden(entry.name)]
    for scrap in sorted(hidden):
        copies = [str(file.relative_to(root)) for file in sorted(scrap.rglob("*")) if is_image(file.name)]
        tally.add("file(s) that are hidden, or in hidden folders, were not used", *copies)
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
            f"{len(empty)} class folder(s) of {folder} hold no image ({', '.join(sorted(SUFFIXES))}): {some(empty)}. "
            "Remove them, add images, or name every class in data.classes"
        )
    return tuple(train)


def _labelled(part: Mapping[str, list[Path]], classes: Sequence[str], folder: Path) -> _Part:
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
    return _Part([file for file, _ in files], [label for _, label in files])


def _sources(
    parts: Mapping[str, _Part],
    root: Path,
    wanted: Wanted,
    damaged: Damaged,
    reading: Reading,
    tally: Tally,
) -> dict[str, FileSource]:
    """The images of each split that can be used; all files are looked at together."""
    files = [file for part in parts.values() for file in part.files]
    labels = [label for part in parts.values() for label in part.labels]
    roles = [role for role, part in parts.items() for _ in part.files]
    places = [str(file.relative_to(root)) for file in files]
    seen = look(files, reading.about(damaged))
    usable = without_damaged(places, seen, damaged, tally)
    chosen: dict[str, list[int]] = {role: [i for i in usable if roles[i] == role] for role in parts}
    return {role: _source(files, labels, seen, places, own, wanted) for role, own in chosen.items()}


def _source(
    files: Sequence[Path],
    labels: Sequence[int],
    seen: Sequence[Seen],
    places: Sequence[str],
    chosen: Sequence[int],
    wanted: Wanted,
) -> FileSource:
    return FileSource(
        [files[i] for i in chosen],
        np.array([labels[i] for i in chosen], dtype=np.int64),
        wanted.fitting,
        wanted.channels,
        [seen[i].digest for i in chosen],
        [places[i] for i in chosen],
        [seen[i].size for i in chosen],
    )
