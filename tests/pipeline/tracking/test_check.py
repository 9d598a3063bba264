"""What MLflow will refuse is found before the search, without MLflow: real stores, a real server, and hostile ones."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import TrackingError, UserError
from secateur.pipeline.tracking import check
from secateur.pipeline.tracking.check import check_tracking, require_tracking
from secateur.pipeline.tracking.database import revisions
from secateur.pipeline.tracking.ownership import DEFAULT_DEVICE, MADE_TAG, RUN_TAG
from tests.pipeline.registered import make_template
from tests.servers import database_url, free_port, mlflow_server, postgres, running

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
WORKLOAD = "{name: classification, model: {name: cifar/resnet8}, data: {source: digits, image_size: 8}}"


def config_of(**tracking: Any) -> RunFile:
    text = f"name: net\nworkload: {WORKLOAD}\ntracking: {json.dumps(tracking)}"
    return parse_run_file(text)


def fill(uri: str, folder: Path) -> None:
    """Things of ours and of others in a store."""
    client = MlflowClient(uri, uri)
    client.delete_experiment(client.create_experiment("gone"))
    client.create_experiment("theirs")
    client.create_experiment("half-promotions")  # of a name that we make of ours
    client.create_experiment("ours", folder.as_uri(), {MADE_TAG: "made"})
    client.create_run(client.create_experiment("earlier", folder.as_uri()), tags={RUN_TAG: "run-1"})
    client.register_prompt("prompt", template="hello {{name}}")
    client.create_registered_model("their-model")
    client.create_registered_model("our-model", {DEFAULT_DEVICE: "pi"})
    client.create_model_version("our-model", folder.as_uri(), tags={RUN_TAG: "run-1"})
    client.set_registered_model_alias("our-model", "champion", "1")
    client.create_registered_model("mixed-model", {DEFAULT_DEVICE: "pi"})
    client.create_model_version("mixed-model", folder.as_uri())
    client.set_registered_model_alias("mixed-model", "challenger-pi", "1")
    client.set_registered_model_alias("mixed-model", "production", "1")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    fill(f"sqlite:///{make_template(folder / 'mlflow.db')}", folder)
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def addresses(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The same things in a file and on a server."""
    folder = tmp_path_factory.mktemp("server")
    served = shutil.copyfile(filled, folder / "mlflow.db")
    with running(mlflow_server(folder, f"sqlite:///{served}")) as server:
        yield {
            "file": f"sqlite:///{filled}",
            "file with options": f"sqlite:///{filled}?timeout=30",
            "server": server.url,
        }


TABLE = [
    ({}, "", ""),
    ({"experiment": "new"}, "", ""),
    ({"experiment": "ours", "registered_model": "our-model"}, "", ""),
    ({"experiment": "earlier"}, "", ""),
    ({"experiment": "gone"}, "'gone' was deleted in MLflow", "same"),
    (
        {"experiment": "theirs"},
        "experiment 'theirs' .* did not make it",
        "'theirs' is somebody else's",
    ),
    ({"experiment": "half"}, "experiment 'half-promotions' .* did not", "'half-promotions' is somebody else's"),
    ({"experiment": "Default"}, "experiment 'Default' .* did not make it", "will be taken over"),
    ({"registered_model": "prompt"}, "'prompt' is a prompt", "same"),
    ({"registered_model": "their-model"}, "'their-model' .* did not make it", "'their-model' is somebody else's"),
    (
        {"registered_model": "mixed-model"},
        "challenger-pi of .*'mixed-model' points to version 1",
        "challenger-pi",
    ),
]


@pytest.mark.parametrize("where", [pytest.param("file", marks=pytest.mark.long), "file with options", "server"])
def test_what_a_store_has_under_the_runs_names_is_told_from_what_is_ours(
    addresses: dict[str, str], tmp_path: Path, where: str
) -> None:
    for tracking, fault, note in TABLE:
        report = check_tracking(config_of(uri=addresses[where], **tracking), tmp_path)
        taking = check_tracking(config_of(uri=addresses[where], take_over=True, **tracking), tmp_path)
        if not fault:
            assert (report.faults, report.notes, taking.faults) == ((), (), ()), tracking
            continue
        assert len(report.faults) == 1, tracking
        assert _matches(fault, report.faults[0])
        assert len(taking.faults) == (1 if note == "same" else 0), tracking
        assert note == "same" or _matches(note, taking.notes[0])


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


