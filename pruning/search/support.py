"""What the methods share: requests with typed answers, a ranking, and errors that name the way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from secateur.device_profiles.latency_model import LatencyModel
from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    Archive,
    AuxiliaryTrained,
    AuxiliaryTraining,
    BudgetSpent,
    Candidate,
    Distort,
    Entry,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    FloatArray,
    Left,
    MaskedLoss,
    Predict,
    Problem,
    Remaining,
    Request,
    Score,
    Time,
)


class SearchError(ValueError):
    """A search cannot do what its run file asks for, or found nothing that can be evaluated."""


def remaining() -> Generator[Request, Answer, Left]:
    """``left = yield from remaining()``: ask what is left of the budget, and what has been spent."""
    answer = yield Remaining()
    assert isinstance(answer, Left), answer
    return answer


def evaluate(
    candidates: Sequence[Candidate], *, latency: bool = False, floor: float | None = None, last: bool = False
) -> Generator[Request, Answer, tuple[Evaluation, ...]]:
    """``evaluations = yield from evaluate(candidates)``: ask for evaluations, in the order of the candidates.

    Args:
        last: these end the search: where the budget is spent, the first of them gets the evaluation kept back.

    Raises:
        BudgetSpent: the budget holds none of them any more.
    """
    request = Evaluate(tuple(candidates), latency, floor)
    try:
        answer = yield request
    except BudgetSpent:
        if not last:
            raise
        answer = yield request
    assert isinstance(answer, tuple) and len(answer) == len(candidates), answer
    return answer


def fine_tune(candidate: Candidate, epochs: float, **options: Any) -> Generator[Request, Answer, FineTuned]:
    """``tuned = yield from fine_tune(candidate, epochs)``: ask for trained weights."""
    answer = yield FineTune(candidate, epochs, **options)
    assert isinstance(answer, FineTuned), answer
    return answer


def score(
    criterion: str, base: str = DENSE, plan: PruningPlan | None = None, **options: float | str
) -> Generator[Request, Answer, Mapping[str, FloatArray]]:
    """``saliency = yield from score(criterion)``: ask for shape ``(size,)`` per group, higher = keep."""
    answer = yield Score(criterion, base, plan, options)
    assert isinstance(answer, Mapping), answer
    return answer


def masked_losses(
    plans: Sequence[PruningPlan], base: str = DENSE, images: int | None = None
) -> Generator[Request, Answer, FloatArray]:
    """``losses = yield from masked_losses(plans)``: ask for the mean loss of masked networks, shape ``(plans,)``."""
    answer = yield MaskedLoss(tuple(plans), base, images)
    assert isinstance(answer, np.ndarray) and answer.shape == (len(plans),), answer
    return answer


def distort(
    plan: PruningPlan, removed: Sequence[Mapping[str, tuple[int, ...]]], base: str = DENSE, batch_size: int = 64
) -> Generator[Request, Answer, Mapping[str, FloatArray]]:
    """``damage = yield from distort(plan, removed)``: ask for shape ``(batches,)`` per group."""
    answer = yield Distort(plan, tuple(removed), base, batch_size)
    assert isinstance(answer, Mapping), answer
    return answer


def train_auxiliary(
    kind: str, epochs: float, base: str = DENSE, **options: float | str
) -> Generator[Request, Answer, AuxiliaryTrained]:
    """``learned = yield from train_auxiliary(kind, epochs)``: ask for a training that learns about channels."""
    answer = yield AuxiliaryTraining(kind, epochs, base, options)
    assert isinstance(answer, AuxiliaryTrained), answer
    return answer


def time_plans(plans: Sequence[PruningPlan]) -> Generator[Request, Answer, FloatArray]:
    """``ratios = yield from time_plans(plans)``: ask for latency ratios measured on the device, shape ``(plans,)``."""
    answer = yield Time(tuple(plans))
    assert isinstance(answer, np.ndarray) and answer.shape == (len(plans),), answer
    return answer


def best_first(problem: Problem, candidates: Iterable[Candidate], evaluations: Iterable[Evaluation]) -> Archive:
    """The archive of every ``ok`` evaluation, highest reward first (ties: asked first).

    Raises:
        SearchError: nothing could be evaluated; gives the first reason.
    """
    pairs = [Entry(*pair) for pair in zip(candidates, evaluations, strict=True)]
    entries = [entry for entry in pairs if entry.evaluation.status == "ok"]
    if not entries:
        raise SearchError(
            f"no candidate could be evaluated ({len(pairs)} tried); the first: {pairs[0].evaluation.reason}"
        )
    return tuple(sorted(entries, key=lambda entry: -problem.reward(entry.evaluation)))


def check_reachable(problem: Problem) -> None:
    """Check, before any evaluation is paid for, that the smallest plan of the space meets the MACs target.

    Raises:
        SearchError: it does not; says the smallest ratio that can be reached and what would lower it.
    """
    wanted = problem.goal.macs_ratio
    if wanted is None:
        return
    smallest = problem.macs(problem.space.smallest()) / problem.reference["macs"]
    if smallest > wanted:
        reachable = math.ceil(1000 * smallest) / 1000
        raise SearchError(
            f"target macs_ratio {wanted:g} is out of reach: with every group at its smallest allowed width the "
            f"network keeps {reachable:.3f} of its MACs. Raise the target to {reachable:.3f} or more, lower "
            "min_keep_ratio or the channel multiple, or freeze fewer groups."
        )


def included(space: SearchSpace, patterns: Sequence[str]) -> list[str]:
    """Names of the groups that match one of the patterns (``*``, ``?``), in network order.

    Raises:
        SearchError: none does.
    """
    names = [name for name in space.names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise SearchError(f"include {list(patterns)} matches none of the groups {list(space.names)}")
    return names


Ratios = Callable[[IntArray], FloatArray]
"""Width vectors of shape ``(plans, groups)`` -> cost of each, shape ``(plans,)``, as a ratio to the unpruned one's."""


