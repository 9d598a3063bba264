"""Where images with boxes come from: scenes of digits, PASCAL VOC and folders like it, and COCO's JSON.

Relative paths are looked for in the working directory and then under the folder ``SECATEUR_DATA``.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field, model_validator

from secateur.pipeline.config.schema import Section
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import coco, digit_scenes, voc
from secateur.pipeline.workloads.data.content import Damaged, Reading
from secateur.pipeline.workloads.data.scenes import FileScenes, SceneData


class SceneOptions(Section):
    """Where the images and boxes come from."""

    source: Literal["digits", "voc", "coco"] = "digits"
    """digits = scenes made of digits, without a download; voc = PASCAL VOC or a folder like it; coco = COCO's JSON."""
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
    damaged: Damaged = "refuse"
    """voc, coco: what is done about images that cannot be decoded: ``refuse`` = the run does not begin; ``leave_out`` =
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

    @model_validator(mode="after")
    def _complete(self) -> SceneOptions:
        needs = {"voc": ("path",), "coco": ("path", "train")}.get(self.source, ())
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise ValueError(f"source {self.source!r} also needs {' and '.join(missing)}")
        own = {
            "digits": {"image_size", "scenes", "objects", "seed"},
            "voc": {"path", "years", "classes", "official_splits", "damaged"},
            "coco": {"path", "train", "test", "test_path", "classes", "damaged"},
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


def load(options: SceneOptions, reading: Reading = Reading()) -> SceneData:  # noqa: B008 - frozen
    """Open the data, check it, and fix the splits: the official ones, or ones that depend on the content alone.

    Args:
        reading: how thoroughly image files are looked at.

    Raises:
        UserError: something is missing or wrong (see ``data/scenes.py``), or a split would be empty.
    """
    data = _load(options, reading)
    for split, indices in (("training", data.train), ("search", data.search), ("test", data.test)):
        if not len(indices):
            raise UserError(
                f"{options.path or options.source}: no {split} images (training needs images with boxes); add images, "
                "change search_fraction or test_fraction, or set official_splits: false to split all images anew"
            )
    return data


def _load(options: SceneOptions, reading: Reading) -> SceneData:
    o = options
    match o.source:
        case "digits":
            return digit_scenes.load(o.scenes, o.image_size, o.objects, o.seed, o.search_fraction, o.test_fraction)
        case "voc":
            return voc.load(
                cast(str, o.path),
                o.years,
                o.classes,
                o.official_splits,
                o.search_fraction,
                o.test_fraction,
                o.damaged,
                reading,
            )
        case "coco":
            return coco.load(
                cast(str, o.train),
                o.test,
                cast(str, o.path),
                o.test_path,
                o.classes,
                o.search_fraction,
                o.test_fraction,
                o.damaged,
                reading,
            )


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
