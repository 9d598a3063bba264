"""Image classification: a classifier by name or of one's own, on digits, torchvision data, folders, tables, arrays."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from secateur.device_profiles.wording import number_of
from secateur.pipeline.config import renamed
from secateur.pipeline.config.schema import Section, digested
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.workloads import DIVERGENCE_SCORE, ClassCount, DataSummary, Split, networks
from secateur.pipeline.workloads.classification.accuracies import ACCURACIES, best_balanced, top5
from secateur.pipeline.workloads.classification.augmentation import SHIFTS, Augment, ByImage, Shifts, are_photographs
from secateur.pipeline.workloads.classification.losses import distillation_loss
from secateur.pipeline.workloads.data import decode, formats, paths, record, splits
from secateur.pipeline.workloads.data.content import Damaged, Reading, kept
from secateur.pipeline.workloads.data.notes import Tally
from secateur.pipeline.workloads.data.scaling import Scaling
from secateur.pipeline.workloads.data.seeds import draw
from secateur.pipeline.workloads.data.sources import ArraySource, ImageData, Wanted
from secateur.pipeline.workloads.networks import timm_zoo, torchvision_zoo
from secateur.pipeline.workloads.networks.preparation import Preparation
from secateur.pipeline.workloads.weights import (
    TIMM,
    TORCHVISION,
    choose_weights,
    download,
    find_weights,
    fit_weights,
    read_weights,
)
from secateur.pipeline.workloads.weights.files import describe

SEARCH_FRACTION = 0.1
"""Share of the training images that is held out for the search, where the run file says none."""


class ModelOptions(Section):
    """The network, and optionally its trained weights."""

    later = frozenset({"load"})
    name: str = "cifar/resnet20"
    """A network by name (``cifar/resnet56``, ``mlp``, ``torchvision/NAME``, ``timm/NAME``), or a builder of one's own,
    ``FILE.py:FACTORY`` or ``PACKAGE.MODULE:FACTORY``."""
    weights: str | None = None
    """A .safetensors (or .pt / .pth state dict) file; ``torchvision`` = its own best for its classifiers, trained on
    ImageNet's 1000 classes; ``timm`` = its own, where they are on this machine already; None = a baseline is trained by
    the ``baseline`` recipe."""
    load: Literal["all", "but_classes"] = "all"
    """What of the weights: ``but_classes`` = everything but the last layer, which starts at random for the classes of
    the data; a baseline is trained from there."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the network's builder."""

    @field_validator("name")
    @classmethod
    def _newest(cls, name: str) -> str:
        return renamed.newest(networks.PLACE, name)

    @model_validator(mode="after")
    def _has_weights(self) -> ModelOptions:
        if self.load != "all" and self.weights is None:
            raise ValueError("load says what of the weights is taken: set weights too")
        return self


