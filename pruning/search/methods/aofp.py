"""AOFP: filters go whose removal, in random halves of a shrinking set, least changes the next layer's output.

Ding, Ding, Guo, Han, Yan, "Approximated Oracle Filter Pruning for Destructive CNN Width Optimization" (ICML 2019). The
oracle's importance of a filter is the damage its removal does. It is approximated one layer on, for many filters per
batch, while training goes on. Each target group has a base mask (what is left of it) and a search space S::

    1. per batch: H <- a random half of S; damage t = |O - O'|^2 / |O|^2 of the next layer's output without H;
       every filter of H is charged t
    2. after so many batches: average per filter; granu <- |S| / 2
    3. if the granu-th smallest average < theta: mask those granu filters for good, S <- all that are left
       else if granu > 1: S <- the granu filters with the smallest averages
       else: nothing can be pruned now, S <- all that are left
    4. groups start staggered, weights keep training; stop at the target

Our choices: the damage of an image is relative, the mean is over images; weights train after blocks in which filters
went, not while they are looked at; each mask is evaluated, so that the archive is a curve of accuracy against cost.
Where all groups are stuck above theta and the target is not met, theta grows (``growth``). Where the device restricts
widths, a group goes from one allowed width to another, and halves are never smaller than one such step. The last mask
takes no more filters than the target needs. With a latency target, theta of a group is scaled by the latency that half
of its channels would save, relative to the mean over groups (at least a tenth).

Least budget: 1 evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import count
from typing import ClassVar

import numpy as np

from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    Candidate,
    Evaluation,
    FineTuned,
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
    distort,
    evaluate,
    fine_tune,
    limit_of,
)

Removed = Mapping[str, tuple[int, ...]]
"""Group -> the filters left out in a batch."""


@dataclass(frozen=True)
class Options:
    """Options of AOFP. Its weights must be trained: damage means nothing on random ones.

    Args:
        batches: per decision of a group (authors: 1,000 for CIFAR-10, 400 for LeNet; ours is smaller).
        batch_size: training images per batch (authors: 64).
        threshold: theta, the damage below which filters go (authors: 0.01; 0.05 for LeNet).
        growth: factor of theta whenever all groups are stuck and the target is not met (ours; the authors have none).
        stagger: blocks of batches per decision; group number i begins i mod ``stagger`` blocks late (authors stagger
            their layers too; the number is ours).
        finetune_epochs: epochs after each block in which filters went; 0 = weights stay as they are (authors: training
            goes on all the time, 1.3 epochs of CIFAR-10 per decision).
        include: name patterns (``*``, ``?``) of the groups to prune. The authors prune inner widths of residual blocks
            only: ``["*.conv1"]`` in a ResNet of basic blocks.
        paper_compat: theta is the same for all groups and never grows (the search stops with what is there when all
            groups are stuck), and the last mask may overshoot the target.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    batches: int = 40
    batch_size: int = 64
    threshold: float = 0.01
    growth: float = 2.0
    stagger: int = 4
    finetune_epochs: float = 1.0
    include: tuple[str, ...] = ("*",)
    paper_compat: bool = False

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("batches", "batch_size", "stagger"), (1.0, math.inf))
        check_ranges(self, **counts, threshold=(1e-9, 1e6), growth=(1.01, 1e6), finetune_epochs=(0, math.inf))
        if self.stagger > self.batches:
            raise ValueError(f"stagger ({self.stagger}) must not exceed batches ({self.batches}): a block is a batch")


