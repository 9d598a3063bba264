from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search.methods import random
from secateur.pruning.search.methods.aofp import Group, Options, search
from secateur.pruning.search.protocol import Budget, BudgetSpent, Distort, Evaluate, FineTune, Goal, Score
from secateur.pruning.search.support import SearchError
from secateur.pruning.search.testing import FakeStudy, drive, study
from tests.pruning.search.bounded import bounded, work

STILL = Options(finetune_epochs=0)
HALF = Goal(macs_ratio=0.5)


def group_of(size: int, multiple: int = 1) -> Group:
    whole = np.arange(size)
    return Group("layer0.conv1", study((size,), multiple).space, 0, whole, whole)


def charged(group: Group, value: np.ndarray) -> None:
    """Charge each filter with its value, as if it had been left out alone."""
    for i in group.S:
        group.charge([{group.name: (int(i),)}], {group.name: np.array([value[i]])})


def decided(group: Group, theta: float) -> np.ndarray:
    """Steps 2 and 3: the filters that are masked."""
    ranking = group.ranking()
    if ranking.damage < theta * group.scale:
        return ranking.order
    group.refuse()
    return ranking.order[:0]


def test_a_zero_filter_is_masked_first() -> None:
    """A duplicate or zero filter does no damage; all others do far more than theta."""
    fake = study((32,))
    fake.value["layer0.conv1"] = np.where(np.arange(32) == 11, 0.0, 0.05)
    options = replace(STILL, batches=200, include=("*",))
    archive = drive(search(fake.problem(), options), fake)
    (entry,) = archive
    assert set(range(32)) - set(entry.candidate.plan.kept["layer0.conv1"]) == {11}


def test_steps_2_and_3_mask_halve_or_restart() -> None:
    value = np.linspace(0, 1, 16)
    group = group_of(16)
    charged(group, value)
    assert decided(group, theta=0.5).tolist() == list(range(8))  # the 8th smallest, 7/15, is below
    group = group_of(16)
    for size in (8, 4, 2):
        charged(group, value)
        assert len(decided(group, theta=1e-3)) == 0
        assert group.S.tolist() == list(range(size))
        assert not group.stuck
    charged(group, value + 0.1)
    assert len(decided(group, theta=1e-3)) == 0
    assert group.stuck
    assert group.S.tolist() == list(range(16))


def test_theta_is_a_strict_bound_on_the_granu_th_smallest_mean() -> None:
    value = np.array([0.0, 0.0, 0.0, 0.25, 1, 1, 1, 1])
    for theta, gone in ((0.25, 0), (0.26, 4)):
        group = group_of(8)
        charged(group, value)
        assert len(decided(group, theta)) == gone


def test_a_filter_is_charged_the_mean_of_its_batches_and_unseen_ones_are_no_candidates() -> None:
    group = group_of(4)
    group.charge([{group.name: (0, 1)}, {}, {group.name: (1, 2)}], {group.name: np.array([0.2, np.nan, 0.6])})
    assert group.total[:3] / group.times[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert decided(group, theta=0.5).tolist() == [0, 1]
    group = group_of(4)
    group.charge([{group.name: (0, 1)}], {group.name: np.array([np.nan])})
    assert len(decided(group, theta=1e9)) == 0


@pytest.mark.parametrize(("size", "multiple", "sizes"), [(64, 8, [32, 16, 8]), (24, 8, [12, 8]), (20, 8, [10, 5, 4])])
def test_halving_stops_at_the_step_of_the_device(size: int, multiple: int, sizes: list[int]) -> None:
    """20 channels with multiple 8: widths 8, 16, 20, so the first step is 4."""
    group, seen = group_of(size, multiple), []
    while not group.stuck:
        seen.append(group.granu)
        charged(group, np.ones(size))
        assert len(decided(group, theta=0.1)) == 0
    assert seen == sizes


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), multiple=st.sampled_from([1, 4, 8]), stagger=st.integers(1, 5))
def test_masks_only_grow_and_stay_on_allowed_widths(seed: int, multiple: int, stagger: int) -> None:
    fake = study((16, 24, 32), multiple)
    drive(search(fake.problem(HALF, seed), replace(STILL, stagger=stagger, batches=20)), fake)
    plans = [fake.space.full, *(c.plan for c in fake.candidates)]
    chosen = [fake.space.full, *(c.plan for c in fake.candidates if c.projected_share == 0)]
    assert all(after.is_within(before) and after != before for before, after in pairwise(chosen))
    assert all(plan.widths[n] in fake.space.allowed[n] for plan in plans for n in plan.widths)


