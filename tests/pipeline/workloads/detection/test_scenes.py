"""Detection data from every source: what is read, how it is split, and what is said of bad input."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import voc as voc_format
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.digit_scenes import DigitScenes
from secateur.pipeline.workloads.data.scenes import FileScenes, SceneData
from secateur.pipeline.workloads.detection import scenes
from secateur.pipeline.workloads.detection.scenes import SceneOptions

DATA = Path(__file__).parents[5] / "shared" / "data"

Object = tuple[str, float, float, float, float]
CAT: Object = ("cat", 2, 3, 12, 13)
DOG: Object = ("dog", 5, 5, 20, 15)


def load(source: str = "voc", **options: Any) -> SceneData:
    return scenes.load(SceneOptions.model_validate({"source": source, **options}))


def save_image(path: Path, size: tuple[int, int] = (30, 20), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def xml(*objects: Object, size: tuple[int, int] = (30, 20), more: str = "") -> str:
    lines = [f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"]
    for name, *box in objects:
        sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        lines.append(f"<object><name>{name}</name><bndbox>{sides}</bndbox>{more}</object>")
    return "\n".join([*lines, "</annotation>\n"])


def pair(images: Path, annotations: Path, stem: str, text: str | None = None, suffix: str = ".jpg") -> None:
    save_image(images / f"{stem}{suffix}", seed=zlib.crc32(stem.encode()))
    annotations.mkdir(parents=True, exist_ok=True)
    (annotations / f"{stem}.xml").write_text(xml(CAT, DOG) if text is None else text)


def flat(root: Path, num: int = 20) -> Path:
    for i in range(num):
        pair(root, root, f"im{i:02d}")
    return root


def voc(root: Path, lists: dict[str, list[str]]) -> Path:
    """VOC's own layout with these lists."""
    for stem in sorted({stem for part in lists.values() for stem in part}):
        pair(root / "JPEGImages", root / "Annotations", stem)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, part in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in part))
    return root


def stems(data: SceneData, indices: Any) -> set[str]:
    assert isinstance(data.source, FileScenes)
    return {Path(data.source.keys[i]).stem for i in indices}


def splits(data: SceneData) -> list[set[int]]:
    return [set(part.tolist()) for part in (data.train, data.search, data.test)]


def named(prefix: str, num: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(num)]


# --- digits -----------------------------------------------------------------------------------------------------------


def test_scenes_of_digits_repeat_and_have_boxes_inside() -> None:
    a, b = (load("digits", scenes=60, image_size=64) for _ in range(2))
    assert a.fingerprint == b.fingerprint
    assert a.source.classes == tuple("0123456789")
    assert list(map(len, splits(a))) == [43, 5, 12]
    for i, (one, two) in enumerate(zip(a.source.read(np.arange(60)), b.source.read(np.arange(60)), strict=True)):
        assert one.shape == (64, 64, 3) and one.dtype == np.uint8
        assert np.array_equal(one, two) and np.array_equal(a.source.boxes(i), b.source.boxes(i))
        boxes = a.source.boxes(i)
        assert boxes.dtype == np.float32 and 1 <= len(boxes) <= 4 and not a.source.difficult(i).any()
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:4] <= 64).all() and (boxes[:, :2] < boxes[:, 2:4]).all()
    counts = {len(a.source.boxes(i)) for i in range(60)}
    assert counts == {1, 2, 3, 4}


def test_digits_stand_out_where_their_boxes_are() -> None:
    data = load("digits", scenes=40, objects=1)
    inside, outside = [], []
    for i, image in enumerate(data.source.read(np.arange(40))):
        x1, y1, x2, y2 = data.source.boxes(i)[0, :4].astype(int)
        mask = np.zeros(image.shape[:2], dtype=bool)
        mask[y1:y2, x1:x2] = True
        inside.append(image[mask].mean())
        outside.append(image[~mask].mean())
    assert np.mean(np.array(inside) > np.array(outside)) > 0.95
    assert np.mean(inside) > 1.5 * np.mean(outside)


