"""How a search by measured latency begins: with the best uniform plan, which it never ends behind.

Where the device computes whole blocks of channels, the uniform plan whose widths are all multiples of the right number
is hard to beat: on MobileNetV2 searches that chose every width by itself have lost to it. So that plan is found first,
by measurements at the target, evaluated as the first candidate, and handed to the method (``Problem.start``); a method
that can, begins there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.landing import filled
from secateur.pruning.search.protocol import (
    Answer,
    Archive,
    BudgetSpent,
    Candidate,
    Entry,
    Evaluate,
    Evaluation,
    FineTune,
    Goal,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import Limit, SearchError, evaluate, limit_of, meet, score, time_plans


def from_uniform(problem: Problem, begin: Callable[[Problem], Strategy]) -> Strategy:
    """A strategy behind the best uniform plan, which stands in its archive where it belongs by its reward.

    Nothing is added where ``Problem.multiples`` is empty, without a target, or where the budget allows no such plan.

    Args:
        begin: makes the strategy of a problem.

    Raises:
        SearchError: as the strategy does.
    """
    start = yield from _first(problem)
    if start is None:
        return (yield from begin(problem))
    archive = yield from _numbered_from(1, begin(replace(problem, start=start.candidate.plan)))
    return _placed(problem, start, archive)


def _first(problem: Problem) -> Generator[Request, Answer, Entry | None]:
    """The best uniform plan, evaluated; None where there is none."""
    if not problem.multiples or problem.goal == Goal():
        return None
    try:
        plan = yield from _best_uniform(problem)
        if plan is None:
            return None
        candidate = Candidate(0, plan, "uniform")
        (evaluation,) = yield from evaluate([candidate], latency=True)
    except BudgetSpent:
        return None
    except SearchError:  # the target is out of reach; the method says so in its own words
        return None
    return Entry(candidate, evaluation)


def _best_uniform(problem: Problem) -> Generator[Request, Answer, PruningPlan | None]:
    """Of the uniform plans at the target, one for each multiple: the fastest; for a latency target the widest."""
    limit = yield from limit_of(problem)
    saliency = yield from score("l1")
    plans: dict[str, PruningPlan] = {}
    for multiple in problem.multiples:
        coarse = replace(problem, space=problem.space.in_multiples(multiple))

        def cut(within: Limit, coarse: Problem = coarse) -> PruningPlan:
            return filled(coarse, within, saliency)

        try:
            plan = yield from meet(coarse, limit, cut)
        except SearchError:
            continue  # multiples so large that no plan meets the target
        plans.setdefault(plan.digest, plan)
    if not plans:
        return None
    measured = yield from time_plans([*plans.values()])
    return _best(problem, [*plans.values()], measured.tolist())


def _best(problem: Problem, plans: Sequence[PruningPlan], measured: Sequence[float]) -> PruningPlan:
    """The best of uniform plans within the MACs target, by their measured latency ratios."""
    wanted = problem.goal.latency_ratio
    within = [i for i, ratio in enumerate(measured) if wanted is not None and ratio <= wanted]
    if within:
        return plans[max(within, key=lambda i: _share(plans[i]))]
    return plans[int(np.argmin(measured))]


def _share(plan: PruningPlan) -> float:
    """Channels kept, mean over groups: what stands for accuracy before anything is evaluated."""
    return float(np.mean([width / plan.sizes[name] for name, width in plan.widths.items()]))


def _numbered_from(number: int, strategy: Strategy) -> Strategy:
    """A strategy whose candidates have so many before them."""
    try:
        request = next(strategy)
        while True:
            try:
                answer = yield _moved(request, number)
            except BudgetSpent as spent:
                request = strategy.throw(spent)
            else:
                request = strategy.send(answer)
    except StopIteration as end:
        archive: Archive = end.value
        return tuple(Entry(_renumbered(entry.candidate, number), entry.evaluation) for entry in archive)


def _moved(request: Request, number: int) -> Request:
    if isinstance(request, Evaluate):
        return replace(request, candidates=tuple(_renumbered(c, number) for c in request.candidates))
    if isinstance(request, FineTune):
        return replace(request, candidate=_renumbered(request.candidate, number))
    return request


def _renumbered(candidate: Candidate, number: int) -> Candidate:
    return replace(candidate, id=candidate.id + number, parents=tuple(parent + number for parent in candidate.parents))


def _placed(problem: Problem, start: Entry, archive: Archive) -> Archive:
    """The archive with the uniform plan before the first entry that is behind it."""

    def merit(evaluation: Evaluation) -> tuple[bool, float]:
        return problem.goal.met(evaluation, problem.reference), problem.reward(evaluation)

    if start.evaluation.status != "ok":
        return archive
    own = merit(start.evaluation)
    place = next((i for i, entry in enumerate(archive) if merit(entry.evaluation) < own), len(archive))
    return (*archive[:place], start, *archive[place:])
