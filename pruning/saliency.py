"""How much each channel matters: criteria over the weights that produce it, and plans that keep the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pruning.channels import ChannelGraph
from pruning.plan import ChannelGroup, Member, PruningPlan
from pruning.tracer import tensors_of

FloatArray = npt.NDArray[np.float64]


def l1(weight: Tensor) -> Tensor:
    """Sum of magnitudes of each row, shape ``(rows, k) -> (rows,)`` (Li et al., ICLR 2017)."""
    return weight.abs().sum(dim=1)


def l2(weight: Tensor) -> Tensor:
    """Euclidean norm of each row, shape ``(rows, k) -> (rows,)``."""
    return weight.square().sum(dim=1).sqrt()


CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1, "l2": l2}
"""Criteria of a channel's own weights, one row per channel; ``random`` is known besides."""


def producers(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """Members whose weights compute the group's channels: matrices and kernels, else whatever carries them."""
    tensors = tensors_of(model)[0]
    carriers = [m for m in group.members if not m.reads and isinstance(tensors[m.tensor], nn.Parameter)]
    return [m for m in carriers if tensors[m.tensor].ndim > 1] or carriers


def channel_saliency(model: nn.Module, graph: ChannelGraph, criterion: str, seed: int = 0) -> dict[str, FloatArray]:
    """Score of every channel, summed over the tensors that produce it.

    Args:
        model: the traced model.
        graph: its channel groups.
        criterion: a name in ``CRITERIA``, or ``random``.
        seed: of the random criterion.

    Returns:
        Group name -> shape ``(size,)``, higher = keep.

    Raises:
        ValueError: the criterion is unknown; lists the known ones.
    """
    if criterion == "random":
        rng = np.random.default_rng(seed)
        return {group.name: rng.random(group.size) for group in graph.groups}
    if criterion not in CRITERIA:
        raise ValueError(f"unknown saliency criterion {criterion!r}; known: {sorted([*CRITERIA, 'random'])}")
    score, tensors = CRITERIA[criterion], tensors_of(model)[0]
    return {
        group.name: np.sum([_scores(tensors[m.tensor], m, score) for m in producers(model, group)], axis=0)
        for group in graph.groups
    }


def _scores(tensor: Tensor, member: Member, score: Callable[[Tensor], Tensor]) -> FloatArray:
    rows = tensor.detach().movedim(member.dim, 0)[torch.from_numpy(member.index).to(tensor.device)]
    scores: FloatArray = score(rows.reshape(len(member.index), -1).double()).cpu().numpy()
    return scores


def uniform_plan(
    graph: ChannelGraph,
    keep_ratio: float,
    model: nn.Module | None = None,
    saliency: Literal["l1", "l2", "random"] = "l1",
    seed: int = 0,
) -> PruningPlan:
    """Keep the same share of every group: its ``max(1, round(keep_ratio * size))`` most salient channels.

    Args:
        graph: the traced network.
        keep_ratio: kept / width, in (0, 1].
        model: the traced model; needed unless the saliency is random.
        saliency: criterion of ``channel_saliency``.
        seed: of the random criterion.

    Raises:
        ValueError: the ratio is out of range, the criterion unknown, or the model missing.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")
    if model is None and saliency != "random":
        raise ValueError(f"saliency {saliency!r} is computed from weights: pass model=, or saliency='random'")
    scores = channel_saliency(model if model is not None else nn.Identity(), graph, saliency, seed)
    kept = {}
    for group in graph.groups:
        width = max(1, round(keep_ratio * group.size))
        kept[group.name] = sorted(np.argsort(-scores[group.name], kind="stable")[:width].tolist())
    return PruningPlan.full(graph.groups).replace(kept)
