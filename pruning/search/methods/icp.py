"""ICP: cluster the channels of the current network, cut a little, distil from the unpruned one, repeat.

The follow-up of ACP by the same group, "Iterative clustering pruning for convolutional neural networks"
(Knowledge-Based Systems 2023)::

    net <- pretrained
    repeat until the target is met:
        cluster each group's channels by their mean feature maps in net; width = clusters + noise points
        net <- distil(cut(net)), taught by the unpruned network

Distances, clusters and radius are those of ACP. The source distils with temperature 20 and weight 0.3; here both are
those of the run file.

Our choices: a round's radius is found by bisection so that equal factors of the cost lead to the target in ``rounds``
rounds; no group loses more than ``max_cut`` of its channels in one; of each cluster the medoid stays, then the largest
L1 norms; after a failed training the next round cuts half as much.

Least budget: 1 evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar

import numpy as np

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.methods.clustering import (
    Clusterer,
    calibrate,
    cluster,
    num_kept,
    preferring,
    representatives,
)
from secateur.pruning.search.protocol import (
    Answer,
    Candidate,
    Entry,
    FineTuned,
    Goal,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import Limit, SearchError, check_ranges, evaluate, fine_tune, limit_of, meet, score

FAILURES = 4
"""Failed trainings in a row after which the search ends."""


@dataclass(frozen=True)
class Options:
    """Options of ICP.

    Args:
        rounds: rounds in which the target is to be reached (ours; authors: not known, about 3-5). More are added where
            ``max_cut`` holds a round back. With ``epsilon``: the most there are.
        epsilon: radius of the clusters in every round, in cosine distance 0..2 (authors; SSD: 0.002-0.005). None = what
            each round's share of the target needs (ours).
        max_cut: fraction in 0..1 of a group's channels that one round removes at most (ours).
        clusterer: ``dbscan`` (authors), ``agglomerative`` or ``dbs``.
        min_samples: of DBSCAN in the unpruned network (authors: 5); fewer channels that are alike count as noise. It
            falls with the share of a group's channels that is left, to 2, so that what ``max_cut`` leaves of a cluster
            is still one (ours).
        images: training images the feature maps are averaged over (authors: 200).
        finetune_epochs: of distillation after each cut; 0 = none (authors: about 200; ours 30).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rounds: int = 4
    epsilon: float | None = None
    max_cut: float = 0.5
    clusterer: Clusterer = "dbscan"
    min_samples: int = 5
    images: int = 200
    finetune_epochs: float = 30

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("rounds", "min_samples", "images"), (1.0, math.inf))
        check_ranges(self, **counts, epsilon=(0, 2), max_cut=(0, 1), finetune_epochs=(0, math.inf))


def search(problem: Problem, options: Options) -> Strategy:
    """Cluster, cut, distil until the target is met; the archive holds the network of every round, in order.

    With ``epsilon`` it also ends when no channels are alike any more, or after ``rounds`` rounds.

    Raises:
        SearchError: the target is out of reach, neither ``epsilon`` nor a target is given, or no round's network could
            be evaluated.
    """
    if options.epsilon is None and problem.goal == Goal():
        raise SearchError("icp needs epsilon (for example 0.03) or a search.target; neither is set")
    limit = None if problem.goal == Goal() else (yield from limit_of(problem))
    now = Candidate(-1, problem.space.full, "unpruned")
    archive: list[Entry] = []
    failures, missed, reason = 0, 0.0, "no channels are alike; raise epsilon"
    for id_ in count():
        if failures == FAILURES or (options.epsilon is not None and len(archive) == options.rounds):
            break
        plan = yield from cut(problem, options, now, limit, missed, failures)
        if plan == now.plan:
            break
        candidate = Candidate(id_, plan, "cluster", (now.id,) if archive else (), now.base)
        tuned = yield from _tune(candidate, options)
        if tuned.evaluation.status != "ok" or math.isnan(problem.reward(tuned.evaluation)):
            failures, reason = failures + 1, tuned.evaluation.reason or "its reward is NaN"
            continue
        now, failures = replace(candidate, base=tuned.base), 0
        archive.append(Entry(now, tuned.evaluation))
        if problem.goal.met(tuned.evaluation, problem.reference):
            break
        if problem.goal.latency_ratio is not None:
            missed = tuned.evaluation["latency_ratio"] - problem.goal.latency_ratio
    if not archive:
        raise SearchError(f"icp found no network that could be evaluated: {reason}")
    return tuple(archive)