def test_no_digit_is_in_two_splits() -> None:
    data = load("digits", scenes=300)
    assert isinstance(data.source, DigitScenes)
    layouts = data.source.layouts
    shown = [{paste.digit for i in part for paste in layouts[i]} for part in splits(data)]
    assert all(len(part) > 20 for part in shown)
    assert not (shown[0] & shown[1] or shown[0] & shown[2] or shown[1] & shown[2])
    assert not splits(data)[0] & splits(data)[2]


def test_scenes_follow_their_options() -> None:
    base = load("digits", scenes=40)
    for change in ({"seed": 1}, {"image_size": 80}, {"objects": 2}, {"scenes": 41}):
        assert load("digits", **{"scenes": 40, **change}).fingerprint != base.fingerprint
    assert load("digits", scenes=40, image_size=80).source.read(np.array([3]))[0].shape == (80, 80, 3)
    assert max(len(load("digits", scenes=40, objects=2).source.boxes(i)) for i in range(40)) == 2
    with pytest.raises(UserError, match="leave none to train on"):
        load("digits", scenes=20, test_fraction=0.99)


# --- VOC --------------------------------------------------------------------------------------------------------------


def test_boxes_are_read_as_annotated(tmp_path: Path) -> None:
    flat(tmp_path)
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    text = xml(("dog", 1, 2, 9.5, 20), more=f"<difficult>1</difficult>{part}")
    pair(tmp_path, tmp_path, "special", text, suffix=".png")
    source = scenes.open_scenes(SceneOptions(source="voc", path=str(tmp_path)))
    assert (len(source), source.classes, source.notes) == (21, ("cat", "dog"), ())
    index = source.keys.index("special.xml")
    assert source.boxes(index).tolist() == [[1, 2, 9.5, 20, 1]]
    assert source.difficult(index).tolist() == [True]
    assert source.boxes(0).tolist() == [[2, 3, 12, 13, 0], [5, 5, 20, 15, 1]]
    assert source.difficult(0).tolist() == [False, False]
    (image,) = source.read(np.array([index]))
    with Image.open(tmp_path / "special.png") as expected:
        assert np.array_equal(image, np.asarray(expected))
    assert image.flags.writeable


@pytest.mark.parametrize("homes", [("images", "annotations"), ("JPEGImages", "Annotations"), ("", "")])
def test_folders_of_pairs_are_split_by_their_content(tmp_path: Path, homes: tuple[str, str]) -> None:
    for i in range(20):
        pair(tmp_path / "a" / homes[0], tmp_path / "a" / homes[1], f"im{i:02d}")
    data = load(path=str(tmp_path / "a"))
    train, search, test = splits(data)
    assert all((train, search, test)) and len(train) > 6
    assert train | search | test == set(range(20)) and len(train) + len(search) + len(test) == 20
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    moved = load(path=str(tmp_path / "moved"))
    assert splits(moved) == splits(data) and moved.fingerprint == data.fingerprint
    grown = load(path=str(tmp_path / "a"), test_fraction=0.4)
    assert test <= splits(grown)[2] and len(splits(grown)[2]) > len(test)


def test_official_lists_are_followed(tmp_path: Path) -> None:
    train, val, test = named("a", 8), named("b", 4), named("c", 5)
    voc(tmp_path, {"train": train, "val": val, "trainval": train + val, "test": test})
    data = load(path=str(tmp_path))
    parts = [stems(data, part) for part in (data.train, data.search, data.test)]
    assert parts == [set(train), set(val), set(test)]
    data = load(path=str(tmp_path), search_fraction=0.25)
    assert stems(data, data.test) == set(test)
    assert len(data.train) + len(data.search) == 12 and 1 <= len(data.search) <= 6
    data = load(path=str(tmp_path), official_splits=False)
    assert sum(map(len, splits(data))) == 17 and all(splits(data))


def test_without_a_test_list_val_is_the_test_split_and_a_note_says_so(tmp_path: Path) -> None:
    train, val = named("a", 20), named("b", 4)
    data = load(path=str(voc(tmp_path, {"train": train, "val": val})))
    assert stems(data, data.test) == set(val)
    assert len(data.train) + len(data.search) == 20 and len(data.search)
    assert any("val serve as test split" in note for note in data.source.notes)


