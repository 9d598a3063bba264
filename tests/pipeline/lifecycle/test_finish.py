"""A plan of an earlier run taken to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.pipeline.cli.app import app
from secateur.pipeline.errors import EXIT_GATE, EXIT_OK, UserError
from secateur.pipeline.lifecycle.finish import CHOSEN, begin, chosen_plan
from secateur.pipeline.lifecycle.rescore import history
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.run import Run
from secateur.pipeline.tracking import Registry
from secateur.pruning.plan import PruningPlan
from tests.pipeline.helpers import opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


@pytest.mark.long
def test_another_candidate_is_fine_tuned_exported_timed_judged_and_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    search = {"method": "random", "options": {"num_plans": 1}, "target": {"macs_ratio": 0.8}}
    with opened(tiny_config(tmp_path, search=search)) as first:
        perform(first, "search")
        directory, past = first.directory, history(first.journal.records)
    before = (directory / "journal.jsonl").read_bytes()
    chosen = past[-1].candidate
    plan = tmp_path / "plan.json"
    plan.write_text(chosen.plan.to_json())
    made = [begin(directory, chosen.id, None), begin(directory, None, plan)]
    assert [json.loads((new / CHOSEN).read_text())["plan"] for new in made] == [chosen.plan.to_json()] * 2
    assert (made[0] / "data.json").read_bytes() == (directory / "data.json").read_bytes()
    with Run(made[0], Silent()) as run:
        run.tracker.start()
        facts = perform(run)
        assert facts.finetune.best.candidate.plan.digest == chosen.plan.digest
        assert facts.search.num_candidates == 1
        assert facts.baseline.origin.startswith("reused")
        assert facts.register is not None
        version = run.tracker.registry.version("tiny", facts.register.version)
        assert version.tags["plan_digest"] == chosen.plan.digest
        again = perform(run, "search")  # as a resume does: from the journal
        assert again.search.archive == facts.search.archive
    assert (directory / "journal.jsonl").read_bytes() == before


@pytest.mark.long
def test_the_command_finishes_a_plan_of_a_run_and_registers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    with opened(tiny_config(tmp_path, search={"target": {"macs_ratio": 0.8}})) as first:
        perform(first, "search")
        directory, past = first.directory, history(first.journal.records)
    command = ["finish", str(directory), "--candidate", str(past[-1].candidate.id)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    found = subprocess.run(
        [sys.executable, "-m", "secateur", *command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert found.returncode in (EXIT_OK, EXIT_GATE), found.stderr
    (new,) = (d for d in directory.parent.iterdir() if d != directory)
    assert (new / "report.html").is_file()
    versions = Registry(f"sqlite:///{tmp_path}/home/mlflow.db", tmp_path / "home").versions("tiny")
    assert [version.tags["plan_digest"] for version in versions] == [past[-1].candidate.plan.digest]


def test_the_command_says_what_is_missing(begun: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["finish", str(begun)])
    assert isinstance(result.exception, UserError)
    assert "--candidate" in str(result.exception)
    assert runs(tmp_path) == []


def runs(tmp_path: Path) -> list[str]:
    """What was made in this test's own home."""
    return [run.name for run in (tmp_path / "home" / "runs").glob("*")]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run in which nothing was done yet."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_HOME", str(folder / "home"))
        with opened(tiny_config(folder)) as run:
            return run.directory


@pytest.mark.parametrize(
    ("candidate", "content", "said"),
    [
        (None, None, "either"),
        (0, "{}", "either"),
        (7, None, "has no pruned candidate 7; it has: none"),
        (None, "{}", "holds no plan"),
        (None, "[" * 100_000, "holds no plan"),
        (None, PruningPlan({"a": 2}, {"a": (0, 1)}).to_json(), "keeps every channel"),
    ],
)
def test_what_cannot_be_finished_is_refused_and_leaves_nothing(
    begun: Path, tmp_path: Path, candidate: int | None, content: str | None, said: str
) -> None:
    file = None if content is None else tmp_path / "plan.json"
    if file is not None:
        file.write_text(str(content))
    with pytest.raises(UserError, match=said):
        begin(begun, candidate, file)
    assert runs(tmp_path) == []


def test_a_plan_of_another_network_is_refused(begun: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(PruningPlan({"a": 2}, {"a": (0,)}).to_json())
    made = begin(begun, None, file)
    graph: Any = type("Graph", (), {"groups": ()})
    with pytest.raises(UserError, match="no plan of this network"):
        chosen_plan(made, graph)
