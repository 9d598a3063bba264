"""Formats of data, each one file of this folder: which one a path holds is seen by looking, and said.

A format of labelled images defines ``looks_like`` and ``load_images``, one of images with boxes ``looks_like`` and
``load_scenes``; ``KEYS`` are the keys of the run file that it reads, ``NEEDS`` those that it cannot do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.device_profiles.shelf import Shelf
from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.listing import folders_in, is_hidden, is_image
from secateur.pipeline.workloads.data.notes import some

PACKAGE = "secateur.pipeline.workloads.data"
IMAGES = Shelf(PACKAGE, "source of images", ("looks_like", "load_images"))
SCENES = Shelf(PACKAGE, "source of images with boxes", ("looks_like", "load_scenes"))
AUTO = "auto"


class AmbiguousError(UserError):
    """A path can be read in several ways."""


def source_of(given: Mapping[str, Any], listed: str) -> str:
    """The source that a ``data`` section means where it names none.

    Args:
        listed: the one whose files are named one by one.
    """
    if given.get("dataset") is not None:
        return "torchvision"
    if given.get("train") is not None:
        return listed
    return AUTO if given.get("path") is not None else "digits"


def told(error: ValidationError) -> str:
    """What is wrong with a section."""
    return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


def faults_of(shelf: Shelf, source: str, given: Iterable[str], always: Iterable[str]) -> str:
    """What is wrong with the keys that are set beside a source; empty = nothing.

    Args:
        given: names of the keys that are not at their default.
        always: names of those that every source has.
    """
    if source == AUTO:
        return "" if "path" in given else "source 'auto' also needs path"
    if source not in shelf.names():
        return f"unknown source {source!r}; {known([AUTO, *shelf.names()], source)}"
    module = shelf.load(source)
    missing = [key for key in module.NEEDS if key not in given]
    if missing:
        return f"source {source!r} also needs {' and '.join(missing)}"
    unused = sorted(set(given) - set(module.KEYS) - set(always))
    return f"source {source!r} does not use {' and '.join(unused)}" if unused else ""


def detect(shelf: Shelf, path: Path) -> tuple[str, str]:
    """(source that a path looks like, what was seen there).

    Raises:
        AmbiguousError: it looks like several; says what was seen.
        UserError: it looks like none; says what lies there.
    """
    seen = {name: said for name in shelf.names() if (said := shelf.load(name).looks_like(path))}
    if len(seen) == 1:
        return next(iter(seen.items()))
    if seen:
        told = " or ".join(f"{name} ({said})" for name, said in seen.items())
        raise AmbiguousError(f"{path} can be read as {told}; set data.source to the one that is meant")
    raise UserError(
        f"{path} looks like no {shelf.kind} ({', '.join(shelf.names())}): {lying_in(path)}. Correct data.path, or set "
        "data.source, whose messages say what is missing"
    )


def lying_in(path: Path) -> str:
    """What lies at a path that looks like no format, and what that lacks where it is nearly class folders."""
    if not path.is_dir():
        lacks = (getattr(IMAGES.load(name), "what_lacks", lambda path: "")(path) for name in IMAGES.names())
        return next(filter(None, lacks), f"it is the file {path.name}")
    loose = [entry.name for entry in path.iterdir() if is_image(entry.name) and not is_hidden(entry.name)]
    folders = [folder for folder in folders_in(path) if any(is_image(file.name) for file in folder.rglob("*"))]
    if len(folders) == 1:
        return f"images lie in one folder of it, {folders[0].name}, and classes need at least two folders"
    if loose:
        return (
            f"{number_of(len(loose), 'image(s) lies|lie')} in it and in no class folder; expected "
            f"{path}/CLASS/image.jpg"
        )
    inside = sorted(entry.name for entry in path.iterdir())
    return f"it holds {some(inside) if inside else 'nothing'}"