def test_years_are_used_together(tmp_path: Path) -> None:
    kit = tmp_path / "VOCdevkit"
    voc(kit / "VOC2007", {"trainval": named("a", 10), "test": named("t", 6)})
    voc(kit / "VOC2012", {"trainval": named("2012_", 10)})
    for path in (tmp_path, kit):
        data = load(path=str(path))
        assert len(data.train) + len(data.search) == 20 and len(data.search)
        assert stems(data, data.test) == set(named("t", 6))
    assert sum(map(len, splits(load(path=str(tmp_path), years=["2007"])))) == 16
    with pytest.raises(UserError, match="no folder VOC2008; known: 2007, 2012"):
        load(path=str(tmp_path), years=["2008"])
    with pytest.raises(UserError, match="leave years out"):
        load(path=str(kit / "VOC2007"), years=["2007"])


def test_folders_of_splits_are_followed(tmp_path: Path) -> None:
    for name, num in (("train", 6), ("valid", 3), ("test", 2)):
        for stem in named(name, num):
            pair(tmp_path / name, tmp_path / name, stem)
    assert list(map(len, splits(load(path=str(tmp_path))))) == [6, 3, 2]


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    voc(tmp_path, {"train": named("a", 8), "test": named("b", 3)})
    main = tmp_path / "ImageSets" / "Main"
    (main / "test.txt").write_text("b0\na3\n")
    with pytest.raises(UserError, match=r"1 image is listed for test and for training too: a3"):
        load(path=str(tmp_path))
    (main / "test.txt").write_text("b0 \n\nb9\n")
    with pytest.raises(UserError, match=r"test\.txt, line 3: no annotation b9\.xml"):
        load(path=str(tmp_path))
    (main / "test.txt").write_text("b0  1\nb0 -1\n")
    data = load(path=str(tmp_path))
    assert stems(data, data.test) == {"b0"}
    assert any(note.startswith("2 annotations are in no list") and "b1.xml" in note for note in data.source.notes)
    (main / "train.txt").write_text("")
    with pytest.raises(UserError, match="no training images"):
        load(path=str(tmp_path))
    (main / "train.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"cannot read .*train\.txt"):
        load(path=str(tmp_path))


def test_places_without_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no annotated images"):
        load(path=str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is no folder"):
        load(path=str(tmp_path / "file"))
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    with pytest.raises(UserError, match="set SECATEUR_DATA"):
        load(path="nowhere")
    flat(tmp_path / "here")
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert len(load(path="here").test)


# --- bad images and boxes ---------------------------------------------------------------------------------------------


def notes_of(tmp_path: Path, text: str, **options: Any) -> tuple[SceneData, tuple[str, ...], int]:
    """Twenty sound images and one with this annotation, which is trained on."""
    voc(tmp_path, {"train": [*named("a", 19), "odd"], "val": named("v", 2), "test": named("t", 2)})
    (tmp_path / "Annotations" / "odd.xml").write_text(text)
    data = load(path=str(tmp_path), **options)
    assert isinstance(data.source, FileScenes)
    return data, data.source.notes, data.source.keys.index("Annotations/odd.xml")


def test_images_without_boxes_are_not_trained_on_but_measured_on(tmp_path: Path) -> None:
    data, notes, index = notes_of(tmp_path, xml())
    assert notes == ("1 image without boxes is not trained on: Annotations/odd.xml",)
    assert index not in data.train and len(data.train) == 19
    assert data.source.boxes(index).shape == (0, 5) and data.source.difficult(index).shape == (0,)
    (tmp_path / "Annotations" / "t1.xml").write_text(xml())
    data = load(path=str(tmp_path))
    assert len(data.test) == 2
    assert any("among those measured on" in note and "t1.xml" in note for note in data.source.notes)


def test_boxes_that_leave_the_image_are_clipped_or_dropped_with_a_count(tmp_path: Path) -> None:
    objects = [("cat", -3, 2, 10, 25), ("dog", 30, 0, 40, 10), ("dog", -9, -9, 0, 0), CAT]
    data, notes, index = notes_of(tmp_path, xml(*objects))  # type: ignore[arg-type]
    assert data.source.boxes(index).tolist() == [[0, 2, 10, 20, 0], [2, 3, 12, 13, 0]]
    assert notes == (
        "1 box that leaves its image was clipped: odd.xml, line 2",
        "2 boxes wholly outside their image were dropped: odd.xml, line 3, odd.xml, line 4",
    )


def test_boxes_without_area_are_dropped_with_a_count(tmp_path: Path) -> None:
    data, notes, index = notes_of(tmp_path, xml(("cat", 5, 5, 5, 9), ("cat", 9, 9, 5, 5), ("cat", 1, 4, 5, 4)))
    assert notes[0] == "3 boxes without area were dropped: odd.xml, line 2, odd.xml, line 3, odd.xml, line 4"
    assert notes[1] == "1 image without boxes is not trained on: Annotations/odd.xml"
    assert index not in data.train


def test_many_places_are_counted_and_the_first_named(tmp_path: Path) -> None:
    _, notes, _ = notes_of(tmp_path, xml(*[("cat", 5.0, 5.0, 5.0, 9.0)] * 7, CAT))
    assert notes == ("7 boxes without area were dropped: odd.xml, line 2, odd.xml, line 3, odd.xml, line 4 and 4 more",)


def test_a_size_that_is_not_the_images_is_noted(tmp_path: Path) -> None:
    data, notes, index = notes_of(tmp_path, xml(("cat", 1, 1, 40, 10), size=(40, 20)))
    assert notes[0].startswith("1 image does not have the size that the annotation gives")
    assert "(30x20, not 40x20)" in notes[0] and "clipped" in notes[1]
    assert data.source.boxes(index)[0, 2] == 30
    assert notes_of(tmp_path / "unset", xml(CAT, size=(0, 0)))[1] == ()


def test_boxes_of_classes_that_are_not_named_are_counted_by_class(tmp_path: Path) -> None:
    _, notes, _ = notes_of(tmp_path, xml(CAT, ("dgo", 1, 1, 5, 5)), classes=["dog", "cat"])
    assert "1 box of classes that data.classes does not name was ignored: dgo" in notes
    with pytest.raises(UserError) as caught:
        load(path=str(tmp_path), classes=["dgo", "catt"])
    for part in ("names catt", "known: cat, dog", "did you mean 'cat'?", "data.classes"):
        assert part in str(caught.value)


def test_named_classes_without_a_box_keep_their_index(tmp_path: Path) -> None:
    data = load(path=str(flat(tmp_path / "flat")), classes=["dog", "cat", "emu"])
    assert data.source.classes == ("dog", "cat", "emu")
    assert data.source.boxes(0)[:, 4].tolist() == [1, 0]
    assert data.source.notes == ("1 class without a box to train on, which cannot be learnt from this data: emu",)


def test_missing_images_are_named(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "im03.jpg").unlink()
    with pytest.raises(UserError, match=r"1 image not found: .*im03\.jpg \(annotated by im03\.xml\)"):
        load(path=str(tmp_path))


def test_images_without_annotation_and_double_names(tmp_path: Path) -> None:
    flat(tmp_path)
    save_image(tmp_path / "bare.jpg")
    assert load(path=str(tmp_path)).source.notes == ("1 image without an annotation file was not used: bare.jpg",)
    save_image(tmp_path / "im03.png")
    with pytest.raises(UserError, match=r"im03\.jpg and im03\.png have the same name"):
        load(path=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0 damaged"])
def test_corrupt_images_are_named_before_training(tmp_path: Path, content: bytes) -> None:
    flat(tmp_path)
    (tmp_path / "im03.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read image .*im03\.jpg: .*; remove or replace"):
        load(path=str(tmp_path))


def test_images_damaged_behind_the_header_are_named_before_training(tmp_path: Path) -> None:
    flat(tmp_path)
    whole = (tmp_path / "im03.jpg").read_bytes()
    (tmp_path / "im03.jpg").write_bytes(whole[:-200])
    with pytest.raises(UserError, match=r"cannot read image .*im03\.jpg: .*truncated"):
        load(path=str(tmp_path))
    (left,) = [note for note in load(path=str(tmp_path), damaged="leave_out").source.notes if "left out" in note]
    assert left.startswith("1 image cannot be read and was left out") and "im03.jpg (it is damaged" in left
    (tmp_path / "im03.jpg").write_bytes(whole[:-201])
    unread = scenes.load(SceneOptions(source="voc", path=str(tmp_path)), Reading(check="none"))
    with pytest.raises(UserError, match=r"cannot read image .*im03\.jpg: .*truncated"):
        unread.source.read(np.arange(20))


def test_images_of_other_modes_and_sizes_become_rgb(tmp_path: Path) -> None:
    flat(tmp_path)
    Image.new("L", (30, 20), 7).save(tmp_path / "im00.jpg")
    Image.new("CMYK", (50, 40)).save(tmp_path / "im01.jpg")
    grey, inks, normal = load(path=str(tmp_path)).source.read(np.arange(3))
    assert (grey.shape, inks.shape, normal.shape) == ((20, 30, 3), (40, 50, 3), (20, 30, 3))
    assert (grey == 7).all()


# --- bad XML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation>\n<object>\n</annotation>", r"odd\.xml, line 3: not valid XML: mismatched tag"),
        ("", r"odd\.xml, line 1: not valid XML: no element found"),
        ("<html>\n</html>", r"odd\.xml, line 1: expected <annotation>, got <html>"),
        ("<annotation>\n\n<object><name/></object></annotation>", r"odd\.xml, line 3: an <object> without a <name>"),
        (xml(CAT).replace("<xmax>12</xmax>", ""), r"odd\.xml, line 2: .*<xmax> of 'cat', got ''"),
        (xml(CAT).replace("<xmax>12", "<xmax>twelve"), r"line 2: expected a number in <bndbox><xmax>.*'twelve'"),
        (xml(CAT).replace("<xmax>12", "<xmax>nan"), "expected a number"),
        (xml(CAT).replace("<xmax>12", "<xmax>inf"), "expected a number"),
    ],
)
def test_wrong_xml_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        notes_of(tmp_path, text)


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]>\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "declaration",
    [BOMB, '<!DOCTYPE a SYSTEM "file:///etc/passwd">\n', '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'],
)
def test_document_types_and_entities_are_refused(tmp_path: Path, declaration: str, encoding: str) -> None:
    flat(tmp_path)
    body = f'<?xml version="1.0" encoding="{encoding}"?>\n{declaration}{xml(CAT)}'
    (tmp_path / "im03.xml").write_bytes(body.encode(encoding))
    with pytest.raises(UserError, match=r"im03\.xml, line 2: a DTD or entity is declared"):
        load(path=str(tmp_path))


