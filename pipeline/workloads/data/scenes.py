"""Images with boxes: what every format of them gives, checked, brought into one frame, and split.

Boxes are x1, y1, x2, y2 in pixels of the image as a person sees it, as annotated (VOC counts pixels from 1; as in
torchvision, nothing is subtracted). Every annotation is read and every image looked at before anything is trained. What
cannot be used is never dropped in silence: either an error names the file, or ``notes`` count it.

==============================  =======================================================================
found                           done
==============================  =======================================================================
image without boxes             kept where it is measured on (search, test), not trained on; counted
box that leaves the image       clipped and counted; dropped and counted if nothing of it is left
box without area                dropped and counted
class that is not known         error: file, line, known classes
image missing                   error: file
image that cannot be decoded    error: file; or left out with its boxes, counted (``damaged: leave_out``)
XML or JSON that is wrong       error: file, line
XML that declares a DTD         refused: entities could read files or fill the memory
==============================  =======================================================================

Which frame boxes are in is said by the size that the annotation gives:

==============================  =======================================================================
the annotation's size is        its boxes are
==============================  =======================================================================
that of the image as seen       taken as they are
that of the image as stored,    turned with the pixels
before its orientation tag
the image's, in proportion      scaled, and counted
another, or none                taken as they are; another one is counted, and so is an orientation tag
==============================  =======================================================================
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import record, splits
from secateur.pipeline.workloads.data.content import Damaged, Reading, Seen, look, read_file, without_damaged
from secateur.pipeline.workloads.data.decode import Pixels, turned_box
from secateur.pipeline.workloads.data.decoded import Decoded, threads
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.sources import Sizes

Boxes = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Corners = tuple[float, float, float, float]
SEARCH_FRACTION = 0.1
"""Share of the training images that is held out for the search, where the run file says none."""


class SceneSource(Protocol):
    """Images with boxes, read when needed."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index; there is no background among them."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the data: what was clipped, dropped or not used, with counts."""

    @property
    def contents(self) -> Sequence[bytes]:
        """A digest of every image's content and of what is annotated on it."""

    @property
    def keys(self) -> Sequence[str]:
        """What every image is called to the user."""

    @property
    def sizes(self) -> Sizes:
        """(width, height) of the images as a person sees them -> how many have it."""

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
        fingerprint: names the content that is used: images, annotations, classes and splits.
        members: every image that is used, for the run's record.
    """

    source: SceneSource
    train: Indices
    search: Indices
    test: Indices
    fingerprint: str
    members: tuple[record.Member, ...]

    @classmethod
    def of(cls, source: SceneSource, parts: Mapping[str, Indices]) -> SceneData:
        """The data of a source and its splits ``train``, ``search`` and ``test``."""
        members = record.members_of(parts, source.keys, source.contents)
        content = {"classes": list(source.classes), "members": record.digest_of(members)}
        return cls(source, parts["train"], parts["search"], parts["test"], record.fingerprint_of(content), members)


@dataclass(frozen=True)
class Truth:
    """A box as annotated; ``where`` is the place a user has to look at."""

    name: str
    corners: Corners
    difficult: bool
    where: str


@dataclass(frozen=True)
class Scene:
    """An annotated image.

    Args:
        key: its name within the data, the same on every machine.
        digest: names the content of its annotation.
        said: width and height that the annotation gives, if any.
        relative: whether boxes are fractions of the image as it is seen.
    """

    key: str
    image: Path
    truths: tuple[Truth, ...]
    digest: str
    said: tuple[int, int] | None = None
    relative: bool = False


class FileScenes:
    """Images that are files, decoded when read; boxes are held in memory.

    Args:
        scenes: the annotated images.
        seen: what is known of the image files.
        boxes: of each image, shape (n, 5), float32.
        difficult: of each image, shape (n,).
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        seen: Sequence[Seen],
        boxes: Sequence[Boxes],
        difficult: Sequence[Flags],
        classes: tuple[str, ...],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.files, self.keys = [scene.image for scene in scenes], [scene.key for scene in scenes]
        self.pictures = [one.digest for one in seen]
        self.contents = [
            hashlib.sha256(one.digest + scene.digest.encode()).digest() for one, scene in zip(seen, scenes, strict=True)
        ]
        self._sizes = [one.size for one in seen]
        self.sizes: Sizes = Counter(self._sizes)
        self._decoded: Decoded | None = None
        self.classes, self.notes = classes, notes
        self._boxes, self._difficult = boxes, difficult

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Indices) -> list[Pixels]:
        with ThreadPoolExecutor(threads()) as pool:
            return list(pool.map(self._read_one, indices.tolist()))

    def _read_one(self, index: int) -> Pixels:
        if self._decoded is None:
            return read_file(self.files[index]).pixels
        return self._decoded.get(index, lambda: read_file(self.files[index]).pixels)

    def keep(self, indices: Indices, room: int) -> None:
        """Keep these images in so many bytes of memory, which forked processes share, once they are decoded."""
        if self._decoded is None:
            self._decoded = Decoded({i: self._sizes[i] for i in indices.tolist()}, 3, room)

    def forget(self) -> None:
        self._decoded = None

    def boxes(self, index: int) -> Boxes:
        return self._boxes[index]

    def difficult(self, index: int) -> Flags:
        return self._difficult[index]


