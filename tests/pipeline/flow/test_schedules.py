"""Schedules: deployments on a real Prefect server, run by a real worker; killed, restarted, and two at once."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from pydantic import ValidationError

from secateur.device_profiles import wording
from secateur.pipeline import errors
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import JournalError, OlderRunError, SurroundingsError, UserError
from secateur.pipeline.flow import notify, run_claim
from secateur.pipeline.flow.deployments import Order, deploy
from secateur.pipeline.flow.device_lease import Lease
from secateur.pipeline.flow.parameters import Compress, Profile, Promote
from secateur.pipeline.run.journal import Journal
from tests.pipeline.helpers import quick_device, tiny_config, write_tiny
from tests.pipeline.registered import add, embedded, linear_model, make_template, migrated_home
from tests.servers import Server, database_url, free_port, mlflow_server, postgres, prefect_server, running

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")
ONE_SHOT = {"search": {"method": "uniform", "options": {}, "target": {"macs_ratio": 0.7}}, "finetune": {"top": 1}}
"""A run of seconds: one plan, one fine-tuning."""
PATIENCE_S = 400


# -- which directory a flow works in -----------------------------------------------------------------------------------


def opener(config: RunFile) -> Callable[[Path], Journal]:
    """Opens the journal of a run directory, which is what keeps others out of it."""
    return lambda directory: Journal(directory / "journal.jsonl", directory.name, config.digest)


def ignore(line: str) -> None:
    """Listens to nothing."""


def take(config: RunFile, flow_run: str, deployment: str = "nightly") -> run_claim.Taken[Journal]:
    return run_claim.take(config, deployment, flow_run, opener(config), ignore)


def test_the_next_flow_finishes_what_a_dead_one_left(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "a")
    first.run.append({"kind": "evaluation"})
    first.run.close()  # as the kernel does for a killed process
    second = take(config, "b")
    assert second.directory == first.directory
    assert second.earlier == "a"
    assert len(second.run.records) == 2
    binding = run_claim.read_binding(second.directory)
    assert binding is not None
    assert binding.flow_runs == ("a", "b")


def test_what_an_older_version_left_is_begun_anew(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    said: list[str] = []
    first = take(config, "a")
    first.run.close()

    def opened(directory: Path) -> Journal:
        if directory == first.directory:
            raise OlderRunError("begun by an older version of Secateur")
        return opener(config)(directory)

    second = run_claim.take(config, "nightly", "b", opened, said.append)
    assert second.directory != first.directory and second.earlier is None
    assert said == ["Not continued: begun by an older version of Secateur"]


def test_nobody_takes_a_directory_that_is_being_worked_in(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "a")
    second = take(config, "b")
    assert second.directory != first.directory
    assert second.earlier is None
    with pytest.raises(SurroundingsError, match="already at work"):
        take(config, "a")


def test_a_finished_run_is_not_continued_but_by_its_own_flow_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "a")
    run_claim.end(first.directory, "passed")
    first.run.close()
    again = take(config, "a")
    assert again.directory == first.directory, "a retry of the same flow run does nothing twice"
    again.run.close()
    assert take(config, "b").directory != first.directory


def test_other_deployments_and_configurations_keep_their_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "a")
    first.run.close()
    assert take(config, "b", "weekly").directory != first.directory
    assert take(tiny_config(tmp_path, seed=99), "c").directory != first.directory


def test_a_run_that_gets_nowhere_is_left_to_a_person(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "0")
    first.run.close()
    tries = []
    for i in range(1, 7):
        taken = take(config, str(i))
        tries.append(taken.directory == first.directory)
        taken.run.close()
    assert tries == [True] * 4 + [False] * 2, "the first start counts as progress, then three without any"


def test_a_damaged_journal_stops_no_schedule(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "a")
    first.run.close()
    (first.directory / "journal.jsonl").write_text("{}\n{}\n")
    said: list[str] = []
    second = run_claim.take(config, "nightly", "b", opener(config), said.append)
    assert second.directory != first.directory
    assert "damaged" in said[0]


def test_a_run_that_is_refused_leaves_no_directory(tmp_path: Path) -> None:
    def refuse(directory: Path) -> Journal:
        raise UserError("no such data")

    with pytest.raises(UserError, match="no such data"):
        run_claim.take(tiny_config(tmp_path), "nightly", "a", refuse, ignore)
    assert not list((tmp_path / "home" / "runs").glob("tiny-*"))


def test_of_many_that_start_at_once_one_continues_and_none_shares(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "dead")
    first.run.close()
    taken: list[Path] = []
    threads = [threading.Thread(target=lambda i=i: taken.append(take(config, f"{i}").directory)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 6
    assert first.directory in taken


def test_one_flow_run_started_twice_at_once_works_once(tmp_path: Path) -> None:
    config, outcomes = tiny_config(tmp_path), []

    def start() -> None:
        try:
            outcomes.append(take(config, "a").directory)
        except SurroundingsError:
            outcomes.append(None)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([outcome for outcome in outcomes if outcome]) == 1


def test_a_journal_in_use_is_what_a_claim_goes_by(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first = take(config, "a")
    with pytest.raises(JournalError, match="in use"):
        opener(config)(first.directory)


# -- telling people ----------------------------------------------------------------------------------------------------


@contextmanager
def webhook(status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A web server on this machine: its address, and what was posted to it."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook-secret", got
    finally:
        server.shutdown()
        server.server_close()


def ended(name: str, kind: str = "COMPLETED") -> Any:
    from prefect.client.schemas.objects import State, StateType

    return State(type=StateType[kind], name=name, message="what happened")


FLOW, FLOW_RUN = SimpleNamespace(name="profile"), SimpleNamespace(name="quick-fox", id="1-2-3")


@pytest.mark.parametrize(
    ("state", "kind", "event"),
    [
        ("Alarm", "FAILED", "alarm"),
        ("Failed", "FAILED", "failure"),
        ("Crashed", "CRASHED", "failure"),
        ("Promoted", "COMPLETED", "promotion"),
        ("Gate not passed", "COMPLETED", None),
        ("Completed", "COMPLETED", None),
    ],
)
def test_people_are_told_of_failures_alarms_and_promotions(
    state: str, kind: str, event: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with webhook() as (address, got):
        monkeypatch.setenv(notify.VARIABLE, address)
        notify.tell(FLOW, FLOW_RUN, ended(state, kind))
    assert [message["event"] for message in got] == ([event] if event else [])
    if got:
        assert (got[0]["flow"], got[0]["flow_run"], got[0]["message"]) == ("profile", "quick-fox", "what happened")


def test_the_webhook_s_address_is_never_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify.logger, "propagate", True)
    monkeypatch.setattr(notify.logger, "disabled", False)  # MLflow's migrations, in this process, switch loggers off
    monkeypatch.setattr(logging.getLogger("prefect"), "propagate", True)
    with webhook(500) as (refusing, _), caplog.at_level(logging.DEBUG, notify.logger.name):
        for address in (refusing, f"http://127.0.0.1:{free_port()}/hook-secret", "file:///hook-secret"):
            monkeypatch.setenv(notify.VARIABLE, address)
            notify.tell(FLOW, FLOW_RUN, ended("Failed", "FAILED"))
    assert len(caplog.records) == 3
    assert "answers 500" in caplog.text
    assert "hook-secret" not in caplog.text


# -- parameters --------------------------------------------------------------------------------------------------------


def test_a_password_does_not_become_a_parameter() -> None:
    for fine in ("http://mlflow:5000", "https://mlflow.example/path", "sqlite:////data/mlflow.db"):
        assert Profile(tracking=fine).tracking == fine
    for secret in ("http://user:secret@mlflow:5000", "http://token@host/", "postgresql+psycopg2://u:p@db/mlflow"):
        with pytest.raises(ValidationError):
            Profile(tracking=secret)


def test_parameters_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        Compress(file="run.yaml", fiel="typo")  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Profile(on_regression="shrug")  # type: ignore[arg-type]


def test_a_refused_challenger_is_not_measured_until_it_wins_by_chance() -> None:
    from secateur.pipeline.flow.deployed import refused

    tags = {"secateur.decision.pi-5": json.dumps({"outcome": "refused", "champion": "2"})}
    assert refused(tags, "pi-5", "2")
    assert not refused(tags, "pi-5", "3"), "another champion reigns now"
    assert not refused(tags, "pi-4", "2")
    assert not refused({"secateur.decision.pi-5": "{"}, "pi-5", "2")


# -- the server --------------------------------------------------------------------------------------------------------


@dataclass
class Workplace:
    """A Prefect server, and what is deployed and run on it from a folder of its own."""

    server: Server
    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def pool(self) -> str:
        """A work pool of its own: no worker takes what another test left."""
        return self.folder.name

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own = {
            "PREFECT_API_URL": self.server.url,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "DO_NOT_TRACK": "1",
            "SECATEUR_HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        return {**kept, **own, **self.settings}

    def secateur(self, *arguments: str, code: int = 0, **env: str) -> str:
        command = [sys.executable, "-m", "secateur", *arguments]
        done = subprocess.run(
            command, env={**self.env, **env}, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def deploy(self, file: Path, name: str | None = None, paused: bool = False, **crons: str) -> list[str]:
        """What ``secateur deploy`` does, in this process."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.server.url}):
            return deploy(Order(file, (), dict(crons), name, self.pool, paused=paused))

    def worker(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", self.pool, "--type", "process"]
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(process)
        return process

    def api(self, method: str, path: str, **content: Any) -> Any:
        """Ask the server; again where it is too busy (503), as Prefect's own client does."""

        def answer() -> httpx.Response | None:
            found = httpx.request(method, self.server.url + path, timeout=60, **content)
            return None if found.status_code == httpx.codes.SERVICE_UNAVAILABLE else found

        found = until(answer)
        found.raise_for_status()
        return found.json() if found.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api("GET", f"/deployments/name/{name}")
        return found

    def trigger(self, name: str, **job: Any) -> str:
        deployment = self.deployment(name)
        parameters = {"job": {**deployment["parameters"]["job"], **job}}
        path = f"/deployments/{deployment['id']}/create_flow_run"
        return str(self.api("POST", path, json={"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"])

    def state(self, flow_run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api("GET", f"/flow_runs/{flow_run}")["state"]
        return found

    def finished(self, flow_run: str) -> dict[str, Any]:
        """Its last state, when it has ended."""
        return until(
            lambda: (s := self.state(flow_run))["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and s,
            lambda: f"{self.state(flow_run)} {self.log()}",
        )

    def log(self) -> str:
        return (self.folder / "worker.log").read_text()[-6000:]

    def directories(self) -> list[Path]:
        return sorted((self.folder / "home" / "runs").glob("tiny-*"), key=lambda d: d.stat().st_ctime)


def until(ready: Callable[[], Any], why: Callable[[], str] = lambda: "") -> Any:
    """Wait for something; what it is."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        found = ready()
        if found:
            return found
        time.sleep(0.3)
    pytest.fail(f"it never came: {why()}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill -9, with everything it started."""
    family = [process.pid, *(child.pid for child in children(process))]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    process.wait()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def workplace(server: Server, folder: Path, **settings: str) -> Iterator[Workplace]:
    folder.mkdir(parents=True, exist_ok=True)
    place = Workplace(server, folder, settings)
    try:
        yield place
    finally:
        for process in place.started:
            kill(process)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(prefect_server(tmp_path_factory.mktemp("server"))) as found:
        yield found


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Iterator[Workplace]:
    with workplace(server, tmp_path) as found:
        yield found


@pytest.mark.long
def test_without_a_server_deploy_says_what_is_missing(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    file = write_tiny(tmp_path)

    def deploy(*arguments: str, **settings: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "secateur", "deploy", str(file), *arguments]
        done = subprocess.run(command, env={**env, **settings}, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    code, said = deploy()
    assert code == errors.EXIT_SURROUNDINGS
    assert "PREFECT_API_URL" in said
    code, said = deploy("--cron", "0 25 * * *")
    assert code == errors.EXIT_USER
    assert "0 25 * * *" in said
    nobody = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    code, said = deploy(**nobody)
    assert code == errors.EXIT_SURROUNDINGS
    assert "does not answer" in said


@pytest.mark.long
def test_deploying_twice_changes_nothing_and_its_schedule_fires(place: Workplace) -> None:
    file, crons = write_tiny(place.folder), {"compress": "* * * * *", "profile": "0 6 * * 1"}
    options = ("--cron", crons["compress"], "--profile-cron", crons["profile"], "--name", "twice", "--pool", place.pool)
    said = place.secateur("deploy", str(file), *options)
    assert "Deployment compress/twice: cron * * * * * UTC" in said
    assert f"worker start --pool {place.pool}" in said
    before = place.deployment("compress/twice")
    place.deploy(file, "twice", **crons)
    after = place.deployment("compress/twice")
    assert before["id"] == after["id"]
    assert {key: before[key] for key in ("parameters", "tags")} == {key: after[key] for key in ("parameters", "tags")}
    assert [s["schedule"]["cron"] for s in after["schedules"]] == ["* * * * *"]
    assert after["global_concurrency_limit"]["limit"] == 1
    assert place.deployment("promote/twice")["schedules"] == []
    about = {"deployments": {"id": {"any_": [after["id"]]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    assert until(lambda: place.api("POST", "/flow_runs/filter", json=about))
    place.deploy(file, "twice", paused=True, **crons)
    assert not place.deployment("compress/twice")["schedules"][0]["active"]
    wrong = ({"file": 3}, {"file": "run.yaml", "fiel": "typo"}, {"overrides": []})
    for job in wrong:
        path = f"{place.server.url}/deployments/{after['id']}/create_flow_run"
        answer = httpx.post(path, json={"parameters": {"job": job}})
        assert answer.status_code in (409, 422), answer.text
        assert "Validation failed" in answer.text


@pytest.mark.slow
def test_a_deployment_of_an_earlier_version_is_told_with_what_makes_it_anew(place: Workplace) -> None:
    file = write_tiny(place.folder)
    place.deploy(file, "old")
    found = place.deployment("compress/old")
    former = {"entrypoint": "pipeline.flow.deployed.compress"}
    place.api("PATCH", f"/deployments/{found['id']}", json=former)
    note = "Note: compress/old was made by an earlier version, and cannot start; "
    assert f"{note}run: {wording.command('secateur', 'deploy', file, '--name', 'old')}" in place.deploy(file, "new")
    assert not [line for line in place.deploy(file, "old") if "compress/old was made by" in line]


@pytest.mark.long
def test_a_deployed_run_ends_registered_told_and_is_timed_again(place: Workplace) -> None:
    from mlflow import MlflowClient

    place.deploy(write_tiny(place.folder, **ONE_SHOT))
    with webhook() as (address, got):
        place.settings[notify.VARIABLE] = address
        place.worker()
        state = place.finished(place.trigger("compress/tiny"))
        assert (state["name"], state["type"]) == ("Promoted", "COMPLETED"), place.log()
        assert "tiny version 1" in state["message"]
        assert [message["event"] for message in got] == ["promotion"]
        profiled = place.finished(
            place.trigger("profile/tiny", tolerances={"p50": 99, "p95": 99, "first": 99, "rss": 99})
        )
        assert "As they were: tiny 1 on quick" in profiled["message"], place.log()
        again = place.finished(place.trigger("promote/tiny"))
        assert (again["type"], again["message"]) == ("COMPLETED", "no challenger waits for a decision"), place.log()
    (directory,) = place.directories()
    binding = run_claim.read_binding(directory)
    assert binding is not None
    assert binding.ended == "passed"
    artifacts = {a["key"]: a["data"] for a in place.api("POST", "/artifacts/filter", json={}) if a["key"]}
    assert "| top1" in artifacts["secateur-result"]
    assert "report.html" in artifacts["secateur-report"]
    assert "p50_ms" in artifacts["secateur-profile"]
    client = MlflowClient(f"sqlite:///{place.folder}/home/mlflow.db")
    experiment = client.get_experiment_by_name("secateur-profiles")
    assert experiment is not None
    (drift,) = client.search_runs([experiment.experiment_id])
    assert drift.data.metrics["p50_ms"] > 0
    assert "hook-secret" not in place.log()


@pytest.mark.long
def test_the_promote_flow_crowns_whoever_passes_and_measures_a_refused_one_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from secateur.pipeline.flow import deployed

    registry = embedded(migrated_home(tmp_path / "home", make_template(tmp_path / "mlflow.db")))
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    job = Promote(device_profiles=[str(quick_device(tmp_path, budgets={}))])

    def flow(run: str, noise: float) -> Any:
        add(registry, tmp_path, linear_model(tmp_path / f"{run}.onnx", noise=noise), run)
        return deployed.promote(job, return_state=True)

    with webhook() as (address, got), temporary_settings({PREFECT_API_URL: server.url}):
        monkeypatch.setenv(notify.VARIABLE, address)
        first, second = flow("good", 0.0), flow("worse", 1.0)
        third = deployed.promote(job, return_state=True)
    assert (first.name, first.message) == ("Promoted", "net version 1 is the champion on quick")
    assert second.is_completed()
    assert "net version 2 was refused (accuracy drop" in second.message
    assert third.message == "no challenger waits for a decision", "the champion is the same: no second chance"
    assert [message["event"] for message in got] == ["promotion"]
    champion = registry.champion("net", "quick")
    assert champion is not None
    assert champion.version == "1"


@pytest.mark.slow
def test_people_hear_of_a_regression_and_of_a_mistake(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from secateur.pipeline.flow import deployed
    from secateur.pipeline.tracking.store import connect
    from tests.pipeline.lifecycle.test_reprofile import FakeRegistry, reprofiled, result

    slower = reprofiled(result(1.0), result(1.3, 2.6, seed=1, onnxruntime="2"))
    connect(f"sqlite:///{tmp_path}/m.db")  # the store of the champion's run
    monkeypatch.setattr(
        deployed, "registry_of", lambda job: (FakeRegistry(("digits", "quick")), f"sqlite:///{tmp_path}/m.db")
    )
    monkeypatch.setattr(deployed, "reprofile", lambda *arguments, **named: iter([slower]))
    with webhook() as (address, got), temporary_settings({PREFECT_API_URL: server.url}):
        monkeypatch.setenv(notify.VARIABLE, address)
        alarm = deployed.profile(Profile(), return_state=True)
        calm = deployed.profile(Profile(on_regression="report"), return_state=True)
        wrong = deployed.profile(Profile(names=["nobody"]), return_state=True)
    assert alarm.name == "Alarm"
    assert alarm.is_failed()
    assert calm.is_completed()
    assert (wrong.name, wrong.is_failed()) == ("Failed", True)
    assert "no champion of nobody" in wrong.message
    assert [message["event"] for message in got] == ["alarm", "failure"]
    for said in ("digits 3 on quick", "p50_ms", "the device is slower"):
        assert said in got[0]["message"]


@pytest.mark.slow
def test_a_device_is_used_without_the_server_while_that_is_unreachable(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    said: list[str] = []
    nobody = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: nobody, PREFECT_CLIENT_MAX_RETRIES: 0}):
        lease = Lease("secateur-device-unreachable", said.append)
        for _ in range(3):
            with lease.held():
                pass
    assert len(said) == 1, "it is not asked again at once"
    assert "own lock" in said[0]


@pytest.mark.long
def test_prefect_yaml_deploys_the_same(place: Workplace) -> None:
    prefect = [sys.executable, "-m", "prefect"]
    env = {**place.env, "SECATEUR_HOME": str(place.folder / "home")}
    for command in (["work-pool", "create", "secateur", "--type", "process"], ["--no-prompt", "deploy", "--all"]):
        done = subprocess.run(
            [*prefect, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0 or "already exists" in done.stdout + done.stderr, done.stdout + done.stderr
    for flow in ("compress", "profile", "promote"):
        found = place.deployment(f"{flow}/digits-resnet20")
        assert found["global_concurrency_limit"]["limit"] == 1
        assert not any(schedule["active"] for schedule in found["schedules"])
        assert found["enforce_parameter_schema"]


# -- faults; real runs, long -------------------------------------------------------------------------------------------


def evaluations(directory: Path) -> list[str]:
    lines = (directory / "journal.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "evaluation" in r]
    return [f"{r['stage']}:{r['kind']}:{r['candidate']['id']}" for r in records]


def told(home: Path, uri: str = "") -> list[str]:
    from mlflow import MlflowClient

    from secateur.pipeline.tracking import CANDIDATE_TAG

    client = MlflowClient(uri or f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("secateur")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return sorted(r.data.tags[CANDIDATE_TAG] for r in runs if CANDIDATE_TAG in r.data.tags)


def begun(place: Workplace, lines: int = 5) -> Path:
    """The directory of a run whose search has begun."""

    def ready() -> Path | None:
        found = place.directories()
        file = found[-1] / "journal.jsonl" if found else None
        return found[-1] if file and file.is_file() and file.read_bytes().count(b"\n") >= lines else None

    found: Path = until(ready, place.log)
    return found


@pytest.mark.long
def test_a_killed_worker_s_run_is_finished_by_the_next(place: Workplace) -> None:
    place.deploy(write_tiny(place.folder))
    worker = place.worker()
    first = place.trigger("compress/tiny")
    directory = begun(place)
    kill(worker)
    seen = evaluations(directory)
    limit = place.deployment("compress/tiny")["global_concurrency_limit"]["id"]
    place.api("PATCH", f"/v2/concurrency_limits/{limit}", json={"active_slots": 0})  # as its lease does in five minutes
    place.worker()
    state = place.finished(place.trigger("compress/tiny"))
    assert state["type"] == "COMPLETED", place.log()
    assert place.directories() == [directory], "nothing was begun anew"
    ended_with = evaluations(directory)
    assert ended_with[: len(seen)] == seen
    assert len(set(ended_with)) == len(ended_with)
    assert told(place.folder / "home") == sorted(ended_with)
    assert place.state(first)["type"] == "CRASHED", "it is not shown as running for ever"
    third = place.finished(place.trigger("compress/tiny"))
    assert third["type"] == "COMPLETED"
    assert len(place.directories()) == 2, "what is finished is not continued"


@pytest.mark.long
def test_a_server_that_is_restarted_in_mid_run_costs_nothing(tmp_path: Path) -> None:
    with running(prefect_server(tmp_path / "server")) as server, workplace(server, tmp_path) as place:
        place.deploy(write_tiny(place.folder))
        place.worker()
        flow_run = place.trigger("compress/tiny")
        directory = begun(place)
        server.kill()
        time.sleep(20)
        server.start()
        state = place.finished(flow_run)
        assert state["type"] == "COMPLETED", place.log()
        assert place.directories() == [directory]
        assert len(set(evaluations(directory))) == len(evaluations(directory))
        assert told(place.folder / "home") == sorted(evaluations(directory))

        def held() -> list[int]:
            return [limit["active_slots"] for limit in place.api("POST", "/v2/concurrency_limits/filter", json={})]

        until(lambda: not any(held()), lambda: f"{held()}")


@pytest.mark.long
def test_two_at_once_each_get_their_own_and_take_turns_at_the_device(place: Workplace) -> None:
    file = write_tiny(place.folder, **ONE_SHOT)
    for name in ("one", "two"):
        place.deploy(file, name)
    place.worker()
    runs = [place.trigger(f"compress/{name}") for name in ("one", "two")]
    for flow_run in runs:
        assert place.finished(flow_run)["type"] == "COMPLETED", place.log()
    directories = place.directories()
    assert len(directories) == 2
    spans = sorted(
        (process["started"], process["ended"])
        for directory in directories
        for process in json.loads((directory / "benchmark.json").read_text())["processes"]
    )
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), spans
    assert sorted(told(place.folder / "home")) == sorted(e for d in directories for e in evaluations(d))


@pytest.mark.long
def test_on_postgresql_too(tmp_path: Path) -> None:
    with running(postgres(tmp_path / "pg")) as database:
        prefect = prefect_server(tmp_path / "server", database_url(database, "prefect", "postgresql+asyncpg"))
        mlflow = mlflow_server(tmp_path / "mlflow", database_url(database, "mlflow", "postgresql+psycopg2"))
        with running(prefect), running(mlflow), workplace(prefect, tmp_path / "work") as place:
            tracking = {"tracking": {"uri": mlflow.url}}
            place.secateur(
                "deploy",
                str(write_tiny(place.folder, **ONE_SHOT, **tracking)),
                "--cron",
                "0 2 * * *",
                "--pool",
                place.pool,
            )
            place.worker()
            state = place.finished(place.trigger("compress/tiny"))
            assert state["name"] == "Promoted", place.log()
            artifacts = {a["key"]: a["data"] for a in place.api("POST", "/artifacts/filter", json={}) if a["key"]}
            assert f"{mlflow.url}/#/experiments/" in artifacts["secateur-mlflow"]
            assert told(place.folder, mlflow.url) == sorted(evaluations(place.directories()[0]))
            profiled = place.finished(place.trigger("profile/tiny", on_regression="report"))
            assert profiled["type"] == "COMPLETED", place.log()