def search(problem: Problem, options: Options) -> Strategy:
    """Mask until the target is met, or without a target until all groups are stuck; best reward first.

    A masked network that could not be evaluated is left out; its mask stays, and the weights are those before.

    Raises:
        SearchError: the target is out of reach, ``include`` matches no group, no filter could be masked, or no masked
            network could be evaluated.
    """
    space, ids = problem.space, count()
    groups = _groups(problem, options)
    limit = None if problem.goal == Goal() else (yield from limit_of(problem))
    if limit is not None:
        _check_included(problem, limit, groups)
        if limit.name == "latency_ratio" and not options.paper_compat:
            _scale_by_gain(problem, limit, groups)
    theta, plan, base = options.threshold, space.full, DENSE
    parents: tuple[int, ...] = ()
    masked: list[Candidate] = []
    evaluations: list[Evaluation] = []
    for block in count():
        active = [group for group in groups if group.step]
        if not active or theta > MOST_DAMAGE:
            break
        drawn = _draw(problem, options, [group for group in active if group.start <= block])
        damage = yield from distort(plan, drawn, base, options.batch_size)
        for group in active:
            group.charge(drawn, damage)
        plan, before = _decide(problem, options, theta, plan, limit, active), plan
        if plan != before:
            candidate = Candidate(next(ids), plan, "mask", parents, base)
            tuned = yield from _tune(candidate, options)
            masked.append(replace(candidate, base=tuned.base))
            evaluations.append(tuned.evaluation)
            if problem.goal.met(tuned.evaluation, problem.reference):
                break
            if tuned.evaluation.status == "ok":
                base, parents = tuned.base, (candidate.id,)
        elif all(group.stuck for group in active):
            if limit is None or options.paper_compat:
                break
            theta *= options.growth
            for group in active:
                group.stuck = False
    if not masked:
        raise SearchError(
            f"aofp masked no filter: every removal changes the next layer's output by threshold {options.threshold:g} "
            "or more. Raise threshold, or set search.target.macs_ratio so that it grows until the target is met."
        )
    return best_first(problem, masked, evaluations)


MOST_DAMAGE = 1e9
"""A theta above this means that damages are not numbers."""
LEAST_SCALE = 0.1
"""Of theta, for a group whose channels save no latency."""


