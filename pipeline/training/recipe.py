"""A recipe as torch takes it: the optimizer with its groups of parameters, and the learning rate of every step."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from secateur.pipeline.config.schema import Recipe

BETA2 = 0.999
"""Of AdamW: decay of the squared gradients' average."""


def optimizer_of(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer, fused: one kernel for all parameters."""
    groups = _groups(model, recipe)
    if recipe.optimizer == "adamw":
        betas = (recipe.momentum, BETA2)
        return AdamW(groups, lr=recipe.lr, betas=betas, weight_decay=recipe.weight_decay, fused=True)
    momentum, nesterov = recipe.momentum, recipe.momentum > 0
    return SGD(groups, recipe.lr, momentum, weight_decay=recipe.weight_decay, nesterov=nesterov, fused=True)


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """All parameters; those that do not decay are a group of their own."""
    parameters = list(model.parameters())
    if recipe.weight_decay_on == "all":
        return [{"params": parameters}]
    decaying: dict[str, Any] = {"params": [parameter for parameter in parameters if parameter.ndim > 1]}
    vectors = {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0}
    return [group for group in (decaying, vectors) if group["params"]]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a training's steps.

    Args:
        steps_per_epoch: batches of an epoch.
        part: which part of a whole schedule this training is, as fractions of it.
    """

    recipe: Recipe
    steps_per_epoch: int
    part: tuple[float, float] = (0.0, 1.0)

    @property
    def steps(self) -> int:
        """Of this training."""
        return max(1, round(self.recipe.epochs * self.steps_per_epoch))

    def lr(self, step: int) -> float:
        """The learning rate of a step (from 0): linear warm-up, then as the recipe says."""
        begin, end = self.part
        whole = self.steps / (end - begin)
        return self.recipe.lr * self._factor(begin * whole + step, whole)

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Give all parameters the learning rate of a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step)

    @property
    def _warmup(self) -> float:
        """Steps of the warm-up that are asked for."""
        given = self.recipe.warmup_steps
        return self.recipe.warmup_epochs * self.steps_per_epoch if given is None else given

    def _factor(self, step: float, steps: float) -> float:
        warmup = max(1.0, min(self._warmup, steps / 2))
        if step < warmup:
            return (step + 1) / warmup
        match self.recipe.schedule:
            case "constant":
                return 1.0
            case "step":
                passed = bisect_right(sorted(self.recipe.milestones), step / steps)
                return float(self.recipe.milestone_factor**passed)
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
