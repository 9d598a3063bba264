"""MetaPruning and Rewarded meta-pruning: the oracles of their specification, and the evolution of widths they share."""

from __future__ import annotations

import functools
import json
import math
from itertools import product
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.plan import SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.methods import meta, rewarded_meta
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    AuxiliaryTrained,
    AuxiliaryTraining,
    BudgetSpent,
    Candidate,
    Evaluate,
    Evaluation,
    FineTune,
    Goal,
    Left,
    Time,
)
from secateur.pruning.search.support import SearchError
from secateur.pruning.search.testing import FakeStudy, chain, drive, study
from secateur.pruning.search.width_evolution import SCALES, Draws, Member, Pool, Settings

BOTH = [meta, rewarded_meta]
HALF = Goal(macs_ratio=0.5)


def run(module: ModuleType, fake: FakeStudy, target: Goal = HALF, seed: int = 0, **options: object):
    return drive(module.search(fake.problem(target, seed), module.Options(**options)), fake)


def draws_of(fake: FakeStudy, target: Goal = HALF, seed: int = 0, **options: object) -> Draws:
    """The draws of a problem whose target needs no measurement."""
    with pytest.raises(StopIteration) as end:
        next(Draws.of(fake.problem(target, seed), Settings(**options)))
    return end.value.value


def members(*nevs: list[int]) -> list[Member]:
    plan = study().space.full
    return [Member(np.array(nev), Candidate(i, plan, "init"), Evaluation()) for i, nev in enumerate(nevs)]


# -- the reward (3.11, 8.3) --------


def rewards(*pairs: tuple[float, float], full_pp: float = 60.0, **options: object) -> list[float]:
    """Fitness of (accuracy in percentage points, MACs in millions) beside ResNet-50's 4100 M."""
    problem = study().problem()
    reference = Evaluation(metrics={"top1": 0.766, "macs": 4100e6})
    problem = type(problem)(**{**vars(problem), "reference": reference})
    fitness = rewarded_meta.Rewards(
        problem, rewarded_meta.Options(**options), Evaluation(metrics={"top1": full_pp / 100})
    )
    return fitness([Evaluation(metrics={"top1": a / 100, "macs": f * 1e6}) for a, f in pairs])


@pytest.mark.parametrize("compat", [True, False])
def test_the_rewards_of_the_authors_log(compat):
    options = {"paper_compat": True} if compat else {"ba_pp": 70.6}
    assert rewards((55.07, 2033.5), (54.73, 1973.21), **options) == pytest.approx([14.49, 14.47], abs=0.005)


@given(st.floats(1, 68), st.floats(0.01, 1), st.floats(400, 4000), st.floats(1.001, 1.02))
def test_the_reward_grows_with_accuracy_and_falls_with_macs(accuracy, more, macs, factor):
    lower, higher, costly = rewards((accuracy, macs), (accuracy + more, macs), (accuracy, macs * factor), ba_pp=70.6)
    assert costly < lower < higher


@given(st.floats(60, 90), st.floats(0, 10))
def test_no_accuracy_is_too_good_for_a_given_ba(accuracy, more):
    lower, higher = rewards((accuracy, 2000), (accuracy + more, 2000), ba_pp=70.6)
    assert lower <= higher


def test_gaps_below_the_margin_count_as_the_margin():
    at, above, far = rewards((68.6, 2000), (75, 2000), (67, 2000), ba_pp=70.6, margin_pp=2)
    assert far < at == pytest.approx(above) == pytest.approx((70.6 / 2) ** 2 * math.log(4100 / 2000))


@pytest.mark.parametrize(("best", "full", "ba"), [(50, 60, 61), (65, 60, 66), (65, math.nan, 66)])
def test_ba_is_the_best_proxy_accuracy_and_a_margin(best, full, ba):
    pairs = (40, 1000), (best, 2000)
    assert rewards(*pairs, full_pp=full) == pytest.approx(rewards(*pairs, ba_pp=ba))
    assert rewards(*pairs, full_pp=full) != pytest.approx(rewards(*pairs, ba_pp=ba + 0.5))


