"""A connection to MLflow: where it is, who we are there, and what can go wrong on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
from pathlib import Path

from pipeline.config import TrackingSection
from pipeline.errors import masked

for name, value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default blocks for four minutes when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(name, value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

RUN_TAG = "secateur.run_id"
Unreachable = (MlflowException, SQLAlchemyError, OSError)
"""What MLflow raises when a server is away or refuses."""


def store_uri(section: TrackingSection, home: Path) -> str:
    """Where MLflow is: ``tracking.uri`` of the run file, ``SECATEUR_TRACKING_URI``, or SQLite under ``home``."""
    return section.uri or os.environ.get("SECATEUR_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').absolute()}"


def shown(uri: str) -> str:
    """An address without the password in it, for people, logs and journals."""
    return masked(uri)


def connect(uri: str) -> MlflowClient:
    """A client of the store and registry at ``uri``; a SQLite store is made where there is none."""
    if uri.startswith("sqlite:///"):
        _make_store(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(uri, uri)


def experiment_of(client: MlflowClient, uri: str, name: str, home: Path) -> str:
    """Id of an experiment, made where there is none; a database has no artifacts of its own, they go to ``home``."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    artifacts = None if uri.startswith(("http://", "https://")) else (home / "artifacts").absolute().as_uri()
    return str(client.create_experiment(name, artifacts))


def _make_store(path: Path) -> None:
    """Make a SQLite store, where there is none, and let readers and writers work side by side.

    It is made beside its place and appears whole: a disk that fills, a process that dies or one that does the same
    leaves no half of one, which MLflow could not use any more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as part:
                made = Path(part) / path.name
                MlflowClient(f"sqlite:///{made}").search_experiments()
                with contextlib.suppress(FileExistsError):  # another process was quicker
                    os.link(made, path)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    except sqlite3.Error as error:
        raise OSError(f"cannot use {path} as MLflow's store: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line without secrets."""
    return masked((str(error).splitlines() or [type(error).__name__])[0][:300])