def test_a_file_is_looked_at_without_changing_it(filled: Path, tmp_path: Path) -> None:
    before = filled.read_bytes()
    check_tracking(config_of(uri=f"sqlite:///{filled}", experiment="theirs", take_over=True), tmp_path)
    assert filled.read_bytes() == before


def test_postgresql_is_looked_at_too(tmp_path: Path) -> None:
    with running(postgres(tmp_path / "pg", ("mlflow", "empty"))) as server:
        uri = database_url(server, "mlflow", "postgresql+psycopg2")
        fill(uri, tmp_path)
        for tracking, fault, _ in TABLE:
            report = check_tracking(config_of_variable(uri, **tracking), tmp_path)
            assert bool(report.faults) == bool(fault), (tracking, report)
        assert not check_tracking(config_of_variable(uri.replace("/mlflow", "/empty")), tmp_path).faults
        wrong = check_tracking(config_of_variable(uri.replace(":pruned@", ":other-secret@")), tmp_path)
        assert "let us in" in wrong.faults[0]
        assert "other-secret" not in str(wrong)
        assert "let us in" in check_tracking(config_of_variable(f"{uri}-none"), tmp_path).faults[0]
    assert "cannot be reached" in check_tracking(config_of_variable(uri), tmp_path).notes[0]


