"""Where a run was begun: its id, its working directory, home and data, where it is tracked, and the way back there.

A second, empty store beside the run's own would lose nothing (the journal is the record), but split what people look at
in two. So a run goes on where it was begun, or says where that was and what was found instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.device_profiles.wording import command, printable
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import UserError
from secateur.pipeline.git import revision_of
from secateur.pipeline.surroundings import DATA, HOME, TRACKING_URI, home, variable
from secateur.pipeline.tracking.place import SQLITE, redacted, sqlite_file, store_uri

ORIGIN = "origin.json"
TRACKING, FOLDER, CODE = "tracking", "folder", "code"
COMMIT, BRANCH = "commit", "branch"
"""Of the run file's folder, where that is in a Git repository."""


def origin_of(run_id: str, config: RunFile) -> dict[str, Any]:
    """Whose run it is, what its relative paths are relative to, of which commit and code it is, where it is tracked."""
    folders = {"cwd": str(Path.cwd()), HOME: str(home()), DATA: variable(DATA)}
    lay = None if config.folder is None else str(config.folder)
    revision = None if config.folder is None else revision_of(config.folder)
    at = {} if revision is None else {COMMIT: revision.commit, BRANCH: revision.branch}
    return {"run_id": run_id, **folders, FOLDER: lay, **at, TRACKING: tracked_at(config), CODE: made_by()}


def made_by() -> dict[str, str | None]:
    """Which code a run is begun with: the version, and of a checkout its commit and the lock's sha256; for people."""
    root = Path(__file__).resolve().parents[2]
    lock, revision = root / "requirements.lock", revision_of(root)
    digest = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None
    commit = revision.commit if lock.is_file() and revision is not None else None
    return {"secateur": __version__, "git": commit, "lock": digest}


def read_origin(directory: Path) -> Mapping[str, Any]:
    """What a run directory says of its origin; empty where it says nothing that can be read."""
    try:
        found = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def return_to_origin(directory: Path) -> None:
    """Go back to the working directory, home and data folder a run was started with.

    Raises:
        UserError: its home is not there any more, and no variable says where it is.
    """
    origin = read_origin(directory)
    for name in (HOME, DATA):
        place = origin.get(name)
        if not isinstance(place, str) or variable(name) is not None:
            continue
        if Path(place).is_dir():
            os.environ[name] = place
        elif name == HOME:
            raise UserError(_home_is_gone(directory, Path(place), origin))
    cwd = origin.get("cwd")
    if isinstance(cwd, str) and Path(cwd).is_dir():
        os.chdir(cwd)


def tracked_at(config: RunFile) -> str:
    """Where a run is tracked from here, without a password and whatever the current folder is."""
    uri = store_uri(config.tracking, home())
    file = sqlite_file(uri)
    return redacted(uri) if file is None else f"{SQLITE}{file.absolute()}"


def check_tracked_at(directory: Path, config: RunFile) -> None:
    """See that a run is still tracked where it was begun; another ``tracking.uri`` in its run.yaml is a decision.

    Raises:
        UserError: it would be tracked elsewhere, because a variable or a folder is another one.
    """
    begun, now = read_origin(directory).get(TRACKING), tracked_at(config)
    if not isinstance(begun, str) or _same(begun, now):
        return
    own, given = config.tracking.uri, sqlite_file(config.tracking.uri or "")
    if own is not None and (given is None or given.is_absolute()):
        return
    if own is not None:
        why = f"tracking.uri is {own}, and the current folder is another one"
    elif variable(TRACKING_URI):
        why = f"{TRACKING_URI} is set"
    else:
        why = f"{TRACKING_URI} is not set and {HOME} is {home()}"
    raise UserError(
        f"this run is tracked in {printable(begun)}, but now it would go on in {printable(now)}, because {why}. "
        f"{_way_back(begun, now)}. To go on elsewhere on purpose, write tracking.uri into {directory / 'run.yaml'}"
    )


def _same(one: str, other: str) -> bool:
    files = sqlite_file(one), sqlite_file(other)
    if files[0] is not None and files[1] is not None:
        return files[0].resolve() == files[1].resolve()
    return one.rstrip("/") == other.rstrip("/")


def _way_back(begun: str, now: str) -> str:
    """How a run is tracked again where it was begun."""
    file, found = sqlite_file(begun), sqlite_file(now)
    if file is None:
        return f"Set {TRACKING_URI} to the former"
    if file.exists():
        return f"Set {HOME}={file.parent}" if file.name == "mlflow.db" else f"Set {TRACKING_URI} to the former"
    if found is not None and found.exists():
        return _link(found.parent, file.parent)
    return f"The former is not there: bring {file.parent} back, or set {HOME} to where it is now"


def _link(now: Path, before: Path) -> str:
    """A home that was moved: MLflow knows its files by their whole paths, so the old ones must lead there."""
    return (
        f"If {before} was moved to {now}, let the old place lead to the new one: `{command('ln', '-s', now, before)}`"
    )


def _home_is_gone(directory: Path, before: Path, origin: Mapping[str, Any]) -> str:
    said = (
        f"this run was begun with {HOME} {before}, which is not there; {HOME} is not set, and {home()} would be a new, "
        "empty one"
    )
    now = directory.absolute().parent.parent
    if directory.absolute().parent.name != "runs" or not now.is_dir():
        return f"{said}. Bring it back, or set {HOME} to where it is now"
    file = sqlite_file(str(origin.get(TRACKING) or ""))
    if origin.get(TRACKING) is None or (file is not None and file.is_relative_to(before)):
        return f"{said}. {_link(now, before)}"
    return f"{said}. Set {HOME}={now}, where the run directory is"
