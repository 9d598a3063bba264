"""Rows whose data is not here go through all stages on a few made-up images in the layout of that data.

The run files are those of the rows; overrides make networks see small images for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secateur.pipeline.lifecycle.results import write_results
from secateur.pipeline.lifecycle.rows import Unit, read_row, row_names
from secateur.pipeline.lifecycle.verify import verify
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.run import Run, create_run_directory
from tests.pipeline.helpers import perform, quick_device

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]
DRAWN = np.random.default_rng(0)
BOX = "<object><name>{}</name><difficult>0</difficult><bndbox>{}</bndbox></object>"
CORNERS = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"


def noise(side: int) -> np.ndarray:
    return DRAWN.integers(0, 256, (side, side, 3), dtype=np.uint8)


def folders(root: Path) -> None:
    """Classes as folders in train and val."""
    for part, number in (("train", 30), ("val", 6)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(noise(40 + i)).save(root / part / name / f"{name}_{part}_{i}.JPEG")


def cifar100(root: Path) -> None:
    """Arrays of a hundred classes."""
    root.mkdir(parents=True)
    for part, number in (("train", 400), ("test", 100)):
        np.save(root / f"{part}_images.npy", np.stack([noise(32) for _ in range(number)]))
        np.save(root / f"{part}_labels.npy", np.arange(number, dtype=np.uint8) % 100)


def voc(root: Path) -> None:
    """Both years of PASCAL VOC, a few images each."""
    lists = {"VOC2007": {"trainval": 8, "test": 5}, "VOC2012": {"trainval": 8}}
    names = ("person", "dog", "car")
    for year, parts in lists.items():
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        for part, number in parts.items():
            stems = [f"{year}_{part}_{i}" for i in range(number)]
            (root / year / "ImageSets/Main" / f"{part}.txt").write_text("\n".join(stems) + "\n")
            for i, stem in enumerate(stems):
                Image.fromarray(noise(80)).save(root / year / "JPEGImages" / f"{stem}.jpg")
                box = BOX.format(names[i % 3], CORNERS.format(10, 12, 50, 60))
                size = "<size><width>80</width><height>80</height><depth>3</depth></size>"
                text = f"<annotation><filename>{stem}.jpg</filename>{size}{box}</annotation>"
                (root / year / "Annotations" / f"{stem}.xml").write_text(text)


TREES: Mapping[str, Callable[[Path], None]] = {
    "imagenet": folders,
    "places365": folders,
    "cifar100": cifar100,
    "VOCdevkit": voc,
}
SHORT = ["baseline.epochs=0.1", "finetune.epochs=0.1", "search.images=4", "threads=1"]
SHORT += ["baseline.batch_size=8", "finetune.batch_size=8", "baseline.warmup_epochs=0", "finetune.warmup_epochs=0"]
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ccep": {"outer_iterations": 1, "population": 2, "generations": 1, "finetune_epochs": 0.1},
    "acp": {"population": 2, "cycles": 1, "fitness_epochs": 0.1, "best_epochs": 0.1, "images": 8},
    "rewarded_meta": {"epochs": 0.1, "iterations": 1, "population": 2, "parents": 1, "top": 1},
    "evofc": {"population": 2, "offspring": 2, "generations": 1, "epochs": 0.2, "best_epochs": 0.1, "images": 8},
}
NAMES = [name for name in row_names() if read_row(name).not_here]


def tree_of(name: str) -> str:
    """The folder under SECATEUR_DATA that a row needs."""
    (need,) = read_row(name).needs
    return need.split("/")[0].split(":")[0]


def test_every_row_without_data_has_a_tree() -> None:
    assert len(NAMES) >= 9 and {tree_of(name) for name in NAMES} == set(TREES)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_data_goes_through_all_stages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "data"))
    TREES[tree_of(name)](tmp_path / "data" / tree_of(name))
    unit = Unit(name, read_row(name).units[0], 0, "cpu")
    more = [*SHORT, f"device.profile={quick_device(tmp_path)}"]
    more += [f"search.options.{key}={value}" for key, value in OPTIONS[unit.name].items()]
    if tree_of(name) in ("imagenet", "places365"):
        more += ["workload.data.image_size=64"]
    if tree_of(name) == "cifar100":
        more += ["workload.model.name=cifar/resnet8"]
    with Run(create_run_directory(unit.config(more)), Silent()) as run:
        run.tracker.start()
        facts = perform(run, "register")
    assert facts.register is not None
    folder = tmp_path / "results" / name / unit.label
    found = write_results(unit, run.directory, folder)
    assert found.figure("macs_removed") > 0.3
    assert verify(folder).faults == ()