def test_every_batch_leaves_out_half_of_the_search_space_of_every_group_and_groups_start_staggered() -> None:
    fake = study((16, 24, 32))
    drive(search(fake.problem(HALF), replace(STILL, batches=12, stagger=3)), fake)
    asked = [r for r in fake.requests if isinstance(r, Distort)]
    assert [sorted(r.removed[0]) for r in asked[:3]] == [[f"layer{i}.conv1" for i in range(n)] for n in (1, 2, 3)]
    assert all(len(r.removed) == 4 and r.batch_size == 64 for r in asked)
    for removed in asked[2].removed:
        assert {name: len(H) for name, H in removed.items()} == {
            "layer0.conv1": 8,
            "layer1.conv1": 12,
            "layer2.conv1": 16,
        }
    halves = {removed["layer0.conv1"] for removed in asked[0].removed + asked[1].removed}
    assert len(halves) == 8
    for request in asked:
        assert all(set(H) <= set(request.plan.kept[n]) for r in request.removed for n, H in r.items())


def test_damage_is_measured_on_the_trained_weights_of_the_last_mask() -> None:
    fake = study((16, 24))
    drive(search(fake.problem(HALF), Options()), fake)
    base, plan, trained = "", fake.space.full, 0
    for request in fake.requests:
        if isinstance(request, FineTune):
            assert request.candidate.base == base
            assert request.epochs == 1
            base, plan, trained = f"tuned-{request.candidate.id}", request.candidate.plan, trained + 1
        elif isinstance(request, Distort):
            assert (request.base, request.plan) == (base, plan)
    assert trained > 1


def test_weights_stay_where_no_training_is_wanted() -> None:
    fake = study((16, 24))
    archive = drive(search(fake.problem(HALF), STILL), fake)
    assert all(isinstance(request, Distort | Evaluate | Score) for request in fake.requests)
    assert all(e.candidate.base == "" and "latency_ratio" in e.evaluation.metrics for e in archive)


def test_it_stops_at_the_target_and_the_last_mask_takes_no_more_than_needed() -> None:
    """With a large theta whole halves would go: one step more than the target is never taken."""
    for multiple, stagger in ((1, 4), (8, 4), (1, 1)):
        fake = study((32, 64, 32), multiple)
        options = replace(STILL, threshold=10.0, stagger=stagger)
        drive(search(fake.problem(Goal(macs_ratio=0.7)), options), fake)
        last, space = fake.candidates[-1].plan, fake.space
        ratio = fake.macs(last) / fake.macs(space.full)
        assert ratio <= 0.7
        before = fake.candidates[-2].plan if len(fake.candidates) > 1 else space.full
        (cut,) = [n for n in space.names if last.widths[n] != before.widths[n]][-1:]
        wider = space.encode(last)
        wider[space.names.index(cut)] = space.above(cut, last.widths[cut])
        assert fake.costs(wider[None])["macs"][0] / fake.macs(space.full) > 0.7
        drive(search(fake.problem(Goal(macs_ratio=0.7)), replace(options, paper_compat=True)), fake)
        assert fake.macs(fake.candidates[-1].plan) <= fake.macs(last)


def test_theta_grows_until_the_target_is_met_unless_as_in_the_paper() -> None:
    fake = study((16, 16))
    fake.value = {name: np.full(16, 0.02) for name in fake.value}
    archive = drive(search(fake.problem(HALF), STILL), fake)
    assert min(e.evaluation["macs"] for e in archive) <= 0.5 * fake.macs(fake.space.full)
    with pytest.raises(SearchError, match=r"masked no filter.*threshold 0.01.*Raise threshold"):
        drive(search(fake.problem(HALF), replace(STILL, paper_compat=True)), fake)
    with pytest.raises(SearchError, match="masked no filter"):
        drive(search(fake.problem(), STILL), fake)


def test_damages_that_are_no_numbers_end_the_search() -> None:
    fake = study((8, 8))
    fake.value = {name: np.full(8, np.nan) for name in fake.value}
    with pytest.raises(SearchError, match="masked no filter"):
        drive(search(fake.problem(HALF), replace(STILL, growth=1e3, batches=4)), fake)


def test_with_a_latency_target_groups_that_save_more_latency_go_first() -> None:
    """Equal damage everywhere; in the chain 3-8-64-64-10 the third group saves most, the first least."""
    widths = {}
    for compat in (False, True):
        fake = study((8, 64, 64))
        fake.value = {name: np.full(len(v), 0.64 / len(v)) for name, v in fake.value.items()}
        drive(search(fake.problem(Goal(latency_ratio=0.75)), replace(STILL, paper_compat=compat, threshold=0.5)), fake)
        widths[compat] = fake.candidates[0].plan.widths
    assert widths[True]["layer0.conv1"] < 8
    assert widths[False]["layer0.conv1"] == 8
    assert widths[False]["layer1.conv1"] < 64


