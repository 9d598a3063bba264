"""Networks that the papers on pruning name and torchvision does not have, for small images and for 224 pixels.

The small ResNets follow He et al. 2016 (arXiv 1512.03385), section 4.2: three stages of 16, 32 and 64 channels and
shortcuts without parameters (option A); layer names are the usual ones of published CIFAR weights. VGG for 32 pixels is
Simonyan and Zisserman's plan (arXiv 1409.1556, table 1) with batch norm, without the last pooling, and with one linear
layer, as Li et al. 2017 (arXiv 1608.08710) prune it. MobileNets (Howard et al. 2017, arXiv 1704.04861, table 1; Sandler
et al. 2018, arXiv 1801.04381, table 2) exist with the strides of 224 pixels and, for 32, with fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


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


VGG_STAGES: Mapping[int, Sequence[int]] = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Layers -> convolutions of the stages of 64, 128, 256, 512 and 512 channels."""


class CifarVGG(nn.Module):
    """VGG with batch norm and one linear layer; images of 16 pixels at least.

    Args:
        layers: 16 or 19.
    """

    def __init__(self, layers: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for stage, (count, channels) in enumerate(zip(VGG_STAGES[layers], (64, 128, 256, 512, 512), strict=True)):
            parts += [nn.MaxPool2d(2)] if stage else []
            for _ in range(count):
                parts += [nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Linear(512, num_classes)
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions, each half with batch norm and ReLU.

    Args:
        strides: of the first convolution, and of the 13 blocks.
        width: factor on all channels.
    """

    CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    LARGE = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    """Strides for 224 pixels."""
    SMALL = (1, *LARGE[1:])
    """Strides for 32 pixels."""

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, strides: Sequence[int] = LARGE, width: float = 1.0
    ) -> None:
        super().__init__()
        channels = round(32 * width)
        self.stem = _normed(in_channels, channels, 3, strides[0])
        blocks = []
        for out, stride in zip((round(c * width) for c in self.CHANNELS), strides[1:], strict=True):
            blocks.append(nn.Sequential(_normed(channels, channels, 3, stride, channels), _normed(channels, out, 1, 1)))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class _InvertedResidual(nn.Module):
    """Widened, filtered channel by channel, narrowed without a ReLU; beside the identity where shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        widened = [] if expansion == 1 else [_normed(in_channels, inner, 1, 1)]
        self.layers = nn.Sequential(*widened, _normed(inner, inner, 3, stride, inner), _normed(inner, channels, 1)[:2])
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.adds else out


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 whose first convolution and second stage keep the resolution, for 32 pixels."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    """Expansion, channels, blocks, and stride of the first block."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = _normed(in_channels, 32, 3, 1)
        channels, blocks = 32, []
        for expansion, out, count, stride in self.STAGES:
            for i in range(count):
                blocks.append(_InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = _normed(channels, 1280, 1)
        self.classifier = nn.Linear(1280, num_classes)
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class FullyConnected(nn.Module):
    """Linear layers with ReLU between them, on all pixels at once.

    Args:
        pixels: numbers that an image has.
        hidden: outputs of each hidden layer.
    """

    def __init__(self, pixels: int, num_classes: int = 10, hidden: Sequence[int] = (300, 100)) -> None:
        super().__init__()
        sizes = [pixels, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, hidden, strict=False))
        self.classifier = nn.Linear(sizes[-1], num_classes)
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.classifier(x)  # type: ignore[no-any-return]


def _normed(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _initialised(network: nn.Module) -> None:
    """He et al.'s initialisation of convolutions; linear layers begin small and without bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)


Builder = Callable[..., nn.Module]
"""(number of classes, (channels, height, width) of the images, further options) -> network."""


def _resnet(blocks: int) -> Builder:
    return lambda num_classes, shape, **options: CifarResNet(blocks, num_classes, shape[0], **options)


def _vgg(layers: int) -> Builder:
    return lambda num_classes, shape, **options: CifarVGG(layers, num_classes, shape[0], **options)


def _mobilenet_v1(strides: Sequence[int]) -> Builder:
    return lambda num_classes, shape, **options: MobileNetV1(num_classes, shape[0], strides, **options)


def _mobilenet_v2(num_classes: int, shape: Sequence[int], **options: Any) -> nn.Module:
    return CifarMobileNetV2(num_classes, shape[0], **options)


def _mlp(num_classes: int, shape: Sequence[int], **options: Any) -> nn.Module:
    return FullyConnected(math.prod(shape), num_classes, **options)


SMALL: Mapping[str, Builder] = {
    **{f"cifar/resnet{6 * n + 2}": _resnet(n) for n in (1, 3, 5, 7, 9, 18)},
    **{f"cifar/vgg{layers}": _vgg(layers) for layers in VGG_STAGES},
    "cifar/mobilenet_v1": _mobilenet_v1(MobileNetV1.SMALL),
    "cifar/mobilenet_v2": _mobilenet_v2,
    "mlp": _mlp,
    "mobilenet_v1": _mobilenet_v1(MobileNetV1.LARGE),
}
"""Networks of this file by name."""
