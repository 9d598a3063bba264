"""Task families. A workload says what to prune and what "still does its job" means: model, data, loss and metric.

Each family is one module here with ``Options`` (its part of the run file) and ``build(options, ...) -> Workload``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


class ImageSource(Protocol):
    """Labelled images, read when needed."""

    labels: npt.NDArray[np.int64]

    def __len__(self) -> int: ...

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Images of shape (n, height, width, channels), uint8."""


@dataclass(frozen=True)
class Split:
    """Some images of a source.

    Args:
        source: where they come from.
        indices: shape (n,), which of them.
    """

    source: ImageSource
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, n: int) -> Split:
        """The first ``n`` images (all, if there are fewer)."""
        return Split(self.source, self.indices[:n])


class Workload(Protocol):
    """What every stage needs to know of a task.

    ``search`` is carved out of the training data; ``test`` is read once, at the end of a run.
    """

    metric: str
    """The metric the gate and the reward look at (``top1``); a fraction, higher = better."""
    fingerprint: str
    """Names the content of data and model options; part of every content hash."""
    notes: tuple[str, ...]
    """What a user should know of the data: what was skipped, and how often."""
    train: Split
    search: Split
    test: Split

    def build_model(self) -> nn.Module:
        """The unpruned network, with pretrained weights where the run file names some."""

    def fresh_model(self) -> nn.Module:
        """The unpruned network with random weights, drawn from torch's global generator."""

    @property
    def pretrained(self) -> bool:
        """Whether ``build_model`` loads trained weights, so that no baseline training is needed."""

    def example_input(self) -> Tensor:
        """Shape (1, channels, height, width), float32."""

    def batch(
        self, split: Split, indices: Tensor, *, train: bool, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Normalised images (channels-last, augmented if ``train``) and targets; ``indices`` count within the split."""

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor: ...

    def distillation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """What fine-tuning adds to the loss for a teacher: how far its softened outputs are from the student's."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Metrics of all outputs of a split at once (``top1``, ``loss``)."""

    def ease(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How easy each image is, shape (n,): those that are likely to go wrong first come first."""

    def bound(self, outputs: Tensor, targets: Tensor, num_unseen: int) -> float:
        """The largest value ``metric`` can still take when ``num_unseen`` images follow these."""
