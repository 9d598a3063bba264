"""Sparse training makes the wanted share of scales small, resumes exactly, and says what it needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.pipeline.config.schema import FinetuneSection
from secateur.pipeline.progress import Report, silent
from secateur.pipeline.training.auxiliary import TRAININGS, Outcome, Task
from secateur.pipeline.training.auxiliary.sparsity import BUFFER, channel_scales, penalty, sparsity, train
from secateur.pipeline.workloads import Workload
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.trace import trace
from tests.pipeline.helpers import digits
from tests.pruning.models import CifarResNet

CPU = torch.device("cpu")


class KilledError(Exception):
    """The process ends here."""


class Small:
    """A workload with fewer training images."""

    def __init__(self, whole: Workload, images: int) -> None:
        self.whole, self.train = whole, whole.train.first(images)

    def __getattr__(self, name: str) -> object:
        assert name not in ("search", "test"), "only the training split may be read"
        return getattr(self.whole, name)


class PlainNet(nn.Module):
    """Two convolutions without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def workload() -> Workload:
    return digits()


@pytest.fixture(scope="module")
def start(workload: Workload) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = workload.build_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.2)
    return model, trace(model, workload.example_input())


def taught(
    workload: Workload,
    start: tuple[nn.Module, ChannelGraph],
    folder: Path,
    options: Mapping[str, float | str],
    report: Report = silent,
    epochs: float = 2,
) -> tuple[nn.Module, Outcome]:
    model, graph = copy.deepcopy(start[0]), start[1]
    recipe = FinetuneSection(epochs=epochs, lr=0.05, batch_size=32, autocast="fp32")
    small = Small(workload, 448)
    task = Task(model, graph, small, recipe, 1, CPU, folder / "task.ckpt", report, options)  # type: ignore[arg-type]
    return model, train(task)


@pytest.mark.parametrize("wanted", [0.3, 0.7])
def test_the_controller_reaches_the_wanted_share_and_the_network_still_works(workload, start, tmp_path, wanted) -> None:
    model, outcome = taught(workload, start, tmp_path, {"target_sparsity": wanted}, epochs=11)
    assert sparsity(list(channel_scales(model, start[1])), 0.01) == pytest.approx(wanted, abs=0.12)
    images, labels = workload.batch(workload.train, torch.arange(448), train=False, generator=None, device=CPU)
    with torch.no_grad():
        assert workload.metrics(model(images), labels)["top1"] > 0.8
    assert outcome.images == 11 * 448
    assert not (tmp_path / "task.ckpt").exists()


def test_without_a_wanted_share_scales_stay(workload, start, tmp_path) -> None:
    model, _ = taught(workload, start, tmp_path, {"target_sparsity": 0})
    assert sparsity(list(channel_scales(model, start[1])), 0.01) == 0


def test_the_outcome_has_the_networks_own_tensors_and_a_score_per_channel(workload, start, tmp_path) -> None:
    model, outcome = taught(workload, start, tmp_path, {}, epochs=1)
    dense = start[0].state_dict()
    assert outcome.state.keys() == dense.keys()
    assert all(outcome.state[name].shape == tensor.shape for name, tensor in dense.items())
    assert BUFFER not in dict(model.named_buffers())
    name = "layer1.0.conv1"  # read by one convolution, scaled by one norm
    block = model.get_submodule("layer1.0")
    expected = block.bn1.weight.detach().abs() * block.conv2.weight.detach().square().sum((0, 2, 3)).sqrt()
    assert np.allclose(outcome.scores[name], expected.numpy(), rtol=1e-5)
    assert {n: s.shape for n, s in outcome.scores.items()} == {g.name: (g.size,) for g in start[1].groups}


