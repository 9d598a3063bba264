"""Shared weights: one dense set, cut to every width (Slimmable Neural Networks, Yu et al. 2019, arXiv 1812.08928).

The cheap sibling of ``pruning_net``, and the one for large layers: no generators, the answer is an ordinary state dict.
Training and options are those of ``pruning_net`` (``widths``, ``order``, ``label_smoothing``, ``lr``). One batch norm
serves all widths; its statistics are re-estimated for every plan, so the switches of the paper are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from secateur.pipeline.training.auxiliary import Outcome, Task
from secateur.pipeline.training.auxiliary.pruning_net import COMMON, read, train_supernet
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.supernet import PruningNet


def train(task: Task) -> Outcome:
    """Train the dense weights at random widths.

    Raises:
        ValueError: an option is unknown or has a value that means nothing.
        TrainingError: the loss became NaN or infinite.
    """
    options = read(task.options, COMMON)
    return train_supernet(task, PruningNet(task.model, task.graph, max_outputs=0), options)


def weights(model: nn.Module, graph: ChannelGraph, state: Mapping[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    """Dense-shaped state dict: the same for every plan. Batch-norm statistics have to be estimated for the plan."""
    return {name: state[graph.aliases.get(name, name)] for name in model.state_dict()}
