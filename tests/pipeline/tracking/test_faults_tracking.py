"""Faults of the tracking server: whatever becomes unreachable in mid-delivery, every candidate arrives exactly once."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from secateur.pipeline.errors import TrackingError
from secateur.pipeline.tracking import CANDIDATE_TAG, PARENT_TAG, Tracker
from secateur.pipeline.tracking.ownership import MADE_TAG
from tests.pipeline.tracking.test_tracking import children, record, tracker
from tests.servers import database_url, mlflow_server, postgres, running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def arrived(uri: str) -> list[str]:
    """Names of the candidates that the server has in full, in order."""
    runs = children(uri)
    assert {run.info.status for run in runs} <= {"FINISHED"}
    return sorted(run.data.tags[CANDIDATE_TAG] for run in runs)


def expected(count: int) -> list[str]:
    return sorted(f"search:evaluation:{i}" for i in range(count))


def runs_in(database: Path) -> int:
    with sqlite3.connect(database) as connection:
        return int(connection.execute("select count(*) from runs").fetchone()[0])


def send(tracking: Tracker, first: int, last: int) -> None:
    for i in range(first, last):
        tracking.candidate(record(i))
        time.sleep(0.02)  # so that faults fall between and into deliveries


@pytest.mark.long
def test_the_server_is_killed_and_postgresql_restarted_in_mid_delivery(tmp_path: Path) -> None:
    with (
        running(postgres(tmp_path / "pg")) as database,
        running(mlflow_server(tmp_path / "mlflow", database_url(database, "mlflow", "postgresql+psycopg2"))) as server,
    ):
        tracking = tracker(tmp_path / "home", server.url, required=True)
        tracking.start()
        send(tracking, 0, 15)
        server.kill()
        send(tracking, 15, 30)
        assert tracking.flush(3) > 0, "nothing was lost on the way: the fault came too late to test anything"
        server.start()
        send(tracking, 30, 40)
        database.stop()
        send(tracking, 40, 50)
        database.start()
        assert tracking.flush(120) == 0, tracking.failure
        tracking.close()
        assert arrived(server.url) == expected(50)


@pytest.mark.long
def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    tracking = tracker(tmp_path)
    tracking.start()
    send(tracking, 0, 3)
    assert tracking.flush(60) == 0
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(8, lambda: other.execute("ROLLBACK"))
    release.start()
    send(tracking, 3, 10)
    assert tracking.flush(2) > 0
    assert tracking.flush(90) == 0, tracking.failure
    release.join()
    tracking.close()
    assert arrived(tracking.uri) == expected(10)


@pytest.mark.long
def test_a_process_killed_in_mid_delivery_loses_and_doubles_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from tests.pipeline.tracking.test_tracking import record, tracker\n"
        "sender = tracker(Path(sys.argv[1])); sender.start()\n"
        "for i in range(40): sender.candidate(record(i))\n"
        "sender.flush(300)\n"
    )
    (tmp_path / "home").mkdir()
    uri = f"sqlite:///{tmp_path}/home/mlflow.db"
    MlflowClient(uri).create_experiment("tests", (tmp_path / "artifacts").as_uri(), {MADE_TAG: "made"})
    root = str(Path(__file__).parents[3])
    for _ in range(2):
        before = runs_in(tmp_path / "home" / "mlflow.db")
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "home"), root])
        while runs_in(tmp_path / "home" / "mlflow.db") < before + 5:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
    tracking = tracker(tmp_path / "home")
    tracking.start()
    for i in range(40):
        tracking.candidate(record(i))
    assert tracking.flush(120) == 0, tracking.failure
    tracking.close()
    assert arrived(uri) == expected(40)
    parent = children(uri)[0].data.tags[PARENT_TAG]
    points = MlflowClient(uri).get_metric_history(parent, "search.latency_ratio")
    assert sorted(point.step for point in points) == list(range(40)), "the learning curve lost or doubled points"


def test_a_full_artifact_store_ends_the_run_without_losing_it(tmp_path: Path) -> None:
    tracking = tracker(tmp_path)
    tracking.start()
    tracking.candidate(record(0))
    assert tracking.flush(60) == 0
    report = tmp_path / "report.html"
    report.write_bytes(b"x" * (16 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))  # writes beyond fail as on a full disk
    try:
        with pytest.raises(TrackingError):
            tracking.finish({"final.top1": 0.9}, [report])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tracking.finish({"final.top1": 0.9}, [report])
    tracking.close()
    assert arrived(tracking.uri) == expected(1)
    client = MlflowClient(tracking.uri)
    (run,) = [
        r for r in client.search_runs(["1"], "tags.`secateur.run_id` = 'run-1'") if "final.top1" in r.data.metrics
    ]
    assert run.info.status == "FINISHED"
    assert [(file.path, file.file_size) for file in client.list_artifacts(run.info.run_id)] == [
        ("report.html", report.stat().st_size)
    ]
