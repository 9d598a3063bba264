from __future__ import annotations

import json

import numpy as np
import pytest

from secateur.pruning.search.methods import random
from secateur.pruning.search.methods.dais import Options, search
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    AuxiliaryTrained,
    AuxiliaryTraining,
    Evaluate,
    Evaluation,
    Goal,
    Left,
    Time,
)
from secateur.pruning.search.support import SearchError
from secateur.pruning.search.testing import FakeStudy, drive, study

HALF = Goal(macs_ratio=0.5)


class Taught(FakeStudy):
    """A study whose training gives chosen indicators."""

    indicators: dict[str, np.ndarray]

    def answer(self, request):
        answer = super().answer(request)
        return (
            AuxiliaryTrained(answer.base, self.indicators, answer.evaluation)
            if isinstance(request, AuxiliaryTraining)
            else answer
        )


def taught(on: dict[str, int], sizes=(16, 24, 32), multiple: int = 1, **options: object) -> Taught:
    """The last so many channels of each group are on; of those off and on, later ones a little more."""
    fake = Taught(study(sizes, multiple).space)
    slope = {name: np.linspace(0, 0.1, size) for name, size in fake.space.sizes.items()}
    fake.indicators = {n: slope[n] + 0.9 * (np.arange(len(slope[n])) >= len(slope[n]) - on[n]) for n in slope}
    return fake


def on(*widths: int) -> dict[str, int]:
    return {f"layer{i}.conv1": width for i, width in enumerate(widths)}


def macs_ratio(fake: FakeStudy, plan) -> float:
    return fake.macs(plan) / fake.macs(fake.space.full)


def test_channels_that_are_switched_on_stay() -> None:
    fake = taught(on(12, 16, 24))
    target = Goal(macs_ratio=macs_ratio(fake, fake.plan_of([12, 16, 24])) * 1.005)
    (entry,) = drive(search(fake.problem(target), Options()), fake)
    assert entry.candidate.plan.kept == {
        "layer0.conv1": tuple(range(4, 16)),
        "layer1.conv1": tuple(range(8, 24)),
        "layer2.conv1": tuple(range(8, 32)),
    }
    assert entry.candidate.base == "learned-2"
    assert "latency_ratio" in entry.evaluation.metrics


def test_above_the_target_the_lowest_indicators_go() -> None:
    fake = taught(on(16, 24, 32))
    (entry,) = drive(search(fake.problem(HALF), Options()), fake)
    assert 0.45 < macs_ratio(fake, entry.candidate.plan) <= 0.5
    for name, kept in entry.candidate.plan.kept.items():
        assert kept == tuple(range(fake.space.sizes[name] - len(kept), fake.space.sizes[name]))


@pytest.mark.parametrize("compat", [False, True])
def test_far_below_the_target_the_highest_indicators_come_back_unless_as_in_the_source(compat: bool) -> None:
    fake = taught(on(6, 20, 3))
    (entry,) = drive(search(fake.problem(HALF), Options(paper_compat=compat, spread=1)), fake)
    widths = entry.candidate.plan.widths
    if compat:
        assert widths == on(6, 20, 3)
        return
    assert 0.45 < macs_ratio(fake, entry.candidate.plan) <= 0.5
    assert all(widths[name] >= width for name, width in on(6, 20, 3).items())


def test_a_cheap_channel_that_is_off_never_stands_before_a_dear_one_that_is_on() -> None:
    fake = taught(on(4, 22, 8))  # a channel of layer1 saves the most MACs
    fake.indicators = {name: np.where(value > 0.5, 0.51, 0.49) for name, value in fake.indicators.items()}
    (entry,) = drive(search(fake.problem(HALF), Options(spread=1)), fake)
    assert all(entry.candidate.plan.widths[name] >= width for name, width in on(4, 22, 8).items())


def test_slightly_below_the_target_no_more_comes_back_than_it_takes() -> None:
    fake = taught(on(12, 16, 24))
    ratio = macs_ratio(fake, fake.plan_of([12, 16, 24]))
    (entry,) = drive(search(fake.problem(Goal(macs_ratio=ratio / 0.96)), Options()), fake)
    assert all(entry.candidate.plan.widths[name] >= width - 1 for name, width in on(12, 16, 24).items())
    assert 0.99 <= macs_ratio(fake, entry.candidate.plan) * 0.96 / ratio <= 1
    assert 0 < entry.candidate.projected_share < 0.25


def test_where_all_indicators_are_soft_their_order_chooses() -> None:
    fake = taught(on(16, 24, 32))
    fake.indicators = {name: 0.6 + 0.3 * np.linspace(0, 1, size) for name, size in fake.space.sizes.items()}
    (entry,) = drive(search(fake.problem(HALF), Options()), fake)
    for name, kept in entry.candidate.plan.kept.items():
        assert kept == tuple(range(fake.space.sizes[name] - len(kept), fake.space.sizes[name]))
    assert 0.495 <= macs_ratio(fake, entry.candidate.plan) <= 0.5
    assert entry.candidate.projected_share < 0.25  # the order of the indicators chose, and not the projection


