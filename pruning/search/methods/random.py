"""The random control: widths drawn uniformly from the allowed ones, inside the target's window.

Random search is the yardstick of Li and Talwalkar (UAI 2019, arXiv 1902.07638); rejecting the draws outside a MACs
window follows MetaPruning (ICCV 2019, arXiv 1903.10258).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from secateur.pruning.search.protocol import Candidate, Evaluation, Goal, Problem, Strategy
from secateur.pruning.search.support import Limit, SearchError, best_first, check_ranges, evaluate, limit_of, score


@dataclass(frozen=True)
class Options:
    """Options of random search.

    Args:
        num_plans: plans to evaluate (our choice).
        tolerance: width of the window below the target, as a fraction of the target, in 0..1: a plan is evaluated if
            its MACs (or predicted latency) lie in [target * (1 - tolerance), target]. Without a target every draw is
            evaluated.
        max_draws: draws per plan before the window counts as out of reach (our choice).
        saliency: which channels stay: ``random``, or a criterion that ranks them (``l1`` ...).
        batch: plans asked for in one request; does not change what is found.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    num_plans: int = 100
    tolerance: float = 0.05
    max_draws: int = 10_000
    saliency: str = "random"
    batch: int = 10

    def __post_init__(self) -> None:
        check_ranges(self, num_plans=(1, math.inf), tolerance=(0, 1), max_draws=(1, math.inf), batch=(1, math.inf))


def search(problem: Problem, options: Options) -> Strategy:
    """Draw every plan first (an empty window costs no evaluation), evaluate with latency; best reward first.

    Raises:
        SearchError: the target is out of reach, or too few draws fall into the window.
    """
    space, rng = problem.space, problem.rng
    limit = None if problem.goal == Goal() else (yield from limit_of(problem))
    widths = [_draw(problem, options, limit) for _ in range(options.num_plans)]
    ranking = None if options.saliency == "random" else (yield from score(options.saliency))
    candidates = []
    for i, drawn in enumerate(widths):
        saliency = ranking or {name: rng.random(size) for name, size in space.sizes.items()}
        candidates.append(Candidate(i, space.decode(drawn, saliency), "random"))
    evaluations: list[Evaluation] = []
    for start in range(0, len(candidates), options.batch):
        evaluations += yield from evaluate(candidates[start : start + options.batch], latency=True)
    return best_first(problem, candidates, evaluations)


def _draw(problem: Problem, options: Options, limit: Limit | None) -> list[int]:
    """One width vector, shape ``(groups,)``, whose cost lies in the window."""
    if limit is None:
        return _uniform(problem)
    lowest, seen = limit.bound * (1 - options.tolerance), []
    for _ in range(options.max_draws):
        widths = _uniform(problem)
        seen.append(limit.of(widths))
        if lowest <= seen[-1] <= limit.bound:
            return widths
    raise SearchError(
        f"none of {options.max_draws} uniform draws has a {limit.name} of {lowest:.3f}..{limit.bound:.3f}; they had "
        f"{min(seen):.3f}..{max(seen):.3f}. Widen tolerance, move the target into that range, narrow the space "
        "(min_keep_ratio), or raise max_draws."
    )


def _uniform(problem: Problem) -> list[int]:
    """One allowed width per group, each equally likely."""
    return [int(problem.rng.choice(problem.space.allowed[name])) for name in problem.space.names]
