from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec

import numpy as np
import optuna as library
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Evaluate, Goal
from secateur.pruning.search.support import Limit, SearchError, macs_ratios
from secateur.pruning.search.testing import FakeStudy, drive, study

method = METHODS.load("optuna")
Options, search, fitted, blocks_of = method.Options, method.search, method.fitted, method.blocks_of
HALF = Goal(macs_ratio=0.5)
PRESENT = sorted(name for name in method.SAMPLERS if find_spec(method.NEEDS.get(name, "numpy")))


def run(fake: FakeStudy, target: Goal = HALF, seed: int = 0, **options):
    return drive(search(fake.problem(target, seed), Options(**options)), fake)


def ratio(fake: FakeStudy, plan) -> float:
    return fake.macs(plan) / fake.macs(fake.space.full)


@settings(max_examples=20, deadline=None)
@given(
    profile=st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    bound=st.floats(0.05, 1),
    multiple=st.sampled_from([1, 4]),
)
def test_the_plan_is_the_largest_multiple_of_the_profile_within_the_limit(profile, bound, multiple):
    fake = study((16, 24, 32), multiple)
    space = fake.space
    limit = Limit("macs_ratio", macs_ratios(fake.problem()), max(bound, ratio(fake, space.smallest())))
    found = fitted(space, profile, limit)

    def at(scale: float) -> list[int]:
        return [space.snap(n, min(1, scale * r) * space.sizes[n]) for n, r in zip(space.names, profile, strict=True)]

    costs = limit.ratios(np.array([at(scale) for scale in np.linspace(0, 1 / min(profile), 301)]))
    assert max(costs[costs <= limit.bound]) <= limit.of(found) <= limit.bound


def test_without_a_target_the_profile_is_the_plan():
    space = study((16, 24, 32)).space
    assert fitted(space, [0.5, 0.25, 1.0], None) == [8, 6, 32]


def test_neighbours_share_a_block():
    space = study((8,) * 5).space
    names = space.names
    assert blocks_of(space, None) == list(names) == blocks_of(space, 5) == blocks_of(space, 9)
    assert blocks_of(space, 1) == [names[0]] * 5
    assert blocks_of(space, 2) == [names[0]] * 3 + [names[3]] * 2
    assert len(set(blocks_of(space, 3))) == 3


def test_the_groups_of_a_block_have_one_keep_ratio():
    fake = study((16, 16, 16, 16))
    run(fake, Goal(), blocks=2, num_plans=20)
    widths = np.array([fake.space.encode(c.plan) for c in fake.candidates])
    assert (widths[:, 0] == widths[:, 1]).all()
    assert (widths[:, 2] == widths[:, 3]).all()
    assert (widths[:, 1] != widths[:, 2]).any()


def test_the_first_plan_is_uniform_and_every_plan_is_at_the_target():
    fake = study((16, 24, 32))
    archive = run(fake, num_plans=30)
    first = fake.candidates[0].plan.widths
    assert len({round(width / fake.space.sizes[n], 1) for n, width in first.items()}) == 1
    ratios = [ratio(fake, entry.candidate.plan) for entry in archive]
    assert max(ratios) <= 0.5
    assert min(ratios) > 0.4
    rewards = [fake.problem().reward(entry.evaluation) for entry in archive]
    assert rewards == sorted(rewards, reverse=True)
    for entry in archive:
        for name, kept in entry.candidate.plan.kept.items():
            assert set(kept) == set(np.argsort(-fake.value[name])[: len(kept)].tolist())


def test_no_plan_is_evaluated_twice_and_a_small_space_ends_early():
    fake = study((8, 8), 2)
    archive = run(fake, num_plans=1000, max_repeats=10)
    digests = [c.plan.digest for c in fake.candidates]
    assert len(digests) == len(set(digests)) == len(archive) < 20


def test_only_repeats_in_a_row_end_the_search():
    """Drawn at random, all plans of a small space turn up, though repeats are many long before the last does."""
    fake = study((8, 8), 2)
    run(fake, Goal(), num_plans=1000, max_repeats=20, sampler="random")
    assert len(fake.candidates) == 16


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_are_one_request_and_the_last_is_shorter(batch):
    fake = study((32, 48, 64))
    archive = run(fake, num_plans=10, batch=batch)
    sizes = [len(r.candidates) for r in fake.requests if isinstance(r, Evaluate)]
    assert sum(sizes) == len(archive) == 10
    assert max(sizes) == batch
    assert all(r.latency for r in fake.requests if isinstance(r, Evaluate))


