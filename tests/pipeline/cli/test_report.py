"""``secateur report`` and ``secateur compare`` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.pipeline.cli.app import app
from secateur.pipeline.errors import UserError
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.run import create_run_directory
from tests.pipeline.helpers import tiny_config


def begun(folder: Path, seed: int) -> Path:
    """A run that ended right after its beginning."""
    directory = create_run_directory(tiny_config(folder, seed=seed))
    Journal(directory / "journal.jsonl", directory.name, "0" * 16).close()
    return directory


def test_a_run_that_failed_at_once_has_a_report(tmp_path: Path) -> None:
    directory = begun(tmp_path, 1)
    result = CliRunner().invoke(app, ["report", directory.name[:8]])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert "No verdict yet: the run is not at its end" in (directory / "report.html").read_text()
    told = CliRunner().invoke(app, ["report", str(directory), "--json"])
    assert json.loads(told.output)["run"] == directory.name
    text = CliRunner().invoke(app, ["report", str(directory), "--md"])
    assert text.output.startswith("# tiny on quick") and "## 16. Limits of this report" in text.output


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    first, second = begun(tmp_path, 1), begun(tmp_path, 2)
    page = tmp_path / "both.html"
    result = CliRunner().invoke(app, ["compare", str(first), str(second), "-o", str(page), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["columns"][1:] == [first.name, second.name]
    assert ["seed", "1", "2"] in told["rows"]
    assert page.read_text().count("Limits of this report") == 2, "navigation and heading, once for both"


@pytest.mark.parametrize(
    ("which", "said"), [("nothing", "there is no run"), ("no@version", "there is no MLflow store")]
)
def test_what_is_not_there_is_named(which: str, said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", which])
    assert isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit)
    assert said in str(result.exception), result.exception


def test_one_format_at_a_time(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(begun(tmp_path, 1)), "--md", "--json"])
    assert isinstance(result.exception, UserError)
