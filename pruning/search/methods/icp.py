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
rounds; no group loses more than ``max_cut`` of its channels in one. By default that is the fraction of the cost which
the round saves: one radius for all merges a whole layer whose maps are much alike, and takes nothing of the next. The
clusters say how many channels stay: the medoid of each, then the largest L1 norms. (With all noise before them, which
is often weak channels, ResNet-20 was 1.6 percentage points worse at equal widths, after 70 steps of tuning.) After a
failed training the next round cuts half as much. The last cut is brought to the target channel by channel, by L1 norms
relative to their group's mean.

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
from secateur.pruning.search.landing import land_on, per_mean
from secateur.pruning.search.methods.clustering import (
    NOISE,
    Clusterer,
    calibrate,
    cluster,
    num_kept,
    preferring,
    representatives,
)
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    BudgetSpent,
    Candidate,
    Entry,
    FineTuned,
    Goal,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import (
    Limit,
    SearchError,
    check_ranges,
    evaluate,
    fine_tune,
    limit_of,
    meet,
    remaining,
    score,
)

FAILURES = 4
"""Failed trainings in a row after which the search ends."""
TRAINING = 0.95
"""Share of the budget that distillation may take; the rest is for looking and for scoring."""
CLOSE = 1.03
"""Of the target: a round that comes so near goes the rest of the way; a last small one would have nothing to choose."""
MAX_CUT = 0.5
"""The largest fraction of its channels that a group may lose in a round, where ``max_cut`` is not set."""
LEAST_EPOCHS = 0.2
"""Epochs that a round should have; where the budget does not last for them there are fewer rounds."""


