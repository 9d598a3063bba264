"""Where images with boxes come from: scenes of digits, PASCAL VOC and folders like it, and COCO's JSON.

Every source yields images as they are stored, and boxes x1, y1, x2, y2 in their pixels, as annotated (VOC counts pixels
from 1; as in torchvision, nothing is subtracted). Annotations are read and image headers opened before anything is
trained. What cannot be used is never dropped in silence: either an error names the file, or ``notes`` count it.

==============================  =======================================================================
found                           done
==============================  =======================================================================
image without boxes             kept where it is measured on (search, test), not trained on; counted
box that leaves the image       clipped and counted; dropped and counted if nothing of it is left
box without area                dropped and counted
class that is not known         error: file, line, known classes
image missing or unreadable     error: file; damage behind the header is found when the image is read
XML or JSON that is wrong       error: file, line
XML that declares a DTD         refused: entities could read files or fill the memory
==============================  =======================================================================

Relative paths are looked for in the working directory and then under the folder ``SECATEUR_DATA``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Protocol, cast
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field, model_validator

from pipeline.config import Section, known
from pipeline.errors import UserError
from pipeline.workloads.images import FORMATS, SUFFIXES, UNREADABLE, Pixels, find

Boxes = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Corners = tuple[float, float, float, float]

KEPT_BYTES = 256 << 20
"""Digit scenes are kept in memory up to this size."""
UNLISTED = "annotation(s) are in no list and were not used"

LINE = " line"
"""Attribute that holds the line of an XML element; no attribute in a file can have this name."""


class SceneOptions(Section):
    """Where the images and boxes come from."""

    source: Literal["digits", "voc", "coco"] = "digits"
    path: str | None = None
    """voc: the folder that holds VOCdevkit/, or ImageSets/, JPEGImages/ and Annotations/, or pairs of XML and image
    (together, in images/ and annotations/, or in either form under train/, val/ and test/); coco: the image folder."""
    years: tuple[str, ...] | None = None
    """voc: which folders VOCdevkit/VOC{year} are used together; None = all that are there."""
    train: str | None = None
    """coco: the JSON file of the training images."""
    test: str | None = None
    """coco: the JSON file of the test images; None = they are split off the training images."""
    test_path: str | None = None
    """coco: the folder of the test images; None = ``path``."""
    classes: tuple[str, ...] | None = None
    """voc, coco: names in the order of the class indices; None = those annotated (VOC: sorted; COCO: by id)."""
    official_splits: bool = True
    """voc: follow the lists in ImageSets/Main (or the folders train/, val/, test/) where there are any."""
    image_size: Annotated[int, Field(ge=32)] = 96
    """digits: side of a scene, in pixels."""
    scenes: Annotated[int, Field(ge=20)] = 2000
    """digits: how many, all splits together."""
    objects: Annotated[int, Field(ge=1, le=9)] = 4
    """digits: the most in one scene."""
    seed: Annotated[int, Field(ge=0)] = 0
    """digits: another seed gives other scenes; the run's own seed never does."""
    search_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training images that is held out for the search; None = the official ``val`` list where there is one
    besides ``test``, else 0.1."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Where the data has no test split: share of all images that becomes one."""

    @model_validator(mode="after")
    def _complete(self) -> SceneOptions:
        needs = {"voc": ("path",), "coco": ("path", "train")}.get(self.source, ())
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise ValueError(f"source {self.source!r} also needs {' and '.join(missing)}")
        own = {
            "digits": {"image_size", "scenes", "objects", "seed"},
            "voc": {"path", "years", "classes", "official_splits"},
            "coco": {"path", "train", "test", "test_path", "classes"},
        }
        foreign = set().union(*own.values()) - own[self.source]
        unused = sorted(name for name in foreign if getattr(self, name) != SceneOptions.model_fields[name].default)
        if unused:
            raise ValueError(f"source {self.source!r} does not use {' and '.join(unused)}")
        if self.test_path is not None and self.test is None:
            raise ValueError("test_path is the folder of the images of test: name that file too")
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes needs at least one name, and each only once")
        return self


