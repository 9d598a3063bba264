"""Networks by name: every classifier of torchvision, and the ResNets made for small images.

The small ResNets follow He et al. 2016 (arXiv 1512.03385), section 4.2: three stages of 16, 32 and 64 channels and
shortcuts without parameters (option A). Layer names are the usual ones of published CIFAR weights.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, or every second pixel with zero channels around (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for small images with ``6 * blocks + 2`` layers; input (N, in_channels, H, W), output (N, num_classes)."""

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


CIFAR_RESNETS = {f"cifar_resnet{6 * n + 2}": n for n in (1, 3, 5, 7, 9, 18)}


def build_network(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """A network by name, with random weights.

    Raises:
        UserError: no such network (lists the nearest), or it does not take these options.
    """
    if name in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[name], num_classes, in_channels, **options)
    import torchvision.models as zoo

    names = zoo.list_models(zoo)
    if name not in names:
        raise UserError(f"unknown network {name!r}; {known([*CIFAR_RESNETS, *names], name)}")
    if in_channels != 3:
        raise UserError(f"{name} takes RGB images, the data has {in_channels} channel(s); set data.channels: 3")
    try:
        model: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"network {name} does not take these options: {error}") from error
    return model