def test_other_encodings_are_read_and_unknown_ones_refused(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "im03.xml").write_bytes(
        f'<?xml version="1.0" encoding="latin-1"?>{xml(("bär", 1, 1, 5, 5))}'.encode("latin-1")
    )
    assert load(path=str(tmp_path)).source.classes == ("bär", "cat", "dog")
    (tmp_path / "im03.xml").write_text(f'<?xml version="1.0" encoding="klingon"?>{xml(CAT)}')
    with pytest.raises(UserError, match=r"im03\.xml, line 1: not valid XML"):
        load(path=str(tmp_path))


@given(st.binary(max_size=60) | st.text(alphabet="<>/!&;annotationobjectnamebndbox \n", max_size=80).map(str.encode))
def test_no_bytes_make_the_parser_fail_otherwise(content: bytes) -> None:
    class Memory(type(Path())):  # type: ignore[misc]
        def read_bytes(self) -> bytes:
            return content

    try:
        voc_format._scene(Memory("x.xml"), Path("x.jpg"), Path())
    except UserError as error:
        assert "x.xml" in str(error)


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco(num: int = 20, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "images": [{"id": 100 + i, "file_name": f"{i}.jpg", "width": 30, "height": 20} for i in range(num)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 9, "name": "emu"}],
        "annotations": [
            {"id": i, "image_id": 100 + i, "category_id": (7, 3, 9)[i % 3], "bbox": [1, 2, 10, 12]} for i in range(num)
        ],
    }
    return content | changes