def test_widths_are_the_allowed_ones_next_to_what_is_on() -> None:
    fake = taught(on(21, 30, 2), (32, 32, 32), 8)
    target = Goal(macs_ratio=macs_ratio(fake, fake.plan_of([24, 32, 8])) * 1.01)
    (entry,) = drive(search(fake.problem(target), Options(spread=1)), fake)
    assert entry.candidate.plan.widths == on(24, 32, 8)


def test_the_training_is_asked_for_with_the_target_and_the_options() -> None:
    fake = taught(on(12, 16, 24))
    drive(search(fake.problem(HALF), Options(epochs=7, start="random", lasso=0.5, paper_compat=True)), fake)
    learn, evaluate = fake.requests
    assert isinstance(learn, AuxiliaryTraining)
    assert (learn.kind, learn.epochs, learn.base) == ("indicators", 7, RANDOM)
    assert json.loads(str(learn.options["groups"])) == list(fake.space.names)
    given = {"macs_ratio": 0.5, "latency_ratio": 0, "lasso": 0.5, "lr": 0, "annealing": "harmonic", "savings": "{}"}
    assert given.items() <= dict(learn.options).items()
    assert isinstance(evaluate, Evaluate)
    assert evaluate.latency
    fake = taught(on(12, 16, 24))
    drive(search(fake.problem(HALF), Options()), fake)
    assert fake.requests[0].base == DENSE
    assert fake.requests[0].options["annealing"] == "exponential"


def test_the_options_are_those_that_the_training_knows() -> None:
    from secateur.pipeline.training.auxiliary.indicators import Settings

    fake = taught(on(12, 16, 24))
    drive(search(fake.problem(HALF), Options(lr=0.003)), fake)
    assert Settings.of(fake.requests[0].options).lr == 0.003


def test_a_latency_target_reaches_the_training_as_what_each_group_saves() -> None:
    fake = taught(on(16, 24, 32))
    target = Goal(latency_ratio=0.8, macs_ratio=0.9)
    (entry,) = drive(search(fake.problem(target), Options()), fake)
    assert entry.evaluation["latency_ratio"] <= 0.8
    (learn,) = [request for request in fake.requests if isinstance(request, AuxiliaryTraining)]
    assert (learn.options["latency_ratio"], learn.options["macs_ratio"]) == (0.8, 0.9)
    savings = json.loads(str(learn.options["savings"]))
    assert list(savings) == list(fake.space.names)
    for name, (widths, saved) in savings.items():
        assert widths == sorted(widths)
        assert set(widths) <= set(fake.space.allowed[name])
        assert widths[-1] == fake.space.sizes[name]
        assert saved == sorted(saved, reverse=True)
        assert saved[-1] == 0 < saved[0]
    total = sum(saved[0] for _, saved in savings.values())
    smallest = macs_ratio(fake, fake.space.smallest()) ** 0.5
    assert 1 - total == pytest.approx(smallest)
    assert [type(r) for r in fake.requests].index(Time) < [type(r) for r in fake.requests].index(AuxiliaryTraining)


def test_it_beats_random_when_the_indicators_know_the_channels() -> None:
    fake, rival = taught(on(0, 0, 0)), study((16, 24, 32))
    fake.indicators = {name: value / 0.02 for name, value in fake.value.items()}
    (entry,) = drive(search(fake.problem(HALF), Options()), fake)
    (other,) = drive(random.search(rival.problem(HALF), random.Options(num_plans=1)), rival)
    assert fake.top1(entry.candidate) + 0.05 > other.evaluation["top1"] + 0.08  # its base is 0.05 less accurate


def test_errors_name_the_way_out() -> None:
    fake = taught(on(12, 16, 24))
    with pytest.raises(SearchError, match=r"needs a target: set search.target.macs_ratio"):
        drive(search(fake.problem(), Options()), fake)
    with pytest.raises(SearchError, match="out of reach"):
        drive(search(fake.problem(Goal(macs_ratio=0.001)), Options()), fake)
    assert fake.log == []

    def failing(request):
        return (
            AuxiliaryTrained("", {}, Evaluation("failed", "the training loss is nan"))
            if isinstance(request, AuxiliaryTraining)
            else Left()
        )

    with pytest.raises(SearchError, match="learned no indicators: the training loss is nan"):
        drive(search(fake.problem(HALF), Options()), failing)
    fake = Taught(fake.space, fails=lambda c: True)
    fake.indicators = fake.value
    with pytest.raises(SearchError, match=r"no candidate could be evaluated \(1 tried\); the first: the fake says so"):
        drive(search(fake.problem(HALF), Options()), fake)
    with pytest.raises(ValueError, match=r"epochs must lie in .* got 0"):
        Options(epochs=0)
    with pytest.raises(ValueError, match=r"weight_share must lie in 0.01..0.99, got 1"):
        Options(weight_share=1)
