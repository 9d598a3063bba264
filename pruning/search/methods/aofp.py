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
takes no more filters than the target needs. Theta of a group is scaled by the MACs (or the latency) that half of its
channels would save, relative to the mean over groups (at least a tenth).

A budget is spread over up to 8 decisions a group, by equal factors of the cost: what a block has to save and theta does
not allow goes all the same, least damage per cost saved first. Half of the budget is for training, once a decision, as
parts of one course of the learning rate. What is left to do at the end is done by the damage that was seen last. No
group gets much narrower than an even cut to the target leaves it (``spread``): damage is seen one layer on, and a
residual stream, whose channels save the most, is read by all that come.

With minutes of budget it ends about half a point below ``uniform`` (docs/reference/methods.md), probably because few
batches of damage seen one layer on choose the widths.

Least budget: 1 evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar

import numpy as np

from secateur.pruning.plan import IntArray, SearchSpace
from secateur.pruning.search.landing import NEAR, land_on, near_even
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    BudgetSpent,
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
    check_groups,
    check_ranges,
    distort,
    evaluate,
    fine_tune,
    included,
    limit_of,
    remaining,
    score,
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
        lr: learning rate of that training (authors: 0.001); null = the recipe's.
        include: name patterns (``*``, ``?``) of the groups to prune. The authors prune inner widths of residual blocks
            only: ``["*.conv1"]`` in a ResNet of basic blocks.
        spread: how far below an even cut to the target masks may go in a group, in 0..1; 1 = anywhere (ours). The even
            cut is one keep ratio for all groups and its square root for what several layers read.
        paper_compat: theta is the same for all groups and never grows (the search stops with what is there when all
            groups are stuck), masks go anywhere, and the last one may overshoot the target.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    batches: int = 40
    batch_size: int = 64
    threshold: float = 0.01
    growth: float = 2.0
    stagger: int = 4
    finetune_epochs: float = 1.0
    lr: float | None = 1e-3
    include: tuple[str, ...] = ("*",)
    spread: float = 0.25
    paper_compat: bool = False

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("batches", "batch_size", "stagger"), (1.0, math.inf))
        check_ranges(
            self, **counts, threshold=(1e-9, 1e6), lr=(1e-9, 1e3), growth=(1.01, 1e6), finetune_epochs=(0, math.inf)
        )
        check_ranges(self, spread=(0, 1))
        if self.stagger > self.batches:
            raise ValueError(f"stagger ({self.stagger}) must not exceed batches ({self.batches}): a block is a batch")


def search(problem: Problem, options: Options) -> Strategy:
    """Mask until the target is met, or without a target until all groups are stuck; best reward first.

    A masked network that could not be evaluated is left out; its mask stays, and the weights are those before.

    Raises:
        SearchError: the target is out of reach, ``include`` matches no group, no filter could be masked, or no masked
            network could be evaluated.
    """
    course = _Course(problem, options)
    try:
        yield from course.run()
    except BudgetSpent:
        course.spent = True
    if not course.met:
        yield from course.end()
    if not course.masked:
        if course.spent:
            raise BudgetSpent
        raise SearchError(
            f"aofp masked no filter: every removal changes the next layer's output by threshold {options.threshold:g} "
            "or more. Raise threshold, or set search.target.macs_ratio so that it grows until the target is met."
        )
    return best_first(problem, course.masked, course.evaluations)


WAVES = 8
"""Decisions per group that a budget is spread over, if it lasts for so many."""
FEWEST = 3
"""Batches a block, below which there are fewer decisions."""
SLACK = 1.5
"""What a group may be forced to give in one decision, over its even share: so that none pays for the others."""
TRAINING = 0.5
"""Share of the budget that training on may take."""
CLOSE = 1.03
"""Of the target: a mask that comes so near goes the rest of the way; a last small one would have nothing to choose."""
LEAST_EPOCHS = 0.02
"""A training shorter than that is left out."""