def write_coco(root: Path, content: Any, name: str = "train", num: int = 20) -> Path:
    for i in range(num):
        save_image(root / name / f"{i}.jpg", seed=i)
    file = root / f"{name}.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def load_coco(root: Path, **options: Any) -> SceneData:
    return load("coco", **{"path": str(root / "train"), "train": str(root / "train.json"), **options})


def test_coco_files_are_read(tmp_path: Path) -> None:
    content = coco()
    content["annotations"].append({"id": 50, "image_id": 100, "category_id": 3, "bbox": [0, 0, 4, 4.5], "iscrowd": 1})
    write_coco(tmp_path, content)
    data = load_coco(tmp_path)
    assert data.source.classes == ("cat", "dog", "emu")
    (note,) = data.source.notes
    assert note == "2 classes would have no image in search by their content and were drawn by rank: cat, emu"
    assert data.source.boxes(0).tolist() == [[1, 2, 11, 14, 1], [0, 0, 4, 4.5, 0]]
    assert data.source.difficult(0).tolist() == [False, True]
    assert sum(map(len, splits(data))) == 20 and all(splits(data))
    assert set.union(*splits(data)) == set(range(20))
    assert load_coco(tmp_path, classes=["emu", "dog", "cat"]).source.boxes(0)[:, 4].tolist() == [1, 2]
    source = scenes.open_scenes(
        SceneOptions(source="coco", path=str(tmp_path / "train"), train=str(tmp_path / "train.json"))
    )
    assert len(source) == 20


