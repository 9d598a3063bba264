"""ICP: rounds of clustering and distillation, down to the target."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search.methods import random
from secateur.pruning.search.methods.icp import Options, search
from secateur.pruning.search.protocol import Evaluate, Evaluation, FineTune, Goal, Score, Time
from secateur.pruning.search.support import SearchError
from secateur.pruning.search.testing import BASELINE, FakeStudy, drive, study
from tests.pruning.search.test_acp import redundant, widths

HALF = Goal(macs_ratio=0.5)


def ratios(fake, archive) -> list[float]:
    return [fake.macs(entry.candidate.plan) / fake.macs(fake.space.full) for entry in archive]


def test_each_round_clusters_the_current_network_and_distils_the_cut_one():
    fake = study()
    archive = drive(search(fake.problem(HALF), Options(finetune_epochs=30)), fake)
    assert len(archive) > 2
    base, plan = "", fake.space.full
    asked = iter(fake.requests)
    for i, entry in enumerate(archive):
        assert next(asked) == Score("feature_distance", base, plan, {"images": 200})
        assert next(asked) == Score("l1", base, plan)
        if entry is archive[-1]:  # brought to the target
            assert isinstance(next(asked), Score)
        training = next(asked)
        assert training == FineTune(replace(entry.candidate, base=base), 30, distill=True)
        assert training.candidate.plan.is_within(plan) and training.candidate.plan != plan
        assert training.candidate.parents == ((i - 1,) if i else ())
        base, plan = entry.candidate.base, entry.candidate.plan
        assert base == f"tuned-{i}"
    assert next(asked, None) is None


@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
@pytest.mark.parametrize("clusterer", ["dbscan", "agglomerative"])
def test_rounds_are_equal_factors_down_to_the_target(rounds, clusterer):
    fake = study((64, 64, 64))
    options = Options(rounds=rounds, clusterer=clusterer, max_cut=1.0)
    found = [1.0, *ratios(fake, drive(search(fake.problem(HALF), options), fake))]
    assert found[-1] <= 0.5 < found[-2]
    assert len(found) - 1 <= rounds
    for done, (before, after) in enumerate(pairwise(found)):
        assert after <= max(0.5, before * (0.5 / before) ** (1 / (rounds - done))) + 1e-9
    if clusterer == "agglomerative":  # its widths fall one by one, so a round is no larger than it has to be
        assert len(found) - 1 >= rounds - 1
        assert min(b / a for a, b in pairwise(found)) > 0.5 ** (1 / rounds) - 0.05


@settings(max_examples=10)
@given(
    max_cut=st.floats(0.15, 1),
    seed=st.integers(0, 99),
    multiple=st.sampled_from([1, 8]),
    ratio=st.floats(0.15, 0.9),
)
def test_no_group_loses_more_than_its_share_in_a_round_and_the_target_is_met(max_cut, seed, multiple, ratio):
    fake = study((16, 40, 24), multiple)
    archive = drive(search(fake.problem(Goal(macs_ratio=ratio), seed), Options(max_cut=max_cut)), fake)
    before = fake.space.full
    for entry in archive:
        for name, width in entry.candidate.plan.widths.items():
            lowest = min((1 - max_cut) * before.widths[name], fake.space.below(name, before.widths[name]))
            assert width >= lowest - 1e-9
        before = entry.candidate.plan
    assert ratios(fake, archive)[-1] <= ratio


def test_copies_go_first_and_one_of_each_kind_stays():
    fake, twin = redundant(), redundant()
    target = Goal(macs_ratio=fake.macs(fake.plan_of([7, 11, 9])) / fake.macs(fake.space.full))
    archive = drive(search(fake.problem(target), Options(rounds=6, max_cut=0.5, noise_first=True)), fake)
    assert widths(archive[-1].candidate) == [7, 11, 9]
    assert [fake.missing(entry.candidate.plan) for entry in archive] == [0] * len(archive)
    equal = random.Options(num_plans=len(fake.candidates), tolerance=0.2, saliency="l1")
    rival = drive(random.search(twin.problem(target), equal), twin)
    assert max(entry.evaluation["top1"] for entry in rival) < BASELINE - 0.05


@pytest.mark.parametrize("noise_first", [False, True])
def test_weak_channels_like_no_other_go_first_unless_they_are_to_stay(noise_first):
    fake, weak = study((40, 40, 40)), [3, 11, 29]
    for value in fake.value.values():
        value[:] = 1 + 1e-3 * np.arange(len(value))
        value[weak] = [0.1, 0.3, 0.5]
    options = Options(rounds=1, max_cut=0.5, noise_first=noise_first)
    plan = drive(search(fake.problem(Goal(macs_ratio=0.7)), options), fake)[0].candidate.plan
    for kept in plan.kept.values():
        assert len(kept) < 40
        assert (set(weak) <= set(kept)) is noise_first
        assert noise_first or not set(weak) & set(kept)


@settings(max_examples=10)
@given(rounds=st.integers(2, 6), seed=st.integers(0, 99), ratio=st.floats(0.3, 0.8))
def test_by_default_no_group_loses_a_larger_share_than_its_round_saves_of_the_cost(rounds, seed, ratio):
    fake = study((32, 40, 48))
    archive = drive(search(fake.problem(Goal(macs_ratio=ratio), seed), Options(rounds=rounds)), fake)
    plan, now = fake.space.full, 1.0
    for done, entry in enumerate(archive[:-1]):  # the last one is brought to the target channel by channel
        aim = max(ratio, now * (ratio / now) ** (1 / max(1, rounds - done)))
        for name, width in entry.candidate.plan.widths.items():
            before = plan.widths[name]
            assert width >= min(aim / now * before, fake.space.below(name, before)) - 1e-9
        plan, now = entry.candidate.plan, ratios(fake, [entry])[0]


def test_a_given_epsilon_is_used_in_every_round_until_nothing_is_alike():
    fake = redundant()
    archive = drive(search(fake.problem(), Options(epsilon=0.5, rounds=9, max_cut=0.6, noise_first=True)), fake)
    assert widths(archive[0].candidate) == [16, 24, 20]
    assert widths(archive[-1].candidate) == [7, 11, 9]  # one of each kind is as unlike as can be
    assert len(archive) < 9
    fake = redundant()
    assert len(drive(search(fake.problem(), Options(epsilon=0.5, rounds=2, max_cut=0.3)), fake)) == 2


@pytest.mark.parametrize("ratio", [0.3, 0.2])
def test_what_a_bounded_round_leaves_of_a_cluster_is_still_one(ratio):
    fake = redundant()
    options = Options(rounds=1, max_cut=0.4, noise_first=True)
    archive = drive(search(fake.problem(Goal(macs_ratio=ratio)), options), fake)
    assert len(archive) > 1
    assert fake.missing(archive[-1].candidate.plan) == 0


def test_a_given_epsilon_does_not_overshoot_the_target():
    fake = study((64, 64, 64))
    options = Options(epsilon=0.05, clusterer="agglomerative", max_cut=1.0)
    archive = drive(search(fake.problem(HALF), options), fake)
    assert len(archive) == 1
    assert 0.45 < ratios(fake, archive)[0] <= 0.5


def test_a_latency_target_is_measured_before_the_last_training_and_after_each():
    fake = study((32, 48, 64))
    options = Options(clusterer="agglomerative")
    archive = drive(search(fake.problem(Goal(latency_ratio=0.7)), options), fake)
    latencies = [entry.evaluation["latency_ratio"] for entry in archive]
    assert latencies[-1] <= 0.7 < latencies[-2]
    assert sum(isinstance(request, Time) for request in fake.requests) >= 2  # the table, and the last cut


def test_a_target_that_is_missed_when_measured_costs_a_further_round():
    class Slow(FakeStudy):
        """Trained networks are slower than what was timed."""

        def metrics(self, plan, top1, *, latency):
            known = super().metrics(plan, top1, latency=latency)
            if "latency_ratio" not in known.metrics or plan.is_full:
                return known
            return Evaluation(metrics={**known.metrics, "latency_ratio": known["latency_ratio"] + 0.2})

    fake = Slow(study((32, 48, 64)).space)
    archive = drive(search(fake.problem(Goal(latency_ratio=0.7)), Options()), fake)
    latencies = [entry.evaluation["latency_ratio"] for entry in archive]
    assert latencies[-1] <= 0.7 < latencies[-2]


def test_after_a_failed_training_the_next_round_cuts_less():
    fake = study((64, 64, 64))
    fake.fails = lambda c: c.id in (1, 2)
    options = Options(rounds=2, clusterer="agglomerative")
    archive = drive(search(fake.problem(Goal(macs_ratio=0.8)), options), fake)
    macs = [fake.macs(c.plan) for c in fake.candidates]
    assert macs[0] > macs[3] > macs[2] > macs[1]
    assert [entry.candidate.id for entry in archive][:2] == [0, 3]
    assert archive[1].candidate.parents == (0,)
    assert ratios(fake, archive)[-1] <= 0.8


def test_it_ends_after_four_failures_with_what_it_has():
    fake = study()
    fake.fails = lambda c: c.id > 0
    assert len(drive(search(fake.problem(HALF), Options()), fake)) == 1
    assert [c.id for c in fake.candidates] == [0, 1, 2, 3, 4]
    fake.fails = lambda c: True
    with pytest.raises(SearchError, match="icp found no network that could be evaluated: the fake says so"):
        drive(search(fake.problem(HALF), Options()), fake)
    fake = study()
    problem = replace(fake.problem(HALF), reward=lambda e: float("nan"))
    with pytest.raises(SearchError, match="its reward is NaN"):
        drive(search(problem, Options()), fake)


def test_without_training_the_cut_network_is_evaluated_with_latency():
    fake = study()
    archive = drive(search(fake.problem(HALF), Options(finetune_epochs=0)), fake)
    asked = [request for request in fake.requests if not isinstance(request, Score)]
    assert all(isinstance(request, Evaluate) and request.latency for request in asked)
    assert all(entry.candidate.base == "" for entry in archive)
    assert ratios(fake, archive)[-1] <= 0.5


@pytest.mark.parametrize("clusterer", ["dbscan", "agglomerative", "dbs"])
def test_one_group_works(clusterer):
    fake = study((16,))
    assert ratios(fake, drive(search(fake.problem(HALF), Options(clusterer=clusterer)), fake))[-1] <= 0.5


def test_the_same_seed_asks_the_same_and_the_swarm_of_bots_is_drawn_from_it():
    runs = [study((16,)), study((16,)), study((16,))]
    options = Options(clusterer="dbs", rounds=1)
    archives = [drive(search(f.problem(HALF, s), options), f) for f, s in zip(runs, (1, 1, 7), strict=True)]
    assert runs[0].requests == runs[1].requests
    assert archives[0] == archives[1]
    assert archives[0] != archives[2]


def test_errors_name_the_way_out():
    fake = study()
    with pytest.raises(SearchError, match=r"icp needs epsilon \(for example 0.03\) or a search.target"):
        drive(search(fake.problem(), Options()), fake)
    with pytest.raises(SearchError, match="no channels are alike; raise epsilon"):
        drive(search(fake.problem(), Options(epsilon=0.0)), fake)
    with pytest.raises(ValueError, match=r"rounds must lie in 1..inf, got 0; .*max_cut must lie in 0..1, got 2"):
        Options(rounds=0, max_cut=2)


def test_channels_that_are_gone_stay_gone_and_are_not_clustered():
    fake = study()
    archive = drive(search(fake.problem(Goal(macs_ratio=0.2)), Options()), fake)
    kept = [np.concatenate([np.array(k) for k in e.candidate.plan.kept.values()]).size for e in archive]
    assert kept == sorted(kept, reverse=True)
    assert all(b.candidate.plan.is_within(a.candidate.plan) for a, b in pairwise(archive))
