"""COCO's JSON: one file of annotations for a folder of images."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import splits
from secateur.pipeline.workloads.data.content import Damaged, Reading
from secateur.pipeline.workloads.data.listing import parts_of
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.paths import find, find_folder, read_text
from secateur.pipeline.workloads.data.scenes import (
    SEARCH_FRACTION,
    FileScenes,
    Scene,
    SceneData,
    Truth,
    assemble,
    divide,
    usable,
    whole_number,
)


@dataclass(frozen=True)
class _Pool:
    """The images and categories of a file."""

    scenes: list[Scene]
    classes: tuple[str, ...]


KEYS, NEEDS = ("path", "train", "test", "test_path", "classes", "damaged"), ("path",)
IN_FOLDER = "_annotations.coco.json"
"""What exports of labelling tools call the file that lies among the images of a split."""
OFFICIAL = re.compile(r"instances_(train|val|test)(\d*)\.json")


def looks_like(path: Path) -> str | None:
    """What is seen where a path has COCO annotations, in a file for each split."""
    if not path.is_dir():
        return None
    files = _files_in(path)
    names = ", ".join(files)
    return f"COCO annotations ({names or 'one file'})" if files else None


def load_scenes(options: Any, reading: Reading) -> SceneData:
    """The images of ``train`` and ``test``, or of the files that the folder ``path`` has for its splits.

    Args:
        options: the ``data`` section.

    Raises:
        UserError: as ``load``.
    """
    o = options
    shares = (o.search_fraction, o.test_fraction)
    if o.train is not None:
        return load(o.train, o.test, o.path, o.test_path, o.classes, *shares, o.damaged, reading)
    root = find_folder(o.path, "folder of images and annotations")
    files = {part: (str(file), str(folder)) for part, (file, folder) in _files_in(root).items()}
    if "train" not in files:
        raise UserError(
            f"{root} has no annotations of the training images; expected train/{IN_FOLDER}, annotations/"
            "instances_train2017.json beside train2017/, or the file in data.train"
        )
    if "test" not in files and "val" in files:
        files["test"] = files.pop("val")
    (train, folder), (test, test_folder) = files["train"], files.get("test", (None, None))
    return load(train, test, folder, test_folder, o.classes, *shares, o.damaged, reading, val=files.get("val"))


def _files_in(root: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> annotation file and folder of images, in the two usual layouts; a lone file is that of ``train``."""
    parts, _ = parts_of(root)
    found = {part: (folder / IN_FOLDER, folder) for part, folder in parts.items() if (folder / IN_FOLDER).is_file()}
    if not found and (root / IN_FOLDER).is_file():
        return {"train": (root / IN_FOLDER, root)}
    for file in sorted(root.glob("annotations/instances_*.json")):
        if match := OFFICIAL.fullmatch(file.name):
            name = match[1] + match[2]
            folders = [folder for folder in (root / name, root / "images" / name, root / "images") if folder.is_dir()]
            found.setdefault(match[1], (file, folders[0] if folders else root / name))
    return found


def load(
    train_file: str,
    test_file: str | None,
    folder: str,
    test_folder: str | None,
    classes: tuple[str, ...] | None,
    search_fraction: float | None,
    test_fraction: float,
    damaged: Damaged,
    reading: Reading,
    val: tuple[str, str] | None = None,
) -> SceneData:
    """The annotated images of one file, or of one for training and one for the test.

    Args:
        folder: of the images; ``test_folder`` of those of the test, None = the same.
        classes: names in the order of their indices; None = the categories of the training file, by id.
        search_fraction: share of the training images; None = 0.1.
        test_fraction: share of all images, where there is no file for the test.
        val: the file and folder of a validation split, which is the search split; not used where ``search_fraction`` is
            given.

    Raises:
        UserError: see ``secateur.pipeline.workloads.data.scenes``.
    """
    train, tally = _read(train_file, folder, "train"), Tally()
    scenes, parts = list(train.scenes), {"train": list(range(len(train.scenes)))}
    if test_file is not None:
        held = _read(test_file, test_folder or folder, "test")
        twice = {scene.image.resolve() for scene in scenes} & {scene.image.resolve() for scene in held.scenes}
        if twice:
            names = some(sorted(path.name for path in twice))
            raise UserError(
                f"{test_file}: {number_of(len(twice), 'image(s) is|are')} in {train_file} too: {names}; remove them"
            )
        parts["test"] = list(range(len(scenes), len(scenes) + len(held.scenes)))
        scenes += held.scenes
    if val is not None:
        held = _read(*val, "val")
        if search_fraction is None:
            parts["search"] = list(range(len(scenes), len(scenes) + len(held.scenes)))
            scenes += held.scenes
        else:
            places = [scene.key for scene in held.scenes]
            tally.add("image(s) of the validation split was|were not used, as search_fraction is set", *places)
    scenes, seen, index = usable(scenes, damaged, reading, tally)
    given = {name: [index[i] for i in part if i in index] for name, part in parts.items()}
    search = None if "search" in given else search_fraction or SEARCH_FRACTION
    shares = splits.shares_of(None if test_file else test_fraction, search)
    assembled = assemble(scenes, seen, classes or train.classes, tally, chosen=classes is not None)
    return divide(assembled, given, shares, tally)


