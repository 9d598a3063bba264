"""Object detection: SSDs by name or of one's own, on digit scenes, YOLO, VOC or COCO data; multibox loss and mAP50.

A detector gives one tensor of raw heads (``ssd``); boxes, suppression and average precision come
after it, here. Targets are one tensor per batch, with as many rows for every image as the fullest one needs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.schema import Section
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.workloads import DIVERGENCE_SCORE, ClassCount, DataSummary, Split
from secateur.pipeline.workloads.data import decode
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.digit_scenes import DigitScenes
from secateur.pipeline.workloads.data.record import DataRecord, fingerprint_of, parts_of
from secateur.pipeline.workloads.data.scaling import Scaling
from secateur.pipeline.workloads.data.scenes import SceneSource
from secateur.pipeline.workloads.data.seeds import draw, seeded
from secateur.pipeline.workloads.data.sources import ImageSource
from secateur.pipeline.workloads.detection import boxes, networks, scenes, ssd
from secateur.pipeline.workloads.detection.suppression import Detections
from secateur.pipeline.workloads.weights import (
    TORCHVISION,
    choose_weights,
    download,
    find_weights,
    fit_weights,
    read_weights,
)
from secateur.pipeline.workloads.weights.files import describe
from secateur.pipeline.workloads.weights.tensors import plain

VERSION = 3
"""Part of the fingerprint; raise it when a change here changes images, targets or loss."""
DISTORTION = v2.RandomPhotometricDistort()
LOSSES_AT_ONCE = 64
"""Images whose losses are computed together, which bounds the memory of matching."""


class ModelOptions(Section):
    """The detector, and optionally its trained weights."""

    name: str = "small_ssd"
    """``small_ssd``, ``ssd300_vgg16``, ``ssd300_vgg16_bn``, ``ssdlite320_mobilenet_v3_large``, ``ssd300_mobilenet_v1``,
    or ``FILE.py:factory`` or ``module:factory`` of one's own."""
    weights: str | None = None
    """A .safetensors (or .pt / .pth state dict) file, or ``torchvision`` = its own, trained on COCO (classes: COCO's
    category numbers minus 1), for networks that have some; None = a baseline is trained by the ``baseline`` recipe."""
    load: Literal["all", "but_classes", "backbone"] = "all"
    """What of the weights: ``but_classes`` = not the heads of the classes, ``backbone`` = no heads. What is not loaded
    starts at random, and a baseline is trained from there."""
    weight_classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """For every class of the data its index among the weights' classes (from 0): only those heads are taken."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the network's builder."""


Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=16, le=4096)]
Deviation = Annotated[float, Field(gt=0, le=100)]


class InputOptions(Section):
    """How images are prepared."""

    image_size: Side | tuple[Side, Side] | None = None
    """Side of the square that images are resized to, or [height, width]; None = what the network says."""
    mean: tuple[Share, Share, Share] | None = None
    """Per channel, of pixels in 0..1; None = what the network says."""
    std: tuple[Deviation, Deviation, Deviation] | None = None
    """Per channel, of pixels in 0..1; None = what the network says."""
    augment: Literal["none", "ssd"] = "ssd"
    """ssd: Liu et al.'s photometric distortion, zoom out and crops that keep objects, on training images."""
    zoom_out: Annotated[float, Field(ge=1, le=100)] = 4.0
    """Largest canvas that ``ssd`` puts an image on, as a multiple of its sides; 1 = none."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How likely ``ssd`` mirrors an image; 0 where left and right matter, as in digits."""


class MetricOptions(Section):
    """How detections are made of raw heads, and judged."""

    curve: Literal["voc07", "area"] = "voc07"
    """voc07 = 11 points (PASCAL VOC 2007); area = under the whole curve (VOC 2010 and later)."""
    least_score: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Boxes with a smaller score are no detections."""
    nms_iou: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Suppression takes away boxes of the same class that overlap a better one by more (intersection over union)."""
    per_class: Annotated[int, Field(ge=1)] = 400
    """Boxes of a class that suppression looks at."""
    most: Annotated[int, Field(ge=1)] = 200
    """Detections of an image."""
    search: Literal["auto", "map50", "loss", "divergence"] = "auto"
    """What the search goes by: map50; ``loss_score`` = 1 / (1 + multibox loss); or ``divergence_score`` = exp(-KL),
    where KL is the mean divergence (nats) of a candidate's raw heads from the unpruned network's, on search images that
    are mirrored and recoloured, where ``augment`` is ssd. The last two spare the suppression of many boxes, and the
    report says how well candidates' ranks by them agree with their ranks by map50. auto = map50, and the divergence
    where pretrained weights know the search images by heart: where their map50 is higher on them than on altered ones
    by more than 3 percentage points."""


