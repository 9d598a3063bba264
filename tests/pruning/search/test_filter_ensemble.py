"""Linear filter ensembles: the regression against known worths, the masks, the rounds, and a real small network."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import nn

from secateur.pruning.cost import cost, costs
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.mask_regression import Fit, Units, draw, ridge
from secateur.pruning.search.methods import random as random_search
from secateur.pruning.search.methods.filter_ensemble import Options, _positive, estimate, search
from secateur.pruning.search.protocol import (
    DENSE,
    Budget,
    Evaluate,
    Evaluation,
    FineTune,
    Goal,
    Left,
    MaskedLoss,
    Problem,
    Remaining,
    Score,
)
from secateur.pruning.search.support import SearchError
from secateur.pruning.search.testing import FakeStudy, at_the_target, drive, study
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.pruning.search.bounded import bounded, work

ONE_SHOT = Options(rounds=1, finetune_epochs=0, spread=1)
KINDS = ["stratified", "bernoulli", "antithetic", "layerwise"]


def result_of(generator, answer):
    """What a generator of requests returns."""
    return drive(generator, answer)


# -- the regression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_additive_loss_gives_its_worths_back(kind):
    rng = np.random.default_rng(3)
    sizes = [4, 12, 24]
    level = np.repeat([0.1, 1.0, 0.4], sizes)  # between groups as well as within them
    beta = level * rng.random(sum(sizes))
    removed = draw(sizes, 10 * sum(sizes), 0.9, kind, rng)
    fit = ridge(removed, 0.7 + removed @ beta)
    assert np.corrcoef(fit.beta, beta)[0, 1] > 0.99
    assert np.allclose(fit.beta, beta, atol=1e-3)
    assert fit.level - fit.centre @ fit.beta == pytest.approx(0.7, abs=1e-2)


@given(
    masks=st.integers(3, 60), units=st.integers(1, 60), seed=st.integers(0, 99), penalty=st.sampled_from([1e-3, 0.1, 1])
)
def test_the_fit_is_the_minimum_of_the_ridge_whichever_gram_matrix_is_the_smaller(masks, units, seed, penalty):
    rng = np.random.default_rng(seed)
    removed, losses = rng.random((masks, units)) < 0.3, rng.normal(size=masks)
    fit = ridge(removed, losses, [penalty])
    Z = removed - removed.mean(axis=0)
    expected = np.linalg.solve(Z.T @ Z + fit.penalty * np.eye(units) + 1e-12 * np.eye(units), Z.T @ losses)
    assert np.allclose(fit.beta, expected, atol=1e-6)


def test_least_squares_on_an_orthogonal_design_is_the_difference_of_means():
    removed = hadamard(16)[:, 1:11] > 0  # balanced columns, orthogonal to each other
    losses = np.random.default_rng(0).normal(size=16)
    difference = [losses[column].mean() - losses[~column].mean() for column in removed.T]
    assert np.allclose(ridge(removed, losses, [0.0]).beta, difference, atol=1e-8)


def test_with_many_bernoulli_masks_it_is_nearly_the_difference_of_means():
    rng = np.random.default_rng(1)
    removed = draw([20, 20], 8000, 0.9, "bernoulli", rng)
    losses = removed @ rng.random(40) + 0.1 * rng.normal(size=8000)
    difference = [losses[column].mean() - losses[~column].mean() for column in removed.T]
    assert np.corrcoef(ridge(removed, losses).beta, difference)[0, 1] > 0.97


def test_standard_errors_are_as_large_as_the_errors():
    rng = np.random.default_rng(2)
    beta = rng.random(30)
    errors = []
    for _ in range(40):
        removed = draw([10, 20], 240, 0.9, "stratified", rng)
        fit = ridge(removed, removed @ beta + 0.3 * rng.normal(size=240), [0.0])
        errors.append((fit.beta - beta) / fit.errors)
    assert np.std(errors) == pytest.approx(1, abs=0.1)
    assert np.mean(np.abs(errors) < 2) == pytest.approx(0.95, abs=0.02)


def test_cross_validation_shrinks_noise_and_leaves_signals():
    rng = np.random.default_rng(4)
    removed = draw([60], 120, 0.9, "bernoulli", rng)
    signal = removed @ np.linspace(0, 1, 60)
    assert ridge(removed, signal).penalty < 1e-3 * ridge(removed, rng.normal(size=120)).penalty
    one = ridge(removed, rng.normal(size=120))
    assert np.abs(one.beta).max() < np.abs(ridge(removed, rng.normal(size=120), [0.0]).beta).max()


@pytest.mark.parametrize("losses", [np.zeros(20), np.full(20, 2.5)])
def test_losses_that_do_not_vary_say_that_nothing_matters(losses):
    removed = draw([6], 20, 0.9, "stratified", np.random.default_rng(0))
    fit = ridge(removed, losses)
    assert not fit.beta.any()
    assert fit.level == losses[0]
    assert fit.r2(removed, losses) == 1
    assert fit.settled


# -- the masks ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(2, 20), min_size=1, max_size=4),
    masks=st.integers(1, 60),
    keep=st.floats(0.05, 0.99),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_every_mask_leaves_a_channel_in_every_group(sizes, masks, keep, kind, seed):
    removed = draw(sizes, masks, keep, kind, np.random.default_rng(seed))
    assert removed.shape == (masks, sum(sizes))
    for part in np.split(removed, np.cumsum(sizes)[:-1], axis=1):
        assert not part.all(axis=1).any()
    if kind == "antithetic":
        pairs = removed[: masks // 2 * 2]
        assert not (pairs[::2] & pairs[1::2]).any()
    if kind == "layerwise":
        touched = [part.any(axis=1) for part in np.split(removed, np.cumsum(sizes)[:-1], axis=1)]
        assert (np.sum(touched, axis=0) <= 1).all()


@pytest.mark.parametrize("kind", ["stratified", "bernoulli", "antithetic"])
def test_a_mask_removes_the_wanted_share_and_every_channel_equally_often(kind):
    removed = draw([20, 40], 6000, 0.9, kind, np.random.default_rng(0))
    assert removed.mean(axis=0) == pytest.approx(0.1, abs=0.02)
    numbers = removed[:, :20].sum(axis=1)
    assert numbers.mean() == pytest.approx(2, rel=0.05)
    if kind == "stratified":
        assert np.bincount(numbers).tolist() == [1200] * 5


def test_fixed_numbers_per_group_could_not_tell_the_groups_apart():
    """Why ``stratified`` varies them."""
    rng = np.random.default_rng(0)
    beta = np.repeat([0.1, 1.0], 10)
    fixed = np.concatenate([rng.random((400, 10)).argsort(axis=1) < 2 for _ in range(2)], axis=1)
    levels = [
        ridge(m, m @ beta).beta.reshape(2, 10).mean(axis=1)
        for m in (fixed, draw([10, 10], 400, 0.8, "stratified", rng))
    ]
    assert levels[0] == pytest.approx([0, 0], abs=1e-6)
    assert levels[1] == pytest.approx([0.1, 1.0], abs=1e-3)


def test_bundles_are_neighbours_in_the_order_of_their_norms():
    fake = study((10, 3))
    first, second = fake.space.names
    plan = fake.space.full.replace({first: (0, 1, 2, 3, 5, 6, 8, 9), second: (1,)})
    order = {first: np.arange(10)[::-1].astype(float), second: np.ones(3)}
    units = Units.of(plan, fake.space.names, order, 3)
    assert [unit.tolist() for unit in units.parts[first]] == [[9, 8, 6], [5, 3, 2], [1, 0]]
    assert second not in units.parts  # a single channel cannot be masked
    (masked,) = units.plans(np.array([[True, False, True]]))
    assert masked.kept == {first: (2, 3, 5), second: (1,)}
    beta = units.spread(np.array([3.0, 6.0, -1.0]))
    assert beta[first].tolist() == [-0.5, -0.5, 2, 2, -np.inf, 2, 1, -np.inf, 1, 1]
    assert beta[second].tolist() == [-np.inf, 2, -np.inf]


# -- sampling until it is enough ---------------------------------------------------------------------------------------


class Noisy:
    """Additive losses with noise; channels of the first group are worthless from the sixth on."""

    def __init__(self, noise: float, pairs: float = 0.0) -> None:
        self.fake, self.noise, self.pairs, self.masks = study((16, 24)), noise, pairs, list[PruningPlan]()
        self.rng = np.random.default_rng(5)
        self.value = {n: self.rng.random(s) + 0.5 for n, s in self.fake.space.sizes.items()}
        self.value[self.fake.space.names[0]][6:] = 0

    def __call__(self, request: object) -> np.ndarray:
        assert isinstance(request, MaskedLoss)
        self.masks += request.plans
        gone = [{n: list(set(range(p.sizes[n])) - set(p.kept[n])) for n in p.kept} for p in request.plans]
        losses = np.array([sum(self.value[n][g].sum() for n, g in one.items()) for one in gone])
        counts = np.array([sum(map(len, one.values())) for one in gone])
        many = np.where(counts > 4, self.rng.normal(size=len(gone)), 0)
        return losses + self.noise * self.rng.normal(size=len(gone)) + self.pairs * many

    def estimate(self, **options):
        units = Units.of(self.fake.space.full, self.fake.space.names, None, 1)
        return result_of(estimate(self.fake.problem(), Options(**options), units, DENSE), self)

    def removed(self, masks: list[PruningPlan]) -> float:
        return float(np.mean([40 - sum(p.widths.values()) for p in masks]))


def test_exact_losses_need_two_masks_per_channel_and_noisy_ones_up_to_eight():
    exact, little, much = Noisy(0.0), Noisy(0.05), Noisy(1.0)
    fits = [noisy.estimate() for noisy in (exact, little, much)]
    numbers = [len(noisy.masks) for noisy in (exact, little, much)]
    assert numbers[0] == 80
    assert numbers[-1] == 320
    assert fits[0].settled
    assert not fits[-1].settled
    assert numbers == sorted(numbers)
    assert len({plan.digest for plan in exact.masks[:50]}) == 50


def test_the_stopping_rule_compares_the_error_with_the_lesser_half():
    beta = np.arange(9.0)  # quantiles 2 and 4
    assert Fit(0.0, np.zeros(9), beta, np.full(9, 0.49), 0.0).settled
    assert not Fit(0.0, np.zeros(9), beta, np.full(9, 0.51), 0.0).settled


def test_channels_that_do_no_good_are_worth_next_to_nothing_in_the_same_order():
    beta = {"a": np.array([1.0, -0.5, -np.inf, 0.0]), "b": np.array([-0.1, 3.0])}
    worth = _positive(beta)
    flat = np.concatenate([*worth.values()])
    assert np.argsort(flat).tolist() == [2, 1, 4, 3, 0, 5]
    assert flat[2] == -np.inf
    assert (np.delete(flat, 2) > 0).all()
    assert np.delete(flat, 2) == pytest.approx([1, 0, 0, 0, 3], abs=1e-5)
    assert (_positive({"a": np.zeros(3)})["a"] > 0).all()


def test_dead_channels_are_within_two_standard_errors_of_nothing():
    fit = Noisy(0.1).estimate()
    dead = np.abs(fit.beta[6:16]) < 2 * fit.errors[6:16]
    assert dead.mean() >= 0.8
    assert fit.beta[6:16].max() < fit.beta[[*range(6), *range(16, 40)]].min()


def test_p_is_raised_where_effects_do_not_add_up():
    smooth, rough = Noisy(0.0), Noisy(0.0, pairs=50.0)
    smooth.estimate(keep=0.8)
    rough.estimate(keep=0.8)
    assert smooth.removed(smooth.masks) == pytest.approx(9, rel=0.15)  # 4 of 16 and 5 of 24
    assert rough.removed(rough.masks[:80]) == pytest.approx(9, rel=0.15)
    assert rough.removed(rough.masks[80:160]) == pytest.approx(5, rel=0.2)
    assert rough.removed(rough.masks[-80:]) < 4


def test_losses_that_are_no_numbers_are_left_out():
    noisy = Noisy(0.0)

    def answer(request):
        losses = noisy(request)
        losses[::7] = np.nan
        losses[3] = np.inf
        return losses

    units = Units.of(noisy.fake.space.full, noisy.fake.space.names, None, 1)
    fit = result_of(estimate(noisy.fake.problem(), Options(), units, DENSE), answer)
    assert np.allclose(fit.beta, np.concatenate([*noisy.value.values()]), atol=1e-3)
    with pytest.raises(SearchError, match=r"80 of 80 masked networks have a loss that is not a number; raise keep"):
        result_of(estimate(noisy.fake.problem(), Options(), units, DENSE), lambda request: noisy(request) * np.nan)


def test_probes_come_in_batches_that_change_nothing():
    fakes = [study(), study()]
    archives = [
        drive(search(f.problem(Goal(0.5)), replace(ONE_SHOT, batch=b, images=64)), f)
        for f, b in zip(fakes, (7, 999), strict=True)
    ]
    assert archives[0] == archives[1]
    first = [request for request in fakes[0].requests if isinstance(request, MaskedLoss)]
    assert all(request.images == 64 and request.base == DENSE for request in first)
    assert {len(request.plans) for request in first} == {7, 144 % 7}


# -- the search --------------------------------------------------------------------------------------------------------


def test_one_shot_beats_random_at_the_same_macs():
    for seed in range(1):
        fake, twin = study(), study()
        (entry,) = drive(search(fake.problem(Goal(0.5), seed), ONE_SHOT), fake)
        assert 0.99 <= entry.evaluation["macs"] / fake.macs(fake.space.full) / 0.5 <= 1
        others = drive(random_search.search(twin.problem(Goal(0.5), seed), random_search.Options(num_plans=1)), twin)
        many = drive(random_search.search(twin.problem(Goal(0.5), seed), random_search.Options(saliency="l1")), twin)
        assert entry.evaluation["top1"] > others[0].evaluation["top1"] + 0.05
        assert entry.evaluation["top1"] >= max(e.evaluation["top1"] for e in many)  # 100 evaluations, values known
        for name, kept in entry.candidate.plan.kept.items():
            assert set(kept) == set(np.argsort(-fake.value[name])[: len(kept)].tolist())


@pytest.mark.parametrize("selection", ["knapsack", "ranking"])
def test_dead_channels_go_first_and_the_rest_stay_while_there_is_room(selection):
    fake = study((12, 12))
    first, second = fake.space.names
    fake.value[first][[1, 5]], fake.value[second][3] = 0, 0
    target = fake.macs(fake.space.full.replace({first: range(10), second: range(11)})) / fake.macs(fake.space.full)
    (entry,) = drive(search(fake.problem(Goal(target)), replace(ONE_SHOT, selection=selection)), fake)
    gone = {name: set(range(12)) - set(kept) for name, kept in entry.candidate.plan.kept.items()}
    assert gone == {first: {1, 5}, second: {3}}
    again = study((12, 12))
    again.value = {name: np.zeros(12) for name in again.value}  # nothing matters: still no more than wanted goes
    (entry,) = drive(search(again.problem(Goal(0.8)), replace(ONE_SHOT, selection=selection)), again)
    assert 0.7 < again.macs(entry.candidate.plan) / again.macs(again.space.full) <= 0.8


def test_worth_per_macs_spares_cheap_groups():
    widths = {}
    for power in (0.0, 1.0):
        fake = study((64, 8, 64))  # a channel costs 11, 128 and 18
        fake.value = {name: np.random.default_rng(1).random(size) / 200 for name, size in fake.space.sizes.items()}
        options = replace(ONE_SHOT, selection="ranking", cost_power=power)
        (entry,) = drive(search(fake.problem(Goal(0.5)), options), fake)
        widths[power] = [*entry.candidate.plan.widths.values()]
    assert widths[1.0][1] < widths[0.0][1]
    assert widths[1.0][0] > widths[0.0][0]
    assert widths[1.0][2] > widths[0.0][2]


def test_rounds_go_by_equal_factors_of_the_cost_within_their_shares_and_end_at_the_target():
    fake = study((32, 48, 64))
    fake.value["layer2.conv1"] /= 10  # would go first, were it not for the bounds
    options = Options(rounds=8, finetune_epochs=3, layer_share=0.25, min_keep=0.2)
    archive = drive(search(fake.problem(Goal(0.35)), options), fake)
    assert all(isinstance(r, MaskedLoss | FineTune) for r in fake.requests)
    assert {r.epochs for r in fake.requests if isinstance(r, FineTune)} == {3}
    plans = [fake.space.full, *(entry.candidate.plan for entry in archive)]
    for before, after in pairwise(plans[:-1]):
        assert after.is_within(before)
        assert fake.macs(after) / fake.macs(before) == pytest.approx(0.35 ** (1 / 8), abs=0.02)
        for name, width in after.widths.items():
            assert width >= np.ceil(0.75 * before.widths[name] - 1e-9)
            assert width >= 0.2 * before.sizes[name]
    assert plans[-1].is_within(plans[-2])
    ratios = [entry.evaluation["macs"] / fake.macs(fake.space.full) for entry in archive]
    assert 0.99 * 0.35 <= ratios[-1] <= 0.35 < ratios[-2]
    assert archive[-1].candidate.projected_share < 0.05
    assert [c.parents for c in fake.candidates] == [(), *((i,) for i in range(len(archive) - 1))]
    assert [c.base for c in fake.candidates] == [DENSE, *(f"tuned-{i}" for i in range(len(archive) - 1))]
    probed = [r.base for r in fake.requests if isinstance(r, MaskedLoss)]
    assert list(dict.fromkeys(probed)) == [c.base for c in fake.candidates]


def test_two_rounds_go_all_the_way_in_the_second():
    fake = study((16, 24, 32), 8)
    archive = drive(search(fake.problem(Goal(0.3)), Options(rounds=2)), fake)
    assert len(archive) == 2
    assert archive[-1].evaluation["macs"] <= 0.3 * fake.macs(fake.space.full) < archive[0].evaluation["macs"]
    assert {r.epochs for r in fake.requests if isinstance(r, FineTune)} == {1}


def test_a_round_that_fails_begins_again_from_the_same_weights():
    fake = study((16, 24, 32))
    fake.fails = lambda candidate: candidate.id == 1
    archive = drive(search(fake.problem(Goal(0.4)), Options(rounds=6)), fake)
    assert [c.base for c in fake.candidates[:4]] == [DENSE, "tuned-0", "tuned-0", "tuned-2"]
    assert 1 not in [entry.candidate.id for entry in archive]
    assert archive[-1].evaluation["macs"] <= 0.4 * fake.macs(fake.space.full)
    fake = FakeStudy(study().space, fails=lambda candidate: True)
    with pytest.raises(SearchError, match="no network that can be evaluated; the last: the fake says so"):
        drive(search(fake.problem(Goal(0.4)), Options()), fake)


def test_large_networks_are_masked_in_bundles():
    fake = study((64, 64))
    drive(search(fake.problem(Goal(0.5)), replace(ONE_SHOT, bundle=8)), fake)
    assert fake.requests[0] == Score("l1", DENSE, fake.space.full)
    plans = [plan for r in fake.requests if isinstance(r, MaskedLoss) for plan in r.plans]
    assert len(plans) <= 8 * 16 + 50
    order = {name: np.argsort(value, kind="stable").reshape(8, 8) for name, value in fake.value.items()}
    for plan in plans[:20]:
        for name, bundles in order.items():
            assert {len(set(bundle.tolist()) & set(plan.kept[name])) for bundle in bundles} <= {0, 8}


def test_what_cannot_be_done_names_the_way_out():
    fake = study()
    with pytest.raises(SearchError, match=r"needs a target: set search.target"):
        drive(search(fake.problem(), Options()), fake)
    with pytest.raises(SearchError, match=r"min_keep 0.8: .* Lower min_keep or raise the target"):
        drive(search(fake.problem(Goal(0.3)), Options(min_keep=0.8)), fake)
    assert fake.log == []
    with pytest.raises(ValueError, match=r"keep must lie in 0.01..0.99, got 1.0"):
        Options(keep=1.0)
    with pytest.raises(ValueError, match="max_masks 1 must not lie below min_masks 2"):
        Options(max_masks=1)


# -- budgets -----------------------------------------------------------------------------------------------------------

HALF = Goal(macs_ratio=0.5)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 10])
def test_however_few_evaluations_it_ends_at_the_target(evaluations):
    fake = study((16, 24, 32))
    archive, _ = bounded("filter_ensemble", Options(), fake, HALF, Budget(evaluations=evaluations))
    assert at_the_target(fake, archive[0].candidate.plan, 0.5)
    assert len(fake.candidates) == min(4, max(1, evaluations - 1))  # one is kept back


@pytest.mark.parametrize("evaluations", [30, 200, 1000])
def test_however_little_work_it_ends_at_the_target(evaluations):
    fake = study((16, 24, 32))
    archive, ran = bounded("filter_ensemble", Options(), fake, HALF, Budget(work=work(fake, evaluations)))
    assert at_the_target(fake, archive[0].candidate.plan, 0.5)
    assert archive[0].candidate.origin == "ensemble"
    assert archive[0].candidate.projected_share < 0.1
    assert ran.spent["image_macs"] <= 1.05 * work(fake, evaluations) + work(fake, 4)


def test_masks_and_trainings_of_all_rounds_get_equal_parts_of_the_work():
    fake = study((32, 32, 32))
    bounded("filter_ensemble", Options(), fake, HALF, Budget(work=work(fake, 3000)))
    masks, epochs = [0], []
    for request in fake.requests:
        if isinstance(request, MaskedLoss):
            masks[-1] += len(request.plans)
        elif isinstance(request, FineTune):
            epochs.append(request.epochs)
            masks.append(0)
    assert len(epochs) == 4
    assert max(masks[:4]) < 2 * min(masks[:4])
    assert max(epochs[:3]) < 2 * min(epochs[:3]) < epochs[3]  # the last one takes what is left


def test_a_small_budget_masks_bundles_on_few_images():
    fake = study((64, 64, 64))
    sizes = {}
    for evaluations in (300, 3000):
        fake = study((64, 64, 64))
        bounded("filter_ensemble", replace(ONE_SHOT, images=500), fake, HALF, Budget(work=work(fake, evaluations)))
        masked = next(r for r in fake.requests if isinstance(r, MaskedLoss) and not r.plans[0].is_full)
        removed = [set(range(64)) - set(plan.kept["layer0.conv1"]) for plan in masked.plans]
        sizes[evaluations] = min(len(one) for one in removed if one), masked.images
    assert sizes[300][0] > sizes[3000][0]
    assert 64 <= sizes[300][1] <= sizes[3000][1]


# -- a fully connected network -----------------------------------------------------------------------------------------


DEAD = [3, 11]


class Perceptron:
    """A small trained fully connected network as an oracle: probes mask hidden units, evaluations prune them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(600, 8, generator=generator)
        self.y = ((self.x[:, 0] * self.x[:, 1] > 0).long() + 2 * (self.x[:, 2] > 0).long()).long()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
        for _ in range(400):
            self.net.zero_grad()
            F.cross_entropy(self.net(self.x), self.y).backward()
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter -= 0.5 * parameter.grad
                self.net[2].weight[:, DEAD] = 0  # nobody listens to these
        self.graph = trace(self.net, self.x[:1])
        self.space = SearchSpace.of(self.graph.groups)

    def metrics(self, plan: PruningPlan) -> Evaluation:
        with torch.no_grad():
            out = prune(self.net, self.graph, plan)(self.x)
        top1 = (out.argmax(1) == self.y).float().mean().item()
        ratio = cost(self.graph, plan).macs / cost(self.graph, self.space.full).macs
        return Evaluation(metrics={"top1": top1, "macs": float(cost(self.graph, plan).macs), "latency_ratio": ratio})

    def loss(self, plan: PruningPlan) -> float:
        masks = [torch.from_numpy(plan.mask(name)) for name in self.space.names]
        with torch.no_grad():
            hidden = torch.relu(self.net[0](self.x)) * masks[0]
            return F.cross_entropy(self.net[4](torch.relu(self.net[2](hidden)) * masks[1]), self.y).item()

    def __call__(self, request: object):
        if isinstance(request, MaskedLoss):
            return np.array([self.loss(plan) for plan in request.plans])
        if isinstance(request, Remaining):
            return Left()
        assert isinstance(request, Evaluate)
        return tuple(self.metrics(c.plan) for c in request.candidates)

    def problem(self, target: float) -> Problem:
        def totals(widths: np.ndarray) -> dict[str, np.ndarray]:
            return {"macs": costs(self.graph, widths).macs.astype(float)}

        whole = self.metrics(self.space.full)
        return Problem(self.space, whole, lambda e: e["top1"], totals, Goal(target), np.random.default_rng(0))


