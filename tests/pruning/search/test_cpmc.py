"""CPMC: what goes first, what does not matter, and the criteria by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search.methods import random as random_search
from secateur.pruning.search.methods.cpmc import Options, multi_criteria, normalised, search
from secateur.pruning.search.protocol import Evaluate, Goal, Score
from secateur.pruning.search.support import Limit, SearchError, macs_ratios
from secateur.pruning.search.testing import FakeStudy, drive, study


def plan_of(fake: FakeStudy, target: Goal, options: Options = Options()):  # noqa: B008
    (entry,) = drive(search(fake.problem(target), options), fake)
    return entry.candidate.plan


def test_it_asks_for_weights_once_and_evaluates_one_plan():
    fake = study()
    archive = drive(search(fake.problem(Goal(0.5)), Options()), fake)
    assert fake.requests == [Score("weight_dependency"), Evaluate((archive[0].candidate,), latency=True)]
    assert archive[0].evaluation["macs"] <= 0.5 * fake.macs(fake.space.full)


def test_the_score_is_the_normalised_weight_less_what_the_channel_costs():
    fake = study((4, 6, 2))
    problem = fake.problem()
    macs, params = np.array([300 + 600, 400 + 200, 600 + 1000]), np.array([9, 6, 16])
    scores = multi_criteria(
        problem, Options(cost_weight=2, params_weight=3), Limit("macs_ratio", macs_ratios(problem), 0.5), fake.value
    )
    for g, name in enumerate(fake.space.names):
        expected = fake.value[name] / fake.value[name].max() * np.exp(-2 * macs[g] / 1600 - 3 * params[g] / 16)
        assert np.allclose(scores[name], expected)


def test_a_latency_target_takes_the_latency_of_a_groups_channels():
    fake = study((4, 6))
    problem = fake.problem()

    def ratios(widths):
        return 0.4 + 0.09 * np.ceil(widths[:, 0] / 4) + 0.51 * np.ceil(widths[:, 1] / 3) / 2  # stairs

    scores = multi_criteria(problem, Options(params_weight=0), Limit("latency_ratio", ratios, 0.5), fake.value)
    of = {name: float((scores[name] * fake.value[name].max() / fake.value[name])[0]) for name in fake.space.names}
    assert of == pytest.approx({"layer0.conv1": 1.0, "layer1.conv1": np.exp(-1)})  # 0 of 3 channels, and 0.255 of 5


def test_zero_channels_go_first_wherever_they_are():
    fake = study((12, 16))
    first, second = fake.space.names
    fake.value[first][[2, 7]], fake.value[second][[0, 9, 15]] = 0, 0
    target = fake.macs(fake.space.full.replace({first: range(10), second: range(13)})) / fake.macs(fake.space.full)
    plan = plan_of(fake, Goal(target))
    assert {name: set(range(size)) - set(plan.kept[name]) for name, size in plan.sizes.items()} == {
        first: {2, 7},
        second: {0, 9, 15},
    }


@settings(max_examples=15)
@given(scale=st.floats(1e-6, 1e6), normalise=st.sampled_from(["max", "l2"]), group=st.integers(0, 2))
def test_the_scale_of_a_groups_weights_does_not_matter(scale, normalise, group):
    plans = []
    for factor in (1.0, scale):
        fake = study((8, 10, 12))
        fake.value[fake.space.names[group]] *= factor
        plans.append(plan_of(fake, Goal(0.5), Options(normalise=normalise)))
    assert plans[0] == plans[1]


def test_without_costs_it_is_the_global_ranking():
    fake = study((16, 24, 32))
    plan = plan_of(fake, Goal(0.5), Options(cost_weight=0, params_weight=0))
    scores = {name: value / value.max() for name, value in fake.value.items()}
    gone = [scores[n][i] for n, s in plan.sizes.items() for i in range(s) if i not in plan.kept[n]]
    kept = [scores[n][i] for n in plan.sizes for i in plan.kept[n]]
    assert np.quantile(gone, 0.95) <= min(kept) + 0.05  # at the end, channels that still fit come back
    assert np.median(gone) < min(kept)


def test_costs_turn_the_ranking_to_expensive_groups():
    shares = []
    for weight in (0.0, 2.0):
        fake = study((64, 8, 64))  # a channel of the second group costs six times as much
        plan = plan_of(fake, Goal(0.5), Options(cost_weight=weight, params_weight=weight, spread=1))
        shares.append(plan.widths["layer1.conv1"])
    assert shares[1] < shares[0]


def test_every_group_keeps_its_share():
    fake = study((20, 20, 20))
    fake.value["layer1.conv1"] = np.array([1.0, *np.full(19, 1e-6)])
    widths = [plan_of(fake, Goal(0.4), Options(min_keep=k, spread=1)).widths["layer1.conv1"] for k in (0.1, 0.25)]
    assert 2 <= widths[0] < 5 <= widths[1] <= 6  # where there is room, a channel comes back
    with pytest.raises(SearchError, match=r"out of reach with min_keep 0.9"):
        plan_of(study(), Goal(0.5), Options(min_keep=0.9))


def test_it_beats_random_at_equal_evaluations():
    wins = 0
    for seed in range(10):
        fake, twin = study(), study()
        (entry,) = drive(search(fake.problem(Goal(0.5), seed), Options()), fake)
        (other,) = drive(random_search.search(twin.problem(Goal(0.5), seed), random_search.Options(num_plans=1)), twin)
        wins += entry.evaluation["top1"] > other.evaluation["top1"]
    assert wins == 10


def test_a_group_of_zeros_is_no_division_by_zero():
    assert normalised(np.zeros(3), "max").tolist() == [0, 0, 0]
    assert normalised(np.array([3.0, 4.0]), "l2").tolist() == [0.6, 0.8]
    with pytest.raises(SearchError, match="needs a target"):
        plan_of(study(), Goal())
    with pytest.raises(ValueError, match="cost_weight must lie in"):
        Options(cost_weight=-1)


def test_a_group_that_many_layers_read_does_not_vanish():
    """A stream costs much because many layers read it; per reader its channels cost what all others do."""
    left = []
    for readers in ({}, {"layer1.conv1": 8}):
        fake = study((16, 64, 64))
        fake.value["layer1.conv1"] = np.linspace(0.5, 1, 64) / 64
        problem = fake.problem(Goal(0.5))
        problem = dataclasses.replace(problem, space=dataclasses.replace(problem.space, readers=readers))
        (entry,) = drive(search(problem, Options()), fake)
        left.append(entry.candidate.plan.widths["layer1.conv1"])
    assert left[0] < left[1]