class SceneSource(Protocol):
    """Images with boxes, read when needed."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index; there is no background among them."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the data: what was clipped, dropped or not used, with counts."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> list[Pixels]:
        """Images, each of shape (height, width, 3), uint8, RGB.

        Raises:
            UserError: a file cannot be decoded; names it.
        """

    def boxes(self, index: int) -> Boxes:
        """Shape (n, 5), float32: x1, y1, x2, y2 in pixels of the image, and the class from 0; n may be 0."""

    def difficult(self, index: int) -> Flags:
        """Shape (n,): boxes that are neither to be found nor, if found, counted as wrong (COCO: crowds)."""


@dataclass(frozen=True)
class SceneData:
    """Images with boxes, and which of them are for what.

    Args:
        train: shape (n,), indices into ``source``; every image of these has boxes.
        search: likewise, held out of the training data; may hold images without boxes.
        test: likewise; read once, at the end of a run.
        fingerprint: names the content that is used: file names, sizes, annotations, classes and splits.
    """

    source: SceneSource
    train: Indices
    search: Indices
    test: Indices
    fingerprint: str


def load(options: SceneOptions) -> SceneData:
    """Open the data, check it, and fix the splits: the official ones, or ones that depend on the content alone.

    Raises:
        UserError: something is missing or wrong (see the table of this module), or a split would be empty.
    """
    match options.source:
        case "digits":
            data = _digits(options)
        case "voc":
            data = _voc(options)
        case "coco":
            data = _coco(options)
    for split, indices in (("training", data.train), ("search", data.search), ("test", data.test)):
        if not len(indices):
            raise UserError(
                f"{options.path or options.source}: no {split} images (training needs images with boxes); add images, "
                "change search_fraction or test_fraction, or set official_splits: false to split all images anew"
            )
    return data


def open_scenes(options: SceneOptions) -> FileScenes:
    """All images of ``voc``, or of ``train`` of ``coco``, in order and without splits: to measure on, or to look at.

    Raises:
        UserError: as in ``load``.
    """
    if options.source == "voc":
        scenes, _, tally = _read_voc(options)
        return _assemble(scenes, options.classes, tally)
    if options.source == "coco":
        pool = _read_coco(cast(str, options.train), cast(str, options.path), "train")
        return _assemble(pool.scenes, options.classes or pool.classes, _Tally())
    raise UserError("digits have no files: use load")


# --- scenes of digits -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Paste:
    """A digit in a scene: which image, where its ink goes (pixels), and its colour."""

    digit: int
    left: int
    top: int
    width: int
    height: int
    colour: npt.NDArray[np.float32]


class DigitScenes:
    """Digits of scikit-learn (8x8; UCI, Alpaydin and Kaynak 1998) at random places on noisy, textured backgrounds.

    The scenes of a split show only digit images of its own. A box holds exactly the ink of its digit.

    Args:
        counts: how many scenes each split has; they follow each other in this order.
        size: side of a scene, in pixels.
        objects: the most digits in one scene; the least is 1.
        seed: every scene depends on this and its index alone.
    """

    classes = tuple(str(digit) for digit in range(10))
    notes: tuple[str, ...] = ()

    def __init__(self, counts: Sequence[int], size: int, objects: int, seed: int) -> None:
        self.ink, self.labels = _bundled_digits()
        self.size, self.objects, self.seed = size, objects, seed
        shares = np.cumsum(counts) / sum(counts)
        mixed = np.random.default_rng(0).permutation(len(self.ink))
        pools = np.split(mixed, np.round(shares[:-1] * len(mixed)).astype(int))
        self.pools = [pool for pool, count in zip(pools, counts, strict=True) for _ in range(count)]
        self.layouts = [self._layout(index) for index in range(len(self.pools))]
        self._kept: dict[int, Pixels] | None = {} if 3 * size * size * len(self.pools) <= KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self.layouts)

    def read(self, indices: Indices) -> list[Pixels]:
        """Scenes; drawn once, and kept where there is room for all."""
        if self._kept is None:
            return [self._draw(int(index)) for index in indices]
        for index in indices:
            if int(index) not in self._kept:
                self._kept[int(index)] = self._draw(int(index))
        return [self._kept[int(index)] for index in indices]

    def boxes(self, index: int) -> Boxes:
        rows = [(p.left, p.top, p.left + p.width, p.top + p.height, self.labels[p.digit]) for p in self.layouts[index]]
        return np.array(rows, dtype=np.float32)

    def difficult(self, index: int) -> Flags:
        return np.zeros(len(self.layouts[index]), dtype=bool)

    def _layout(self, index: int) -> list[_Paste]:
        """One to ``objects`` digits that hardly overlap; those for which there is no room are left away."""
        rng = np.random.default_rng((self.seed, index, 0))
        placed: list[_Paste] = []
        for _ in range(int(rng.integers(1, self.objects + 1))):
            digit = int(rng.choice(self.pools[index]))
            for _ in range(20):
                paste = self._place(digit, rng)
                if all(_share(paste, other) < 0.1 for other in placed):
                    placed.append(paste)
                    break
        return placed

    def _place(self, digit: int, rng: np.random.Generator) -> _Paste:
        rows, columns = self.ink[digit].shape
        height = round(self.size * float(rng.uniform(0.18, 0.45)))
        width = max(3, round(height * columns / rows))
        left, top = (int(rng.integers(0, self.size - side + 1)) for side in (width, height))
        colour = rng.uniform(0.55, 1.0) * rng.uniform(180, 255, 3)
        return _Paste(digit, left, top, width, height, colour.astype(np.float32))

    def _draw(self, index: int) -> Pixels:
        """Coarse patches of dim colour, noise over all, digits blended in."""
        rng = np.random.default_rng((self.seed, index, 1))
        patches = rng.integers(0, 90, (6, 6, 3), dtype=np.uint8)
        canvas = np.asarray(Image.fromarray(patches).resize((self.size, self.size), Image.Resampling.BICUBIC))
        canvas = canvas.astype(np.float32)
        for paste in self.layouts[index]:
            shape = Image.fromarray(self.ink[paste.digit])
            cover = np.asarray(shape.resize((paste.width, paste.height), Image.Resampling.BILINEAR))[..., None] / 255
            part = canvas[paste.top : paste.top + paste.height, paste.left : paste.left + paste.width]
            part += cover * (paste.colour - part)
        canvas += rng.standard_normal((self.size, self.size, 1), dtype=np.float32) * float(rng.uniform(4, 16))
        return canvas.clip(0, 255).astype(np.uint8)


@functools.cache
def _bundled_digits() -> tuple[list[Pixels], Indices]:
    """The ink of all 1,797 digits, and which digit each is."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    return [_ink(image) for image in bundled.images], bundled.target.astype(np.int64)


