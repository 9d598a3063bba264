"""A unit is worked on in pieces, also in another place, and leaves its results once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from secateur.pipeline.errors import EXIT_INTERRUPTED, EXIT_OK, SurroundingsError, UserError
from secateur.pipeline.lifecycle import reproduce, unit_state
from secateur.pipeline.lifecycle.reproduce import Budget, _directory, _keep_state, _write
from secateur.pipeline.lifecycle.rows import Unit
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.journal import read_journal
from secateur.pipeline.run.run import Run, create_run_directory
from tests.pipeline.helpers import perform
from tests.pipeline.lifecycle.rows import UNIT, write_row

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


class Clock:
    """Seconds that pass when a piece is worked on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def say(_: str) -> None: ...


@pytest.mark.long
def test_a_paused_run_goes_on_in_another_place_without_repeating_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_row(tmp_path, monkeypatch)
    folder = tmp_path / "results" / "small" / UNIT.label
    with Run(_directory(UNIT, folder, say), Silent()) as run:
        run.tracker.start()
        perform(run, "search")
    _keep_state(UNIT, run.directory, folder)
    before = read_journal(run.directory / "journal.jsonl")
    assert (folder / "state.safetensors").stat().st_size < 1_000_000
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "elsewhere"))
    again = _directory(UNIT, folder, say)
    assert again == tmp_path / "elsewhere" / "runs" / run.directory.name
    with Run(again, Silent()) as moved:
        moved.tracker.start()
        facts = perform(moved, "finetune")
    assert facts.baseline.origin.startswith("reused")
    after = read_journal(again / "journal.jsonl")
    assert after[: len(before)] == before
    assert [r["stage"] for r in after[len(before) :] if r.get("stage") in ("reference", "search")] == []
    assert _directory(UNIT, folder, say) == again, "what is here is as new as the state"


def test_a_state_of_another_run_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_row(tmp_path, monkeypatch)
    folder = tmp_path / "results" / "small" / UNIT.label
    directory = create_run_directory(UNIT.config())
    with Run(directory, Silent()):
        pass
    _write(UNIT, directory, 0)
    _keep_state(UNIT, directory, folder)
    other = Unit("small", "uniform", 1, "cpu")
    (tmp_path / "results" / "small" / other.label).mkdir()
    shutil.copy(folder / "state.safetensors", tmp_path / "results" / "small" / other.label)
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(UserError, match="another run file, profile or seed"):
        _directory(other, tmp_path / "results" / "small" / other.label, say)


@pytest.mark.parametrize(
    "path", ["run/../../evil", "/run/evil", "run", "elsewhere/file", "run/.hidden", "baselines/../x"]
)
def test_a_state_with_other_paths_is_refused(tmp_path: Path, path: str) -> None:
    file = tmp_path / "state.safetensors"
    save_file({path: np.zeros(3, np.uint8)}, file, metadata={"run_id": "a-1", "pieces": "1"})
    with pytest.raises(UserError, match="is no state of a run"):
        unit_state.unpack(file)
    assert not (tmp_path / "home").exists()


def test_a_state_without_a_run_or_that_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    save_file({"run/run.yaml": np.zeros(3, np.uint8)}, file, metadata={"run_id": "../up"})
    with pytest.raises(UserError, match="is no state of a run"):
        unit_state.run_of(file)
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="is no state of a run"):
        unit_state.run_of(file)


def test_pieces_end_with_the_budget_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_row(tmp_path, monkeypatch)
    clock, worked = Clock(), list[tuple[Path, float]]()

    def piece(directory: Path, seconds: float) -> int:
        worked.append((directory, seconds))
        clock.now += seconds
        if not (directory / "journal.jsonl").exists():
            with Run(directory, Silent()):
                pass
        return EXIT_OK if len(worked) > 3 else EXIT_INTERRUPTED

    kept: list[Any] = []
    monkeypatch.setattr(reproduce, "piece", piece)
    monkeypatch.setattr(reproduce, "write_results", lambda *given: kept.append(given))
    results, units = tmp_path / "results", [UNIT, Unit("small", "uniform", 1, "cpu")]
    found = reproduce.reproduce(units, results, Budget(150.0, 60.0, clock), say)
    assert [seconds for _, seconds in worked] == [60.0, 60.0], "none is begun for the last half minute"
    state = results / "small" / UNIT.label / "state.safetensors"
    assert found == {UNIT: "paused"} and unit_state.run_of(state)[1] == 2
    clock.now = 0.0
    assert reproduce.reproduce(units, results, Budget(120.0, 60.0, clock), say) == {UNIT: "finished"}
    assert len({directory for directory, _ in worked}) == 1 and len(kept) == 1
    assert not state.exists()


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (4, SurroundingsError)])
def test_a_run_that_fails_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    write_row(tmp_path, monkeypatch)

    def piece(directory: Path, seconds: float) -> int:
        (directory / "reproduce.log").write_text("Error: the data is gone\n")
        return code

    monkeypatch.setattr(reproduce, "piece", piece)
    with pytest.raises(error, match=rf"(?s)ended with code {code}.*the data is gone"):
        reproduce.reproduce([UNIT], tmp_path / "results", Budget(100.0, 60.0, Clock()), say)


@pytest.mark.long
def test_a_unit_is_run_by_the_product_and_interrupted_by_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_row(tmp_path, monkeypatch)
    directory = create_run_directory(UNIT.config())
    _write(UNIT, directory, 0)
    assert reproduce.piece(directory, 2.0) == EXIT_INTERRUPTED
    results = tmp_path / "results"
    assert reproduce.reproduce([UNIT], results, Budget(1e9), say) == {UNIT: "finished"}
    assert reproduce.reproduce([UNIT], results, Budget(1e9), say) == {UNIT: "was finished"}
    facts = json.loads((results / "small" / UNIT.label / "facts.json").read_text())
    assert (facts["row"], facts["unit"], facts["seed"]) == ("small", "uniform", 0)
