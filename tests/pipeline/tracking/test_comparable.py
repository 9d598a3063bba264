"""What candidates are compared by in MLflow's charts."""

from __future__ import annotations

import json
from typing import Any

from secateur.pipeline.tracking.comparable import MOST_PARTS, keep_ratios, name_of, params_of


def plan(**groups: tuple[str, int]) -> str:
    told = {name.replace("__", "."): {"of": size, "keep": keep} for name, (keep, size) in groups.items()}
    return json.dumps({"format": 1, "groups": told})


def record(i: int, kind: str = "evaluation", stage: str = "search", **metrics: float) -> dict[str, Any]:
    candidate = {"id": i, "plan": plan(layer1__0=("0-3,6", 10)), "origin": "mutation"}
    return {"stage": stage, "kind": kind, "candidate": candidate, "evaluation": {"metrics": metrics}}


def test_a_group_s_share_is_what_its_ranges_keep() -> None:
    assert keep_ratios(plan(a=("0-7", 16), b__c=("0,2-3,9", 16))) == {"a": 0.5, "b.c": 0.25}
    assert keep_ratios("no plan") == {}


def test_many_groups_are_told_by_the_parts_of_the_network_they_are_in() -> None:
    many = {f"stage{i % 3}__{i}__conv": ("0-3" if i % 3 else "0-7", 8) for i in range(MOST_PARTS + 1)}
    assert keep_ratios(plan(**many)) == {"stage0": 1.0, "stage1": 0.5, "stage2": 0.5}
    flat = {f"conv{i}": ("0", 4) for i in range(MOST_PARTS + 1)}
    assert keep_ratios(plan(**flat)) == {"all": 0.25}


def test_names_are_given_once_in_a_run() -> None:
    records = [record(7), record(7, "finetune"), record(7, stage="final"), record(8)]
    assert [name_of(one) for one in records] == [
        "search-0007-mutation",
        "search-0007-mutation-finetune",
        "final-0007-mutation",
        "search-0008-mutation",
    ]


def test_a_latency_says_how_it_is_known() -> None:
    assert params_of(record(0)) == {"origin": "mutation", "precision": "fp32", "keep.layer1.0": "0.5"}
    assert params_of(record(0, latency_ratio=0.5, latency_measured=0.0))["latency"] == "predicted"
    assert params_of(record(0, latency_ratio=0.5, latency_measured=1.0))["latency"] == "measured"
