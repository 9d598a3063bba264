"""What a training was like, epoch by epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.pipeline.training.precision import Precision

READ_EVERY_S = 0.5
"""How often the losses of steps are read from the device, for people; a read makes a GPU wait."""
MOST_UNREAD = 1000
"""Losses that are left on the device, at most."""


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not a finite number, or there is nothing to learn from."""


@dataclass(frozen=True)
class EpochFacts:
    """An epoch of a training.

    Args:
        epoch: epochs that were over at its end; the last one may be a fraction.
        loss: mean over its steps.
        lr: learning rate of its last step.
        metrics: of the network on the search split at its end, by name; empty = it was not judged.
    """

    epoch: float
    loss: float
    lr: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """How a training went.

    Args:
        precision: of its forward and backward passes.
        keep: which weights it ended with.
        kept_epoch: of which epoch these are.
        curve: its epochs.
    """

    precision: Precision
    keep: Literal["last", "best"]
    kept_epoch: float
    curve: tuple[EpochFacts, ...]

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """(epoch, value) of loss, learning rate and every metric, of each epoch that has it."""
        rows = [(math.ceil(e.epoch), {"loss": e.loss, "lr": e.lr, **_held_out(e.metrics)}) for e in self.curve]
        names = dict.fromkeys(name for _, values in rows for name in values)
        return {name: [(epoch, values[name]) for epoch, values in rows if name in values] for name in names}

    def to_json(self) -> dict[str, Any]:
        """The same, made of JSON's types."""
        return asdict(self)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Fitted:
        """What ``to_json`` gave."""
        return cls(**{**content, "curve": tuple(EpochFacts(**epoch) for epoch in content["curve"])})


def _held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics on the search split, told from those of the training."""
    return {f"search_split.{name}": value for name, value in metrics.items()}


class Losses:
    """The losses of an epoch's steps, read from the device now and then instead of in every step.

    Args:
        advice: what helps against a loss that is no finite number.
        clock: in seconds.
    """

    def __init__(self, advice: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.count = 0.0, 0
        self.advice, self.clock = advice, clock
        self.images_per_s = 0.0
        self._unread: list[Tensor] = []
        self._images, self._read_at = 0, clock()

    def add(self, loss: Tensor, images: int) -> None:
        """A step's loss, a scalar without a gradient, and how many images it saw."""
        self._unread.append(loss)
        self._images += images

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._unread) >= MOST_UNREAD or self.clock() - self._read_at >= READ_EVERY_S

    def read(self, step: int, steps: int) -> None:
        """Take in what was not read yet.

        Args:
            step: how many steps of the training are done.
            steps: of the whole training.

        Raises:
            TrainingError: a loss is NaN or infinite; says at which step and what to change.
        """
        if not self._unread:
            return
        values = torch.stack(self._unread).tolist()
        first = step - len(values)
        for number, value in enumerate(values, start=first):
            if not math.isfinite(value):
                raise TrainingError(f"the training loss is {value} at step {number} of {steps}; {self.advice}")
            self.total, self.count = self.total + value, self.count + 1
        now = self.clock()
        self.images_per_s = self._images / max(1e-9, now - self._read_at)
        self._unread, self._images, self._read_at = [], 0, now

    @property
    def mean(self) -> float:
        """Of what was read."""
        return self.total / max(1, self.count)

    def begin_epoch(self) -> None:
        """Count from zero again."""
        self.total, self.count = 0.0, 0
