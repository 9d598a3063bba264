"""What lies at a path is seen by looking, and said; every format reads a tiny tree, and says what is wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads import classification
from secateur.pipeline.workloads.data import formats
from secateur.pipeline.workloads.data.torchvision import DEFAULTS, PARTS, _arguments
from secateur.pipeline.workloads.detection import scenes
from tests.pipeline.workloads.data.pictures import noise

NAMES = ("cat", "dog", "fox")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed=seed).save(path)


def opened(path: Path, **data: Any) -> classification.Classification:
    options = {"model": {"name": "cifar/resnet8"}, "data": {"path": str(path), "image_size": 16, **data}}
    return classification.build(classification.Options.model_validate(options))


def seen(path: Path, **data: Any) -> scenes.SceneData:
    return scenes.load(scenes.SceneOptions.model_validate({"path": str(path), **data}))


# -- labelled images


def flat(root: Path) -> None:
    for index in range(36):
        picture(root / NAMES[index % 3] / f"{index}.png", index)


def split(root: Path) -> None:
    for index in range(36):
        picture(root / ("train", "valid")[index % 4 == 0] / NAMES[index % 3] / f"{index}.png", index)


def arrays(root: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        np.save(root / f"{part}_images.npy", rng.integers(0, 256, (36, 8, 12, 3), dtype=np.uint8))
        np.save(root / f"{part}_labels.npy", np.arange(36) % 3)


def table(root: Path) -> None:
    rows = [f"images/{index}.png,{NAMES[index % 3]},{('train', 'test')[index % 4 == 0]}" for index in range(36)]
    for index in range(36):
        picture(root / f"images/{index}.png", index)
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")


def parquet(root: Path, labels: Callable[[int], Any] = lambda index: index % 3) -> None:
    """As the ``datasets`` library writes an image folder."""
    info = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    for part, start, count in (("train", 0, 24), ("test", 100, 12)):
        cells, numbers = [], []
        for index in range(count):
            content = io.BytesIO()
            noise(seed=start + index).save(content, "PNG")
            cells.append({"bytes": content.getvalue(), "path": f"{index}.png"})
            numbers.append(labels(index))
        made = pa.table({"image": cells, "label": pa.array(numbers, pa.int64())})
        (root / "data").mkdir(exist_ok=True)
        metadata = {"huggingface": json.dumps({"info": {"features": info}})}
        pq.write_table(made.replace_schema_metadata(metadata), root / f"data/{part}-00000-of-00001.parquet")


LABELLED = {
    "flat": (flat, "class folders: 3 classes, 36 images, test split carved: 20 %"),
    "split": (split, "class folders: 3 classes, 36 images, test split 9 images of its own"),
    "arrays": (arrays, "arrays, train_images.npy: 3 classes, 72 images, test split 36 images of its own"),
    "table": (table, "a table of images, list.csv: 3 classes, 36 images, test split 9 images of its own"),
    "parquet": (parquet, "images in 2 parquet files: 3 classes, 36 images, test split 12 images of its own"),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_labelled_images_are_found_by_looking_and_said_aloud(kind: str, tmp_path: Path) -> None:
    make, said = LABELLED[kind]
    place = tmp_path / "photos"
    place.mkdir()
    make(place)
    workload = opened(place)
    assert workload.notes[0] == said
    assert workload.example_input().shape == (1, 3, 16, 16)
    if kind != "arrays":
        assert workload.classes == NAMES and workload.usage["classes"] == list(NAMES)
    cpu = torch.device("cpu")
    images, targets = workload.batch(workload.train, torch.arange(4), train=True, generator=None, device=cpu)
    assert len(images) == len(targets) == 4
    assert opened(place).fingerprint == workload.fingerprint


def test_what_is_seen_and_what_is_said_in_the_run_file_are_the_same_run(tmp_path: Path) -> None:
    flat(tmp_path / "photos")
    said = opened(tmp_path / "photos", source="folder")
    assert said.fingerprint == opened(tmp_path / "photos").fingerprint
    assert not any("class folders:" in note for note in said.notes)


def test_two_things_at_one_path_are_told_apart_by_the_run_file(tmp_path: Path) -> None:
    flat(tmp_path)
    table(tmp_path)
    with pytest.raises(
        UserError, match=r"csv \(a table of images, list.csv\) or folder \(class folders\); set data.source"
    ):
        opened(tmp_path)
    assert opened(tmp_path, source="csv").num_classes == 3


def test_nothing_that_can_be_read_is_said_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"looks like no source of images \(arrays, csv, .*it holds notes.txt"):
        opened(tmp_path)
    with pytest.raises(UserError, match="looks like no source of images with boxes"):
        seen(tmp_path)
    with pytest.raises(ValueError, match=r"unknown source 'foldr'.*did you mean 'folder'"):
        opened(tmp_path, source="foldr")
    with pytest.raises(ValueError, match="does not use columns"):
        opened(tmp_path, source="folder", columns={"path": "file"})


def test_arrays_that_are_not_square_are_taken_as_they_are(tmp_path: Path) -> None:
    arrays(tmp_path)
    assert opened(tmp_path, image_size=None, augment="flip_shift").example_input().shape == (1, 3, 8, 12)


def rows(root: Path, *lines: str) -> None:
    (root / "list.csv").write_text("\n".join(lines) + "\n")


TABLES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "other columns": (
        ("picture,kind", "images/1.png,a"),
        {"source": "csv"},
        r"no column 'path'; known: picture, kind.*data.columns",
    ),
    "no label": (("path,label", "images/1.png,"), {}, "line 2: no value in column label"),
    "no image": (("path,label", "images/1.png,a", "images/x.png,b"), {}, "line 3: there is no image"),
    "one class": (("path,label", "images/1.png,a"), {}, "at least two classes; found a"),
    "twice": (("path,label", "images/1.png,a", "images/1.png,b"), {}, "line 3: images/1.png stands in line 2 too"),
    "another split": (
        ("path,label,split", "images/1.png,a,dev", "images/2.png,b,dev"),
        {},
        "split 'dev'; expected train",
    ),
    "another class": (("path,label", "images/1.png,a"), {"classes": ["b", "c"]}, "class 'a' is not among data.classes"),
    "nothing": (("path,label",), {}, "no images; expected a line for each"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_says_the_line_of_what_is_wrong(case: str, tmp_path: Path) -> None:
    lines, data, said = TABLES[case]
    table(tmp_path)
    rows(tmp_path, *lines)
    with pytest.raises(UserError, match=said):
        opened(tmp_path, **data)


def test_the_columns_of_a_table_may_have_other_names(tmp_path: Path) -> None:
    table(tmp_path)
    lines = (tmp_path / "list.csv").read_text().replace("path,label,split", "file,kind,part").splitlines()
    rows(tmp_path, *lines)
    columns = {"path": "file", "label": "kind", "split": "part"}
    workload = opened(tmp_path, source="csv", columns=columns)
    assert workload.classes == NAMES and len(workload.test) == 9


def test_tables_of_other_programs_are_read(tmp_path: Path) -> None:
    """Semicolons, Windows' line ends and paths, and columns by the names that they often have."""
    table(tmp_path)
    text = (tmp_path / "list.csv").read_text().replace("path,label", "File Name,Class").replace("File Name", "filename")
    (tmp_path / "list.csv").write_text(text.replace(",", ";").replace("/", "\\"), newline="\r\n")
    workload = opened(tmp_path / "list.csv")
    assert workload.classes == NAMES and len(workload.test) == 9
    assert "list.csv (filename and Class)" in workload.notes[0]