def test_no_accuracy_no_reward():
    unknown, known = rewards((math.nan, 1000), (50, 1000))
    assert unknown == -math.inf < known
    assert rewards((math.nan, 1000)) == [-math.inf]


def test_the_runs_own_reward_can_rank():
    fake = study()
    archive = run(rewarded_meta, fake, fitness="reward", top=1)
    problem = fake.problem()
    asked = [(c, e) for r, a in fake.log if isinstance(r, Evaluate) for c, e in zip(r.candidates, a, strict=True)]
    assert problem.reward(archive[0].evaluation) == pytest.approx(max(problem.reward(e) for _, e in asked))


# -- encoding (3.2) --------


def test_a_gene_is_one_of_31_scales_moved_to_an_allowed_width():
    assert SCALES.tolist() == [round(0.1 + 0.03 * i, 2) for i in range(31)]
    fine, coarse = draws_of(study((100, 64))).table, draws_of(study((100, 64), 8)).table
    assert fine[0].tolist() == [round(100 * s) for s in SCALES]
    assert set(coarse[1].tolist()) == set(range(8, 65, 8))
    assert all(abs(c - 64 * s) <= 4 for c, s in zip(coarse[1], SCALES, strict=True))
    assert draws_of(study((64, 9)), paper_compat=True).table[1].tolist() == [max(1, int(9 * s + 1e-9)) for s in SCALES]


# -- the window and the draws (3.4) --------


@pytest.mark.parametrize("module", BOTH)
@settings(max_examples=8)
@given(st.floats(0.3, 0.9), st.integers(0, 99), st.booleans())
def test_candidates_are_unique_and_inside_the_window(module, target, seed, compat):
    fake = study((32, 48, 64, 64))
    run(module, fake, Goal(macs_ratio=target), seed, paper_compat=compat, iterations=4, top=1)
    searched = [c for c in fake.candidates if c.origin != "final"]
    assert len({c.plan.digest for c in searched}) == len(searched) > 20
    ratios = np.array([fake.macs(c.plan) for c in searched]) / fake.macs(fake.space.full)
    assert ((0.95 * target - 1e-9 <= ratios) & (ratios <= target)).all()


def test_duplicates_are_rejected_and_redrawn_until_the_window_is_exhausted():
    fake = study((8, 12), 4)
    run(meta, fake, Goal(macs_ratio=0.7), tolerance=1.0, iterations=50)
    searched = {tuple(c.plan.widths.values()) for c in fake.candidates if c.origin != "final"}
    full = fake.macs(fake.space.full)
    within = {w for w in product((4, 8), (4, 8, 12)) if fake.macs(fake.plan_of(w)) <= 0.7 * full}
    assert searched == within


def test_initial_genes_come_from_twelve_scales_around_the_target_in_the_paper():
    draws = draws_of(study((64,) * 6), paper_compat=True)
    nevs = np.stack([b.nev for b in draws.random(60)])
    assert draws.centre == 20  # 0.70^2 < 0.5 < 0.73^2
    assert (nevs.min(), nevs.max()) == (14, 25)


def test_a_window_between_coarse_widths_begins_at_the_uniform_plan_below():
    fake = study((16,), 8)
    assert [c.plan.widths for c in run_candidates(fake, Goal(macs_ratio=0.9))] == [{"layer0.conv1": 8}] * 2


def run_candidates(fake: FakeStudy, target: Goal) -> list[Candidate]:
    run(meta, fake, target)
    return fake.candidates


@pytest.mark.parametrize("module", BOTH)
def test_an_empty_window_costs_no_training_and_says_what_was_drawn(module):
    fake = study((16, 16), 8)
    message = (
        r"none of \d+ random width vectors has a macs_ratio of 0\.892\.\.0\.900; they had 0\.\d+\.\.1\.000\. Widen"
    )
    with pytest.raises(SearchError, match=message):
        run(module, fake, Goal(macs_ratio=0.9), paper_compat=True, tolerance=0.009)
    assert fake.log == []