Side = Annotated[int, Field(ge=4, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
OF_EVERY_SOURCE = frozenset(
    (
        *("source", "image_size", "channels", "mean", "std", "search_fraction", "test_fraction"),
        *("augment", "crop_scale", "flip", "trivial_augment", "random_erasing"),
    )
)
"""Keys of ``data`` that every source has."""


class DataOptions(Section):
    """Where the images come from and how they are prepared."""

    later = frozenset({"columns", "options", "crop_scale", "flip", "trivial_augment", "random_erasing"})
    source: str = "digits"
    """``folder``, ``arrays``, ``csv``, ``parquet``, ``torchvision`` or ``digits``: a format of ``workloads/data``; or
    ``auto`` = what the path looks like, which is the default where there is one."""
    dataset: str | None = None
    """torchvision: class name in torchvision.datasets (CIFAR10)."""
    path: str | None = None
    """The folder or file of the images; torchvision: where its files are or go."""
    options: dict[str, Any] = Field(default_factory=dict)
    """torchvision: further arguments of the data set's class (``small`` of Places365, ``split`` of EMNIST)."""
    columns: dict[Literal["path", "label", "split"], str] | None = None
    """csv: what the columns are called, where not ``path``, ``label`` and ``split``."""
    download: bool = True
    """torchvision: whether missing files are fetched."""
    train: str | None = None
    """arrays: .npz, or the common stem of STEM_images.npy and STEM_labels.npy."""
    test: str | None = None
    """arrays: the same for the test images; None = they are split off the training images."""
    classes: tuple[str, ...] | None = None
    """Names of all classes in the order of their indices: of the folders, or of the labels from 0; None = the folders'
    names, sorted, or those that the data set has."""
    damaged: Damaged = "refuse"
    """What is done about images that cannot be decoded: ``refuse`` = the run does not begin; ``leave_out`` = they are
    left out, counted and named."""
    image_size: Side | tuple[Side, Side] | None = None
    """Of the images as the network sees them, in pixels: a square's side, or [height, width]; None = as stored for
    arrays, and for files what the network was made for (timm, torchvision's weights), else 224."""
    channels: Literal[1, 3] | None = None
    """Of the images; None = as stored for arrays, RGB for files."""
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    """Per channel, of pixels in 0..1; None = the zoo's (timm, torchvision's weights), else measured on the training
    images."""
    std: tuple[Annotated[float, Field(gt=0, le=100)], ...] | None = None
    """Per channel, of pixels in 0..1; None = the zoo's (timm, torchvision's weights), else measured on the training
    images."""
    augment: Literal["auto"] | Augment = "auto"
    """How training images are moved and cut. shift: random shifts of up to an eighth of the side; flip_shift: mirrored
    too; random_resized_crop: a random part of the image, scaled to ``image_size`` and mirrored, as photographs are
    usually trained on; none: images are as they are judged. auto = random_resized_crop where images are files that
    differ in size and are not tiny, else none."""
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    """random_resized_crop: smallest and largest share of an image's area that is cut out."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How likely flip_shift and random_resized_crop mirror an image; 0 where left and right matter, as in text."""
    trivial_augment: bool = False
    """Whether every training image undergoes one of TrivialAugment's changes of colour or geometry besides."""
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How likely a rectangle of a training image is painted over with the mean colour."""
    search_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """About which share of the training images is held out for the search; None = the data's own validation split
    where it has one besides the test split, else 0.1."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Where the data has no test split: about which share of all images becomes one."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_path(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("source") is None:
            return {**given, "source": formats.source_of(given, listed="arrays")}
        return given

    @model_validator(mode="after")
    def _complete(self) -> DataOptions:
        fields = type(self).model_fields.items()
        given = [n for n, field in fields if getattr(self, n) != field.get_default(call_default_factory=True)]
        fault = formats.faults_of(formats.IMAGES, self.source, given, OF_EVERY_SOURCE)
        if fault:
            raise ValueError(fault)
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes needs at least two names, and each only once")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError("crop_scale is [smallest, largest] share of the area; exchange the two")
        return self


class MetricOptions(Section):
    """How classifiers are compared in a search."""

    search: Literal["auto", "top1", "divergence", "loss"] = "auto"
    """What the search goes by: top1; ``divergence_score`` = exp(-KL), where KL is the mean divergence (nats) of a
    candidate's class probabilities from the unpruned network's; or ``loss_score`` = exp(-cross-entropy). The last two
    look at augmented search images, the same for all candidates, so that they still see where weights know the search
    images by heart. auto = top1, and the divergence where pretrained weights do: where they are more accurate on them
    than on augmented ones by more than 3 percentage points."""


class Options(Section):
    """The ``workload`` section for image classification."""

    name: Literal["classification"] = "classification"
    later = frozenset({"metric"})
    metric: Literal["top1", "top5", "balanced_accuracy"] | None = None
    """What the gate judges accuracy by, and the search, where ``metrics.search`` says nothing else; None = top1.
    ``balanced_accuracy`` is the mean share of right answers over the classes, for data whose classes differ in size."""
    metrics: MetricOptions = MetricOptions()
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()


def build(options: Options, reading: Reading = Reading()) -> Classification:  # noqa: B008 - frozen
    """Open the data and fix the splits.

    Args:
        reading: how thoroughly image files are looked at.

    Raises:
        UserError: data or weights are missing or do not fit.
    """
    return Classification(options, reading)


class Classification:
    """Classifier, images, cross-entropy and top-1."""

    metric = search_metric = "top1"
    postprocessing = None
    SEEING: ClassVar[Mapping[str, str]] = {"divergence": DIVERGENCE_SCORE, "loss": "loss_score"}

    def __init__(self, options: Options, reading: Reading) -> None:
        data, seen = _resolved(options.data)
        self.options = options = options.model_copy(update={"data": data})
        self.choose_metrics()
        self.search_metric_is_open = options.metrics.search == "auto"
        self.network = networks.named(options.model.name)
        if reading.check != "none":  # else a file is judged, which needs no code of the network
            self.network.check(options.model.options)
        weights = self._weights_here()
        self._content = None if weights is None else read_weights(weights)
        prepared = self.network.preparation(options.model.weights)
        opened: ImageData = formats.IMAGES.load(data.source).load_images(data, _wanted(data, prepared), reading)
        self.classes, self.named = opened.classes, opened.named
        self.train, self.search, self.test = _split(opened, options.data, told=bool(seen))
        self._data_notes = (*([_said(seen, opened, data)] if seen else []), *opened.tally.notes())
        self.num_classes = len(opened.classes)
        sample = opened.train.read(self.train.indices[:1])
        self.shape = (sample.shape[3], sample.shape[1], sample.shape[2])
        self.fitting = opened.fitting or decode.Fitting(self.shape[1:], "stretch")
        self.augment = self._resolved_augment()
        parts = {"train": self.train, "search": self.search, "test": self.test}
        members = tuple(
            member
            for name, split in parts.items()
            for member in record.members_of({name: split.indices}, split.source.places, split.source.contents)
        )
        content_digest = _data_digest(parts, opened.classes, members)
        self.mean, self.std = self._statistics(content_digest, prepared)
        self.pretrained = options.model.weights is not None and options.model.load == "all"
        self._check_classes()
        if options.model.weights == TORCHVISION:
            weights = download(torchvision_zoo.weights_address(self.network.name))
            read_weights(weights)
            self._content = torchvision_zoo.read(self.network.name, weights)
        content: dict[str, Any] = {"options": _told(options, self.augment)}
        content |= {"data": content_digest, "weights": None if weights is None else sha256_of(weights)}
        content |= {"decoder": decode.VERSION}
        content |= {} if prepared is None else {"preparation": prepared.facts()}
        self.fingerprint = record.fingerprint_of(content)
        told = {
            key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
            for key, value in content.items()
        }
        files = not isinstance(opened.train, ArraySource)
        self.record = record.DataRecord(self.fingerprint, told, members, files)

    @property
    def search_augmented(self) -> bool:
        return self.search_metric in self.SEEING.values()

    def going_by(self, metric: str) -> Self:
        other = copy.copy(self)
        other.search_metric = metric
        return other

    @property
    def usage(self) -> Mapping[str, Any]:
        mean, std = ((values.flatten() / 255).tolist() for values in (self.mean, self.std))
        said = self.fitting.usage
        prepared = {"image_size": said.pop("image_size"), "mean": mean, "std": std, **said}
        return {**prepared, "classes": list(self.classes)} if self.named else prepared

    @cached_property
    def notes(self) -> tuple[str, ...]:
        if self._content is None or (self.options.model.weights == TORCHVISION and self.pretrained):
            return (*self._data_notes, *self._probabilities())
        with torch.random.fork_rng(devices=[]):
            return (*self._data_notes, *self._load_weights(self.fresh_model()), *self._probabilities())

    def summary(self) -> DataSummary:
        counts = [
            np.bincount(split.source.labels[split.indices], minlength=self.num_classes)
            for split in (self.train, self.search, self.test)
        ]
        classes = tuple(ClassCount(name, *(int(c[i]) for c in counts)) for i, name in enumerate(self.classes))
        sources = {id(split.source): split.source for split in (self.train, self.search, self.test)}
        sizes = sum((Counter(source.sizes) for source in sources.values()), Counter())
        return DataSummary(classes, "images", sizes)

    def fresh_model(self) -> nn.Module:
        return self._built(self.num_classes).eval()

    def _built(self, num_classes: int) -> nn.Module:
        model = self.options.model
        return networks.build_network(model.name, num_classes, self.shape, model.options)

    def build_model(self) -> nn.Module:
        model = self.fresh_model()
        self._load_weights(model)
        if ":" in self.options.model.name:
            self._check(model)
        return model.eval()

    def _check(self, model: nn.Module) -> None:
        """See that a network of the user's own gives a logit for each class; that it runs at all is checked elsewhere.

        Raises:
            UserError: it gives something else.
        """
        try:
            with torch.no_grad():
                outputs = model(self.example_input())
        except Exception:  # noqa: BLE001 - told where it is checked
            return
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != (1, self.num_classes):
            found, fix = (
                f"a {type(outputs).__name__}",
                "return the classes' logits alone; several outputs are for a task",
            )
            fix = f"{fix} of your own (docs/how-to/custom-task.md)"
            if isinstance(outputs, Tensor):
                found, fix = f"shape {tuple(outputs.shape)}", "pass num_classes on to its last layer"
            raise UserError(
                f"network {self.options.model.name} gives {found} for one image; expected a tensor of shape "
                f"(1, {self.num_classes}), a logit for each class: {fix}"
            )

    def _probabilities(self) -> tuple[str, ...]:
        """A note where a network of the user's own gives probabilities in place of logits."""
        if ":" not in self.options.model.name:
            return ()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                outputs = self.fresh_model()(self.example_input()).double()
                ones = outputs.sum(1) - 1
            except Exception:  # noqa: BLE001 - whatever is wrong with it is told where the network is used
                return ()
        if self.num_classes < 2 or outputs.min() < 0 or ones.abs().max() > 1e-4:
            return ()
        return (
            f"network {self.options.model.name} gives probabilities, as after a softmax, and its loss is computed from "
            "logits: it learns badly; leave the softmax out, which changes no answer",
        )

    def _weights_here(self) -> Path | None:
        """The file of ``model.weights``, before any image is read; None = there are to be none, or torchvision's, which
        may have to be downloaded.

        Raises:
            UserError: there is none for this network.
        """
        wanted, zoo, model = self.options.model.weights, self.network.zoo, self.network.name
        if wanted == TIMM or (wanted == TORCHVISION and zoo == "timm"):
            if zoo != wanted:
                raise UserError(
                    f"model.weights: {wanted} are for networks of {wanted}; {self.options.model.name} is none"
                )
            return timm_zoo.find_weights(model)
        if wanted == TORCHVISION:
            torchvision_zoo.weights_address(model)
            return None
        return find_weights(wanted)

    def _check_classes(self) -> None:
        """See that a zoo's weights are for as many classes as the data has, or that their last layer is left out.

        Raises:
            UserError: they are not.
        """
        whose = self.options.model.weights
        if whose not in (TIMM, TORCHVISION) or self.options.model.load != "all":
            return
        zoo = timm_zoo if whose == TIMM else torchvision_zoo
        trained = zoo.classes_of_weights(self.network.name)
        if trained != self.num_classes:
            raise UserError(
                f"{whose}'s weights for {self.network.name} know {number_of(trained, 'class(es)')}, the data has "
                f"{self.num_classes}; "
                "set model.load: but_classes to train a new last layer on the rest of them, set model.weights to a "
                "file, or leave it out to train a baseline"
            )

    def _load_weights(self, model: nn.Module) -> tuple[str, ...]:
        """Put the weights, or what is wanted of them, into a network; notes on what was read.

        Raises:
            UserError: they do not fit.
        """
        if self._content is None:
            return ()
        own, weights, held = model.state_dict(), self.options.model.weights, describe(self._content)
        if self.options.model.load == "all":
            chosen, notes = choose_weights(self._content, own, weights)
            fit_weights(model, chosen.tensors, weights, self.options.model.name, held=held, classes=self.classes)
            return notes
        heads = networks.class_tensors(self._built, self.num_classes)
        chosen, notes = choose_weights(self._content, own, weights, heads)
        loaded = {name: tensor for name, tensor in chosen.tensors.items() if name not in heads}
        fit_weights(model, loaded | {name: own[name] for name in heads}, weights, self.options.model.name, held=held)
        there = [f"{name} {tuple(chosen.tensors[name].shape)}" for name in heads if name in chosen.tensors]
        left = f"; the file's {' and '.join(there)} were left out" if there else ""
        return (
            *notes,
            f"weights {weights}: {' and '.join(heads)} start at random for "
            f"{number_of(self.num_classes, 'class(es)')}{left}",
        )

    def example_input(self) -> Tensor:
        return self.batch(self.train, torch.tensor([0]), train=False, generator=None, device=torch.device("cpu"))[0]

    def batch(
        self, split: Split, indices: Tensor, *, train: bool, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        seeds = draw(len(indices), generator) if train else None
        return self.prepare(*self.read(split, indices, seeds), seeds, device)

    def augmented(
        self, split: Split, indices: Tensor, *, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Shifted and mirrored where training images are moved or cut: what a crop leaves of an image is harder."""
        x, targets = self.prepare(*self.read(split, indices), None, device)
        if self.augment != "none":
            shifts = Shifts.drawn(len(x), self.shape[1:], self._flip, generator)
            x = shifts(x.permute(0, 2, 3, 1), x.new_zeros(self.shape[0])).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=torch.channels_last), targets

    @property
    def reads_anew(self) -> bool:
        return self._by_image.does_anything

    def read(self, split: Split, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        where = split.indices[indices.numpy()]
        targets = torch.from_numpy(split.source.labels[where])
        if seeds is not None and self.reads_anew:
            return torch.from_numpy(self._by_image.read(split, where.tolist(), seeds.tolist())), targets
        return torch.from_numpy(np.ascontiguousarray(split.source.read(where))), targets

    def prepare(
        self, images: Tensor, targets: Tensor, seeds: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        pixels = images.to(device, non_blocking=True)
        if seeds is not None and self.augment in SHIFTS:
            pixels = Shifts.of(seeds, self.shape[1:], self._flip)(pixels, self._scaled.colour(device))
        x = self._scaled(pixels.permute(0, 3, 1, 2))  # NHWC memory seen as NCHW = channels-last
        return x.contiguous(memory_format=torch.channels_last), targets.to(device, non_blocking=True)

    def _resolved_augment(self) -> Augment:
        """``augment``, its ``auto`` resolved."""
        wanted = self.options.data.augment
        if wanted != "auto":
            return wanted
        return "random_resized_crop" if are_photographs(self.train) else "none"

    @property
    def _flip(self) -> float:
        return 0.0 if self.augment in ("none", "shift") else self.options.data.flip

    @cached_property
    def _scaled(self) -> Scaling:
        return Scaling(self.mean, self.std)

    @cached_property
    def _by_image(self) -> ByImage:
        data = self.options.data
        scale = data.crop_scale if self.augment == "random_resized_crop" else None
        colour = self.mean.flatten().tolist()
        return ByImage(self.fitting, scale, self._flip, data.trivial_augment, data.random_erasing, colour)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def distillation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return distillation_loss(student, teacher, temperature)

    def answers(self, outputs: Tensor, targets: Tensor, *, brief: bool = False) -> Tensor:
        """The logits."""
        del targets, brief
        return outputs

    def choose_metrics(self) -> None:
        """Take the metrics that the run file names in place of the usual ones."""
        if self.options.metric is not None:
            self.metric = self.search_metric = self.options.metric
        self.search_metric = self.SEEING.get(self.options.metrics.search, self.search_metric)

    def metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        loss = F.cross_entropy(answers.float(), targets).item()
        found = {"top1": (answers.argmax(1) == targets).float().mean().item(), "loss": loss}
        if self.metric in ACCURACIES:
            found[self.metric] = ACCURACIES[self.metric](answers, targets)
        return {**found, "loss_score": math.exp(-loss)} if self.search_metric == "loss_score" else found

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Kullback-Leibler divergence KL(dense || candidate) of class probabilities."""
        found, wanted = (logits.double().log_softmax(1) for logits in (outputs, dense))
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(1).clamp(min=0)

    def test_metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Besides, ``balanced_accuracy``, and ``top5`` where there are more than five classes."""
        names = [name for name in ACCURACIES if name != "top5" or self.num_classes > 5]
        return {**self.metrics(answers, targets), **{name: ACCURACIES[name](answers, targets) for name in names}}

    def per_image(self, answers: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """The class that each image has, and the one that is found; shape (n,)."""
        return {"target": targets, "found": answers.argmax(1)}

    def resampled(self, told: Mapping[str, Tensor], weights: Tensor) -> Tensor | None:
        """``top1`` of bootstrap samples, shape (draws,); None for another metric.

        Args:
            told: of ``per_image``.
            weights: how often each image is in a sample, shape (draws, images).
        """
        if self.metric != "top1":
            return None
        return weights.double() @ (told["found"] == told["target"]).double() / weights.shape[1]

    def ease(self, outputs: Tensor, targets: Tensor) -> Tensor:
        own = outputs.gather(1, targets[:, None])[:, 0]
        return own - outputs.scatter(1, targets[:, None], -torch.inf).amax(1)

    def bound(self, answers: Tensor, targets: Tensor, num_unseen: int) -> float:
        if self.search_metric in self.SEEING.values():
            return 1.0  # no image sets a bound to the mean of others
        if self.search_metric == "balanced_accuracy":
            return best_balanced(answers, targets, num_unseen)
        if self.search_metric == "top5":
            return (round(top5(answers, targets) * len(targets)) + num_unseen) / (len(targets) + num_unseen)
        right = int((answers.argmax(1) == targets).sum())
        return (right + num_unseen) / (len(targets) + num_unseen)

    def _statistics(self, data: str, prepared: Preparation | None) -> tuple[Tensor, Tensor]:
        """Mean and deviation per channel in pixel units, shape (1, channels, 1, 1).

        Args:
            data: names the images and splits; what was measured on them once is remembered.
            prepared: what the network's zoo says.
        """
        options = self.options.data
        mean, std = options.mean, options.std
        if prepared is not None and self.shape[0] == len(prepared.mean):
            mean, std = mean or prepared.mean, std or prepared.std
        if mean is None or std is None:
            key = f"statistics {data} {self.shape} {decode.VERSION}"
            measured = kept(key, self._measured)
            mean, std = mean or tuple(measured["mean"]), std or tuple(measured["std"])
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.shape[0]:
                raise UserError(
                    f"data.{name} has {number_of(len(values), 'value(s)')}, the images have "
                    f"{number_of(self.shape[0], 'channel(s)')}"
                )
        return (255 * torch.tensor(mean)).view(1, -1, 1, 1), (255 * torch.tensor(std)).view(1, -1, 1, 1)

    def _measured(self) -> dict[str, list[float]]:
        pixels = self.train.source.read(self.train.indices[:5000]).astype(np.float32) / 255
        deviation = np.maximum(pixels.std((0, 1, 2)), 1e-3)
        return {"mean": pixels.mean((0, 1, 2)).tolist(), "std": deviation.tolist()}


def _wanted(data: DataOptions, prepared: Preparation | None) -> Wanted:
    """How images shall come out."""
    size = (data.image_size, data.image_size) if isinstance(data.image_size, int) else data.image_size
    return Wanted(size, data.channels, *([] if prepared is None else [prepared.fitting]))


def _told(options: Options, augment: Augment) -> dict[str, Any]:
    """What the fingerprint says of the options: not where files are, and networks by the names they first had."""
    content = {key: value for key, value in digested(options).items() if key not in ("metric", "metrics")}
    content["model"]["name"] = renamed.first(networks.PLACE, options.model.name)
    content["data"] = {k: v for k, v in content["data"].items() if k not in ("path", "train", "test", "download")}
    content["data"]["augment"] = augment
    return content


def _resolved(data: DataOptions) -> tuple[DataOptions, str]:
    """(the section with the source that its path looks like, what was seen; nothing where the run file says it).

    Raises:
        UserError: it looks like none, or like several.
    """
    if data.source != formats.AUTO:
        return data, ""
    assert data.path is not None
    path = paths.find(data.path, "data")
    source, seen = formats.detect(formats.IMAGES, path)
    module = formats.IMAGES.load(source)
    where = module.found_in(path) | {"path": None} if hasattr(module, "found_in") else {}
    section = {**data.model_dump(exclude_unset=True), "source": source, **where}
    try:
        return DataOptions.model_validate(section), seen
    except ValidationError as error:
        raise UserError(f"{path} looks like {seen}: {formats.told(error)}") from error


def _said(seen: str, opened: ImageData, data: DataOptions) -> str:
    """What was found, in one line."""
    sources = [opened.train, *(source for source in (opened.search, opened.test) if source is not None)]
    total = sum(map(len, sources))
    test = (
        f"{number_of(len(opened.test), 'image(s)')} of its own"
        if opened.test is not None
        else f"carved: {data.test_fraction:.0%}"
    )
    return (
        f"{seen}: {number_of(len(opened.classes), 'class(es)')}, {number_of(total, 'image(s)')}, test split {test}"
    ).replace("%", " %")


def _split(opened: ImageData, data: DataOptions, *, told: bool) -> tuple[Split, Split, Split]:
    """(train, search, test): the data's own, and what is missing drawn from the training images by their content.

    Args:
        told: whether it is said already where the test split is from.

    Raises:
        UserError: a split would be empty.
    """
    tally, train = opened.tally, opened.train
    own_search = opened.search if opened.test is not None and data.search_fraction is None else None
    if opened.search is not None and own_search is None:
        tally.add(
            "image(s) of the validation split was|were not used, as search_fraction is set", *opened.search.places
        )
    shares = splits.shares_of(
        None if opened.test is not None else data.test_fraction,
        None if own_search is not None else data.search_fraction or SEARCH_FRACTION,
    )
    if opened.test is None and not told:
        tally.say(f"the data has no test split: about {data.test_fraction:.0%} of it, drawn by content, becomes one")
    classes = [(label,) for label in train.labels.tolist()]
    drawn = splits.draw(train.contents, classes, shares, opened.classes, tally)
    found = {name: Split(train, indices) for name, indices in drawn.items()}
    given = {"search": own_search, "test": opened.test}
    found |= {name: Split(source, splits.in_order(source.contents)) for name, source in given.items() if source}
    _note_equal(found, tally)
    splits.note_conflicts(train.contents, train.labels, opened.classes, train.places, tally)
    for name, split in found.items():
        if not len(split):
            raise UserError(
                f"no images for the {name} split: {number_of(len(train), 'image(s)')} in "
                f"{number_of(len(opened.classes), 'class(es)')} are too few "
                "to be split. Give at least three different images of each class, or a test split of its own"
            )
    return found["train"], found["search"], found["test"]


def _note_equal(parts: Mapping[str, Split], tally: Tally) -> None:
    """Count images of one split that are in another, where the splits come from different sources."""
    contents: list[bytes] = []
    places: list[str] = []
    indices: dict[str, range] = {}
    for name, split in parts.items():
        start = len(contents)
        contents += [split.source.contents[i] for i in split.indices]
        places += [split.source.places[i] for i in split.indices]
        indices[name] = range(start, len(contents))
    splits.note_repeats(contents, indices, places, tally)


def _data_digest(parts: Mapping[str, Split], classes: Sequence[str], members: Sequence[record.Member]) -> str:
    """Names images, labels and splits."""
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    digest.update(record.digest_of(members).encode())
    for split in parts.values():
        digest.update(split.source.labels[split.indices].tobytes())
    return digest.hexdigest()[:16]
