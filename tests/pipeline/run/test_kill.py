"""Kill -9 at any moment loses at most the evaluation in flight: a real process, killed again and again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from secateur.pipeline import errors
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.run import Run
from secateur.pipeline.tracking import CANDIDATE_TAG, Registry
from tests.pipeline.helpers import end, opened, perform, start_server, tiny_config, write_tiny
from tests.pipeline.test_children import of_home
from tests.servers import free_port

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's own database, migrated once for all modules that a test process runs."""
    home = tmp_path_factory.getbasetemp() / "prefect"
    home.mkdir(exist_ok=True)
    return home


def start(home: Path, prefect_home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """``python -m secateur ARGUMENTS`` in a home of its own; its output goes to a file there."""
    env = {**os.environ, "SECATEUR_HOME": str(home), "PREFECT_HOME": str(prefect_home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "secateur", *arguments]
    with (home / "output").open("wb") as output:  # no pipe: an orphaned server would keep it open
        return subprocess.Popen(command, env=env, cwd=home, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], home: Path, code: int = 0) -> str:
    """Wait for the end; returns the output."""
    process.wait(timeout=300)
    output = (home / "output").read_text()
    assert process.returncode == code, output
    assert "Traceback" not in output
    return output


def run_directory(home: Path) -> Path | None:
    found = sorted((home / "runs").glob("tiny-*"))
    return found[0] if found else None


def kill_when(process: subprocess.Popen[bytes], home: Path, moment: Callable[[Path], bool]) -> None:
    """Kill the process (not its helpers) as soon as the moment has come."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        directory = run_directory(home)
        if directory is not None and moment(directory):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
        assert process.poll() is None, f"ended before its moment: {(home / 'output').read_text()}"
        time.sleep(0.005)
    pytest.fail("the moment never came")


def evaluations(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "journal.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "evaluation" in r]


def journal_lines(n: int) -> Callable[[Path], bool]:
    def moment(directory: Path) -> bool:
        file = directory / "journal.jsonl"
        return file.is_file() and file.read_bytes().count(b"\n") >= n

    return moment


def exists(pattern: str) -> Callable[[Path], bool]:
    return lambda directory: any(directory.glob(pattern))


def rows(home: Path, table: str) -> int:
    """How many rows a table of MLflow's database has."""
    with contextlib.closing(sqlite3.connect(f"file:{home}/mlflow.db?mode=ro", uri=True)) as database:
        try:
            return int(database.execute(f"select count(*) from {table}").fetchone()[0])
        except sqlite3.OperationalError:  # being made just now
            return 0


def promotions(home: Path) -> tuple[list[tuple[str, str]], int, dict[str, str]]:
    """The moves of the champion, how many decisions are kept, and the aliases."""
    registry = Registry(f"sqlite:///{home}/mlflow.db", home)
    client = MlflowClient(registry.uri, registry.uri)
    experiment = client.get_experiment_by_name("secateur-promotions")
    assert experiment is not None
    decisions = client.search_runs([experiment.experiment_id])
    aliases = {k: str(v) for k, v in client.get_registered_model("tiny").aliases.items()}
    return [(e.kind, e.version) for e in registry.history("tiny") if e.done], len(decisions), aliases


def told(home: Path) -> list[str]:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("secateur")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return sorted(r.data.tags[CANDIDATE_TAG] for r in runs if CANDIDATE_TAG in r.data.tags)


def what_was_asked(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    facts = ("id", "digest", "base", "origin")
    return [(r["stage"], r["kind"], *(r["candidate"][fact] for fact in facts)) for r in records]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run that was left alone: in this process, without Prefect."""
    folder = tmp_path_factory.mktemp("left")
    home = folder / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_HOME", str(home))
        with opened(tiny_config(folder)) as run:
            run.tracker.start()
            decided = perform(run).promote
            assert decided is not None and decided.promoted
    return home


RUN = """
import sys
from pathlib import Path
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.run import Run
from tests.pipeline.helpers import perform

with Run(Path(sys.argv[1]), Silent()) as run:
    run.tracker.start()
    perform(run)
"""


def test_a_search_that_was_killed_goes_on_and_ends_like_one_that_was_left_alone(
    left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Prefect, which the long ones are for."""
    killed, expected = tmp_path / "killed", run_directory(left)
    assert expected is not None
    monkeypatch.setenv("SECATEUR_HOME", str(killed))
    with opened(tiny_config(tmp_path)) as run:
        directory = run.directory
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (killed / "output").open("wb") as output:
        child = subprocess.Popen([sys.executable, "-c", RUN, directory], env=env, stdout=output, stderr=output)
    kill_when(child, killed, journal_lines(len((expected / "journal.jsonl").read_bytes().splitlines()) // 2))
    seen = evaluations(directory)
    with Run(directory, Silent()) as run:
        run.tracker.start()
        decided = perform(run).promote
    assert decided is not None and decided.promoted
    assert (directory / "compact.plan.json").read_text() == (expected / "compact.plan.json").read_text()
    assert 0 < len(seen) < len(evaluations(directory)) and evaluations(directory)[: len(seen)] == seen
    assert what_was_asked(evaluations(directory)) == what_was_asked(evaluations(expected))
    assert told(killed) == told(left)
    assert promotions(killed) == promotions(left)


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 4])
def test_a_run_killed_at_many_moments_ends_like_one_that_was_left_alone(
    left: Path, tmp_path: Path, prefect_home: Path, every: int
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    file = str(write_tiny(tmp_path))
    expected = run_directory(left)
    assert expected is not None
    total = len(evaluations(expected))

    moments = [
        journal_lines(4),  # early in the search
        exists("candidates/weights/*.safetensors"),  # fine-tuned weights are there, not yet in the journal
        journal_lines(total - 4),  # late in the search
        exists("baseline.onnx"),  # during the export
        exists("version/plan.json"),  # while the version is put together
        lambda _: rows(killed, "model_versions") > 0,  # registered, not promoted
        lambda _: rows(killed, "registered_model_tags where key like 'secateur.event.%'") > 0,  # in mid-promotion
    ]
    seen = 0
    for i, moment in enumerate(moments[::every]):
        directory = run_directory(killed)
        arguments = ("run", file) if i == 0 else ("resume", str(directory))
        kill_when(start(killed, prefect_home, *arguments), killed, moment)
        directory = run_directory(killed)
        assert directory is not None
        records = evaluations(directory)
        assert len(records) >= seen, "a resumed run lost evaluations"
        seen = len(records)
    directory = run_directory(killed)
    assert directory is not None
    output = finish(start(killed, prefect_home, "resume", str(directory)), killed)

    assert (directory / "compact.plan.json").read_text() == (expected / "compact.plan.json").read_text()
    assert what_was_asked(evaluations(directory)) == what_was_asked(evaluations(expected))
    assert told(killed) == told(left)
    assert len(told(killed)) == len(set(told(killed))) == total
    assert "tiny version 1, alias champion" in output
    assert not of_home(killed)  # nothing of any killed process is left, its Prefect server least of all

    again = finish(start(killed, prefect_home, "resume", str(directory)), killed)
    assert "tiny version 1, alias champion" in again  # nothing is left to do, and nothing is done twice
    assert told(killed) == told(left)
    aliases = {"champion": "1", "champion-quick": "1"}
    assert promotions(killed) == promotions(left) == ([("promote", "1")], 1, aliases)
    assert rows(killed, "model_versions") == 1


@pytest.mark.long
def test_a_tracking_server_that_is_away_is_told_later(tmp_path: Path, prefect_home: Path) -> None:
    port = free_port()
    file = str(write_tiny(tmp_path, tracking={"uri": f"http://127.0.0.1:{port}"}))
    output = finish(start(tmp_path, prefect_home, "run", file), tmp_path, errors.EXIT_SURROUNDINGS)
    assert "speed-up" in output
    assert "secateur resume" in output
    directory = run_directory(tmp_path)
    assert directory is not None
    assert "Not registered yet" in (directory / "report.html").read_text()
    MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").create_experiment("x")  # migrate first: the server starts faster
    server = start_server(tmp_path, port)
    try:
        output = finish(start(tmp_path, prefect_home, "resume", str(directory)), tmp_path)
    finally:
        end(server)
    assert "tiny version 1, alias champion" in output
    assert len(told(tmp_path)) == len(set(told(tmp_path))) == len(evaluations(directory))


@pytest.mark.long
def test_a_required_tracking_server_that_is_away_stops_the_run_at_once(tmp_path: Path, prefect_home: Path) -> None:
    tracking = {"uri": f"http://127.0.0.1:{free_port()}", "required": True}
    file = str(write_tiny(tmp_path, tracking=tracking))
    output = finish(start(tmp_path, prefect_home, "run", file), tmp_path, errors.EXIT_SURROUNDINGS)
    assert "required: false" in output
    directory = run_directory(tmp_path)
    assert directory is not None
    assert not evaluations(directory)