def test_a_target_below_the_scales_names_the_smallest():
    fake = study((64, 64))
    with pytest.raises(SearchError, match=r"macs_ratio 0.01 is out of reach of the 31 scales.* 0.1 it is 0.0[0-9]+"):
        run(meta, fake, Goal(macs_ratio=0.01))


def test_without_a_target_only_a_reward_can_rank():
    with pytest.raises(SearchError, match=r"search\.target"):
        run(meta, study(), Goal())
    fake = study()
    assert run(rewarded_meta, fake, Goal())
    widths = np.array([list(c.plan.widths.values()) for c in fake.candidates])
    assert (widths.min(axis=0) < [4, 6, 8]).all()
    assert (widths.max(axis=0) > [12, 18, 24]).all()


# -- mutation and crossover (3.4) --------


@pytest.mark.parametrize("compat", [True, False])
def test_mutants_move_a_tenth_of_the_genes(compat):
    draws = draws_of(FakeStudy(SearchSpace.of(chain(*[200] * 10))), paper_compat=compat)
    draws.limit = None
    parent = [0, 30, 15, 3, 28, 9, 21, 6, 0, 30]
    births = draws.mutants(members(parent), 1500, Settings(paper_compat=compat, mutation_rate=0.1))
    nevs = np.stack([b.nev for b in births])
    assert ((nevs >= 0) & (nevs <= 30)).all()
    moved = nevs != parent
    assert 0.09 < moved.mean() < 0.25  # unmoved ones and repetitions are duplicates
    steps = np.concatenate([(nevs - parent)[:, g][moved[:, g]] for g in range(10)])
    wraps = nevs[:, 0][moved[:, 0]]
    if compat:
        assert set((steps % 31).tolist()) == set(range(1, 31))
        assert wraps.max() == 30  # from 0 to any other gene
        assert set(nevs[:, 1]) == set(range(31))  # and from 30
    else:
        assert np.abs(steps).max() < 25
        assert wraps.max() < 25
    assert {b.origin for b in births} == {"mutation"}
    assert {b.parents for b in births} == {(0,)}


def test_children_take_each_gene_from_one_of_two_distinct_parents():
    draws = draws_of(study((64,) * 8))
    draws.limit = None
    parents = members([0] * 8, [10] * 8, [20] * 8)
    births = draws.children(parents, 100)
    for birth in births:
        assert set(birth.nev.tolist()) <= {10 * p for p in birth.parents}
        assert len(birth.parents) == 2
    assert {b.parents for b in births} == {(0, 1), (0, 2), (1, 2)}
    share = np.mean([(b.nev == 10 * b.parents[0]).mean() for b in births])
    assert 0.4 < share < 0.6


def test_a_generation_is_half_mutants_half_children_of_the_fittest():
    fake = study((64,) * 8)
    run(meta, fake, iterations=3, population=50, parents=10, top=1, tolerance=0.3)
    scored: list[tuple[float, int]] = []
    for request, answer in fake.log:
        if not isinstance(request, Evaluate) or request.latency:
            continue
        best = {id for _, id in sorted((-a, i) for a, i in scored)[:10]}
        origins = [c.origin for c in request.candidates]
        if scored:
            assert (origins.count("mutation"), origins.count("crossover")) == (25, 25)
            assert all(set(c.parents) <= best for c in request.candidates)
        else:
            assert origins == ["init"] * 50
        scored += [(e["top1"], c.id) for c, e in zip(request.candidates, answer, strict=True)]
    assert len(scored) == 150


# -- stages A and C --------


@pytest.mark.parametrize("module", BOTH)
def test_the_supernet_learns_the_widths_of_the_grid_from_the_pretrained_network(module):
    fake = study((16, 24, 32), 8, frozen=["layer1.conv1"])
    run(module, fake, Goal(macs_ratio=0.7), weights="pruning_net", epochs=5, hidden=64, lr=0.2)
    (request,) = [r for r in fake.requests if isinstance(r, AuxiliaryTraining)]
    assert (request.kind, request.epochs, request.base) == ("pruning_net", 5, DENSE)
    assert json.loads(request.options["widths"]) == {"layer0.conv1": [8, 16], "layer2.conv1": [8, 16, 24, 32]}
    assert {k: v for k, v in request.options.items() if k != "widths"} == {"order": "l1", "hidden": 64, "lr": 0.2}


