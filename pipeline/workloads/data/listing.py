"""What is an image and what is a class in a folder: nothing is left out without being counted.

Folders and files of editors, archives and file systems are neither (``.ipynb_checkpoints``, ``__MACOSX``, ``._cat.jpg``
beside ``cat.jpg``): they hold copies and scraps that would be in two splits, or make a class of their own.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.decode import SUFFIXES
from secateur.pipeline.workloads.data.notes import Tally

SCRAPS = frozenset(
    ("__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""Folders that systems make beside people's files."""
ROLES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What folders and lists of the splits are called, in any case."""


def is_hidden(name: str) -> bool:
    """Whether a folder or file is none of the user's data."""
    return name.startswith(".") or name in SCRAPS


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122  names need no path


def folders_in(folder: Path) -> list[Path]:
    """The user's folders in a folder, by name.

    Raises:
        UserError: it cannot be looked into.
    """
    return sorted(Path(entry.path) for entry in _entries(folder) if not is_hidden(entry.name) and entry.is_dir())


def images_below(folder: Path, root: Path, tally: Tally) -> list[Path]:
    """Every image file in a folder and the folders in it, links followed, by name; what is left out is counted.

    Args:
        root: names are given from here on.

    Raises:
        UserError: a folder cannot be looked into.
    """
    found: list[Path] = []
    for path, hidden in _files_below(folder, {os.path.realpath(folder)}, False):
        place = str(path.relative_to(root))
        if hidden:
            tally.add("file(s) that is|are hidden, or in hidden folders, was|were not used", place)
        elif is_image(path.name):
            found.append(path)
        else:
            tally.add("file(s) is|are of a kind that is not read and was|were not used", place)
    return sorted(found)


def parts_of(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """(role ``train``, ``val`` or ``test`` -> folder, folders that have none).

    Raises:
        UserError: two folders have the same role.
    """
    roles: dict[str, Path] = {}
    others = []
    for folder in folders_in(root):
        role = role_of(folder.name)
        if role is None:
            others.append(folder)
        elif role in roles:
            raise UserError(f"{root} has the folders {roles[role].name} and {folder.name}: keep one of them")
        else:
            roles[role] = folder
    return roles, others


def role_of(name: str) -> str | None:
    """The split that a folder's or list's name means."""
    return next((role for role, names in ROLES.items() if name.lower() in names), None)


def same_name(name: str) -> str:
    """A name in the one form of its accented letters: systems write the same name in two."""
    return unicodedata.normalize("NFC", name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot look into {folder}: {error.strerror}; correct its permissions") from error


def _files_below(folder: Path, above: Iterable[str], hidden: bool) -> Iterator[tuple[Path, bool]]:
    """(file, whether it is hidden); a link to a folder above is not followed again."""
    for entry in _entries(folder):
        path, out_of_sight = Path(entry.path), hidden or is_hidden(entry.name)
        if not entry.is_dir():
            yield path, out_of_sight
        elif (real := os.path.realpath(path)) not in above:
            yield from _files_below(path, {*above, real}, out_of_sight)