def _ink(image: npt.NDArray[np.float64]) -> Pixels:
    """An 8x8 digit (0..16) cut down to the rows and columns that hold ink, 0..255."""
    rows, columns = (np.flatnonzero((image >= 4).any(axis)) for axis in (1, 0))
    inked = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.round(inked * (255 / 16)).astype(np.uint8)


def _share(a: _Paste, b: _Paste) -> float:
    """The part of the smaller digit's box that the other's covers."""
    wide = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    high = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    return max(wide, 0) * max(high, 0) / min(a.width * a.height, b.width * b.height)


def _digits(options: SceneOptions) -> SceneData:
    num_test = max(1, round(options.test_fraction * options.scenes))
    num_search = max(1, round((options.search_fraction or 0.1) * (options.scenes - num_test)))
    counts = (options.scenes - num_test - num_search, num_search, num_test)
    if counts[0] < 1:
        raise UserError(f"{options.scenes} scenes leave none to train on; use more, or lower search_ and test_fraction")
    source = DigitScenes(counts, options.image_size, options.objects, options.seed)
    train, search, test = np.split(np.arange(options.scenes, dtype=np.int64), np.cumsum(counts)[:2])
    digest = hashlib.sha256(f"{counts} {options.image_size} {options.objects} {options.seed}".encode())
    digest.update(b"".join(ink.tobytes() for ink in source.ink) + source.labels.tobytes())
    digest.update(source.boxes(0).tobytes() + source.read(test[-1:])[0].tobytes())  # how scenes are made
    return SceneData(source, train, search, test, digest.hexdigest()[:16])


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Truth:
    """A box as annotated; ``where`` is the place a user has to look at."""

    name: str
    corners: Corners
    difficult: bool
    where: str


