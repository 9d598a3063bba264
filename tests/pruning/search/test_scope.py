"""Which groups a search may cut, by cuts of known harm."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.pruning.search.protocol import Budget, Evaluate, Goal, Problem, Score, Time
from secateur.pruning.search.scope import MARGIN, ScopeChoice, Spaces, choose
from secateur.pruning.search.testing import BASELINE, FakeStudy, drive, study

STREAM = "layer1.conv1"
"""The middle one of three groups: it has most of the MACs on both of its sides."""
HALF, FREELY = Goal(0.5), Budget()


def chosen(asked: str, worth: float, goal: Goal = HALF, budget: Budget = FREELY) -> tuple[ScopeChoice, FakeStudy]:
    """What is chosen where the channels of the stream are worth so many times those of the others."""
    fake = stream_of(worth)
    whole, inner = problems(fake, goal, budget)
    return drive(choose(asked, whole, inner), fake), fake


def stream_of(worth: float) -> FakeStudy:
    fake = study((16, 16, 16))
    value = {name: np.full(16, BASELINE / 96) for name in fake.space.names}
    return FakeStudy(fake.space, {**value, STREAM: np.full(16, worth * BASELINE / 96)})


def problems(fake: FakeStudy, goal: Goal, budget: Budget = FREELY) -> tuple[Problem, Problem]:
    whole = fake.problem(goal, budget=budget)
    part = FakeStudy(fake.space.over({"layer0.conv1", "layer2.conv1"}), fake.value)
    return whole, part.problem(goal, budget=budget)


@pytest.mark.parametrize(("worth", "scope"), [(4.0, "inner"), (0.1, "all")])
def test_auto_takes_the_scope_that_does_less_harm_and_says_both(worth: float, scope: str) -> None:
    choice, fake = chosen("auto", worth)
    assert choice.scope == scope
    losses = {trial.scope: trial.loss for trial in choice.trials}
    assert min(losses, key=lambda name: losses[name]) == scope
    assert all(f"{loss:.3f}" in choice.reason for loss in losses.values())
    assert [type(request) for request in fake.requests] == [Score, Evaluate]


def test_both_cuts_save_equally_much_and_only_one_touches_the_stream() -> None:
    choice, fake = chosen("auto", 1.0)
    inner, whole = (candidate.plan for candidate in fake.candidates)
    assert inner.widths[STREAM] == 16 > whole.widths[STREAM]
    for trial in choice.trials:
        assert 0.95 <= trial.macs_ratio / 0.5 <= 1


def test_a_tie_goes_to_the_inner_groups() -> None:
    """The worth at which both cuts lose the same, and a little less for the stream: still within the margin."""
    low, high = 0.1, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        inner, whole = chosen("auto", middle)[0].trials
        low, high = (middle, high) if whole.harm < inner.harm else (low, middle)
    inner, whole = (tied := chosen("auto", low)[0]).trials
    assert 0 <= inner.harm - whole.harm < MARGIN * inner.harm
    assert tied.scope == "inner" and "left alone" in tied.reason


@pytest.mark.parametrize("asked", ["inner", "auto"])
@pytest.mark.parametrize("goal", [Goal(macs_ratio=0.05), Goal(latency_ratio=0.2)])
def test_the_stream_is_opened_where_inner_groups_cannot_reach_the_target(asked: str, goal: Goal) -> None:
    choice, fake = chosen(asked, 1.0, goal)
    assert choice.scope == "all" and "so that the residual stream is cut too" in choice.reason
    assert len(fake.requests) == (goal.latency_ratio is not None)


def test_a_latency_target_counts_the_latency_saved() -> None:
    choice, fake = chosen("auto", 1.0, Goal(latency_ratio=0.7))
    assert [type(request) for request in fake.requests] == [Time, Score, Evaluate]
    for trial in choice.trials:
        assert trial.latency_ratio == pytest.approx(trial.macs_ratio**0.5)
        assert trial.harm == pytest.approx((trial.loss - (1 - BASELINE)) / (1 - trial.latency_ratio))


@pytest.mark.parametrize(("asked", "scope"), [("inner", "inner"), ("all", "all")])
def test_what_is_asked_for_and_possible_is_not_measured(asked: str, scope: str) -> None:
    choice, fake = chosen(asked, 1.0)
    assert (choice, fake.requests) == (ScopeChoice(scope), [])


def test_without_a_stream_nothing_is_chosen() -> None:
    fake = study((16, 16, 16))
    assert drive(choose("auto", fake.problem(HALF), None), fake) == ScopeChoice("all")
    assert Spaces(fake.space, None).of("inner") is fake.space


def test_a_small_budget_of_evaluations_is_the_methods() -> None:
    choice, fake = chosen("auto", 0.1, budget=Budget(evaluations=12))
    assert choice.scope == "inner" and "12 evaluations" in choice.reason and not fake.requests


def test_a_cut_that_cannot_be_evaluated_is_not_chosen() -> None:
    fake = stream_of(0.1)
    fake.fails = lambda candidate: candidate.origin == "scope all"
    assert drive(choose("auto", *problems(fake, HALF)), fake).scope == "inner"


def test_a_part_of_a_space_leaves_the_other_groups_whole() -> None:
    space = study((16, 24, 32), 4).space
    part = space.over({"layer1.conv1"})
    assert part.names == ("layer1.conv1",) and part.allowed["layer1.conv1"] == space.allowed["layer1.conv1"]
    assert part.smallest().widths == {"layer0.conv1": 16, "layer1.conv1": 4, "layer2.conv1": 32}
