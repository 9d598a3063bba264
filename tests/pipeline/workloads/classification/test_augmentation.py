"""Augmentation of classification images: what is drawn, from what, and where it is the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from secateur.pipeline.workloads.classification import Classification, Options, build
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.seeds import draw
from tests.pipeline.helpers import digits
from tests.pipeline.workloads.classification.test_classification import folder_of_images

CPU = torch.device("cpu")


def photographs(root: Path, sizes: tuple[tuple[int, int], ...] = ((96, 72), (80, 100)), **data: Any) -> Classification:
    """Class folders of images whose red and green rise from 0 to 255 from left to right and from top to bottom."""
    for index in range(0 if (root / "train").exists() else 24):
        wide, high = sizes[index % len(sizes)]
        pixels = np.full((high, wide, 3), 10 * index, dtype=np.uint8)
        pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, wide)[None], np.linspace(0, 255, high)[:, None]
        file = root / "train" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    section = {"source": "folder", "path": str(root), "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, **data}
    options = Options.model_validate({"model": {"name": "cifar/resnet8"}, "data": section})
    return build(options, Reading(check="none"))


def read(workload: Classification, seeds: list[int], rows: list[int] | None = None) -> Tensor:
    """Training images, shape (n, height, width, channels), as seeds alter them."""
    chosen = torch.tensor(rows if rows is not None else list(range(len(seeds))))
    return workload.read(workload.train, chosen, torch.tensor(seeds))[0]


def test_photographs_are_trained_on_random_parts_and_judged_by_their_middle(tmp_path: Path) -> None:
    workload = photographs(tmp_path)
    assert workload.augment == "random_resized_crop"
    assert workload.usage["resize"] == "crop" and workload.usage["image_size"] == 32
    spans = []
    for picture in read(workload, list(range(200, 400)), [0] * 200).float():
        spans.append(((picture[..., 0].max() - picture[..., 0].min()), (picture[..., 1].max() - picture[..., 1].min())))
    areas = np.array([float(a * b) for a, b in spans]) / 255**2
    assert areas.min() < 0.2 < 0.8 < areas.max()
    whole = photographs(tmp_path, crop_scale=[0.9, 1.0], flip=0.0)
    for picture in read(whole, list(range(20)), [0] * 20).float():
        seen = (
            (picture[..., 0].max() - picture[..., 0].min()) * (picture[..., 1].max() - picture[..., 1].min()) / 255**2
        )
        assert seen > 0.8 and picture[:, -1, 0].mean() > picture[:, 0, 0].mean()
    mirrored = [
        float(p[:, -1, 0].float().mean() < p[:, 0, 0].float().mean()) for p in read(workload, list(range(99)), [1] * 99)
    ]
    assert 0.3 < np.mean(mirrored) < 0.7
    plain = workload.batch(workload.train, torch.arange(4), train=False, generator=None, device=CPU)[0]
    assert torch.equal(plain, whole.batch(whole.train, torch.arange(4), train=False, generator=None, device=CPU)[0])


@pytest.mark.parametrize("sizes", [((96, 72),), ((30, 20), (24, 32))])
def test_images_of_one_size_or_tiny_ones_are_left_as_they_are(
    sizes: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    workload = photographs(tmp_path, sizes)
    assert workload.augment == "none"
    assert torch.equal(read(workload, [3, 4]), workload.read(workload.train, torch.arange(2))[0])
    assert workload.fingerprint == photographs(tmp_path, sizes, augment="none").fingerprint


def test_how_training_images_are_altered_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    default = photographs(tmp_path)
    assert default.fingerprint == photographs(tmp_path, augment="random_resized_crop").fingerprint
    assert default.fingerprint != photographs(tmp_path, augment="none").fingerprint
    assert digits().fingerprint == digits(augment="none").fingerprint != digits(random_erasing=0.5).fingerprint


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=1, max_size=6),
    st.sampled_from(["none", "flip_shift", "random_resized_crop"]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**40),
)
def test_an_image_is_altered_by_its_seed_alone(
    photograph_folder: Path, rows: list[int], augment: str, trivial: bool, erasing: float, seed: int
) -> None:
    """Whatever it is read beside, whatever was drawn before, and nothing is drawn from PyTorch's generator."""
    options = {"augment": augment, "trivial_augment": trivial, "random_erasing": erasing}
    workload = photographs(photograph_folder, **options)
    seeds = draw(20, torch.Generator().manual_seed(seed))[rows]

    def batch(rows: list[int], seeds: Tensor) -> Tensor:
        return workload.prepare(*workload.read(workload.train, torch.tensor(rows), seeds), seeds, CPU)[0]

    state = torch.get_rng_state()
    together = batch(rows, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    alone = [batch([row], seeds[place : place + 1]) for place, row in enumerate(rows)]
    assert torch.equal(torch.cat(alone), together)
    assert together.shape[1:] == (3, 32, 32) and together.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def photograph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("photographs")


def test_grey_images_and_arrays_can_be_altered_one_by_one_too(tmp_path: Path) -> None:
    workload = digits(image_size=16, augment="random_resized_crop", trivial_augment=True, random_erasing=1.0)
    images = read(workload, list(range(64)))
    assert images.shape == (64, 16, 16, 1) and images.dtype == torch.uint8
    assert not torch.equal(images, read(workload, list(range(1, 65))))
    folder_of_images(tmp_path)
    data = {"source": "folder", "path": str(tmp_path), "image_size": [12, 20], "channels": 1, "trivial_augment": True}
    grey = build(Options.model_validate({"data": data | {"augment": "random_resized_crop"}}))
    assert read(grey, list(range(12))).shape == (12, 12, 20, 1)


def test_erased_rectangles_have_the_mean_colour() -> None:
    workload = digits(image_size=16, augment="none", random_erasing=1.0, mean=[0.2], std=[1.0])
    plain, erased = workload.read(workload.train, torch.arange(32))[0], read(workload, list(range(32)))
    changed = erased[erased != plain]
    assert len(changed) > 32 and changed.unique().tolist() == [51]


def test_the_parts_of_a_seed_shift_by_any_distance_alike() -> None:
    workload = digits(image_size=16, augment="flip_shift", flip=0.25)
    images = torch.zeros(2000, 16, 16, 1, dtype=torch.uint8)
    images[:, 8, 8] = 255
    labels = torch.zeros(2000, dtype=torch.long)
    moved = workload.prepare(images, labels, draw(2000, torch.Generator().manual_seed(0)), CPU)[0]
    rows, columns = np.unravel_index(moved.flatten(1).argmax(1).numpy(), (16, 16))
    counts = [np.bincount(rows, minlength=16)[6:11], np.bincount(columns, minlength=16)[5:11]]
    assert counts[0].sum() == counts[1].sum() == 2000 and counts[0].min() > 320
    assert 50 < counts[1][0] < 150  # mirrored, and shifted as far as can be


def test_search_images_are_shifted_as_they_ever_were(tmp_path: Path) -> None:
    """The same pixels as runs that have begun were scored on: zeros come in, and two generators draw alike."""
    for options in ({"augment": "flip_shift"}, {"augment": "shift"}, {"augment": "flip_shift", "image_size": [16, 40]}):
        workload = digits(**{"image_size": 16, **options})
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        found, _ = workload.augmented(workload.search, torch.arange(8), generator=generators[0], device=CPU)
        plain, _ = workload.batch(workload.search, torch.arange(8), train=False, generator=None, device=CPU)
        high, wide = plain.shape[2:]
        down, across = high // 8, wide // 8
        if down == across:
            dy, dx = torch.randint(0, 2 * down + 1, (2, 8, 1), generator=generators[1])
        else:
            dy, dx = (torch.randint(0, 2 * r + 1, (8, 1), generator=generators[1]) for r in (down, across))
        flips = torch.rand((8, 1), generator=generators[1]) < 0.5
        for image, moved, y, x, flip in zip(plain, found, dy, dx, flips, strict=True):
            padded = torch.nn.functional.pad(image, (across, across, down, down))
            expected = padded[:, int(y) : int(y) + high, int(x) : int(x) + wide]
            assert torch.equal(moved, expected.flip(2) if flip and options["augment"] == "flip_shift" else expected)


def test_a_crop_needs_its_smaller_share_first() -> None:
    with pytest.raises(ValidationError, match="exchange the two"):
        digits(crop_scale=[1.0, 0.5])