def open_all(train_file: str, folder: str, classes: tuple[str, ...] | None, reading: Reading) -> FileScenes:
    """All annotated images of a file, in order and without splits."""
    pool, tally = _read(train_file, folder, "train"), Tally()
    scenes, seen, _ = usable(pool.scenes, "refuse", reading, tally)
    return assemble(scenes, seen, classes or pool.classes, tally, chosen=classes is not None)


def _read(path: str, folder: str, part: str) -> _Pool:
    """The images of a JSON file, in its order, and its categories by id."""
    file, root = find(path, "annotation file"), find_folder(folder, "folder of images")
    content = _content(file)
    categories = _table(file, content["categories"], "categories", "name")
    images = _table(file, content["images"], "images", "file_name")
    if not images:
        raise UserError(f"{file}: no images; the list 'images' is empty")
    truths: dict[int | str, list[Truth]] = {key: [] for key in images}
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: annotations[{number}] is no object: {str(entry)[:80]}")
        where = f"{file}, annotation {entry.get('id', f'number {number}')}"
        image = entry.get("image_id")
        if not isinstance(image, int | str) or image not in truths:
            raise UserError(f"{where}: there is no image with id {image!r}; correct image_id or add the image")
        truths[image].append(_truth(entry, where, categories))
    scenes = [_scene(entry, root, part, truths[key]) for key, entry in images.items()]
    by_id = sorted(categories, key=lambda key: (isinstance(key, str), key))
    return _Pool(scenes, tuple(str(categories[key]["name"]) for key in by_id))


def _content(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}; correct the file") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not COCO annotations: {error}") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{file}: expected COCO annotations, an object with the list {name!r}")
    return cast(dict[str, list[Any]], content)


def _table(file: Path, entries: list[Any], what: str, name: str) -> dict[int | str, dict[str, Any]]:
    """Entries by id; each must have an id and a ``name`` of its own."""
    table: dict[int | str, dict[str, Any]] = {}
    names = set()
    for number, entry in enumerate(entries):
        where = f"{file}: {what}[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int | str) or not entry.get(name):
            raise UserError(f"{where} needs an 'id' and a {name!r}; got {str(entry)[:80]}")
        if entry["id"] in table or str(entry[name]) in names:
            raise UserError(f"{where}: id {entry['id']!r} or {name} {entry[name]!r} is used twice; make them different")
        names.add(str(entry[name]))
        table[entry["id"]] = entry
    return table


def _truth(entry: Mapping[str, Any], where: str, categories: Mapping[int | str, Mapping[str, Any]]) -> Truth:
    label, box = entry.get("category_id"), entry.get("bbox")
    if not isinstance(label, int | str) or label not in categories:
        listing = ", ".join(f"{key} ({category['name']})" for key, category in categories.items())
        raise UserError(f"{where}: unknown category_id {label!r}; known: {listing}")
    try:
        x, y, wide, high = (float(value) for value in box or ())
        usable = all(map(math.isfinite, (x, y, wide, high)))
    except (TypeError, ValueError, OverflowError):
        usable = False
    if not usable:
        raise UserError(f"{where}: expected bbox as four numbers (x, y, width, height), got {str(box)[:80]}")
    corners = (x, y, x + wide, y + high)
    return Truth(str(categories[label]["name"]), corners, bool(entry.get("iscrowd")), where)


def _scene(entry: Mapping[str, Any], root: Path, part: str, truths: Sequence[Truth]) -> Scene:
    name, said = str(entry["file_name"]), [whole_number(str(entry.get(side, 0))) for side in ("width", "height")]
    return Scene(f"{part}/{name}", root / name, tuple(truths), _digest_of(truths), (said[0], said[1]))


def _digest_of(truths: Sequence[Truth]) -> str:
    content = [(truth.name, truth.corners, truth.difficult) for truth in truths]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
