"""Single-shot detectors by name: small ones for small images, torchvision's, and those of published weights.

A network's output is one tensor of raw heads (``ssd.py``); its ``default_boxes`` say where they look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pipeline.config import trust
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.detection.ssd import Scores


def grid_boxes(sides: Sequence[int | tuple[int, int]], shapes: Sequence[Sequence[tuple[float, float]]]) -> Tensor:
    """Default boxes of maps: for each map its cells row by row, for each cell its shapes (w, h).

    Args:
        sides: of square maps, or rows and columns.
        shapes: of the boxes of each map, as fractions of the image.

    Returns:
        Shape (boxes, 4), centre and size.
    """
    parts = []
    for side, pairs in zip(sides, shapes, strict=True):
        rows, columns = (side, side) if isinstance(side, int) else side
        down, across = ((torch.arange(count) + 0.5) / count for count in (rows, columns))
        y, x = torch.meshgrid(down, across, indexing="ij")
        cells = torch.stack([x, y], -1).reshape(-1, 1, 2).expand(-1, len(pairs), -1)
        parts.append(torch.cat([cells, torch.tensor(pairs).expand_as(cells)], -1).reshape(-1, 4))
    return torch.cat(parts)


def _rows(result: Tensor, columns: int) -> Tensor:
    """A head's output (N, per cell * columns, H, W) as (N, H * W * per cell, columns)."""
    return result.permute(0, 2, 3, 1).reshape(result.shape[0], -1, columns)


