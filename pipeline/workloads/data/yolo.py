"""YOLO labels: ``data.yaml``, images under ``images/``, and for each a text file of the same name under ``labels/``.

A line is ``CLASS CENTRE_X CENTRE_Y WIDTH HEIGHT`` in fractions of the image as a person sees it; a longer one is an
outline, of which the bounding box is taken. An image without a text file has no objects.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from secateur.device_profiles import plain_yaml
from secateur.device_profiles.plain_yaml import Plain
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import splits
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.listing import images_below, is_hidden, is_image
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.paths import find, read_text
from secateur.pipeline.workloads.data.scenes import (
    SEARCH_FRACTION,
    Corners,
    Scene,
    SceneData,
    Truth,
    assemble,
    divide,
    usable,
)

KEYS, NEEDS = ("path", "classes", "damaged"), ("path",)
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Split -> what ``data.yaml`` calls it."""


def looks_like(path: Path) -> str | None:
    """What is seen where a path is a ``data.yaml``, or a folder with one."""
    file = _description(path)
    if file is None:
        return None
    try:
        content = _content(file)
    except UserError:
        return None
    return f"YOLO labels, {file.name}" if "names" in content and "train" in content else None


def load_scenes(options: Any, reading: Reading) -> SceneData:
    """The images that ``data.yaml`` names, with their boxes; ``val`` is the test split where there is no ``test``.

    Args:
        options: the ``data`` section: ``path``, ``classes``, ``damaged``, ``search_fraction``, ``test_fraction``.

    Raises:
        UserError: see ``secateur.pipeline.workloads.data.scenes``.
    """
    place, tally = find(options.path, "YOLO data"), Tally()
    file = _description(place)
    if file is None:
        raise UserError(f"{place} has no data.yaml; expected one with names, train and val, beside images/ and labels/")
    content = _content(file)
    names = _names(file, content.get("names"))
    scenes: list[Scene] = []
    lists: dict[str, list[int]] = {}
    listed: dict[Path, str] = {}
    for part, images in _parts(file, content, tally).items():
        for image in images:
            if image in listed:
                raise UserError(f"{file}: {image} is in {listed[image]} and in {part}; remove it from one of them")
            listed[image] = part
            lists.setdefault(part, []).append(len(scenes))
            scenes.append(_scene(image, file.parent, names, tally))
    if "train" not in lists:
        raise UserError(f"{file}: no images to train on")
    scenes, seen, index = usable(scenes, options.damaged, reading, tally)
    given = {part: [index[i] for i in own if i in index] for part, own in lists.items()}
    if "val" in given:
        if "test" not in given:
            given["test"] = given.pop("val")
            tally.say("the images of val serve as test split, as there is none of test")
        elif options.search_fraction is None:
            given["search"] = given.pop("val")
        else:
            given["train"] += given.pop("val")
    shares = splits.shares_of(
        None if "test" in given else options.test_fraction,
        None if "search" in given else options.search_fraction or SEARCH_FRACTION,
    )
    assembled = assemble(scenes, seen, options.classes or names, tally, chosen=options.classes is not None)
    return divide(assembled, given, shares, tally)


def _description(path: Path) -> Path | None:
    """The YAML file that a path means: itself, ``data.yaml``, or the only one of a folder with labels."""
    if path.is_file():
        return path if path.suffix in (".yaml", ".yml") else None
    found = [path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (path / name).is_file()]
    if found:
        return found[0]
    others = [file for file in sorted(path.glob("*.yaml")) if not is_hidden(file.name)]
    return others[0] if len(others) == 1 and (path / "labels").is_dir() else None


def _content(file: Path) -> Mapping[str, Any]:
    try:
        content = plain_yaml.read(read_text(file)).content
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping with names, train and val")
    return content


def _text(value: object) -> str:
    return value.written if isinstance(value, Plain) else str(value)


