"""Image classification: any torchvision classifier or CIFAR ResNet on digits, torchvision data, folders or arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Section, known
from pipeline.errors import UserError
from pipeline.training import distillation_loss
from pipeline.workloads import ClassCount, DataSummary, Split, images
from pipeline.workloads.networks import build_network
from pipeline.workloads.weights import TORCHVISION, file_digest, find_weights, fit_weights, read_weights


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
    image_size: Annotated[int, Field(ge=4)] | None = None
    channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    """Per channel, of pixels in 0..1; None = measured on the training images."""
    std: tuple[float, ...] | None = None
    augment: Literal["none", "shift", "flip_shift"] = "none"
    """shift: random shifts of up to an eighth of the side; flip_shift: left-right flips too."""
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training images that is held out for the search."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Where the data has no test split: share of all images that becomes one."""

    @model_validator(mode="after")
    def _complete(self) -> DataOptions:
        needs = {"torchvision": ("dataset", "path"), "folder": ("path",), "arrays": ("train",)}.get(self.source, ())
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise ValueError(f"source {self.source!r} also needs {' and '.join(missing)}")
        optional = {"torchvision": ("download",), "arrays": ("test",)}.get(self.source, ())
        foreign = {"dataset", "path", "download", "train", "test"} - {*needs, *optional}
        unused = sorted(name for name in foreign if getattr(self, name) != DataOptions.model_fields[name].default)
        if unused:
            raise ValueError(f"source {self.source!r} does not use {' and '.join(unused)}")
        return self


class Options(Section):
    """The ``workload`` section for image classification."""

    name: Literal["classification"] = "classification"
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()


def build(options: Options) -> Classification:
    """Open the data and fix the splits.

    Raises:
        UserError: data or weights are missing or do not fit.
    """
    return Classification(options)


class Classification:
    """Classifier, images, cross-entropy and top-1."""

    metric = search_metric = "top1"
    postprocessing = None
    notes: tuple[str, ...] = ()

    def __init__(self, options: Options) -> None:
        self.options = options
        opened = _open(options.data)
        held = np.random.default_rng(0)  # splits never depend on the run's seed: test stays test
        if opened.test is None:
            rest, test = _carve(opened.train.labels, np.arange(len(opened.train)), options.data.test_fraction, held)
            self.test = Split(opened.train, test)
        else:
            rest = np.arange(len(opened.train))
            self.test = Split(opened.test, np.arange(len(opened.test)))
        train, search = _carve(opened.train.labels, rest, options.data.search_fraction, held)
        self.train, self.search = Split(opened.train, train), Split(opened.train, search)
        self.num_classes = opened.num_classes
        sample = opened.train.read(train[:1])
        self.shape = (sample.shape[3], sample.shape[1], sample.shape[2])
        self.mean, self.std = self._statistics()
        self.pretrained = options.model.weights is not None
        name = options.model.name
        weights = find_weights(options.model.weights, lambda: _torchvision_weights(name, self.num_classes))
        self._state = None if weights is None else read_weights(weights)
        if weights is not None and options.model.weights == TORCHVISION:
            self._state = _renamed(name, weights)
        where = {"data": {"path", "train", "test", "download"}}
        content: dict[str, Any] = {"options": options.model_dump(mode="json", exclude=where)}
        content |= {"data": opened.fingerprint, "weights": None if weights is None else file_digest(weights)}
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def usage(self) -> Mapping[str, Any]:
        mean, std = ((values.flatten() / 255).tolist() for values in (self.mean, self.std))
        resize = "crop" if isinstance(self.train.source, images.FileSource) else "stretch"
        return {"image_size": self.shape[1], "mean": mean, "std": std, "resize": resize}

    def summary(self) -> DataSummary:
        counts = [
            np.bincount(split.source.labels[split.indices], minlength=self.num_classes)
            for split in (self.train, self.search, self.test)
        ]
        classes = tuple(ClassCount(str(i), *(int(c[i]) for c in counts)) for i in range(self.num_classes))
        return DataSummary(classes, "images", {self.shape[:0:-1]: sum(map(len, (self.train, self.search, self.test)))})

    def fresh_model(self) -> nn.Module:
        model = self.options.model
        return build_network(model.name, self.num_classes, self.shape[0], model.options).eval()

    def build_model(self) -> nn.Module:
        model = self.fresh_model()
        if self._state is not None:
            fit_weights(model, self._state, self.options.model.weights, self.options.model.name)
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
        return {
            "top1": (answers.argmax(1) == targets).float().mean().item(),
            "loss": F.cross_entropy(answers.float(), targets).item(),
        }

    test_metrics = metrics

    def ease(self, outputs: Tensor, targets: Tensor) -> Tensor:
        own = outputs.gather(1, targets[:, None])[:, 0]
        return own - outputs.scatter(1, targets[:, None], -torch.inf).amax(1)

    def bound(self, answers: Tensor, targets: Tensor, num_unseen: int) -> float:
        right = int((answers.argmax(1) == targets).sum())
        return (right + num_unseen) / (len(targets) + num_unseen)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation per channel in pixel units, shape (1, channels, 1, 1)."""
        data = self.options.data
        mean, std = data.mean, data.std
        if mean is None or std is None:
            pixels = self.train.source.read(self.train.indices[:5000]).astype(np.float32) / 255
            mean = mean or tuple(pixels.mean((0, 1, 2)).tolist())
            std = std or tuple(np.maximum(pixels.std((0, 1, 2)), 1e-3).tolist())
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.shape[0]:
                raise UserError(f"data.{name} has {len(values)} values, the images have {self.shape[0]} channel(s)")
        return (255 * torch.tensor(mean)).view(1, -1, 1, 1), (255 * torch.tensor(std)).view(1, -1, 1, 1)


def _open(data: DataOptions) -> images.ImageData:
    size, channels = data.image_size, data.channels
    match data.source:
        case "digits":
            return images.load_digits(size, channels)
        case "torchvision":
            assert data.dataset and data.path
            root = images.under_data(data.path)
            return images.load_torchvision(data.dataset, root, data.download, size, channels)
        case "folder":
            assert data.path
            return images.load_folder(data.path, size, channels)
        case "arrays":
            assert data.train
            return images.load_arrays(data.train, data.test, size, channels)


def _carve(
    labels: images.Labels, indices: images.Labels, fraction: float, rng: np.random.Generator
) -> tuple[images.Labels, images.Labels]:
    """Split indices into (rest, carved), the same share of every class, both in random order."""
    carved = np.concatenate(
        [
            rng.permutation(of_class)[: max(1, round(fraction * len(of_class)))]
            for label in np.unique(labels[indices])
            if len(of_class := indices[labels[indices] == label]) > 1
        ]
    )
    return rng.permutation(np.setdiff1d(indices, carved)), rng.permutation(carved)


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
