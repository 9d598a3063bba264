"""What every search method promises. A new module in ``pruning/search/methods`` joins this suite by existing."""

from __future__ import annotations

import dataclasses
import functools
import random as stdlib_random
import re

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from secateur.pipeline.run.opening import least_budget
from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import DENSE, RANDOM, AuxiliaryTrained, Evaluate, FineTune, FineTuned, Goal
from tests.pruning.search.fakes import FakeStudy, drive, study

NAMES = METHODS.names()
TARGET = Goal(macs_ratio=0.6)
SPACES = {"fine": ((8, 12, 16), 1), "coarse": ((64, 24, 64), 8)}


def make(space: str) -> FakeStudy:
    sizes, multiple = SPACES[space]
    return study(sizes, multiple, frozen=["layer1.conv1"] if space == "coarse" else [])


def run(method: str, fake: FakeStudy, seed: int = 0):
    module = METHODS.load(method)
    return drive(module.search(fake.problem(TARGET, seed), module.Options()), fake)


@functools.cache
def first_run(method: str, space: str):
    """``(study, archive)`` of one run with default options, shared by the tests that only look at it."""
    fake = make(space)
    return fake, run(method, fake)


def bare(archive):
    """An archive as comparable values."""
    return [(entry.candidate, dict(entry.evaluation.metrics)) for entry in archive]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_the_same_seed_finds_the_same_and_global_randomness_is_left_alone(method, space):
    fake, twin = make(space), make(space)
    before = stdlib_random.getstate(), np.random.get_state()[1].tolist()
    first = run(method, fake)
    assert (stdlib_random.getstate(), np.random.get_state()[1].tolist()) == before
    stdlib_random.seed(1)
    np.random.seed(1)
    assert bare(run(method, twin)) == bare(first)
    assert twin.requests == fake.requests


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_replaying_the_answers_repeats_the_requests(method, space):
    fake, archive = first_run(method, space)
    log = list(fake.log)

    def replay(request):
        recorded, answer = log.pop(0)
        assert request == recorded
        return answer

    module = METHODS.load(method)
    again = drive(module.search(fake.problem(TARGET), module.Options()), replay)
    assert log == []
    assert bare(again) == bare(archive)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_ids_count_up_in_ask_order_and_parents_come_first(method, space):
    fake, _ = first_run(method, space)
    assert [c.id for c in fake.candidates] == list(range(len(fake.candidates)))
    assert all(parent < c.id for c in fake.candidates for parent in c.parents)
    assert all(c.origin for c in fake.candidates)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_every_plan_lies_in_the_space(method, space):
    fake, _ = first_run(method, space)
    space = fake.space
    for candidate in fake.candidates:
        assert candidate.plan.sizes == space.full.sizes
        for name, kept in candidate.plan.kept.items():
            assert all(type(i) is int for i in kept), "indices must be plain integers to be written as JSON"
            assert len(kept) in space.allowed.get(name, (space.full.sizes[name],))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_a_base_was_trained_before_and_has_every_channel(method, space):
    fake, _ = first_run(method, space)
    plans = {DENSE: fake.space.full, RANDOM: fake.space.full}
    for request, answer in fake.log:
        asked = request.candidates if isinstance(request, Evaluate) else ()
        asked = (request.candidate,) if isinstance(request, FineTune) else asked
        assert all(c.plan.is_within(plans[c.base]) for c in asked)
        if isinstance(answer, FineTuned):
            plans[answer.base] = plans[request.candidate.base] if request.write_back else request.candidate.plan
        elif isinstance(answer, AuxiliaryTrained):
            plans[answer.base] = fake.space.full


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_requests_are_never_empty(method, space):
    fake, _ = first_run(method, space)
    assert all(request.candidates for request in fake.requests if isinstance(request, Evaluate))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_the_archive_holds_evaluated_plans(method, space):
    fake, archive = first_run(method, space)
    assert isinstance(archive, tuple)
    assert archive
    asked = {c.id: c for c in fake.candidates}
    for entry in archive:
        assert dataclasses.replace(asked[entry.candidate.id], base=entry.candidate.base) == entry.candidate
        assert entry.evaluation.status == "ok"
        assert not np.isnan(fake.problem().reward(entry.evaluation))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_the_best_plan_meets_the_macs_target(method, space):
    fake, archive = first_run(method, space)
    within = TARGET.macs_ratio * fake.macs(fake.space.full)
    assert min(entry.evaluation["macs"] for entry in archive) <= within
    assert max(archive, key=lambda entry: entry.evaluation["macs"] <= within).evaluation["macs"] > 0.2 * within


@pytest.mark.parametrize("method", NAMES)
def test_a_latency_target_alone_is_met(method):
    fake, module = make("fine"), METHODS.load(method)
    target = Goal(latency_ratio=0.8)
    archive = drive(module.search(fake.problem(target), module.Options()), fake)
    assert min((fake.macs(e.candidate.plan) / fake.macs(fake.space.full)) ** 0.5 for e in archive) <= 0.8


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", NAMES)
def test_failed_candidates_are_survived_and_left_out(method, space):
    fake = make(space)
    fake.fails = lambda c: c.id % 7 == 3
    archive = run(method, fake)
    assert archive
    assert all(entry.candidate.id % 7 != 3 for entry in archive)


@pytest.mark.parametrize("method", NAMES)
def test_options_are_frozen_documented_and_closed(method):
    options = METHODS.load(method).Options
    assert dataclasses.is_dataclass(options)
    assert options.__dataclass_params__.frozen
    for field in dataclasses.fields(options):
        assert re.search(rf"^\s+{field.name}: \S", options.__doc__, re.MULTILINE), f"{field.name} is not documented"
    adapter = TypeAdapter(options)
    assert adapter.validate_python({}) == options()
    with pytest.raises(ValidationError, match="no_such_option"):
        adapter.validate_python({"no_such_option": 1})


@pytest.mark.parametrize("method", NAMES)
def test_the_docstring_begins_with_one_sentence_for_the_list(method):
    assert re.fullmatch(r"[A-Z].{20,110}\.", METHODS.descriptions()[method])


@pytest.mark.parametrize("method", NAMES)
def test_the_least_budget_that_lists_show_is_that_of_the_defaults(method):
    """``Least budget: 2 evaluations and 1 a group, 1 epoch.``: read without importing, for a network of any size."""
    stated = METHODS.stated("Least budget")[method]
    shape = r"(\d+) evaluations?(?: and (\d+) a group)?(?:, ([\d.]+) epochs?)?"
    fixed, each, epochs = re.fullmatch(shape, stated).groups(default="0")
    for name in SPACES:
        problem = make(name).problem(TARGET)
        least = least_budget(method, problem, METHODS.load(method).Options())
        assert least.evaluations == int(fixed) + int(each) * len(problem.space.names)
        assert (least.epochs or 0.0) == pytest.approx(float(epochs))
        assert least.seconds is None and least.work is None
