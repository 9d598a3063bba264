"""An MLflow store in a database, read without MLflow: SQLite read-only, PostgreSQL where psycopg2 is installed."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from secateur.device_profiles.wording import command
from secateur.pipeline.tracking.ownership import RUN_TAG, RUN_TAGS
from secateur.pipeline.tracking.place import first_line, redacted, sqlite_file
from secateur.pipeline.tracking.stores import Experiment, Model, Store, StoreRefusedError, StoreUnreachableError

LOCKED_S = 3.0
Query = Callable[[str, Sequence[object]], list[tuple[Any, ...]]]
"""SQL with ``?`` for its values -> rows."""


class EmptyStore(Store):
    """A store that the run is going to make."""

    def experiment(self, name: str) -> Experiment | None:
        return None

    def model(self, name: str) -> Model | None:
        return None


class SqlStore(Store):
    """A store with MLflow's tables."""

    def __init__(self, query: Query) -> None:
        self._query = query

    def experiment(self, name: str) -> Experiment | None:
        rows = self._query(
            "SELECT experiment_id, lifecycle_stage, artifact_location FROM experiments WHERE name = ?", [name]
        )
        if not rows:
            return None
        number, stage, artifacts = rows[0]
        tags: dict[str, str] = dict(
            self._query("SELECT key, value FROM experiment_tags WHERE experiment_id = ?", [number])
        )
        ours = self._query(
            "SELECT 1 FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
            "WHERE r.experiment_id = ? AND t.key IN (?, ?, ?) LIMIT 1",
            [number, *RUN_TAGS],
        )
        return Experiment(str(number), stage == "deleted", tags, artifacts or "", bool(ours))

    def model(self, name: str) -> Model | None:
        if not self._query("SELECT 1 FROM registered_models WHERE name = ?", [name]):
            return None
        tags: dict[str, str] = dict(self._query("SELECT key, value FROM registered_model_tags WHERE name = ?", [name]))
        aliases = self._query("SELECT alias, version FROM registered_model_aliases WHERE name = ?", [name])
        ours = self._query("SELECT version FROM model_version_tags WHERE name = ? AND key = ?", [name, RUN_TAG])
        versions = tuple(str(version) for (version,) in ours)
        return Model(tags, {alias: str(version) for alias, version in aliases}, versions)


def sqlite_store(uri: str) -> Store | str:
    """The store in a file; or a note, where the address names no plain file.

    Raises:
        StoreRefusedError: the file cannot be MLflow's store, or cannot be made.
        StoreUnreachableError: another process has it locked.
    """
    file = sqlite_file(uri)
    if file is None:
        _, separator, rest = uri.partition(":///")
        name = rest.partition("?")[0]
        if name.startswith("file:"):
            return f"tracking {redacted(uri)} is looked at when the run begins to use it, not before"
        if name == ":memory:" or (separator and not name):
            raise StoreRefusedError("a database in memory is gone with the process: write sqlite:///PATH")
        raise StoreRefusedError("a SQLite store is written sqlite:///PATH, or sqlite:////PATH from the root")
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        _check_place(file)
        return EmptyStore()
    except OSError as error:
        raise StoreRefusedError(f"{file} is no file that can be opened: {error.strerror}") from error
    if not file.is_file():
        raise StoreRefusedError(f"{file} is no file: name a file that is, or that can be made")
    if not os.access(file, os.R_OK | os.W_OK):
        raise StoreRefusedError(f"{file} cannot be read and written by this user: give it the right to")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise StoreRefusedError(f"nothing can be written to {file.parent}, where SQLite keeps its journal")
    return _checked(SqliteQuery(file), f"{file}", uri)