@pytest.mark.parametrize("die_at", [19, 33])
def test_a_killed_training_continues_with_the_strength_it_had(workload, start, tmp_path, die_at) -> None:
    def die(done: int, total: int, note: str = "") -> None:
        if done == die_at:
            raise KilledError

    expected = taught(workload, start, tmp_path / "a", {}, epochs=3)[1]
    with pytest.raises(KilledError):
        taught(workload, start, tmp_path / "b", {}, die, epochs=3)
    resumed = taught(workload, start, tmp_path / "b", {}, epochs=3)[1]
    assert all(torch.equal(resumed.state[name], tensor) for name, tensor in expected.state.items())


def small_norm() -> tuple[nn.Module, nn.Parameter, list[tuple[nn.Parameter, torch.Tensor]]]:
    """A batch norm whose third scale belongs to no group, with a lambda of 0.1."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    scale = model.get_parameter("0.weight")
    scale.data = torch.tensor([0.001, -0.005, 0.5, -1.0])
    model.register_buffer(BUFFER, torch.tensor([0.1, 0.0], dtype=torch.float64))
    return model, scale, [(scale, torch.tensor([0, 1, 3]))]


def test_lambda_follows_the_sign_of_what_is_missing() -> None:
    model, _, scales = small_norm()
    options = {"target_sparsity": 0.8, "strength": 0.1, "rate": 0.5, "threshold": 0.01}

    def step(done: float) -> float:
        penalty(model, scales, done, options, 0.02)
        return model.get_buffer(BUFFER)[0].item()

    assert sparsity(scales, 0.01) == pytest.approx(2 / 3)
    assert step(0.0) == pytest.approx(0.1)
    assert step(0.01) == pytest.approx(0.05)  # 2/3 are small, 0.8 * 0.01 / 0.75 are wanted
    assert step(0.014) == pytest.approx(0.05)  # the same hundredth
    assert step(0.04) == pytest.approx(0.01)  # three hundredths later, no less than a tenth of the first
    assert step(0.62) == pytest.approx(0.01)  # 0.661 are wanted
    assert step(0.63) == pytest.approx(0.015)  # 0.672 are wanted
    assert step(0.65) == pytest.approx(0.015 * 1.5**2)
    assert step(1.0) == pytest.approx(0.01 / 0.02)


def test_the_penalty_is_lambda_times_the_magnitudes_rounded_off_below_the_threshold() -> None:
    model, scale, scales = small_norm()
    options = {"target_sparsity": 0.8, "strength": 0.1, "rate": 0.0, "threshold": 0.01}
    value = penalty(model, scales, 1.0, options, 0.02)
    value.backward()
    assert value.item() == pytest.approx(0.1 * (0.001**2 / 0.02 + 0.005**2 / 0.02 + 1.0 - 0.005), rel=1e-5)
    assert scale.grad.tolist() == pytest.approx([0.1 * 0.1, -0.1 * 0.5, 0, -0.1])
    assert penalty(model, scales, 0.1, options, 0.02).item() == 0  # more are small than wanted


def test_only_scales_of_removable_channels_are_pressed() -> None:
    model = CifarResNet("A")  # zero-padding shortcuts
    graph = trace(model, torch.randn(1, 3, 16, 16))
    found = {id(scale): index.tolist() for scale, index in channel_scales(model, graph)}
    names = {m.tensor for g in graph.groups for m in g.members}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (id(module.weight) in found) == (f"{name}.weight" in names)
    assert all(index == sorted(set(index)) for index in found.values())


def test_networks_without_batch_norm_are_refused(workload, tmp_path) -> None:
    model = PlainNet()
    graph = trace(model, torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"needs batch norms .*; set epochs: 0, or use .*cpmc"):
        taught(workload, (model, graph), tmp_path, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 0.1}, r"unknown options \['treshold'\] of sparse training; known: target_sparsity, strength"),
        ({"target_sparsity": 1.5, "strength": 0}, "target_sparsity must lie in 0..1, got 1.5; strength must be posi"),
    ],
)
def test_wrong_options_name_the_right_ones(workload, start, tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        taught(workload, start, tmp_path, options)


def test_the_kind_is_found_by_name() -> None:
    assert TRAININGS.load("sparsity").train is train