@dataclass(frozen=True)
class Limit:
    """A cost and the ratio it may reach: the MACs target, or the latency target with predicted latencies.

    Args:
        name: ``macs_ratio`` or ``latency_ratio``.
        ratios: the cost of width vectors.
        bound: the largest ratio that meets the target.
    """

    name: str
    ratios: Ratios
    bound: float

    def of(self, widths: Sequence[int] | IntArray) -> float:
        """Cost ratio of one width vector, shape ``(groups,)``."""
        return float(self.ratios(np.asarray(widths, dtype=np.int64)[None])[0])


def check_groups(problem: Problem, limit: Limit, names: Collection[str]) -> None:
    """Check that a limit can be met by cutting these groups alone.

    Raises:
        SearchError: it cannot; says what is left at their smallest allowed widths.
    """
    space = problem.space
    least = limit.of([space.allowed[n][0] if n in names else space.sizes[n] for n in space.names])
    if least > limit.bound:
        raise SearchError(
            f"target {limit.name} {limit.bound:g} is out of reach of the {len(names)} included groups: at their "
            f"smallest allowed widths {least:.3f} is left. Widen include, or raise the target."
        )


def bisect(limit: Limit, widths: Callable[[float], list[int]], meets: float, fails: float) -> float:
    """The number nearest to ``fails`` (to 2^-40 of the range) whose widths meet a limit.

    Args:
        widths: number -> width per group, shape ``(groups,)``; costs rise from ``meets`` to ``fails``.
        meets: a number whose widths meet the limit; not checked.
        fails: where to go as near as possible; comes back if its widths meet the limit after all.
    """
    if limit.of(widths(fails)) <= limit.bound:
        return fails
    for _ in range(40):
        middle = (meets + fails) / 2
        if limit.of(widths(middle)) <= limit.bound:
            meets = middle
        else:
            fails = middle
    return meets


def macs_ratios(problem: Problem) -> Ratios:
    """MACs of width vectors as ratios to the unpruned network's."""
    whole = problem.costs(problem.space.encode(problem.space.full)[None])["macs"][0]
    return lambda widths: problem.costs(widths)["macs"] / whole


def limit_of(problem: Problem, points: int = 3) -> Generator[Request, Answer, Limit]:
    """``limit = yield from limit_of(problem)``: the run's target as something to project width vectors onto.

    A latency target is turned into a prediction from a few measured plans (``predicted_latency``); a MACs target is
    exact.
    Where both are set, the cost is the larger of the two ratios, each relative to its own bound.

    Args:
        points: widths measured per group where no latency model can be trusted.

    Raises:
        SearchError: no target is set, or the smallest plan does not meet it.
    """
    target = problem.goal
    if target.macs_ratio is None and target.latency_ratio is None:
        raise SearchError("this method needs a target: set search.target.macs_ratio or search.target.latency_ratio")
    check_reachable(problem)
    macs = macs_ratios(problem)
    if target.latency_ratio is None:
        assert target.macs_ratio is not None
        return Limit("macs_ratio", macs, target.macs_ratio)
    latency = yield from predicted_latency(problem, points)
    smallest = float(latency(problem.space.encode(problem.space.smallest())[None])[0])
    if smallest > target.latency_ratio:
        raise SearchError(
            f"target latency_ratio {target.latency_ratio:g} is out of reach: with every group at its smallest allowed "
            f"width the network takes {smallest:.3f} of the unpruned latency. Raise the target, lower min_keep_ratio "
            "or the channel multiple, or freeze fewer groups."
        )
    if target.macs_ratio is None:
        return Limit("latency_ratio", latency, target.latency_ratio)
    both = target.latency_ratio, target.macs_ratio
    return Limit("latency_ratio", lambda w: np.maximum(latency(w), macs(w) * both[0] / both[1]), both[0])


