"""Where the weights of a candidate come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.reference import masked_tensors
from secateur.pruning.surgery import check_model, cut, prune, rebuild
from secateur.pruning.tracer import PruningError


def inherit(
    model: nn.Module, graph: ChannelGraph, plan: PruningPlan, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The pruned model with weights cut from the dense model, or from a state dict of its shapes.

    Args:
        model: the traced model; left untouched.
        graph: its channel groups.
        plan: what to keep.
        state: dense-shaped weights (from ``scatter``, a checkpoint); None = the model's own.

    Raises:
        PruningError: ``state`` lacks tensors or has other shapes; names the first ones.
    """
    if state is None:
        return prune(model, graph, plan)
    tensors = check_model(model, graph)
    wrong = [n for n in model.state_dict() if n not in state or (n in tensors and state[n].shape != tensors[n].shape)]
    if wrong:
        raise PruningError(f"the state dict has no dense tensor for {wrong[:5]} ({len(wrong)} in all)")
    slices = graph.slices(plan)
    source = {n: state.get(n, t) for n, t in tensors.items()}
    return rebuild(
        model,
        graph,
        plan,
        {n: cut(t, slices[n]) if n in slices else t.detach().clone() for n, t in source.items()},
    )


def silence(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> None:
    """Zero, in place, everything a plan removes: the model keeps its shapes and computes what the pruned one would.

    (But for operators that normalise over channels, which see the zeros.)
    """
    if plan.is_full:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in masked_tensors(model, graph, plan).items():
            parameters[name].copy_(tensor)
