"""Arrays that cannot work are refused before anything is trained, and what can work does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.classification import Classification, Options, build
from secateur.pipeline.workloads.data.sources import Wanted

IMAGES = np.random.default_rng(0).integers(0, 255, (60, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(60) % 3
LARGER = np.zeros((9, 24, 24, 3), np.uint8)


def opened(folder: Path, train: tuple[np.ndarray, np.ndarray], test: object = None, **data: object) -> Classification:
    files = {}
    for name, pair in (("train", train), ("test", test)):
        if pair is not None:
            files[name] = str(folder / f"{name}.npz")
            np.savez(files[name], images=pair[0], labels=pair[1])  # type: ignore[index]
    options = {"model": {"name": "cifar/resnet8"}, "data": {"source": "arrays", **files, **data}}
    return build(Options.model_validate(options))


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ((IMAGES[:0], LABELS[:0]), None, "has no images"),
        ((IMAGES, LABELS), (IMAGES[:0], LABELS[:0]), "has no images; leave data.test out"),
        (
            (IMAGES, LABELS),
            (np.zeros((9, 24, 24, 3), np.uint8), LABELS[:9]),
            "differ in size .*train 16x16, test 24x24",
        ),
        ((IMAGES, LABELS), (IMAGES[..., 0], LABELS), "differ in their number of channels"),
        ((IMAGES[:, :0], LABELS), None, "have no pixels"),
        ((IMAGES, LABELS + 1), None, "no image has 0.*subtract 1.*data.classes"),
        ((IMAGES, np.where(LABELS == 1, 5, LABELS)), None, "no image has 1, 3, 4"),
        ((IMAGES, np.where(np.arange(60) == 3, 100_000, LABELS)), None, r"4 labels occur, from 0 to 100000"),
        ((IMAGES, np.where(np.arange(60) == 3, 2**40, LABELS)), None, "labels from 0"),
        ((IMAGES, np.full(60, 2**64 - 1, np.uint64)), None, "labels from 0"),
        ((IMAGES, LABELS - 1), None, "labels from 0"),
        ((IMAGES, LABELS.astype(float)), None, "one whole number for each image"),
        ((IMAGES, np.eye(3)[LABELS].astype(int)), None, "one whole number for each image"),
        ((IMAGES, LABELS), (IMAGES, LABELS + 1), "has a label 3, and the training images have 3 classes"),
    ],
)
def test_arrays_that_cannot_work_are_refused(train: object, test: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        opened(tmp_path, train, test)  # type: ignore[arg-type]


def test_gaps_are_kept_where_all_classes_are_named(tmp_path: Path) -> None:
    workload = opened(tmp_path, (IMAGES, LABELS + 1), classes=["none", "a", "b", "c"])
    assert workload.num_classes == 4 and workload.usage["classes"] == ["none", "a", "b", "c"]
    assert any("without an image to train on: none" in note for note in workload.notes)
    with pytest.raises(UserError, match="3 class names and a label 3"):
        opened(tmp_path, (IMAGES, LABELS + 1), classes=["a", "b", "c"])


def test_sizes_and_channels_that_are_asked_for_make_different_arrays_fit(tmp_path: Path) -> None:
    test = np.zeros((9, 24, 20), np.uint8), LABELS[:9]
    workload = opened(tmp_path, (IMAGES, LABELS), test, image_size=12, channels=1)
    for split in (workload.train, workload.test):
        assert split.source.read(split.indices[:2]).shape == (2, 12, 12, 1)


def test_labels_in_a_column_are_labels(tmp_path: Path) -> None:
    assert opened(tmp_path, (IMAGES, LABELS[:, None])).num_classes == 3


def test_splits_and_fingerprint_follow_the_pixels(tmp_path: Path) -> None:
    before = opened(tmp_path, (IMAGES, LABELS))
    order = np.random.default_rng(1).permutation(60)
    shuffled = opened(tmp_path, (IMAGES[order], LABELS[order]))
    assert shuffled.fingerprint == before.fingerprint
    assert {m.content for m in shuffled.record.members if m.split == "test"} == {
        m.content for m in before.record.members if m.split == "test"
    }
    fewer = opened(tmp_path, (IMAGES[1:], LABELS[1:]))
    where = {m.content: m.split for m in before.record.members}
    assert all(where[m.content] == m.split for m in fewer.record.members)
    assert fewer.fingerprint != before.fingerprint
    assert opened(tmp_path, (255 - IMAGES, LABELS)).fingerprint != before.fingerprint
    assert opened(tmp_path, (IMAGES, LABELS[::-1].copy())).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5] * 3, [0.0, 0.2, 0.2]), ([0.5] * 3, [-0.2] * 3), ([120.0] * 3, [0.2] * 3)]
)
def test_normalisations_that_cannot_be_meant_are_refused(mean: list[float], std: list[float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"greater than 0|less than or equal to 1"):
        opened(tmp_path, (IMAGES, LABELS), mean=mean, std=std)


def test_digests_of_large_arrays_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.pipeline.workloads.data import arrays

    monkeypatch.setattr(arrays, "LARGE_BYTES", 10)
    calls: list[int] = []
    monkeypatch.setattr(arrays, "contents_of", lambda images: calls.append(1) or [bytes(32)] * len(images))
    np.save(tmp_path / "x_images.npy", IMAGES)
    np.save(tmp_path / "x_labels.npy", LABELS)
    for _ in range(2):
        assert len(arrays.load(str(tmp_path / "x"), None, Wanted(), None).train.contents) == 60
    assert len(calls) == 1