def test_a_table_without_the_columns_is_told_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("picture;kind\n0.png;cat\n")
    with pytest.raises(UserError, match=r"its first line is 'picture;kind'; .*data.columns: \{path: COLUMN"):
        opened(tmp_path / "list.csv")


def test_damage_is_told_in_every_format(tmp_path: Path) -> None:
    table(tmp_path)
    (tmp_path / "images/4.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read image images/4.png"):
        opened(tmp_path)
    assert any("cannot be read and was left out" in note for note in opened(tmp_path, damaged="leave_out").notes)


@pytest.mark.parametrize(
    ("label", "said"), [(7, "row 0: label 7; expected 0 to 2"), (None, "row 0: label None"), (-1, "label -1")]
)
def test_labels_of_parquet_files_must_be_classes(label: Any, said: str, tmp_path: Path) -> None:
    parquet(tmp_path, lambda _: label)
    with pytest.raises(UserError, match=said):
        opened(tmp_path)


def test_parquet_files_that_are_none_or_hold_other_things(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="no readable parquet file"):
        opened(tmp_path)
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"one column of images .* found none; it has text, label"):
        opened(tmp_path)
    cells = pa.array([{"bytes": None, "path": "a.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": cells, "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 0: no image in it"):
        opened(tmp_path)


# -- torchvision's sets


def test_the_table_of_torchvisions_sets_names_arguments_that_they_take() -> None:
    import torchvision.datasets as zoo

    for name, parts in PARTS.items():
        takes = _arguments(getattr(zoo, name))
        assert {key for choice in parts.values() for key in choice} | set(DEFAULTS.get(name, {})) <= takes, name
        if "split" in takes and name != "EMNIST":
            assert any("split" in choice for choice in parts.values()), f"{name} has splits"


def test_imagenet_is_read_where_it_is_unpacked(tmp_path: Path) -> None:
    wnids = {"n01": ("tench", "Tinca"), "n02": ("goldfish",)}
    torch.save((wnids, ["n01", "n02"]), tmp_path / "meta.bin")
    for index in range(24):
        picture(tmp_path / ("train", "val")[index % 3 == 0] / f"n0{1 + index % 2}" / f"{index}.png", index)
    workload = opened(tmp_path, dataset="ImageNet")
    assert workload.classes == ("tench, Tinca", "goldfish") and len(workload.test) == 8


def test_places365_has_its_own_words_for_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets as zoo

    monkeypatch.setattr(zoo.Places365, "_check_integrity", lambda *_: True)  # our lists are not the published ones
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0\n/b/beach 1\n")
    lists = {"train_standard": "data_256_standard", "val": "val_256"}
    for count, (name, folder) in enumerate(lists.items()):
        lines = [f"/x/{index}.png {index % 2}" for index in range(12)]
        (tmp_path / f"places365_{name}.txt").write_text("\n".join(lines).replace("/x/", "/x/" if not count else ""))
        for index in range(12):
            picture(tmp_path / folder / (f"x/{index}.png" if not count else f"{index}.png"), 50 * count + index)
    workload = opened(tmp_path, dataset="Places365", options={"small": True})
    assert workload.classes == ("/a/airfield", "/b/beach") and len(workload.test) == 12
    with pytest.raises(UserError, match=r"does not take data.options tiny; it takes small, split"):
        opened(tmp_path, dataset="Places365", options={"tiny": True})


# -- images with boxes


def yolo(root: Path, description: str = "", **files: str) -> Path:
    """Two splits as Ultralytics lays them out, image 0 without a label file."""
    for part, count in (("train", 8), ("val", 4)):
        for index in range(count):
            picture(root / f"images/{part}/{index}.png", index + 20 * (part == "val"))
            label = root / f"labels/{part}/{index}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            if index:
                label.write_text(f"{index % 2} 0.5 0.5 0.5 0.25\n")
    described = "path: .\ntrain: images/train\nval: images/val\nnames: {0: ball, 1: cube}\n"
    (root / "data.yaml").write_text(description or described)
    for name, text in files.items():
        (root / f"labels/train/{name}.txt").write_text(text)
    return root


def test_yolo_labels_are_found_and_their_boxes_are_in_pixels(tmp_path: Path) -> None:
    data = seen(yolo(tmp_path))
    assert data.source.classes == ("ball", "cube")
    assert data.source.notes[0] == "YOLO labels, data.yaml: 2 classes, images: train 5, search 2, test 4"
    first = data.source.keys.index("images/train/1.png")
    wide, high = noise(seed=1).size
    assert data.source.boxes(first).tolist() == [[wide * 0.25, high * 0.375, wide * 0.75, high * 0.625, 1]]
    assert any(
        "without boxes is not trained on" in note or "without boxes is among" in note for note in data.source.notes
    )


def test_yolo_as_labelling_tools_export_it(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        for index in range(4):
            picture(tmp_path / part / f"images/{index}.png", index + 10 * len(part))
            label = tmp_path / part / f"labels/{index}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\n")
    (tmp_path / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['on', 'off']\n"
    )
    data = seen(tmp_path)
    assert [len(part) for part in (data.train, data.search, data.test)] == [4, 4, 4]
    assert data.source.classes == ("on", "off")
    assert any(note.startswith("12 outlines were taken as the boxes around them") for note in data.source.notes)


YOLOS = {
    "words": ({"3": "ball 0.5 0.5 0.5 0.5"}, "3.txt, line 1: expected CLASS CENTRE_X"),
    "few": ({"3": "0 0.5 0.5\n"}, "expected CLASS CENTRE_X"),
    "class": ({"3": "0 .5 .5 .1 .1\n5 .5 .5 .1 .1\n"}, "3.txt, line 2: class 5; data.yaml names 0 to 1"),
    "pixels": ({"3": "0 100 80 20 30"}, "100 is no fraction of an image"),
    "nan": ({"3": "0 nan .5 .1 .1"}, "expected CLASS CENTRE_X"),
}


@pytest.mark.parametrize("case", YOLOS)
def test_a_wrong_label_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    files, said = YOLOS[case]
    with pytest.raises(UserError, match=said):
        seen(yolo(tmp_path, **files))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: images/train\nnames: [a, a]\n", "each only once"),
        ("train: images/train\nnames: {0: a, 2: b}\n", "every index from 0"),
        ("train: images/gone\nnames: [a, b]\n", "images/gone is not there; tried"),
        ("train: images/train\nval: images/train\nnames: [a, b]\n", "is in train and in val"),
    ],
)
def test_a_wrong_description_is_said(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        seen(yolo(tmp_path, text))


def coco(root: Path, parts: tuple[str, ...] = ("train", "valid", "test")) -> None:
    for number, part in enumerate(parts):
        images = [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 16} for i in range(6)]
        boxes = [{"id": i, "image_id": i, "category_id": i % 3, "bbox": [1, 2, 8, 9]} for i in range(6)]
        categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
        for i in range(6):
            picture(root / part / f"{i}.png", 100 * number + i)
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / part / "_annotations.coco.json").write_text(json.dumps(content))


