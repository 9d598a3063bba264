"""A run file's faults are reported all together, each with its place, its line and the known alternatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import secateur.pipeline.runs
from secateur.pipeline.config.reading import load_run_file, parse_run_file
from secateur.pipeline.errors import UserError
from tests.pipeline.helpers import TINY

RUN_FILES = sorted(Path(secateur.pipeline.runs.__path__[0]).glob("*.yaml"))

BROKEN = """\
name: no/slashes
sed: 1
workload:
  name: classification
  data:
    source: digits
    image_sise: 16
search:
  method: ccep
  target: {macs_ratio: 1.5}
  options:
    population: 0
    generatoins: 2
finetune: {epochs: many}
reward: {preset: devise}
"""


def faults_of(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_run_file(text, "run.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.stem)
def test_shipped_run_files_are_valid(path: Path) -> None:
    assert load_run_file(path).name


def test_all_faults_are_reported_at_once_with_their_lines() -> None:
    message = faults_of(BROKEN)
    for line, place, hint in [
        (1, "name", "pattern"),
        (2, "sed", "did you mean 'seed'"),
        (7, "workload.data.image_sise", "did you mean 'image_size'"),
        (10, "search.target.macs_ratio", "1.5"),
        (13, "search.options.generatoins", "did you mean 'generations'"),
        (14, "finetune.epochs", "'many'"),
        (15, "reward", "'device'"),
    ]:
        row = next((r for r in message.splitlines() if r.strip().startswith(f"{place} (line {line})")), None)
        assert row is not None, f"no fault for {place} on line {line} in:\n{message}"
        assert hint in row


def test_an_impossible_option_value_is_a_fault_of_that_option() -> None:
    message = faults_of("name: a\nworkload: {name: classification}\nsearch: {options: {population: 0}}\n")
    assert "population" in message
    assert "line 3" in message


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("name: a\nworkload: {name: clasification}\n", "classification"),
        ("name: a\nworkload: {name: classification}\nsearch: {method: cceb}\n", "ccep"),
        ("name: a\nworkload: {name: classification, data: {source: disk}}\n", "folder"),
    ],
)
def test_unknown_names_list_the_known_ones(text: str, known: str) -> None:
    assert known in faults_of(text)


def test_sources_say_what_else_they_need_and_what_they_do_not_use() -> None:
    section = "name: a\nworkload: {name: classification, data: {source: "
    assert "'folder' also needs path" in faults_of(section + "folder}}\n")
    assert "'digits' does not use path" in faults_of(section + "digits, path: x}}\n")


def test_a_key_given_twice_is_a_fault() -> None:
    assert "seed (line 3): given 2 times" in faults_of("name: a\nseed: 1\nseed: 2\nworkload: {name: classification}\n")


def test_an_unknown_key_hides_no_other_fault() -> None:
    message = faults_of("name: a\nworkload: {name: classification}\nsearch: {options: {generations: 0, x: 1}}\n")
    assert "generations" in message.split("search.options.x")[1]


@pytest.mark.parametrize("text", ["- a\n", "", "name: [\n", "just words"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    assert faults_of(text)


def test_overrides_are_checked_like_the_file() -> None:
    text = yaml.safe_dump(TINY)
    assert parse_run_file(text, "x", ["seed=7", "search.target.macs_ratio=0.5"]).search.target.macs_ratio == 0.5
    assert "search.methd" in faults_of(text, "search.methd=random")
    assert "section.key=value" in faults_of(text, "seed")
    assert "'seed' is a value" in faults_of(text, "seed.x=1")


def test_another_method_by_override_begins_with_its_own_options() -> None:
    text = yaml.safe_dump(TINY)
    changed = parse_run_file(text, "x", ["search.options.num_plans=7", "search.method=random"])
    assert changed.search.options == {"num_plans": 7}
    assert parse_run_file(text, "x", ["search.method=ccep"]).search.options == TINY["search"]["options"]


def test_a_missing_file_names_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init --help.*pipeline/runs"):
        load_run_file(tmp_path / "nothing.yaml")


def test_the_digest_names_the_configuration() -> None:
    text = yaml.safe_dump(TINY)
    assert parse_run_file(text).digest == parse_run_file(text).digest
    assert parse_run_file(text).digest != parse_run_file(text, "x", ["seed=8"]).digest


def test_data_and_weights_beside_the_run_file_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere, data = (tmp_path.resolve() / name for name in ("project", "elsewhere", "data"))
    for folder in (project / "photos", elsewhere, data / "boxes", project / "boxes"):
        folder.mkdir(parents=True)
    (project / "net.safetensors").touch()
    text = "name: x\nworkload:\n  name: classification\n  model: {weights: net.safetensors}\n  data: {path: PATH}\n"
    monkeypatch.setenv("SECATEUR_DATA", str(data))

    def read(path: str) -> Any:
        (project / "run.yaml").write_text(text.replace("PATH", path))
        return load_run_file(Path("../project/run.yaml")).workload

    monkeypatch.chdir(elsewhere)
    found = read("photos")
    assert found["data"]["path"] == str(project / "photos")
    assert found["model"]["weights"] == str(project / "net.safetensors")
    for path in ("boxes", str(data), "nowhere"):  # in SECATEUR_DATA, absolute, nowhere
        assert read(path)["data"]["path"] == path
    monkeypatch.chdir(project)
    assert read("photos")["data"]["path"] == "photos"
