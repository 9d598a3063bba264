"""Distillation of features, where both networks have them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.pipeline.config.schema import Distillation, Recipe, RunFile
from secateur.pipeline.training.curve import TrainingError
from secateur.pipeline.training.features import Features
from secateur.pipeline.training.loop import fit
from tests.pipeline.helpers import digits

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block with a width of its own."""

    def __init__(self, inner: int, stream: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(stream, inner, 3, padding=1), nn.Conv2d(inner, stream, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.b(self.a(x).relu())
        return out


def network(inner: int, stream: int = 4) -> nn.Module:
    torch.manual_seed(inner)
    stem, head = nn.Conv2d(1, stream, 3, stride=2), nn.Sequential(nn.Flatten(), nn.Linear(9 * stream, 10))
    return nn.Sequential(stem, Block(inner, stream), Block(inner, stream), head)


IMAGE = torch.zeros(1, 1, 8, 8)


def test_blocks_are_compared_where_their_shapes_agree() -> None:
    student, teacher = network(3), network(6)
    features = Features(student, teacher, IMAGE)
    assert features.names == ["1", "2"]
    for model in (student, teacher):
        model(torch.randn(2, 1, 8, 8))
    assert features.distance() > 0
    named = Features(student, student, IMAGE, ("*.b", "0"))
    student(torch.randn(2, 1, 8, 8))
    assert named.names == ["0", "1.b", "2.b"]
    assert named.distance() == 0
    for opened in (features, named):
        opened.close()
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_a_cut_stream_is_told() -> None:
    with pytest.raises(TrainingError, match=r"search\.scope: inner"):
        Features(network(3, stream=3), network(3), IMAGE)
    content = {"name": "a", "workload": {"name": "classification"}, "finetune": {"distill": {"features": 1}}}
    with pytest.raises(ValueError, match=r"search\.scope: inner"):
        RunFile.model_validate(content)
    assert RunFile.model_validate({**content, "search": {"scope": "inner"}})


def test_features_come_nearer_to_the_teachers(tmp_path: Path) -> None:
    workload, teacher = digits(), network(6)
    images, _ = workload.batch(workload.train, torch.arange(64), train=False, generator=None, device=CPU)

    def distance(weight: float) -> float:
        student = network(3)
        distill = Distillation(weight=0.0, features=weight)
        recipe = Recipe(epochs=2, lr=0.02, batch_size=32, clip_norm=1.0, autocast="fp32")
        options = {"seed": 0, "checkpoint": tmp_path / "c", "compute": CPU, "distill": distill}
        fit(student, workload, workload.train.first(256), recipe, teacher=copy.deepcopy(teacher), **options)
        features = Features(student, teacher, IMAGE)
        with torch.no_grad():
            student(images), teacher(images)
        return features.distance().item()

    assert distance(1.0) < 0.7 * distance(0.0)
