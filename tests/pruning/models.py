"""Small networks for the tests, with statistics that make a wrong mask visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.ops import FrozenBatchNorm2d

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.surgery import Certificate, certify, prune
from secateur.pruning.trace import trace

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, FrozenBatchNorm2d)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random affine parameters and running statistics in every normalisation layer; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            for name in ("running_mean", "bias"):
                if getattr(module, name, None) is not None:
                    getattr(module, name).data.normal_(0, 0.5, generator=generator)
            for name in ("running_var", "weight"):
                if getattr(module, name, None) is not None:
                    getattr(module, name).data.uniform_(0.5, 1.5, generator=generator)
    return model


def half(graph: ChannelGraph, seed: int = 0) -> PruningPlan:
    """Half of the channels of every group, at random."""
    return uniform_plan(graph, 0.5, saliency="random", seed=seed)


def certified(model: nn.Module, *inputs: Tensor, seed: int = 0) -> tuple[ChannelGraph, Certificate]:
    """Trace, prune half of everything, certify."""
    graph = trace(model, *inputs)
    plan = half(graph, seed)
    return graph, certify(model, prune(model, graph, plan), graph, plan, *inputs)


class Net(nn.Module):
    """Named layers, parameters and buffers, and a function of them and of the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class PlainCNN(nn.Module):
    """conv-bn-relu, pool, conv, flatten, linear, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc1 = nn.Linear(12 * 4 * 4, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 2)
        x = F.max_pool2d(torch.sigmoid(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class BasicBlock(nn.Module):
    """CIFAR residual block; shortcut option A (subsample and pad) or B (projection)."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2 if option == "A" and stride != 1 else 0
        self.shortcut: nn.Module = nn.Identity()
        if option == "B" and stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else self.shortcut(x)
        out += short
        return F.relu(out)


class CifarResNet(nn.Module):
    """Three stages of one block each."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = BasicBlock(8, 8, 1, option)
        self.layer2 = BasicBlock(8, 16, 2, option)
        self.layer3 = BasicBlock(16, 32, 2, option)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(x, x.shape[3]).view(x.size(0), -1))


class TwoBranches(nn.Module):
    """Two convolutions of unequal width, concatenated and read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 4, 1)
        self.merge = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([self.left(x), self.right(x)], 1))


class Tied(nn.Module):
    """One weight used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.a(F.relu(self.stem(x))))))
