"""What a pruned network is and how to look for one.

Names are imported on first use, so that ``pruning.plan`` and ``pruning.search`` need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from device_profiles.first_use import import_on_first_use

if TYPE_CHECKING:
    from pruning.channels import ChannelGraph as ChannelGraph
    from pruning.channels import Frozen as Frozen
    from pruning.cost import Cost as Cost
    from pruning.cost import Costs as Costs
    from pruning.cost import cost as cost
    from pruning.cost import costs as costs
    from pruning.cost import count as count
    from pruning.plan import ChannelGroup as ChannelGroup
    from pruning.plan import Member as Member
    from pruning.plan import PlanError as PlanError
    from pruning.plan import PruningPlan as PruningPlan
    from pruning.plan import SearchSpace as SearchSpace
    from pruning.saliency import channel_saliency as channel_saliency
    from pruning.saliency import uniform_plan as uniform_plan
    from pruning.surgery import Certificate as Certificate
    from pruning.surgery import certify as certify
    from pruning.surgery import load_pruned as load_pruned
    from pruning.surgery import prune as prune
    from pruning.surgery import save_pruned as save_pruned
    from pruning.surgery import scatter as scatter
    from pruning.trace import trace as trace
    from pruning.tracer import PruningError as PruningError
    from pruning.weights import inherit as inherit

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
