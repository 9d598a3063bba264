"""Which stages there are, what they are given, and when a kept result counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.pipeline.files import sha256_of
from secateur.pipeline.run.facts import BaselineFacts, Facts, to_json
from secateur.pipeline.stages.order import STAGES, Stage
from tests.pipeline.helpers import made_up_facts

NAMES = [stage.name for stage in STAGES]
BY_NAME = {stage.name: stage for stage in STAGES}
RUN: Any = SimpleNamespace(run_id="r", config=SimpleNamespace(digest="d"))


def test_a_stage_needs_nothing_that_comes_after_it() -> None:
    assert all(NAMES.index(need) < NAMES.index(stage.name) for stage in STAGES for need in stage.needs)


def test_every_stage_has_facts_of_its_own() -> None:
    assert list(vars(made_up_facts())) == NAMES


def test_a_stage_sees_only_what_it_says_that_it_needs(tmp_path: Path) -> None:
    seen: list[Facts] = []

    def look(run: Any, facts: Facts) -> BaselineFacts:
        seen.append(facts)
        return facts.baseline

    stage = Stage("look", "Look", look, needs=("baseline",))
    run: Any = SimpleNamespace(directory=tmp_path)
    assert stage.perform(run, made_up_facts()) == to_json(made_up_facts().baseline)
    assert list(vars(seen[0])) == ["baseline"]
    with pytest.raises(AttributeError, match="search"):
        _ = seen[0].search


def test_a_result_counts_only_while_the_files_it_names_are_unchanged(tmp_path: Path) -> None:
    stage, file = BY_NAME["baseline"], tmp_path / "baseline.safetensors"
    file.write_text("weights")
    result = {"origin": "trained", "files": {file.name: sha256_of(file)}}
    assert stage.stands(result, tmp_path)
    file.write_text("others")
    assert not stage.stands(result, tmp_path)
    file.unlink()
    assert not stage.stands(result, tmp_path)


@pytest.mark.parametrize("result", [{}, {"origin": "trained"}, {"origin": [], "files": {}}])
def test_a_result_that_cannot_be_read_does_not_count(result: dict[str, Any], tmp_path: Path) -> None:
    assert not BY_NAME["baseline"].stands(result, tmp_path)


def test_a_key_holds_what_the_result_follows_from() -> None:
    results = {"baseline": {"origin": "trained", "files": {}}, "gate": {"passed": True}}
    key = BY_NAME["report"].key(RUN, results)
    assert key == {
        "run": "r",
        "config": "d",
        "stage": "report",
        "version": 2,
        "facts": json.dumps(results, sort_keys=True),
    }


def test_the_gate_is_found_by_its_earlier_name() -> None:
    earlier = BY_NAME["gate"].key(RUN, {"baseline": {}}, by_earlier_names=True)
    assert (earlier["stage"], earlier["facts"]) == ("judge", '{"baseline": {}}')
    assert BY_NAME["report"].key(RUN, {"gate": {}}, by_earlier_names=True)["facts"] == '{"judge": {}}'
    assert BY_NAME["export"].key(RUN, {}, by_earlier_names=True) == BY_NAME["export"].key(RUN, {})
