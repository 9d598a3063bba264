"""The schema that editors check run files by agrees with the reader, is documented whole, and is committed as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from secateur.pipeline.config import json_schema
from secateur.pipeline.config.json_schema import whole
from secateur.pipeline.config.keys import all_keys
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.errors import UserError
from tests.pipeline.helpers import merged

COMMITTED = Path(json_schema.__file__).parent / "run-file.schema.json"
RUNS = Path(json_schema.__file__).parents[1] / "runs"
DIGITS = {"name": "some", "workload": {"name": "classification"}}
WRONG: list[dict[str, Any]] = [
    {"sead": 1},
    {"seed": -1},
    {"workload": {"name": "classificatoin"}},
    {"workload": {"model": {"nme": "cifar_resnet20"}}},
    {"workload": {"input": {"flip": 0.5}}},
    {"search": {"method": "uniform", "options": {"mutation_rate": 0.1}}},
    {"search": {"options": {"num_plans": 10}}},
    {"search": {"latency": {"max_error": 0}}},
    {"reward": {"preset": "mnasnet", "options": {"lambda_macs": 1}}},
]
RIGHT: list[dict[str, Any]] = [
    {},
    {"search": {"options": {"mutation_rate": 0.1}}},
    {"search": {"method": "random", "options": {"num_plans": 10}}},
    {"reward": {"options": {"lambda_macs": 1}}},
    {"finetune": {"distill": None}},
]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(whole())
    return Draft202012Validator(whole())


def is_read(content: dict[str, Any]) -> bool:
    try:
        parse_run_file(yaml.safe_dump(content))
    except UserError:
        return False
    return True


def test_the_committed_schema_is_current() -> None:
    told = "python -m secateur schema --output pipeline/config/run-file.schema.json"
    assert json.loads(COMMITTED.read_text(encoding="utf-8")) == whole(), f"run: {told}"


def test_every_key_has_a_meaning() -> None:
    assert [key.place for key in all_keys() if not key.meaning and not key.place.endswith("workload.name")] == []


@pytest.mark.parametrize("file", sorted(RUNS.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_run_files_are_valid_and_name_the_schema(validator: Draft202012Validator, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert list(validator.iter_errors(yaml.safe_load(text))) == []
    schema = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (RUNS / schema).resolve() == COMMITTED.resolve()


@pytest.mark.parametrize("change", [*RIGHT, *WRONG], ids=str)
def test_what_the_schema_refuses_the_reader_refuses_too(
    validator: Draft202012Validator, change: dict[str, Any]
) -> None:
    content = merged(DIGITS, change)
    assert validator.is_valid(content) == is_read(content) == (change in RIGHT)
