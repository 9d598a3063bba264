"""The L1 control: one keep ratio for every group, the most salient channels stay.

Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017, arXiv 1608.08710), with the same ratio everywhere. Every
other method has to beat it at equal MACs and an equal fine-tuning budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from pruning.plan import PruningPlan
from pruning.search.protocol import Candidate, Problem, Strategy
from pruning.search.support import SearchError, best_first, check_reachable, evaluate, score


@dataclass(frozen=True)
class Options:
    """Options of the uniform control.

    Args:
        keep_ratios: kept / width, each in 0..1; one plan per ratio (0 = the smallest allowed width). None = the largest
            ratio that meets the run's MACs target.
        criterion: saliency that ranks the channels (source: ``l1``).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    keep_ratios: tuple[float, ...] | None = None
    criterion: str = "l1"

    def __post_init__(self) -> None:
        ratios = self.keep_ratios
        if ratios is not None and (not ratios or not all(0 <= ratio <= 1 for ratio in ratios)):
            raise ValueError(f"keep_ratios must be one or more numbers in 0..1, got {ratios}")


def search(problem: Problem, options: Options) -> Strategy:
    """Rank once, cut every group to the same keep ratio, evaluate with latency; best reward first.

    Raises:
        SearchError: the MACs target is out of reach, or neither ``keep_ratios`` nor a MACs target is given.
    """
    space = problem.space
    if options.keep_ratios is None:
        if problem.target.macs_ratio is None:
            raise SearchError(
                "uniform needs keep_ratios (for example [0.75, 0.5]) or a target macs_ratio; neither is set"
            )
        check_reachable(problem)
    saliency = yield from score(options.criterion)

    def cut(ratio: float) -> PruningPlan:
        return space.decode([space.snap(name, ratio * space.sizes[name]) for name in space.names], saliency)

    ratios = options.keep_ratios or (_largest_ratio(problem, cut),)
    candidates = [Candidate(i, cut(ratio), "uniform") for i, ratio in enumerate(ratios)]
    evaluations = yield from evaluate(candidates, latency=True)
    return best_first(problem, candidates, evaluations)


def _largest_ratio(problem: Problem, cut: Callable[[float], PruningPlan]) -> float:
    """The largest keep ratio (to 2^-30) that meets the MACs target: MACs never fall as the ratio grows, so bisect."""
    assert problem.target.macs_ratio is not None
    budget = problem.target.macs_ratio * problem.reference["macs"]
    meets, fails = 0.0, 1.0  # ratio 0 is the smallest plan of the space, which check_reachable has passed
    if problem.macs(cut(fails)) <= budget:
        return fails
    for _ in range(30):
        middle = (meets + fails) / 2
        if problem.macs(cut(middle)) <= budget:
            meets = middle
        else:
            fails = middle
    return meets
