"""What candidates are cut from and judged by: one trained, unpruned network with its channels and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from secateur.pipeline.training.lesson import move
from secateur.pipeline.workloads import Workload
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan
from secateur.pruning.weights import inherit

CPU = torch.device("cpu")
REMEMBERED = 512
"""Plans whose MACs are kept."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """The unpruned network of an evaluator.

    Args:
        model: trained; brought to ``compute`` and into eval mode, otherwise left as it is.
        graph: its channel groups.
        workload: images, loss and metric.
        seed: of random weights, of training, and of the training images that saliencies look at.
        compute: where networks are trained and evaluated.
        compute_count: how many processes fine-tune together.
    """

    model: nn.Module
    graph: ChannelGraph
    workload: Workload
    seed: int = 0
    compute: torch.device = CPU
    compute_count: int = 1

    def __post_init__(self) -> None:
        self.model.to(self.compute).eval()

    @cached_property
    def full(self) -> PruningPlan:
        """The plan that keeps every channel."""
        return PruningPlan.full(self.graph.groups)

    def macs(self, plan: PruningPlan) -> int:
        """MACs of a pruned network at batch 1; those of the last few hundred plans are remembered."""
        if plan.digest not in self._macs:
            if len(self._macs) >= REMEMBERED:
                self._macs.clear()
            self._macs[plan.digest] = int(cost(self.graph, plan).macs)
        return self._macs[plan.digest]

    @cached_property
    def _macs(self) -> dict[str, int]:
        return {}

    def cut(self, plan: PruningPlan, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The pruned network, on ``compute``, in eval mode.

        Args:
            state: dense-shaped weights to cut from; None = the network's own.
        """
        return move(inherit(self.model, self.graph, plan, state), self.compute).eval()

    def fresh(self) -> nn.Module:
        """The unpruned network with random weights, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.workload.fresh_model()
