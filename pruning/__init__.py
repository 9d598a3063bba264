"""What a pruned network is and how to look for one.

Names are imported on first use, so that ``pruning.plan`` and ``pruning.search`` need no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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

_HOME = {
    "plan": ("ChannelGroup", "Member", "PlanError", "PruningPlan", "SearchSpace"),
    "channels": ("ChannelGraph", "Frozen"),
    "cost": ("Cost", "Costs", "costs", "count"),
    "saliency": ("channel_saliency", "uniform_plan"),
    "surgery": ("Certificate", "certify", "load_pruned", "prune", "save_pruned", "scatter"),
    "tracer": ("PruningError",),
    "weights": ("inherit",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE_OF, "cost", "trace"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pruning' has no attribute {name!r}")
    value = getattr(import_module(f"pruning.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Lets ``from pruning import cost, trace`` give the functions, although modules have those names too."""

    @staticmethod
    def _function(name: str) -> property:
        """A function that stands for its module; the import system may bind the module, ``sys.modules`` has it."""
        return property(lambda _: getattr(import_module(f"pruning.{name}"), name), lambda _, _module: None)

    cost, trace = _function("cost"), _function("trace")


sys.modules[__name__].__class__ = _Package
