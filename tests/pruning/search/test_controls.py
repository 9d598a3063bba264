from __future__ import annotations

import numpy as np
import pytest

from secateur.pruning.search import METHODS
from secateur.pruning.search.methods import random, uniform
from secateur.pruning.search.protocol import Evaluate, Goal, Score
from secateur.pruning.search.support import SearchError, check_reachable
from secateur.pruning.search.testing import FakeStudy, at_the_target, drive, study


def macs_ratio(fake: FakeStudy, candidate) -> float:
    return fake.macs(candidate.plan) / fake.macs(fake.space.full)


def test_uniform_cuts_every_group_to_the_given_ratios_and_keeps_the_most_salient():
    fake = study()
    archive = drive(uniform.search(fake.problem(), uniform.Options(keep_ratios=(0.75, 0.5))), fake)
    assert fake.requests[0] == Score("l1")
    assert isinstance(fake.requests[1], Evaluate)
    assert fake.requests[1].latency
    widths = [tuple(c.plan.widths.values()) for c in fake.candidates]
    assert widths == [(12, 18, 24), (8, 12, 16)]
    for entry in archive:
        for name, kept in entry.candidate.plan.kept.items():
            assert set(kept) == set(np.argsort(-fake.value[name])[: len(kept)].tolist())
    rewards = [fake.problem().reward(entry.evaluation) for entry in archive]
    assert rewards == sorted(rewards, reverse=True)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("multiple", [1, 8])
def test_uniform_is_the_largest_ratio_that_meets_the_macs_target_filled_up(target, multiple):
    fake = study((16, 24, 32), multiple)
    (entry,) = drive(uniform.search(fake.problem(Goal(macs_ratio=target)), uniform.Options()), fake)
    assert macs_ratio(fake, entry.candidate) <= target

    def cut(ratio):
        return fake.space.decode([fake.space.snap(n, ratio * s) for n, s in fake.space.sizes.items()], fake.value)

    within = [plan for plan in map(cut, np.linspace(0, 1, 2001)) if fake.macs(plan) <= target * fake.macs(cut(1))]
    base, found = max(within, key=fake.macs).widths, entry.candidate.plan.widths
    assert all(found[n] in (width, fake.space.above(n, width)) for n, width in base.items())
    for name, width in base.items():  # one step more fits nowhere
        if found[name] == width < fake.space.sizes[name]:
            wider = {**found, name: fake.space.above(name, width)}
            assert fake.macs(fake.plan_of([*wider.values()])) > target * fake.macs(cut(1))
    for name, kept in entry.candidate.plan.kept.items():
        assert set(kept) == set(np.argsort(-fake.value[name], kind="stable")[: len(kept)].tolist())


def test_random_plans_lie_at_the_target():
    fake = study()
    options = random.Options(num_plans=40, tolerance=0.1, batch=7)
    archive = drive(random.search(fake.problem(Goal(macs_ratio=0.4)), options), fake)
    assert len(archive) == 40
    assert all(at_the_target(fake, entry.candidate.plan, 0.4) for entry in archive)
    assert len({tuple(entry.candidate.plan.widths.values()) for entry in archive}) > 20
    assert all(entry.candidate.projected_share < 0.25 for entry in archive)
    assert [len(r.candidates) for r in fake.requests] == [7, 7, 7, 7, 7, 5]
    assert all(r.latency for r in fake.requests)
    rewards = [fake.problem().reward(entry.evaluation) for entry in archive]
    assert rewards == sorted(rewards, reverse=True)


def test_random_draws_every_allowed_width_and_every_channel_equally_often():
    fake = study((8,), 2)
    drive(random.search(fake.problem(), random.Options(num_plans=2000, batch=500)), fake)
    kept = [c.plan.kept["layer0.conv1"] for c in fake.candidates]
    counts = np.bincount([len(k) for k in kept], minlength=9)
    assert set(np.flatnonzero(counts)) == {2, 4, 6, 8}
    assert counts[[2, 4, 6, 8]] == pytest.approx(500, rel=0.15)
    often = np.bincount([i for k in kept for i in k], minlength=8)
    assert often == pytest.approx(2000 * 5 / 8, rel=0.08)


