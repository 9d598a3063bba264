"""CPMC: weights on both sides of a channel, MACs and params, in one global ranking without any evaluation.

Yan et al., "Channel Pruning via Multi-Criteria based on Weight Dependency" (IJCNN 2021, arXiv 2011.03240). A channel is
worth what its own filter *and* the next layers' weights that read it weigh; it costs MACs and params. The three
criteria, made comparable across layers, give one ranking; a pretrained network is pruned once and fine-tuned.

Known are these ideas, not the formulas. Ours, for channel k of a group::

    w_k   = mean |own weights| + sum over readers j of mean |W_j[:, k]|, each relative to the mean of its layer
    score = w_k / max of its group * exp(-a f_k - b q_k)

with f and q the MACs and the params that go with the channel, per layer that reads it, each divided by the largest of
all channels. (Without the division a residual stream, which many layers read, costs so much more than all others that
it would vanish: 3 of 16 channels were left.) The globally smallest scores go until the target is met, with widths near
to an even cut (``spread``): factors of f and q shift whole layers against each other, so that in ResNet-20 at half of
the MACs one kept 2 of 16 channels and another all 32. Where a latency
is the target, f is the predicted latency per channel between a group's full and its smallest width, for the latency of
a single channel is mostly zero.

Least budget: 1 evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.landing import settle_near
from secateur.pruning.search.methods.knapsack import at_least
from secateur.pruning.search.protocol import Candidate, FloatArray, Problem, Strategy
from secateur.pruning.search.support import Limit, best_first, check_ranges, evaluate, limit_of, meet, score

CRITERION = "weight_dependency"
"""The saliency w."""


@dataclass(frozen=True)
class Options:
    """Options of CPMC. The paper's weights of the criteria are unknown; 1 and 0.3 are ours.

    Args:
        cost_weight: a, 0 or more: how much the MACs (or the latency) of a channel count against it.
        params_weight: b, 0 or more: how much its params count against it.
        normalise: w is divided by its group's ``max`` or by its group's ``l2`` norm.
        min_keep: kept / width in 0..1 of every group (authors' ratio unknown; ours 0.1).
        spread: how far the widths may lie from an even cut, which is one keep ratio for all groups and its square root
            for what several layers read, in 0..1; 0 = the even cut, 1 = anywhere (ours).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    cost_weight: float = 1.0
    params_weight: float = 0.3
    normalise: Literal["max", "mean", "l2"] = "max"
    min_keep: float = 0.1
    spread: float = 0.25

    def __post_init__(self) -> None:
        check_ranges(self, cost_weight=(0, math.inf), params_weight=(0, math.inf), min_keep=(0, 1), spread=(0, 1))


def search(problem: Problem, options: Options) -> Strategy:
    """Score every channel, rank all of them, cut to the target, evaluate the one plan.

    Raises:
        SearchError: there is no target, it is out of reach with ``min_keep``, or the plan could not be evaluated.
    """
    limit = yield from limit_of(problem)
    problem = at_least(problem, limit, options.min_keep)
    weights = yield from score(CRITERION)
    scores = multi_criteria(problem, options, limit, weights)

    def cut(limit: Limit) -> PruningPlan:
        return settle_near(problem, limit, problem.space.full, scores, options.spread, per_cost=False).plan

    plan = yield from meet(problem, limit, cut)
    candidates = [Candidate(0, plan, "cpmc")]
    evaluations = yield from evaluate(candidates, latency=True, last=True)
    return best_first(problem, candidates, evaluations)


def multi_criteria(
    problem: Problem, options: Options, limit: Limit, weights: Mapping[str, FloatArray]
) -> dict[str, FloatArray]:
    """The score of every channel: group -> shape ``(size,)``, not negative, comparable across groups."""
    space = problem.space
    full, smallest = space.encode(space.full), space.encode(space.smallest())
    fewer = full - np.eye(len(full), dtype=np.int64)  # one row per group, with one channel less
    saved = {name: costs[0] - costs[1:] for name, costs in problem.costs(np.vstack([full, fewer])).items()}
    readers = np.array([max(1, space.readers.get(name, 1)) for name in space.names])
    if limit.name == "macs_ratio":
        f = _of_largest(saved["macs"] / readers)
    else:
        rows = np.repeat(full[None], len(full), axis=0)
        np.fill_diagonal(rows, smallest)
        f = _of_largest((limit.of(full) - limit.ratios(rows)) / np.maximum(1, full - smallest) / readers)
    q = _of_largest(saved["params"] / readers)
    factors = np.exp(-options.cost_weight * f - options.params_weight * q)
    return {
        name: normalised(weights[name], options.normalise) * factor
        for name, factor in zip(space.names, factors, strict=True)
    }


def normalised(values: FloatArray, by: Literal["max", "mean", "l2", "none"]) -> FloatArray:
    """Values of a group, shape ``(size,)``, relative to their largest, their mean or their Euclidean norm."""
    scales = {"max": float(values.max()), "mean": float(values.mean()), "l2": float(np.linalg.norm(values))}
    scale = {**scales, "none": 1.0}[by]
    return values / scale if scale > 0 else values


def _of_largest(costs: FloatArray) -> FloatArray:
    """Shape ``(groups,)``, in 0..1."""
    costs = np.maximum(costs, 0.0)
    return costs / max(float(costs.max()), 1e-300)