def usable(
    scenes: Sequence[Scene], damaged: Damaged, reading: Reading, tally: Tally
) -> tuple[list[Scene], list[Seen], dict[int, int]]:
    """The scenes whose images can be used, what is known of these, and old index -> new index.

    Raises:
        UserError: an image is missing; or one cannot be decoded and is not to be left out.
    """
    missing = [f"{scene.image} (annotated by {scene.key})" for scene in scenes if not scene.image.is_file()]
    if missing:
        raise UserError(
            f"{number_of(len(missing), 'image(s)')} not found: {some(missing)}; restore them or remove the annotations"
        )
    seen = look([scene.image for scene in scenes], reading.about(damaged), sizes=True)
    kept = without_damaged([str(scene.image) for scene in scenes], seen, damaged, tally)
    return [scenes[i] for i in kept], [seen[i] for i in kept], {old: new for new, old in enumerate(kept)}


def assemble(
    scenes: Sequence[Scene],
    seen: Sequence[Seen],
    classes: tuple[str, ...] | None,
    tally: Tally,
    chosen: bool = False,
) -> FileScenes:
    """Check boxes.

    Args:
        classes: None = the names that occur, sorted.
        chosen: whether they are what the user wants of the data, so that boxes of others are ignored, and counted.

    Raises:
        UserError: there are no classes; a box has an unknown one; or a chosen one occurs nowhere, and others do.
    """
    if classes is None:
        classes = tuple(sorted({truth.name for scene in scenes for truth in scene.truths}))
        if not classes:
            raise UserError(
                f"no boxes in {number_of(len(scenes), 'annotation(s)')}, so no classes; name data.classes or add boxes"
            )
    places = {name: index for index, name in enumerate(classes)}
    if chosen:
        _check_chosen(classes, {truth.name for scene in scenes for truth in scene.truths})
    kept = [_boxes_of(scene, one, places, tally, chosen) for scene, one in zip(scenes, seen, strict=True)]
    boxes, difficult = [boxes for boxes, _ in kept], [flags for _, flags in kept]
    return FileScenes(scenes, seen, boxes, difficult, classes, tally.notes())


def _check_chosen(classes: Sequence[str], there: set[str]) -> None:
    """See that what is chosen is annotated, unless everything that is annotated was chosen."""
    others = sorted(there - set(classes))
    missing = [name for name in classes if name not in there]
    if others and missing:
        raise UserError(
            f"data.classes names {some(missing)}, and no box is of that class; {known(others, missing[0])}. Correct "
            "the annotation or data.classes, or leave data.classes out to use all classes that occur"
        )


def divide(
    source: FileScenes, given: Mapping[str, Iterable[int]], shares: Mapping[str, float], tally: Tally
) -> SceneData:
    """Splits: those that are given, and what is missing drawn from the training images by their content.

    Args:
        given: ``train``, and perhaps ``search`` and ``test``: indices into the source.
        shares: of the splits that are missing, among all images of ``train``.
    """
    labels = [source.boxes(index)[:, 4].astype(np.int64).tolist() for index in range(len(source))]
    parts = splits.draw(source.pictures, labels, shares, source.classes, tally, sorted(given["train"]))
    parts |= {
        name: np.array(sorted(set(indices), key=lambda i: (source.pictures[i], i)), dtype=np.int64)
        for name, indices in given.items()
        if name != "train"
    }
    splits.note_repeats(source.pictures, parts, source.keys, tally)
    trained = np.array([i for i in parts["train"] if len(source.boxes(int(i)))], dtype=np.int64)
    bare = {name: [source.keys[i] for i in part if not len(source.boxes(int(i)))] for name, part in parts.items()}
    tally.add("image(s) without boxes is|are not trained on", *bare["train"])
    measured = [*bare["search"], *bare["test"]]
    tally.add("image(s) without boxes is|are among those measured on (search, test)", *measured)
    learnt = {label for i in trained for label in labels[int(i)]}
    names = [name for index, name in enumerate(source.classes) if index not in learnt]
    tally.add("class(es) without a box to train on, which cannot be learnt from this data", *names)
    source.notes = tally.notes()
    return SceneData.of(source, {"train": trained, "search": parts["search"], "test": parts["test"]})


