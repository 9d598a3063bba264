"""Kept results can be computed again, and any number in them that was changed is found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from secateur.pipeline import errors
from secateur.pipeline.cli import app as cli
from secateur.pipeline.files import sha256_of
from secateur.pipeline.lifecycle import figures
from secateur.pipeline.lifecycle.results import UnitFacts, read_unit, write_results
from secateur.pipeline.lifecycle.results_page import of_row, page, verdict
from secateur.pipeline.lifecycle.rows import Bound, read_row
from secateur.pipeline.lifecycle.verify import unit_folders, verify
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.run import Run, create_run_directory
from tests.pipeline.helpers import perform
from tests.pipeline.lifecycle.rows import UNIT, write_row

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The results of a finished unit."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_HOME", str(folder / "home"))
        write_row(folder, patch)
        with Run(create_run_directory(UNIT.config()), Silent()) as run:
            run.tracker.start()
            perform(run, "report")
        write_results(UNIT, run.directory, folder / "results" / "small" / UNIT.label)
        yield folder / "results"


@pytest.fixture
def results(kept: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(kept, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def _row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_row(tmp_path, monkeypatch)


def unit_folder(results: Path) -> Path:
    return results / "small" / UNIT.label


def changed(results: Path, change: Change, seal: bool = True) -> None:
    """Change the facts, as somebody would who knows of the digest."""
    file = unit_folder(results) / "facts.json"
    content = json.loads(file.read_text())
    change(content)
    if seal:
        content["digest"] = UnitFacts.model_validate_json(json.dumps(content)).own_digest
    file.write_text(json.dumps(content))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_what_was_kept_is_verified(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "verify", str(results)) == errors.EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("VERIFIED: 1 units agree")
    facts = read_unit(unit_folder(results))
    assert facts.figure("macs_removed") >= 0.4 and facts.training is not None and facts.training.keep == "best"
    assert all(file.stat().st_size < 200_000 for file in results.rglob("*") if file.is_file())


def _other_bits(content: dict[str, Any]) -> None:
    """Every figure follows from the answers, and these were made up."""
    found = content["figures"]
    bits = figures.unpacked(found["right"]["compact"], found["images"])
    bits[:] = True
    right = {**found["right"], "compact": figures.packed(bits)}
    told = figures.of_right_answers("top1", right, found["images"], frozenset(), {})
    content["figures"] = {**found, **json.loads(told.model_dump_json(exclude={"macs", "params"}))}


def _set(*place: str, to: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("figures", "accuracy", "compact", to=0.999), "accuracy: recorded"),
        (_set("figures", "accuracy", "base", to=0.1), "accuracy: recorded"),
        (_set("figures", "drop_pp", to=-3.0), "drop_pp: recorded -3.0"),
        (_set("figures", "drop_high_pp", to=0.0), "drop_high_pp"),
        (_set("figures", "macs", "compact", to=1000), "MACs of compact: recorded 1000"),
        (_set("figures", "params", "base", to=10**7), "parameters of base"),
        (_set("figures", "images", to=384), "images: recorded 384"),
        (_set("figures", "metric", to="top5"), "metric: recorded top5"),
        (_set("seed", to=7), "run.yaml has seed 0"),
        (_other_bits, "images with a clear answer are answered otherwise"),
    ],
)
def test_a_changed_number_is_found_also_under_a_right_digest(results: Path, change: Change, told: str) -> None:
    changed(results, change)
    found = verify(unit_folder(results))
    assert any(told in fault for fault in found.faults), found


def test_numbers_that_cannot_be_computed_again_are_under_the_digest(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(results, _set("speedup", "fp32", "value", to=9.0), seal=False)
    assert call(monkeypatch, "verify", str(results)) == errors.EXIT_GATE
    text = capsys.readouterr().out
    assert "facts.json was changed" in text and text.splitlines()[-1].startswith("DIFFERS: 1 of 1")


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "run.yaml"])
def test_a_changed_file_is_found(results: Path, name: str) -> None:
    file = unit_folder(results) / name
    file.write_bytes(file.read_bytes() + b" ")
    assert any(f"{name} was changed" in fault for fault in verify(unit_folder(results)).faults)


def _zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(each) for name, each in state.items()}


def _undecided(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two classes, always the same, are nearly equal, whatever the image."""
    bias = torch.zeros_like(state["linear.bias"])
    bias[3], bias[4] = 1.0, 1.0 + 1e-6
    return {**state, "linear.weight": torch.zeros_like(state["linear.weight"]), "linear.bias": bias}


@pytest.mark.parametrize(("other", "told"), [(_zeros, "answered otherwise"), (_undecided, "of the images undecided")])
def test_other_weights_under_right_sums_are_found(results: Path, other: Any, told: str) -> None:
    file = unit_folder(results) / "model.safetensors"
    file.write_bytes(figures.compact_weights(other(figures.read_weights(file))))
    changed(results, _set("files", "model.safetensors", to=sha256_of(file)))
    assert any(told in fault for fault in verify(unit_folder(results)).faults)


def test_a_run_file_that_names_code_is_refused(results: Path) -> None:
    file = unit_folder(results) / "run.yaml"
    content = yaml.safe_load(file.read_text())
    content["workload"]["model"]["name"] = "evil.py:build"
    (unit_folder(results) / "evil.py").write_text("raise SystemExit('it ran')\n")
    file.write_text(yaml.safe_dump(content))
    changed(results, _set("files", "run.yaml", to=sha256_of(file)))
    (fault,) = verify(unit_folder(results)).faults
    assert "nobody has consented" in fault


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "../../x", "a/b"])
def test_files_outside_the_row_are_not_looked_at(results: Path, name: str) -> None:
    changed(results, lambda content: content["files"].update({name: "0" * 64}))
    assert any("is no file of the row" in fault for fault in verify(unit_folder(results)).faults)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format": 2}', "NaN"])
def test_facts_that_are_none_are_told(results: Path, text: str) -> None:
    (unit_folder(results) / "facts.json").write_text(text)
    (fault,) = verify(unit_folder(results)).faults
    assert "holds no facts of a unit" in fault


def test_a_folder_without_facts_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.UserError, match=r"holds no facts\.json"):
        unit_folders([tmp_path])


def test_the_page_says_what_was_reached_and_by_how_much_it_was_missed(results: Path) -> None:
    text = page(results)
    assert "- Reached (cpu)? Yes" in text and "drop -0.1 pp" in text and "| uniform | 0 |" in text
    found = of_row(results, "small")
    drop = found["uniform"][0].figures.drop_pp
    missed = Bound(figure="drop_pp", unit="uniform", at_most=drop - 1)
    assert verdict([missed], found, "cpu").endswith("missed by 1.00 pp")
    assert verdict([missed], found, "gpu") == "Not known yet: uniform is not run"
    shutil.rmtree(results / "small")
    assert "Not run here: not yet" in page(results)
    assert read_row("small").claim in page(results)
