"""The random control: widths drawn uniformly from the allowed ones, inside the target's window.

Random search is the yardstick of Li and Talwalkar (UAI 2019, arXiv 1902.07638); rejecting the draws outside a MACs
window follows MetaPruning (ICCV 2019, arXiv 1903.10258). A plan of the window is brought to the target itself, so that
plans compare (our choice).

Least budget: 1 evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.pruning.search.landing import per_mean, settle
from secateur.pruning.search.protocol import BudgetSpent, Candidate, Evaluation, Goal, Problem, Strategy
from secateur.pruning.search.support import Limit, best_first, check_ranges, evaluate, limit_of, remaining, score

CHUNK = 32
"""Plans drawn at once; part of what a seed finds."""


@dataclass(frozen=True)
class Options:
    """Options of random search.

    Args:
        num_plans: plans to evaluate (our choice).
        tolerance: width of the window below the target, as a fraction of the target, in 0..1: a draw is taken if its
            MACs (or predicted latency) lie in [target * (1 - tolerance), target], and filled up to the target. Without
            a target every draw is taken.
        max_draws: draws per plan; where none lies in the window, the nearest is brought there (our choice).
        saliency: which channels stay: ``random``, or a criterion that ranks them (``l1`` ...).
        batch: plans asked for in one request; does not change what is found.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    num_plans: int = 100
    tolerance: float = 0.05
    max_draws: int = 1024
    saliency: str = "random"
    batch: int = 10

    def __post_init__(self) -> None:
        check_ranges(self, num_plans=(1, math.inf), tolerance=(0, 1), max_draws=(1, math.inf), batch=(1, math.inf))


def search(problem: Problem, options: Options) -> Strategy:
    """Draw every plan first, bring it to the target, evaluate with latency; best reward first.

    Raises:
        SearchError: the target is out of reach.
    """
    space, rng = problem.space, problem.rng
    limit = None if problem.goal == Goal() else (yield from limit_of(problem))
    ranking = None if options.saliency == "random" else (yield from score(options.saliency))
    left, candidates = (yield from remaining()), []
    for i in range(int(min(options.num_plans, left.evaluations + 1))):
        widths = _draw(problem, options, limit)
        saliency = ranking or {name: rng.random(size) for name, size in space.sizes.items()}
        plan, share = space.decode(widths, saliency), 0.0
        if limit is not None:
            settled = settle(problem, limit, plan, per_mean(saliency), per_cost=False)
            plan, share = settled.plan, settled.projected_share
        candidates.append(Candidate(i, plan, "random", projected_share=share))
    evaluations: list[Evaluation] = []
    for start in range(0, len(candidates), options.batch):
        batch = candidates[start : start + options.batch]
        try:
            evaluations += yield from evaluate(batch, latency=True)
        except BudgetSpent:
            evaluations += yield from evaluate(batch[:1], latency=True, last=True)
            break
    return best_first(problem, candidates[: len(evaluations)], evaluations)


def _draw(problem: Problem, options: Options, limit: Limit | None) -> list[int]:
    """One width vector, shape ``(groups,)``, whose cost lies in the window; the nearest one where none does."""
    columns = [problem.space.allowed[name] for name in problem.space.names]
    nearest, distance = [widths[0] for widths in columns], math.inf
    for _ in range(0, options.max_draws, CHUNK):
        drawn = np.stack([problem.rng.choice(widths, CHUNK) for widths in columns], axis=1)
        if limit is None:
            return [int(width) for width in drawn[0]]
        costs = limit.ratios(drawn)
        inside = (costs >= limit.bound * (1 - options.tolerance)) & (costs <= limit.bound)
        if inside.any():
            return [int(width) for width in drawn[int(np.argmax(inside))]]
        best = int(np.argmin(np.abs(costs - limit.bound)))
        if abs(costs[best] - limit.bound) < distance:
            nearest, distance = [int(w) for w in drawn[best]], float(abs(costs[best] - limit.bound))
    return nearest