def test_coco_keeps_its_test_file(tmp_path: Path) -> None:
    write_coco(tmp_path, coco())
    held = coco(5)
    held["categories"].reverse()
    write_coco(tmp_path, held, "test", 5)
    options = {"test": str(tmp_path / "test.json"), "test_path": str(tmp_path / "test")}
    data = load_coco(tmp_path, **options)
    assert len(data.train) + len(data.search) == 20 and len(data.test) == 5
    assert sorted(data.test.tolist()) == list(range(20, 25))
    with pytest.raises(UserError, match=r"5 images are in .*train\.json too"):
        load_coco(tmp_path, test=options["test"])
    held["categories"][0]["name"] = "newt"
    write_coco(tmp_path, held, "test", 5)
    with pytest.raises(UserError, match=r"test\.json, annotation 2: unknown class 'newt'; known: cat, dog, emu"):
        load_coco(tmp_path, **options)


def test_bad_boxes_of_coco_are_counted(tmp_path: Path) -> None:
    content = coco()
    for i, box in enumerate(([-1, -1, 9, 9], [30, 0, 5, 5], [1, 1, 0, 5])):
        content["annotations"][i]["bbox"] = box
    write_coco(tmp_path, content)
    notes = " | ".join(load_coco(tmp_path).source.notes)
    assert "1 box that leaves its image was clipped: train.json, annotation 0" in notes
    assert "1 box wholly outside its image was dropped: train.json, annotation 1" in notes
    assert "1 box without area was dropped: train.json, annotation 2" in notes
    assert "without boxes" in notes


def one(**changes: Any) -> dict[str, Any]:
    entry = {"id": 4, "image_id": 100, "category_id": 3, "bbox": [1, 1, 5, 5]} | changes
    return coco(annotations=[entry])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": [\n1,,]}', r"train\.json, line 2: not valid JSON"),
        ("[" * 100_000, r"train\.json: not COCO annotations"),
        ("1" * 5000, r"train\.json: not COCO annotations"),
        ("[]", r"train\.json: expected COCO annotations, an object with the list 'images'"),
        ({"images": [], "annotations": []}, "the list 'categories'"),
        (coco(0), "no images"),
        (coco(images=[{"id": 1}]), r"images\[0\] needs an 'id' and a 'file_name'"),
        (coco(images=[{"id": 1, "file_name": "0.jpg"}] * 2), r"images\[1\]: id 1 .* used twice"),
        (coco(categories=[{"id": i, "name": "x"} for i in range(2)]), r"categories\[1\]: .*name 'x' is used twice"),
        (coco(annotations=[3]), r"annotations\[0\] is no object"),
        (one(image_id=5), "annotation 4: there is no image with id 5"),
        (one(image_id=[1]), "there is no image with id"),
        (one(category_id=8), r"annotation 4: unknown category_id 8; known: 7 \(dog\), 3 \(cat\)"),
        (one(category_id={}), "unknown category_id"),
        (one(bbox=[1, 2, 3]), "annotation 4: expected bbox as four numbers"),
        (one(bbox=None), "expected bbox"),
        (one(bbox=[1, 2, float("nan"), 4]), "expected bbox"),
        (one(bbox=[1, 2, 10**400, 4]), "expected bbox"),
        (one(bbox=[[1], 2, 3, 4]), "expected bbox"),
    ],
)
def test_wrong_coco_files_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    write_coco(tmp_path, content, num=1)
    with pytest.raises(UserError, match=said):
        load_coco(tmp_path)


