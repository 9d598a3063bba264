"""Kill -9 in every stage: a real run, killed as each stage begins, ends like one that was left alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from secateur.pipeline.stages.order import STAGES
from tests.pipeline.helpers import write_tiny
from tests.pipeline.run.test_kill import (
    evaluations,
    finish,
    kill_when,
    prefect_home,
    run_directory,
    start,
    told,
    what_was_asked,
)

__all__ = ["prefect_home"]
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def stages_done(count: int, then_s: float) -> Callable[[Path], bool]:
    """The moment ``then_s`` seconds after so many stages are done."""
    since: list[float] = []

    def moment(directory: Path) -> bool:
        kept = directory / "stages"
        if not since and len(list(kept.iterdir()) if kept.is_dir() else []) >= count:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= then_s

    return moment


@pytest.mark.timeout(1200)
def test_a_run_killed_in_every_stage_ends_like_one_that_was_left_alone(tmp_path: Path, prefect_home: Path) -> None:
    left, killed = tmp_path / "left", tmp_path / "killed"
    for home in (left, killed):
        home.mkdir()
    file = str(write_tiny(tmp_path))
    finish(start(left, prefect_home, "run", file), left)
    expected = run_directory(left)
    assert expected is not None
    for count in range(len(STAGES)):
        directory = run_directory(killed)
        arguments = ("run", file) if directory is None else ("resume", str(directory))
        kill_when(start(killed, prefect_home, *arguments), killed, stages_done(count, 0.05 * count))
    directory = run_directory(killed)
    assert directory is not None
    output = finish(start(killed, prefect_home, "resume", str(directory)), killed)
    assert "alias champion" in output
    assert what_was_asked(evaluations(directory)) == what_was_asked(evaluations(expected))
    assert told(killed) == told(left)
    assert (directory / "compact.plan.json").read_text() == (expected / "compact.plan.json").read_text()
    client = MlflowClient(f"sqlite:///{killed}/mlflow.db")
    assert [str(v.version) for v in client.search_model_versions("name = 'tiny'")] == ["1"]
    assert json.loads((directory / "report.json").read_text())