@dataclass(frozen=True)
class Options:
    """Options of ICP.

    Args:
        rounds: rounds in which the target is to be reached (ours; authors: not known, about 3-5). More are added where
            ``max_cut`` holds a round back. With ``epsilon``: the most there are.
        epsilon: radius of the clusters in every round, in cosine distance 0..2 (authors; SSD: 0.002-0.005). None = what
            each round's share of the target needs (ours).
        max_cut: fraction in 0..1 of a group's channels that one round removes at most (ours). None = the fraction of
            the cost that the round is to save; half where there is no target.
        noise_first: whether noise stays before what has larger L1 norms, as the medoid of every cluster does.
        clusterer: ``dbscan`` (authors), ``agglomerative`` or ``dbs``.
        min_samples: of DBSCAN in the unpruned network (authors: 5); fewer channels that are alike count as noise. It
            falls with the share of a group's channels that is left, to 2, so that what ``max_cut`` leaves of a cluster
            is still one (ours).
        images: training images the feature maps are averaged over (authors: 200).
        finetune_epochs: of distillation after each cut, at most; 0 = none (authors: about 200; ours 1). A budget is
            spread over the rounds, with fifths of epochs for each; where it is smaller there are fewer rounds.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rounds: int = 4
    epsilon: float | None = None
    max_cut: float | None = None
    noise_first: bool = False
    clusterer: Clusterer = "dbscan"
    min_samples: int = 5
    images: int = 200
    finetune_epochs: float = 1

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("rounds", "min_samples", "images"), (1.0, math.inf))
        check_ranges(self, **counts, epsilon=(0, 2), max_cut=(0, 1), finetune_epochs=(0, math.inf))


def search(problem: Problem, options: Options) -> Strategy:
    """Cluster, cut, distil until the target is met; the archive holds the network of every round, in order.

    With ``epsilon`` it also ends when no channels are alike any more, or after ``rounds`` rounds; where the target is
    not met then, or the budget is spent, the last network is brought there by L1 norms.

    Raises:
        SearchError: the target is out of reach, neither ``epsilon`` nor a target is given, or no round's network could
            be evaluated.
    """
    if options.epsilon is None and problem.goal == Goal():
        raise SearchError("icp needs epsilon (for example 0.03) or a search.target; neither is set")
    course, spent = _Course(problem, options), False
    try:
        yield from course.run()
    except BudgetSpent:
        spent = True
    if course.failures < FAILURES and not course.met:
        yield from course.end()
    if not course.archive:
        if spent:
            raise BudgetSpent
        raise SearchError(f"icp found no network that could be evaluated: {course.reason}")
    return tuple(course.archive)


class _Course:
    """A search on its way.

    Attributes:
        limit: the target; None = there is none.
        now: the current network.
        missed: measured latency ratio less the target's.
        failures: trainings that failed since ``now`` was found, and the last one's ``reason``.
    """

    def __init__(self, problem: Problem, options: Options) -> None:
        self.problem, self.options = problem, options
        self.limit: Limit | None = None
        self.now = Candidate(-1, problem.space.full, "unpruned")
        self.archive: list[Entry] = []
        self.ids = count()
        self.failures, self.missed, self.reason = 0, 0.0, "no channels are alike; raise epsilon"

    @property
    def met(self) -> bool:
        """Whether the current network meets the target."""
        last = self.archive[-1:]
        return any(self.problem.goal.met(entry.evaluation, self.problem.reference) for entry in last)

    def run(self) -> Generator[Request, Answer, None]:
        """Rounds until the target is met, or as many as ``rounds`` says with ``epsilon``."""
        if self.problem.goal != Goal():
            self.limit = yield from limit_of(self.problem)
        most = math.inf if self.options.epsilon is None else self.options.rounds
        while self.failures < FAILURES and len(self.archive) < most:
            rounds, epochs = yield from self.effort()
            plan = yield from cut(self.problem, self.options, self.now, self.limit, self.missed, self.failures, rounds)
            if plan == self.now.plan:
                break
            yield from self.take(plan, epochs)
            if self.met:
                break

    def effort(self) -> Generator[Request, Answer, tuple[int, float]]:
        """Rounds to come, with this one, and its epochs; a small budget is for fewer rounds."""
        left, wanted = (yield from remaining()), self.options.finetune_epochs
        rounds = max(1, int(min(self.options.rounds - len(self.archive), left.evaluations)))
        lasting = left.trainable(TRAINING) * self.problem.reference["macs"] / self.problem.macs(self.now.plan)
        if wanted == 0 or lasting < LEAST_EPOCHS / 2:
            return rounds, 0.0
        rounds = max(1, int(min(rounds, lasting / LEAST_EPOCHS)))
        return rounds, min(wanted, lasting / rounds)

    def take(self, plan: PruningPlan, epochs: float) -> Generator[Request, Answer, None]:
        """The cut network at the target if it is the last one, distilled; the current one from now on if that works."""
        now = self.now
        candidate = Candidate(next(self.ids), plan, "cluster", (now.id,) if self.archive else (), now.base)
        if self.limit is not None and self.missed <= 0 and self.near(self.limit, plan):
            candidate = yield from self.landed(self.limit, candidate)
        tuned = yield from _tune(candidate, epochs)
        if tuned.evaluation.status != "ok" or math.isnan(self.problem.reward(tuned.evaluation)):
            self.failures, self.reason = self.failures + 1, tuned.evaluation.reason or "its reward is NaN"
            return
        self.now, self.failures = replace(candidate, base=tuned.base), 0
        self.archive.append(Entry(self.now, tuned.evaluation))
        if self.problem.goal.latency_ratio is not None:
            self.missed = tuned.evaluation["latency_ratio"] - self.problem.goal.latency_ratio

    def near(self, limit: Limit, plan: PruningPlan) -> bool:
        """Whether a round has come so near to the target that it is the last one."""
        return limit.of(self.problem.space.encode(plan)) <= CLOSE * limit.bound

    def landed(self, limit: Limit, candidate: Candidate) -> Generator[Request, Answer, Candidate]:
        """The network at the target, by the L1 norms of what the weights have."""
        plan = None if self.now.base == DENSE else self.now.plan
        norms = per_mean((yield from score("l1", self.now.base, plan)))
        return (yield from land_on(self.problem, limit, candidate, norms, per_cost=False))

    def end(self) -> Generator[Request, Answer, None]:
        """The current network brought to the target, by the evaluation that is kept back for it."""
        if self.limit is None:
            return
        now = self.now
        candidate = Candidate(next(self.ids), now.plan, "cluster", (now.id,) if self.archive else (), now.base)
        candidate = yield from self.landed(self.limit, candidate)
        (evaluation,) = yield from evaluate([candidate], latency=True, last=True)
        if evaluation.status == "ok":
            self.archive.append(Entry(candidate, evaluation))


def cut(
    problem: Problem,
    options: Options,
    now: Candidate,
    limit: Limit | None,
    missed: float,
    failures: int,
    rounds: int,
) -> Generator[Request, Answer, PruningPlan]:
    """The plan of one round: clusters of the current network's channels, one channel of each before all others.

    Args:
        now: the current network.
        missed: measured latency ratio less the target's.
        failures: trainings that failed since ``now`` was found.
        rounds: in which the target is to be reached, with this one.
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
    cost = math.nan if limit is None else limit.of(space.encode(now.plan))
    aim = math.nan if limit is None else _bound(problem, options, limit, cost, missed, failures, rounds)
    most = _most(options, cost, aim, missed) if options.max_cut is None else options.max_cut / 2**failures
    floors = {m: _floor(problem, m, n[m], most) for m in names}

    def widths(radius: float) -> list[int]:
        return [max(floors[m], space.snap(m, num_kept(clusters[m].at(radius)))) for m in names]

    def at(radius: float) -> PruningPlan:
        kept = {}
        for name, width in zip(names, widths(radius), strict=True):
            own, labels = norms[name][alive[name]], clusters[name].at(radius)
            chosen = representatives(labels, inside[name], own) & (options.noise_first | (labels != NOISE))
            first = preferring(chosen, own)
            kept[name] = np.sort(alive[name][np.argsort(-first, kind="stable")[:width]])
        return now.plan.replace(kept)

    def within(bound: Limit) -> PruningPlan:
        radius = calibrate(clusters, bound, widths)
        return at(radius if options.epsilon is None else min(radius, options.epsilon))

    if limit is None:
        assert options.epsilon is not None
        return at(options.epsilon)
    if aim == limit.bound:
        plan = yield from meet(problem, limit, within)
        if plan != now.plan or missed <= 0:
            return plan
        aim = max(cost - missed, limit.of(space.encode(space.smallest())))  # within when timed, but not once trained
    return within(replace(limit, bound=aim))


