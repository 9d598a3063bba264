"""``secateur runs``: every run of the home with its state, from its directory alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from secateur.pipeline import errors
from secateur.pipeline.run.journal import Journal
from tests.pipeline.cli.test_app import Captured, call
from tests.pipeline.helpers import made_up_facts, tiny_config


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A home with a finished run, one that failed its gate, one that was stopped and one that is damaged."""
    folder = tmp_path / "home" / "runs"
    config = yaml.safe_dump(tiny_config(tmp_path).model_dump(mode="json"))
    for name, passed in (
        ("tiny-1-good", True),
        ("tiny-2-bad", False),
        ("other-3-stopped", None),
        ("tiny-4-broken", None),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "run.yaml").write_text(config if "broken" not in name else ": [")
        if passed is not None:
            facts = made_up_facts(gate={"passed": passed}).to_json()
            (folder / name / "report.json").write_text(json.dumps({"facts": facts}))
    return folder


def listed(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> dict[str, str]:
    assert call(monkeypatch, "runs", "list", "--json") == errors.EXIT_OK
    return {run["run"]: run["status"] for run in json.loads(capsys.readouterr().out)}


def test_every_run_is_listed_with_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, runs: Path
) -> None:
    status = {"tiny-1-good": "passed", "tiny-2-bad": "not passed", "other-3-stopped": "stopped"}
    assert listed(monkeypatch, capsys) == {**status, "tiny-4-broken": "unreadable"}
    assert call(monkeypatch, "runs", "list") == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("tiny-1-good", "90.00%", "+0.00 pp", "1.50x"))


def test_a_run_that_goes_on_is_running(monkeypatch: pytest.MonkeyPatch, capsys: Captured, runs: Path) -> None:
    with Journal(runs / "other-3-stopped" / "journal.jsonl", "r", "0"):
        assert listed(monkeypatch, capsys)["other-3-stopped"] == "running"
    assert listed(monkeypatch, capsys)["other-3-stopped"] == "stopped"


def test_a_run_is_shown_by_the_beginning_of_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, runs: Path
) -> None:
    assert call(monkeypatch, "runs", "show", "other") == errors.EXIT_OK
    assert f"secateur resume {runs / 'other-3-stopped'}" in capsys.readouterr().out
    assert call(monkeypatch, "runs", "show", "tiny") == errors.EXIT_USER
    assert "tiny-1-good, tiny-2-bad" in capsys.readouterr().err