def cut(
    problem: Problem, options: Options, now: Candidate, limit: Limit | None, missed: float, failures: int
) -> Generator[Request, Answer, PruningPlan]:
    """The plan of one round: clusters of the current network's channels, one channel of each before all others.

    Args:
        now: the current network.
        missed: measured latency ratio less the target's.
        failures: trainings that failed since ``now`` was found.
    """
    space, names, n = problem.space, problem.space.names, now.plan.widths
    distance = yield from score("feature_distance", now.base, now.plan, images=options.images)
    norms = yield from score("l1", now.base, now.plan)
    alive = {name: np.array(now.plan.kept[name]) for name in names}
    inside = {name: distance[name][np.ix_(alive[name], alive[name])] for name in names}
    samples = {
        m: max(min(2, options.min_samples), math.ceil(options.min_samples * n[m] / space.sizes[m])) for m in names
    }
    clusters = {m: cluster(options.clusterer, inside[m], problem.rng, samples[m]) for m in names}
    floors = {m: _floor(problem, m, n[m], options.max_cut / 2**failures) for m in names}

    def widths(radius: float) -> list[int]:
        return [max(floors[m], space.snap(m, num_kept(clusters[m].at(radius)))) for m in names]

    def at(radius: float) -> PruningPlan:
        kept = {}
        for name, width in zip(names, widths(radius), strict=True):
            own = norms[name][alive[name]]
            first = preferring(representatives(clusters[name].at(radius), inside[name], own), own)
            kept[name] = np.sort(alive[name][np.argsort(-first, kind="stable")[:width]])
        return now.plan.replace(kept)

    def within(bound: Limit) -> PruningPlan:
        radius = calibrate(clusters, bound, widths)
        return at(radius if options.epsilon is None else min(radius, options.epsilon))

    if limit is None:
        assert options.epsilon is not None
        return at(options.epsilon)
    bound = _bound(problem, options, limit, limit.of(space.encode(now.plan)), missed, failures)
    if bound == limit.bound:
        return (yield from meet(problem, limit, within))
    return within(replace(limit, bound=bound))


def _bound(problem: Problem, options: Options, limit: Limit, cost: float, missed: float, failures: int) -> float:
    """Cost ratio a round is to reach: equal factors down to the target; below it by what was missed when measured."""
    if cost <= limit.bound:
        return max(limit.of(problem.space.encode(problem.space.smallest())), cost - max(missed, 0.0))
    share = 2.0**-failures * (1.0 if options.epsilon is not None else 1 / options.rounds)
    return max(limit.bound, float(cost * limit.bound**share))


def _floor(problem: Problem, name: str, width: int, max_cut: float) -> int:
    """The narrowest a group may get in one round: ``max_cut`` of its channels less, or one step of the space."""
    space = problem.space
    least = min(w for w in space.allowed[name] if w >= (1 - max_cut) * width - 1e-9)
    return min(least, space.below(name, width))


def _tune(candidate: Candidate, options: Options) -> Generator[Request, Answer, FineTuned]:
    """The network distilled from the unpruned one; or as it is, where no training is wanted."""
    if options.finetune_epochs > 0:
        return (yield from fine_tune(candidate, options.finetune_epochs, distill=True))
    (evaluation,) = yield from evaluate([candidate], latency=True)
    return FineTuned(candidate.base, evaluation)
