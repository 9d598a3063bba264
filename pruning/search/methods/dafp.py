"""DAFP: sparse training of batch-norm scales, then a global cut of what scales and next weights let through.

Zhao et al., "Dependency Aware Filter Pruning" (arXiv 2005.02634). A channel matters as far as the next layer listens
to it: its batch-norm scale times the norm of the weights that read it. Training adds a penalty on the scales whose
strength a controller moves, so that a wanted share of them becomes small; then one threshold over the whole network
cuts::

    train with  loss + lambda_t sum |gamma|,   lambda_{t+1} = lambda_t (1 + eta sign(wanted_t - reached_t))
    remove the channels of least |gamma_k| * ||W_next[:, k]||, down to the target

Known are these ideas, not the formulas. Ours: the wanted share grows linearly from 0 to the share of channels that a
uniform cut to the target removes; scores are divided by the mean of their group before the global ranking, so that they
say how much more or less of the next layer's input comes through a channel than through its neighbours (a batch norm
behind that layer undoes any common factor). The Euclidean norm would do so too, but grows with the square root of the
width, and so takes from wide layers. What is worth least per cost saved goes first (``per_cost``). With ``epochs: 0``,
or where the budget does not hold a tenth of the epochs, the scores are those of the pretrained network, and widths stay
near to an even cut (``spread``): such scores of different groups are of one scale, but not of one kind. After sparse
training a channel is small or it is not, and widths go where the small ones are.

Least budget: 1 evaluation, 1 epoch.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.landing import settle_near
from secateur.pruning.search.methods.cpmc import normalised
from secateur.pruning.search.methods.knapsack import at_least
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    Budget,
    BudgetSpent,
    Candidate,
    FloatArray,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import (
    Limit,
    SearchError,
    best_first,
    check_ranges,
    evaluate,
    limit_of,
    meet,
    remaining,
    score,
    train_auxiliary,
)

CRITERION = "bn_dependency"
"""The saliency of networks that are not trained for sparsity."""
TRAINING = 0.9
"""Share of the budget that sparse training may take."""
LEAST_EPOCHS = 0.1
"""Share of the wanted epochs below which sparse training is left out: scales would get small by force alone."""


@dataclass(frozen=True)
class Options:
    """Options of DAFP. The paper's settings are unknown; all defaults are ours.

    Args:
        epochs: of sparse training from the pretrained weights, at most what nine tenths of the budget pay for; 0 =
            none.
        target_sparsity: share in 0..1 of the scales that training makes small; None = the share of channels that a
            uniform cut to the target removes.
        strength: lambda at the beginning.
        rate: eta, in 0..1, relative change of lambda per hundredth of the training.
        threshold: scales of less magnitude count as small.
        normalise: scores are divided by their group's ``mean``, its ``max``, its ``l2`` norm, or not (``none``: one
            threshold for the bare scores).
        min_keep: kept / width in 0..1 of every group.
        spread: how far the widths may lie from an even cut, which is one keep ratio for all groups and its square root
            for what several layers read, in 0..1; 0 = the even cut, 1 = anywhere.
            After sparse training they go where its small scales are.
        per_cost: whether what is worth least per cost saved goes first, and not what is worth least.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epochs: float = 10
    target_sparsity: float | None = None
    strength: float = 1e-4
    rate: float = 0.2
    threshold: float = 0.01
    normalise: Literal["mean", "max", "l2", "none"] = "mean"
    min_keep: float = 0.1
    spread: float = 0.25
    per_cost: bool = True

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("target_sparsity", "rate", "min_keep", "spread"), (0.0, 1.0))
        check_ranges(self, epochs=(0, math.inf), strength=(1e-12, 1.0), threshold=(1e-9, math.inf), **shares)


def least(problem: Problem, options: Options) -> Budget:
    """One plan, and the shortest sparse training."""
    return Budget(evaluations=1, epochs=LEAST_EPOCHS * options.epochs)


def search(problem: Problem, options: Options) -> Strategy:
    """Train sparsely, rank all channels, cut to the target, evaluate the one plan with the trained weights.

    Raises:
        SearchError: there is no target, it is out of reach with ``min_keep``, the sparse training failed, or the plan
            could not be evaluated.
    """
    limit = yield from limit_of(problem)
    problem = at_least(problem, limit, options.min_keep)
    base, learned = yield from _dependency(problem, options, limit)
    scores = {name: normalised(learned[name], options.normalise) for name in problem.space.names}

    spread = options.spread if base == DENSE else 1.0

    def cut(limit: Limit) -> PruningPlan:
        return settle_near(problem, limit, problem.space.full, scores, spread, per_cost=options.per_cost).plan

    plan = yield from meet(problem, limit, cut)
    candidates = [Candidate(0, plan, "dafp", (), base)]
    evaluations = yield from evaluate(candidates, latency=True, last=True)
    return best_first(problem, candidates, evaluations)


def _dependency(
    problem: Problem, options: Options, limit: Limit
) -> Generator[Request, Answer, tuple[str, Mapping[str, FloatArray]]]:
    """The weights to cut from, and the importance of every channel in them."""
    if options.epochs == 0:
        return DENSE, (yield from score(CRITERION))
    wanted, left = options.target_sparsity, (yield from remaining())
    epochs = min(options.epochs, left.trainable(TRAINING))
    if epochs < LEAST_EPOCHS * options.epochs:
        return DENSE, (yield from score(CRITERION))
    try:
        learned = yield from train_auxiliary(
            "sparsity",
            epochs,
            target_sparsity=uniform_sparsity(problem, limit) if wanted is None else wanted,
            strength=options.strength,
            rate=options.rate,
            threshold=options.threshold,
        )
    except BudgetSpent:
        return DENSE, (yield from score(CRITERION))
    if learned.evaluation.status != "ok":
        raise SearchError(
            f"dafp's sparse training failed: {learned.evaluation.reason}. Lower strength, rate or the recipe's lr, or "
            "set epochs: 0 to rank the pretrained network"
        )
    return learned.base, learned.scores


def uniform_sparsity(problem: Problem, limit: Limit) -> float:
    """Share of the channels that goes when every group is cut to the largest ratio (in percent) within the limit."""
    space = problem.space
    for percent in range(100, -1, -1):
        widths = [space.snap(name, percent / 100 * size) for name, size in space.sizes.items()]
        if limit.of(widths) <= limit.bound:
            break
    return 1 - sum(widths) / sum(space.sizes.values())
