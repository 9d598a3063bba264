from __future__ import annotations

import functools
import math
from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search.group_evolution import Individual, Subproblem, _fit, crossover, evolve, initial, mutate
from secateur.pruning.search.methods.ccep import Options, _chosen, search
from secateur.pruning.search.protocol import Budget, Candidate, Evaluate, FineTune, Goal, Time
from secateur.pruning.search.support import Limit, SearchError, macs_ratios
from secateur.pruning.search.testing import BASELINE, FakeStudy, drive, study
from tests.pruning.search.bounded import bounded

PLAIN = Options(start="dense", informed="", survival="accuracy", finetune_epochs=30)
"""The authors' loop, with our order of mutation, and the way to the target that is ours."""
FAST = replace(PLAIN, outer_iterations=2, generations=4)


def part_of(size: int, ratio_bound: float, channel_multiple: int = 1) -> Subproblem:
    space = study((size,), channel_multiple).space
    return Subproblem.of(space, Candidate(0, space.full, "snapshot"), "layer0.conv1", ratio_bound)


def narrowest(size: int, ratio_bound: float) -> int:
    """Width after a round in which every bit is considered for removal."""
    part = part_of(size, ratio_bound)
    eager = Options(mutation_rate=1.0, ratio_bound=ratio_bound)
    return int(mutate(np.ones(size, dtype=bool), part, eager, np.random.default_rng(0)).sum())


