"""A search by latency begins with the best uniform plan and never ends behind it, whatever its method does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.beginning import from_uniform
from secateur.pruning.search.landing import at_target
from secateur.pruning.search.methods import optuna
from secateur.pruning.search.protocol import (
    Answer,
    BudgetSpent,
    Candidate,
    Evaluate,
    Evaluation,
    Goal,
    Predict,
    Problem,
    Request,
    Strategy,
    Time,
)
from secateur.pruning.search.support import best_first, evaluate
from secateur.pruning.search.testing import FakeStudy, chain, drive

SIZES = (96, 160, 128, 192)
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Steps(FakeStudy):
    """A device whose latency is that of the channels rounded up to 32."""

    def latency_ratio(self, plan: PruningPlan) -> float:
        whole = {name: range(min(-(-len(kept) // 32) * 32, plan.sizes[name])) for name, kept in plan.kept.items()}
        return self.macs(plan.replace(whole)) / self.macs(self.space.full)

    def metrics(self, plan: PruningPlan, top1: float, *, latency: bool) -> Evaluation:
        known = super().metrics(plan, top1, latency=latency)
        told = {"latency_ratio": self.latency_ratio(plan)} if latency else {}
        return replace(known, metrics={**known.metrics, **told})

    def answer(self, request: Request) -> Answer:
        if isinstance(request, Time):
            return np.array([self.latency_ratio(plan) for plan in request.plans])
        return super().answer(request)

    def problem(self, *args: Any, **options: Any) -> Problem:
        """Whoever is faster is better, and accuracy hardly matters."""
        reward = lambda evaluation: evaluation["top1"] - 10 * evaluation["latency_ratio"]  # noqa: E731
        return replace(super().problem(*args, **options), reward=reward, multiples=MULTIPLES)


@pytest.fixture
def fake() -> Steps:
    return Steps(SearchSpace.of(chain(*SIZES), min_keep_ratio=0.1))


def odd(problem: Problem) -> Strategy:
    """A method that does not know of steps: widths one above a block, at any cost; its ids count from 0."""
    plans = [problem.space.full.replace({n: range(width) for n in problem.space.names}) for width in (33, 65)]
    candidates = [Candidate(i, plan, "odd", (i - 1,) if i else ()) for i, plan in enumerate(plans)]
    evaluations = yield from evaluate(candidates, latency=True)
    return best_first(problem, candidates, evaluations)


def best_uniform(fake: Steps, goal: Goal) -> float:
    """The reward of the best uniform plan, by trying every multiple by itself."""
    fake, rewards = Steps(fake.space), []
    problem = replace(fake.problem(goal), multiples=())
    for multiple in MULTIPLES:
        uniform = METHODS.load("uniform")
        coarse = replace(problem, space=fake.space.in_multiples(multiple))
        (entry,) = drive(uniform.search(coarse, uniform.Options()), fake)
        assert goal.met(entry.evaluation, problem.reference)
        rewards.append(problem.reward(entry.evaluation))
    return max(rewards)


@pytest.mark.parametrize("goal", [Goal(macs_ratio=0.5), Goal(latency_ratio=0.5), Goal(0.5, 0.6)])
@pytest.mark.parametrize("method", ["odd", "random", "global", "optuna"])
def test_a_search_never_ends_behind_the_best_uniform_plan(fake: Steps, method: str, goal: Goal) -> None:
    def begin(problem: Problem) -> Strategy:
        if method == "odd":
            return at_target(problem, odd(problem))
        module = METHODS.load(method)
        options = {"random": {"num_plans": 3, "tolerance": 0.5}, "optuna": {"num_plans": 3}}.get(method, {})
        return at_target(problem, module.search(problem, module.Options(**options)))

    problem = fake.problem(goal)
    archive = drive(from_uniform(problem, begin), fake)
    best = max(archive, key=lambda e: (goal.met(e.evaluation, problem.reference), problem.reward(e.evaluation)))
    assert goal.met(best.evaluation, problem.reference)
    if goal == Goal(macs_ratio=0.5):
        assert problem.reward(best.evaluation) >= best_uniform(fake, goal) - 1e-9
    first = fake.candidates[0]
    assert first.origin == "uniform" and any(entry.candidate == first for entry in archive)
    assert problem.reward(best.evaluation) >= problem.reward(fake.evaluate(first, latency=True))
    assert [candidate.id for candidate in fake.candidates] == list(range(len(fake.candidates)))


def test_the_first_plan_consists_of_whole_blocks_and_the_method_is_told(fake: Steps) -> None:
    told = []

    def begin(problem: Problem) -> Strategy:
        told.append(problem.start)
        return odd(problem)

    problem = fake.problem(Goal(macs_ratio=0.5))
    archive = drive(from_uniform(problem, begin), fake)
    start = fake.candidates[0].plan
    assert told == [start]
    assert all(width % 32 == 0 for width in start.widths.values())
    rewards = [problem.reward(entry.evaluation) for entry in archive]
    assert rewards == sorted(rewards, reverse=True), "it stands where it belongs"
    assert {entry.candidate.id: entry.candidate.parents for entry in archive} == {0: (), 1: (), 2: (1,)}


def test_optuna_begins_with_its_proportions(fake: Steps) -> None:
    problem = replace(fake.problem(), start=fake.space.full.replace({"layer0.conv1": range(48)}))
    ratios = dict.fromkeys(fake.space.names, SimpleNamespace(low=0.1))
    first = optuna._profile_of(problem, fake.space.names, ratios)
    assert first == {**dict.fromkeys(fake.space.names, 1.0), "layer0.conv1": 0.5}


@pytest.mark.parametrize("changes", [{"multiples": ()}, {"goal": Goal()}])
def test_nothing_is_added_where_there_is_nothing_to_begin_with(fake: Steps, changes: dict[str, Any]) -> None:
    problem = replace(fake.problem(Goal(macs_ratio=0.5)), **changes)
    archive = drive(from_uniform(problem, odd), fake)
    assert {entry.candidate.origin for entry in archive} == {"odd"}
    assert not any(isinstance(request, Time) for request in fake.requests)


@pytest.mark.parametrize("refused", [Time, Evaluate, Predict])
def test_a_budget_that_is_spent_leaves_the_method_alone(fake: Steps, refused: type) -> None:
    """What the budget refuses at first is not asked for again."""
    problem, spent = fake.problem(Goal(latency_ratio=0.5)), []
    strategy = from_uniform(problem, odd)
    request = next(strategy)
    try:
        while True:
            if isinstance(request, refused) and not spent:
                spent.append(request)
                request = strategy.throw(BudgetSpent("spent"))
            else:
                request = strategy.send(fake(request))
    except StopIteration as end:
        archive = end.value
    assert "odd" in {entry.candidate.origin for entry in archive}


def test_coarser_widths_are_among_the_finer_ones_and_no_group_is_lost() -> None:
    space = SearchSpace.of(chain(16, 24, 40, 96))
    for finer, coarser in pairwise(MULTIPLES):
        fine, coarse = space.in_multiples(finer), space.in_multiples(coarser)
        assert coarse.allowed == SearchSpace.of(chain(16, 24, 40, 96), channel_multiple=coarser).allowed
        for name in space.names:
            assert set(coarse.allowed[name]) <= set(fine.allowed[name])
            assert len(coarse.allowed[name]) > 1
