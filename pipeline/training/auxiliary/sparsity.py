"""Sparse training: a penalty on batch-norm scales, as strong as it takes to make a wanted share of them small.

Zhao et al., "Dependency Aware Filter Pruning" (arXiv 2005.02634); the penalty is that of Liu et al., "Network Slimming"
(ICCV 2017, arXiv 1708.06519)::

    loss + lambda_t sum |gamma|
    lambda_{t+1} = lambda_t (1 + eta sign(wanted_t - reached_t))

``reached`` is the share of the scales with a magnitude below a threshold, ``wanted`` grows linearly from 0 to
``target_sparsity``. Scales of channels that no plan may remove are left alone. What is learned about a channel is the
criterion ``bn_dependency`` of the trained network.

Our choices, each for want of which small networks collapsed: t counts hundredths of the training, so that lambda
reaches what it takes in short and long trainings alike; while more scales are small than wanted, nothing is added to
the loss (what lambda has grown to would go on pressing); below the threshold ``|gamma|`` is rounded off to a parabola,
so that scales come to rest there instead of jumping across zero, and lambda stays below threshold / learning rate for
the same reason, and above a tenth of its first value; ``wanted`` is full-grown after three quarters, while the learning
rate still moves scales. Lambda lives in a buffer of the model while training lasts, and so in every checkpoint: a
killed training continues with the strength it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.pipeline.training.auxiliary import Outcome, Task
from secateur.pipeline.training.loop import fit
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.saliency import channel_saliency
from secateur.pruning.tracer import tensors_of

OPTIONS: Mapping[str, float] = {"target_sparsity": 0.5, "strength": 1e-4, "rate": 0.2, "threshold": 0.01}
"""Options of a request, with their defaults; ``search.options`` of the method ``dafp`` says what they are."""
BUFFER = "sparsity_strength"
UPDATES = 100
"""Steps of the controller in a training."""
GROWN = 0.75
"""Share of the training after which the wanted share is full-grown."""


def train(task: Task) -> Outcome:
    """Train with the penalty; the trained weights, and ``|gamma_k| * norm of the weights that read k`` per channel.

    Raises:
        ValueError: an option is unknown or out of range, or no batch norm scales channels that can be removed.
    """
    options = _checked(task.options)
    model = task.model
    scales = list(channel_scales(model, task.graph))
    if not scales:
        raise ValueError(
            "sparse training needs batch norms with a scale on channels that can be removed, and this network has "
            "none; set epochs: 0, or use a method that needs no batch norm (cpmc, filter_ensemble)"
        )
    model.register_buffer(BUFFER, torch.tensor([options["strength"], 0], dtype=torch.float64, device=task.compute))
    try:
        fit(
            model,
            task.workload,
            task.workload.train,
            task.recipe,
            seed=task.seed,
            checkpoint=task.checkpoint,
            compute=task.compute,
            penalty=lambda done: penalty(model, scales, done, options, task.recipe.lr),
            report=task.report,
        )
    finally:
        delattr(model, BUFFER)
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    images = round(task.recipe.epochs * len(task.workload.train))
    return Outcome(state, channel_saliency(model, task.graph, "bn_dependency"), images)


Scale = tuple[nn.Parameter, Tensor]
"""Scales of a batch norm, shape ``(features,)``, and which of them belong to channels that can be removed."""


def channel_scales(model: nn.Module, graph: ChannelGraph) -> Iterator[Scale]:
    """Every batch norm's scales that belong to channel groups, each once."""
    tensors = tensors_of(model)[0]
    norms = {id(m.weight) for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None}
    positions: dict[str, list[np.ndarray]] = {}
    for member in (member for group in graph.groups for member in group.members):
        if id(tensors[member.tensor]) in norms:
            positions.setdefault(member.tensor, []).append(member.index.ravel())
    for name, parts in positions.items():
        scale = tensors[name]
        assert isinstance(scale, nn.Parameter)
        yield scale, torch.from_numpy(np.unique(np.concatenate(parts))).to(scale.device)


def sparsity(scales: list[Scale], threshold: float) -> float:
    """Share in 0..1 of the scales whose magnitude lies below the threshold."""
    values = torch.cat([scale.detach()[index].abs() for scale, index in scales])
    return (values < threshold).double().mean().item()


def penalty(
    model: nn.Module, scales: list[Scale], done: float, options: Mapping[str, float], learning_rate: float
) -> Tensor:
    """The steps of the controller that are due, then ``lambda_t sum |gamma|``, or 0 while enough scales are small.

    Args:
        model: its buffer holds lambda and t.
        done: share of the training that is done, in 0..1.
        learning_rate: the largest of the training.
    """
    first, threshold = options["strength"], options["threshold"]
    missing = options["target_sparsity"] * min(1.0, done / GROWN) - sparsity(scales, threshold)
    state = model.get_buffer(BUFFER)
    strength, t = state.tolist()
    due = int(UPDATES * done + 1e-9)
    if due > t:
        strength *= (1 + options["rate"] * float(np.sign(missing))) ** (due - t)
        strength = max(first / 10, min(threshold / learning_rate, strength))
        state.copy_(torch.tensor([strength, due]))
    values = torch.cat([scale[index] for scale, index in scales])
    return (
        (strength if missing > 0 else 0.0)
        * F.huber_loss(values, torch.zeros_like(values), reduction="sum", delta=threshold)
        / threshold
    )


def _checked(given: Mapping[str, float | str]) -> dict[str, float]:
    """All options, as numbers."""
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise ValueError(f"unknown options {unknown} of sparse training; known: {', '.join(OPTIONS)}")
    options = {**OPTIONS, **{name: float(value) for name, value in given.items()}}
    shares = [
        f"{n} must lie in 0..1, got {options[n]:g}" for n in ("target_sparsity", "rate") if not 0 <= options[n] <= 1
    ]
    above = [f"{n} must be positive, got {options[n]:g}" for n in ("strength", "threshold") if not options[n] > 0]
    if shares or above:
        raise ValueError("; ".join([*shares, *above]))
    return options
