"""What a pruned network is and how to look for one.

Names are imported on first use, so that ``secateur.pruning.plan`` and ``secateur.pruning.search`` need no torch.
"""

from __future__ import annotations

if __name__ != "secateur.pruning":  # found by its folder: it would be a second copy of every class
    raise ImportError("pruning is imported as secateur.pruning")

from typing import TYPE_CHECKING

from secateur.device_profiles.first_use import import_on_first_use

if TYPE_CHECKING:
    from secateur.pruning.channels import ChannelGraph as ChannelGraph
    from secateur.pruning.channels import Frozen as Frozen
    from secateur.pruning.cost import Cost as Cost
    from secateur.pruning.cost import Costs as Costs
    from secateur.pruning.cost import cost as cost
    from secateur.pruning.cost import costs as costs
    from secateur.pruning.cost import count as count
    from secateur.pruning.plan import ChannelGroup as ChannelGroup
    from secateur.pruning.plan import Member as Member
    from secateur.pruning.plan import PlanError as PlanError
    from secateur.pruning.plan import PruningPlan as PruningPlan
    from secateur.pruning.plan import SearchSpace as SearchSpace
    from secateur.pruning.saliency import channel_saliency as channel_saliency
    from secateur.pruning.saliency import uniform_plan as uniform_plan
    from secateur.pruning.surgery import Certificate as Certificate
    from secateur.pruning.surgery import certify as certify
    from secateur.pruning.surgery import load_pruned as load_pruned
    from secateur.pruning.surgery import prune as prune
    from secateur.pruning.surgery import save_pruned as save_pruned
    from secateur.pruning.surgery import scatter as scatter
    from secateur.pruning.trace import trace as trace
    from secateur.pruning.tracer import PruningError as PruningError
    from secateur.pruning.weights import inherit as inherit

__all__ = import_on_first_use(
    __name__,
    {
        "plan": ("ChannelGroup", "Member", "PlanError", "PruningPlan", "SearchSpace"),
        "channels": ("ChannelGraph", "Frozen"),
        "cost": ("Cost", "Costs", "cost", "costs", "count"),
        "saliency": ("channel_saliency", "uniform_plan"),
        "surgery": ("Certificate", "certify", "load_pruned", "prune", "save_pruned", "scatter"),
        "trace": ("trace",),
        "tracer": ("PruningError",),
        "weights": ("inherit",),
    },
)
