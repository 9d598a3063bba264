"""Plans brought to a target: from both sides, at coarse widths, around frozen groups, and the share that was moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.landing import NEAR, at_target, land_on, near_even, per_mean, settle, settle_near
from secateur.pruning.search.protocol import BudgetSpent, Candidate, Entry, Evaluate, FineTune, Goal, Strategy
from secateur.pruning.search.support import Limit, SearchError, evaluate, macs_ratios
from secateur.pruning.search.testing import FakeStudy, at_the_target, chain, drive, study


def macs_limit(fake: FakeStudy, target: float) -> Limit:
    return Limit("macs_ratio", macs_ratios(fake.problem()), target)


def random_plan(fake: FakeStudy, rng: np.random.Generator) -> PruningPlan:
    """Any subset of any group, at widths that need not be allowed."""
    kept = {}
    for name, size in fake.space.sizes.items():
        kept[name] = np.sort(rng.choice(size, int(rng.integers(1, size + 1)), replace=False)).tolist()
    return fake.space.full.replace(kept)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    target=st.floats(0.15, 0.95),
    multiple=st.sampled_from([1, 4, 8]),
    per_cost=st.booleans(),
)
def test_any_plan_ends_at_the_target(seed: int, target: float, multiple: int, per_cost: bool) -> None:
    rng = np.random.default_rng(seed)
    fake = study((16, 24, 32, 16), multiple)
    plan, limit = random_plan(fake, rng), macs_limit(fake, target)
    if limit.of(fake.space.encode(fake.space.smallest())) > target:
        with pytest.raises(SearchError, match="no plan of the space meets macs_ratio"):
            settle(fake.problem(), limit, plan, fake.value, per_cost=per_cost)
        return
    settled = settle(fake.problem(), limit, plan, fake.value, per_cost=per_cost)
    assert at_the_target(fake, settled.plan, target)
    assert all(settled.plan.widths[n] in fake.space.allowed[n] for n in fake.space.names)
    assert 0 <= settled.projected_share <= 1
    for name, kept in settled.plan.kept.items():  # what was chosen stays while there is room, and goes by rank
        chosen, left = set(plan.kept[name]), set(kept)
        assert left <= chosen or chosen <= left
        worth = fake.value[name]
        assert max(worth[[*chosen - left]], default=0) <= min(worth[[*chosen & left]], default=1)
        others = set(range(len(worth))) - chosen
        assert max(worth[[*others - left]], default=0) <= min(worth[[*others & left]], default=1)


def test_a_plan_at_the_target_stays_as_it_is() -> None:
    fake = study((64, 64, 64))
    plan = settle(fake.problem(), macs_limit(fake, 0.5), fake.space.full, fake.value).plan
    again = settle(fake.problem(), macs_limit(fake, 0.5), plan, dict(reversed(fake.value.items())))
    assert again.plan == plan and again.projected_share == 0


def test_the_share_is_what_was_moved_over_what_is_removed() -> None:
    fake = study((10, 10))
    limit = macs_limit(fake, 0.5)
    whole = settle(fake.problem(), limit, fake.space.full, fake.value)
    assert whole.projected_share == 1
    first, second = fake.space.names
    far = fake.space.full.replace({first: range(2), second: range(2)})
    settled = settle(fake.problem(), limit, far, fake.value)
    dense, before, after = (fake.macs(plan) for plan in (fake.space.full, far, settled.plan))
    assert settled.projected_share == pytest.approx(min(1, (after - before) / (dense - after)), abs=1e-4)


def test_groups_that_may_not_change_do_not_and_channels_without_weights_never_return() -> None:
    fake = study((16, 16, 16), frozen=["layer2.conv1"])
    first, second = fake.space.names
    settled = settle(fake.problem(), macs_limit(fake, 0.7), fake.space.full, fake.value, names=[second])
    assert settled.plan.widths[first] == 16 == settled.plan.widths["layer2.conv1"]
    with pytest.raises(SearchError, match="the smallest reaches"):
        settle(fake.problem(), macs_limit(fake, 0.2), fake.space.full, fake.value, names=[second])
    narrow = fake.space.full.replace({first: range(4), second: range(5)})
    gone = {n: np.where(narrow.mask(n), values, -np.inf) for n, values in fake.value.items()}
    back = settle(fake.problem(), macs_limit(fake, 0.9), narrow, gone)
    assert back.plan == narrow
    assert settle(fake.problem(), macs_limit(fake, 0.9), narrow, fake.value).plan.widths[first] > 4


def test_saliency_that_is_not_a_number_or_negative_is_survived() -> None:
    fake = study((8, 8))
    first, second = fake.space.names
    odd = {first: np.array([np.nan, -1.0, *np.linspace(0, 1, 6)]), second: fake.value[second]}
    assert settle(fake.problem(), macs_limit(fake, 0.5), fake.space.full, odd).plan.widths[first] >= 1
    assert per_mean({"a": np.array([1.0, 3.0, -np.inf]), "b": np.zeros(2)})["a"].tolist() == [0.5, 1.5, -np.inf]


def test_a_predicted_latency_is_measured_and_met() -> None:
    fake = study((16, 24, 32))
    limit = Limit(
        "latency_ratio", lambda widths: (fake.costs(widths)["macs"] / fake.macs(fake.space.full)) ** 0.5 - 0.03, 0.7
    )
    start = Candidate(3, fake.space.full, "x", (1,), "")

    def lands() -> Strategy:
        landed = yield from land_on(fake.problem(), limit, start, fake.value)
        (evaluation,) = yield from evaluate([landed], latency=True)
        return (Entry(landed, evaluation),)

    (entry,) = drive(lands(), fake)
    assert entry.evaluation["latency_ratio"] <= 0.7
    assert entry.candidate.projected_share == 1 and entry.candidate.parents == (1,)


# -- around every strategy ---------------------------------------------------------------------------------------------


def stops_early(widths: Sequence[int], *, returns: bool = True) -> Strategy:
    """Evaluates one group at some widths, never near the target."""
    space = SearchSpace.of(chain(16, 24, 32))
    candidates = [Candidate(i, space.full.replace({space.names[0]: range(w)}), "x") for i, w in enumerate(widths)]
    evaluations = yield from evaluate(candidates, latency=True)
    if not returns:
        yield FineTune(candidates[-1], 1.0)
    return tuple(map(Entry, candidates, evaluations))


def test_an_archive_that_misses_the_target_gets_its_nearest_plan_projected() -> None:
    fake = study()
    archive = drive(at_target(fake.problem(Goal(macs_ratio=0.5)), stops_early([15, 8, 12])), fake)
    first = archive[0].candidate
    assert first.origin == "projected" and first.id == 3 and first.parents == (1,)
    assert set(first.plan.kept["layer0.conv1"]) <= set(range(8))
    assert NEAR * 0.5 < archive[0].evaluation["macs"] / fake.macs(fake.space.full) <= 0.5
    assert 0 < first.projected_share < 1
    assert [entry.candidate.id for entry in archive[1:]] == [0, 1, 2]


def test_an_archive_that_meets_it_is_left_alone_but_for_its_order() -> None:
    fake = study()
    archive = drive(at_target(fake.problem(Goal(macs_ratio=0.87)), stops_early([15, 8, 12, 7])), fake)
    assert [entry.candidate.id for entry in archive] == [1, 3, 0, 2]  # at it, below it, above it
    assert len(fake.requests) == 1
    without = drive(at_target(fake.problem(), stops_early([15, 8])), fake)
    assert [entry.candidate.id for entry in without] == [0, 1]


@pytest.mark.parametrize("widths", [[15, 8], []])
def test_what_a_spent_budget_leaves_is_projected_and_the_unpruned_network_at_the_least(widths: list[int]) -> None:
    fake = study()
    goal, refused = Goal(latency_ratio=0.7), []

    def bounded(strategy: Strategy) -> Any:
        """Answers all but trainings; evaluations of nothing are refused too."""
        request = next(strategy)
        while True:
            try:
                hopeless = isinstance(request, FineTune) or request == Evaluate((), latency=True)
                if hopeless:
                    refused.append(request)
                    request = strategy.throw(BudgetSpent("no more"))
                else:
                    request = strategy.send(fake(request))
            except StopIteration as end:
                return end.value

    archive = bounded(at_target(fake.problem(goal), stops_early(widths, returns=False)))
    assert refused and archive[0].candidate.origin == "projected"
    assert archive[0].evaluation["latency_ratio"] <= 0.7
    assert len(archive) == len(widths) + 1


def test_errors_of_a_search_with_budget_left_are_its_own() -> None:
    def fails() -> Strategy:
        yield FineTune(Candidate(0, study().space.full, "x"), 1.0)
        raise SearchError("found nothing")

    fake = study()
    with pytest.raises(SearchError, match="found nothing"):
        drive(at_target(fake.problem(Goal(macs_ratio=0.5)), fails()), fake)


@pytest.mark.parametrize("tuned", [False, True])
def test_an_archive_that_stays_below_the_target_gets_its_best_plan_filled_up(tuned: bool) -> None:
    def overshoots() -> Strategy:
        first = fake.space.names[0]
        candidate = Candidate(0, fake.space.full.replace({first: range(5)}), "x")
        if tuned:
            answer: Any = yield FineTune(candidate, 1.0)
            return (Entry(dataclasses.replace(candidate, base=answer.base), answer.evaluation),)
        (evaluation,) = yield from evaluate([candidate], latency=True)
        return (Entry(candidate, evaluation),)

    fake = study()
    archive = drive(at_target(fake.problem(Goal(macs_ratio=0.9)), overshoots()), fake)
    first, second = (entry.candidate for entry in archive)
    assert first.origin == "projected" and first.parents == (0,) and second.id == 0
    assert at_the_target(fake, first.plan, 0.9)
    assert second.plan.is_within(first.plan)
    assert first.base == ""  # a network trained at fewer channels has no weights for more


@settings(max_examples=40, deadline=None)
@given(target=st.floats(0.15, 0.95), multiple=st.sampled_from([1, 8]), spread=st.floats(0, 1))
def test_widths_near_an_even_cut_reach_the_target_and_spare_what_many_layers_read(
    target: float, multiple: int, spread: float
) -> None:
    fake = study((64, 64, 64), multiple)
    stream, first = "layer1.conv1", "layer0.conv1"
    problem, limit = fake.problem(), macs_limit(fake, target)
    problem = dataclasses.replace(problem, space=dataclasses.replace(problem.space, readers={stream: 9}))
    near = near_even(problem, limit, spread).space
    assert limit.of([widths[0] for widths in near.allowed.values()]) <= max(
        target, limit.of(problem.space.encode(problem.space.smallest()))
    )
    assert near.allowed[stream][0] >= near.allowed[first][0]
    for name, widths in near.allowed.items():
        whole = problem.space.allowed[name]
        assert widths == tuple(w for w in whole if widths[0] <= w <= widths[-1])
    assert spread < 1 or near == problem.space


def test_the_spread_says_how_far_from_one_ratio_a_group_may_lie() -> None:
    fake = study((100, 100, 100))
    even = fake.space.decode([50, 50, 50], fake.value)
    limit = macs_limit(fake, fake.macs(even) / fake.macs(fake.space.full))
    for spread, ends in ((0.0, (50, 50)), (0.2, (40, 60)), (0.5, (25, 75))):
        allowed = near_even(fake.problem(), limit, spread).space.allowed.values()
        assert {(widths[0], widths[-1]) for widths in allowed} == {ends}
    fake.value = {name: value / (1 + 99 * (name == "layer1.conv1")) for name, value in fake.value.items()}
    widths = settle_near(fake.problem(), limit, fake.space.full, fake.value, 0.2).plan.widths
    assert 40 <= widths["layer1.conv1"] <= 41  # all of its channels are worth least


@pytest.mark.parametrize("method", ["cpmc", "dafp", "filter_ensemble", "aofp", "dais"])
def test_methods_that_rank_leave_no_group_far_behind_the_others(method: str) -> None:
    """One group of which all channels but one look worthless: with ``spread: 1`` little else is left of it."""
    module, kept = METHODS.load(method), {}
    for spread in (0.25, 1):
        fake = study((16, 48, 32))
        fake.value["layer1.conv1"] = np.array([1.0, *np.full(47, 1e-6)])
        untrained = {"epochs": 0} if method == "dafp" else {}
        drive(module.search(fake.problem(Goal(0.35)), module.Options(spread=spread, **untrained)), fake)
        kept[spread] = fake.candidates[-1].plan.widths["layer1.conv1"] / 48
    assert kept[1] < 0.4 < kept[0.25]
