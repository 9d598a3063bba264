"""A PruningNet: small generators that make every layer's weights from the keep ratios (MetaPruning, arXiv 1903.10258).

Stage A of the paper: each step trains the network at a random width vector, with label smoothing 0.1. What is saved are
the generators (``secateur.pruning.supernet``); ``weights`` makes a plan's weights from them. Options of the request:

- ``widths``: JSON text, group -> allowed widths; groups it does not name stay whole. Without it, the paper's 31 scales.
- ``order``: which channels stay at a width: ``leading`` (the paper) or ``l1``, the most salient of the weights that
  training begins with. The answer's ``scores`` are this order: plans have to keep the channels that score highest.
- ``hidden``: units of a generator (32; the paper's 64 for MobileNetV2).
- ``max_outputs``: layers with more weights than this share one set of weights instead (1e6).
- ``label_smoothing`` (0.1), ``lr`` (0 = the recipe's): of this training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from secateur.pipeline.training.auxiliary import Outcome, Task
from secateur.pipeline.training.loop import fit
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.saliency import channel_saliency
from secateur.pruning.search.protocol import FloatArray
from secateur.pruning.supernet import PruningNet, Supernet, scaled_space, weights_for

COMMON: Mapping[str, float | str] = {"widths": "", "order": "leading", "label_smoothing": 0.1, "lr": 0.0}
OPTIONS: Mapping[str, float | str] = {**COMMON, "hidden": 32, "max_outputs": 1e6}


def train(task: Task) -> Outcome:
    """Train the generators.

    Raises:
        ValueError: an option is unknown or has a value that means nothing.
        TrainingError: the loss became NaN or infinite.
    """
    options = read(task.options, OPTIONS)
    hidden, max_outputs = int(options["hidden"]), float(options["max_outputs"])
    return train_supernet(task, PruningNet(task.model, task.graph, hidden, max_outputs, task.seed), options)


def weights(model: nn.Module, graph: ChannelGraph, state: Mapping[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    """Dense-shaped state dict for the widths of a plan, made from ``Outcome.state``.

    Batch-norm statistics in it are those that training began with: they have to be estimated again for the plan.
    """
    with torch.no_grad():
        dense = weights_for(state, graph, plan)
    return {name: dense[graph.aliases.get(name, name)] for name in model.state_dict()}


def read(given: Mapping[str, float | str], known: Mapping[str, float | str]) -> dict[str, float | str]:
    """The options of a request, completed by defaults.

    Raises:
        ValueError: an option is unknown or of another type; lists all of them.
    """
    faults = [f"{name}: no such option; known: {', '.join(known)}" for name in given if name not in known]
    faults += [
        f"{name}: expected {'text' if isinstance(known[name], str) else 'a number'}, got {value!r}"
        for name, value in given.items()
        if name in known and isinstance(value, str) != isinstance(known[name], str)
    ]
    if faults:
        raise ValueError("options of this learning:\n  " + "\n  ".join(faults))
    return {**known, **given}


def train_supernet(task: Task, net: PruningNet, options: Mapping[str, float | str]) -> Outcome:
    """Train ``net`` at random widths by the task's recipe."""
    space, order = _space(task.graph, str(options["widths"])), _order(task, str(options["order"]))
    changes = {"label_smoothing": options["label_smoothing"], "lr": options["lr"] or task.recipe.lr}
    supernet = Supernet(task.model, net, space, order, seed=task.seed)
    fit(
        supernet,
        task.workload,
        task.workload.train,
        task.recipe.model_copy(update=changes),
        seed=task.seed,
        checkpoint=task.checkpoint,
        compute=task.compute,
        recalibration_images=0,  # of a supernet they are taken for every plan
        report=task.report,
    )
    state = {name: tensor.detach() for name, tensor in net.tensors().items()}
    return Outcome(state, order, int(supernet.images))


def _space(graph: ChannelGraph, widths: str) -> SearchSpace:
    """The widths that are drawn.

    Raises:
        ValueError: ``widths`` names a group that does not exist, or widths that it cannot have.
    """
    if not widths:
        return scaled_space(graph)
    full = PruningPlan.full(graph.groups)
    allowed = {name: tuple(sorted(map(int, own))) for name, own in json.loads(widths).items()}
    faults = [n for n, own in allowed.items() if n not in full.sizes or not 1 <= own[0] <= own[-1] <= full.sizes[n]]
    if faults:
        raise ValueError(f"widths: {faults} are no groups of the network, or have fewer channels than the widths say")
    return SearchSpace({name: full.sizes[name] for name in allowed}, allowed, full)


def _order(task: Task, order: str) -> dict[str, FloatArray]:
    """Which channels stay: group -> shape ``(size,)``, higher = keep.

    Raises:
        ValueError: ``order`` is neither ``leading`` nor ``l1``.
    """
    if order == "l1":
        return channel_saliency(task.model, task.graph, "l1")
    if order != "leading":
        raise ValueError(f"order must be 'leading' or 'l1', got {order!r}")
    return {group.name: -np.arange(group.size, dtype=np.float64) for group in task.graph.groups}
