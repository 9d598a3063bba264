"""The proof that a network is pruned rightly, before anything relies on it."""

from __future__ import annotations

import torch
from torch import nn

from secateur.pipeline.errors import UserError
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import SearchSpace
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.surgery import Certificate, certify, prune


def prove(model: nn.Module, graph: ChannelGraph, space: SearchSpace, example: torch.Tensor, seed: int) -> Certificate:
    """Cut every searched group in half at random and compare with the masked network.

    Args:
        example: shape (n, channels, height, width).
        seed: of what is cut.

    Raises:
        UserError: the pruned network fails or is wrong; the groups cannot be trusted for this model.
    """
    halves = uniform_plan(graph, 0.5, model=model, saliency="random", seed=seed)
    plan = space.full.replace({name: halves.kept[name] for name in space.names})
    certificate = certify(model, prune(model, graph, plan), graph, plan, example)
    if not certificate.ok:
        raise UserError(
            f"this network cannot be pruned safely: {certificate.reason}. "
            f"Freeze the layers concerned with search.frozen.\n{graph.report()}"
        )
    return certificate
