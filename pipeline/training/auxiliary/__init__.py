"""Trainings that learn something about channels, one kind per module (``AuxiliaryTraining`` requests name them).

A kind is a module with ``train(task) -> Outcome``. A kind whose weights depend on the plan (a supernet) also has
``weights(model, graph, state, plan)``: dense-shaped weights for one plan, made from ``Outcome.state``; the evaluator
re-estimates batch-norm statistics for every plan of such a base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.device_profiles.shelf import Shelf
from secateur.pipeline.config.schema import FinetuneSection
from secateur.pipeline.progress import Report
from secateur.pipeline.workloads import Workload
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.search.protocol import FloatArray


@dataclass(frozen=True)
class Task:
    """What an auxiliary training is given.

    Args:
        model: a network of the dense shapes with the weights to begin with, on ``compute``; may be trained in place.
        graph: its channel groups.
        workload: images, loss and metric; only ``workload.train`` may be read.
        recipe: learning rate, batch size and so on, with the request's ``epochs``.
        seed: of every random choice.
        compute: where to train.
        checkpoint: file for ``secateur.pipeline.training.loop.fit`` to resume from.
        report: told (step, steps, note) as it goes.
        options: of the request.
    """

    model: nn.Module
    graph: ChannelGraph
    workload: Workload
    recipe: FinetuneSection
    seed: int
    compute: torch.device
    checkpoint: Path
    report: Report
    options: Mapping[str, float | str]


@dataclass(frozen=True)
class Outcome:
    """What was learned.

    Args:
        state: tensors that are saved under the new base's name: dense-shaped weights under the names of the model's
            state dict, or whatever the kind's ``weights`` makes weights from.
        scores: group name -> shape ``(size,)``.
        images: training images passed forward and backward.
    """

    state: Mapping[str, Tensor]
    scores: Mapping[str, FloatArray] = field(default_factory=dict)
    images: int = 0


TRAININGS = Shelf(__name__, "auxiliary training", ("train",))
"""Every kind, named as its module."""
