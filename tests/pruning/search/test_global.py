from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Evaluate, Goal, Score, Time
from secateur.pruning.search.support import SearchError
from secateur.pruning.search.testing import FakeStudy, drive, study

method = METHODS.load("global")
Options, search, comparable = method.Options, method.search, method.comparable


def ratio(fake: FakeStudy, plan) -> float:
    return fake.macs(plan) / fake.macs(fake.space.full)


def by_threshold(fake: FakeStudy, scores: dict[str, np.ndarray], target: float) -> dict[str, int]:
    """Brute force: channels leave one by one in the order of one list; each group keeps its best one."""
    order = sorted(
        (float(s), n)
        for n, all_ in scores.items()
        for s in np.sort(all_)[:-1]  # the best channel never goes
    )
    widths = {n: len(s) for n, s in scores.items()}
    for _, name in order:
        if ratio(fake, fake.plan_of([*widths.values()])) <= target:
            break
        widths[name] -= 1
    return widths


@settings(max_examples=30, deadline=None)
@given(target=st.floats(0.2, 0.95), seed=st.integers(0, 99), name=st.sampled_from(["mean", "max", "none"]))
def test_it_cuts_at_one_threshold(target, seed, name):
    rng = np.random.default_rng(seed)
    fake = study((6, 8, 10))
    fake.value = {n: rng.random(s) * rng.choice([0.3, 1, 3]) for n, s in fake.space.sizes.items()}
    options = Options(normalise=name)
    (entry,) = drive(search(fake.problem(Goal(macs_ratio=target)), options), fake)
    scores = comparable(fake.value, options)
    cut = by_threshold(fake, scores, target)
    widths = entry.candidate.plan.widths
    assert ratio(fake, fake.plan_of([*cut.values()])) <= ratio(fake, entry.candidate.plan) <= target
    lost, before = (sum(np.sort(scores[n])[::-1][w:].sum() for n, w in ws.items()) for ws in (widths, cut))
    assert lost <= before + max(map(max, scores.values()))  # channels that still fit came back, or were exchanged
    for n, width in widths.items():  # as many as fit
        wider = [w + (n == m) for m, w in widths.items()]
        assert width == fake.space.sizes[n] or ratio(fake, fake.plan_of(wider)) > target
    for n, kept in entry.candidate.plan.kept.items():
        assert set(kept) == set(np.argsort(-fake.value[n], kind="stable")[: len(kept)].tolist())


def test_scores_are_made_comparable():
    scores = {"a": np.array([1.0, 3.0]), "b": np.array([0.0, 0.0]), "c": np.array([10.0, 20.0, 60.0])}
    mean = comparable(scores, Options(normalise="mean"))
    assert mean["a"].tolist() == [0.5, 1.5]
    assert mean["b"].tolist() == [0, 0]
    assert comparable(scores, Options(normalise="max"))["c"].tolist() == pytest.approx([1 / 6, 1 / 3, 1])
    assert comparable(scores, Options(normalise="none"))["c"].tolist() == [10, 20, 60]


def test_normalisation_keeps_a_group_of_small_numbers():
    fake = study((16, 16, 16))
    values = np.linspace(0.5, 1, 16)
    fake.value = {"layer0.conv1": values, "layer1.conv1": values / 1000, "layer2.conv1": values}
    problem = fake.problem(Goal(macs_ratio=0.6))
    (raw,) = drive(search(problem, Options(normalise="none")), fake)
    assert raw.candidate.plan.widths["layer1.conv1"] < 16 == raw.candidate.plan.widths["layer0.conv1"]
    (mean,) = drive(search(problem, Options()), fake)
    assert max(mean.candidate.plan.widths.values()) - min(mean.candidate.plan.widths.values()) <= 1


def test_per_cost_spares_what_is_cheap():
    """Equal saliency everywhere: by saliency all groups shrink alike, per MACs the expensive one does."""
    fake = study((8, 32, 8))
    fake.value = {n: np.linspace(0.9, 1, s) for n, s in fake.space.sizes.items()}
    problem = fake.problem(Goal(macs_ratio=0.7))
    (plain,) = drive(search(problem, Options(normalise="none")), fake)
    (cheap,) = drive(search(problem, Options(normalise="none", per_cost=True)), fake)
    removed = [sum(fake.space.sizes.values()) - sum(e.candidate.plan.widths.values()) for e in (plain, cheap)]
    assert removed[1] < removed[0]


def test_it_scores_once_and_evaluates_once_with_latency():
    fake = study()
    drive(search(fake.problem(Goal(macs_ratio=0.5)), Options(criterion="bn_scale")), fake)
    first, second = fake.requests
    assert first == Score("bn_scale")
    assert isinstance(second, Evaluate)
    assert second.latency
    assert len(second.candidates) == 1


def test_a_latency_target_is_measured_and_met():
    fake = study()
    (entry,) = drive(search(fake.problem(Goal(latency_ratio=0.7)), Options()), fake)
    assert any(isinstance(request, Time) for request in fake.requests)
    assert 0.6 < entry.evaluation["latency_ratio"] <= 0.7


def test_errors_name_the_way_out():
    fake = study()
    with pytest.raises(SearchError, match="needs a target"):
        drive(search(fake.problem(), Options()), fake)
    with pytest.raises(ValueError, match=r"normalise must be one of \['max', 'mean', 'none'\], got 'median'"):
        Options(normalise="median")
    fake.value["layer1.conv1"] = np.full(24, np.nan)
    with pytest.raises(SearchError, match=r"'l1' gives scores that are not finite for \['layer1.conv1'\]"):
        drive(search(fake.problem(Goal(macs_ratio=0.5)), Options()), fake)
    frozen = FakeStudy(study((16, 24), frozen=["layer1.conv1"]).space, {"layer1.conv1": np.full(24, np.nan)})
    frozen.top1 = lambda candidate: 0.5
    assert drive(search(frozen.problem(Goal(macs_ratio=0.5)), Options()), frozen)
