"""Real servers for tests: PostgreSQL, Prefect and MLflow, each a process of its own in a folder of its own."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

START_S = 180
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """A server process that can be stopped, killed and started again on the same port and data.

    Args:
        url: where clients reach it.
        command: that starts it.
        health: an address that answers 200 when it is up; None = ``ready`` says so.
        settings: environment of the process, beside this process's.
    """

    url: str
    command: list[str]
    log: Path
    health: str | None = None
    ready: Callable[[], bool] = lambda: True
    settings: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    scratch: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                start_new_session=True,
                env={**os.environ, **QUIET, **self.settings},
                stdout=log,
                stderr=log,
                user=self.user,
                group=pwd.getpwnam(self.user).pw_gid if self.user else None,
                extra_groups=[] if self.user else None,
                cwd=self.log.parent,
            )
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self.process.poll() is None:
            if self._answers():
                return self
            time.sleep(0.2)
        raise AssertionError(f"{self.command[:4]} did not start: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Kill -9, with its children."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait; PostgreSQL's fast shutdown."""
        self._end(signal.SIGINT if self.user or "postgres" in self.command[0] else signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            if how is signal.SIGKILL:
                os.killpg(self.process.pid, how)
            else:
                self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def _answers(self) -> bool:
        if self.health is None:
            return self.ready()
        try:
            with urllib.request.urlopen(self.health, timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 401  # it is up, and wants to know who asks
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server that is killed at the end, with what it kept outside the test's folder."""
    try:
        yield server.start()
    finally:
        server.kill()
        if server.scratch is not None:
            shutil.rmtree(server.scratch, ignore_errors=True)


def postgres_tool(name: str) -> str:
    """Path of one of PostgreSQL's programs; the test is skipped where it is not installed."""
    found = shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))[::-1]), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    return found


def postgres(folder: Path, databases: tuple[str, ...] = ("mlflow", "prefect")) -> Server:
    """PostgreSQL on a fresh cluster; ``url`` is ``127.0.0.1:PORT``, user ``secateur``, password ``pruned``.

    It refuses to run as root: then it runs as ``postgres`` or ``nobody``, in a scratch folder that belongs to them
    (pytest closes its own to others whenever another session begins).
    """
    initdb, server, createdb = (postgres_tool(name) for name in ("initdb", "postgres", "psql"))
    user, group, scratch = None, None, None
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
        group = pwd.getpwnam(user).pw_gid
        folder = scratch = Path(tempfile.mkdtemp(prefix="secateur-postgres-"))
        shutil.chown(folder, user, group)
    folder.mkdir(parents=True, exist_ok=True)
    as_user = {"user": user, "group": group, "extra_groups": [] if user else None}
    password = folder / "password"
    password.write_text("pruned\n")
    password.chmod(0o644)
    data, port = folder / "data", free_port()
    command = [initdb, "-D", str(data), "-U", "secateur", "-A", "scram-sha-256", f"--pwfile={password}", "-N"]
    subprocess.run([*command, "--locale=C", "-E", "UTF8"], check=True, capture_output=True, cwd=folder, **as_user)  # type: ignore[call-overload]
    log = folder / "log"
    log.touch()

    def ready() -> bool:
        return _psql(createdb, port, "select 1").returncode == 0

    command = [server, "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
    found = Server(f"127.0.0.1:{port}", command, log, ready=ready, user=user, scratch=scratch)
    found.start()
    for name in databases:
        _psql(createdb, port, f"create database {name}").check_returncode()
    found.stop()
    return found


def _psql(program: str, port: int, sql: str) -> subprocess.CompletedProcess[bytes]:
    command = [program, "-h", "127.0.0.1", "-p", str(port), "-U", "secateur", "-d", "postgres", "-c", sql]
    return subprocess.run(command, env={**os.environ, "PGPASSWORD": "pruned"}, capture_output=True)


def database_url(server: Server, database: str, driver: str) -> str:
    """SQLAlchemy's address of a database: ``postgresql+psycopg2`` for MLflow, ``postgresql+asyncpg`` for Prefect."""
    return f"{driver}://secateur:pruned@{server.url}/{database}"


def prefect_server(folder: Path, database: str | None = None) -> Server:
    """A Prefect server, on SQLite in ``folder`` or on ``database``; ``url`` is what PREFECT_API_URL wants."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_API_HOST": "127.0.0.1"}
    if database:
        settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    url = f"http://127.0.0.1:{port}/api"
    return Server(url, command, folder / "server.log", f"{url}/health", settings=settings)


def mlflow_server(folder: Path, database: str | None = None, auth: tuple[str, str] | None = None) -> Server:
    """An MLflow server that proxies artifacts, on SQLite in ``folder`` or on ``database``.

    Args:
        auth: name and password of its administrator; nobody else gets in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    store = database or f"sqlite:///{folder}/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "served")]
    settings = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-tests-only"}
    if auth:
        config = folder / "auth.ini"
        config.write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/auth.db\n"
            f"admin_username = {auth[0]}\nadmin_password = {auth[1]}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command += ["--app-name", "basic-auth"]
        settings["MLFLOW_AUTH_CONFIG_PATH"] = str(config)
    url = f"http://127.0.0.1:{port}"
    return Server(url, command, folder / "server.log", f"{url}/health", settings=settings)
