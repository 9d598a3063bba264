"""The rows of published claims are whole: every run file valid, every unit and control there, every figure known."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from secateur.pipeline.config.json_schema import whole
from secateur.pipeline.errors import UserError
from secateur.pipeline.lifecycle import rows
from secateur.pipeline.lifecycle.rows import PROFILES, ROWS, Unit, other_pixels, read_row, row_names, units_of
from tests.pipeline.lifecycle.rows import write_row

NAMES = row_names()
FILES = sorted(file for file in ROWS.glob("*/*.yaml") if file.name != "row.yaml")


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(whole())


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_run_files_are_valid_and_name_the_schema(validator: Draft202012Validator, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert list(validator.iter_errors(yaml.safe_load(text))) == []
    schema = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / schema).resolve() == (ROWS.parents[1] / "config" / "run-file.schema.json").resolve()
    assert file.stem in read_row(file.parent.name).units


@pytest.mark.parametrize("name", NAMES)
def test_every_unit_can_be_made_in_every_profile(name: str) -> None:
    for profile in PROFILES:
        for unit in units_of(name, profile, 2):
            config = unit.config()
            assert config.seed == unit.seed and config.compute == rows.COMPUTE[profile]
            assert config.name == f"{name}-{unit.name.replace('_', '-')}" or name == "filter-ensembles-mlp"


@pytest.mark.parametrize("name", NAMES)
def test_shared_controls_differ_from_the_method_in_nothing_but_the_method(name: str) -> None:
    row = read_row(name)
    for shared in row.shared.values():
        of, _, unit = shared.partition("/")
        assert unit in read_row(of).units
        own = Unit(name, row.units[0], 0, "cpu").config()
        control = Unit(of, unit, 0, "cpu").config()
        assert control.workload == own.workload
        assert control.search.target == own.search.target
        trained = {"from_scratch": own.finetune.from_scratch, "distill": own.finetune.distill}
        assert control.finetune.model_copy(update=trained) == own.finetune


def test_images_with_other_pixels_are_places_of_the_test_split() -> None:
    found = other_pixels(read_row("ccep-resnet56"))
    assert len(found) == 20 and all(0 <= place < 10_000 for place in found)


def test_a_goal_that_names_no_unit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_row(tmp_path, monkeypatch, goal={"cpu": [{"figure": "drop_pp", "unit": "ccep", "at_most": 1}]})
    with pytest.raises(UserError, match="names units that are neither in units nor in shared: ccep"):
        read_row("small")


def test_an_unknown_row_is_told_with_those_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_row(tmp_path, monkeypatch)
    for name in ("big", "../small", "."):
        with pytest.raises(UserError, match="known: small"):
            read_row(name)