def test_missing_and_corrupt_coco_images_are_named(tmp_path: Path) -> None:
    write_coco(tmp_path, coco())
    (tmp_path / "train" / "3.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read image .*3\.jpg"):
        load_coco(tmp_path)
    (tmp_path / "train" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"not found: .*3\.jpg"):
        load_coco(tmp_path)


# --- content ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    before = load(path=str(flat(tmp_path))).fingerprint
    assert load(path=str(tmp_path)).fingerprint == before
    changed = {load(path=str(tmp_path), search_fraction=0.3).fingerprint}
    changed.add(load(path=str(tmp_path), classes=["dog", "cat"]).fingerprint)
    (tmp_path / "im03.xml").write_text(xml(CAT))
    changed.add(load(path=str(tmp_path)).fingerprint)
    save_image(tmp_path / "im04.jpg", seed=77, size=(30, 20))
    (tmp_path / "im04.jpg").write_bytes((tmp_path / "im04.jpg").read_bytes() + b"\0")
    changed.add(load(path=str(tmp_path)).fingerprint)
    assert len(changed | {before}) == 5


def test_options_refuse_what_they_cannot_use() -> None:
    for options, said in (
        ({"source": "voc"}, "needs path"),
        ({"source": "coco", "train": "x"}, "needs path"),
        ({"source": "digits", "path": "x"}, "does not use path"),
        ({"source": "voc", "path": "x", "scenes": 50}, "does not use scenes"),
        ({"source": "coco", "path": "x", "train": "y", "test_path": "z"}, "name that file too"),
        ({"source": "voc", "path": "x", "classes": ["a", "a"]}, "only once"),
        ({"source": "voc", "path": "x", "clases": []}, "clases"),
    ):
        with pytest.raises(ValidationError, match=said):
            SceneOptions.model_validate(options)
    with pytest.raises(UserError, match="digits have no files"):
        scenes.open_scenes(SceneOptions())


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data")
def test_real_data_has_the_known_counts() -> None:
    data = load(path=str(DATA / "bccd"))
    assert list(map(len, splits(data))) == [205, 87, 72]
    assert data.source.classes == ("Platelets", "RBC", "WBC")
    labels = np.concatenate([data.source.boxes(i)[:, 4] for i in range(364)]).astype(int)
    assert np.bincount(labels).tolist() == [361, 4153, 372]
    (note,) = data.source.notes
    assert note.startswith("2 boxes without area") and "00338" in note and "00343" in note
    source = scenes.open_scenes(SceneOptions(source="voc", path=str(DATA / "voc100")))
    assert (len(source), len(source.classes), source.notes) == (100, 20, ())
    assert (sum(len(source.boxes(i)) for i in range(100)), sum(source.difficult(i).sum() for i in range(100))) == (
        273,
        38,
    )
    assert len(source.read(np.arange(3))) == 3
    with pytest.raises(UserError, match="official_splits: false"):
        load(path=str(DATA / "voc100"))


# --- frames -----------------------------------------------------------------------------------------------------------