def _most(options: Options, cost: float, aim: float, missed: float) -> float:
    """The fraction of its channels that a group may lose in a round which goes from one cost ratio to another."""
    if options.epsilon is not None or math.isnan(cost) or missed > 0:
        return MAX_CUT
    return float(np.clip(1 - aim / cost, 0, MAX_CUT))


def _bound(
    problem: Problem, options: Options, limit: Limit, cost: float, missed: float, failures: int, rounds: int
) -> float:
    """Cost ratio a round is to reach: equal factors down to the target; below it by what was missed when measured."""
    if cost <= limit.bound:
        return max(limit.of(problem.space.encode(problem.space.smallest())), cost - max(missed, 0.0))
    share = 2.0**-failures * (1.0 if options.epsilon is not None else 1 / rounds)
    return max(limit.bound, float(cost * (limit.bound / cost) ** share))


def _floor(problem: Problem, name: str, width: int, max_cut: float) -> int:
    """The narrowest a group may get in one round: ``max_cut`` of its channels less, or one step of the space."""
    space = problem.space
    least = min(w for w in space.allowed[name] if w >= (1 - max_cut) * width - 1e-9)
    return min(least, space.below(name, width))


def _tune(candidate: Candidate, epochs: float) -> Generator[Request, Answer, FineTuned]:
    """The network distilled from the unpruned one; or as it is, where no training is wanted."""
    if epochs > 0:
        return (yield from fine_tune(candidate, epochs, distill=True))
    (evaluation,) = yield from evaluate([candidate], latency=True)
    return FineTuned(candidate.base, evaluation)
