"""DAFP: sparse training is asked for with the right share, and its scores rank all channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search.methods import random as random_search
from secateur.pruning.search.methods.dafp import Options, search, uniform_sparsity
from secateur.pruning.search.protocol import (
    DENSE,
    AuxiliaryTraining,
    Evaluate,
    Evaluation,
    Goal,
    Left,
    Remaining,
    Score,
)
from secateur.pruning.search.support import Limit, SearchError, macs_ratios
from secateur.pruning.search.testing import FakeStudy, drive, study


def plan_of(fake: FakeStudy, target: Goal, options: Options = Options()):  # noqa: B008
    (entry,) = drive(search(fake.problem(target), options), fake)
    return entry.candidate.plan


def test_it_trains_sparsely_and_cuts_the_trained_weights():
    fake = study()
    (entry,) = drive(search(fake.problem(Goal(0.5)), Options(epochs=7, strength=0.001)), fake)
    learn, evaluate = fake.requests
    assert isinstance(learn, AuxiliaryTraining)
    assert (learn.kind, learn.epochs, learn.base) == ("sparsity", 7, DENSE)
    assert learn.options == {
        "target_sparsity": uniform_sparsity(fake.problem(), Limit("", macs_ratios(fake.problem()), 0.5)),
        "strength": 0.001,
        "rate": 0.2,
        "threshold": 0.01,
    }
    assert entry.candidate.base == fake.log[1][1].base != DENSE
    assert evaluate == Evaluate((entry.candidate,), latency=True)
    assert entry.evaluation["macs"] <= 0.5 * fake.macs(fake.space.full)


def test_without_epochs_it_ranks_the_pretrained_network():
    fake = study()
    (entry,) = drive(search(fake.problem(Goal(0.5)), Options(epochs=0)), fake)
    assert fake.requests == [Score("bn_dependency"), Evaluate((entry.candidate,), latency=True)]
    assert entry.candidate.base == DENSE


def test_the_wanted_share_is_that_of_a_uniform_cut():
    problem = study((100, 100)).problem()
    ratios = macs_ratios(problem)
    for keep in (1.0, 0.8, 0.5):
        bound = float(ratios(np.array([[100 * keep, 100 * keep]]).astype(int))[0])
        assert uniform_sparsity(problem, Limit("macs_ratio", ratios, bound)) == pytest.approx(1 - keep)
    fake = study()
    drive(search(fake.problem(Goal(0.5)), Options(target_sparsity=0.33)), fake)
    assert fake.requests[0].options["target_sparsity"] == 0.33


def test_channels_nobody_listens_to_go_first():
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
@given(scale=st.floats(1e-6, 1e6), normalise=st.sampled_from(["mean", "max", "l2"]), group=st.integers(0, 2))
def test_a_common_factor_of_a_group_does_not_matter(scale, normalise, group):
    plans = []
    for factor in (1.0, scale):
        fake = study((8, 10, 12))
        fake.value[fake.space.names[group]] *= factor
        plans.append(plan_of(fake, Goal(0.5), Options(normalise=normalise)))
    assert plans[0] == plans[1]


def test_bare_scores_are_cut_at_one_threshold():
    fake = study((16, 16))
    fake.value["layer0.conv1"] /= 10
    widths = {n: plan_of(fake, Goal(0.4), Options(normalise=n)).widths for n in ("none", "l2")}
    assert widths["none"]["layer0.conv1"] < widths["l2"]["layer0.conv1"]
    assert min(widths["none"].values()) >= 2  # a tenth


def test_a_training_that_fails_says_so():
    fake = study()

    def answer(request):
        reply = fake(request)
        failed = Evaluation("failed", "the training loss is nan at step 3")
        return replace(reply, evaluation=failed) if isinstance(request, AuxiliaryTraining) else reply

    with pytest.raises(
        SearchError, match=r"sparse training failed: the training loss is nan at step 3. Lower strength"
    ):
        drive(search(fake.problem(Goal(0.5)), Options()), answer)
    assert [type(request) for request in fake.requests] == [AuxiliaryTraining]


def test_it_beats_random_at_equal_evaluations():
    wins = 0
    for seed in range(10):
        fake, twin = study(), study()
        (entry,) = drive(search(fake.problem(Goal(0.5), seed), Options(epochs=0)), fake)
        (other,) = drive(random_search.search(twin.problem(Goal(0.5), seed), random_search.Options(num_plans=1)), twin)
        wins += entry.evaluation["top1"] > other.evaluation["top1"]
    assert wins == 10


def test_options_out_of_range_are_listed():
    with pytest.raises(ValueError, match=r"target_sparsity must lie in 0..1, got 1.5; rate must"):
        Options(target_sparsity=1.5, rate=-1)
    with pytest.raises(SearchError, match="needs a target"):
        plan_of(study(), Goal())


def test_wide_layers_are_not_punished_for_their_width():
    """Alike channels in narrow and wide groups: the Euclidean norm takes from the wide one first, the mean does not."""
    fake = study((16, 64, 16))
    rng = np.random.default_rng(0)
    fake.value = {n: rng.uniform(0.5, 1.5, s) for n, s in fake.space.sizes.items()}
    fake.top1 = lambda candidate: 0.5
    ratios = {}
    for normalise in ("mean", "l2"):
        widths = plan_of(fake, Goal(0.5), Options(normalise=normalise, spread=1, per_cost=False)).widths
        ratios[normalise] = {n: w / fake.space.sizes[n] for n, w in widths.items()}
    assert max(ratios["mean"].values()) - min(ratios["mean"].values()) < 0.25
    assert ratios["l2"]["layer1.conv1"] < 0.6 * ratios["l2"]["layer0.conv1"]


def test_sparse_training_takes_what_the_budget_holds():
    """Asked for more, it would be refused, and the pretrained network ranked."""
    fake = study()
    left = Left(work=70.0, epoch={"work": 10.0})  # 7 epochs
    for work, kind in ((left, AuxiliaryTraining), (replace(left, work=7.0), Score)):
        strategy = search(fake.problem(Goal(0.5)), Options())
        assert isinstance(next(strategy), Remaining)
        request = strategy.send(work)
        assert isinstance(request, kind)
        assert not isinstance(request, AuxiliaryTraining) or request.epochs == pytest.approx(6.3)
