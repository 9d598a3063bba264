"""Candidates in a real MLflow: none lost, none doubled, whatever dies; the model registered once."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from mlflow import MlflowClient
from onnx import TensorProto, helper

from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.errors import TrackingError
from secateur.pipeline.locks import held
from secateur.pipeline.tracking import CANDIDATE_TAG, PARENT_TAG, RUN_TAG, Tracker, redacted
from secateur.pipeline.tracking.delivery import Child, Delivery, write
from secateur.pipeline.tracking.store import Unreachable, connect, first_line
from secateur.pipeline.tracking.tracker import Data
from tests.pipeline.helpers import end, start_server
from tests.pipeline.tracking.test_check import PAGE, always, answering
from tests.servers import database_url, free_port, postgres, running

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
DATA = Data("digits", "0123456789abcdef", {"train": 80, "search": 10, "test": 20}, (-1, 1, 8, 8))


def record(i: int, kind: str = "evaluation", **metrics: float) -> dict[str, Any]:
    values = {"top1": 0.9 - i / 100, "macs": 1e6 / (i + 1), "latency_ratio": 1 / (i + 1), **metrics}
    candidate = {"id": i, "plan": f"plan {i}", "digest": f"d{i}", "origin": "mutation", "parents": [0], "base": ""}
    evaluation = {"status": "ok", "reason": "", "metrics": values, "forward": "ONNX Runtime, fp32"}
    return {"stage": "search", "kind": kind, "candidate": candidate, "evaluation": evaluation, "time": 1e9 + i}


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh MLflow database, made once: its migrations take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, migrated: Path) -> Path:
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    return tmp_path


def tracker(home: Path, uri: str | None = None, required: bool = False) -> Tracker:
    section = TrackingSection(experiment="tests", uri=uri, required=required)
    derived = lambda r: {"reward": 2 * r["evaluation"]["metrics"]["top1"]}  # noqa: E731
    params = {"seed": 0, "search.method": "ccep"}
    return Tracker(section, home, "run-1", "run one", params, derived=derived, data=DATA)


def wait_for(moment: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + 60
    while not moment() and time.monotonic() < give_up:
        time.sleep(0.02)
    return moment()


def children(uri: str) -> list[Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = 'run-1'")
    return list(client.search_runs([experiment.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"))


def test_every_candidate_is_a_child_run_with_plan_origin_metrics_and_reward(home: Path) -> None:
    tracking = tracker(home)
    tracking.start()
    for i in range(4):
        tracking.candidate(record(i, seconds=float("nan")))
    assert tracking.flush(60) == 0
    tracking.close()
    runs = {r.data.tags[CANDIDATE_TAG]: r for r in children(tracking.uri)}
    assert sorted(runs) == [f"search:evaluation:{i}" for i in range(4)]
    run = runs["search:evaluation:2"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"top1": 0.88, "macs": 1e6 / 3, "latency_ratio": 1 / 3, "reward": 1.76}
    assert run.data.tags["candidate.plan"] == "plan 2"
    assert run.data.tags["candidate.origin"] == "mutation"
    assert run.data.tags["candidate.digest"] == "d2"
    assert run.data.tags["candidate.forward"] == "ONNX Runtime, fp32"
    assert run.data.params == {"origin": "mutation", "precision": "fp32", "latency": "measured"}
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    told = client.get_run(run.data.tags[PARENT_TAG]).inputs.dataset_inputs
    assert {one.dataset.name: json.loads(one.dataset.profile)["num_rows"] for one in told} == {
        "digits.train": 80,
        "digits.search": 10,
        "digits.test": 20,
    }


def test_a_plan_too_long_for_a_tag_is_never_cut_short(home: Path) -> None:
    tracking = tracker(home)
    tracking.start()
    long = record(0)
    long["candidate"]["plan"] = "x" * 6000
    tracking.candidate(long)
    assert tracking.flush(60) == 0
    tracking.close()
    (run,) = children(tracking.uri)
    assert run.data.tags["candidate.plan"] == "too long for a tag: row d0 of candidates.parquet on the parent run"


def test_a_restart_delivers_the_rest_and_doubles_nothing(home: Path) -> None:
    first = tracker(home)
    first.start()
    for i in range(3):
        first.candidate(record(i))
    assert first.flush(60) == 0
    first.close()
    client = MlflowClient(first.uri)  # a process killed while it delivered leaves a run cut short
    parent = children(first.uri)[0].data.tags[PARENT_TAG]
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    client.create_run(experiment.experiment_id, tags={PARENT_TAG: parent, CANDIDATE_TAG: "search:evaluation:3"})
    second = tracker(home)
    second.start()
    for i in range(6):
        second.candidate(record(i))
        second.candidate(record(i))
    assert second.flush(60) == 0
    second.close()
    runs = children(first.uri)
    assert sorted(r.data.tags[CANDIDATE_TAG] for r in runs) == [f"search:evaluation:{i}" for i in range(6)]
    assert {r.info.status for r in runs} == {"FINISHED"}


def test_runs_that_others_nested_under_a_run_are_left_alone_and_stop_nothing(home: Path) -> None:
    first = tracker(home)
    first.start()
    first.candidate(record(0))
    assert first.flush(60) == 0
    first.close()
    client = MlflowClient(first.uri)
    (ours,) = children(first.uri)
    parent = {PARENT_TAG: ours.data.tags[PARENT_TAG]}
    theirs = [client.create_run(ours.info.experiment_id, tags=parent).info.run_id for _ in range(2)]
    client.set_terminated(theirs[0])
    second = tracker(home)
    second.start()
    for i in range(2):
        second.candidate(record(i))
    assert second.flush(60) == 0, second.failure
    second.close()
    kept = {run.info.run_id: run.info.status for run in children(first.uri) if CANDIDATE_TAG not in run.data.tags}
    assert kept == {theirs[0]: "FINISHED", theirs[1]: "RUNNING"}
    assert len(children(first.uri)) == 4


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("wrong", [{"metric": "no: such/../name\n"}, {"series": 1.0}, {"tag": "x"}])
def test_a_candidate_that_mlflow_refuses_does_not_block_those_behind_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, beside: bool, wrong: dict[str, Any]
) -> None:
    if beside:
        monkeypatch.setattr("secateur.pipeline.tracking.tracker.MANY", 0)
    if "series" in wrong:
        monkeypatch.setattr("secateur.pipeline.tracking.tracker.SERIES", ("top1", "bad:\nname"))
    tracking = tracker(home)
    tracking.start()
    for i in range(4):
        told = record(i, kind="finetune", **({wrong["metric"]: 1.0} if "metric" in wrong and i == 1 else {}))
        if i == 1 and "tag" in wrong:
            told["candidate"]["origin"] = "x" * 300_000  # of the run's name, which has a limit
        tracking.candidate(told)
    assert tracking.flush(60) == 0, tracking.failure
    tracking.close()
    delivered = sorted(run.data.tags[CANDIDATE_TAG] for run in children(tracking.uri))
    refused = [] if "series" in wrong else sorted(tracking.refused)
    assert refused in ([], ["search:finetune:1"])
    assert delivered == [f"search:finetune:{i}" for i in range(4) if f"search:finetune:{i}" not in refused]
    if "metric" in wrong:
        assert "invalid" in tracking.refused["search:finetune:1"].lower()


@pytest.mark.parametrize("body", [PAGE, b"[]", b"{}", b'{"run": 5, "experiment": 5}', b'{"experiment": {}}', b""])
def test_an_answer_that_is_none_is_no_delivery(home: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(always(200, body)) as server:
        tracking = tracker(home, server.url)
        tracking.start()
        tracking.candidate(record(0))
        assert wait_for(lambda: bool(tracking.failure))
        assert tracking.flush(0.1) == 1
        assert "no MLflow server" in tracking.failure
        assert tracking._thread.is_alive(), "it goes on trying"
        tracking.close()


def test_a_required_server_that_is_away_stops_the_run_at_its_start(home: Path) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.required: false"):
        tracker(home, f"http://127.0.0.1:{free_port()}", required=True).start()


@pytest.mark.long
def test_an_optional_server_that_is_away_delays_nothing(home: Path) -> None:
    tracking = tracker(home, f"http://127.0.0.1:{free_port()}")
    tracking.start()
    started = time.monotonic()
    tracking.candidate(record(0))
    assert time.monotonic() - started < 1
    assert tracking.flush(0.2) == 1
    with pytest.raises(TrackingError):
        tracking.finish({}, [])
    tracking.close()


def test_the_model_is_registered_once_as_the_challenger_of_its_devices(home: Path) -> None:
    onnx_file = home / "model.onnx"
    onnx.save(identity_model(), onnx_file)
    example = np.ones((1, 3), np.float32)
    tracking = tracker(home)
    tracking.start()
    for _ in range(2):
        entry = tracking.register("net", ["one", "two"], onnx_file, example, example, {"gate": "passed", "top1": 0.9})
        assert (entry.name, entry.version) == ("net", "1")
    tracking.finish({"final.top1": 0.9}, [onnx_file])
    tracking.close()
    client = MlflowClient(tracking.uri)
    model = client.get_registered_model("net")
    assert set(model.aliases) == {"challenger", "challenger-one", "challenger-two"}
    version = client.get_model_version_by_alias("net", "challenger")
    assert version.tags["gate"] == "passed"
    assert version.run_id == tracking._parent
    import mlflow

    mlflow.set_tracking_uri(tracking.uri)
    info = mlflow.models.get_model_info("models:/net@challenger")
    assert info.signature is not None
    assert info.saved_input_example_info is not None
    local = Path(mlflow.artifacts.download_artifacts("models:/net@challenger", dst_path=str(home / "pulled")))
    assert (local / "model.onnx").read_bytes() == onnx_file.read_bytes()
    assert np.array_equal(mlflow.pyfunc.load_model(str(local)).predict(example)["y"], example)


SECRET = "a-password-of-the-tests"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://me:***@host:5000/x"),
        (f"postgresql+psycopg2://me:{SECRET}@host/db", "postgresql+psycopg2://me:***@host/db"),
        (f"postgresql+psycopg2://me:a@{SECRET}@host/db", "postgresql+psycopg2://me:***@host/db"),
        (f"postgresql+psycopg2://host/db?user=me&password={SECRET}&x=1", None),
        (f"http://host/?token={SECRET}", None),
        ("http://me@host/x", "http://***@host/x"),  # a name alone may be a token
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("http://[bad", None),
    ],
)
def test_no_password_of_an_address_is_shown(address: str, expected: str | None) -> None:
    assert expected is None or redacted(address) == expected
    assert SECRET not in redacted(address)
    assert SECRET not in first_line(OSError(f"cannot reach {address} now"))


def test_no_password_reaches_the_store(home: Path) -> None:
    tracking = tracker(home)
    tracking.params = {"tracking.uri": f"http://me:{SECRET}@host:5000", "note": "a: b"}
    tracking.start()
    tracking.candidate(record(0))
    assert tracking.flush(60) == 0
    tracking.close()
    assert SECRET.encode() not in b"".join(f.read_bytes() for f in home.glob("mlflow.db*"))
    params = MlflowClient(tracking.uri).get_run(tracking._parent).data.params
    assert params == {"tracking.uri": "http://me:***@host:5000", "note": "a: b"}


def identity_model() -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in ("x", "y")]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def server(home: Path) -> Iterator[Callable[[], tuple[str, subprocess.Popen[bytes]]]]:
    """Starts a real MLflow server (again and again, on the same port and store)."""
    port, started = free_port(), []

    def start() -> tuple[str, subprocess.Popen[bytes]]:
        started.append(start_server(home, port))
        return f"http://127.0.0.1:{port}", started[-1]

    yield start
    for process in started:
        end(process)


@pytest.mark.long
@pytest.mark.parametrize("many", [pytest.param(3, id="delivery"), pytest.param(1000, id="thread")])
def test_candidates_wait_for_a_server_that_comes_goes_and_comes_again(
    home: Path, server: Any, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr("secateur.pipeline.tracking.tracker.MANY", many)
    uri, process = server()
    end(process)  # unreachable from the start
    tracking = tracker(home, uri)
    tracking.start()
    for i in range(10):
        tracking.candidate(record(i))
    _, process = server()
    deadline = time.monotonic() + 120
    while len(tracking._pending) > 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    end(process)  # unreachable in the middle, at no particular moment
    for i in range(10, 20):
        tracking.candidate(record(i))
    server()
    assert tracking.flush(180) == 0
    tracking.close()
    runs = children(f"sqlite:///{home}/mlflow.db")
    assert sorted(r.data.tags[CANDIDATE_TAG] for r in runs) == sorted(f"search:evaluation:{i}" for i in range(20))
    assert all(r.info.status == "FINISHED" and "reward" in r.data.metrics for r in runs)


@pytest.mark.slow
def test_postgresql_takes_candidates_and_the_model_as_sqlite_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(postgres(tmp_path / "pg")) as database:
        uri = database_url(database, "mlflow", "postgresql+psycopg2")
        monkeypatch.setenv("SECATEUR_TRACKING_URI", uri)  # it holds a password, which no run file may
        monkeypatch.setattr("secateur.pipeline.tracking.tracker.MANY", 10)
        tracking = tracker(tmp_path, required=True)
        tracking.start()
        for i in range(20):
            tracking.candidate(record(i))
        assert tracking.flush(120) == 0
        onnx.save(identity_model(), tmp_path / "model.onnx")
        example = np.ones((1, 3), np.float32)
        entry = tracking.register("net", ["one"], tmp_path / "model.onnx", example, example, {})
        tracking.finish({"final.top1": 0.9}, [tmp_path / "model.onnx"])
        tracking.close()
        assert entry.version == "1"
        assert len({r.data.tags[CANDIDATE_TAG] for r in children(uri)}) == len(children(uri)) == 20


def deliveries(of: psutil.Process | None = None) -> list[psutil.Process]:
    """Processes that tell MLflow for one."""
    parent, module = (of or psutil.Process()).pid, "secateur.pipeline.tracking.delivery"
    # not `children`: it goes by times of processes, which a clock that is set moves
    every = psutil.process_iter(["ppid", "cmdline"])
    return [each for each in every if each.info["ppid"] == parent and module in (each.info["cmdline"] or ())]


def test_a_delivery_that_is_killed_loses_and_doubles_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pipeline.tracking.tracker.MANY", 2)
    tracking = tracker(home)
    tracking.start()
    for i in range(40):
        tracking.candidate(record(i))
    assert wait_for(lambda: len(tracking._pending) < 20)
    (delivery,) = deliveries()
    delivery.kill()
    assert tracking.flush(120) == 0
    tracking.close()
    runs = children(tracking.uri)
    assert sorted(r.data.tags[CANDIDATE_TAG] for r in runs) == sorted(f"search:evaluation:{i}" for i in range(40))
    assert all(r.info.status == "FINISHED" and r.data.metrics["reward"] > 0 for r in runs)
    assert not deliveries()


def test_a_delivery_ends_with_whoever_started_it_and_shows_nobody_the_password() -> None:
    program = (
        "import time; from secateur.pipeline.tracking.delivery import Delivery; "
        "delivery = Delivery('http://me:hidden-word@host'); print(1, flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline()
        (delivery,) = deliveries(psutil.Process(parent.pid))
        assert "hidden-word" not in " ".join(delivery.cmdline())
        parent.kill()
    assert wait_for(lambda: not delivery.is_running() or delivery.status() == psutil.STATUS_ZOMBIE)


def test_a_delivery_that_fails_says_why(home: Path) -> None:
    delivery = Delivery(f"sqlite:///{home}/mlflow.db")
    try:
        with pytest.raises(RuntimeError, match="KeyError"):
            delivery.write(Child("0", "x", 0, {}, {}))
    finally:
        delivery.close()


def made_up(home: Path, key: str) -> Child:
    """A candidate of a parent run that nobody made."""
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("tests") or client.get_experiment(client.create_experiment("tests"))
    tags = {CANDIDATE_TAG: key, PARENT_TAG: "a" * 32}
    return Child(experiment.experiment_id, key, 1, tags, {"top1": 0.5})


def keys_of(home: Path, child: Child) -> list[str]:
    runs = MlflowClient(f"sqlite:///{home}/mlflow.db").search_runs([child.experiment_id])
    return sorted(run.data.tags[CANDIDATE_TAG] for run in runs)


def test_a_delivery_looks_before_it_writes(home: Path) -> None:
    first, second = made_up(home, "search:evaluation:1"), made_up(home, "search:evaluation:2")
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    write(client, first)
    client.create_run(second.experiment_id, tags=dict(second.tags))  # cut short
    delivery = Delivery(f"sqlite:///{home}/mlflow.db", home / "lock")
    try:
        for child in (first, second, first, second):
            delivery.write(child)
    finally:
        delivery.close()
    assert keys_of(home, first) == ["search:evaluation:1", "search:evaluation:2"]


def test_a_delivery_whose_parent_is_gone_writes_no_more(home: Path) -> None:
    """It has the candidate already, and waits: the lock is what the run's next process takes first."""
    child = made_up(home, "search:evaluation:1")
    program = (
        "import json, sys; from pathlib import Path; from secateur.pipeline.tracking.delivery import Child, Delivery\n"
        "delivery = Delivery(sys.argv[1], Path(sys.argv[2])); row = json.loads(sys.argv[3])\n"
        "print('started', flush=True); delivery.write(Child(**row))\n"
    )
    uri, lock = f"sqlite:///{home}/mlflow.db", home / "lock"
    command = [sys.executable, "-c", program, uri, str(lock), json.dumps(asdict(child))]
    root, pipe = Path(__file__).parents[3], subprocess.PIPE
    with held(lock, "it", 0, print), subprocess.Popen(command, cwd=root, stdout=pipe) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
        (delivery,) = deliveries(psutil.Process(parent.pid))
        assert wait_for(lambda: any(file.path == str(lock) for file in delivery.open_files()))  # it has come so far
        parent.kill()
    assert wait_for(lambda: not delivery.is_running() or delivery.status() == psutil.STATUS_ZOMBIE)
    assert keys_of(home, child) == []