class SqliteQuery:
    """Asks a SQLite file, and changes nothing in it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        place = f"file:{quote(str(self._file.absolute()))}?mode=ro"
        try:
            connection = sqlite3.connect(place, uri=True, timeout=LOCKED_S)
            try:
                return connection.execute(sql, values).fetchall()
            finally:
                connection.close()
        except sqlite3.DatabaseError as error:
            text = first_line(error)
            if "locked" in text or "busy" in text:
                raise StoreUnreachableError(f"{self._file} is locked by another process") from error
            raise StoreRefusedError(
                f"{self._file} cannot be read as SQLite ({text}): name another file, or restore it"
            ) from error

    @property
    def tables(self) -> set[str]:
        return {name for (name,) in self("SELECT name FROM sqlite_master WHERE type = 'table'", ())}


def _check_place(file: Path) -> None:
    """See that a store can be made where none is."""
    around = next(parent for parent in file.absolute().parents if parent.exists())
    if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK):
        raise StoreRefusedError(f"{file} cannot be made: {around} is no folder that this user may write to")


def _checked(query: SqliteQuery, what: str, uri: str) -> Store:
    """A store, of the schema that the installed MLflow expects."""
    tables = {name for name in query.tables if not name.startswith("sqlite_")}
    if not tables - {"alembic_version"}:
        return EmptyStore()
    if not {"alembic_version", "experiments", "runs"} <= tables:
        raise StoreRefusedError(
            f"{what} is a database of something else (it has {', '.join(sorted(tables)[:3])}): name another file"
        )
    _check_schema([str(row[0]) for row in query("SELECT version_num FROM alembic_version", ())], what, uri)
    return SqlStore(query)


def _check_schema(present: Sequence[str], what: str, uri: str) -> None:
    """See that MLflow will not refuse a store for its schema."""
    known, heads = revisions()
    if not heads or set(present) == heads:
        return
    if set(present) <= known:
        upgrade = command("mlflow", "db", "upgrade", redacted(uri))
        raise StoreRefusedError(f"{what} was made by an earlier MLflow: keep a copy of it, then run `{upgrade}`")
    raise StoreRefusedError(
        f"{what} was made by a newer MLflow than is installed here: install that one, or name another store"
    )


def revisions() -> tuple[set[str], set[str]]:
    """The schemas that the installed MLflow knows, and the one it expects, read from its migrations as text."""
    spec = find_spec("mlflow")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    known, before = set[str](), set[str]()
    for place in places:
        for file in (Path(place) / "store" / "db_migrations" / "versions").glob("*.py"):
            text = file.read_text(encoding="utf-8")
            known |= set(re.findall(r"^revision\s*(?::\s*\w+\s*)?=\s*[\"'](\w+)", text, re.M))
            for line in re.findall(r"^down_revision\b[^=]*=\s*(.+)$", text, re.M):
                before |= set(re.findall(r"[\"'](\w+)[\"']", line))
    return known, known - before


def postgres_store(uri: str) -> Store | str:
    """The store in PostgreSQL; or a note, where psycopg2 is not installed.

    Raises:
        StoreRefusedError: it does not let us in, or holds something else.
        StoreUnreachableError: it does not answer.
    """
    if find_spec("psycopg2") is None:
        return (
            f"tracking {redacted(uri)} is looked at when the run begins to use it: it needs psycopg2, which is missing"
        )
    import psycopg2  # type: ignore[import-untyped]

    address = "postgresql://" + uri.partition("://")[2]

    def query(sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            connection = psycopg2.connect(address, connect_timeout=5)
            try:
                connection.set_session(readonly=True)
                with connection.cursor() as cursor:
                    cursor.execute(sql.replace("?", "%s"), tuple(values))
                    return list(cursor.fetchall())
            finally:
                connection.close()
        except psycopg2.OperationalError as error:
            text = first_line(error)
            if re.search("authentication|does not exist|no password|permission", str(error)):
                raise StoreRefusedError(f"it does not let us in ({text}): correct SECATEUR_TRACKING_URI") from error
            raise StoreUnreachableError(text) from error
        except psycopg2.Error as error:
            raise StoreRefusedError(
                f"it cannot be read ({first_line(error)}): correct SECATEUR_TRACKING_URI"
            ) from error

    tables = {name for (name,) in query("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()", ())}
    if not tables:
        return EmptyStore()
    if "alembic_version" not in tables or "experiments" not in tables:
        return f"tracking {redacted(uri)} holds tables of something else, among which MLflow will put its own"
    _check_schema([str(row[0]) for row in query("SELECT version_num FROM alembic_version", ())], redacted(uri), uri)
    return SqlStore(query)
