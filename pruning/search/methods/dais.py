"""DAIS: soft switches per channel, learned beside the weights and annealed to keep or remove.

Guan, Liu, Liu, Xu, "DAIS: Automatic Channel Pruning via Differentiable Annealing Indicator Search" (arXiv 2011.02166).
One training finds the plan: every channel is multiplied by its indicator I = sigmoid(alpha / T), weights learn on 70 %
of the training images and alphas on the other 30 %, a term of the expected cost holds the network near its target, and
T falls until indicators are 0 or 1 (``secateur.pipeline.training.auxiliary.indicators``). Then::

    keep the channels with I > 0.5

The source is known to us by its abstract and a re-implementation. Our choices: coupled layers share their indicators,
so no symmetry term is needed; first-order steps; T falls exponentially; alphas begin at the one value at which the
expected cost is the target. Where the kept channels miss the target by more than the band, those with the lowest
indicators go, per cost saved, or those with the highest come back, with widths near to an even cut (``spread``), until
the target is just met: after a short training indicators rank the channels of a group, but Adam's steps, alike for all,
know little of what groups cost. A latency target becomes an expected latency: what each group saves at a width, from a
few measured plans, interpolated and added.

Least budget: 1 evaluation, 0.3 epochs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from secateur.pruning.search.landing import land_on, settle_near
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    Answer,
    Budget,
    Candidate,
    FloatArray,
    Goal,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import (
    Limit,
    SearchError,
    best_first,
    check_ranges,
    check_reachable,
    evaluate,
    limit_of,
    macs_ratios,
    remaining,
    train_auxiliary,
)


@dataclass(frozen=True)
class Options:
    """Options of DAIS.

    Args:
        epochs: of the training with indicators, at most what nine tenths of the budget pay for; each is one pass over
            all training images (ours).
        start: weights it begins with: ``dense`` = the unpruned network's, ``random`` = fresh ones.
        lr: Adam's learning rate for alpha. None = 0.006 (0.001 .. 0.006 suit CIFAR-10), and more where there are so few
            steps that indicators would stay soft.
        cost_weight: weight of ``|log(E cost / target)|`` (ours).
        lasso: weight of the mean indicator (ours).
        band: tolerated distance from the target, as a fraction of it, in 0..1 (ours: 0.05).
        weight_share: fraction in 0..1 of the training images that weights learn on; alphas learn on the rest
            (re-implementation: 0.7).
        coldest: last temperature, the first is 1 (re-implementation: 1/50).
        spread: how far the widths may lie from an even cut, which is one keep ratio for all groups and its square root
            for what several layers read, in 0..1; 0 = the even cut, 1 = anywhere (ours).
        paper_compat: 1 / T grows linearly, as in the re-implementation; the threshold is 0.5, none comes back, and
            widths may lie anywhere.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epochs: float = 30
    start: Literal["dense", "random"] = "dense"
    lr: float | None = None
    cost_weight: float = 1.0
    lasso: float = 0.01
    band: float = 0.05
    weight_share: float = 0.7
    coldest: float = 0.02
    spread: float = 0.25
    paper_compat: bool = False

    def __post_init__(self) -> None:
        positive, weight = (1e-9, math.inf), (0.0, math.inf)
        check_ranges(self, epochs=positive, lr=positive, cost_weight=weight, lasso=weight)
        check_ranges(self, spread=(0, 1), band=(0, 0.9), weight_share=(0.01, 0.99), coldest=(1e-6, 1))


def least(problem: Problem, options: Options) -> Budget:
    """One plan, and a hundredth of the training: indicators that a budget leaves soft still rank the channels."""
    return Budget(evaluations=1, epochs=0.01 * options.epochs)


def search(problem: Problem, options: Options) -> Strategy:
    """Learn, keep what is switched on, meet the target, evaluate with latency; an archive of one plan.

    Raises:
        SearchError: no target is set, it is out of reach, the training failed, or the plan could not be evaluated.
    """
    space, target = problem.space, problem.goal
    latency = None
    if target.latency_ratio is not None:
        check_reachable(problem)
        latency = yield from limit_of(replace(problem, goal=Goal(latency_ratio=target.latency_ratio)))
    limit = yield from _limit(problem, latency)
    left = yield from remaining()
    learned = yield from train_auxiliary(
        "indicators",
        min(options.epochs, left.trainable(TRAINING)) or options.epochs,
        RANDOM if options.start == "random" else DENSE,
        groups=json.dumps(space.names),
        macs_ratio=target.macs_ratio or 0.0,
        latency_ratio=target.latency_ratio or 0.0,
        savings=json.dumps({} if latency is None else _savings(problem, latency)),
        band=options.band,
        cost_weight=options.cost_weight,
        lasso=options.lasso,
        lr=options.lr or 0.0,
        weight_share=options.weight_share,
        coldest=options.coldest,
        annealing="harmonic" if options.paper_compat else "exponential",
    )
    if learned.evaluation.status == "failed" or not learned.scores:
        raise SearchError(f"dais learned no indicators: {learned.evaluation.reason or 'the training gave no scores'}")
    scores = {name: np.nan_to_num(learned.scores[name]) for name in space.names}
    switched_on = space.decode(_widths(problem, options, limit, scores), scores)
    candidate = Candidate(0, switched_on, "indicators", (), learned.base)
    if not (options.paper_compat and limit.of(space.encode(switched_on)) <= limit.bound):
        candidate = yield from land_on(problem, limit, candidate, scores)
    candidates = [candidate]
    evaluations = yield from evaluate(candidates, latency=True, last=True)
    return best_first(problem, candidates, evaluations)


def _limit(problem: Problem, latency: Limit | None) -> Generator[Request, Answer, Limit]:
    """The run's target, with the latencies already predicted."""
    if latency is None:
        return (yield from limit_of(problem))
    if problem.goal.macs_ratio is None:
        return latency
    macs, predicted, relative = macs_ratios(problem), latency.ratios, latency.bound / problem.goal.macs_ratio
    return replace(latency, ratios=lambda widths: np.maximum(predicted(widths), macs(widths) * relative))


TRAINING = 0.9
"""Share of the budget that the training may spend."""
SAVINGS_POINTS = 9
"""Widths per group at which the predicted latency is handed to the training."""


def _savings(problem: Problem, latency: Limit) -> dict[str, tuple[list[int], list[float]]]:
    """Group -> some allowed widths, increasing, and the share of the unpruned latency that each saves."""
    space, table = problem.space, {}
    for column, name in enumerate(space.names):
        allowed = np.array(space.allowed[name])
        points = np.unique(np.linspace(0, len(allowed) - 1, SAVINGS_POINTS).round().astype(int))
        widths = np.repeat(space.encode(space.full)[None], len(points), axis=0)
        widths[:, column] = allowed[points]
        table[name] = widths[:, column].tolist(), (1 - latency.ratios(widths)).tolist()
    return table


def _widths(problem: Problem, options: Options, limit: Limit, scores: Mapping[str, FloatArray]) -> list[int]:
    """Width per group of the channels that are switched on: I > 0.5, brought to the target where that misses it by far.

    After a short training indicators are soft, and 0.5 says little; their order is what was learned (our choice).
    """
    space = problem.space
    on = [space.snap(name, int((scores[name] > 0.5).sum())) for name in space.names]
    if options.paper_compat or (1 - options.band) * limit.bound <= limit.of(on) <= limit.bound:
        return on
    settled = settle_near(problem, limit, space.decode(on, scores), scores, options.spread)
    return [int(width) for width in space.encode(settled.plan)]
