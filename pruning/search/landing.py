"""How a search ends at its target: plans are brought to it from above and from below, in the method's own ranking.

A plan that lies above the target loses the channels that are worth least; one that lies below gets the best of those
back that fit. At the target are MACs of 0.99 to 1.00 of it, or as near as the allowed widths come:
then no single step fits any more. What the projection moved is told (``Candidate.projected_share``).

``at_target`` is around every strategy, also those of plug-ins: a search whose own archive has no plan at the target
ends with one more, its best one brought there by L1 saliency.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    Answer,
    Archive,
    AuxiliaryTrained,
    BudgetSpent,
    Candidate,
    Entry,
    Evaluate,
    FineTune,
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
    bisect,
    evaluate,
    limit_of,
    macs_ratios,
    meet,
    remaining,
    score,
)

NEAR = 0.99
"""Of the target: what lies between it and the target is at the target."""
MARKED = 0.25
"""A projected share above it is worth a mark: more than a quarter of the plan is no choice of the method's."""
PATIENCE = 1000
"""How often a strategy may ask for the last evaluation in vain; then whoever counts its requests decides."""
EXCHANGES = 20
"""How often a step down pays for a step up, to come nearer to the target."""


@dataclass(frozen=True)
class Settled:
    """A plan at the target.

    Args:
        plan: the plan.
        projected_share: MACs that were moved, over all MACs the plan removes, in 0..1.
    """

    plan: PruningPlan
    projected_share: float


def settle(
    problem: Problem,
    limit: Limit,
    plan: PruningPlan,
    saliency: Mapping[str, FloatArray],
    *,
    names: Collection[str] | None = None,
    per_cost: bool = True,
) -> Settled:
    """The plan brought to a limit from above or from below; what it keeps goes last, what it removed returns first.

    A step takes a group to its next allowed width. Downwards, the step that is worth least goes first; upwards, the
    one that is worth most and fits, until none fits. Where MACs then still lie below ``NEAR`` of the limit, single
    steps down pay for steps up elsewhere.

    Args:
        problem: its space says which widths are allowed.
        limit: the cost and its bound.
        plan: what the method chose, however far from the limit. A width that is not allowed counts as the next smaller
            one, else as the smallest.
        saliency: group -> shape ``(size,)``, higher = keep, comparable across groups; below 0 counts as 0. -inf = the
            weights do not have the channel: it never returns.
        names: groups that may change; None = all of the space.
        per_cost: a step is worth its summed saliency per cost, else per channel.

    Raises:
        SearchError: not even the smallest allowed widths of these groups meet the limit.
    """
    walk = _Walk(problem, limit, plan, saliency, names, per_cost=per_cost)
    walk.down()
    walk.up()
    walk.exchange()
    return Settled(walk.plan, walk.projected_share)


def filled(problem: Problem, limit: Limit, saliency: Mapping[str, FloatArray]) -> PruningPlan:
    """The plan of the largest keep ratio within a limit, filled up; no group is more than one step wider.

    Args:
        limit: the smallest plan of the space meets it.
        saliency: group -> shape ``(size,)``, higher = keep.
    """
    space = problem.space
    widths = alike(problem, bisect(limit, lambda ratio: alike(problem, ratio), meets=0.0, fails=1.0))
    steps = {n: tuple(dict.fromkeys((w, space.above(n, w)))) for n, w in zip(space.names, widths, strict=True)}
    narrow = replace(problem, space=replace(space, allowed=steps))
    return settle(narrow, limit, space.decode(widths, saliency), per_mean(saliency), per_cost=False).plan


def alike(problem: Problem, ratio: float) -> list[int]:
    """Allowed width per group, shape ``(groups,)``, nearest to one keep ratio."""
    space = problem.space
    return [space.snap(name, ratio * space.sizes[name]) for name in space.names]