def test_what_is_doubled_all_the_same_is_merged_at_the_next_start(home: Path) -> None:
    tracking = tracker(home)
    tracking.start()
    for i in range(3):
        tracking.candidate(record(i))
    assert tracking.flush(120) == 0
    tracking.close()
    client = MlflowClient(tracking.uri)
    for run in children(tracking.uri):
        tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.run")}
        write(client, Child(run.info.experiment_id, run.info.run_name, 1, tags, dict(run.data.metrics)))
    assert len(children(tracking.uri)) == 6
    again = tracker(home)
    again.start()
    for i in range(3):
        again.candidate(record(i))
    assert again.flush(120) == 0
    again.close()
    found = sorted(r.data.tags[CANDIDATE_TAG] for r in children(again.uri))
    assert found == [f"search:evaluation:{i}" for i in range(3)]


@pytest.mark.long
def test_a_store_is_made_whole_or_not_at_all_by_however_many_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from secateur.pipeline.tracking.store import connect; "
        "print(len(connect(sys.argv[1]).search_experiments()))"
    )
    uri = f"sqlite:///{tmp_path}/home/mlflow.db"
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program, uri]
    at_once = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=300)[0].strip() for process in at_once] == ["1", "1", "1"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))  # the disk fills during MLflow's migrations
    try:
        with pytest.raises(Unreachable):
            connect(f"sqlite:///{tmp_path}/full/mlflow.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((tmp_path / "full").iterdir()) == []
    assert connect(f"sqlite:///{tmp_path}/full/mlflow.db").search_experiments()