@dataclass(frozen=True)
class _Scene:
    """An annotated image.

    Args:
        key: its name within the data, the same on every machine.
        digest: names the content of its annotation.
        said: width and height that the annotation gives, if any.
    """

    key: str
    image: Path
    truths: tuple[_Truth, ...]
    digest: str
    said: tuple[int, int] | None = None


@dataclass
class _Tally:
    """Counts of what a user should know, with the places it was found at."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, *places: str) -> None:
        """``what`` reads on after a number: "box(es) without area were dropped"."""
        self.found.setdefault(what, []).extend(places)

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{len(places)} {what}: {_some(places)}" for what, places in self.found.items() if places)


class FileScenes:
    """Images that are files, decoded when read; boxes are held in memory.

    Args:
        files: the image files.
        keys: the name of each within the data.
        boxes: of each image, shape (n, 5), float32.
        difficult: of each image, shape (n,).
    """

    def __init__(
        self,
        files: Sequence[Path],
        keys: Sequence[str],
        boxes: Sequence[Boxes],
        difficult: Sequence[Flags],
        classes: tuple[str, ...],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.files, self.keys, self.classes, self.notes = files, keys, classes, notes
        self._boxes, self._difficult = boxes, difficult

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Indices) -> list[Pixels]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(_decode, [self.files[int(i)] for i in indices]))

    def boxes(self, index: int) -> Boxes:
        return self._boxes[index]

    def difficult(self, index: int) -> Flags:
        return self._difficult[index]


def fingerprint(
    scenes: Iterable[tuple[str, Path, str]], classes: Sequence[str], splits: Mapping[str, Iterable[int]]
) -> str:
    """Names the content of a data set: 16 hexadecimal digits.

    Args:
        scenes: name within the data, image file (its size counts, as a full read would take too long) and digest of the
            annotation, of each image.
        splits: indices of the images of each split.
    """
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for key, image, annotation in scenes:
        digest.update(f"{key}:{image.stat().st_size}:{annotation}\n".encode())
    for name, indices in splits.items():
        digest.update(f"{name}:{[int(i) for i in indices]}\n".encode())
    return digest.hexdigest()[:16]


def _some(places: Sequence[str], most: int = 3) -> str:
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")


def _decode(path: Path) -> Pixels:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return np.array(image.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"cannot read image {path}: {error}; remove or replace the file") from error


def _measure(path: Path) -> tuple[int, int]:
    """Width and height from the header of an image file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except UNREADABLE as error:
        raise UserError(f"cannot read image {path}: {error}; remove or replace the file") from error