def _names(file: Path, said: object) -> tuple[str, ...]:
    """Names of the classes, by index: from a list, or a mapping of indices from 0."""
    if isinstance(said, dict):
        wanted = [str(index) for index in range(len(said))]
        if sorted(said) != sorted(wanted):
            raise UserError(f"{file}: names needs every index from 0, without gaps; got {some(sorted(said))}")
        said = [said[index] for index in wanted]
    names = tuple(_text(name) for name in said) if isinstance(said, list) else ()
    if not names or len(set(names)) < len(names):
        raise UserError(f"{file}: names needs a list of the classes' names, each only once")
    return names


def _parts(file: Path, content: Mapping[str, Any], tally: Tally) -> dict[str, list[Path]]:
    """The images of every split that the file names."""
    found: dict[str, list[Path]] = {}
    for part, words in PARTS.items():
        said = next((content[word] for word in words if word in content), None)
        entries = [_text(entry) for entry in (said if isinstance(said, list) else [said]) if entry is not None]
        named = [entry for entry in entries if entry.strip("~") not in ("", "null")]
        images = [image for entry in named for image in _listed(file, content, entry, tally)]
        if images:
            found[part] = list(dict.fromkeys(images))
    return found


def _listed(file: Path, content: Mapping[str, Any], entry: str, tally: Tally) -> list[Path]:
    """The images of a folder, or of a text file that lists them."""
    base = file.parent / _text(content["path"]) if "path" in content else file.parent
    stripped = entry
    while stripped.startswith("../"):  # exports of labelling tools count from a folder that they do not make
        stripped = stripped[3:]
    tried = list(dict.fromkeys([base / entry, file.parent / entry, file.parent / stripped]))
    place = next((candidate for candidate in tried if candidate.exists()), None)
    if place is None:
        places = " and ".join(map(str, tried))
        raise UserError(f"{file}: {entry} is not there; tried {places}; correct path, or the entry")
    if place.is_dir():
        images = images_below(place, place, tally)
        if not images:
            raise UserError(f"{place} holds no images; {file} names it")
        return images
    lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
    return [place.parent / line if (place.parent / line).exists() else base / line for line in lines if is_image(line)]


def _scene(image: Path, root: Path, names: Sequence[str], tally: Tally) -> Scene:
    """An image with the boxes of its text file."""
    parts = list(image.parts)
    if "images" in parts:
        at = len(parts) - 1 - parts[::-1].index("images")
        parts[at] = "labels"
    labels = Path(*parts).with_suffix(".txt")
    text = read_text(labels) if labels.is_file() else ""
    truths = [
        _truth(line.split(), f"{labels}, line {number}", names, tally)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    try:
        key = image.relative_to(root).as_posix()
    except ValueError:
        key = image.name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Scene(key, image, tuple(truths), digest, relative=True)


def _truth(words: Sequence[str], where: str, names: Sequence[str], tally: Tally) -> Truth:
    try:
        label, numbers = float(words[0]), [float(word) for word in words[1:]]
        if len(numbers) < 4 or not all(map(math.isfinite, [label, *numbers])) or label != int(label):
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(
            f"{where}: expected CLASS CENTRE_X CENTRE_Y WIDTH HEIGHT, got {' '.join(words)[:80]!r}; correct the line"
        ) from None
    if not 0 <= label < len(names):
        raise UserError(f"{where}: class {label:g}; data.yaml names 0 to {len(names) - 1}; correct one of them")
    if max(map(abs, numbers)) > 2:
        wrong = max(numbers, key=abs)
        raise UserError(f"{where}: {wrong:g} is no fraction of an image; divide pixels by its width and height")
    return Truth(names[int(label)], _corners(numbers, where, tally), False, where)


def _corners(numbers: Sequence[float], where: str, tally: Tally) -> Corners:
    """x1, y1, x2, y2 of a box, or around an outline."""
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        tally.add("outline(s) was|were taken as the box(es) around it|them", Path(where).name)
        across, down = numbers[0::2], numbers[1::2]
        return min(across), min(down), max(across), max(down)
    x, y, wide, high = numbers[:4]
    return x - wide / 2, y - high / 2, x + wide / 2, y + high / 2
