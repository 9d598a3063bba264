"""Distillation of features: what layers of one name give in both networks, where it has the same shape.

Hints of Romero et al. (FitNets, 2015, arXiv 1412.6550) without regressors: a pruned network whose residual stream was
left alone has the teacher's shapes at the end of every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.pipeline.training.curve import TrainingError

Outputs = dict[str, Tensor]
"""What layers gave in the last forward pass, by name."""


class Features:
    """Outputs of the same layers of a student and its teacher.

    Args:
        images: some, to see the shapes by.
        layers: names, with ``*`` and ``?``; empty = every block.

    Raises:
        TrainingError: no layer gives the same shape in both.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, images: Tensor, layers: tuple[str, ...] = ()) -> None:
        names = [name for name, module in student.named_modules() if _is_chosen(name, module, layers)]
        shapes = [_shapes(network, names, images) for network in (student, teacher)]
        self.names = [name for name in names if name in shapes[0] and shapes[0][name] == shapes[1].get(name)]
        if not self.names:
            raise TrainingError(
                "distill.features: no layer of the pruned network has outputs of the shape that they have in the "
                "unpruned one, since the stream between its blocks was cut; set search.scope: inner, or leave out "
                "distill.features"
            )
        self._student, self._teacher = Outputs(), Outputs()
        self._handles = [*_hooks(student, self.names, self._student), *_hooks(teacher, self.names, self._teacher)]

    def distance(self) -> Tensor:
        """How far the student's features of the last batch are from the teacher's: mean over layers of the squared
        error, over the mean square of the teacher's."""
        errors = []
        for name in self.names:
            taught = self._teacher[name].detach().float()
            errors.append(F.mse_loss(self._student[name].float(), taught) / taught.square().mean().clamp_min(1e-12))
        return torch.stack(errors).mean()

    def close(self) -> None:
        """Leave both networks as they were."""
        for handle in self._handles:
            handle.remove()


def _is_chosen(name: str, module: nn.Module, layers: tuple[str, ...]) -> bool:
    """Whether a layer is named; by default those that hold others and are no plain sequence, which ends as its last
    one does."""
    if layers:
        return any(fnmatchcase(name, pattern) for pattern in layers)
    return bool(name) and any(True for _ in module.children()) and type(module) is not nn.Sequential


@torch.no_grad()
def _shapes(network: nn.Module, names: list[str], images: Tensor) -> dict[str, torch.Size]:
    with _in_eval(network):
        found = Outputs()
        handles = _hooks(network, names, found)
        network(images)
        for handle in handles:
            handle.remove()
    return {name: tensor.shape for name, tensor in found.items()}


@contextmanager
def _in_eval(network: nn.Module) -> Iterator[None]:
    """Eval mode within the block; every module's own mode after it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _hooks(network: nn.Module, names: list[str], outputs: Outputs) -> list[RemovableHandle]:
    """Have layers write what they give into ``outputs``; layers that are not there, or give no tensor, do not."""

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 2:
                outputs[name] = output

        return hook

    modules = dict(network.named_modules())
    return [modules[name].register_forward_hook(keep(name)) for name in names if name in modules]