def predicted_latency(problem: Problem, points: int = 3) -> Generator[Request, Answer, Ratios]:
    """``ratios = yield from predicted_latency(problem)``: latency of width vectors, from a few measured plans.

    By the device's latency model of this network where it has proven good (``secateur.device_profiles.latency_model``),
    else by ``latency_table``.
    """
    answer = yield Predict()
    assert isinstance(answer, Mapping), answer
    if not answer:
        return (yield from latency_table(problem, points))
    model, full = LatencyModel.from_arrays(answer), problem.space.full
    columns = [list(full.sizes).index(name) for name in problem.space.names]
    whole = np.array(list(full.widths.values()), dtype=np.int64)

    def ratios(widths: IntArray) -> FloatArray:
        every = np.repeat(whole[None], len(widths), axis=0)
        every[:, columns] = widths
        return model.ratios(every)

    return ratios


def latency_table(problem: Problem, points: int = 3) -> Generator[Request, Answer, Ratios]:
    """``ratios = yield from latency_table(problem)``: latency of width vectors, predicted from measured plans.

    Each group alone is timed at ``points`` widths between its smallest and its full one; what it saves is interpolated
    linearly and never falls as it gets narrower (latency is a staircase in the width, its upper envelope is kept). The
    savings add up, scaled so that the smallest plan of the space gets its measured latency.
    """
    space = problem.space
    grids = {name: _spread(space.allowed[name][:-1], points) for name in space.names}
    single = [space.full.replace({name: range(width)}) for name, grid in grids.items() for width in grid]
    measured = yield from time_plans([*single, space.smallest()])
    savings, at = {}, 0
    for name, grid in grids.items():
        saved = np.maximum(0.0, 1 - measured[at : at + len(grid)])
        at += len(grid)
        widths = np.array([*grid, space.sizes[name]])
        envelope = np.maximum.accumulate(np.append(saved, 0.0)[::-1])[::-1]  # narrower never saves less
        savings[name] = widths, envelope
    summed = sum(saved[0] for _, saved in savings.values())
    scale = max(0.0, 1 - measured[-1]) / summed if summed > 0 else 0.0

    def ratios(widths: IntArray) -> FloatArray:
        total = np.zeros(len(widths))
        for column, name in enumerate(space.names):
            total += np.interp(widths[:, column], *savings[name])
        return 1 - scale * total

    return ratios


def _spread(widths: Sequence[int], points: int) -> list[int]:
    """Up to ``points`` of the widths, evenly spread, the smallest among them."""
    chosen = np.linspace(0, len(widths) - 1, min(points, len(widths))).round().astype(int)
    return [widths[i] for i in dict.fromkeys(chosen.tolist())]


DOUBLINGS = 6
"""How often the bound of a predicted latency is moved twice as far, as long as that gives the same plan."""


def meet(
    problem: Problem, limit: Limit, cut: Callable[[Limit], PruningPlan], rounds: int = 4
) -> Generator[Request, Answer, PruningPlan]:
    """``plan = yield from meet(problem, limit, cut)``: the plan of ``cut(limit)`` that measures at the limit.

    A MACs limit is exact and asks nothing. A predicted latency is measured. Where it is missed, or leaves room for a
    step to the next wider width in whichever group, the bound given to ``cut`` is moved by as much, up to ``rounds``
    times (only downwards, where there is a MACs target beside it). Of the plans that measure within the limit the
    slowest comes back; the last one where there is none, or the budget allows no measurement. The last call of ``cut``
    is the one that made it.
    """
    plan, bound = cut(limit), limit.bound
    if limit.name == "macs_ratio":
        return plan
    smallest = limit.of(problem.space.encode(problem.space.smallest()))
    low, high, best, tried = -math.inf, math.inf, (0.0, bound), set[str]()
    while plan.digest not in tried and len(tried) < rounds:
        tried.add(plan.digest)
        try:
            (measured,) = yield from time_plans([plan])
        except BudgetSpent:
            break
        if measured <= limit.bound:
            low, best = bound, max(best, (float(measured), bound))
            if not _has_room(problem, limit, plan, measured):
                break
        elif bound <= smallest:
            break
        else:
            high = bound
        for doubled in range(DOUBLINGS):  # coarse widths give the same plan for bounds that differ little
            moved = max(smallest, bound + 2**doubled * (limit.bound - measured))
            bound = moved if low < moved < high else (low + high) / 2
            plan = cut(replace(limit, bound=bound))
            if plan.digest not in tried:
                break
    return plan if low == -math.inf or best[1] == bound else cut(replace(limit, bound=best[1]))


