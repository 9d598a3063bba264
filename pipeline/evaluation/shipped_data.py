"""A run file's workload, opened in any process; where one cannot open the data, with images shipped to it.

What is shipped is what ``Workload.batch`` reads, of the images that are needed: pixels as the source gives them,
labels, and what was measured on the training images. The test split is never shipped.
"""

from __future__ import annotations

import importlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.pipeline.config.choices import workload_options
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import write_whole
from secateur.pipeline.workloads import Split, Workload
from secateur.pipeline.workloads.classification import Classification
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.decode import Fitting
from secateur.pipeline.workloads.data.record import DataRecord
from secateur.pipeline.workloads.data.sources import ArraySource

WORKLOADS = "secateur.pipeline.workloads."
"""Where kinds of workloads lie, in every process."""


def open_section(section: dict[str, Any], reading: Reading = Reading()) -> Workload:  # noqa: B008 - frozen
    """The workload that a run file's ``workload`` section names.

    Args:
        reading: how thoroughly image files are looked at.

    Raises:
        UserError: data or weights are missing or do not fit.
    """
    module = importlib.import_module(f"secateur.pipeline.workloads.{section['name']}")
    workload: Workload = module.build(workload_options(section), reading)
    return workload


def pack(workload: Workload, num_train: int, num_search: int, path: Path) -> Path:
    """Write the first images of both splits into a file.

    Raises:
        UserError: this kind of workload cannot be shipped.
    """
    found: object = workload
    if not isinstance(found, Classification) or not type(found).__module__.startswith(WORKLOADS):
        raise UserError(
            "workers cannot open the data of the run file, and only classification data can be sent to them; put the "
            "data on every worker, at the path of the run file or under its SECATEUR_DATA"
        )
    kind = f"{type(found).__module__[len(WORKLOADS) :]}:{type(found).__name__}"
    arrays: dict[str, Any] = {"kind": kind, "mean": found.mean.numpy(), "std": found.std.numpy()}
    arrays["num_classes"], arrays["fingerprint"], arrays["augment"] = (
        found.num_classes,
        found.fingerprint,
        found.augment,
    )
    parts = {"train": found.train.first(max(1, num_train)), "search": found.search.first(num_search)}
    for name, split in parts.items():
        arrays[name] = split.source.read(split.indices)
        arrays[f"{name}_labels"] = split.source.labels[split.indices]
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(path, content.getbuffer())
    return path


def unpack(section: dict[str, Any], path: Path) -> Workload:
    """The workload of a packed file.

    Raises:
        UserError: the file is none.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = dict(content)
        workload: Any = _on_images(str(arrays["kind"]))(section, arrays)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no shipped images: {error}") from error
    shipped: Workload = workload
    return shipped


def _on_images(kind: str) -> type:
    """A kind of classification, ``MODULE:CLASS``, on images that came along.

    Raises:
        ValueError: there is no such kind here.
    """
    module, _, name = kind.partition(":")
    found = getattr(importlib.import_module(WORKLOADS + module), name)
    if not (isinstance(found, type) and issubclass(found, Classification)):
        raise ValueError(f"{kind} is no kind of classification")
    return type(name, (_Images, found), {})


class _Images:
    """What a kind of classification is made of where its images came along; loss and metrics are the kind's own."""

    choose_metrics: Callable[[], None]

    def __init__(self, section: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.options = workload_options(section)
        self.choose_metrics()
        self.search_metric_is_open = False
        self.num_classes, self.fingerprint = int(arrays["num_classes"]), str(arrays["fingerprint"])
        self.augment = str(arrays["augment"])
        self.mean, self.std = torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["std"])
        self.train, self.search = (self._split(arrays[name], arrays[f"{name}_labels"]) for name in ("train", "search"))
        self.test = Split(self.search.source, np.arange(0))
        _, high, wide, channels = arrays["search"].shape
        self.shape = (channels, high, wide)
        self.classes, self.named = tuple(map(str, range(self.num_classes))), False
        self.fitting = Fitting((high, wide), "stretch")
        self.notes, self.record = (), DataRecord(self.fingerprint, {}, (), False)
        self.pretrained, self._content = False, None

    @staticmethod
    def _split(images: np.ndarray, labels: np.ndarray) -> Split:
        return Split(ArraySource(images, labels, None, None), np.arange(len(images)))