def test_the_paper_begins_with_random_weights_and_retrains_from_scratch():
    fake = study((32, 48, 64))
    archive = run(meta, fake, paper_compat=True, weights="shared")
    (request,) = [r for r in fake.requests if isinstance(r, AuxiliaryTraining)]
    assert (request.kind, request.base, request.options["order"]) == ("shared", RANDOM, "leading")
    assert {e.candidate.base for e in archive} == {RANDOM}
    assert all(e.candidate.base.startswith("learned") for e in run(meta, study()))
    assert {e.candidate.base for e in run(meta, study(), retrain="inherit")} == {DENSE}
    assert {e.candidate.base for e in run(meta, study(), retrain="scratch")} == {RANDOM}


def test_plans_keep_the_channels_in_the_order_of_the_supernet():
    fake = study()
    run(meta, fake)
    for candidate in fake.candidates:
        assert candidate.base.startswith("learned")
        for name, kept in candidate.plan.kept.items():
            assert set(kept) == set(np.argsort(-fake.value[name], kind="stable")[: len(kept)].tolist())
    plain = study()

    def no_scores(request):
        answer = plain(request)
        return (
            AuxiliaryTrained(answer.base, {}, answer.evaluation) if isinstance(request, AuxiliaryTraining) else answer
        )

    drive(meta.search(plain.problem(HALF), meta.Options()), no_scores)
    assert all(kept == tuple(range(len(kept))) for c in plain.candidates for kept in c.plan.kept.values())


def test_the_fittest_are_measured_at_the_end():
    fake = study((32, 48, 64))
    archive = run(meta, fake, top=4)
    searched = {c.id: c for c in fake.candidates if c.origin != "final"}
    fitness = {c.id: fake.top1(c) for c in searched.values()}
    best = sorted(fitness, key=lambda i: -fitness[i])[:4]
    assert [e.candidate.parents for e in archive] == [(i,) for i in best]
    assert all(searched[i].plan.is_within(e.candidate.plan) for e, i in zip(archive, best, strict=True))
    assert all(0.495 <= e.evaluation["macs"] / fake.macs(fake.space.full) <= 0.5 for e in archive)
    assert all(0 <= e.candidate.projected_share <= 0.1 for e in archive)
    assert all("latency_ratio" in e.evaluation.metrics for e in archive)
    assert sum(r.latency for r in fake.requests if isinstance(r, Evaluate)) == 4


def test_a_short_training_can_choose_between_them():
    fake = study()
    archive = run(meta, fake, top=3, pick_epochs=2, retrain="scratch")
    tuned = [r for r in fake.requests if isinstance(r, FineTune)]
    assert [(r.candidate.base, r.epochs) for r in tuned] == [(RANDOM, 2)] * 3
    assert [e.candidate for e in archive] == [r.candidate for r in tuned]


def test_no_epochs_cut_the_candidates_from_the_pretrained_network():
    fake = study()
    run(meta, fake, weights="shared", epochs=0)
    assert not [r for r in fake.requests if isinstance(r, AuxiliaryTraining)]
    assert {c.base for c in fake.candidates} == {DENSE}


def test_the_supernet_is_trained_for_what_half_of_the_budget_pays_for():
    def left(work: float, epoch: float = 1e12) -> Left:
        return Left(work=work, epoch={"work": epoch, "seconds": 0.0})

    assert Settings().epochs_within(Left()) == 10
    assert Settings().epochs_within(left(4e12)) == 2
    assert Settings(epochs=1).epochs_within(left(4e12)) == 1
    assert Settings().epochs_within(left(2e10)) == 0  # the pretrained network is better than so little
    assert Settings(start="random").epochs_within(left(2e10)) == 0.01
    assert Settings(paper_compat=True).epochs_within(left(4e12)) == 32