def near_even(problem: Problem, limit: Limit, spread: float) -> Problem:
    """The problem with fewer allowed widths: those near to an even cut within a limit.

    A ranking tells well which channels of a group go, and less well how many: scores of different groups are not of one
    kind, and the last channels of a group are worth more than scores of single ones say. The even cut is one keep ratio
    r for all groups, and its square root for what several layers read, as they do a residual stream (the papers leave
    that whole). A group keeps from ``(1 - spread) r`` to ``r + spread (1 - r)`` of its channels; what several layers
    read keeps ``sqrt(r)`` at least, and as much above it.

    Args:
        limit: the smallest plan of the space meets it.
        spread: in 0..1; 0 = the even cut, 1 = any width.
    """
    space = problem.space
    if spread >= 1:
        return problem
    shared = {name for name in space.names if space.readers.get(name, 1) > 1}

    def widths(inner: float, stream: float) -> list[int]:
        return [space.snap(n, (stream if n in shared else inner) * space.sizes[n]) for n in space.names]

    r = bisect(limit, lambda ratio: widths(ratio, ratio**0.5), meets=0.0, fails=1.0)
    low, high = widths((1 - spread) * r, r**0.5), widths(r + spread * (1 - r), r**0.5 + spread * (1 - r**0.5))
    ends = zip(space.names, low, high, strict=True)
    allowed = {n: tuple(w for w in space.allowed[n] if a <= w <= b) for n, a, b in ends}
    return replace(problem, space=replace(space, allowed=allowed))


def settle_near(
    problem: Problem,
    limit: Limit,
    plan: PruningPlan,
    saliency: Mapping[str, FloatArray],
    spread: float,
    *,
    per_cost: bool = True,
) -> Settled:
    """As ``settle``, with widths near to an even cut; beyond them only as far as the target takes."""
    inside = settle(near_even(problem, limit, spread), limit, plan, saliency, per_cost=per_cost)
    rest = settle(problem, limit, inside.plan, saliency, per_cost=per_cost)
    return Settled(rest.plan, max(inside.projected_share, rest.projected_share))


def land_on(
    problem: Problem,
    limit: Limit,
    candidate: Candidate,
    saliency: Mapping[str, FloatArray],
    *,
    names: Collection[str] | None = None,
    per_cost: bool = True,
) -> Generator[Request, Answer, Candidate]:
    """``candidate = yield from land_on(...)``: the candidate with its plan at the run's target, and the share told.

    As ``settle``; a predicted latency is measured, and the bound moved until the plan measures at it (``meet``).

    Raises:
        SearchError: not even the smallest allowed widths meet the limit.
    """
    settled = Settled(candidate.plan, 0.0)

    def cut(within: Limit) -> PruningPlan:
        nonlocal settled
        settled = settle(problem, within, candidate.plan, saliency, names=names, per_cost=per_cost)
        return settled.plan

    plan = yield from meet(problem, limit, cut)
    return replace(candidate, plan=plan, projected_share=settled.projected_share)


def by_one_factor(space: SearchSpace, limit: Limit, widths: Sequence[int] | IntArray) -> list[int]:
    """Widths times the one factor at which they meet a limit: how they are spread over the groups is kept.

    Cut by saliency instead, a plan that a method has moved would lose the very channels that it gained.

    Args:
        widths: per group, shape ``(groups,)``, however far from the limit.

    Returns:
        Allowed width per group; at the limit but for rounding, and for groups that are whole.
    """
    pairs = [(name, int(width)) for name, width in zip(space.names, widths, strict=True)]

    def scaled(factor: float) -> list[int]:
        return [space.snap(name, max(1, round(factor * width))) for name, width in pairs]

    return scaled(bisect(limit, scaled, meets=0.0, fails=max(space.sizes[name] / width for name, width in pairs)))