def _has_room(problem: Problem, limit: Limit, plan: PruningPlan, measured: float) -> bool:
    """Whether every step of one group to its next wider width is predicted to fit, from what a plan measures."""
    space, widths = problem.space, problem.space.encode(plan)
    steps = np.repeat(widths[None], len(widths), axis=0)
    np.fill_diagonal(steps, [space.above(n, int(w)) for n, w in zip(space.names, widths, strict=True)])
    steps = steps[steps.diagonal() != widths]
    if len(steps) == 0 or problem.goal.macs_ratio is not None:
        return False
    return bool(measured + (limit.ratios(steps) - limit.of(widths)).max() <= limit.bound)


def project(
    problem: Problem,
    limit: Limit,
    saliency: Mapping[str, FloatArray],
    start: Sequence[int] | None = None,
    *,
    per_cost: bool = True,
) -> list[int]:
    """Widths that meet a limit: channels go step by step, those first that are worth least.

    A step takes one group to its next allowed width below; its worth is the summed saliency of the channels that go,
    per cost saved if ``per_cost``, else per channel. At the end steps that still fit are taken back, the best first.

    Args:
        saliency: group -> shape ``(size,)``, finite and >= 0, higher = keep; comparable across groups.
        start: width per group to begin with, shape ``(groups,)``; None = the full widths.

    Returns:
        Allowed width per group, in the order of ``space.names``.

    Raises:
        SearchError: not even the smallest allowed widths meet the limit.
    """
    space = problem.space
    widths = space.encode(space.full) if start is None else np.asarray(start, dtype=np.int64)
    ranked = [np.concatenate([[0.0], np.cumsum(np.sort(saliency[name])[::-1])]) for name in space.names]

    def moved(current: IntArray, step: Callable[[str, int], int]) -> tuple[IntArray, IntArray, IntArray]:
        """Groups that can move, their new widths, and the width vectors after each move alone."""
        steps = np.array([step(name, int(w)) for name, w in zip(space.names, current, strict=True)])
        groups = np.flatnonzero(steps != current)
        after = np.repeat(current[None], len(groups), axis=0)
        after[np.arange(len(groups)), groups] = steps[groups]
        return groups, steps, after

    def worth(groups: IntArray, current: IntArray, steps: IntArray, costs: FloatArray) -> FloatArray:
        gone = np.array([abs(ranked[g][current[g]] - ranked[g][steps[g]]) for g in groups])
        by = np.maximum(costs, 1e-12) if per_cost else np.abs(current[groups] - steps[groups])
        return gone / by

    now, removed = limit.of(widths), 0
    while now > limit.bound:
        groups, steps, after = moved(widths, space.below)
        if len(groups) == 0:
            raise SearchError(
                f"no plan of the space meets {limit.name} {limit.bound:g}: the smallest reaches {now:.3f}. Raise the "
                "target, lower min_keep_ratio or the channel multiple, or freeze fewer groups."
            )
        costs = limit.ratios(after)
        least = int(np.argmin(worth(groups, widths, steps, now - costs)))
        widths, now, removed = after[least], float(costs[least]), removed + 1
    for _ in range(removed):
        groups, steps, after = moved(widths, space.above)
        costs = limit.ratios(after)
        fits = np.flatnonzero(costs <= limit.bound)
        if len(fits) == 0:
            break
        best = fits[int(np.argmax(worth(groups[fits], widths, steps, costs[fits] - now)))]
        widths, now = after[best], float(costs[best])
    return [int(w) for w in widths]


def check_ranges(options: object, **ranges: tuple[float, float]) -> None:
    """Check that each named option lies in its closed range; an option that is ``None`` is left unchecked.

    Raises:
        ValueError: lists every option outside its range.
    """
    values = {name: getattr(options, name) for name in ranges}
    faults = [
        f"{name} must lie in {low:g}..{high:g}, got {values[name]}"
        for name, (low, high) in ranges.items()
        if values[name] is not None and not low <= values[name] <= high
    ]
    if faults:
        raise ValueError("; ".join(faults))