def test_coco_with_a_file_in_each_split(tmp_path: Path) -> None:
    coco(tmp_path)
    data = seen(tmp_path)
    assert data.source.notes[0] == "COCO annotations (test, train, val): 3 classes, images: train 6, search 6, test 6"
    coco(tmp_path / "two", ("train", "valid"))
    assert len(seen(tmp_path / "two").test) == 6, "val is the test split where there is none"


def test_a_split_without_a_box_to_be_found_is_refused(tmp_path: Path) -> None:
    yolo(tmp_path)
    for file in (tmp_path / "labels/val").glob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match="none of the 4 test images has a box to be found"):
        seen(tmp_path)


def test_chosen_classes_leave_the_others_out_and_count_them(tmp_path: Path) -> None:
    coco(tmp_path)
    data = seen(tmp_path, classes=["fox", "cat"])
    assert data.source.classes == ("fox", "cat") and len(data.train) == 4
    assert any(
        note.startswith("6 boxes of classes that data.classes does not name were ignored: dog")
        for note in data.source.notes
    )
    with pytest.raises(UserError, match=r"names foxx, and no box .* did you mean 'fox'"):
        seen(tmp_path, classes=["foxx"])
    assert seen(yolo(tmp_path / "y"), classes=["cube"]).source.classes == ("cube",)


def test_every_format_says_what_it_needs() -> None:
    for shelf in (formats.IMAGES, formats.SCENES):
        for name in shelf.names():
            module = shelf.load(name)
            assert set(module.NEEDS) <= set(module.KEYS) and (module.__doc__ or "").strip()
            assert module.looks_like(Path("/nowhere/at/all")) is None