def test_a_latency_that_is_predicted_too_low_is_measured_and_masking_goes_on() -> None:
    fake = study((16, 24, 32))
    honest = fake.metrics
    fake.metrics = lambda plan, top1, *, latency: replace(  # type: ignore[method-assign]
        honest(plan, top1, latency=latency),
        metrics={
            **honest(plan, top1, latency=latency).metrics,
            "latency_ratio": (fake.macs(plan) / fake.macs(fake.space.full)) ** 0.5 + 0.05 * (not plan.is_full),
        },
    )
    archive = drive(search(fake.problem(Goal(latency_ratio=0.7)), STILL), fake)
    assert min(e.evaluation["latency_ratio"] for e in archive) <= 0.7


def test_only_included_groups_are_pruned_and_an_unreachable_target_is_said_first() -> None:
    fake = study()
    archive = drive(search(fake.problem(Goal(macs_ratio=0.8)), replace(STILL, include=("layer[02].*",))), fake)
    assert all(entry.candidate.plan.widths["layer1.conv1"] == 24 for entry in archive)
    fake = study()
    with pytest.raises(SearchError, match=r"macs_ratio 0.3 is out of reach of the 1 included groups"):
        drive(search(fake.problem(Goal(macs_ratio=0.3)), replace(STILL, include=("layer0.*",))), fake)
    with pytest.raises(SearchError, match=r"\['head'\] matches none of the groups"):
        drive(search(fake.problem(HALF), replace(STILL, include=("head",))), fake)
    assert fake.log == []


def test_a_failed_training_leaves_the_weights_and_the_mask() -> None:
    fake = FakeStudy(study().space, fails=lambda c: c.id == 1)
    archive = drive(search(fake.problem(HALF), Options()), fake)
    third = fake.candidates[2]
    assert third.base == "tuned-0"
    assert third.parents == (0,)
    assert third.plan.is_within(fake.candidates[1].plan)
    assert 1 not in {entry.candidate.id for entry in archive}


def test_a_spent_budget_ends_it_with_what_is_masked_brought_to_the_target() -> None:
    fake = study()
    strategy = search(fake.problem(HALF, budget=Budget(evaluations=1)), Options())
    request = next(strategy)
    while not isinstance(request, FineTune):
        request = strategy.send(fake(request))
    archive = drive(follow(strategy, strategy.throw(BudgetSpent())), fake)
    (entry,) = archive
    assert entry.candidate.plan.is_within(request.candidate.plan)
    assert 0.99 * 0.5 <= fake.macs(entry.candidate.plan) / fake.macs(fake.space.full) <= 0.5


def follow(strategy, request):
    """The rest of a strategy, from a request on."""
    answer = yield request
    try:
        while True:
            answer = yield strategy.send(answer)
    except StopIteration as end:
        return end.value


def test_it_beats_random_at_equal_macs() -> None:
    fake, rival = study((16, 24, 32)), study((16, 24, 32))
    drive(search(fake.problem(HALF), STILL), fake)
    evaluations = len(fake.candidates)
    archive = drive(random.search(rival.problem(HALF), random.Options(num_plans=evaluations)), rival)
    within = [c for c in fake.candidates if fake.macs(c.plan) <= 0.5 * fake.macs(fake.space.full)]
    assert max(map(fake.top1, within)) > max(entry.evaluation["top1"] for entry in archive) + 0.03


def test_options_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"batches must lie in 1..inf, got 0.*threshold must lie in .*, got 0"):
        Options(batches=0, threshold=0)
    with pytest.raises(ValueError, match=r"stagger \(5\) must not exceed batches \(4\)"):
        Options(batches=4, stagger=5)


def test_a_budget_is_spread_over_decisions_and_no_group_pays_for_the_others() -> None:
    """All channels are alike, and far above theta: without the schedule nothing would go before theta had grown."""
    fake = study((64, 64, 64))
    fake.value = {name: np.full(64, 0.05) for name in fake.value}
    archive, _ = bounded("aofp", Options(), fake, HALF, Budget(work=work(fake, 20_000)))
    plans = [candidate.plan for candidate in fake.candidates]
    assert len(plans) >= 6 and fake.macs(archive[0].candidate.plan) <= 0.5 * fake.macs(fake.space.full)
    for before, after in pairwise([fake.space.full, *plans]):
        assert all(after.widths[name] >= 0.75 * before.widths[name] for name in after.widths)
    trainings = [request for request in fake.requests if isinstance(request, FineTune)]
    assert {request.lr for request in trainings} == {1e-3}
    assert [request.part[0] for request in trainings] == sorted(request.part[0] for request in trainings)
    assert trainings[-1].part[1] == 1.0