def test_random_with_a_saliency_keeps_the_most_salient():
    fake = study()
    archive = drive(random.search(fake.problem(), random.Options(num_plans=5, saliency="l1")), fake)
    assert fake.requests[0] == Score("l1")
    for entry in archive:
        for name, kept in entry.candidate.plan.kept.items():
            assert set(kept) == set(np.argsort(-fake.value[name])[: len(kept)].tolist())


def test_random_brings_the_nearest_draw_to_a_target_that_none_meets():
    fake = study((16, 24, 32), 8)
    options = random.Options(num_plans=3, max_draws=32, tolerance=0.001)
    archive = drive(random.search(fake.problem(Goal(macs_ratio=0.47)), options), fake)
    assert len(archive) == 3
    for entry in archive:
        assert at_the_target(fake, entry.candidate.plan, 0.47)
        assert entry.candidate.projected_share > 0


@pytest.mark.parametrize("sizes", [(16, 24, 32), (16, 32, 64), (32, 32, 32)])
@pytest.mark.parametrize("method", [uniform, random])
def test_an_unreachable_target_names_the_smallest_reachable_ratio(method, sizes):
    fake = study(sizes, 8, min_keep_ratio=0.5)
    smallest = fake.macs(fake.space.smallest()) / fake.macs(fake.space.full)
    with pytest.raises(SearchError, match=r"Raise the target to (0\.\d+) or more") as caught:
        drive(method.search(fake.problem(Goal(macs_ratio=0.1)), method.Options()), fake)
    suggested = float(str(caught.value).split("Raise the target to ")[1].split()[0])
    assert smallest <= suggested < smallest + 0.001
    check_reachable(fake.problem(Goal(macs_ratio=suggested)))
    check_reachable(fake.problem(Goal(latency_ratio=0.01)))
    assert fake.log == []


@pytest.mark.parametrize("method", [uniform, random])
def test_only_evaluated_plans_reach_the_archive(method):
    options = uniform.Options(keep_ratios=(0.9, 0.6)) if method is uniform else random.Options(num_plans=2)
    fake = FakeStudy(study().space, fails=lambda c: c.id == 0)
    assert [entry.candidate.id for entry in drive(method.search(fake.problem(), options), fake)] == [1]
    fake = FakeStudy(study().space, fails=lambda c: True)
    with pytest.raises(SearchError, match=r"no candidate could be evaluated \(2 tried\); the first: the fake says so"):
        drive(method.search(fake.problem(), options), fake)


def test_options_refuse_what_makes_no_sense():
    fake = study()
    with pytest.raises(SearchError, match=r"needs keep_ratios .* or a search.target"):
        drive(uniform.search(fake.problem(), uniform.Options()), fake)
    for ratios in [(), (1.2,), (-0.1, 0.5), (float("nan"),)]:
        with pytest.raises(ValueError, match=r"keep_ratios must be one or more numbers in 0..1"):
            uniform.Options(keep_ratios=ratios)
    with pytest.raises(ValueError, match=r"num_plans must lie in 1..inf, got 0; tolerance must lie in 0..1, got 1.5"):
        random.Options(num_plans=0, tolerance=1.5)


def test_methods_are_discovered_by_file_name():
    found = METHODS.descriptions()
    assert {"ccep", "random", "uniform"} <= found.keys()
    assert not {"protocol", "support"} & found.keys()
    assert found["uniform"] == "The L1 control: one keep ratio for every group, the most salient channels stay."
    assert METHODS.load("random") is random
    with pytest.raises(ValueError, match=r"'cecp'; did you mean 'ccep'\? Known: .*random"):
        METHODS.load("cecp")
    with pytest.raises(ValueError, match="unknown search method 'protocol'"):
        METHODS.load("protocol")
