"""What a network learns from one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.pipeline.config.schema import Distillation, Recipe
from secateur.pipeline.training.compiled import Forward, compiled
from secateur.pipeline.training.distributed import ALONE, Group
from secateur.pipeline.training.features import Features
from secateur.pipeline.workloads import Workload


@dataclass
class Lesson:
    """What a network learns from a batch: gradients of the loss, of what a teacher adds, and of a penalty.

    Args:
        group: of processes; the gradients are those of the batches of all.
        teacher: brought to ``compute`` and into eval mode; None = no distillation.
        features: of both, where they are distilled too.
        penalty: of the share of training that is done.
        bf16: whether it computes in mixed precision.
        compiled: whether networks are compiled.
    """

    model: nn.Module
    workload: Workload
    recipe: Recipe
    compute: torch.device
    group: Group = ALONE
    teacher: nn.Module | None = None
    distill: Distillation | None = None
    features: Features | None = None
    penalty: Callable[[float], Tensor] | None = None
    bf16: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        self._joined = self.model
        if self.teacher is not None:
            move(self.teacher, self.compute).eval()
        self.compile(self.compiled)

    def join(self) -> None:
        """From now on gradients are those of the whole group, and weights those of its first process."""
        self._joined = self.group.wrap(self.model, self.compute)
        self.compile(self.compiled)

    def compile(self, wanted: bool) -> None:
        """From now on networks are called compiled, or as they are."""
        self.compiled = wanted
        self._forward: Forward = compiled(self._joined) if wanted else self._joined
        taught = self.teacher
        self._taught: Forward | None = compiled(taught) if wanted and taught is not None else taught

    def __call__(self, images: Tensor, targets: Tensor, whole: int, done: float) -> Tensor:
        """Set all gradients; returns the loss, a scalar without a gradient, whose mean over the group is the batch's.

        Args:
            images: this process's part of a batch.
            whole: images of the batch.
            done: share of the training that is done, in 0..1.
        """
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.compute)
        parts = max(1, min(self.recipe.accumulate, whole // self.group.size))  # the same in every process
        pairs = list(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True))
        for number, (images_, targets_) in enumerate(pairs, start=1):
            with self.group.apart(self._joined, last=number == parts):
                loss = self._loss(images_, targets_) * (len(images_) * self.group.size / whole)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.penalty is not None:
            added = self.penalty(done)
            added.backward()  # type: ignore[no-untyped-call]
            total += added.detach()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        return total

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.compute.type, torch.bfloat16, enabled=self.bf16):
            if not len(images):  # fewer images than processes: nothing is learned from, but the others wait
                return self._forward(images.new_zeros(2, *images.shape[1:])).float().sum() * 0
            outputs = self._forward(images)
            loss = self.workload.loss(outputs, targets, self.recipe.label_smoothing)
            if self._taught is None or self.distill is None:
                return loss
            with torch.no_grad():
                taught = self._taught(images)
            learned = self.workload.distillation(outputs, taught, self.distill.temperature)
            loss = (1 - self.distill.weight) * loss + self.distill.weight * learned
            return loss if self.features is None else loss + self.distill.features * self.features.distance()


def move(model: nn.Module, compute: torch.device) -> nn.Module:
    """The same module, on ``compute`` and in channels-last memory."""
    return model.to(compute).to(memory_format=torch.channels_last)
