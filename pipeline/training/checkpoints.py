"""Files of trainings: what a killed one goes on from, and weights."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from secateur.pipeline.files import write_whole
from secateur.pipeline.training.curve import EpochFacts, Fitted, Losses
from secateur.pipeline.training.precision import Precision

EVERY_S = 120.0
"""A training that is killed loses at most this and one step."""
CURVE = ".curve.json"
"""Suffix of what is kept of a training beside its weights."""
UNUSABLE = (
    *(RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError),
    *(EOFError, OSError, pickle.UnpicklingError),
)
"""What torch raises for a checkpoint that was cut short, is damaged or is another network's."""


@dataclass
class Best:
    """The best weights so far: of which epoch, how good, and the state dict."""

    epoch: float
    value: float
    state: dict[str, Tensor]


@dataclass
class State:
    """All that a training goes on from, beside what it was started with.

    Args:
        step: how many are done.
        precision: which was chosen; None = not yet.
        curve: epochs that are over.
    """

    model: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    losses: Losses
    step: int = 0
    precision: Precision | None = None
    curve: list[EpochFacts] = field(default_factory=list)
    best: Best | None = None

    def content(self) -> dict[str, Any]:
        """The same of tensors, numbers and texts."""
        average, best = self.average, self.best
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if average is None else [int(average.n_averaged), average.module.state_dict()],
            "losses": [self.losses.total, self.losses.count],
            "step": self.step,
            "precision": self.precision,
            "curve": [asdict(epoch) for epoch in self.curve],
            "best": None if best is None else [best.epoch, best.value, best.state],
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """Become what a content says; where it is of no use, an error and an undefined state."""
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.average is not None:
            num_averaged, state = content["average"]
            self.average.module.load_state_dict(state)
            self.average.n_averaged.fill_(num_averaged)
        self.losses.total, self.losses.count = content["losses"]
        self.precision = content["precision"]
        self.curve = [EpochFacts(**epoch) for epoch in content["curve"]]
        self.best = None if content["best"] is None else Best(*content["best"])
        self.step = int(content["step"])


class Checkpoint:
    """The file of a training's state.

    Args:
        every_s: how often it is written.
        clock: in seconds.
        writes: whether this process is the one that writes.
    """

    def __init__(
        self, path: Path, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic, *, writes: bool = True
    ) -> None:
        self.path, self.every_s, self.clock, self.writes = path, every_s, clock, writes
        self._written_at = clock()

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.writes and self.clock() - self._written_at >= self.every_s

    def write(self, state: State) -> None:
        """Write the state, whole.

        Raises:
            SurroundingsError: the disk is full or fails; names the file and how much it needs.
        """
        save_checkpoint(self.path, state.content())
        self._written_at = self.clock()

    def read(self, state: State, compute: torch.device) -> bool:
        """Bring a training to the state that was written; False where there is nothing usable: it is as it was."""
        if not self.path.exists():
            return False
        before = io.BytesIO()
        torch.save(state.content(), before)
        try:
            state.restore(torch.load(self.path, map_location=compute, weights_only=True))
        except UNUSABLE:  # cut short or of another network: begin again
            before.seek(0)
            state.restore(torch.load(before, map_location=compute, weights_only=True))
            return False
        return True


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write what a training goes on from, whole.

    Raises:
        SurroundingsError: the disk is full or fails; names the file and how much it needs.
    """
    content = io.BytesIO()  # not into the file: what PyTorch says of a full disk names neither
    torch.save(dict(state), content)
    write_whole(path, content.getbuffer())


def save_weights(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write a state dict as safetensors, whole; returns its sha256."""
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def write_fitted(stem: Path, fitted: Fitted) -> None:
    """Keep how a training went beside its weights.

    Args:
        stem: the file of the weights, without its suffix.

    Raises:
        SurroundingsError: the disk is full or fails.
    """
    write_whole(stem.with_suffix(CURVE), json.dumps(fitted.to_json()) + "\n")


def read_fitted(stem: Path) -> Fitted | None:
    """The same; None where nothing is kept, or it cannot be read."""
    try:
        return Fitted.of_json(json.loads(stem.with_suffix(CURVE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors state dict onto the CPU, into memory of its own.

    Tensors in a file are not aligned, and kernels may then add in another order: the same weights gave other outputs.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}
