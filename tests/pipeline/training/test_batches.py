"""Batches of a training are the same however they are come by, and nothing is left of those who read them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.training import reading
from secateur.pipeline.training.batches import Batches, batches_of, sizes_of
from secateur.pipeline.workloads import Workload, custom, detection
from secateur.pipeline.workloads.classification import Classification
from secateur.pipeline.workloads.custom.task import OwnCode, make_task
from tests.pipeline.helpers import digits
from tests.pipeline.workloads.classification.test_augmentation import photographs
from tests.pipeline.workloads.custom.tasks import Task

CPU = torch.device("cpu")
IMAGES, BATCH = 10, 4
Batch = tuple[Tensor, Tensor]


class Noisy(Task):
    """A task whose items are altered by whatever PyTorch draws."""

    def augment(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return image + torch.randn(image.shape), target


def own_task(folder: Path) -> Workload:
    code = OwnCode("tasks.py:Noisy", make_task("tasks.py:Noisy", Noisy, {}))
    return custom.Custom(custom.Options(task="tasks.py:Noisy"), code, "")


def detector(folder: Path) -> Workload:
    data = {"source": "digits", "image_size": 64, "scenes": 30}
    return detection.build(detection.Options.model_validate({"data": data}))


KINDS: dict[str, Callable[[Path], Workload]] = {
    "arrays": lambda folder: digits(augment="flip_shift"),
    "arrays, one by one": lambda folder: digits(augment="shift", trivial_augment=True, random_erasing=0.5),
    "photographs": lambda folder: photographs(folder, random_erasing=0.5),
    "files as they are": lambda folder: photographs(folder, augment="shift"),
    "detection": detector,
    "own task": own_task,
}


@pytest.fixture(scope="module", params=KINDS)
def workload(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return KINDS[request.param](tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain() -> Classification:
    return digits()


def opened(workload: Workload, rank: int = 0, world_size: int = 1, images: int = IMAGES, **keys: Any) -> Batches:
    recipe = Recipe(**{"batch_size": BATCH, "num_workers": 0, "cache_mb": 0, **keys})
    return batches_of(
        workload, workload.train.first(images), recipe, seed=3, compute=CPU, rank=rank, world_size=world_size
    )


def epochs(batches: Batches, *asked: tuple[int, int]) -> list[list[Batch]]:
    """The batches of epochs, each (number, first step)."""
    with closing(batches):
        return [list(batches.epoch(number, first)) for number, first in asked]


def equal(some: list[Batch], others: list[Batch]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_an_epoch_has_every_image_once_and_another_order_than_the_next(plain: Classification) -> None:
    first, second = epochs(opened(plain, images=70, batch_size=16), (0, 0), (1, 0))
    assert [len(images) for images, _ in first] == [16, 16, 16, 16, 6]
    every = [torch.cat([images for images, _ in epoch]) for epoch in (first, second)]
    assert not torch.equal(*every)
    there = [sorted(map(tuple, images.flatten(1).tolist())) for images in every]
    assert there[0] == there[1]


@given(st.integers(1, 200), st.integers(2, 40))
def test_no_image_is_alone_in_a_batch_that_could_have_company(images: int, batch_size: int) -> None:
    sizes = sizes_of(images, batch_size)
    assert sum(sizes) == images
    assert all(size == batch_size for size in sizes[:-1])
    assert min(sizes) > 1 or images == 1
    assert sizes[-1] <= batch_size + 1


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_batches_from_any_step_on(workload: Workload, num_workers: int) -> None:
    """Whether images are kept in memory or not, in epochs of any order; nothing is drawn from PyTorch's generator."""
    expected = epochs(opened(workload), (0, 0), (1, 0), (1, 2), (0, 1))
    assert not equal(expected[0], expected[1])
    assert equal(expected[2], expected[1][2:]) and equal(expected[3], expected[0][1:])
    for cache_mb in (0, 100):
        state = torch.get_rng_state()
        found = epochs(opened(workload, num_workers=num_workers, cache_mb=cache_mb), (1, 2), (0, 0), (1, 0), (0, 1))
        assert all(equal(a, b) for a, b in zip(found, (expected[i] for i in (2, 0, 1, 3)), strict=True))
        assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_that_is_left_in_the_middle_disturbs_no_other(workload: Workload) -> None:
    (expected,) = epochs(opened(workload), (1, 0))
    with closing(opened(workload, num_workers=2)) as batches:
        next(batches.epoch(0))
        assert equal(list(batches.epoch(1)), expected)