def test_a_training_that_diverged_ends_the_search():
    fake = study()

    def answer(request):
        if isinstance(request, AuxiliaryTraining):
            return AuxiliaryTrained("", {}, Evaluation("failed", "the training loss is nan; lower lr"))
        return fake(request)

    with pytest.raises(SearchError, match=r"could not be trained: the training loss is nan; lower lr"):
        drive(meta.search(fake.problem(HALF), meta.Options()), answer)


# -- latency targets --------


def test_the_window_of_a_latency_target_is_corrected_by_measurements():
    fake = study((32, 48, 64))
    archive = run(meta, fake, Goal(latency_ratio=0.7), top=3)
    measured = np.array([(fake.macs(c.plan) / fake.macs(fake.space.full)) ** 0.5 for c in fake.candidates])
    assert np.abs(np.median(measured) - 0.68) < 0.03
    assert min(e.evaluation["latency_ratio"] for e in archive) <= 0.7
    assert len([r for r in fake.requests if isinstance(r, Time)]) == 2


def test_where_the_fittest_are_too_slow_the_next_are_measured():
    fake = study((32, 48, 64))
    slow = fake.answer

    def answer(request):
        result = slow(request)
        if isinstance(request, Evaluate) and request.latency and request.candidates[0].id < 204:
            metrics = {**result[0].metrics, "latency_ratio": 0.9}
            return (Evaluation(metrics=metrics),)
        return result

    fake.answer = answer
    archive = run(meta, fake, Goal(latency_ratio=0.7), top=2)
    measured = [e.evaluation["latency_ratio"] for e in archive]
    assert measured[:4] == [0.9] * 4
    assert measured[-1] <= 0.7
    assert len(measured) in (5, 6)


def test_measured_candidates_are_not_measured_again():
    fake = study()
    archive = run(rewarded_meta, fake, measure=True, fitness="reward", top=2)
    assert all(r.latency for r in fake.requests if isinstance(r, Evaluate))
    assert "final" not in {c.origin for c in fake.candidates}
    assert len(archive) == 2


# -- what goes wrong --------


@pytest.mark.parametrize("module", BOTH)
def test_a_spent_budget_leaves_the_fittest_so_far(module):
    fake, asked = study(), 0
    strategy = module.search(fake.problem(HALF), module.Options(retrain="scratch", top=3))
    request = next(strategy)
    with pytest.raises(StopIteration) as end:
        while True:
            asked += isinstance(request, Evaluate)
            request = strategy.throw(BudgetSpent()) if asked > 2 else strategy.send(fake(request))
    archive = end.value.value
    assert len(archive) == 3
    assert {e.candidate.base for e in archive} == {RANDOM}
    asked_for = {c.id: c.plan for c in fake.candidates}
    assert all(asked_for[e.candidate.id] == e.candidate.plan for e in archive)


@pytest.mark.parametrize("module", BOTH)
def test_a_budget_spent_before_anything_was_evaluated_is_passed_on(module):
    strategy = module.search(study().problem(HALF), module.Options())
    next(strategy)
    with pytest.raises(BudgetSpent):
        strategy.throw(BudgetSpent())


@pytest.mark.parametrize("module", BOTH)
def test_unknown_accuracies_are_never_parents_nor_in_the_archive(module):
    fake = study()
    exact = fake.top1
    fake.top1 = lambda c: math.nan if c.id % 3 == 1 else exact(c)
    archive = run(module, fake)
    assert archive
    assert all(not math.isnan(e.evaluation["top1"]) for e in archive)
    assert all(p % 3 != 1 for c in fake.candidates for p in c.parents)


@pytest.mark.parametrize("module", BOTH)
def test_where_nothing_can_be_evaluated_it_says_so(module):
    fake = study()
    fake.fails = lambda c: True
    with pytest.raises(SearchError, match="no candidate could be evaluated"):
        run(module, fake)


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("options", [{"population": 1}, {"parents": 1}, {"iterations": 1}, {"top": 1}])
def test_sizes_of_one_work(module, options):
    assert run(module, study(), **options)