class _Course:
    """A search on its way.

    Attributes:
        whole, problem: with all widths, and with those that masks may reach.
        limit: the target; None = there is none.
        theta: the threshold as it has grown.
        plan: what is masked so far.
        base, base_plan, parents: the weights, what they have, and the candidate that they come from.
        schedule: blocks that the budget is spread over; None = it has no end, or it is the authors' loop.
        masked, evaluations: what was evaluated.
    """

    def __init__(self, problem: Problem, options: Options) -> None:
        self.whole = self.problem = problem
        self.options = options
        self.groups = _groups(problem, options)
        self.limit: Limit | None = None
        self.theta, self.base = options.threshold, DENSE
        self.plan = self.base_plan = problem.space.full
        self.parents: tuple[int, ...] = ()
        self.schedule: int | None = None
        self.batches = max(1, options.batches // options.stagger)
        self.ids, self.spent = count(), False
        self.masked: list[Candidate] = []
        self.evaluations: list[Evaluation] = []

    @property
    def met(self) -> bool:
        """Whether a masked network meets the target."""
        return any(self.problem.goal.met(evaluation, self.problem.reference) for evaluation in self.evaluations)

    @property
    def bound(self) -> float | None:
        """The cost ratio that meets the target; None = there is none."""
        return None if self.limit is None else self.limit.bound

    def run(self) -> Generator[Request, Answer, None]:
        """Block after block, until the target is met or nothing can be masked."""
        yield from self.prepare()
        tuned = self.plan
        for block in count():
            active = [group for group in self.groups if group.step]
            if not active or self.theta > MOST_DAMAGE or block == self.schedule:
                break
            yield from self.look(block, active)
            before = self.plan
            met = self.decide(block, active)
            if self.plan != tuned and (met or self.evaluates(block)):
                yield from self.train(block, met=met)
                tuned = self.plan
                if self.met or (met and not self.tightens()):
                    break
            elif self.plan == before and all(group.stuck for group in active) and not self.grows(active):
                break

    def prepare(self) -> Generator[Request, Answer, None]:
        """The target as something to project onto, and each group's scale of theta."""
        if self.problem.goal == Goal():
            return
        self.limit = limit = yield from limit_of(self.problem)
        check_groups(self.problem, limit, [group.name for group in self.groups])
        self.spare(limit)
        if not self.options.paper_compat:
            _scale_by_gain(self.whole, limit, self.groups)

    def spare(self, limit: Limit) -> None:
        """No group may get narrower than the widths near an even cut of the target groups to the limit."""
        if self.options.paper_compat:
            return
        space, names = self.whole.space, [group.name for group in self.groups]
        free = {n: widths if n in names else widths[-1:] for n, widths in space.allowed.items()}
        near = near_even(replace(self.whole, space=replace(space, allowed=free)), limit, self.options.spread).space
        allowed = {n: tuple(w for w in widths if w >= near.allowed[n][0]) for n, widths in free.items()}
        self.problem = replace(self.whole, space=replace(space, allowed=allowed))
        for group in self.groups:
            group.space = self.problem.space

    def tightens(self) -> bool:
        """The limit falls by what a network missed the latency target by when measured; False where it did not."""
        target, measured = self.problem.goal.latency_ratio, self.evaluations[-1]["latency_ratio"]
        if self.limit is None or target is None or not measured > target:
            return False
        space = self.whole.space
        now, least = (self.limit.of(space.encode(plan)) for plan in (self.plan, space.smallest()))
        self.limit = replace(self.limit, bound=max(least, min(now, self.limit.bound) - (measured - target)))
        self.spare(self.limit)
        return now > least

    def look(self, block: int, active: Sequence[Group]) -> Generator[Request, Answer, None]:
        """Step 1, for one block of batches; the first one tells how many blocks the budget lasts for."""
        before = yield from remaining()
        first = block == 0 and min(before.work, before.seconds) < math.inf
        first &= self.limit is not None and not self.options.paper_compat
        looked = [group for group in active if group.start <= block]
        drawn = _draw(self.problem, looked, 1 if first else self.batches)
        damage = yield from distort(self.plan, drawn, self.base, self.options.batch_size)
        for group in looked:
            group.charge(drawn, damage)
        if first:
            self.spread((yield from remaining()).rounds(before))

    def spread(self, batches: float) -> None:
        """Plan the search for a budget that lasts for so many more batches."""
        if math.isinf(batches):
            return
        stagger, wanted = self.options.stagger, self.batches
        batches *= 1 - TRAINING if self.options.finetune_epochs > 0 else 1
        waves = int(np.clip(batches / min(wanted, FEWEST) / stagger - 1, 1, WAVES))
        self.schedule = (waves + 1) * stagger
        self.batches = int(np.clip(batches / self.schedule, 1, wanted))

    def evaluates(self, block: int) -> bool:
        """Whether a block's masks are trained and evaluated: all; where a budget is spread, once a decision."""
        return self.schedule is None or (block + 1) % self.options.stagger == 0 or block + 1 == self.schedule

    def decide(self, block: int, active: Sequence[Group]) -> bool:
        """Steps 2 and 3 for the groups whose batches are complete; whether the limit is met."""
        ready = [group for group in active if group.blocks >= self.options.stagger]
        offers = [(group, group.ranking()) for group in ready]
        refused: list[tuple[Group, Ranking]] = []
        for group, ranking in offers:
            if self.within(self.bound):
                break
            if ranking.damage < self.theta * group.scale:
                self.mask(group, ranking.order, self.bound)
            else:
                refused.append((group, ranking))
        if self.schedule is not None and self.limit is not None:
            blocks = self.schedule - block
            now, wave = (self.share(self.limit, n) for n in (math.inf, max(1.0, blocks / self.options.stagger)))
            refused = self.force(self.share(self.limit, blocks), SLACK * (1 - wave / now), refused)
        for group, _ in refused:
            group.refuse()
        return self.bound is not None and self.within(self.bound * (1 if self.options.paper_compat else CLOSE))

    def force(self, bound: float, share: float, offers: Sequence[tuple[Group, Ranking]]) -> list[tuple[Group, Ranking]]:
        """What a block has to save is masked although it does more damage than theta; the rest is returned.

        First what does least damage per cost saved.

        Args:
            bound: cost ratio that the block is to reach.
            share: fraction of its filters that a group gives at most.
        """

        def price(offer: tuple[Group, Ranking]) -> float:
            group, ranking = offer
            assert self.limit is not None
            gone = self.plan.replace({group.name: np.setdiff1d(group.left, ranking.order)})
            costs = [self.limit.of(self.problem.space.encode(plan)) for plan in (self.plan, gone)]
            return ranking.damage / max(costs[0] - costs[1], 1e-12)

        rest = []
        for group, ranking in sorted(offers, key=price):
            if self.within(bound) or not math.isfinite(ranking.damage):
                rest.append((group, ranking))
            else:
                most = max(group.step, math.ceil(share * len(group.left)))
                self.mask(group, ranking.order[:most], bound)
        return rest

    def within(self, bound: float | None) -> bool:
        """Whether the masked network's cost is within a bound; never, where there is none."""
        return (
            self.limit is not None
            and bound is not None
            and self.limit.of(self.problem.space.encode(self.plan)) <= bound
        )

    def at_target(self, limit: Limit) -> bool:
        """Whether the masked network lies at the target already."""
        return NEAR * limit.bound <= limit.of(self.problem.space.encode(self.plan)) <= limit.bound

    def mask(self, group: Group, ranked: IntArray, bound: float | None) -> None:
        """Take filters away, least damage first: as many as there are, but no more than a bound asks for."""
        widths = [
            w for w in self.problem.space.allowed[group.name] if len(group.left) - len(ranked) <= w < len(group.left)
        ]
        ways = [ranked[: len(group.left) - width] for width in widths]  # the most filters first
        plans = [self.plan.replace({group.name: np.setdiff1d(group.left, gone)}) for gone in ways]
        chosen = 0
        if self.limit is not None and bound is not None and not self.options.paper_compat:
            costs = [self.limit.of(self.problem.space.encode(plan)) for plan in plans]
            chosen = max((i for i, cost in enumerate(costs) if cost <= bound), default=0)
        group.mask(ways[chosen])
        assert plans[chosen].is_within(self.plan)
        self.plan = plans[chosen]

    def share(self, limit: Limit, blocks: float) -> float:
        """Cost ratio that a block is to reach, of so many to come: equal factors down to the target."""
        now = limit.of(self.problem.space.encode(self.plan))
        return max(limit.bound, now * (limit.bound / now) ** (1 / blocks)) if now > limit.bound else limit.bound

    def grows(self, active: Sequence[Group]) -> bool:
        """Theta grows for groups that are all stuck; False where it does not."""
        if self.limit is None or self.options.paper_compat:
            return False
        self.theta *= self.options.growth
        for group in active:
            group.stuck = False
        return True

    def train(self, block: int, *, met: bool) -> Generator[Request, Answer, None]:
        """Step 4: the masked network trained on; or evaluated as it is, where weights stay."""
        candidate = Candidate(next(self.ids), self.plan, "mask", self.parents, self.base)
        limit = None if self.options.paper_compat else self.limit
        if met and limit is not None and not self.at_target(limit):
            candidate = yield from self.landed(limit, candidate)
        epochs, part = yield from self.epochs(block, last=met)
        if epochs > 0:
            tuned = yield from fine_tune(candidate, epochs, part=part, lr=self.options.lr)
        else:
            (evaluation,) = yield from evaluate([candidate], latency=True)
            tuned = FineTuned(candidate.base, evaluation)
        self.masked.append(replace(candidate, base=tuned.base))
        self.evaluations.append(tuned.evaluation)
        if tuned.evaluation.status == "ok":
            self.base, self.base_plan, self.parents = tuned.base, candidate.plan, (candidate.id,)

    def epochs(self, block: int, *, last: bool) -> Generator[Request, Answer, tuple[float, tuple[float, float]]]:
        """Epochs of a training, and which part of the learning rate's course they are."""
        wanted, stagger = self.options.finetune_epochs, self.options.stagger
        if self.options.paper_compat:
            return wanted, (0.0, 1.0)
        left, part = (yield from remaining()), (0.0, 1.0)
        epochs = left.trainable()
        if self.schedule is not None:
            waves, now = self.schedule // stagger, block // stagger
            epochs, part = left.trainable(TRAINING) / (waves - now), (now / waves, (now + 1) / waves)
        if self.schedule is not None and last:  # with all that is left
            ratio = self.problem.macs(self.plan) / self.problem.reference["macs"]
            epochs, part = left.trainable() / ratio, (part[0], 1.0)
        return (min(wanted, epochs) if epochs >= LEAST_EPOCHS else 0.0), part

    def landed(self, limit: Limit, candidate: Candidate) -> Generator[Request, Answer, Candidate]:
        """The masked network at the target: by the damage that filters were last seen to do."""
        plan = None if self.base == DENSE else self.base_plan
        scores = yield from score("l1", self.base, plan)
        ranking = {name: np.where(np.isfinite(values), 1.0, -np.inf) for name, values in scores.items()}
        for group in self.groups:
            seen = np.where(np.isfinite(group.seen), group.seen, np.nan)
            typical = np.nanmean(seen) if np.isfinite(seen).any() else 1.0
            damage = np.where(np.isnan(seen), typical, seen)
            ranking[group.name] = np.where(np.isfinite(scores[group.name]), damage, -np.inf)
        names = [group.name for group in self.groups]
        return (yield from land_on(self.problem, limit, candidate, ranking, names=names))

    def end(self) -> Generator[Request, Answer, None]:
        """What is masked so far, brought to the target, by the evaluation that is kept back for it."""
        if self.limit is None or self.options.paper_compat or self.theta > MOST_DAMAGE:
            return
        candidate = Candidate(next(self.ids), self.plan, "mask", self.parents, self.base)
        candidate = yield from self.landed(self.limit, candidate)
        (evaluation,) = yield from evaluate([candidate], latency=True, last=True)
        self.masked.append(candidate)
        self.evaluations.append(evaluation)


MOST_DAMAGE = 1e9
"""A theta above this means that damages are not numbers."""
LEAST_SCALE = 0.1
"""Of theta, for a group whose channels save no latency."""


@dataclass(frozen=True)
class Ranking:
    """Filters that may go together.

    Args:
        order: shape ``(granu,)``, least damage first.
        damage: the granu-th smallest average; inf where it is not known.
    """

    order: IntArray
    damage: float


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
        self.seen = np.full(self.space.sizes[self.name], np.nan)
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

    def ranking(self) -> Ranking:
        """Step 2: the filters that may go together, least damage first, and the damage that decides about them."""
        mean = np.full(len(self.total), np.inf)
        mean[self.times > 0] = self.total[self.times > 0] / self.times[self.times > 0]
        mean = np.where(np.isnan(mean), np.inf, mean)
        self.seen = np.where(np.isfinite(mean), mean, self.seen)
        ranked, granu = self.S[np.argsort(mean[self.S], kind="stable")], self.granu
        return Ranking(ranked[:granu], float(mean[ranked[granu - 1]]))

    def refuse(self) -> None:
        """Step 3, where they do too much damage: look at the better half of them alone; at all, if that is one step."""
        order = self.ranking().order
        self.stuck = self.stuck or len(order) <= self.step
        self.restart(order if len(order) > self.step else self.left)

    def mask(self, gone: IntArray) -> None:
        """Take filters away for good and begin again with the rest."""
        self.left = np.setdiff1d(self.left, gone)
        self.stuck = False
        self.restart(self.left)


def _groups(problem: Problem, options: Options) -> list[Group]:
    space, names = problem.space, included(problem.space, options.include)
    whole = {name: np.arange(space.sizes[name]) for name in names}
    return [Group(name, space, i % options.stagger, whole[name], whole[name]) for i, name in enumerate(names)]


def _draw(problem: Problem, groups: Sequence[Group], batches: int) -> list[Removed]:
    """Step 1, for one block: per batch and group, a random half H of S."""

    def half(group: Group) -> tuple[int, ...]:
        return tuple(sorted(problem.rng.choice(group.S, group.granu, replace=False).tolist()))

    return [{group.name: half(group) for group in groups} for _ in range(batches)]


def _scale_by_gain(problem: Problem, limit: Limit, groups: Sequence[Group]) -> None:
    """theta_l = theta * gain_l / mean gain; gain_l is the cost saved by half of the group's channels."""
    space = problem.space

    def halved(name: str) -> list[int]:
        return [space.snap(n, 0.5 * space.sizes[n]) if n == name else space.sizes[n] for n in space.names]

    gains = np.array([1 - limit.of(halved(group.name)) for group in groups])
    for group, gain in zip(groups, gains, strict=True):
        group.scale = max(LEAST_SCALE, gain / gains.mean()) if gains.mean() > 0 else 1.0
