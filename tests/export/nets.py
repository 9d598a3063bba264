"""Small networks that cover what slicing must follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan


class Flat(nn.Module):
    """VGG's end: channels x 4 x 4 pixels flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Linear(12 * 16, 10), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Mobile(nn.Module):
    """Depthwise and grouped convolutions, batch norm, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Conv2d(8, 16, 1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.grouped(torch.relu(self.norm(self.depthwise(self.expand(x)))))
        return self.head((x + self.project(y)).mean((2, 3)))


class Shuffle(nn.Module):
    """Channel split, concatenation and shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        y = torch.cat([left, torch.relu(self.branch(right))], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(y).mean((2, 3))


class Attention(nn.Module):
    """Heads split off and merged again, a class token, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        n, t, _ = x.shape
        q, k, v = (part.reshape(n, t, 4, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, -1))
        return self.head((x + self.mlp(x))[:, 0])


class Follows(nn.Module):
    """Computed weights (two widths in one reshape; depthwise), nearest upsampling, the middle third of a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.qkv = nn.Linear(12, 24)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        flat = w.reshape(1, w.shape[0], w.shape[1])
        w = (flat - flat.mean(2, keepdim=True)).reshape(w.shape)
        x = nn.functional.conv2d(torch.relu(self.stem(x)), w, self.conv.bias)
        x = nn.functional.conv2d(x, self.depthwise.weight * 2, padding=1, groups=self.depthwise.groups)
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        q, k, v = self.qkv(x.mean((2, 3))).chunk(3, -1)
        bias = self.qkv.bias[self.qkv.bias.numel() // 3 : 2 * (self.qkv.bias.numel() // 3)]
        return self.head(q * torch.sigmoid(k + bias) + v)


class Heads(nn.Module):
    """Two images in, a mapping of lists out, as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.boxes = nn.Conv2d(8, 4, 1)
        self.scores = nn.Conv2d(8, 2, 1)

    def forward(self, images: list[Tensor], options: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        maps = [torch.relu(self.stem(image * options["scale"])) for image in images]
        return {"scores": [self.scores(m) for m in maps], "boxes": [1000 * self.boxes(m).flatten(1) for m in maps]}


class Picks(nn.Module):
    """Takes fixed channels: nothing that reads them can be cut from a template."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, 2:5].mean((2, 3))


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and batch-norm statistics, in eval mode."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def random_plan(graph: ChannelGraph | Any, seed: int = 0) -> PruningPlan:
    """30 to 90 % of every group, at random."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in graph.groups:
        width = max(1, int(group.size * rng.uniform(0.3, 0.9)))
        kept[group.name] = sorted(rng.choice(group.size, width, replace=False).tolist())
    return PruningPlan.full(graph.groups).replace(kept)