def _assemble(scenes: Sequence[_Scene], classes: tuple[str, ...] | None, tally: _Tally) -> FileScenes:
    """Check images and boxes. ``classes`` None = the names that occur, sorted."""
    missing = [f"{scene.image} (annotated by {scene.key})" for scene in scenes if not scene.image.is_file()]
    if missing:
        raise UserError(f"{len(missing)} image(s) not found: {_some(missing)}; restore them or remove the annotations")
    if classes is None:
        classes = tuple(sorted({truth.name for scene in scenes for truth in scene.truths}))
        if not classes:
            raise UserError(f"no boxes in {len(scenes)} annotation(s), so no classes; name data.classes or add boxes")
    places = {name: index for index, name in enumerate(classes)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(_measure, [scene.image for scene in scenes]))
    kept = [_fit(scene, size, places, tally) for scene, size in zip(scenes, sizes, strict=True)]
    return FileScenes(
        [scene.image for scene in scenes],
        [scene.key for scene in scenes],
        [boxes for boxes, _ in kept],
        [difficult for _, difficult in kept],
        classes,
        tally.notes(),
    )


def _fit(scene: _Scene, size: tuple[int, int], places: Mapping[str, int], tally: _Tally) -> tuple[Boxes, Flags]:
    """The boxes that can be used, within the image, and whether they are difficult."""
    if scene.said is not None and 0 not in scene.said and scene.said != size:
        what = "image(s) do not have the size that the annotation gives; the image's own was used"
        tally.add(what, f"{scene.key} ({size[0]}x{size[1]}, not {scene.said[0]}x{scene.said[1]})")
    rows, flags = [], []
    for truth in scene.truths:
        if truth.name not in places:
            raise UserError(
                f"{truth.where}: unknown class {truth.name!r}; {known(list(places), truth.name)}. "
                "Correct the annotation or data.classes, or leave data.classes out to use all classes that occur"
            )
        corners = _clip(truth, size, tally)
        if corners is not None:
            rows.append((*corners, places[truth.name]))
            flags.append(truth.difficult)
    return np.array(rows, dtype=np.float32).reshape(-1, 5), np.array(flags, dtype=bool)


