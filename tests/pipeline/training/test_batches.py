"""Batches of a training are the same however they are come by."""

from __future__ import annotations

import pytest
import torch

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.training.batches import Batches, batches_of
from secateur.pipeline.workloads.classification import Classification
from tests.pipeline.helpers import digits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workload() -> Classification:
    return digits()


def opened(workload: Classification, rank: int = 0, world_size: int = 1) -> Batches:
    split, recipe = workload.train.first(70), Recipe(batch_size=16)
    return batches_of(workload, split, recipe, seed=3, compute=CPU, rank=rank, world_size=world_size)


def test_an_epoch_has_every_image_once_and_another_order_than_the_next(workload: Classification) -> None:
    batches = opened(workload)
    epochs = [torch.cat([images for images, _ in batches.epoch(number)]) for number in (0, 1)]
    assert [len(images) for images, _ in batches.epoch(0)] == [16, 16, 16, 16, 6]
    assert not torch.equal(*epochs)
    there = [sorted(map(tuple, images.flatten(1).tolist())) for images in epochs]
    assert there[0] == there[1]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_several_processes_see_together_what_one_sees(workload: Classification, world_size: int) -> None:
    ranks = [opened(workload, rank, world_size).epoch(1) for rank in range(world_size)]
    for (images, targets), parts in zip(opened(workload).epoch(1), zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
