"""What MLflow will refuse, found before anything is searched, and without MLflow (which takes seconds to import).

A server is asked over HTTP, a SQLite store is read with ``mode=ro``, PostgreSQL through psycopg2 where that is
installed. Whatever it is, the answer is there within ten seconds, and nothing is written.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import TrackingError, UserError
from secateur.pipeline.tracking import ownership
from secateur.pipeline.tracking.database import postgres_store, sqlite_store
from secateur.pipeline.tracking.ownership import DEFAULT_DEVICE, MADE_TAG
from secateur.pipeline.tracking.place import SERVER, redacted, store_uri
from secateur.pipeline.tracking.rest import RestStore
from secateur.pipeline.tracking.stores import Experiment, Store, StoreRefusedError, StoreUnreachableError

LONGEST_S = 10.0
"""However an address behaves, a report is there after so long."""
PROMOTIONS = "-promotions"
"""What the experiment with an experiment's decisions is called besides its name."""
DATABASES = ("postgresql", "mysql", "mssql")
OTHERS = ("databricks", "databricks-uc", "uc", "file")
"""Kinds of stores that MLflow has and that are looked at when the run starts to use them."""


@dataclass(frozen=True)
class TrackingReport:
    """What was found.

    Args:
        faults: what the run cannot go on with, each with its fix.
        notes: what is worth knowing.
        unreachable: whether the fault is that the server does not answer, and nothing else.
    """

    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unreachable: bool = False


def check_tracking(config: RunFile, home: Path) -> TrackingReport:
    """Whether the run file's MLflow will take what the run is going to tell it.

    Args:
        home: SECATEUR_HOME, where the store is that needs no server.
    """
    uri = store_uri(config.tracking, home)
    answers: queue.SimpleQueue[TrackingReport | BaseException] = queue.SimpleQueue()

    def look() -> None:
        try:
            answers.put(_look(config, uri, home))
        except BaseException as error:  # noqa: BLE001 - told by who waits
            answers.put(error)

    threading.Thread(target=look, name="tracking check", daemon=True).start()
    try:
        answer = answers.get(timeout=LONGEST_S)
    except queue.Empty:
        answer = _away(config, uri, f"it did not answer within {LONGEST_S:g} s")
    if isinstance(answer, BaseException):
        raise answer
    return answer


def require_tracking(config: RunFile, home: Path, say: Callable[[str], None]) -> None:
    """See, before anything is searched, that the run file's MLflow will take what the run is going to tell it.

    Args:
        say: told what is worth knowing.

    Raises:
        UserError: it will not.
        TrackingError: it must answer, and does not.
    """
    report = check_tracking(config, home)
    for note in report.notes:
        say(f"Note: {note}")
    if report.unreachable:
        raise TrackingError("\n".join(report.faults), unreachable=True)
    if report.faults:
        raise UserError("\n".join(report.faults))


def _look(config: RunFile, uri: str, home: Path) -> TrackingReport:
    try:
        store = open_store(uri)
        if isinstance(store, str):
            return TrackingReport(notes=(store,))
        faults, notes = _faults(config, store, uri, home)
    except StoreRefusedError as error:
        return TrackingReport((f"tracking {redacted(uri)}: {error}",))
    except StoreUnreachableError as error:
        return _away(config, uri, str(error))
    return TrackingReport(tuple(faults), (*store.notes, *notes))


def _away(config: RunFile, uri: str, reason: str) -> TrackingReport:
    """A server that is down costs no search, unless the run file says that it must be there."""
    said = f"tracking server {redacted(uri)} cannot be reached: {reason}"
    if config.tracking.required:
        fix = "Start it, correct tracking.uri, or set tracking.required: false to deliver later"
        return TrackingReport((f"{said}. {fix}",), unreachable=True)
    return TrackingReport(notes=(f"{said}; candidates wait in the journal until it can",))


def open_store(uri: str) -> Store | str:
    """The store at an address, to be asked; or a note, for one that is looked at later.

    Raises:
        StoreRefusedError: there is no such kind of store, or the file cannot be one.
        StoreUnreachableError: it does not answer.
    """
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    if uri.startswith(SERVER):
        return RestStore(uri)
    if scheme == "sqlite":
        return sqlite_store(uri)
    if scheme in ("postgresql", "postgres"):
        return postgres_store(uri)
    if scheme in (*DATABASES, *OTHERS) or "://" not in uri:
        return f"tracking {redacted(uri)} is looked at when the run begins to use it, not before"
    known = ", ".join(("http", "https", "sqlite", *DATABASES, *OTHERS))
    raise StoreRefusedError(f"there is no kind of store called {scheme!r}; tracking.uri begins with one of: {known}")


def _faults(config: RunFile, store: Store, uri: str, home: Path) -> tuple[list[str], list[str]]:
    """What a store has under the names that the run is going to use."""
    section, faults, notes = config.tracking, list[str](), list[str]()

    def owned(what: str, refusal: str) -> None:
        if section.take_over:
            notes.append(f"{what} is somebody else's and will be taken over (tracking.take_over)")
        else:
            faults.append(refusal)

    for name in (section.experiment, *((section.experiment + PROMOTIONS,) if config.gate.promote else ())):
        experiment = store.experiment(name)
        if experiment is None:
            continue
        if experiment.deleted:
            faults.append(ownership.experiment_deleted(name, experiment.number, uri))
        elif MADE_TAG not in experiment.tags and not experiment.runs_of_ours:
            owned(f"experiment {name!r}", ownership.experiment_refused(name))
        elif not uri.startswith(SERVER):
            faults += _moved(name, experiment, home)
    name = section.registered_model or config.name
    model = store.model(name)
    if model is None:
        return faults, notes
    if model.is_prompt:
        faults.append(ownership.prompt_refused(name))
    elif DEFAULT_DEVICE not in model.tags:
        owned(f"registered model {name!r}", ownership.model_refused(name))
    else:
        foreign = ownership.foreign_aliases(model.tags, model.aliases, model.versions_of_ours)
        for alias, version in foreign.items():
            owned(
                f"alias {alias!r} of registered model {name!r}, which points to version {version},",
                ownership.alias_refused(name, alias, version),
            )
    return faults, notes


def _moved(name: str, experiment: Experiment, home: Path) -> list[str]:
    """An experiment whose files were in a home that is not there any more: MLflow would begin a second one there."""
    place = urlsplit(experiment.artifacts)
    if place.scheme not in ("", "file"):
        return []
    folder, own = Path(unquote(place.path)), home / "artifacts"
    if folder.exists() or folder == own.absolute() or folder.resolve() == own.resolve():
        return []
    return [
        f"experiment {name!r} keeps its files in {folder}, which is not there: was SECATEUR_HOME moved from "
        f"{folder.parent} to {home}? Move it back, or make {folder.parent} a link to where it is now; or choose "
        "another tracking.experiment"
    ]
