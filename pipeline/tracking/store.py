"""A connection to MLflow: where it is, who we are there, and what can go wrong on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
from pathlib import Path

from secateur.pipeline.errors import UserError
from secateur.pipeline.tracking.ownership import (
    KIND,
    KIND_TAG,
    MADE_TAG,
    RUN_TAGS,
    experiment_deleted,
    experiment_refused,
)
from secateur.pipeline.tracking.ownership import RUN_TAG as RUN_TAG
from secateur.pipeline.tracking.place import SERVER, no_store, sqlite_file
from secateur.pipeline.tracking.place import first_line as first_line
from secateur.pipeline.tracking.place import redacted as redacted
from secateur.pipeline.tracking.place import store_uri as store_uri

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
from mlflow.entities import ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from secateur.pipeline.tracking.answers import CheckedClient  # noqa: E402

for noisy in ("mlflow", "alembic"):  # what a user has to know of a failure is in the exception
    logging.getLogger(noisy).setLevel(logging.CRITICAL)

Unreachable = (MlflowException, SQLAlchemyError, OSError)
"""What MLflow raises when a server is unreachable or refuses."""


def connect(uri: str, make: bool = True) -> MlflowClient:
    """A client of the store and registry at ``uri``.

    Args:
        make: whether a SQLite store is made where there is none.

    Raises:
        UserError: there is none, and none is to be made.
    """
    file = sqlite_file(uri)
    if file is not None:
        if not make and not file.exists():
            raise UserError(no_store(file))
        _make_store(file)
    return (CheckedClient if uri.startswith(SERVER) else MlflowClient)(uri, uri)


def experiment_of(client: MlflowClient, uri: str, name: str, home: Path, take_over: bool = False) -> str:
    """Id of an experiment, made where there is none; a database has no artifacts of its own, they go to ``home``.

    Args:
        take_over: whether one that somebody else made may be used; it is ours from then on.

    Raises:
        UserError: it is somebody else's, or was deleted.
        MlflowException: MLflow fails.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        artifacts = None if uri.startswith(SERVER) else (home / "artifacts").absolute().as_uri()
        try:
            return str(client.create_experiment(name, artifacts, {MADE_TAG: "made", KIND_TAG: KIND}))
        except MlflowException as error:  # another process was quicker
            experiment = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
    number = str(experiment.experiment_id)
    if experiment.lifecycle_stage == "deleted":
        raise UserError(experiment_deleted(name, number, uri))
    if MADE_TAG not in experiment.tags:
        earlier = _holds_runs_of_ours(client, number)
        if not (take_over or earlier):
            raise UserError(experiment_refused(name))
        client.set_experiment_tag(number, MADE_TAG, "made" if earlier else "taken over")
    if KIND_TAG not in experiment.tags:  # of an earlier Secateur, or taken over
        client.set_experiment_tag(number, KIND_TAG, KIND)
    return number


def _holds_runs_of_ours(client: MlflowClient, experiment_id: str) -> bool:
    """Whether an earlier Secateur, which put no tag on experiments, worked in this one."""
    queries = (f"tags.`{tag}` LIKE '%'" for tag in RUN_TAGS)
    return any(client.search_runs([experiment_id], query, ViewType.ALL, max_results=1) for query in queries)


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