MIXING: list[dict[str, float]] = [{}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 6), st.sampled_from(MIXING))
def test_several_processes_see_together_what_one_sees(
    plain: Classification, images: int, batch_size: int, world_size: int, mixing: dict[str, float]
) -> None:
    keys: dict[str, Any] = {"images": images, "batch_size": batch_size, **mixing}
    whole = opened(plain, **keys).epoch(1, 1)
    ranks = [opened(plain, rank, world_size, **keys).epoch(1, 1) for rank in range(world_size)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert equal([batch], [(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))])
        sizes = [len(part[1]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


# -- mixed images


@pytest.mark.parametrize("mixing", MIXING[1:])
def test_mixed_images_have_their_classes_in_the_same_shares(plain: Classification, mixing: dict[str, float]) -> None:
    ((images, targets), *_), again = epochs(opened(plain, images=64, batch_size=64, **mixing), (0, 0), (0, 0))
    ((pure, classes),) = epochs(opened(plain, images=64, batch_size=64), (0, 0))[0]
    assert equal([(images, targets)], again)
    assert torch.allclose(targets.sum(1), torch.ones(64)) and targets.shape == (64, 10)
    other = classes.roll(1)
    differing = classes != other
    share = targets.gather(1, classes[:, None])[differing]
    assert torch.allclose(share, share[0].expand_as(share)) and 0 < share[0] < 1
    assert torch.allclose(targets.gather(1, other[:, None])[differing], 1 - share, atol=1e-6)
    mean, expected = (
        images.mean((1, 2, 3)),
        share[0] * pure.mean((1, 2, 3)) + (1 - share[0]) * pure.roll(1, 0).mean((1, 2, 3)),
    )
    if "cutmix" not in mixing:
        assert torch.allclose(mean, expected, atol=1e-5)
    logits = torch.randn(64, 10)
    hard = plain.loss(logits, classes), plain.loss(logits, other)
    assert plain.loss(logits, targets) == pytest.approx(float(share[0] * hard[0] + (1 - share[0]) * hard[1]), rel=1e-4)


def test_images_without_a_class_of_their_own_are_not_mixed(tmp_path: Path) -> None:
    for kind in (detector, own_task):
        with pytest.raises(UserError, match="set both to 0 in the recipe"):
            opened(kind(tmp_path), mixup=0.2)


# -- processes that read


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def test_processes_end_with_the_training_wherever_it_stops(plain: Classification) -> None:
    before = {child.pid for child in children()}
    batches = opened(plain, num_workers=2)
    epoch = batches.epoch(0)
    next(epoch)
    assert len({child.pid for child in children()} - before) == 2
    batches.close()
    batches.close()
    assert until(lambda: not {child.pid for child in children()} - before, 5.0)


def test_processes_end_when_the_training_is_killed(plain: Classification) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()

    def train() -> None:
        batches = opened(plain, num_workers=2)
        epoch = batches.epoch(0)
        next(epoch)
        sender.send([child.pid for child in children()])
        time.sleep(300)

    process = context.Process(target=train)
    process.start()
    assert receiver.poll(60)
    pids = receiver.recv()
    assert len(pids) == 2 and process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert until(lambda: not any(map(_is_alive, pids)))


def _is_alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_process_that_dies_is_said_to_have_died(plain: Classification) -> None:
    with closing(opened(plain, images=64, num_workers=1)) as batches:
        before = {child.pid for child in children()}
        epoch = batches.epoch(0)
        next(epoch)
        (worker,) = [child for child in children() if child.pid not in before]
        worker.kill()
        with pytest.raises(SurroundingsError, match="lower num_workers"):
            list(epoch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_has_vanished_is_named(tmp_path: Path, num_workers: int) -> None:
    workload = photographs(tmp_path)
    (tmp_path / "train" / "a" / "4.png").unlink()
    batches = opened(workload, images=99, num_workers=num_workers)
    with closing(batches), pytest.raises(UserError, match=r"cannot read image .*4\.png: it is a link to a file that"):
        list(batches.epoch(0))


def test_data_that_holds_an_open_file_is_read_by_one_process(tmp_path: Path) -> None:
    """Forked processes would share its position, and read each other's images."""

    class Opened:
        def __init__(self, file: Any) -> None:
            self.dataset = {"paths": [tmp_path], "file": file, "pixels": torch.zeros(3)}

    (tmp_path / "images").write_bytes(b"images")
    with (tmp_path / "images").open("rb") as file:
        assert not reading._can_be_shared(Opened(file))
    assert reading._can_be_shared(Opened(None))


def test_images_are_decoded_once_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.pipeline.workloads.data import sources

    decoded: list[str] = []
    real = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path, grey=False: (decoded.append(path.name), real(path, grey))[1])
    workload = photographs(tmp_path)
    for room, times in ((0, 2), (100, 1)):
        decoded.clear()
        epochs(opened(workload, cache_mb=room), (0, 0), (1, 0))
        assert len(decoded) == times * IMAGES
