"""What a run is held against at its end."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.device_profiles import load_profile
from secateur.device_profiles.profile import Budgets
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.run.facts import Both, Facts
from secateur.pipeline.stages.gate import check, checks_of
from secateur.pruning.search.protocol import Goal
from tests.pipeline.helpers import made_up_facts

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def held_against(facts: Facts, goal: Goal = Goal(), combine: str = "worst", **gate: Any) -> dict[str, Any]:  # noqa: B008
    """The checks by name."""
    section = RunFile.model_fields["gate"].default.model_copy(update=gate)
    sections = {"export": SimpleNamespace(tolerance=1e-4), "device": SimpleNamespace(combine=combine)}
    config = SimpleNamespace(gate=section, **sections)
    profile = load_profile("local").model_copy(update={"name": "quick", "budgets": Budgets(p50_ms=0.5)})
    workload = SimpleNamespace(metric="top1")
    run: Any = SimpleNamespace(config=config, workload=workload, profiles=[profile], goal=goal)
    return {check.name: check for check in checks_of(run, facts, facts.gate.models)}


def test_the_compact_model_is_smaller_and_its_costs_add_up(finished: Any) -> None:
    run, facts = finished
    base, compact = facts.gate.models
    assert compact.macs <= 0.8 * base.macs
    assert compact.params < base.params
    assert compact.size_bytes == (run.directory / "compact.onnx").stat().st_size
    assert compact.timing == facts.benchmark.latency.compact


@pytest.mark.parametrize(
    ("value", "relation", "bound", "ok"),
    [(1, "<=", 1, True), (2, "<=", 1, False), (1, ">", 1, False), (2, ">", 1, True)],
)
def test_a_bound_holds_or_does_not(value: float, relation: str, bound: float, ok: bool) -> None:
    compared = check("x", value, relation, bound)
    assert (compared.ok, compared.value) == (ok, value)


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("relation", ["<=", ">"])
def test_what_is_unknown_does_not_hold(value: float | None, relation: str) -> None:
    compared = check("x", value, relation, 1.0)
    assert not compared.ok
    assert compared.value is None


def test_what_is_not_asked_for_is_not_checked() -> None:
    nothing = {"max_drop": None, "min_speedup": None, "max_macs_ratio": None, "budgets": False}
    assert list(held_against(made_up_facts(), **nothing)) == [
        *("certificate of the cut", "parity of baseline", "parity of compact")
    ]


def test_a_budget_is_held_against_what_the_device_measured() -> None:
    budget = held_against(made_up_facts())["p50_ms"]
    assert (budget.value, budget.bound, budget.ok) == (1.0, 0.5, False)


def test_an_accuracy_that_is_no_number_fails() -> None:
    facts = made_up_facts()
    broken = replace(facts.gate.models.compact, metrics={"top1": None})
    facts = facts.plus(gate=replace(facts.gate, models=Both(facts.gate.models.baseline, broken)))
    assert not held_against(facts, max_drop=0.5)["drop in top1"].ok


def test_the_lower_end_of_the_speed_up_counts_and_must_be_known() -> None:
    facts = made_up_facts()
    checks = [held_against(facts, min_speedup=bound)["speed-up, lower end"] for bound in (1.3, 1.45)]
    assert [held.ok for held in checks] == [True, False]
    unknown = replace(facts.benchmark.speedup, low=None, high=None)
    assert not held_against(made_up_facts(benchmark={"speedup": unknown}), min_speedup=1.0)["speed-up, lower end"].ok


def test_a_compact_model_that_misses_the_macs_target_does_not_pass() -> None:
    facts = made_up_facts()
    base = facts.gate.models.baseline
    for macs, ok in ((500_000, True), (500_001, False)):
        models = Both(base, replace(base, macs=macs))
        checks = held_against(facts.plus(gate=replace(facts.gate, models=models)), Goal(macs_ratio=0.5))
        assert checks["search target: MACs ratio"].ok is ok


@pytest.mark.parametrize(
    ("low", "high", "ok"),
    [
        (2.1, 2.2, True),  # faster than asked for
        (1.9, 2.1, True),  # the interval of the ratio contains the target
        (1.8, 1.95, False),  # slower
        (1.5, 2.5, False),  # cannot tell
        (None, None, False),
    ],
)
def test_a_latency_target_is_held_against_the_interval_of_the_final_timing(
    low: float | None, high: float | None, ok: bool
) -> None:
    facts = made_up_facts()
    speedup = replace(facts.benchmark.speedup, low=low, high=high, value=2.0)
    facts = made_up_facts(benchmark={"speedup": speedup})
    found = held_against(facts, Goal(latency_ratio=0.5))["search target: latency ratio, lower end"]
    assert found.ok is ok
    mean = held_against(facts, Goal(latency_ratio=0.5), combine="mean")
    assert mean["search target: latency ratio, lower end"] == found
