"""Facts are the same after a trip through JSON, to the last digit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from secateur.pipeline.run.facts import (
    Both,
    Facts,
    LatencyFacts,
    StageFacts,
    TimedOnDevice,
    TimedResults,
    from_json,
    to_json,
)
from secateur.pipeline.tracking import Decision
from secateur.pipeline.tracking.registry import Gate
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import Candidate, Entry, Evaluation
from tests.pipeline.helpers import made_up_facts

THIRD = 0.1 + 0.2
"""A number whose last digit is easily lost."""


def several_devices() -> Facts:
    """Facts in which all that may be left out is there."""
    facts = made_up_facts()
    timing = replace(facts.benchmark.latency.compact, p50_ms=THIRD, energy_mj=1.5)
    after = TimedResults(
        latency=Both(timing, timing), speedup=facts.benchmark.speedup, flags=("drift",), name="detections", found=3
    )
    own = TimedOnDevice(
        latency=Both(timing, timing), speedup=facts.benchmark.speedup, flags=(), statistic="wall", postprocessing=after
    )
    device = replace(facts.search.device, curves={"conv": {8: THIRD, 16: 2.0}}, noise_floor=0.01)
    latency = LatencyFacts(measured=2, predicted=9, trusted=True, median_error=THIRD, spearman=0.9, half_width=0.1)
    gates = (Gate("parity", None, 1e-4, False, "unknown"), Gate("accuracy", 0.9, 0.8, True, "", 0.85, 0.95))
    return made_up_facts(
        search={"devices": {"quick": device, "pi": device}, "latency": replace(latency, devices={"pi": latency})},
        benchmark={"fleet": {"quick": own, "pi": own}, "postprocessing": after},
        promote={"devices": {"quick": Decision("tiny", "2", "quick", None, gates, False, "run", "")}},
    )


@pytest.mark.parametrize("facts", [made_up_facts(), several_devices()], ids=["one device", "several"])
@pytest.mark.parametrize("stage", list(vars(made_up_facts())))
def test_facts_survive_a_trip_through_json(facts: Facts, stage: str) -> None:
    kept: StageFacts = getattr(facts, stage)
    data = json.loads(json.dumps(to_json(kept), allow_nan=False))
    assert from_json(stage, data) == kept
    assert to_json(from_json(stage, data)) == data


def test_what_is_absent_is_left_out_and_what_is_unknown_is_null() -> None:
    data = made_up_facts().to_json()
    assert "devices" not in data["search"] and data["search"]["agreement"] is None
    assert not {"fleet", "postprocessing"} & set(data["benchmark"])
    assert "energy_mj" not in data["benchmark"]["latency"]["baseline"]
    assert "energy_mj" not in data["gate"]["models"]["baseline"]
    assert "forward" not in data["search"]["reference"]
    assert data["search"]["device"]["noise_floor"] is None


def test_counts_stay_whole_numbers() -> None:
    spent = made_up_facts().to_json()["search"]["spent"]
    assert json.dumps(spent) == '{"evaluations": 4.0, "images_forwarded": 256}'


def test_the_figures_of_a_model_stand_beside_each_other() -> None:
    model = made_up_facts().to_json()["gate"]["models"]["compact"]
    assert list(model)[:5] == ["top1", "macs", "params", "size_bytes", "p50_ms"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_of_json_is_none_or_infinite(value: float) -> None:
    plan = PruningPlan({"a": 4}, {"a": (0, 1)})
    broken = Entry(Candidate(0, plan, "x"), Evaluation("failed", "no numbers", {"loss": value, "macs": 2.0}))
    facts = made_up_facts(finetune={"finals": (broken,)})
    data = to_json(facts.finetune)
    assert data["finals"][0]["evaluation"]["metrics"] == {"loss": None, "macs": 2.0}
    read: Any = from_json("finetune", data)
    assert math.isnan(read.finals[0].evaluation["loss"])
    proof = replace(facts.export.certificate, max_relative_error=value)
    assert to_json(replace(facts.export, certificate=proof))["certificate"]["max_relative_error"] is None


def test_what_an_earlier_version_wrote_besides_is_left_out() -> None:
    data = to_json(made_up_facts().baseline)
    assert from_json("baseline", {**data, "alias": "champion"}) == made_up_facts().baseline


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        ("baseline", {"origin": "trained"}),
        ("baseline", {"origin": 3, "files": {}}),
        ("finetune", {"best": {}, "finals": [], "files": {}}),
        ("finetune", {"best": None, "finals": [], "files": {}}),
        ("gate", {"models": {"baseline": {}, "compact": {}}, "files": {}}),
    ],
)
def test_what_are_no_facts_of_a_stage_is_refused(stage: str, data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=stage if data.get("origin") is None else "origin|files"):
        from_json(stage, data)


def test_a_stage_that_is_not_done_cannot_be_asked() -> None:
    facts = Facts(baseline=made_up_facts().baseline)
    with pytest.raises(AttributeError, match="search"):
        _ = facts.search
    assert facts.register is None and facts.promote is None
