"""Image classification: any torchvision classifier or CIFAR ResNet on digits, torchvision data, folders or arrays."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.pipeline.config.faults import known
from secateur.pipeline.config.schema import Section
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.workloads import ClassCount, DataSummary, Split
from secateur.pipeline.workloads.classification.losses import distillation_loss
from secateur.pipeline.workloads.classification.networks import build_network
from secateur.pipeline.workloads.data import arrays, decode, digits, folder, record, splits, torchvision_sets
from secateur.pipeline.workloads.data.content import Damaged, Reading, kept
from secateur.pipeline.workloads.data.notes import Tally
from secateur.pipeline.workloads.data.paths import under_data
from secateur.pipeline.workloads.data.sources import ArraySource, ImageData
from secateur.pipeline.workloads.weights import (
    TORCHVISION,
    choose_weights,
    find_weights,
    fit_weights,
    read_weights,
)
from secateur.pipeline.workloads.weights.files import describe

SEARCH_FRACTION = 0.1
"""Share of the training images that is held out for the search, where the run file says none."""


class ModelOptions(Section):
    """The network, and optionally its trained weights."""

    name: str = "cifar_resnet20"
    weights: str | None = None
    """A .safetensors (or .pt / .pth state dict) file, or ``torchvision`` = its own best for its classifiers, trained on
    ImageNet's 1000 classes; None = a baseline is trained by the ``baseline`` recipe."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the network's builder."""


class DataOptions(Section):
    """Where the images come from and how they are prepared."""

    source: Literal["digits", "torchvision", "folder", "arrays"] = "digits"
    dataset: str | None = None
    """torchvision: class name in torchvision.datasets (CIFAR10)."""
    path: str | None = None
    """torchvision: where its files are or go; folder: the folder that holds train/ and test/."""
    download: bool = True
    train: str | None = None
    """arrays: .npz, or the common stem of STEM_images.npy and STEM_labels.npy."""
    test: str | None = None
    classes: tuple[str, ...] | None = None
    """Names of all classes in the order of their indices: of the folders, or of the labels from 0; None = the folders'
    names, sorted, or those that the data set has."""
    damaged: Damaged = "refuse"
    """What is done about images that cannot be decoded: ``refuse`` = the run does not begin; ``leave_out`` = they are
    left out, counted and named."""
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    channels: Literal[1, 3] | None = None
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    """Per channel, of pixels in 0..1; None = measured on the training images."""
    std: tuple[Annotated[float, Field(gt=0, le=100)], ...] | None = None
    augment: Literal["none", "shift", "flip_shift"] = "none"
    """shift: random shifts of up to an eighth of the side; flip_shift: left-right flips too."""
    search_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """About which share of the training images is held out for the search; None = the data's own validation split
    where it has one besides the test split, else 0.1."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Where the data has no test split: about which share of all images becomes one."""

    @model_validator(mode="after")
    def _complete(self) -> DataOptions:
        needs = {"torchvision": ("dataset", "path"), "folder": ("path",), "arrays": ("train",)}.get(self.source, ())
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise ValueError(f"source {self.source!r} also needs {' and '.join(missing)}")
        files = ("classes", "damaged")
        optional = {
            "torchvision": ("download", *files),
            "folder": files,
            "arrays": ("test", "classes"),
        }.get(self.source, ())
        foreign = {"dataset", "path", "download", "train", "test", *files} - {*needs, *optional}
        unused = sorted(name for name in foreign if getattr(self, name) != DataOptions.model_fields[name].default)
        if unused:
            raise ValueError(f"source {self.source!r} does not use {' and '.join(unused)}")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes needs at least two names, and each only once")
        return self


class MetricOptions(Section):
    """How classifiers are compared in a search."""

    search: Literal["top1", "divergence", "loss"] = "top1"
    """What the search goes by: top1; ``divergence_score`` = exp(-KL), where KL is the mean divergence (nats) of a
    candidate's class probabilities from the unpruned network's; or ``loss_score`` = exp(-cross-entropy). The last two
    look at augmented search images, the same for all candidates, so that they still see where weights know the search
    images by heart."""


