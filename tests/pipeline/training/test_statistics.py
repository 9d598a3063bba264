"""Batch-norm statistics taken anew: from few images too, and from none not at all."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from secateur.pipeline.training.statistics import recalibrate, training_images


@pytest.fixture
def network() -> nn.Module:
    """A batch norm behind a global pooling: one value per image and channel."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()


def images_of(count: int, at_once: int) -> list[torch.Tensor]:
    images = torch.randn(count, 3, 4, 4)

    class Images:
        def first(self, num: int) -> Any:
            return range(min(num, count))

    workload: Any = SimpleNamespace(batch=lambda split, chosen, **_: (images[chosen], None))
    split: Any = Images()
    return list(training_images(workload, split, count, torch.device("cpu"), at_once))


@pytest.mark.parametrize("at_once", [1, 2, 3, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 129])
def test_every_number_of_images_gives_statistics_or_leaves_them(network: nn.Module, count: int, at_once: int) -> None:
    before = copy.deepcopy(network.state_dict())

    batches = images_of(count, at_once)
    recalibrate(network, batches)

    assert sum(map(len, batches)) == (count if count > 1 else 0)
    changed = not torch.equal(network.state_dict()["2.running_var"], before["2.running_var"])
    assert changed == (count > 1)
    assert all(not torch.isnan(tensor.float()).any() for tensor in network.state_dict().values())
