"""The check of a task: a good one has no fault, and every fault is found, told with its fix, beside the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from secateur.pipeline.run.checkup import Finding, check_task
from tests.pipeline.workloads.custom.tasks import Task


def findings(made_of: type) -> dict[str, Finding]:
    return {finding.part: finding for finding in check_task("tasks.py:Task", made_of, {"width": 4})}


def test_a_good_task_passes_every_part_and_leaves_randomness_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    found = findings(Task)
    assert {finding.outcome for finding in found.values()} == {"ok"}, found
    assert {"trace", "cut", "export", "training", "resume"} <= found.keys()
    assert torch.equal(torch.random.get_rng_state(), before)


class Restless(nn.Sequential):
    """A network that counts its calls in no buffer."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += self.training
        return super().forward(x) * (1 + 0.01 * type(self).calls)


class Faulty(Task):
    """Five faults in parts that do not need each other."""

    def data(self, split: Any) -> Any:
        if split == "test":
            return Wavering()
        return super().data(split)

    def augment(self, image: Tensor, target: Tensor) -> Any:
        return image[:, :4], target

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs.detach(), targets)

    def answers(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - outputs.mean(0)


class Wavering:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.rand(1, 8, 8), 0


def test_all_faults_are_told_at_once_each_with_its_fix() -> None:
    found = findings(Faulty)
    faults = {part: finding.told for part, finding in found.items() if finding.outcome == "fault"}
    fixes = {
        "test data": "draw at random in augment",
        "augment": "return an input and a target like those",
        "loss": "without detach or argmax",
        "answers": "its own item alone",
    }
    assert faults.keys() == fixes.keys()
    assert all(fix in faults[part] for part, fix in fixes.items())
    assert {part for part, finding in found.items() if finding.outcome == "skipped"} == {
        *("splits", "metrics", "training", "resume")
    }
    assert found["export"].outcome == "ok"


def given(**methods: Any) -> type:
    return type("Own", (Task,), methods)


def restless(self: Task, weights: bool) -> nn.Module:
    return Restless(*Task.model(self, weights))


@pytest.mark.parametrize(
    ("part", "made_of", "said"),
    [
        ("model", given(model=lambda self, weights: Task(width=4 + 4 * weights).model(weights)), "other layers"),
        (
            "model",
            given(model=lambda self, weights: nn.Sequential(Task.model(self, weights), nn.LayerNorm(2), Centred())),
            "what else is in the batch",
        ),
        ("metrics", given(metrics=lambda self, a, t: {f"hits_{len(a)}": 0.5}), "other names"),
        ("metrics", given(metrics=lambda self, a, t: {"hits": float("nan")}), "NaN"),
        (
            "training data",
            given(data=lambda self, s: TensorDataset(torch.full((9, 1, 8, 8), torch.nan), torch.zeros(9))),
            "NaN",
        ),
        ("training data", given(data=lambda self, s: [(torch.rand(1, 8, 8), 0)]), "at least two"),
        ("splits", given(groups=lambda self, s: [1] * 40), "share no group"),
        ("trace", given(model=lambda self, w: nn.Sequential(nn.Flatten(), nn.Linear(64, 2))), "no channels"),
        ("resume", given(model=restless), "keep no state"),
    ],
)
def test_a_fault_is_found_in_its_part(part: str, made_of: type, said: str) -> None:
    finding = findings(made_of)[part]
    assert finding.outcome == "fault" and said in finding.told, finding


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_task_without_its_methods_is_told_at_once() -> None:
    (finding,) = check_task("tasks.py:Task", type("Empty", (), {}), {})
    assert finding.outcome == "fault" and "no model() and no data()" in finding.told