class _Heads(nn.Module):
    """Convolutions from maps to raw heads.

    Args:
        channels: of each map.
        per_cell: default boxes per cell of each map.
        num_outputs: classes and background.
        kernel: side of the convolutions.
    """

    def __init__(self, channels: Sequence[int], per_cell: Sequence[int], num_outputs: int, kernel: int) -> None:
        super().__init__()
        pairs = list(zip(channels, per_cell, strict=True))
        self.box = nn.ModuleList(nn.Conv2d(c, 4 * k, kernel, 1, kernel // 2) for c, k in pairs)
        self.cls = nn.ModuleList(nn.Conv2d(c, num_outputs * k, kernel, 1, kernel // 2) for c, k in pairs)
        self.num_outputs = num_outputs
        for conv in [*self.box, *self.cls]:
            nn.init.xavier_uniform_(cast(nn.Conv2d, conv).weight)
            nn.init.zeros_(cast(Tensor, cast(nn.Conv2d, conv).bias))

    def forward(self, maps: list[Tensor]) -> Tensor:
        offsets = [_rows(head(x), 4) for head, x in zip(self.box, maps, strict=True)]
        logits = [_rows(head(x), self.num_outputs) for head, x in zip(self.cls, maps, strict=True)]
        return torch.cat([torch.cat(offsets, 1), torch.cat(logits, 1)], 2)


class L2Norm(nn.Module):
    """Every pixel's channels divided by their norm, times a learned scale per channel (Liu et al. 2015, ParseNet)."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, self.weight)


def _normalised(x: Tensor, scale: Tensor) -> Tensor:
    """``F.normalize`` times a scale per channel, without its expansion to a size, which ONNX files would state."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return scale.view(1, -1, 1, 1) * (x / norm.clamp(min=1e-12))


def _conv(channels: int, out: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class _Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(channels, channels), _conv(channels, channels)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + x)


class SmallSSD(nn.Module):
    """A detector for small images: strides 8, 16 and 32, residual and depthwise blocks, L2Norm on the first map.

    Args:
        image_size: side of the square images, or their height and width; multiples of 32.
        width: channels of the first stage.
        scales: side of the default boxes of each map and one more, as fractions of the image.
    """

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    scores: Scores = "softmax"
    head_prefixes = ("heads.box.", "heads.cls.")

    def __init__(
        self,
        num_classes: int,
        image_size: int | Sequence[int] = 64,
        width: int = 16,
        scales: Sequence[float] = (0.2, 0.35, 0.6, 0.95),
    ) -> None:
        super().__init__()
        high, wide = (image_size, image_size) if isinstance(image_size, int) else image_size
        if high % 32 or wide % 32:
            raise UserError(f"small_ssd needs images whose side is a multiple of 32, not {image_size}")
        a, b, c, d = width, 2 * width, 4 * width, 6 * width
        self.stem = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2), _Residual(b))
        self.middle = nn.Sequential(_conv(b, c, 2), _Residual(c))
        self.norm = L2Norm(c, 10.0)
        self.deep = nn.Sequential(_conv(c, c, 2, groups=c), _conv(c, d, kernel=1), _conv(d, d, groups=d), _conv(d, d))
        self.last = nn.Sequential(_conv(d, c, kernel=1), _conv(c, d, 2))
        self.image_size = image_size
        shapes = [
            [(s, s), (math.sqrt(s * t), math.sqrt(s * t)), *((s * math.sqrt(r), s / math.sqrt(r)) for r in (2, 0.5))]
            for s, t in pairwise(scales)
        ]
        self.default_boxes = grid_boxes([(high // step, wide // step) for step in (8, 16, 32)], shapes)
        self.heads = _Heads((c, d, d), [len(pairs) for pairs in shapes], num_classes + 1, 3)

    def forward(self, images: Tensor) -> Tensor:
        middle = self.middle(self.stem(images))
        deep = self.deep(middle)
        return self.heads([self.norm(middle), deep, self.last(deep)])  # type: ignore[no-any-return]


class TorchvisionSSD(nn.Module):
    """Backbone and heads of one of torchvision's SSDs, without its resizing and its suppression.

    State dicts have torchvision's names, so that its checkpoints load.

    Args:
        backbone: images -> mapping of maps.
        head: list of maps -> ``bbox_regression`` and ``cls_logits``.
        generator: torchvision's generator of default boxes.
        sides: of the maps.
        mean, std: per channel, of pixels in 0..1.
    """

    scores: Scores = "softmax"
    head_prefixes = ("head.regression_head.", "head.classification_head.")

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        generator: nn.Module,
        image_size: int,
        sides: Sequence[int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        from torchvision.models.detection.image_list import ImageList

        self.backbone, self.head = backbone, head
        self.image_size, self.mean, self.std = image_size, mean, std
        image = ImageList(torch.empty(1, 3, image_size, image_size), [(image_size, image_size)])
        (pixels,) = generator(image, [torch.empty(1, 1, side, side) for side in sides])
        pixels = pixels / image_size
        self.default_boxes = torch.cat([(pixels[:, :2] + pixels[:, 2:]) / 2, pixels[:, 2:] - pixels[:, :2]], 1)

    def forward(self, images: Tensor) -> Tensor:
        found = self.head(self.maps(images))
        return torch.cat([found["bbox_regression"], found["cls_logits"]], 2)

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the heads read."""
        return list(self.backbone(images).values())


class VGGSSD(TorchvisionSSD):
    """The same for torchvision's VGG backbone, whose L2Norm is written so that ONNX files of it can be cut."""

    def maps(self, images: Tensor) -> list[Tensor]:
        x = self.backbone.features(images)  # type: ignore[operator]
        found = [_normalised(x, cast(Tensor, self.backbone.scale_weight))]
        for block in cast(nn.ModuleList, self.backbone.extra):
            x = block(x)
            found.append(x)
        return found


def ssd300_vgg16(num_classes: int, batch_norm: bool = False) -> VGGSSD:
    """SSD300 on VGG-16 as in torchvision (Liu et al. 2016): 8,732 default boxes, L2Norm behind conv4_3, atrous fc6.

    Args:
        batch_norm: behind every convolution but the heads'; state dicts then have other names than torchvision's.
    """
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSDFeatureExtractorVGG, SSDHead
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"], batch_norm=batch_norm)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
    backbone = SSDFeatureExtractorVGG(features, highres=False)
    if batch_norm:
        last = backbone.extra[0]
        backbone.extra[0] = nn.Sequential(*last[:-1], *_normed(last[-1]))
        for i in range(1, len(backbone.extra)):
            backbone.extra[i] = _normed(backbone.extra[i])
    ratios = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    generator = DefaultBoxGenerator(
        ratios, scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05], steps=[8, 16, 32, 64, 100, 300]
    )
    head = SSDHead([512, 1024, 512, 256, 256, 256], generator.num_anchors_per_location(), num_classes + 1)
    grey = (0.48235, 0.45882, 0.40784)
    return VGGSSD(backbone, head, generator, 300, (38, 19, 10, 5, 3, 1), grey, (1 / 255, 1 / 255, 1 / 255))


def _normed(layers: nn.Sequential) -> nn.Sequential:
    """The same layers, with a batch norm behind each convolution."""
    result: list[nn.Module] = []
    for layer in layers:
        result.append(layer)
        if isinstance(layer, nn.Conv2d):
            result.append(nn.BatchNorm2d(layer.out_channels))
    return nn.Sequential(*result)


def ssdlite320_mobilenet_v3_large(num_classes: int, **options: Any) -> TorchvisionSSD:
    """torchvision's SSDlite (Sandler et al. 2018; Howard et al. 2019): 320x320, 3,234 default boxes."""
    import torchvision.models.detection as zoo

    whole = zoo.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=num_classes + 1, **options
    )
    half = (0.5, 0.5, 0.5)
    return TorchvisionSSD(whole.backbone, whole.head, whole.anchor_generator, 320, (20, 10, 5, 3, 2, 1), half, half)


class _SameConv(nn.Conv2d):
    """A convolution whose stride-2 form pads as TensorFlow's SAME: for even sides nothing before and one behind."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, side: int, groups: int = 1) -> None:
        self.behind = kernel == 3 and stride == 2 and side % 2 == 0
        super().__init__(channels, out, kernel, stride, 0 if self.behind else kernel // 2, groups=groups)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(cast(Tensor, self.bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(super().forward(F.pad(x, (0, 1, 0, 1)) if self.behind else x))


class MobileNetSSD(nn.Module):
    """SSD300 on MobileNet V1 (Howard et al. 2017, arXiv 1704.04861) as in TensorFlow's object detection models.

    1,917 default boxes of six maps; batch norm is folded into the convolutions; heads are 1x1. Offsets come out of the
    heads as (y, x, h, w) and are turned around in the forward; ``anchors`` (cy, cx, h, w) are part of the state dict.

    Args:
        image_size: side of the square images.
        width: factor on all channels.
    """

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    scores: Scores = "sigmoid"
    head_prefixes = ("box.", "cls.")
    anchors: Tensor

    def __init__(self, num_classes: int, image_size: int = 300, width: float = 0.75) -> None:
        super().__init__()
        plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        self.image_size, self.num_outputs = image_size, num_classes + 1
        channels, side = round(32 * width), image_size
        self.stem = _SameConv(3, channels, 3, 2, side)
        side = math.ceil(side / 2)
        blocks, maps = [], []
        for i, (out, stride) in enumerate(plan):
            out = round(out * width)
            block = {"dw": _SameConv(channels, channels, 3, stride, side, channels)}
            side, channels = math.ceil(side / stride), out
            blocks.append(nn.ModuleDict(block | {"pw": _SameConv(block["dw"].out_channels, out, 1, 1, side)}))
            if i in (10, 12):
                maps.append((out, side))
        self.blocks = nn.ModuleList(blocks)
        extras = []
        for out in (512, 256, 256, 128):
            out = round(out * width)
            reduce = _SameConv(channels, out // 2, 1, 1, side)
            extras.append(nn.ModuleDict({"reduce": reduce, "conv": _SameConv(out // 2, out, 3, 2, side)}))
            channels, side = out, math.ceil(side / 2)
            maps.append((out, side))
        self.extras = nn.ModuleList(extras)
        heads = _Heads([c for c, _ in maps], [3] + [6] * 5, self.num_outputs, 1)
        self.box, self.cls = heads.box, heads.cls
        boxes = grid_boxes([side for _, side in maps], _tensorflow_shapes(len(maps)))
        self.register_buffer("anchors", boxes[:, [1, 0, 3, 2]].contiguous())

    @property
    def default_boxes(self) -> Tensor:
        """Shape (boxes, 4), centre and size."""
        return self.anchors[:, [1, 0, 3, 2]]

    def forward(self, images: Tensor) -> Tensor:
        x, maps = self.stem(images), []
        for i, block in enumerate(self.blocks):
            x = block["pw"](block["dw"](x))  # type: ignore[index]
            if i in (10, 12):
                maps.append(x)
        for extra in self.extras:
            x = extra["conv"](extra["reduce"](x))  # type: ignore[index]
            maps.append(x)
        offsets = torch.cat([_rows(head(x), 4) for head, x in zip(self.box, maps, strict=True)], 1)
        logits = [_rows(head(x), self.num_outputs) for head, x in zip(self.cls, maps, strict=True)]
        turned = offsets.reshape(offsets.shape[0], -1, 2, 2).flip(3).flatten(2)
        return torch.cat([turned, torch.cat(logits, 1)], 2)


def _tensorflow_shapes(num_maps: int) -> list[list[tuple[float, float]]]:
    """(w, h) per map: scales 0.2 to 0.95; three shapes on the first map, six on the others."""
    scales = [0.2 + 0.75 * k / (num_maps - 1) for k in range(num_maps)] + [1.0]
    shapes = [[_shape(0.1, 1), _shape(0.2, 2), _shape(0.2, 0.5)]]
    for scale, following in pairwise(scales[1:]):
        ratios = [_shape(scale, ratio) for ratio in (1, 2, 0.5, 3, 1 / 3)]
        shapes.append([*ratios, _shape(math.sqrt(scale * following), 1)])
    return shapes


def _shape(scale: float, ratio: float) -> tuple[float, float]:
    return scale * math.sqrt(ratio), scale / math.sqrt(ratio)


Builder = Callable[..., nn.Module]
DETECTORS: dict[str, Builder] = {
    "small_ssd": SmallSSD,
    "ssd300_vgg16": ssd300_vgg16,
    "ssd300_vgg16_bn": lambda num_classes, **options: ssd300_vgg16(num_classes, batch_norm=True, **options),
    "ssdlite320_mobilenet_v3_large": ssdlite320_mobilenet_v3_large,
    "ssd300_mobilenet_v1": MobileNetSSD,
}


def torchvision_weights(name: str) -> str:
    """Address of torchvision's trained weights for a network. Their 90 classes are COCO's category numbers less 1.

    Raises:
        UserError: torchvision has none for this network; names those it has some for.
    """
    import torchvision.models.detection as zoo

    trained: dict[str, Any] = {
        "ssd300_vgg16": zoo.SSD300_VGG16_Weights.COCO_V1,
        "ssdlite320_mobilenet_v3_large": zoo.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1,
    }
    if name not in trained:
        raise UserError(
            f"torchvision has no trained weights for network {name}, only for {' and '.join(trained)}; "
            "set model.weights to a file, or leave it out"
        )
    return str(trained[name].url)


def build_detector(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """A detector by name, ``FILE.py:factory`` or ``module:factory``, with random weights.

    A factory takes the number of classes (without background) and ``options``, and returns a module that maps images
    (N, 3, H, W) to raw heads, with an attribute ``default_boxes`` (boxes, 4; centre and size as fractions). It may have
    ``image_size``, ``mean``, ``std``, ``scores`` and ``head_prefixes`` too (how the names of the tensors of the heads
    for boxes and for classes begin).

    Raises:
        UserError: no such network, it does not take these options, or it lacks ``default_boxes``.
    """
    builder = builder_of(name, options)
    try:
        model = builder(num_classes, **options)
    except TypeError as error:
        given = "these options" if options else "the number of classes, which is all that it is given"
        raise UserError(f"network {name} does not take {given}: {error}") from error
    boxes = getattr(model, "default_boxes", None)
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(
            f"{name}: a detector needs an attribute default_boxes, a tensor of shape (boxes, 4) with (cx, cy, w, h) as "
            "fractions of the image"
        )
    return model


def builder_of(name: str, options: dict[str, Any]) -> Builder:
    """What builds a detector, before any image is read; the file of one of a user's own is imported.

    Raises:
        UserError: there is none of this name, or it cannot be imported.
    """
    check_name(name)
    return DETECTORS.get(name.removeprefix("torchvision/")) or trust.factory(name, options)


def check_name(name: str) -> None:
    """See that there is a detector of this name; one of a user's own is not looked at.

    Raises:
        UserError: there is none; names those that there are.
    """
    if ":" not in name and name.removeprefix("torchvision/") not in DETECTORS:
        raise UserError(
            f"unknown network {name!r}; {known(sorted(DETECTORS), name)}. A network of your own is "
            "FILE.py:FACTORY beside the run file, or PACKAGE.MODULE:FACTORY; FACTORY(num_classes, **options) returns it"
        )
