"""Data sets of torchvision: whatever they call their labels and files, and those that are for something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as zoo

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.classification import Classification, Options, build
from secateur.pipeline.workloads.data.content import Reading
from tests.pipeline.workloads.data.pictures import noise


def opened(name: str, root: Path, **data: object) -> Classification:
    section = {"source": "torchvision", "dataset": name, "path": str(root), "download": False, "image_size": 16, **data}
    return build(Options.model_validate({"model": {"name": "cifar/resnet8"}, "data": section}), Reading())


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise(seed=seed).save(file)


def food101(root: Path) -> None:
    for part in ("train", "test"):
        listing = {c: [f"{c}/{part}{i}" for i in range(8)] for c in ("aa", "bb")}
        (root / "food-101/meta").mkdir(parents=True, exist_ok=True)
        (root / f"food-101/meta/{part}.json").write_text(json.dumps(listing))
        for k, c in enumerate(listing):
            for i in range(8):
                picture(root / f"food-101/images/{c}/{part}{i}.jpg", hash((part, k, i)) % 10_000)


def gtsrb(root: Path) -> None:
    for k in range(2):
        for i in range(8):
            picture(root / f"gtsrb/GTSRB/Training/0000{k}/{i}.ppm", 100 * k + i)
            picture(root / f"gtsrb/GTSRB/Final_Test/Images/{k}{i}.ppm", 500 + 100 * k + i)
    rows = [f"{k}{i}.ppm;1;1;1;1;1;1;{k}" for k in range(2) for i in range(8)]
    (root / "gtsrb/GT-final_test.csv").write_text("\n".join(["Filename;a;b;c;d;e;f;ClassId", *rows]) + "\n")


def dtd(root: Path) -> None:
    for part in ("train", "val", "test"):
        names = [f"{c}/{c}_{part}{i}.jpg" for c in ("aa", "bb") for i in range(6)]
        (root / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            picture(root / "dtd/dtd/images" / name, len(part) * 100 + i)


def fgvc(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    for part in ("train", "val", "test"):
        rows = [f"{k}{i}{len(part)} {'ab'[k]}" for k in range(2) for i in range(6)]
        data.mkdir(parents=True, exist_ok=True)
        (data / f"images_variant_{part}.txt").write_text("\n".join(rows) + "\n")
        for i, row in enumerate(rows):
            picture(data / f"images/{row.split()[0]}.jpg", len(part) * 100 + i)
    (data / "variants.txt").write_text("a\nb\n")


@pytest.mark.parametrize(
    ("name", "make", "searched"),
    [("Food101", food101, False), ("GTSRB", gtsrb, False), ("DTD", dtd, True), ("FGVCAircraft", fgvc, True)],
)
def test_sets_whose_images_are_files(name: str, make: Any, searched: bool, tmp_path: Path) -> None:
    make(tmp_path)
    workload = opened(name, tmp_path)
    assert workload.num_classes == 2 and workload.record.files and workload.usage["resize"] == "crop"
    assert len(workload.search) == 12 if searched else len(workload.train) + len(workload.search) == 16
    theirs = getattr(zoo, name)(str(tmp_path), split="train")
    for index in range(0, len(theirs), 5):
        image, label = theirs[index]
        place = workload.train.source.files.index(_file_of(theirs, index))  # type: ignore[attr-defined]
        assert workload.train.source.labels[place] == label
        assert workload.train.source.read(np.array([place])).shape == (1, 16, 16, 3)
        assert image.size == (24, 16)
    before, changed = workload.fingerprint, _file_of(theirs, 0)
    noise(seed=31_337).save(changed)
    assert opened(name, tmp_path).fingerprint != before
    changed.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read image"):
        opened(name, tmp_path)


def _file_of(dataset: Any, index: int) -> Path:
    found = getattr(dataset, "_image_files", None) or [path for path, _ in dataset._samples]
    return Path(found[index])


def test_a_set_without_splits_is_split(tmp_path: Path) -> None:
    for k in range(2):
        for i in range(12):
            picture(tmp_path / f"eurosat/2750/{'ab'[k]}/{i}.jpg", 100 * k + i)
    workload = opened("EuroSAT", tmp_path)
    assert workload.classes == ("a", "b") and len(workload.train) + len(workload.search) + len(workload.test) == 24


def test_a_set_that_makes_its_images_is_known_by_their_pixels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Made(zoo.VisionDataset):
        def __init__(self, root: str, train: bool = True) -> None:
            super().__init__(root)
            self.seed, self.targets = (0 if train else 500) + shift, [i % 2 for i in range(20)]

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            return noise(seed=self.seed + index), self.targets[index]

    shift = 0
    monkeypatch.setattr(zoo, "Made", Made, raising=False)
    before = opened("Made", tmp_path)
    assert before.fingerprint == opened("Made", tmp_path).fingerprint and not before.named
    shift = 1
    assert opened("Made", tmp_path).fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["folder", "mnist", "VisionDataset", "Cifar10", "os"])
def test_names_of_other_things_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"has no '{name}'"):
        opened(name, tmp_path)


@pytest.mark.parametrize("name", ["CocoDetection", "VOCDetection", "Kinetics", "FakeData", "Flowers102", "ImageNet"])
def test_sets_that_cannot_be_used_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not usable under|does not tell the class"):
        opened(name, tmp_path)