def _clip(truth: _Truth, size: tuple[int, int], tally: _Tally) -> Corners | None:
    x1, y1, x2, y2 = truth.corners
    if x2 <= x1 or y2 <= y1:
        tally.add("box(es) without area were dropped", Path(truth.where).name)
        return None
    wide, high = size
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(wide)), min(y2, float(high)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        tally.add("box(es) wholly outside their image were dropped", Path(truth.where).name)
        return None
    if inside != truth.corners:
        tally.add("box(es) that leave their image were clipped", Path(truth.where).name)
    return inside


# --- splits -----------------------------------------------------------------------------------------------------------


def _by_content(scenes: Sequence[_Scene], indices: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """(rest, carved): which images are carved depends on names and annotations, not on order, seed or place on disk."""

    def rank(index: int) -> str:
        return hashlib.sha256(f"{scenes[index].key}:{scenes[index].digest}".encode()).hexdigest()

    carved = set(sorted(indices, key=rank)[: max(1, round(fraction * len(indices)))])
    return [i for i in indices if i not in carved], [i for i in indices if i in carved]


def _finish(
    options: SceneOptions,
    scenes: Sequence[_Scene],
    classes: tuple[str, ...] | None,
    splits: tuple[Sequence[int], Sequence[int], Sequence[int]],
    tally: _Tally,
) -> SceneData:
    """Build the source and leave images without boxes out of training."""
    source = _assemble(scenes, classes, tally)
    kept = [i for i in splits[0] if len(source.boxes(i))]
    empty = [source.keys[i] for i in splits[0] if not len(source.boxes(i))]
    tally.add("image(s) without boxes are not trained on", *empty)
    measured = [source.keys[i] for part in splits[1:] for i in part if not len(source.boxes(i))]
    tally.add("image(s) without boxes are among those measured on (search, test)", *measured)
    trained = {int(label) for i in kept for label in source.boxes(i)[:, 4]}
    names = [name for index, name in enumerate(source.classes) if index not in trained]
    tally.add("class(es) without a box to train on, which cannot be learnt from this data", *names)
    source.notes = tally.notes()
    parts = {"train": kept, "search": splits[1], "test": splits[2]}
    described = ((scene.key, scene.image, scene.digest) for scene in scenes)
    train, search, test = (np.array(part, dtype=np.int64) for part in parts.values())
    return SceneData(source, train, search, test, fingerprint(described, source.classes, parts))


# --- PASCAL VOC -------------------------------------------------------------------------------------------------------


def _voc(options: SceneOptions) -> SceneData:
    scenes, lists, tally = _read_voc(options)
    train, search, test = _voc_splits(options, scenes, lists, tally)
    return _finish(options, scenes, options.classes, (train, search, test), tally)


def _voc_splits(
    options: SceneOptions, scenes: Sequence[_Scene], lists: Mapping[str, Sequence[int]], tally: _Tally
) -> tuple[list[int], list[int], list[int]]:
    """(train, search, test), as far as possible by the official lists."""
    val = list(lists.get("val", ()))
    rest = sorted({*lists.get("trainval", ()), *lists.get("train", ()), *val}) if lists else list(range(len(scenes)))
    if lists.get("test"):
        test = list(lists["test"])
        if val and len(val) < len(rest) and options.search_fraction is None:
            chosen = set(val)
            return [i for i in rest if i not in chosen], val, test
    elif val and len(val) < len(rest):
        tally.add("images of the list val serve as test split, as there is no list test", *(scenes[i].key for i in val))
        chosen = set(val)
        rest, test = [i for i in rest if i not in chosen], val
    else:
        rest, test = _by_content(scenes, rest, options.test_fraction)
    train, search = _by_content(scenes, rest, options.search_fraction or 0.1) if rest else ([], [])
    return train, search, test


def _read_voc(options: SceneOptions) -> tuple[list[_Scene], dict[str, list[int]], _Tally]:
    """(annotated images, indices of each official list, what was found on the way)."""
    root, tally = _folder(cast(str, options.path), "folder of images and annotations"), _Tally()
    pairs: dict[Path, Path] = {}  # annotation -> image
    lists: dict[str, list[Path]] = {}
    for folder in _voc_folders(root, options.years):
        for name, listed in _voc_folder(folder, options.official_splits, tally):
            pairs |= listed
            if name is not None:
                lists.setdefault(name, []).extend(listed)
    if not pairs:
        raise UserError(
            f"no annotated images under {root}; expected VOCdevkit/VOC2007, or ImageSets/Main, JPEGImages and "
            "Annotations, or XML files beside images, or the folders images and annotations"
        )
    order = {annotation: index for index, annotation in enumerate(sorted(pairs))}
    both = sorted({a for name, part in lists.items() if name != "test" for a in part} & set(lists.get("test", ())))
    if both:
        raise UserError(
            f"{root}: {len(both)} image(s) are listed for test and for training too: {_some([a.stem for a in both])}; "
            "remove them from one list, or set official_splits: false"
        )
    if lists:
        unused = set(pairs).difference(*lists.values())
        tally.add(UNLISTED, *sorted(annotation.name for annotation in unused))
    scenes = [_voc_scene(annotation, pairs[annotation], root) for annotation in order]
    return scenes, {name: sorted({order[a] for a in part}) for name, part in lists.items()}, tally


def _voc_folders(root: Path, years: tuple[str, ...] | None) -> list[Path]:
    """The folders that hold images and annotations: one for each year, or ``root`` itself."""
    kit = next((folder for folder in (root / "VOCdevkit", root) if any(folder.glob("VOC2*/Annotations"))), None)
    if kit is None:
        if years is not None:
            raise UserError(f"{root} has no folders VOCdevkit/VOC{{year}}; correct the path or leave years out")
        return [root]
    there = {folder.parent.name.removeprefix("VOC"): folder.parent for folder in sorted(kit.glob("VOC2*/Annotations"))}
    for year in years or ():
        if year not in there:
            raise UserError(f"{kit} has no folder VOC{year}; {known(list(there), year)}")
    return [there[year] for year in years or there]


def _voc_folder(folder: Path, official: bool, tally: _Tally) -> Iterator[tuple[str | None, dict[Path, Path]]]:
    """Official lists with their annotations and images; without lists (None, everything there is)."""
    annotations, pictures = _homes(folder)
    if annotations is None:
        parts = {name: folder / name for name in ("train", "val", "valid", "test") if (folder / name).is_dir()}
        for name, part in parts.items():
            for _, listed in _voc_folder(part, False, tally):
                yield ("val" if name == "valid" else name) if official else None, listed
        return
    images = _images_by_stem(pictures)
    all_annotations = {path.stem: path for path in sorted(annotations.glob("*.xml"))}
    main = folder / "ImageSets" / "Main"
    named = {name: main / f"{name}.txt" for name in ("train", "val", "trainval", "test")}
    lists = {name: _stems(file, all_annotations) for name, file in named.items() if official and file.is_file()}
    unused = set(all_annotations).difference(*lists.values()) if lists else set()
    tally.add(UNLISTED, *(all_annotations[stem].name for stem in sorted(unused)))
    home = {annotation: images.get(stem, pictures / f"{stem}.jpg") for stem, annotation in all_annotations.items()}
    for split, stems in lists.items():
        yield split, {all_annotations[stem]: home[all_annotations[stem]] for stem in stems}
    if not lists:
        yield None, home
        bare = [images[stem].name for stem in sorted(set(images) - set(all_annotations))]
        tally.add("image(s) without an annotation file were not used", *bare)


def _homes(folder: Path) -> tuple[Path | None, Path]:
    """The folders of annotations (None = none here) and of images."""
    below = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    if "annotations" in below:
        return below["annotations"], below.get("jpegimages", below.get("images", folder))
    return (folder if any(folder.glob("*.xml")) else None), folder


def _images_by_stem(folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        if path.stem in images:
            raise UserError(
                f"{images[path.stem]} and {path.name} have the same name but for the suffix, so it is not clear which "
                "the annotation means; remove or rename one"
            )
        images[path.stem] = path
    return images


def _stems(file: Path, there: Mapping[str, Path]) -> list[str]:
    """The image names of a list file, each once."""
    stems: dict[str, None] = {}
    for number, line in enumerate(_text(file).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if name not in there:
            name = name.split()[0]  # lists of a class have a second column
        if name not in there:
            raise UserError(f"{file}, line {number}: no annotation {name}.xml; add it or remove the line")
        stems[name] = None
    return list(stems)


def _folder(path: str, what: str) -> Path:
    folder = find(path, what)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected the {what}")
    return folder


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}; it must be a text file in UTF-8") from error


def _voc_scene(annotation: Path, image: Path, root: Path) -> _Scene:
    content, tree = _parse_xml(annotation)
    if tree.tag != "annotation":
        raise UserError(f"{annotation}, line {tree.get(LINE)}: expected <annotation>, got <{tree.tag}>")
    said = tuple(_whole(tree.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    truths = tuple(_voc_truth(annotation, node) for node in tree.findall("object"))
    digest = hashlib.sha256(content).hexdigest()[:16]
    return _Scene(annotation.relative_to(root).as_posix(), image, truths, digest, (said[0], said[1]))


def _whole(text: str) -> int:
    """A size that may be missing or nonsense, as it is only compared: 0 then."""
    return int(text) if text.isascii() and text.strip().isdigit() and len(text) < 12 else 0


def _voc_truth(annotation: Path, node: ElementTree.Element) -> _Truth:
    where = f"{annotation}, line {node.get(LINE)}"
    name = node.findtext("name", "").strip()
    if not name:
        raise UserError(f"{where}: an <object> without a <name>; add its class")
    place, corners = node.find("bndbox"), []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = "" if place is None else place.findtext(side, "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{where}: expected a number in <bndbox><{side}> of {name!r}, got {text!r}")
        corners.append(value)
    flag = node.findtext("difficult", "0").strip()
    return _Truth(name, cast(Corners, tuple(corners)), flag not in ("", "0", "false", "False"), where)


def _parse_xml(path: Path) -> tuple[bytes, ElementTree.Element]:
    """Content and tree of an XML file. Declarations of a DTD are refused, so nothing can be expanded or fetched."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read annotation {path}: {error}") from error
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, {**attributes, LINE: str(parser.CurrentLineNumber)})

    def refuse(*_: object) -> NoReturn:
        raise UserError(
            f"{path}, line {parser.CurrentLineNumber}: a DTD or entity is declared (<!DOCTYPE or <!ENTITY), which is "
            "refused because it can read other files or fill the memory; remove the declaration"
        )

    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}, line {parser.CurrentLineNumber}: not valid XML: {error}; correct the file") from error
    return content, builder.close()


# --- COCO -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CocoPool:
    scenes: list[_Scene]
    classes: tuple[str, ...]


def _coco(options: SceneOptions) -> SceneData:
    train = _read_coco(cast(str, options.train), cast(str, options.path), "train")
    scenes, classes, tally = list(train.scenes), options.classes or train.classes, _Tally()
    own = list(range(len(scenes)))
    if options.test is None:
        own, test = _by_content(scenes, own, options.test_fraction)
    else:
        held = _read_coco(options.test, cast(str, options.test_path or options.path), "test")
        twice = {scene.image.resolve() for scene in scenes} & {scene.image.resolve() for scene in held.scenes}
        if twice:
            names = _some(sorted(path.name for path in twice))
            raise UserError(f"{options.test}: {len(twice)} image(s) are in {options.train} too: {names}; remove them")
        test = list(range(len(scenes), len(scenes) + len(held.scenes)))
        scenes += held.scenes
    rest, search = _by_content(scenes, own, options.search_fraction or 0.1)
    return _finish(options, scenes, classes, (rest, search, test), tally)


def _read_coco(path: str, folder: str, part: str) -> _CocoPool:
    """The images of a JSON file, in its order, and its categories by id."""
    file, root = find(path, "annotation file"), _folder(folder, "folder of images")
    content = _coco_content(file)
    categories = _coco_table(file, content["categories"], "categories", "name")
    images = _coco_table(file, content["images"], "images", "file_name")
    if not images:
        raise UserError(f"{file}: no images; the list 'images' is empty")
    truths: dict[int | str, list[_Truth]] = {key: [] for key in images}
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: annotations[{number}] is no object: {str(entry)[:80]}")
        where = f"{file}, annotation {entry.get('id', f'number {number}')}"
        image = entry.get("image_id")
        if not isinstance(image, int | str) or image not in truths:
            raise UserError(f"{where}: there is no image with id {image!r}; correct image_id or add the image")
        truths[image].append(_coco_truth(entry, where, categories))
    scenes = [_coco_scene(entry, root, part, truths[key]) for key, entry in images.items()]
    by_id = sorted(categories, key=lambda key: (isinstance(key, str), key))
    return _CocoPool(scenes, tuple(str(categories[key]["name"]) for key in by_id))


def _coco_content(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(_text(file))
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


def _coco_table(file: Path, entries: list[Any], what: str, name: str) -> dict[int | str, dict[str, Any]]:
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


def _coco_truth(entry: Mapping[str, Any], where: str, categories: Mapping[int | str, Mapping[str, Any]]) -> _Truth:
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
    return _Truth(str(categories[label]["name"]), corners, bool(entry.get("iscrowd")), where)


def _coco_scene(entry: Mapping[str, Any], root: Path, part: str, truths: Sequence[_Truth]) -> _Scene:
    name, said = str(entry["file_name"]), [_whole(str(entry.get(side, 0))) for side in ("width", "height")]
    return _Scene(f"{part}/{name}", root / name, tuple(truths), _digest_of(truths), (said[0], said[1]))


def _digest_of(truths: Sequence[_Truth]) -> str:
    content = [(truth.name, truth.corners, truth.difficult) for truth in truths]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