def test_one_group_is_enough():
    fake = study((64,))
    (best, *_) = run(meta, fake)
    assert best.candidate.plan.widths == {"layer0.conv1": 32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mutant_share": 0.6, "crossover_share": 0.6}, "must not exceed 1"),
        ({"start": "random", "retrain": "inherit"}, "needs start 'pretrained'"),
        ({"epochs": 0, "weights": "pruning_net"}, "weights 'shared' and start 'pretrained'"),
        ({"population": 0, "tolerance": 2}, r"population must lie.*; tolerance must lie"),
    ],
)
@pytest.mark.parametrize("method", ["meta", "rewarded_meta"])
def test_options_that_contradict_each_other_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS.load(method).Options(**options)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"ba_pp": 0}, {"margin_pp": 0}])
def test_ranges_of_the_reward(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rewarded_meta.Options(**options)


# -- does it search? --------


def uneven(seed: int) -> FakeStudy:
    """Nine groups of 40, some worth a hundred times more than others: widths matter."""
    rng, groups = np.random.default_rng(seed), chain(*[40] * 9)
    worth = 10 ** rng.uniform(-2, 0, 9)
    worth *= 0.9 / worth.sum()
    value = {}
    for group, share in zip(groups, worth, strict=True):
        decay = 0.9 ** np.arange(40)
        value[group.name] = share * decay / decay.sum()
    fake = FakeStudy(SearchSpace.of(groups), value)

    def costs(widths: np.ndarray) -> dict[str, np.ndarray]:
        whole = np.pad(widths, ((0, 0), (1, 1)), constant_values=((0, 0), (3, 10)))
        return {"macs": 100.0 * (whole[:, 1:] * whole[:, :-1]).sum(axis=1)}

    fake.costs = costs
    return fake


@functools.cache
def best_of_random(seed: int, num: int) -> float:
    """Accuracy of the best of ``num`` random plans that keep the most salient channels."""
    control, fake = METHODS.load("random"), uneven(seed)
    drive(control.search(fake.problem(HALF, seed), control.Options(num, tolerance=0.1, saliency="l1")), fake)
    return max(fake.top1(c) for c in fake.candidates)


@pytest.mark.parametrize(
    ("module", "options"),
    [(meta, {}), (meta, {"paper_compat": True}), (rewarded_meta, {}), (rewarded_meta, {"fitness": "reward"})],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_random_search_at_equal_evaluations(module, options, seed):
    fake = uneven(seed)
    run(module, fake, seed=seed, **options)
    assert len({c.plan.digest for c in fake.candidates}) <= 210  # the last ten at the target
    assert max(fake.top1(Candidate(0, c.plan, "")) for c in fake.candidates) > best_of_random(seed, 210)


def test_it_comes_near_the_optimum_of_a_small_problem():
    fake = study((31, 31, 31))
    (best, *_) = run(meta, fake, tolerance=1.0)
    reached = fake.top1(Candidate(0, best.candidate.plan, ""))
    table = draws_of(fake).table
    everything = np.array(list(product(*(sorted(set(c.tolist())) for c in table))))
    macs = fake.costs(everything)["macs"]
    feasible = everything[macs <= 0.5 * fake.macs(fake.space.full)]
    kept = [np.concatenate([[0], np.cumsum(np.sort(fake.value[n])[::-1])]) for n in fake.space.names]
    lost = sum(kept[g][-1] - kept[g][feasible[:, g]] for g in range(3))
    assert 0.9 - reached <= np.quantile(lost, 0.001)


def test_the_pool_ranks_by_fitness_and_breaks_ties_by_age():
    pool = Pool(members([0], [1], [2], [3]))
    assert [m.candidate.id for m in pool.best(lambda e: [1.0, math.nan, 2.0, 1.0], None)] == [2, 0, 3]