class Options(Section):
    """The ``workload`` section for object detection."""

    name: Literal["detection"] = "detection"
    model: ModelOptions = ModelOptions()
    data: scenes.SceneOptions = scenes.SceneOptions()
    input: InputOptions = InputOptions()
    metrics: MetricOptions = MetricOptions()


def build(options: Options, reading: Reading = Reading()) -> Detection:  # noqa: B008 - frozen
    """Open the data, fix the splits and check that the network fits.

    Args:
        reading: how thoroughly image files are looked at.

    Raises:
        UserError: data or weights are missing or do not fit; the network's output is not one tensor of raw heads.
    """
    return Detection(options, reading)


class Detection:
    """Detector, scenes, multibox loss and mean average precision."""

    metric = "map50"
    num_classes: int | None = None
    SEARCH: ClassVar[Mapping[str, str]] = {"loss": "loss_score", "divergence": DIVERGENCE_SCORE}

    def __init__(self, options: Options, reading: Reading) -> None:
        self.options = options
        self.search_metric = self.SEARCH.get(options.metrics.search, self.metric)
        self.search_metric_is_open = options.metrics.search == "auto"
        address = networks.torchvision_weights(options.model.name) if options.model.weights == TORCHVISION else None
        networks.builder_of(options.model.name, options.model.options)
        weights = None if address else find_weights(options.model.weights)
        self._content = None if weights is None else read_weights(weights)
        opened = scenes.load(options.data, reading)
        source = cast(ImageSource, opened.source)  # its images differ in size: only ``batch`` reads them
        self.train, self.search, self.test = (Split(source, i) for i in (opened.train, opened.search, opened.test))
        self.classes, self.notes = opened.source.classes, opened.source.notes
        used = np.concatenate([opened.train, opened.search, opened.test])
        self.most_boxes = max(len(opened.source.boxes(int(index))) for index in used)
        if address is not None:
            weights = download(address)
            self._content = read_weights(weights)
        self.pretrained = weights is not None and options.model.load == "all"
        with torch.random.fork_rng(devices=[]):
            network: Any = self.fresh_model()
            self.notes += self._load_weights(network)
        size = options.input.image_size or getattr(network, "image_size", None)
        if size is None:
            raise UserError(f"network {options.model.name} names no image_size; set workload.input.image_size")
        self.frame = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mean = _per_channel(options.input.mean, getattr(network, "mean", None))
        self.std = _per_channel(options.input.std, getattr(network, "std", None))
        self.scores: ssd.Scores = getattr(network, "scores", "softmax")
        self.default_boxes: Tensor = network.default_boxes.detach().clone()
        self.postprocessing = Detections(
            self.default_boxes, self.scores, options.metrics, self.classes, self.mean, self.std
        )
        self._check(network)
        content: dict[str, Any] = {
            "version": VERSION,
            "options": options.model_dump(mode="json", exclude={"data", "metrics"}),
            "data": opened.fingerprint,
            "weights": None if weights is None else sha256_of(weights),
            "decoder": decode.VERSION,
        }
        self.fingerprint = fingerprint_of(content)
        files = not isinstance(opened.source, DigitScenes)
        self.record = DataRecord(self.fingerprint, parts_of(content), opened.members, files)

    @property
    def search_augmented(self) -> bool:
        return self.search_metric == DIVERGENCE_SCORE

    def going_by(self, metric: str) -> Self:
        other = copy.copy(self)
        other.search_metric = metric
        return other

    @property
    def usage(self) -> Mapping[str, Any]:
        mean, std = (values.flatten().tolist() for values in (self.mean, self.std))
        said = decode.Fitting(self.frame, "stretch").usage
        prepared = {"image_size": said["image_size"], "mean": mean, "std": std, "resize": said["resize"]}
        return {**prepared, "classes": list(self.classes)}

    def summary(self) -> DataSummary:
        source = cast(SceneSource, self.train.source)
        counts = np.zeros((len(self.classes), 3), dtype=np.int64)
        for column, split in enumerate((self.train, self.search, self.test)):
            for index in split.indices:
                labels = source.boxes(int(index))[:, 4].astype(np.int64)
                counts[:, column] += np.bincount(labels, minlength=len(self.classes))
        rows = zip(self.classes, counts.tolist(), strict=True)
        return DataSummary(tuple(ClassCount(name, *row) for name, row in rows), "boxes", source.sizes)

    # -- the network -------------------------------------------------------------------------------------------------

    def fresh_model(self) -> nn.Module:
        model = self.options.model
        return networks.build_detector(model.name, len(self.classes), model.options).eval()

    def build_model(self) -> nn.Module:
        model = self.fresh_model()
        self._load_weights(model)
        return model.eval()

    def _load_weights(self, model: nn.Module) -> tuple[str, ...]:
        """Returns notes on what was read."""
        if self._content is None:
            return ()
        return _load(model, self._content, self.options.model, len(self.classes))

    def example_input(self) -> Tensor:
        return self.batch(self.train, torch.tensor([0]), train=False, generator=None, device=torch.device("cpu"))[0]

    def _check(self, network: nn.Module) -> None:
        expected = (1, len(self.default_boxes), 4 + len(self.classes) + 1)
        image = torch.zeros(1, 3, *self.frame)
        try:
            with torch.inference_mode():
                outputs = network.eval()(image)
        except RuntimeError as error:
            raise UserError(
                f"network {self.options.model.name} fails on images of {self.frame[0]}x{self.frame[1]} (height x "
                f"width): {error}"
            ) from error
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UserError(
                f"network {self.options.model.name} gives {found}, expected one tensor of shape {expected}: for each "
                "default box its offsets (x, y, w, h), then a logit for the background and for each class"
            )

    # -- images and targets ------------------------------------------------------------------------------------------

    def batch(
        self, split: Split, indices: Tensor, *, train: bool, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        seeds = draw(len(indices), generator) if train else None
        return self.prepare(*self.read(split, indices, seeds), seeds, device)

    def augmented(
        self, split: Split, indices: Tensor, *, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Mirrored and recoloured: zooming and crops, which make objects smaller or cut them, are harder to see."""
        mirroring = self._mirroring() if self.reads_anew else None
        if mirroring is None:
            return self.prepare(*self.read(split, indices), None, device)
        with seeded(int(draw(1, generator))):  # one seed for all
            return self.prepare(*self._read(split, indices, mirroring, None), None, device)

    @property
    def reads_anew(self) -> bool:
        return self.options.input.augment == "ssd"

    def read(self, split: Split, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        augment = self._augmentation() if seeds is not None and self.reads_anew else None
        return self._read(split, indices, augment, seeds)

    def prepare(
        self, images: Tensor, targets: Tensor, seeds: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        del seeds
        images, targets = (tensor.to(device, non_blocking=True) for tensor in (images, targets))
        return self._scaled(images.float() / 255).contiguous(memory_format=torch.channels_last), targets

    @cached_property
    def _scaled(self) -> Scaling:
        return Scaling(self.mean, self.std)

    def _read(
        self, split: Split, indices: Tensor, augment: v2.Compose | None, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Images of shape (n, 3, height, width), uint8, and target rows.

        Args:
            augment: None = images stay as they are.
            seeds: of each image; None = whatever is drawn goes on from where PyTorch's generator is.
        """
        where = split.indices[indices.numpy()]
        source = cast(SceneSource, split.source)
        pixels = torch.empty((len(where), 3, *self.frame), dtype=torch.uint8)
        targets = torch.full((len(where), self.most_boxes, 5), -1.0)
        for row, (index, picture) in enumerate(zip(where.tolist(), source.read(where), strict=True)):
            scene = _scene(picture, source.boxes(index), source.difficult(index))
            with contextlib.nullcontext() if seeds is None else seeded(int(seeds[row])):
                scene = augment(scene) if augment is not None else scene
                image = self._resized(scene["image"])
                pixels[row] = image if augment is None else DISTORTION(image)  # colours last: fewer pixels by then
            objects = _targets(scene)
            targets[row, : len(objects)] = objects
        return pixels, targets

    def _resized(self, image: Tensor) -> Tensor:
        """Shape (3, height, width), uint8."""
        return v2.functional.resize(image.as_subclass(Tensor), list(self.frame), antialias=True)  # type: ignore[no-any-return]

    def _augmentation(self) -> v2.Compose:
        """Liu et al. 2016, section 2.2, but for colours; what zooming out adds has the mean's colour."""
        fill = {tv_tensors.Image: (255 * self.mean.flatten()).round().int().tolist(), "others": 0}
        return v2.Compose(
            [
                v2.RandomZoomOut(fill=fill, side_range=(1.0, self.options.input.zoom_out)),
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(self.options.input.flip),
                v2.SanitizeBoundingBoxes(),
            ]
        )

    def _mirroring(self) -> v2.Compose:
        return v2.Compose([v2.RandomHorizontalFlip(self.options.input.flip)])

    # -- loss and metric ---------------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return self._losses(outputs, targets, label_smoothing).mean

    def distillation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """What ``fit`` adds for a teacher instead of the KL divergence of whole outputs; a scalar."""
        return ssd.distillation_loss(student, teacher, temperature, self.scores)

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Of the raw heads (``ssd.divergence``)."""
        return ssd.divergence(outputs, dense, self.scores)

    def answers(self, outputs: Tensor, targets: Tensor, *, brief: bool = False) -> Tensor:
        """Shape (N, 1 + most, 6): a row with the parts of the image's loss, then its detections (not if ``brief``)."""
        losses = self._in_parts(outputs, targets)
        parts = torch.stack([losses.boxes, losses.classes, losses.matched], 1)
        first = F.pad(parts, (0, 3))[:, None]
        return first if brief else torch.cat([first, self.postprocessing.apply(outputs).to(first)], 1)

    def metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        """``loss`` and ``loss_score`` of all answers of a split at once, and ``map50`` unless they are brief.

        Raises:
            UserError: no image has an object that is not difficult.
        """
        loss = _losses_in(answers).mean.item()
        found = {"loss": loss, "loss_score": 1 / (1 + loss)}
        if answers.shape[1] > 1:
            found["map50"] = boxes.average_precision(*judged(answers, targets), curve=self.options.metrics.curve).mean
        return found

    def test_metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Besides, COCO's ``map`` (mean over IoU 0.50:0.95) and ``map75``."""
        coco = boxes.coco_precision(*judged(answers, targets))
        return {**self.metrics(answers, targets), "map": coco.mean, "map75": coco.at75}

    def per_image(self, answers: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Which detections are right, image by image (``boxes.Matches``)."""
        return vars(boxes.matches(*judged(answers, targets)))

    def resampled(self, told: Mapping[str, Tensor], weights: Tensor) -> Tensor | None:
        """``map50`` of bootstrap samples, shape (draws,).

        Args:
            told: of ``per_image``.
            weights: how often each image is in a sample, shape (draws, images).
        """
        return boxes.resampled_precision(boxes.Matches(**told), weights, curve=self.options.metrics.curve)

    def ease(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self._in_parts(outputs, targets).per_image

    def bound(self, answers: Tensor, targets: Tensor, num_unseen: int) -> float:
        """1: images to come can raise the average precision of every class by any amount."""
        del answers, targets, num_unseen
        return 1.0

    def _losses(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> ssd.BoxLosses:
        return ssd.multibox_loss(outputs, targets, self.default_boxes.to(outputs.device), self.scores, label_smoothing)

    def _in_parts(self, outputs: Tensor, targets: Tensor) -> ssd.BoxLosses:
        pairs = zip(torch.split(outputs, LOSSES_AT_ONCE), torch.split(targets, LOSSES_AT_ONCE), strict=True)
        parts = [self._losses(*pair) for pair in pairs]
        return ssd.BoxLosses(
            torch.cat([p.boxes for p in parts]),
            torch.cat([p.classes for p in parts]),
            torch.cat([p.matched for p in parts]),
        )


def _losses_in(answers: Tensor) -> ssd.BoxLosses:
    """The losses that answers begin with."""
    return ssd.BoxLosses(*answers[:, 0, :3].unbind(1))


def judged(answers: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Detections, truths and which of these are difficult: one tensor an image, as ``boxes`` wants them."""
    found = [rows[rows[:, 5] >= 0] for rows in answers[:, 1:]]
    labels = ssd.classes_of(targets)
    used = labels >= 0
    truths = torch.cat([targets[..., :4], labels[..., None].to(targets.dtype)], 2)
    difficult = [rows[keep, 4] < -1.5 for rows, keep in zip(targets, used, strict=True)]
    return found, [rows[keep] for rows, keep in zip(truths, used, strict=True)], difficult


# -- scenes as tensors -------------------------------------------------------------------------------------------------


def _per_channel(wanted: Sequence[float] | None, usual: Sequence[float] | None) -> Tensor:
    """Shape (1, 3, 1, 1): what the run file says, else what the network says, else 0.5."""
    return torch.tensor(tuple(wanted or usual or (0.5, 0.5, 0.5))).view(1, -1, 1, 1)


def _scene(picture: np.ndarray, rows: np.ndarray, difficult: np.ndarray) -> dict[str, Any]:
    """A sample as torchvision's transforms know it; difficult objects of class c are labelled ``-2 - c``."""
    image = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1))
    objects = torch.from_numpy(np.asarray(rows, dtype=np.float32).reshape(-1, 5))
    hard = torch.from_numpy(np.asarray(difficult, dtype=bool).reshape(-1))
    labels = objects[:, 4].round().long()
    canvas: Any = tuple(image.shape[-2:])
    corners = tv_tensors.BoundingBoxes(objects[:, :4].clone(), format="XYXY", canvas_size=canvas)
    return {"image": image, "boxes": corners, "labels": torch.where(hard, -2 - labels, labels)}


def _targets(scene: Mapping[str, Any]) -> Tensor:
    """Target rows of a sample, shape (objects, 5)."""
    high, wide = scene["image"].shape[-2:]
    corners = scene["boxes"].as_subclass(Tensor) / torch.tensor([wide, high, wide, high])
    return torch.cat([corners.clamp(0, 1), scene["labels"][:, None].float()], 1)


# -- weights -----------------------------------------------------------------------------------------------------------


def _load(model: nn.Module, content: Mapping[str, Any], options: ModelOptions, num_classes: int) -> tuple[str, ...]:
    """Put what a weights file holds, or the part of it that the options name, into a network.

    Returns:
        Notes on the choice.

    Raises:
        UserError: it does not fit.
    """
    own = model.state_dict()
    prefixes: tuple[str, str] | None = getattr(model, "head_prefixes", None)
    if prefixes is None and (options.load != "all" or options.weight_classes is not None):
        raise UserError(
            f"network {options.name} does not say which tensors its heads are: give it an attribute head_prefixes, "
            "the beginnings of the names of the heads for boxes and for classes"
        )
    box_heads, class_heads = prefixes or ("\0", "\0")
    parts: Mapping[str, tuple[str, ...]] = {"but_classes": (class_heads,), "backbone": (box_heads, class_heads)}
    left_out = parts.get(options.load, ())
    chosen, notes = choose_weights(content, own, options.weights, left_out)
    state = chosen.tensors
    if options.weight_classes is not None and options.load == "all":
        state = _chosen_classes(state, own, class_heads, options.weight_classes, num_classes)
    loaded = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
    loaded |= {name: tensor for name, tensor in own.items() if name.startswith(left_out)}
    other = [n for n in own if n.startswith(class_heads) and n in loaded and loaded[n].shape != own[n].shape]
    if other:
        raise UserError(
            f"the class heads of {options.weights} are for other classes than the {num_classes} of the data "
            f"({other[0]}: {tuple(loaded[other[0]].shape)} in the file, {tuple(own[other[0]].shape)} in the network); "
            "set model.load: but_classes to train new ones, or model.weight_classes to take some of the file's"
        )
    fit_weights(model, loaded, options.weights, options.name, held=describe(content))
    return notes


def _chosen_classes(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str, chosen: Sequence[int], num_classes: int
) -> dict[str, Tensor]:
    """The state with only the background and the chosen classes in the class heads; rows are (per cell, class)."""
    if len(chosen) != num_classes:
        raise UserError(f"model.weight_classes names {number_of(len(chosen), 'class(es)')}, the data has {num_classes}")
    result = dict(state)
    for name in own:
        if not name.startswith(prefix) or name not in state or state[name].shape == own[name].shape:
            continue
        per_cell = len(own[name]) // (num_classes + 1)
        present = len(state[name]) // per_cell
        if len(state[name]) % per_cell or max(chosen) + 1 >= present:
            raise UserError(
                f"model.weight_classes: the file has {number_of(present - 1, 'class(es)')}, from 0; asked for "
                f"{max(chosen)}"
            )
        rows = plain(state[name]).reshape(per_cell, present, *state[name].shape[1:])
        result[name] = rows[:, [0, *(c + 1 for c in chosen)]].flatten(0, 1)
    return result