def whole_number(text: str) -> int:
    """A size that may be missing or nonsense, as it is only compared: 0 then."""
    return int(text) if text.isascii() and text.strip().isdigit() and len(text) < 12 else 0


# -- boxes -------------------------------------------------------------------------------------------------------------


def _boxes_of(scene: Scene, seen: Seen, places: Mapping[str, int], tally: Tally, chosen: bool) -> tuple[Boxes, Flags]:
    """The boxes that can be used, within the image as it is seen, and whether they are difficult."""
    turned, across, down = _frame(scene, seen, tally)
    rows, flags = [], []
    for truth in scene.truths:
        if truth.name not in places and chosen:
            tally.add("box(es) of classes that data.classes does not name was|were ignored", truth.name)
            continue
        if truth.name not in places:
            raise UserError(
                f"{truth.where}: unknown class {truth.name!r}; {known(list(places), truth.name)}. "
                "Correct the annotation or data.classes, or leave data.classes out to use all classes that occur"
            )
        x1, y1, x2, y2 = truth.corners
        corners = (x1 * across, y1 * down, x2 * across, y2 * down)
        if turned:
            corners = turned_box(corners, seen.stored, seen.orientation)
        clipped = _clip(truth, corners, seen.size, tally)
        if clipped is not None:
            rows.append((*clipped, places[truth.name]))
            flags.append(truth.difficult)
    return np.array(rows, dtype=np.float32).reshape(-1, 5), np.array(flags, dtype=bool)


def _frame(scene: Scene, seen: Seen, tally: Tally) -> tuple[bool, float, float]:
    """(whether boxes are turned with the pixels, factor across, factor down); see the table of this module."""
    size, stored, said = seen.size, seen.stored, scene.said
    if scene.relative:
        return False, float(size[0]), float(size[1])
    if said is None or 0 in said:
        if seen.orientation != 1:
            tally.add(
                "image(s) is|are turned by its|their tag and annotated without a size: boxes are as seen", scene.key
            )
        return False, 1.0, 1.0
    if said == size:
        if seen.orientation != 1 and stored == size:
            tally.add(
                "image(s) is|are turned by its|their tag, which its|their size does not show: boxes are as seen",
                scene.key,
            )
        return False, 1.0, 1.0
    if said == stored:
        tally.add("image(s) is|are turned by its|their tag, and the boxes with it|them", scene.key)
        return True, 1.0, 1.0
    for frame in dict.fromkeys((size, stored)):
        if _proportional(said, frame):
            what = "image(s) has|have another size than its|their annotation gives, and the boxes were scaled"
            tally.add(what, f"{scene.key} ({size[0]}x{size[1]}, not {said[0]}x{said[1]})")
            return frame != size, frame[0] / said[0], frame[1] / said[1]
    what = "image(s) does|do not have the size that the annotation gives; the image's own was used"
    tally.add(what, f"{scene.key} ({size[0]}x{size[1]}, not {said[0]}x{said[1]})")
    return False, 1.0, 1.0


def _proportional(said: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether one size is the other scaled, up to rounding to whole pixels."""
    (small_wide, small_high), (wide, high) = sorted((said, size))
    return abs(small_wide - wide * small_high / high) <= 1 or abs(small_high - high * small_wide / wide) <= 1


def _clip(truth: Truth, corners: Corners, size: tuple[int, int], tally: Tally) -> Corners | None:
    x1, y1, x2, y2 = corners
    if x2 <= x1 or y2 <= y1:
        tally.add("box(es) without area was|were dropped", Path(truth.where).name)
        return None
    wide, high = size
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(wide)), min(y2, float(high)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        tally.add("box(es) wholly outside its|their image was|were dropped", Path(truth.where).name)
        return None
    if inside != corners:
        tally.add("box(es) that leaves|leave its|their image was|were clipped", Path(truth.where).name)
    return inside