def per_mean(scores: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Scores divided by the mean magnitude of their group, so that groups can be compared; -inf stays."""
    found = {}
    for name, values in scores.items():
        there = np.abs(values[np.isfinite(values)])
        scale = float(there.mean()) if len(there) else 0.0
        found[name] = values / (scale or 1.0)
    return found


class _Walk:
    """Widths on their way to a limit.

    Within a group channels go and return in one order: those of the plan first, by saliency, then the others.
    """

    def __init__(
        self,
        problem: Problem,
        limit: Limit,
        plan: PruningPlan,
        saliency: Mapping[str, FloatArray],
        names: Collection[str] | None,
        *,
        per_cost: bool,
    ) -> None:
        self.problem, self.limit, self.start, self.per_cost = problem, limit, plan, per_cost
        space = problem.space
        self.free = np.array([names is None or name in names for name in space.names])
        self.order = {name: _order(plan, name, saliency[name]) for name in space.names}
        worth = {name: np.nan_to_num(np.maximum(saliency[name][order], 0.0)) for name, order in self.order.items()}
        self.summed = [np.concatenate([[0.0], np.cumsum(worth[name])]) for name in space.names]
        self.widths = space.encode(plan)
        for column, name in enumerate(space.names):
            if self.free[column]:
                there, least = int(self.widths[column]), min(space.allowed[name][0], len(self.order[name]))
                self.widths[column] = max((w for w in space.allowed[name] if w <= there), default=least)
        self.now = limit.of(self.widths)

    @property
    def plan(self) -> PruningPlan:
        """The plan of the present widths."""
        kept = {n: np.sort(self.order[n][:w]) for n, w in zip(self.problem.space.names, self.widths, strict=True)}
        return self.start.replace({name: indices.tolist() for name, indices in kept.items()})

    @property
    def projected_share(self) -> float:
        """MACs moved, down and up again, over all MACs removed."""
        space = self.problem.space
        before = space.encode(self.start)
        rows = np.stack([before, np.minimum(before, self.widths), self.widths, space.encode(space.full)])
        first, common, last, whole = self.problem.costs(rows)["macs"]
        moved, removed = (first - common) + (last - common), whole - last
        return 0.0 if moved <= 0 else 1.0 if removed <= 0 else round(float(min(1.0, moved / removed)), 4)

    def down(self) -> None:
        """Step by step, what is worth least goes until the limit is met."""
        while self.now > self.limit.bound:
            groups, after = self._moves(self.problem.space.below)
            if len(groups) == 0:
                raise SearchError(
                    f"no plan of the space meets {self.limit.name} {self.limit.bound:g}: the smallest reaches "
                    f"{self.now:.3f}. Raise the target, lower min_keep_ratio or the channel multiple, or freeze fewer "
                    "groups."
                )
            costs = self.limit.ratios(after)
            least = int(np.argmin(self._worth(groups, after, self.now - costs)))
            self.widths, self.now = after[least], float(costs[least])

    def up(self) -> None:
        """Step by step, the best that fits returns until nothing fits."""
        while True:
            groups, after = self._moves(self._above)
            costs = self.limit.ratios(after) if len(groups) else np.zeros(0)
            fits = np.flatnonzero(costs <= self.limit.bound)
            if len(fits) == 0:
                return
            best = fits[int(np.argmax(self._worth(groups[fits], after[fits], costs[fits] - self.now)))]
            self.widths, self.now = after[best], float(costs[best])

    def exchange(self) -> None:
        """While MACs lie below ``NEAR`` of the limit: a step down in one group for one up in another that comes nearer.

        Of those that come near enough the one that loses least, else the one that comes nearest.
        """
        if self.limit.name != "macs_ratio":
            return
        for _ in range(EXCHANGES):
            if self.now >= NEAR * self.limit.bound:
                return
            pairs, rows = self._pairs()
            costs = self.limit.ratios(rows) if len(rows) else np.zeros(0)
            nearer = np.flatnonzero((costs > self.now + 1e-12) & (costs <= self.limit.bound))
            if len(nearer) == 0:
                return
            near = nearer[costs[nearer] >= NEAR * self.limit.bound]
            gains = [self._gain(pairs[i], rows[i]) for i in near]
            chosen = near[int(np.argmax(gains))] if len(near) else nearer[int(np.argmax(costs[nearer]))]
            self.widths, self.now = rows[chosen], float(costs[chosen])
            self.up()

    def _above(self, name: str, width: int) -> int:
        """The next allowed width, as far as the weights have so many channels."""
        wider = self.problem.space.above(name, width)
        return wider if wider <= len(self.order[name]) else width

    def _moves(self, step: object) -> tuple[IntArray, IntArray]:
        """Groups that can step, and the width vectors after each step alone, shape ``(moves, groups)``."""
        steps = self._steps(step)
        groups = np.flatnonzero(self.free & (steps != self.widths))
        after = np.repeat(self.widths[None], len(groups), axis=0)
        after[np.arange(len(groups)), groups] = steps[groups]
        return groups, after

    def _steps(self, step: object) -> IntArray:
        """Width per group one step on, shape ``(groups,)``."""
        assert callable(step)
        names = self.problem.space.names
        return np.array([step(name, int(w)) for name, w in zip(names, self.widths, strict=True)], dtype=np.int64)

    def _pairs(self) -> tuple[list[tuple[int, int]], IntArray]:
        """Every (down, up) of two groups, and the width vectors after it."""
        below, above = self._steps(self.problem.space.below), self._steps(self._above)
        downs = np.flatnonzero(self.free & (below != self.widths)).tolist()
        ups = np.flatnonzero(self.free & (above != self.widths)).tolist()
        pairs = [(down, up) for down in downs for up in ups if down != up]
        rows = np.repeat(self.widths[None], len(pairs), axis=0)
        for row, (down, up) in zip(rows, pairs, strict=True):
            row[down], row[up] = below[down], above[up]
        return pairs, rows

    def _gain(self, pair: tuple[int, int], after: IntArray) -> float:
        """Saliency won by an exchange."""
        return float(sum(self.summed[g][after[g]] - self.summed[g][self.widths[g]] for g in pair))

    def _worth(self, groups: IntArray, after: IntArray, costs: FloatArray) -> FloatArray:
        """What each move alone is worth, shape ``(moves,)``."""
        moved = after[np.arange(len(groups)), groups]
        pairs = zip(groups, moved, strict=True)
        saliency = np.array([abs(self.summed[g][self.widths[g]] - self.summed[g][w]) for g, w in pairs])
        by = np.maximum(costs, 1e-12) if self.per_cost else np.abs(self.widths[groups] - moved)
        return saliency / by


def _order(plan: PruningPlan, name: str, saliency: FloatArray) -> IntArray:
    """Channels in the order in which a width keeps them; without those that the weights do not have."""
    kept = np.array(plan.kept[name], dtype=np.int64)
    others = np.flatnonzero(~plan.mask(name) & (saliency > -np.inf))
    ranked = [part[np.argsort(-np.nan_to_num(saliency[part]), kind="stable")] for part in (kept, others)]
    return np.concatenate(ranked)


# -- around every strategy ---------------------------------------------------------------------------------------------


def at_target(problem: Problem, strategy: Strategy) -> Strategy:
    """A strategy whose archive begins with plans at the run's target, of which there is one; then those that meet it.

    Where the strategy's own archive has none (or the budget ended it), one of its plans is projected onto the target by
    L1 saliency and evaluated: of those that meet the target the one of the highest reward, else the nearest; the
    unpruned network where there is no plan at all. A plan that gets channels back is cut anew from the unpruned weights
    where its own no longer have them.

    Raises:
        SearchError: as the strategy does; or the target is out of reach.
    """
    if problem.goal == Goal():
        return (yield from strategy)
    heard = _Heard(problem)
    archive = yield from heard.archive_of(strategy)

    if not any(_standing(problem, entry) == 0 for entry in archive):
        archive = (*archive, *(yield from _insisting(_brought(problem, archive or tuple(heard.found), heard))))
    return tuple(sorted(archive, key=lambda entry: _standing(problem, entry)))


def _standing(problem: Problem, entry: Entry) -> int:
    """0 = at the target, 1 = below it, 2 = it is not met. What meets a latency target is at it."""
    if not problem.goal.met(entry.evaluation, problem.reference):
        return 2
    return int(not _lies_at(problem, entry.candidate.plan))


def _lies_at(problem: Problem, plan: PruningPlan) -> bool:
    """Whether a plan's MACs are at the target; True where a latency counts, which is not known of a plan alone."""
    goal = problem.goal
    if goal.macs_ratio is None or goal.latency_ratio is not None:
        return True
    space, limit = problem.space, Limit("macs_ratio", macs_ratios(problem), goal.macs_ratio)
    widths = space.encode(plan)
    if not NEAR * limit.bound > limit.of(widths):
        return limit.of(widths) <= limit.bound
    rows = np.repeat(widths[None], len(widths), axis=0)
    np.fill_diagonal(rows, [space.above(n, int(w)) for n, w in zip(space.names, widths, strict=True)])
    return not bool((limit.ratios(rows[rows.diagonal() != widths]) <= limit.bound).any())


class _Heard:
    """What passes between a strategy and whoever answers it.

    Once the budget is spent, an evaluation is refused that is not of a plan at the target: the last one is for those.

    Args:
        found: every pruned plan that could be evaluated.
        whole: names of weights that have every channel.
        next_id: of the next candidate.
        refused: how often the budget allowed no request.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.found: list[Entry] = []
        self.whole = {DENSE, RANDOM}
        self.next_id = self.refused = 0

    def archive_of(self, strategy: Strategy) -> Strategy:
        """The strategy's archive; everything evaluated so far where the budget ended it.

        Raises:
            SearchError: as the strategy does, unless the budget is what it failed by.
        """
        answer: Answer
        try:
            request = next(strategy)
            while True:
                try:
                    yield from self.check(request)
                    answer = yield request
                except BudgetSpent as spent:
                    self.refused += 1
                    request = strategy.throw(spent)
                else:
                    self.note(request, answer)
                    request = strategy.send(answer)
        except StopIteration as end:
            archive: Archive = end.value
            return archive
        except (BudgetSpent, SearchError):
            if not self.refused:
                raise
            return tuple(self.found)

    def check(self, request: Request) -> Generator[Request, Answer, None]:
        """See that the last evaluation is not given away.

        Raises:
            BudgetSpent: it would be.
        """
        if not self.refused or self.refused >= PATIENCE or not isinstance(request, Evaluate):
            return
        left = yield from remaining()
        if min(left.evaluations, left.seconds, left.work) <= 0 and not _lies_at(
            self.problem, request.candidates[0].plan
        ):
            raise BudgetSpent("the budget is spent; the evaluation kept back is for a plan at the target")

    def note(self, request: Request, answer: Answer) -> None:
        """Keep what was evaluated."""
        pairs: Sequence[Entry] = ()
        if isinstance(request, Evaluate):
            assert isinstance(answer, tuple)
            pairs = [Entry(*pair) for pair in zip(request.candidates, answer, strict=True)]
        elif isinstance(request, FineTune):
            assert isinstance(answer, FineTuned)
            pairs = [Entry(replace(request.candidate, base=answer.base), answer.evaluation)]
            if request.write_back and request.candidate.base in self.whole:
                self.whole.add(answer.base)
        elif isinstance(answer, AuxiliaryTrained):
            self.whole.add(answer.base)
        for entry in pairs:
            self.next_id = max(self.next_id, entry.candidate.id + 1)
            if entry.evaluation.status == "ok" and not entry.candidate.plan.is_full:
                self.found.append(entry)


def _insisting(strategy: Strategy) -> Strategy:
    """A strategy that asks once more for what the budget refuses: then the last evaluation is granted, if it is left.

    What it would add is left out where it is refused for good.
    """
    try:
        request = next(strategy)
        while True:
            try:
                answer = yield request
            except BudgetSpent:
                answer = yield request
            request = strategy.send(answer)
    except StopIteration as end:
        archive: Archive = end.value
        return archive
    except BudgetSpent:
        return ()


def _brought(problem: Problem, found: Archive, heard: _Heard) -> Generator[Request, Answer, Archive]:
    """One of the plans brought to the target and evaluated; nothing where it cannot be evaluated."""
    limit = yield from limit_of(problem)

    def preference(entry: Entry) -> tuple[bool, float, float]:
        over = limit.of(problem.space.encode(entry.candidate.plan)) - limit.bound
        missed = not problem.goal.met(entry.evaluation, problem.reference)
        return missed, abs(over) if missed else 0.0, -problem.reward(entry.evaluation)

    if found:
        best = min(found, key=preference)
        start = best.candidate
        returns = limit.of(problem.space.encode(start.plan)) <= limit.bound
        base = start.base if not returns or start.base in heard.whole else DENSE
    else:
        start, returns, base = Candidate(heard.next_id, problem.space.full, "unpruned"), False, DENSE
    saliency = per_mean((yield from score("l1", base, None if returns else start.plan)))
    candidate = Candidate(heard.next_id, start.plan, "projected", (start.id,) if found else (), base)
    candidate = yield from land_on(problem, limit, candidate, saliency, per_cost=False)
    (evaluation,) = yield from evaluate([candidate], latency=True, last=True)
    return (Entry(candidate, evaluation),) if evaluation.status == "ok" else ()