def sharp(seed: int = 0) -> FakeStudy:
    """Eight groups, of which four are worth a hundred times the others: the best profile is far from uniform."""
    fake = study((24,) * 8)
    rng = np.random.default_rng(seed)
    fake.value = {
        n: (0.5 + rng.random(24)) * (0.9 / (4 * 1.01 * 24)) / (100 if g % 2 else 1)
        for g, n in enumerate(fake.space.names)
    }
    return fake


def test_it_beats_random_search_at_equal_evaluations():
    random = METHODS.load("random")
    gains = []
    for seed in range(2):
        ours, theirs = sharp(), sharp()
        best = run(ours, seed=seed, num_plans=40)[0].evaluation["top1"]
        options = random.Options(num_plans=40, saliency="l1", tolerance=0.1)
        other = drive(random.search(theirs.problem(HALF, seed), options), theirs)
        gains.append(best - max(entry.evaluation["top1"] for entry in other))
    assert min(gains) > 0.0
    assert np.mean(gains) > 0.02


@pytest.mark.parametrize("name", PRESENT)
def test_every_sampler_runs_quietly_and_the_same_under_the_same_seed(name, caplog, capfd):
    options = {"num_plans": 4, "max_repeats": 3} if name == "gp" else {"num_plans": 15, "max_repeats": 5}
    few = {"gp": {"n_startup_trials": 2}, "tpe": {"n_startup_trials": 5}}.get(name, {})
    level, state = library.logging.get_verbosity(), np.random.get_state()[1].tolist()
    runs = [study((16, 24)), study((16, 24)), study((16, 24))]
    archives = []
    for fake, seed in zip(runs, (1, 1, 2), strict=True):
        np.random.seed(seed + len(archives)) if archives else None
        archives.append(run(fake, seed=seed, sampler=name, sampler_options=few, **options))
        if len(archives) == 1:
            assert np.random.get_state()[1].tolist() == state
    assert runs[0].requests == runs[1].requests
    assert archives[0] == archives[1]
    assert [c.plan for c in runs[0].candidates] != [c.plan for c in runs[2].candidates]
    assert {c.origin for c in runs[0].candidates} == {name}
    assert library.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]


def test_the_library_is_left_as_it_was_while_the_strategy_waits(monkeypatch):
    fake = study()
    monkeypatch.setattr(logging.getLogger("optuna"), "level", logging.INFO)
    filters, level = list(warnings.filters), library.logging.get_verbosity()
    assert level == logging.INFO
    strategy = search(fake.problem(HALF), Options(sampler="qmc"))
    answer = fake(next(strategy))
    for _ in range(5):
        answer = fake(strategy.send(answer))
        assert library.logging.get_verbosity() == level
        assert warnings.filters == filters


def test_latency_predictions_are_corrected_by_what_was_measured():
    fake = study((16, 24, 32))
    archive = run(fake, Goal(latency_ratio=0.7), num_plans=40)
    measured = [e.evaluation["latency_ratio"] for e in sorted(archive, key=lambda e: e.candidate.id)]
    assert min(measured) <= 0.7
    assert np.mean(measured[10:]) == pytest.approx(0.7, abs=0.02)


def test_both_targets_are_kept():
    fake = study((16, 24, 32))
    archive = run(fake, Goal(macs_ratio=0.4, latency_ratio=0.9), num_plans=20)
    assert all(ratio(fake, entry.candidate.plan) <= 0.4 for entry in archive)


def test_plans_without_a_reward_are_left_out_and_never_win():
    fake = study((16, 24, 32))
    plain = fake.metrics
    fake.metrics = lambda plan, top1, *, latency: plain(
        plan, float("nan") if sum(plan.widths.values()) % 2 else top1, latency=latency
    )
    archive = run(fake, num_plans=30)
    assert archive
    assert all(sum(entry.candidate.plan.widths.values()) % 2 == 0 for entry in archive)
    broken = FakeStudy(study().space, fails=lambda c: True)
    with pytest.raises(SearchError, match=r"could be evaluated \(\d+ tried\); the first: the fake says so"):
        run(broken, num_plans=5)


def test_errors_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'cma'; did you mean 'cmaes'\? Known samplers: cmaes, gp, nsga2, .*tpe"):
        Options(sampler="cma")
    with pytest.raises(ValueError, match=r"'tpe' has no options \['population'\]; it has \[.*'n_startup_trials'"):
        Options(sampler_options={"population": 3})
    with pytest.raises(ValueError, match=r"blocks must lie in 1..inf, got 0; batch must lie in 1..inf, got 0"):
        Options(batch=0, blocks=0)


def test_a_missing_package_is_named_before_anything_is_paid_for(monkeypatch):
    monkeypatch.setattr(method, "NEEDS", {"tpe": "no_such_package"})
    fake = study()
    with pytest.raises(SearchError, match="'tpe' needs the package no_such_package: pip install no_such_package"):
        run(fake)
    assert fake.log == []
