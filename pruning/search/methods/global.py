"""The global control: one ranking of all channels, the least salient go until the target is met.

Magnitude pruning with one threshold for the whole network instead of one keep ratio (Blalock et al., "What is the State
of Neural Network Pruning?", MLSys 2020, arXiv 2003.03033, "GlobalMagWeight"), over channels as in Li et al. (ICLR 2017,
arXiv 1608.08710). Raw norms of filters grow with their fan-in, so a global ranking of them mostly ranks layers;
dividing by the group's mean is the usual remedy and our default (the first does not). Compared with ``uniform``, this
control tells what a choice of widths is worth when nothing is searched.

Least budget: 1 evaluation.
"""
# ruff: noqa: N999 - a file is named as the method is in a run file

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.landing import settle
from secateur.pruning.search.protocol import Candidate, FloatArray, Problem, Strategy
from secateur.pruning.search.support import Limit, SearchError, best_first, evaluate, limit_of, meet, score


@dataclass(frozen=True)
class Options:
    """Options of the global control.

    Args:
        criterion: saliency that ranks the channels: ``l1``, ``l2``, ``bn_scale``, ``fpgm``, ``taylor`` ...
        normalise: what makes the groups comparable: their scores are divided by the group's ``mean`` or ``max``;
            ``none`` for criteria that are comparable as they are (``taylor``, ``bn_scale``).
        per_cost: rank by saliency per MACs (or predicted latency) saved instead of by saliency.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    criterion: str = "l1"
    normalise: Literal["mean", "max", "none"] = "mean"
    per_cost: bool = False

    def __post_init__(self) -> None:
        if self.normalise not in SCALES:
            raise ValueError(f"normalise must be one of {sorted(SCALES)}, got {self.normalise!r}")


SCALES: dict[str, Callable[[FloatArray], float]] = {"mean": np.mean, "max": np.max, "none": lambda scores: 1.0}
"""Name -> shape ``(size,)`` to the number a group's scores are divided by."""


def search(problem: Problem, options: Options) -> Strategy:
    """Rank once, cut to the target, evaluate with latency.

    Raises:
        SearchError: no target is set or it is out of reach, or the criterion gives scores that are not finite.
    """
    limit = yield from limit_of(problem)
    scores = yield from score(options.criterion)
    saliency = comparable({name: scores[name] for name in problem.space.names}, options)

    def cut(within: Limit) -> PruningPlan:
        return settle(problem, within, problem.space.full, saliency, per_cost=options.per_cost).plan

    plan = yield from meet(problem, limit, cut)
    candidates = [Candidate(0, plan, "global")]
    return best_first(problem, candidates, (yield from evaluate(candidates, latency=True, last=True)))


def comparable(saliency: Mapping[str, FloatArray], options: Options) -> dict[str, FloatArray]:
    """Scores divided by the scale of their group; a group of zeros stays as it is.

    Raises:
        SearchError: a score is not finite.
    """
    wrong = [name for name, scores in saliency.items() if not np.isfinite(scores).all()]
    if wrong:
        raise SearchError(f"criterion {options.criterion!r} gives scores that are not finite for {wrong}; use another")
    scale = SCALES[options.normalise]
    scales = {name: float(scale(np.abs(scores))) for name, scores in saliency.items()}
    return {name: scores / (scales[name] or 1.0) for name, scores in saliency.items()}
