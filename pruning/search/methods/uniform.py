"""The L1 control: one keep ratio for every group, the most salient channels stay.

Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017, arXiv 1608.08710), with the same ratio everywhere. Every
other method has to beat it at equal MACs and an equal fine-tuning budget, so it is filled up to the target (our
choice): behind the largest ratio within it, groups take one step more where it fits, the ones that keep most first.

Least budget: 1 evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.pruning.search.landing import alike, filled
from secateur.pruning.search.protocol import Candidate, Goal, Problem, Strategy
from secateur.pruning.search.support import SearchError, best_first, evaluate, limit_of, meet, score


@dataclass(frozen=True)
class Options:
    """Options of the uniform control.

    Args:
        keep_ratios: kept / width, each in 0..1; one plan per ratio (0 = the smallest allowed width). None = the largest
            ratio that meets the run's target.
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
        SearchError: the target is out of reach, or neither ``keep_ratios`` nor a target is given.
    """
    if options.keep_ratios is None and problem.goal == Goal():
        raise SearchError("uniform needs keep_ratios (for example [0.75, 0.5]) or a search.target; neither is set")
    limit = None if options.keep_ratios is not None else (yield from limit_of(problem))
    saliency = yield from score(options.criterion)
    if limit is None:
        plans = [problem.space.decode(alike(problem, ratio), saliency) for ratio in options.keep_ratios or ()]
    else:
        plans = [(yield from meet(problem, limit, lambda within: filled(problem, within, saliency)))]
    candidates = [Candidate(i, plan, "uniform") for i, plan in enumerate(plans)]
    evaluations = yield from evaluate(candidates, latency=True, last=True)
    return best_first(problem, candidates, evaluations)