@given(n=st.integers(2, 80), r=st.floats(0, 1), q=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_initial_population_keeps_at_least_the_ratio_bound(n, r, q, seed):
    bits = initial(part_of(n, r), Options(initial_keep=q), np.random.default_rng(seed))
    assert bits.shape == (n,)
    assert bits.sum() >= max(1, math.ceil(r * n - 1e-9))


@given(n=st.integers(2, 80), r=st.floats(0, 1), p=st.floats(0, 1), seed=st.integers(0, 99), compat=st.booleans())
def test_mutation_leaves_at_most_one_filter_less_than_the_ratio_bound(n, r, p, seed, compat):
    part, rng = part_of(n, r), np.random.default_rng(seed)
    options = Options(mutation_rate=p, paper_compat=compat)
    bits = initial(part, options, rng)
    for _ in range(5):
        bits = mutate(bits, part, options, rng)
        assert bits.sum() >= max(1, math.ceil(r * n - 1e-9) - 1)


@pytest.mark.parametrize(("size", "after"), [(16, 14), (32, 28), (64, 57)])
def test_widest_shrink_of_one_round(size, after):
    assert narrowest(size, 0.9) == after


def test_flops_of_resnet56_if_every_group_always_shrinks_by_the_maximum():
    """Cost of the inner widths of ResNet-56, in millions of MACs: 4.72 per block, 3.54 for two of them."""
    blocks = [(16, 4.72)] * 9 + [(32, 3.54)] + [(32, 4.72)] * 8 + [(64, 3.54)] + [(64, 4.72)] * 8
    widths = {16: 16, 32: 32, 64: 64}
    cuts = []
    for _ in range(10):
        widths = {size: narrowest(width, 0.9) for size, width in widths.items()}
        cuts.append(100 * sum(cost * (1 - widths[size] / size) for size, cost in blocks) / 125.49)
    assert cuts == pytest.approx([11.9, 22.3, 32.7, 42.6, 49.4, 55.6, 61.8, 67.5, 73.3, 77.9], abs=0.1)


def test_mutation_goes_both_ways_and_at_the_given_rate():
    part, rng = part_of(1000, 0.0), np.random.default_rng(0)
    half = np.arange(1000) < 500
    flipped = np.mean([mutate(half, part, Options(mutation_rate=0.1), rng) ^ half for _ in range(200)], axis=0)
    assert flipped.mean() == pytest.approx(0.1, abs=0.002)
    assert flipped[:500].mean() == pytest.approx(flipped[500:].mean(), abs=0.005)


def test_a_binding_bound_favours_high_indices_only_in_index_order():
    """Bound 14 of 16: in index order the low indices use up the removals."""
    part, rng = part_of(16, 0.9), np.random.default_rng(0)

    def removed(compat: bool) -> np.ndarray:
        options = Options(mutation_rate=0.5, paper_compat=compat)
        return np.mean([~mutate(np.ones(16, dtype=bool), part, options, rng) for _ in range(2000)], axis=0)

    compat, ours = removed(True), removed(False)
    assert compat[:2].mean() > 5 * compat[-8:].mean()
    assert ours[:8].mean() == pytest.approx(ours[8:].mean(), rel=0.15)


def test_an_emptied_offspring_is_replaced_by_its_parent():
    part = part_of(4, 0.0)
    bits = np.array([True, False, False, False])
    rng = np.random.default_rng(0)
    children = [mutate(bits, part, Options(mutation_rate=0.5), rng) for _ in range(200)]
    assert all(child.any() for child in children)
    emptied = [mutate(np.ones(4, dtype=bool), part, Options(mutation_rate=1.0), rng) for _ in range(3)]
    assert all(child.all() for child in emptied)


@given(n=st.integers(2, 60), r=st.floats(0, 1), seed=st.integers(0, 99))
def test_crossover_takes_the_head_of_one_and_the_tail_of_the_other(n, r, seed):
    part, rng = part_of(n, r), np.random.default_rng(seed)
    first, second = (initial(part, Options(initial_keep=0.5), rng) for _ in range(2))
    child = crossover(first, second, part, rng)
    assert child.sum() >= max(1, math.ceil(r * n - 1e-9))
    assert any((np.r_[first[:c], second[c:]] <= child).all() for c in range(1, n))


def test_crossover_makes_new_offspring_of_two_parents():
    """Without mutation nothing but crossover can propose a new mask after the initial population."""
    options = replace(FAST, outer_iterations=1, mutation_rate=0.0, initial_keep=0.9)
    for rate in (0.0, 1.0):
        fake = study((32, 32))
        drive(search(fake.problem(), replace(options, crossover_rate=rate)), fake)
        offspring = [c for c in fake.candidates if c.origin == "mutation"]
        assert bool(offspring) == bool(rate)
        assert all(len(set(c.parents)) == 2 for c in offspring)


@given(
    n=st.integers(9, 96),
    g=st.sampled_from([2, 4, 8, 16]),
    r=st.floats(0, 1),
    p=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_on_a_device_with_a_channel_multiple_every_width_is_allowed_and_within_the_bound(n, g, r, p, seed):
    part, rng = part_of(n, r, g), np.random.default_rng(seed)
    options = Options(mutation_rate=p)
    allowed = study((n,), g).space.allowed["layer0.conv1"]
    bits = initial(part, options, rng)
    for _ in range(5):
        assert bits.sum() in allowed
        assert bits.sum() >= min(math.ceil(r * n - 1e-9) - 1, allowed[-2])
        bits = mutate(bits, part, options, rng)


def test_a_coarse_width_is_reached_from_both_sides_and_one_step_is_always_possible():
    part, rng = part_of(64, 0.9, 16), np.random.default_rng(0)
    assert part.widths == (48, 64)
    whole = np.ones(64, dtype=bool)
    counts = [int(mutate(whole, part, Options(), rng).sum()) for _ in range(200)]
    assert {*counts} == {48, 64}
    assert 60 < counts.count(48) < 140


def test_going_up_to_an_allowed_width_takes_back_what_was_removed_last():
    part, rng = part_of(64, 0.5, 8), np.random.default_rng(0)
    bits = np.arange(64) < 45
    fitted = [_fit(bits, part, [50, 51, 52, 53, 54], rng) for _ in range(50)]
    up = [f for f in fitted if f.sum() == 48]
    down = [f for f in fitted if f.sum() == 40]
    assert up and down and len(up) + len(down) == 50
    assert all((np.flatnonzero(f & ~bits) == [52, 53, 54]).all() for f in up)
    assert all((f <= bits).all() for f in down)
    more = [f for f in (_fit(bits, part, [50], rng) for _ in range(20)) if f.sum() == 48]
    assert all(f[50] and f[:45].all() for f in more)


@pytest.mark.parametrize("crossover_rate", [0.0, 0.3])
def test_every_group_loses_a_filter_in_every_round(crossover_rate):
    fake = study()
    options = replace(FAST, outer_iterations=4, crossover_rate=crossover_rate)
    archive = drive(search(fake.problem(), options), fake)
    widths = [fake.space.encode(fake.space.full)] + [fake.space.encode(e.candidate.plan) for e in archive]
    assert len(archive) == 4
    assert all((after < before).all() for before, after in pairwise(widths))


def test_the_ea_returns_the_filters_that_are_worth_most():
    """Separable problem: two of 20 filters are worthless, keeping the rest is best."""
    fake = study((20,))
    fake.value["layer0.conv1"] = np.where(np.isin(np.arange(20), [3, 11]), 0.0, 0.01)
    (entry,) = drive(search(fake.problem(), Options(outer_iterations=1, generations=60, initial_keep=0.9)), fake)
    assert set(range(20)) - set(entry.candidate.plan.kept["layer0.conv1"]) == {3, 11}


def test_by_the_loss_it_finds_what_it_finds_by_the_accuracy():
    """The fake's loss is 1 less its accuracy: whoever maximises it finds the worst filters."""
    options = replace(FAST, outer_iterations=3)
    by_accuracy, by_loss = (
        drive(search(study().problem(), replace(options, fitness=fitness)), study()) for fitness in ("", "loss")
    )
    assert [entry.candidate.plan for entry in by_loss] == [entry.candidate.plan for entry in by_accuracy]


def test_fewer_filters_win_among_equals():
    fake = study((20,))
    fake.value["layer0.conv1"] = np.zeros(20)
    (entry,) = drive(search(fake.problem(), Options(outer_iterations=1)), fake)
    assert entry.candidate.plan.widths == {"layer0.conv1": 17}  # ceil(0.9 * 20) - 1


def test_an_individual_cuts_one_group_of_the_snapshot_and_each_generation_is_one_request():
    fake = study()
    drive(search(fake.problem(), FAST), fake)
    base, current = "", fake.space.full
    generations = 0
    for request in fake.requests:
        if isinstance(request, FineTune):
            base, current = f"tuned-{request.candidate.id}", request.candidate.plan
            assert request.candidate.origin == "splice"
            continue
        assert isinstance(request, Evaluate)
        assert not request.latency
        if request.candidates[0].origin == "snapshot":
            continue
        generations += 1
        assert all(c.base == base for c in request.candidates)
        cut = {n for c in request.candidates for n in c.plan.kept if c.plan.kept[n] != current.kept[n]}
        assert len(cut) == 1
        assert len(request.candidates) <= FAST.population
    assert 2 * 3 < generations <= 2 * 3 * (1 + FAST.generations)


def test_no_mask_of_a_group_is_evaluated_twice():
    fake = study()
    drive(search(fake.problem(), replace(FAST, generations=20)), fake)
    asked = [(c.base, c.plan.digest) for c in fake.candidates if c.origin in ("snapshot", "init", "mutation")]
    assert len(asked) == len(set(asked))


def test_the_splice_is_made_of_the_best_pruned_individual_of_each_group():
    fake = study()
    (entry,) = drive(search(fake.problem(), replace(FAST, outer_iterations=1)), fake)
    by_id = {c.id: c for c in fake.candidates}
    full = fake.space.full
    for parent, name in zip(entry.candidate.parents, fake.space.names, strict=True):
        rivals = [c for c in fake.candidates if c.origin != "splice" and c.plan.kept[name] != full.kept[name]]
        best = max(rivals, key=fake.top1)
        assert by_id[parent].plan.kept[name] == entry.candidate.plan.kept[name]
        assert fake.top1(by_id[parent]) == pytest.approx(fake.top1(best))


def test_it_stops_at_the_macs_target():
    fake = study()
    archive = drive(search(fake.problem(Goal(macs_ratio=0.7)), FAST_LONG), fake)
    ratios = [entry.evaluation["macs"] / fake.macs(fake.space.full) for entry in archive]
    assert ratios[-1] <= 0.7 < ratios[-2]


def test_it_stops_at_the_latency_target():
    fake = study()
    archive = drive(search(fake.problem(Goal(latency_ratio=0.8)), FAST_LONG), fake)
    ratios = [entry.evaluation["latency_ratio"] for entry in archive]
    assert ratios[-1] <= 0.8 < ratios[-2]


FAST_LONG = replace(FAST, outer_iterations=50)


def test_it_stops_when_no_group_can_shrink():
    fake = study((16, 16), 8)
    archive = drive(search(fake.problem(), FAST_LONG), fake)
    assert archive[-1].candidate.plan.widths == fake.space.smallest().widths
    assert len(archive) == [c.origin for c in fake.candidates].count("snapshot") < 10


def test_without_fine_tuning_the_splice_is_evaluated_with_latency_on_the_old_base():
    fake = study()
    archive = drive(search(fake.problem(), replace(FAST, finetune_epochs=0)), fake)
    assert not any(isinstance(request, FineTune) for request in fake.requests)
    assert all(entry.candidate.base == "" and "latency_ratio" in entry.evaluation.metrics for entry in archive)


def test_a_group_that_loses_too_much_is_left_alone_for_good():
    fake = study()
    fake.value["layer1.conv1"] = np.full(24, 0.1)
    archive = drive(search(fake.problem(), replace(FAST, freeze_drop=0.08)), fake)
    assert [entry.candidate.plan.widths["layer1.conv1"] for entry in archive] == [24, 24]
    second_round = [c for c in fake.candidates if c.base]
    assert second_round
    assert all(c.plan.widths["layer1.conv1"] == 24 for c in second_round)
    assert archive[-1].candidate.plan.widths["layer2.conv1"] < 32


def test_only_included_groups_are_pruned():
    fake = study()
    archive = drive(search(fake.problem(), replace(FAST, include=("layer[02].*",))), fake)
    assert archive[-1].candidate.plan.widths["layer1.conv1"] == 24
    assert archive[-1].candidate.plan.widths["layer0.conv1"] < 16


def test_failed_individuals_never_win_and_a_failed_splice_is_dropped():
    fake = FakeStudy(study().space, fails=lambda c: c.id % 3 == 1 or (c.origin == "splice" and not c.base))
    with pytest.raises(SearchError, match="spliced no network"):
        drive(search(fake.problem(), FAST), fake)
    fake = FakeStudy(study().space, fails=lambda c: c.id % 3 == 1 and c.origin != "splice")
    archive = drive(search(fake.problem(), FAST), fake)
    winners = {parent for entry in archive for parent in entry.candidate.parents}
    assert winners
    assert not any(parent % 3 == 1 for parent in winners)


def test_a_group_none_of_whose_pruned_individuals_can_be_evaluated_is_left_whole():
    fake = FakeStudy(study().space, fails=lambda c: c.origin != "splice" and c.plan.widths["layer1.conv1"] < 24)
    archive = drive(search(fake.problem(), FAST), fake)
    assert [entry.candidate.plan.widths["layer1.conv1"] for entry in archive] == [24, 24]
    assert archive[-1].candidate.plan.widths["layer2.conv1"] < 32


def test_a_failed_splice_repeats_the_round_from_the_same_snapshot():
    failed: list[int] = []

    def first_splice(candidate: Candidate) -> bool:
        if candidate.origin == "splice" and not failed:
            failed.append(candidate.id)
            return True
        return False

    fake = FakeStudy(study().space, fails=first_splice)
    archive = drive(search(fake.problem(), FAST), fake)
    assert len(archive) == 1
    assert archive[0].candidate.base == f"tuned-{archive[0].candidate.id}"
    assert [c.plan.is_full for c in fake.candidates if c.origin == "snapshot"] == [True, True]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_same_seed_asks_the_same(seed):
    runs = [study(), study()]
    archives = [drive(search(fake.problem(seed=seed), replace(FAST, generations=2)), fake) for fake in runs]
    assert runs[0].requests == runs[1].requests
    assert archives[0] == archives[1]


def tie(fake, worth):
    """Every channel of the fake is worth the same, so that accuracy never decides between equal widths."""
    for name in fake.value:
        fake.value[name] = np.full(fake.space.full.sizes[name], worth)
    return fake


def test_hopeless_individuals_are_given_up_and_the_result_is_the_same():
    options = {"outer_iterations": 4, "finetune_epochs": 1}
    fast, slow = study(), study()
    slow.evaluate = functools.partial(ignore_floor, slow)
    found = drive(search(fast.problem(), Options(**options)), fast)
    expected = drive(search(slow.problem(), Options(**options)), slow)
    assert [e.candidate for e in found] == [e.candidate for e in expected]
    given_up = [a for r, a in fast.log if isinstance(r, Evaluate) for a in a if a.status == "infeasible"]
    assert len(given_up) > 50
    compat = study()
    drive(search(compat.problem(), Options(**options, paper_compat=True)), compat)
    assert all(r.floor is None for r in compat.requests if isinstance(r, Evaluate))


def ignore_floor(fake, candidate, *, latency, floor=None):
    return FakeStudy.evaluate(fake, candidate, latency=latency)


def test_accuracy_counts_in_steps_and_latency_decides_within_one():
    bits = np.array([True, True, False])
    better = Individual(bits, 0.9014, 1, step=0.01, saved=0.0)
    faster = Individual(bits, 0.9001, 2, step=0.01, saved=0.1)
    worse = Individual(bits, 0.8999, 3, step=0.01, saved=0.5)
    assert sorted([worse, better, faster], key=lambda i: i.rank) == [faster, better, worse]
    exact = [replace(i, step=0.0) for i in (better, faster, worse)]
    assert sorted(exact, key=lambda i: i.rank) == exact


def test_latency_aware_groups_without_gain_are_skipped():
    fake = tie(study((16, 16, 16)), 1e-6)
    time = {"layer0.conv1": 0.2, "layer1.conv1": 0.0, "layer2.conv1": 0.2}
    flat = "layer1.conv1"

    def ratio(plan):
        return 1 - sum(gain * (1 - plan.widths[name] / 16) for name, gain in time.items())

    def answer(request):
        return np.array([ratio(p) for p in request.plans]) if isinstance(request, Time) else fake(request)

    options = Options(outer_iterations=3, finetune_epochs=1, latency_aware=True)
    archive = drive(search(fake.problem(), options), answer)
    assert all(entry.candidate.plan.widths[flat] == 16 for entry in archive)
    assert all(archive[-1].candidate.plan.widths[n] < 16 for n in time if n != flat)
    blind = study((16, 16, 16))
    every = drive(search(blind.problem(), replace(options, latency_aware=False)), blind)
    assert every[-1].candidate.plan.widths[flat] < 16
    assert not any(isinstance(request, Time) for request in blind.requests)


def test_an_adaptive_bound_shrinks_dear_groups_faster():
    fake = tie(study((64, 64, 8, 64)), -1e-9)  # fewer is better; MACs grow with the neighbours' widths
    options = Options(outer_iterations=1, finetune_epochs=1, generations=30)
    plans = [
        drive(search(fake.problem(), replace(options, adaptive_bound=a)), fake)[0].candidate.plan.widths
        for a in (False, True)
    ]
    assert plans[1]["layer0.conv1"] < plans[0]["layer0.conv1"]
    assert plans[1]["layer3.conv1"] > plans[0]["layer3.conv1"]


def test_the_round_that_oversteps_the_target_is_taken_back_where_it_hurts_most():
    target = Goal(macs_ratio=0.7)
    kept = {}
    for compat in (False, True):
        fake = study((32, 32, 32))
        options = Options(outer_iterations=20, finetune_epochs=1, ratio_bound=0.5, paper_compat=compat, accuracy_step=1)
        last = drive(search(fake.problem(target), options), fake)[-1]
        kept[compat] = last.evaluation["macs"] / fake.macs(fake.space.full)
    assert kept[True] < kept[False] <= 0.7
    assert kept[False] > 0.6


def test_errors_name_the_way_out():
    fake = study()
    with pytest.raises(SearchError, match=r"'map50' is not a metric .* latency_ratio, loss, .* top1"):
        drive(search(fake.problem(), Options(fitness="map50")), fake)
    with pytest.raises(SearchError, match=r"\['head\*'\] matches none of the groups \['layer0.conv1'"):
        drive(search(fake.problem(), Options(include=("head*",))), fake)
    with pytest.raises(
        ValueError, match=r"population must lie in 1..inf, got 0; mutation_rate must lie in 0..1, got 2"
    ):
        Options(population=0, mutation_rate=2)
    with pytest.raises(ValueError, match="finetune_epochs"):
        Options(finetune_epochs=-1)
    with pytest.raises(ValueError, match="freeze_drop"):
        Options(freeze_drop=float("nan"))


HALF = Goal(macs_ratio=0.5)


def test_a_round_goes_no_further_than_its_share_of_the_way_where_widths_are_coarse():
    """Every group halved in one round, as the bound of coarse widths allows, would keep a quarter of the MACs."""
    fake = study((16, 16, 16), 8)
    options = replace(FAST_LONG, finetune_epochs=1)
    archive = drive(search(fake.problem(HALF), options), fake)
    kept = [1.0, *(entry.evaluation["macs"] / fake.macs(fake.space.full) for entry in archive)]
    assert kept[-1] <= 0.5
    assert len(kept) > 2 and all(after > 0.5 * before for before, after in pairwise(kept))


def test_the_splice_loses_least_fitness_for_the_cost_it_saves():
    """Channels of the first group are worth a tenth of the others': as many of them go as can, then of the others."""
    fake = study((64, 64))
    bits = {gone: np.arange(64) >= gone for gone in (5, 10, 20)}
    known = {
        name: [Individual(bits[gone], 0.9 - worth * gone, gone) for gone in bits]
        for name, worth in (("layer0.conv1", 0.001), ("layer1.conv1", 0.01))
    }
    limit = Limit("macs_ratio", macs_ratios(fake.problem()), 0.73)
    chosen = _chosen(fake.problem(), limit, fake.space.full, known, 0.9)
    assert {name: individual.removed for name, individual in chosen.items()} == {"layer0.conv1": 20}
    chosen = _chosen(fake.problem(), replace(limit, bound=0.7), fake.space.full, known, 0.9)
    assert {name: individual.removed for name, individual in chosen.items()} == {"layer0.conv1": 20, "layer1.conv1": 5}


@pytest.mark.parametrize("start", ["uniform", "global"])
def test_the_warm_start_takes_what_the_rounds_of_the_budget_cannot_reach(start):
    begun = {}
    for evaluations in (40, 60, 600):
        fake = study((32, 32, 32))
        archive, _ = bounded("ccep", Options(start=start), fake, HALF, Budget(evaluations=evaluations))
        first = next(c for c in fake.candidates if c.origin == "snapshot")
        begun[evaluations] = fake.macs(first.plan) / fake.macs(fake.space.full)
        assert archive[0].candidate.origin == start
    assert 0.5 < begun[40] <= begun[60] < begun[600]
    fake = study((32, 32, 32))
    drive(search(fake.problem(HALF), replace(FAST_LONG)), fake)
    assert fake.candidates[0].plan.is_full


def test_one_initial_individual_drops_what_the_saliency_ranks_lowest():
    fake = study((20,))
    drive(search(fake.problem(), replace(FAST, informed="l1", outer_iterations=1, generations=1)), fake)
    first = next(c for c in fake.candidates if c.origin == "init")
    lowest = np.argsort(fake.value["layer0.conv1"])[:3]
    assert set(range(20)) - set(first.plan.kept["layer0.conv1"]) == set(lowest.tolist())


def test_the_reward_ranks_individuals_where_it_is_wanted():
    """With a reward of MACs alone the narrowest individual is the best, whatever it loses."""
    fake = study((20, 20))
    problem = replace(fake.problem(), reward=lambda e: -e["macs"])
    options = replace(FAST, outer_iterations=1, generations=20)
    widths = {
        survival: drive(search(problem, replace(options, survival=survival)), fake)[0].candidate.plan.widths
        for survival in ("reward", "accuracy")
    }
    assert set(widths["reward"].values()) == {17}
    assert min(widths["accuracy"].values()) > 17


def test_a_prediction_that_a_splice_proves_wrong_is_rescaled():
    """The network is really slower than its parts say: later rounds cut more for the same prediction."""
    slow = study((32, 48, 64))
    honest, smallest = slow.latency, slow.space.smallest()

    def latency(plan):
        several = sum(plan.widths[name] < size for name, size in plan.sizes.items()) > 1
        return 1 - 0.7 * (1 - honest(plan)) if several and plan.widths != smallest.widths else honest(plan)

    slow.latency = latency
    options = replace(FAST_LONG, finetune_epochs=0)
    archive = drive(search(slow.problem(Goal(latency_ratio=0.75)), options), slow)
    assert archive[-1].evaluation["latency_ratio"] <= 0.75


def test_rounds_train_for_an_epoch_at_least_or_not_at_all():
    trained = {}
    for epochs in (0.9, 40):
        fake = study((32, 32, 32))
        bounded("ccep", Options(start="dense", finetune_epochs=2), fake, HALF, Budget(evaluations=900, epochs=epochs))
        trained[epochs] = [r.epochs for r in fake.requests if isinstance(r, FineTune)]
    assert trained[0.9] == []
    assert trained[40] and min(trained[40]) >= 1


def test_the_ea_of_one_group_can_be_run_alone():
    fake = study((20,))
    options = replace(PLAIN, fitness="top1", generations=3, paper_compat=True)  # nobody is given up
    found = []

    def alone():
        found.extend((yield from evolve(fake.problem(), options, count(1), part_of(20, 0.9), BASELINE)))
        return ()

    drive(alone(), fake)
    assert found == sorted(found, key=lambda i: i.rank)
    assert all(individual.removed for individual in found) and len(found) == len(fake.candidates)