def config_of_variable(uri: str, **tracking: Any) -> RunFile:
    """A run file whose store a variable names, as an address with a password has to be."""
    os.environ["SECATEUR_TRACKING_URI"] = uri
    return config_of(**tracking)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test sets is gone after it."""
    monkeypatch.setenv("SECATEUR_TRACKING_URI", "")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["experiment", "registered_model", "uri"])
@pytest.mark.parametrize("text", ["", " ", "\u00a0", "\u2003 "])
def test_a_blank_name_is_no_name(key: str, text: str) -> None:
    with pytest.raises(UserError, match=f"tracking.{key}"):
        config_of(**{key: text})


def test_an_experiment_has_no_control_characters_in_its_name() -> None:
    with pytest.raises(UserError, match=r"tracking\.experiment"):
        config_of(experiment="a\x1bb")


# -- files that are no stores ------------------------------------------------------------------------------------------


def _is_text(file: Path) -> None:
    file.write_text("this is no database\n" * 100)


def _is_truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:6000])


def _is_of_something_else(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE photos (id)")


def _is_newer(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffff00001111'")


def _is_older(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [min(revisions()[0] - revisions()[1])])


def _is_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _is_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _leads_in_a_circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize("query", ["", "?timeout=30"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_is_text, "cannot be read as SQLite"),
        (_is_truncated, "cannot be read as SQLite"),
        (_is_of_something_else, r"a database of something else \(it has photos\)"),
        (_is_newer, "made by a newer MLflow"),
        (_is_older, "made by an earlier MLflow.*mlflow db upgrade"),
        (_is_a_folder, "is no file"),
        (_is_a_pipe, "is no file"),
        (_leads_in_a_circle, "is no file that can be opened"),
    ],
)
def test_a_file_that_is_no_store_of_this_mlflow_is_refused(
    filled: Path, tmp_path: Path, damage: Callable[[Path], None], said: str, query: str
) -> None:
    file = Path(shutil.copyfile(filled, tmp_path / "x.db"))
    damage(file)
    report = check_tracking(config_of(uri=f"sqlite:///{file}{query}"), tmp_path)
    assert len(report.faults) == 1
    assert _matches(said, report.faults[0])
    assert str(file) in report.faults[0]
    assert not (tmp_path / f"x.db{query}").exists() or not query


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite:///:memory:", "in memory"),
        ("sqlite://", "written sqlite:///PATH"),
        ("sqlite:/x.db", "written sqlite:///PATH"),
        ("sqlite:///", "in memory"),
        ("sqlite:////dev/null/x.db", "cannot be made"),
        ("htp://server:5000", "no kind of store called 'htp'"),
        ("http://server:port", "no address of a server"),
        ("http://[::1", "no address of a server"),
        ("http://", "no address of a server"),
    ],
)
def test_an_address_of_nothing_is_refused(tmp_path: Path, uri: str, said: str) -> None:
    report = check_tracking(config_of(uri=uri), tmp_path)
    assert len(report.faults) == 1, report
    assert _matches(said, report.faults[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_refused(filled: Path, tmp_path: Path) -> None:
    file = Path(shutil.copyfile(filled, tmp_path / "x.db"))
    file.chmod(0o000)
    assert "by this user" in check_tracking(config_of(uri=f"sqlite:///{file}?timeout=30"), tmp_path).faults[0]


def test_a_store_that_is_to_be_made_and_an_empty_file_are_fine(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    for uri in (None, f"sqlite:///{tmp_path}/new/deep/x.db", f"sqlite:///{tmp_path}/x.db?timeout=30"):
        assert check_tracking(config_of(uri=uri), tmp_path) == check.TrackingReport()
    assert [file.name for file in tmp_path.iterdir() if file.name != "home"] == ["mlflow.db"]


def test_a_locked_file_is_unreachable(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pipeline.tracking.database.LOCKED_S", 0.1)
    file = shutil.copyfile(filled, tmp_path / "x.db")
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("BEGIN EXCLUSIVE")
    report = check_tracking(config_of(uri=f"sqlite:///{file}"), tmp_path)
    connection.close()
    assert (report.faults, report.unreachable) == ((), False)
    assert "locked by another process" in report.notes[0]


def test_an_experiment_whose_files_were_in_a_home_that_was_moved_is_refused(filled: Path, tmp_path: Path) -> None:
    home = tmp_path / "now"
    home.mkdir()
    file = shutil.copyfile(filled, home / "mlflow.db")
    client = MlflowClient(f"sqlite:///{file}", f"sqlite:///{file}")
    client.create_experiment("moved", (tmp_path / "before/artifacts").as_uri(), {MADE_TAG: "made"})
    client.create_experiment("fresh", (home / "artifacts").as_uri(), {MADE_TAG: "made"})
    assert not check_tracking(config_of(experiment="fresh"), home).faults
    (fault,) = check_tracking(config_of(experiment="moved"), home).faults
    assert f"{tmp_path}/before/artifacts, which is not there" in fault
    (tmp_path / "before").symlink_to(home)
    assert not check_tracking(config_of(experiment="moved"), home).faults


# -- servers that are none ---------------------------------------------------------------------------------------------

PAGE = b"<!DOCTYPE html><html><body>Please log in\x1b[2J</body></html>"
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Hostile:
    url: str
    seen: list[tuple[str, str | None]]


@contextmanager
def answering(answer: Callable[[str], Answer]) -> Iterator[Hostile]:
    """A server of our own that answers whatever it is told to."""
    seen: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name that the library looks for

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Hostile(f"http://127.0.0.1:{server.server_port}", seen)
        finally:
            server.shutdown()


def always(status: int, body: bytes = b"", **headers: str) -> Callable[[str], Answer]:
    return lambda _: (status, headers, body)


def after_version(version: bytes, status: int = 404, body: bytes = b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}') -> Any:
    return lambda path: (200, {}, version) if path == "/version" else (status, {}, body)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (always(200, PAGE), "no MLflow server"),
        (always(200, b"[1, 2]"), "no MLflow server"),
        (always(200, b"{}"), "no MLflow server"),
        (always(200, b"[" * 200_000), "no MLflow server"),
        (always(200, b'{"experiment": 1, "registered_model": []}'), "no MLflow server"),
        (always(404, PAGE), "no MLflow server"),
        (always(401), "it asks who we are.*MLFLOW_TRACKING_USERNAME"),
        (always(403, b"Invalid Host header"), r"does not let us in \(Invalid Host header\)"),
        (always(407), "proxy"),
        (always(400, b'{"error_code": "X", "message": "odd\\u001b[2J"}'), r"status 400 \(odd"),
        (always(302, Location="https://login.example/?next=x"), r"sends us on to https://login\.example"),
        (after_version(b"2.9.2"), "is MLflow 2.9.2; Secateur needs 3.0"),
        (after_version(b"1.30.0\n"), "is MLflow 1.30.0"),
    ],
)
def test_a_server_that_will_refuse_is_a_fault_whether_required_or_not(
    tmp_path: Path, answer: Callable[[str], Answer], said: str
) -> None:
    with answering(answer) as server:
        for required in (False, True):
            report = check_tracking(config_of(uri=server.url, required=required), tmp_path)
            assert len(report.faults) == 1, report
            assert _matches(said, report.faults[0]), report
            assert not report.unreachable
            assert "\x1b" not in report.faults[0]
            with pytest.raises(UserError):
                require_tracking(config_of(uri=server.url, required=required), tmp_path, lambda _: None)


def test_a_newer_server_and_one_without_a_version_are_fine(tmp_path: Path) -> None:
    with answering(after_version(b"99.0.0")) as server:
        report = check_tracking(config_of(uri=server.url), tmp_path)
        assert report.faults == ()
        assert "MLflow 99.0.0, newer" in report.notes[0]
    missing = b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}'
    with answering(lambda path: (404, {}, PAGE if path == "/version" else missing)) as server:
        assert check_tracking(config_of(uri=server.url), tmp_path) == check.TrackingReport()


@contextmanager
def silent() -> Iterator[Hostile]:
    """A server that takes a connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Hostile(f"http://127.0.0.1:{listener.getsockname()[1]}", [])