@dataclass
class Group:
    """What the search knows of one target group.

    Args:
        name: the group.
        space: allowed widths.
        start: the block in which it begins.
        left: shape ``(width,)``, filters that are not masked, increasing.
        S: shape ``(|S|,)``, the filters that are looked at.
        scale: factor of theta.
    """

    name: str
    space: SearchSpace
    start: int
    left: IntArray
    S: IntArray
    scale: float = 1.0
    stuck: bool = False
    """Whether nothing could be pruned at the finest granularity since the last mask or growth of theta."""
    blocks: int = 0
    """Blocks since the last decision."""

    def __post_init__(self) -> None:
        self.restart(self.left)

    def restart(self, S: IntArray) -> None:
        """Look at the filters S, with nothing charged yet."""
        size = self.space.sizes[self.name]
        self.S, self.blocks = np.sort(S), 0
        self.total, self.times = np.zeros(size), np.zeros(size)

    @property
    def step(self) -> int:
        """Filters that have to go for the next allowed width; 0 = the smallest is reached."""
        return len(self.left) - self.space.below(self.name, len(self.left))

    @property
    def granu(self) -> int:
        """Step 2: filters that go, or are looked at, together; at least as many as the device's step."""
        return max(len(self.S) // 2, self.step)

    def charge(self, drawn: Sequence[Removed], damage: Mapping[str, FloatArray]) -> None:
        """Step 1: charge the damage of each batch to the filters that were left out."""
        asked = [batch for batch, removed in enumerate(drawn) if self.name in removed]
        for batch in asked:
            H = list(drawn[batch][self.name])
            self.total[H] += damage[self.name][batch]
            self.times[H] += 1
        self.blocks += bool(asked)

    def decide(self, theta: float) -> IntArray:
        """Steps 2 and 3: the filters to mask, least damage first, or none and a new search space."""
        mean = np.full(len(self.total), np.inf)
        mean[self.times > 0] = self.total[self.times > 0] / self.times[self.times > 0]
        mean = np.where(np.isnan(mean), np.inf, mean)
        ranked, granu = self.S[np.argsort(mean[self.S], kind="stable")], self.granu
        if mean[ranked[granu - 1]] < theta * self.scale:
            return ranked[:granu]
        self.stuck = self.stuck or granu <= self.step
        self.restart(ranked[:granu] if granu > self.step else self.left)
        return ranked[:0]

    def mask(self, gone: IntArray) -> None:
        """Take filters away for good and begin again with the rest."""
        self.left = np.setdiff1d(self.left, gone)
        self.stuck = False
        self.restart(self.left)


def _groups(problem: Problem, options: Options) -> list[Group]:
    space = problem.space
    names = [n for n in space.names if any(fnmatchcase(n, pattern) for pattern in options.include)]
    if not names:
        raise SearchError(f"include {list(options.include)} matches none of the groups {list(space.names)}")
    whole = {name: np.arange(space.sizes[name]) for name in names}
    return [Group(name, space, i % options.stagger, whole[name], whole[name]) for i, name in enumerate(names)]


def _draw(problem: Problem, options: Options, groups: Sequence[Group]) -> list[Removed]:
    """Step 1, for one block: per batch and group, a random half H of S."""

    def half(group: Group) -> tuple[int, ...]:
        return tuple(sorted(problem.rng.choice(group.S, group.granu, replace=False).tolist()))

    return [{group.name: half(group) for group in groups} for _ in range(options.batches // options.stagger)]


def _decide(
    problem: Problem, options: Options, theta: float, plan: PruningPlan, limit: Limit | None, groups: Sequence[Group]
) -> PruningPlan:
    """Decisions of the groups whose batches are complete; none masks any more once the limit is met."""
    met, before = False, plan
    for group in groups:
        if group.blocks < options.stagger or met:
            continue
        ranked = group.decide(theta)
        if len(ranked) == 0:
            continue
        widths = [w for w in problem.space.allowed[group.name] if len(group.left) - len(ranked) <= w < len(group.left)]
        ways = [ranked[: len(group.left) - width] for width in widths]  # the most filters first
        plans = [plan.replace({group.name: np.setdiff1d(group.left, gone)}) for gone in ways]
        chosen = 0
        if limit is not None:
            within = [limit.of(problem.space.encode(p)) <= limit.bound for p in plans]
            met = within[0]
            chosen = max((i for i, ok in enumerate(within) if ok and not options.paper_compat), default=0)
        group.mask(ways[chosen])
        plan = plans[chosen]
    assert plan.is_within(before)
    return plan


def _tune(candidate: Candidate, options: Options) -> Generator[Request, Answer, FineTuned]:
    """Step 4: the masked network trained on; or evaluated as it is, where weights stay."""
    if options.finetune_epochs > 0:
        return (yield from fine_tune(candidate, options.finetune_epochs))
    (evaluation,) = yield from evaluate([candidate], latency=True)
    return FineTuned(candidate.base, evaluation)


def _narrowed(problem: Problem, names: Sequence[str], share: float) -> IntArray:
    """Full widths but for some groups, which keep the allowed width next to a share of theirs; shape ``(groups,)``."""
    space = problem.space
    kept = {name: space.snap(name, share * space.sizes[name]) for name in names}
    return np.array([kept.get(name, space.sizes[name]) for name in space.names], dtype=np.int64)


def _check_included(problem: Problem, limit: Limit, groups: Sequence[Group]) -> None:
    """Check that the target can be reached by the included groups alone.

    Raises:
        SearchError: it cannot.
    """
    smallest = limit.of(_narrowed(problem, [group.name for group in groups], 0))
    if smallest > limit.bound:
        raise SearchError(
            f"target {limit.name} {limit.bound:g} is out of reach of the {len(groups)} included groups: at their "
            f"smallest allowed widths {smallest:.3f} is left. Widen include, or raise the target."
        )


def _scale_by_gain(problem: Problem, limit: Limit, groups: Sequence[Group]) -> None:
    """theta_l = theta * gain_l / mean gain; gain_l is the latency saved by half of the group's channels."""
    gains = np.array([1 - limit.of(_narrowed(problem, [group.name], 0.5)) for group in groups])
    for group, gain in zip(groups, gains, strict=True):
        group.scale = max(LEAST_SCALE, gain / gains.mean()) if gains.mean() > 0 else 1.0