def turned(tmp_path: Path, orientation: int, said: tuple[int, int], size: tuple[int, int] = (60, 40)) -> FileScenes:
    """Sound images and one with an orientation tag, which is white where its box is, seen from the file."""
    flat(tmp_path)
    exif, image = Image.Exif(), Image.new("RGB", size)
    exif[0x0112] = orientation
    image.paste((255, 255, 255), (10, 4, 30, 16))
    image.save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "turned.xml").write_text(xml(("cat", 10, 4, 30, 16), size=said))
    return scenes.open_scenes(SceneOptions(source="voc", path=str(tmp_path)))


def inked(source: FileScenes) -> tuple[list[int], list[float]]:
    """Where the white is, and where the box is."""
    index = source.keys.index("turned.xml")
    (image,) = source.read(np.array([index]))
    rows, columns = (np.flatnonzero(image[..., 0].any(axis)) for axis in (1, 0))
    where = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    return where, source.boxes(index)[0, :4].tolist()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_annotated_on_the_stored_image_turn_with_it(orientation: int, tmp_path: Path) -> None:
    source = turned(tmp_path, orientation, (60, 40))
    where, box = inked(source)
    assert where == box
    assert any("and the boxes with it: turned.xml" in note for note in source.notes)


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_annotated_on_the_image_as_seen_stay(orientation: int, tmp_path: Path) -> None:
    said = (60, 40) if orientation == 1 else (40, 60)
    assert inked(turned(tmp_path, orientation, said))[1] == [10, 4, 30, 16]


@pytest.mark.parametrize(("orientation", "said"), [(3, (60, 40)), (6, (0, 0)), (2, (60, 40))])
def test_where_the_size_tells_nothing_boxes_are_as_seen_and_counted(
    orientation: int, said: tuple[int, int], tmp_path: Path
) -> None:
    source = turned(tmp_path, orientation, said)
    assert inked(source)[1] == [10, 4, 30, 16]
    assert any("boxes are as seen: turned.xml" in note for note in source.notes)


def test_boxes_of_an_image_that_was_scaled_are_scaled(tmp_path: Path) -> None:
    source = turned(tmp_path / "half", 1, (120, 80))
    assert inked(source)[1] == [5, 2, 15, 8]
    assert any("the boxes were scaled: turned.xml (60x40, not 120x80)" in note for note in source.notes)
    where, box = inked(turned(tmp_path / "both", 6, (30, 20)))  # stored at twice the annotated size, and turned
    assert box == [2 * v for v in (20 - 16, 10, 20 - 4, 30)] and where != box


def test_scraps_beside_annotated_images_are_none_of_them(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "._im00.xml").write_bytes(b"\0\5\x16\7")
    (tmp_path / "._im00.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert len(scenes.open_scenes(SceneOptions(source="voc", path=str(tmp_path)))) == 20


@pytest.mark.parametrize("name", ["Valid", "VALIDATION", "val"])
def test_folders_of_splits_in_any_spelling(name: str, tmp_path: Path) -> None:
    for folder, num in (("Train", 6), (name, 3), ("Test", 2)):
        for stem in named(folder, num):
            pair(tmp_path / folder, tmp_path / folder, stem)
    assert list(map(len, splits(load(path=str(tmp_path))))) == [6, 3, 2]


def test_images_of_every_usual_kind_are_read(tmp_path: Path) -> None:
    flat(tmp_path)
    for suffix in (".tif", ".jfif", ".gif", ".webp", ".TIFF"):
        kind = {"tif": "TIFF", "tiff": "TIFF", "jfif": "JPEG"}.get(suffix[1:].lower())
        Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / f"x{suffix[1:]}{suffix}", kind)
        (tmp_path / f"x{suffix[1:]}.xml").write_text(xml(CAT))
    assert len(scenes.open_scenes(SceneOptions(source="voc", path=str(tmp_path)))) == 25


def test_the_fingerprint_is_of_pixels_and_boxes(tmp_path: Path) -> None:
    before = load(path=str(flat(tmp_path)))
    a, b = (tmp_path / name for name in ("im00.jpg", "im01.jpg"))
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    assert load(path=str(tmp_path)).fingerprint == before.fingerprint  # the same boxes on both
    (tmp_path / "im01.xml").write_text(xml(CAT))
    assert load(path=str(tmp_path)).fingerprint != before.fingerprint
    assert {m.split for m in before.members} == {"train", "search", "test"}