@contextmanager
def nobody() -> Iterator[Hostile]:
    yield Hostile(f"http://127.0.0.1:{free_port()}", [])


@contextmanager
def no_such_host() -> Iterator[Hostile]:
    yield Hostile("http://no-such-host.invalid:5000", [])


@pytest.mark.parametrize(
    "server",
    [silent, nobody, no_such_host, lambda: answering(always(500, PAGE)), lambda: answering(always(503))],
    ids=["silent", "nobody", "no such host", "500", "503"],
)
def test_a_server_that_is_away_is_a_note_unless_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Callable[[], Any]
) -> None:
    monkeypatch.setattr("secateur.pipeline.tracking.rest.ANSWER_S", 0.3)
    with server() as found:
        report = check_tracking(config_of(uri=found.url), tmp_path)
        assert (report.faults, report.unreachable) == ((), False)
        assert "cannot be reached" in report.notes[0]
        required = config_of(uri=found.url, required=True)
        report = check_tracking(required, tmp_path)
        assert report.unreachable
        assert "tracking.required: false" in report.faults[0]
        with pytest.raises(TrackingError, match="cannot be reached"):
            require_tracking(required, tmp_path, lambda _: None)


def test_a_server_that_drips_does_not_hold_a_run_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LONGEST_S", 0.5)
    never = threading.Event()

    def dripping(_: str) -> Answer:
        never.wait(60)
        return 200, {}, b""

    with answering(dripping) as server:
        assert "did not answer within" in check_tracking(config_of(uri=server.url), tmp_path).notes[0]
        never.set()


def test_who_we_are_is_said_to_the_server_and_to_nobody_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with answering(after_version(b"3.1.0")) as other, answering(always(307, Location=other.url)) as server:
        for names, said in (
            ({"USERNAME": "me", "PASSWORD": "secret-1"}, "Basic bWU6c2VjcmV0LTE="),
            ({"TOKEN": "token-1"}, "Bearer token-1"),
            ({}, None),
        ):
            for name in ("USERNAME", "PASSWORD", "TOKEN"):
                monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", names.get(name, ""))
            check_tracking(config_of(uri=other.url), tmp_path)
            assert {given for _, given in other.seen} == {said}
            other.seen.clear()
            report = check_tracking(config_of(uri=server.url), tmp_path)
            assert "sends us on" in report.faults[0]
            assert not other.seen, "a redirect is not followed"


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported(filled: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from secateur.pipeline.config.reading import parse_run_file;"
        "from secateur.pipeline.tracking.check import check_tracking;"
        f"text = 'name: net\\nworkload: {WORKLOAD}\\ntracking: {{uri: \"sqlite:///{filled}\", experiment: theirs}}';"
        "config = parse_run_file(text); before = set(sys.modules);"  # which imports what the workload names
        "print(len(check_tracking(config, Path('.')).faults));"
        "print(*{'mlflow', 'sqlalchemy', 'pandas', 'prefect'} & set(sys.modules));"
        "print(*{'torch', 'optuna', 'numpy'} & (set(sys.modules) - before))"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, env=environment, check=True
    )
    assert found.stdout.split() == ["1"]


def test_the_schema_that_is_expected_is_read_from_mlflows_own_migrations(filled: Path) -> None:
    with sqlite3.connect(filled) as connection:
        current = {row[0] for row in connection.execute("SELECT version_num FROM alembic_version")}
    known, heads = revisions()
    assert heads == current
    assert heads < known