def test_a_fully_connected_network_is_pruned_by_the_loss_its_units_save():
    oracle = Perceptron()
    full = oracle.space.full
    assert oracle.space.names == ("0", "2")
    units = Units.of(full, oracle.space.names, None, 1)
    fit = result_of(estimate(oracle.problem(0.5), Options(), units, DENSE), oracle)
    alone = [
        oracle.loss(full.replace({name: [i for i in range(size) if i != k]})) - oracle.loss(full)
        for name, size in oracle.space.sizes.items()
        for k in range(size)
    ]
    assert np.corrcoef(fit.beta, alone)[0, 1] > 0.8  # with one unit left out at a time
    assert (np.abs(fit.beta[DEAD]) < 2 * fit.errors[DEAD]).all()
    (entry,) = drive(search(oracle.problem(0.5), ONE_SHOT), oracle)
    assert entry.evaluation["macs"] <= 0.5 * oracle.metrics(full)["macs"]
    widths, rng = [entry.candidate.plan.widths[name] for name in oracle.space.names], np.random.default_rng(1)
    drawn = [{name: rng.random(size) for name, size in oracle.space.sizes.items()} for _ in range(20)]
    same = [oracle.metrics(oracle.space.decode(widths, saliency))["top1"] for saliency in drawn]
    assert entry.evaluation["top1"] > max(same)
