"""The L1 control: one keep ratio for every group, the most salient channels stay.

Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017, arXiv 1608.08710), with the same ratio everywhere. Every
other method has to beat it at equal MACs and an equal fine-tuning budget, so it is filled up to the target (our
choice): behind the largest ratio within it, groups take one step more where it fits, the ones that keep most first.

Least budget: 1 evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.landing import per_mean, settle
from secateur.pruning.search.protocol import Candidate, FloatArray, Goal, Problem, Strategy
from secateur.pruning.search.support import Limit, SearchError, best_first, bisect, evaluate, limit_of, meet, score


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
        plans = [problem.space.decode(_widths(problem, ratio), saliency) for ratio in options.keep_ratios or ()]
    else:
        plans = [(yield from meet(problem, limit, lambda within: filled(problem, within, saliency)))]
    candidates = [Candidate(i, plan, "uniform") for i, plan in enumerate(plans)]
    evaluations = yield from evaluate(candidates, latency=True, last=True)
    return best_first(problem, candidates, evaluations)


def filled(problem: Problem, limit: Limit, saliency: Mapping[str, FloatArray]) -> PruningPlan:
    """The plan of the largest keep ratio within a limit, filled up; no group is more than one step wider.

    Args:
        limit: the smallest plan of the space meets it.
        saliency: group -> shape ``(size,)``, higher = keep.
    """
    space = problem.space
    widths = _widths(problem, bisect(limit, lambda ratio: _widths(problem, ratio), meets=0.0, fails=1.0))
    steps = {n: tuple(dict.fromkeys((w, space.above(n, w)))) for n, w in zip(space.names, widths, strict=True)}
    narrow = replace(problem, space=replace(space, allowed=steps))
    return settle(narrow, limit, space.decode(widths, saliency), per_mean(saliency), per_cost=False).plan


def _widths(problem: Problem, ratio: float) -> list[int]:
    """Allowed width per group, shape ``(groups,)``, nearest to one keep ratio."""
    space = problem.space
    return [space.snap(name, ratio * space.sizes[name]) for name in space.names]
