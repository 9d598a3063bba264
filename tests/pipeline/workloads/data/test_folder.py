"""Class folders as people have them: what is a class, what is an image, what is said of everything else."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.classification import Classification, Options, build
from secateur.pipeline.workloads.data.content import Reading
from tests.pipeline.workloads.data.pictures import noise

ALL = Reading()


def tree(root: Path, num: int = 6, parts: tuple[str, ...] = ("train",), suffix: str = "png") -> Path:
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(num):
                noise(seed=1000 * len(part) + 100 * label + i).save(root / part / name / f"{i}.{suffix}")
    return root


def opened(root: Path, reading: Reading = ALL, **data: object) -> Classification:
    section = {"source": "folder", "path": str(root), "image_size": 16, **data}
    options = {"model": {"name": "cifar/resnet8"}, "data": section}
    return build(Options.model_validate(options), reading)


def num_images(workload: Classification) -> int:
    return len(workload.train) + len(workload.search) + len(workload.test)


def test_classes_and_labels_are_those_of_image_folder(tmp_path: Path) -> None:
    tree(tmp_path, parts=("train", "test"))
    workload, theirs = opened(tmp_path), ImageFolder(str(tmp_path / "train"))
    assert list(workload.classes) == theirs.classes
    source = workload.train.source
    found = {str(file): int(label) for file, label in zip(source.files, source.labels, strict=True)}  # type: ignore[attr-defined]
    assert found == dict(theirs.samples)
    assert workload.usage["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("scrap", [".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".git", "lost+found"])
@pytest.mark.parametrize("place", ["train", "train/cat", "."])
def test_folders_of_editors_and_archives_are_no_classes_and_hold_no_images(
    scrap: str, place: str, tmp_path: Path
) -> None:
    folder = tree(tmp_path) / place / scrap
    folder.mkdir()
    assert opened(tmp_path).num_classes == 2
    noise(seed=7).save(folder / "copy.png")
    workload = opened(tmp_path)
    assert (workload.num_classes, num_images(workload)) == (2, 12)
    if place != ".":
        assert any("hidden" in note and f"{scrap}/copy.png" in note for note in workload.notes)


def test_hidden_files_are_left_out_and_counted(tmp_path: Path) -> None:
    (tree(tmp_path) / "train/cat/._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0")
    (tmp_path / "train/cat/.DS_Store").write_bytes(b"x")
    (note,) = [note for note in opened(tmp_path).notes if "hidden" in note]
    assert note.startswith("2 files") and "train/cat/._0.png" in note


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    for name in ("a.heic", "b.txt", "c"):
        (tree(tmp_path / name) / "train/cat" / name).write_bytes(b"x")
        (note,) = [note for note in opened(tmp_path / name).notes if "of a kind that is not read" in note]
        assert note.startswith("1 file ") and f"train/cat/{name}" in note


@pytest.mark.parametrize("suffix", ["tif", "jfif", "gif", "TIFF", "JPG", "ppm", "webp", "bmp"])
def test_images_of_every_usual_kind_are_images(suffix: str, tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "train/emu").mkdir()
    kinds = {"tif": "TIFF", "tiff": "TIFF", "jfif": "JPEG", "jpg": "JPEG"}
    for i in range(6):
        noise(seed=900 + i).save(tmp_path / f"train/emu/{i}.{suffix}", kinds.get(suffix.lower()))
    workload = opened(tmp_path)
    assert workload.classes == ("cat", "dog", "emu")
    assert sum(workload.summary().classes[2].__dict__[part] for part in ("train", "search", "test")) == 6


def test_an_empty_class_folder_is_refused_by_name_unless_it_is_named(tmp_path: Path) -> None:
    (tree(tmp_path) / "train/bear").mkdir()
    with pytest.raises(UserError, match=r"1 class folder of .* with no image .*: bear\. Remove them"):
        opened(tmp_path)
    (tmp_path / "train/bear/a.heic").write_bytes(b"x")
    with pytest.raises(UserError, match="bear"):
        opened(tmp_path)
    workload = opened(tmp_path, classes=["cat", "dog", "bear"])
    assert workload.num_classes == 3
    assert [count.train + count.search + count.test for count in workload.summary().classes] == [6, 6, 0]
    assert any("without an image to train on: bear" in note for note in workload.notes)
    with pytest.raises(UserError, match=r"which data\.classes does not name"):
        opened(tmp_path, classes=["cat", "bear"])


@pytest.mark.parametrize("name", ["valid", "validation", "val", "Val", "VALIDATION"])
def test_a_validation_folder_is_the_search_split_beside_a_test_folder(name: str, tmp_path: Path) -> None:
    tree(tmp_path, parts=("train", name, "Test"))
    workload = opened(tmp_path)
    assert (len(workload.train), len(workload.search), len(workload.test)) == (12, 12, 12)
    assert {str(f.relative_to(tmp_path)).split("/")[0] for f in workload.search.source.files} == {name}  # type: ignore[attr-defined]
    ignoring = opened(tmp_path, search_fraction=0.3)
    assert len(ignoring.search) < 12 and any("were not used, as search_fraction" in note for note in ignoring.notes)


@pytest.mark.parametrize("name", ["valid", "validation", "val", "testing", "TEST"])
def test_one_held_out_folder_is_the_test_split(name: str, tmp_path: Path) -> None:
    workload = opened(tree(tmp_path, num=9, parts=("Train", name)))
    assert len(workload.test) == 18 and len(workload.train) + len(workload.search) == 18
    assert any("serves as test split" in note for note in workload.notes) == name.startswith("val")


def test_folders_that_mean_the_same_or_nothing(tmp_path: Path) -> None:
    tree(tmp_path / "two", parts=("train", "val", "valid"))
    with pytest.raises(UserError, match="has the folders val and valid: keep one"):
        opened(tmp_path / "two")
    tree(tmp_path / "more", parts=("train", "unlabelled"))
    notes = " | ".join(opened(tmp_path / "more").notes)
    assert "12 images in folders of no split were not used: unlabelled/cat/0.png" in notes
    noise().save(tmp_path / "more/train/loose.png")
    assert "1 file beside the class folders was not used: train/loose.png" in " | ".join(
        opened(tmp_path / "more").notes
    )
    (tmp_path / "none/a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no folder 'train' \(it has a\)"):
        opened(tmp_path / "none")


def test_a_test_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    (tree(tmp_path, parts=("train", "test")) / "test/dgo").mkdir()
    noise().save(tmp_path / "test/dgo/0.png")
    with pytest.raises(UserError, match="classes that the training data does not have: dgo; known: cat, dog; did you"):
        opened(tmp_path)


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    tree(tmp_path / "real")
    (tmp_path / "linked/train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "linked/train" / name).symlink_to(tmp_path / "real/train" / name)
    (tmp_path / "real/train/cat/again").symlink_to(tmp_path / "real/train/cat")
    assert num_images(opened(tmp_path / "linked")) == 12
    (tmp_path / "real/train/cat/gone.png").symlink_to("/nonexistent.png")
    with pytest.raises(UserError, match=r"cannot read image train/cat/gone\.png: it is a link to a file that does not"):
        opened(tmp_path / "linked")


def test_names_that_are_not_utf8_and_names_in_two_forms(tmp_path: Path) -> None:
    tree(tmp_path)
    os.rename(os.fsencode(tmp_path / "train/cat/0.png"), os.fsencode(tmp_path / "train/cat") + b"/caf\xe9.png")
    assert num_images(opened(tmp_path)) == 12
    one, other = (unicodedata.normalize(form, "bär") for form in ("NFC", "NFD"))
    tree(tmp_path / "b", parts=("train", "test"))
    (tmp_path / "b/train/cat").rename(tmp_path / "b/train" / one)
    (tmp_path / "b/test/cat").rename(tmp_path / "b/test" / other)
    assert opened(tmp_path / "b").classes == (one, "dog") or opened(tmp_path / "b").classes == ("dog", one)


@pytest.mark.parametrize("num", [1, 2])
def test_too_few_images_are_refused_with_what_is_needed(num: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least three different images of each class"):
        opened(tree(tmp_path, num=num))


def test_damaged_images_are_all_found_before_anything_else(tmp_path: Path) -> None:
    tree(tmp_path, parts=("train", "test"))
    whole = (tmp_path / "test/dog/3.png").read_bytes()
    (tmp_path / "test/dog/3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/cat/1.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    for part in ("2 of 24 images", "test/dog/3.png (it is damaged", "train/cat/1.png (it is empty)", "leave_out"):
        assert part in str(caught.value)
    workload = opened(tmp_path, damaged="leave_out")
    assert num_images(workload) == 22
    (note,) = [note for note in workload.notes if "left out" in note]
    assert note.startswith("2 images cannot be read and were left out")
    unchecked = opened(tmp_path, Reading(check="none"), damaged="leave_out")
    assert unchecked.fingerprint == workload.fingerprint
    assert unchecked.fingerprint != opened(tree(tmp_path / "b", parts=("train", "test"))).fingerprint


def test_equal_files_in_two_splits_are_named(tmp_path: Path) -> None:
    tree(tmp_path, parts=("train", "test"))
    (tmp_path / "test/dog/5.png").write_bytes((tmp_path / "train/cat/2.png").read_bytes())
    notes = " | ".join(opened(tmp_path).notes)
    assert "has the content of one in" in notes and "test/dog/5.png" in notes


def test_images_are_turned_and_whole_in_a_batch(tmp_path: Path) -> None:
    from PIL import Image

    tree(tmp_path, parts=("train", "test"))
    exif = Image.Exif()
    exif[0x0112] = 3
    half = Image.new("RGB", (16, 16))
    half.paste((255, 255, 255), (0, 0, 8, 16))
    half.save(tmp_path / "train/cat/0.png", exif=exif)
    workload = opened(tmp_path)
    index = [f.name for f in workload.train.source.files].index("0.png")  # type: ignore[attr-defined]
    pixels = workload.train.source.read(np.array([index]))[0]
    assert pixels[:, :8].max() == 0 and pixels[:, 8:].min() == 255
    assert any("turned" in note for note in workload.notes)