class Options(Section):
    """The ``workload`` section for image classification."""

    name: Literal["classification"] = "classification"
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
    SEEING: ClassVar[Mapping[str, str]] = {"divergence": "divergence_score", "loss": "loss_score"}

    def __init__(self, options: Options, reading: Reading) -> None:
        self.options = options
        self.search_metric = self.SEEING.get(options.metrics.search, self.search_metric)
        opened = _open(options.data, reading)
        self.classes, self.named, self.resize = opened.classes, opened.named, opened.resize
        self.train, self.search, self.test = _split(opened, options.data)
        self._data_notes = opened.tally.notes()
        self.num_classes = len(opened.classes)
        sample = opened.train.read(self.train.indices[:1])
        self.shape = (sample.shape[3], sample.shape[1], sample.shape[2])
        parts = {"train": self.train, "search": self.search, "test": self.test}
        members = tuple(
            member
            for name, split in parts.items()
            for member in record.members_of({name: split.indices}, split.source.places, split.source.contents)
        )
        data = _data_digest(parts, opened.classes, members)
        self.mean, self.std = self._statistics(data)
        self.pretrained = options.model.weights is not None
        name = options.model.name
        weights = find_weights(options.model.weights, lambda: _torchvision_weights(name, self.num_classes))
        self._content = None if weights is None else read_weights(weights)
        if weights is not None and options.model.weights == TORCHVISION:
            self._content = _renamed(name, weights)
        where: Any = {"data": {"path", "train", "test", "download"}, "metrics": True}
        content: dict[str, Any] = {"options": options.model_dump(mode="json", exclude=where)}
        content |= {"data": data, "weights": None if weights is None else sha256_of(weights)}
        content |= {"decoder": decode.VERSION}
        self.fingerprint = record.fingerprint_of(content)
        told = {
            key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
            for key, value in content.items()
        }
        files = not isinstance(opened.train, ArraySource)
        self.record = record.DataRecord(self.fingerprint, told, members, files)

    @property
    def search_augmented(self) -> bool:
        """Whether the search looks at augmented images."""
        return self.search_metric in self.SEEING.values()

    @property
    def usage(self) -> Mapping[str, Any]:
        mean, std = ((values.flatten() / 255).tolist() for values in (self.mean, self.std))
        prepared = {"image_size": self.shape[1], "mean": mean, "std": std, "resize": self.resize}
        return {**prepared, "classes": list(self.classes)} if self.named else prepared

    @cached_property
    def notes(self) -> tuple[str, ...]:
        if self._content is None or self.options.model.weights == TORCHVISION:
            return self._data_notes
        with torch.random.fork_rng(devices=[]):
            own = self.fresh_model().state_dict()
        return (*self._data_notes, *choose_weights(self._content, own, self.options.model.weights)[1])

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
        model = self.options.model
        return build_network(model.name, self.num_classes, self.shape[0], model.options).eval()

    def build_model(self) -> nn.Module:
        model = self.fresh_model()
        if self._content is not None:
            weights, held = self.options.model.weights, describe(self._content)
            chosen, _ = choose_weights(self._content, model.state_dict(), weights)
            fit_weights(model, chosen.tensors, weights, self.options.model.name, held=held, classes=self.classes)
        return model.eval()

    def example_input(self) -> Tensor:
        return self.batch(self.train, torch.tensor([0]), train=False, generator=None, device=torch.device("cpu"))[0]

    def batch(
        self, split: Split, indices: Tensor, *, train: bool, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        where = split.indices[indices.numpy()]
        pixels = torch.from_numpy(np.ascontiguousarray(split.source.read(where))).to(device)
        targets = torch.from_numpy(split.source.labels[where]).to(device)
        x = pixels.permute(0, 3, 1, 2)  # NHWC memory seen as NCHW = channels-last
        x = (x.float() - self.mean.to(device)) / self.std.to(device)
        if train and self.options.data.augment != "none":
            x = _augment(x, self.options.data.augment == "flip_shift", generator)
        return x.contiguous(memory_format=torch.channels_last), targets

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def distillation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return distillation_loss(student, teacher, temperature)

    def answers(self, outputs: Tensor, targets: Tensor, *, brief: bool = False) -> Tensor:
        """The logits."""
        del targets, brief
        return outputs

    def metrics(self, answers: Tensor, targets: Tensor) -> Mapping[str, float]:
        loss = F.cross_entropy(answers.float(), targets).item()
        found = {"top1": (answers.argmax(1) == targets).float().mean().item(), "loss": loss}
        return {**found, "loss_score": math.exp(-loss)} if self.search_metric == "loss_score" else found

    def divergence(self, answers: Tensor, dense: Tensor) -> float:
        """Mean Kullback-Leibler divergence KL(dense || candidate) of class probabilities in nats, >= 0."""
        found, wanted = (logits.double().log_softmax(1) for logits in (answers, dense))
        return max(0.0, F.kl_div(found, wanted, reduction="batchmean", log_target=True).item())

    test_metrics = metrics

    def ease(self, outputs: Tensor, targets: Tensor) -> Tensor:
        own = outputs.gather(1, targets[:, None])[:, 0]
        return own - outputs.scatter(1, targets[:, None], -torch.inf).amax(1)

    def bound(self, answers: Tensor, targets: Tensor, num_unseen: int) -> float:
        if self.search_metric in self.SEEING.values():
            return 1.0  # no image sets a bound to the mean of others
        right = int((answers.argmax(1) == targets).sum())
        return (right + num_unseen) / (len(targets) + num_unseen)

    def _statistics(self, data: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation per channel in pixel units, shape (1, channels, 1, 1).

        Args:
            data: names the images and splits; what was measured on them once is remembered.
        """
        options = self.options.data
        mean, std = options.mean, options.std
        if mean is None or std is None:
            key = f"statistics {data} {self.shape} {decode.VERSION}"
            measured = kept(key, self._measured)
            mean, std = mean or tuple(measured["mean"]), std or tuple(measured["std"])
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.shape[0]:
                raise UserError(f"data.{name} has {len(values)} values, the images have {self.shape[0]} channel(s)")
        return (255 * torch.tensor(mean)).view(1, -1, 1, 1), (255 * torch.tensor(std)).view(1, -1, 1, 1)

    def _measured(self) -> dict[str, list[float]]:
        pixels = self.train.source.read(self.train.indices[:5000]).astype(np.float32) / 255
        deviation = np.maximum(pixels.std((0, 1, 2)), 1e-3)
        return {"mean": pixels.mean((0, 1, 2)).tolist(), "std": deviation.tolist()}


def _open(data: DataOptions, reading: Reading) -> ImageData:
    size, channels = data.image_size, data.channels
    match data.source:
        case "digits":
            return digits.load(size, channels)
        case "torchvision":
            assert data.dataset and data.path
            root, download = under_data(data.path), data.download
            return torchvision_sets.load(
                data.dataset, root, download, size, channels, data.classes, data.damaged, reading
            )
        case "folder":
            assert data.path
            return folder.load(data.path, size, channels, data.classes, data.damaged, reading)
        case "arrays":
            assert data.train
            return arrays.load(data.train, data.test, size, channels, data.classes)


def _split(opened: ImageData, data: DataOptions) -> tuple[Split, Split, Split]:
    """(train, search, test): the data's own, and what is missing drawn from the training images by their content.

    Raises:
        UserError: a split would be empty.
    """
    tally, train = opened.tally, opened.train
    own_search = opened.search if opened.test is not None and data.search_fraction is None else None
    if opened.search is not None and own_search is None:
        tally.add("image(s) of the validation split were not used, as search_fraction is set", *opened.search.places)
    shares = splits.shares_of(
        None if opened.test is not None else data.test_fraction,
        None if own_search is not None else data.search_fraction or SEARCH_FRACTION,
    )
    if opened.test is None:
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
                f"no images for the {name} split: {len(train):,} images in {len(opened.classes)} classes are too few "
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


def _augment(x: Tensor, flip: bool, generator: torch.Generator | None) -> Tensor:
    """Random shifts by up to an eighth of the side (zeros come in, as in He et al. 2016), and flips."""
    n, _, high, wide = x.shape
    reach = max(1, high // 8)
    padded = F.pad(x, (reach, reach, reach, reach))
    dy, dx = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator).to(x.device)
    rows = (dy + torch.arange(high, device=x.device))[:, :, None]
    columns = dx + torch.arange(wide, device=x.device)
    if flip:
        mirrored = torch.rand((n, 1), generator=generator).to(x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows, columns[:, None, :]].permute(0, 3, 1, 2)


def _torchvision_weights(name: str, num_classes: int) -> str:
    """Address of torchvision's best weights for a classifier.

    Raises:
        UserError: it has none for this network, or they are for another number of classes.
    """
    import torchvision.models as zoo

    names = zoo.list_models(zoo)
    if name not in names:
        raise UserError(f"torchvision has no trained weights for network {name}; {known(names, name)}")
    found: Any = zoo.get_model_weights(name).DEFAULT
    if (trained := len(found.meta["categories"])) != num_classes:
        raise UserError(
            f"torchvision's weights for {name} know {trained} classes, the data has {num_classes}; "
            "set model.weights to a file, or leave it out to train a baseline"
        )
    return str(found.url)


def _renamed(name: str, path: Path) -> dict[str, Tensor]:
    """torchvision's weights with today's names of the network's tensors; some of its files have older ones.

    torchvision reads the file in its own way, which may run code: ``read_weights`` has to find that it has none first.

    Args:
        path: where the file is.

    Raises:
        UserError: it holds other weights.
    """
    import torchvision.models as zoo

    try:
        with torch.random.fork_rng(devices=[]):
            return dict(zoo.get_model(name, weights="DEFAULT").state_dict())
    except RuntimeError as error:
        raise UserError(
            f"{path} holds other weights than torchvision's for {name}; remove it to fetch them again"
        ) from error
