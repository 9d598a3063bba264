"""Where images with boxes come from: scenes of digits, PASCAL VOC and folders like it, and COCO's JSON.

Relative paths are looked for in the working directory and then under the folder ``SECATEUR_DATA``.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field, ValidationError, model_validator

from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.schema import Section
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import coco, formats, voc
from secateur.pipeline.workloads.data.content import Damaged, Reading
from secateur.pipeline.workloads.data.paths import find
from secateur.pipeline.workloads.data.scenes import FileScenes, SceneData


class SceneOptions(Section):
    """Where the images and boxes come from."""

    source: str = "digits"
    """``yolo``, ``coco``, ``voc`` or ``digits``: a format of ``workloads/data``; or ``auto`` = what the path looks
    like, which is the default where there is one."""
    path: str | None = None
    """yolo: the folder with data.yaml, or that file; coco: the folder of the images, or with a file of annotations for
    each split; voc: the folder that holds VOCdevkit/, or ImageSets/, JPEGImages/ and Annotations/, or pairs of XML and
    image (together, in images/ and annotations/, or in either form under train/, val/ and test/)."""
    years: tuple[str, ...] | None = None
    """voc: which folders VOCdevkit/VOC{year} are used together; None = all that are there."""
    train: str | None = None
    """coco: the JSON file of the training images."""
    test: str | None = None
    """coco: the JSON file of the test images; None = they are split off the training images."""
    test_path: str | None = None
    """coco: the folder of the test images; None = ``path``."""
    classes: tuple[str, ...] | None = None
    """Names in the order of the class indices; boxes of others are ignored and counted. None = those annotated (VOC:
    sorted; COCO: by id; YOLO: as in data.yaml)."""
    damaged: Damaged = "refuse"
    """What is done about images that cannot be decoded: ``refuse`` = the run does not begin; ``leave_out`` =
    they are left out with their boxes, counted and named."""
    official_splits: bool = True
    """voc: follow the lists in ImageSets/Main (or the folders train/, val/, test/) where there are any."""
    image_size: Annotated[int, Field(ge=32, le=4096)] = 96
    """digits: side of a scene, in pixels."""
    scenes: Annotated[int, Field(ge=20, le=1_000_000)] = 2000
    """digits: how many, all splits together."""
    objects: Annotated[int, Field(ge=1, le=9)] = 4
    """digits: the most in one scene."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """digits: another seed gives other scenes; the run's own seed never does."""
    search_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training images that is held out for the search; None = the official ``val`` list where there is one
    besides ``test``, else 0.1."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Where the data has no test split: share of all images that becomes one."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_path(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("source") is None:
            return {**given, "source": formats.source_of(given, listed="coco")}
        return given

    @model_validator(mode="after")
    def _complete(self) -> SceneOptions:
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        fault = formats.faults_of(formats.SCENES, self.source, given, ("source", "search_fraction", "test_fraction"))
        if fault:
            raise ValueError(fault)
        if self.test_path is not None and self.test is None:
            raise ValueError("test_path is the folder of the images of test: name that file too")
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes needs at least one name, and each only once")
        return self


def load(options: SceneOptions, reading: Reading = Reading()) -> SceneData:  # noqa: B008 - frozen
    """Open the data, check it, and fix the splits: the official ones, or ones that depend on the content alone.

    Args:
        reading: how thoroughly image files are looked at.

    Raises:
        UserError: something is missing or wrong (see ``data/scenes.py``), or a split would be empty.
    """
    options, seen = resolved(options)
    data: SceneData = formats.SCENES.load(options.source).load_scenes(options, reading)
    if seen:
        data.source.notes = (_said(seen, data), *data.source.notes)  # type: ignore[misc]
    for split, indices in (("training", data.train), ("search", data.search), ("test", data.test)):
        if not len(indices):
            raise UserError(
                f"{options.path or options.source}: no {split} images (training needs images with boxes); add images, "
                "change search_fraction or test_fraction, or set official_splits: false to split all images anew"
            )
        if all(data.source.difficult(int(index)).all() for index in indices):  # of no boxes, too
            raise UserError(
                f"{options.path or options.source}: none of the {number_of(len(indices), f'{split} image(s)')} has a "
                f"box to be found, so precision is undefined there; see whether their annotations lie where they should"
            )
    return data


def _said(seen: str, data: SceneData) -> str:
    """What was found, in one line."""
    counts = ", ".join(f"{name} {len(getattr(data, name)):,}" for name in ("train", "search", "test"))
    return f"{seen}: {len(data.source.classes):,} classes, images: {counts}"


def resolved(options: SceneOptions) -> tuple[SceneOptions, str]:
    """(the section with the source that its path looks like, what was seen; nothing where the run file says it).

    Raises:
        UserError: it looks like none, or like several.
    """
    if options.source != formats.AUTO:
        return options, ""
    path = find(cast(str, options.path), "data")
    source, seen = formats.detect(formats.SCENES, path)
    try:
        return SceneOptions.model_validate({**options.model_dump(exclude_unset=True), "source": source}), seen
    except ValidationError as error:
        raise UserError(f"{path} looks like {seen}: {formats.told(error)}") from error


def open_scenes(options: SceneOptions, reading: Reading = Reading()) -> FileScenes:  # noqa: B008 - frozen
    """All images of ``voc``, or of ``train`` of ``coco``, in order and without splits: to measure on, or to look at.

    Raises:
        UserError: as in ``load``.
    """
    if options.source == "voc":
        return voc.open_all(cast(str, options.path), options.years, options.official_splits, options.classes, reading)
    if options.source == "coco":
        return coco.open_all(cast(str, options.train), cast(str, options.path), options.classes, reading)
    raise UserError("digits have no files: use load")
