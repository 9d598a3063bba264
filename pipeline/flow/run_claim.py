"""Which run directory a scheduled flow works in: its own, one that an earlier flow left unfinished, or a new one.

A directory that a schedule made holds ``schedule.json``: whose it is, and every flow run that ever worked on it. The
lock on its journal tells whether somebody still does; the kernel frees it with the process. Directories lie on the
machine of the worker, so workers claim each other's runs only where they share ``SECATEUR_HOME``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.errors import JournalError, OlderRunError, SurroundingsError, UserError
from secateur.pipeline.files import write_whole
from secateur.pipeline.run.run import create_run_directory
from secateur.pipeline.surroundings import home

Opened = TypeVar("Opened")
BINDING = "schedule.json"
MAX_IDLE_STARTS = 3
"""After so many starts in a row without a new journal record, an unfinished run is left to a person."""


@dataclass(frozen=True)
class Binding:
    """Whose a run directory is.

    Args:
        deployment: Prefect's id of the deployment.
        config: digest of the configuration.
        flow_runs: Prefect's ids of the flow runs that worked on it, the latest last.
        ended: how it ended; empty = it is to be continued.
        journal_bytes: length of the journal when the latest flow run took it.
        idle_starts: how many flow runs in a row found it with no more than that.
    """

    deployment: str
    config: str
    flow_runs: tuple[str, ...] = ()
    ended: str = ""
    journal_bytes: int = 0
    idle_starts: int = 0


@dataclass(frozen=True)
class Taken(Generic[Opened]):
    """A run directory that this process works in.

    Args:
        run: what ``opened`` made of it; it holds the journal's lock.
        earlier: the flow run that worked on it last and is dead, None for a new directory.
    """

    directory: Path
    run: Opened
    earlier: str | None = None


def take(
    config: RunFile, deployment: str, flow_run: str, opened: Callable[[Path], Opened], say: Callable[[str], None]
) -> Taken[Opened]:
    """The directory of this flow run, else an unfinished one of its deployment and configuration, else a new one.

    Args:
        opened: opens a run directory and locks its journal, or raises ``JournalError`` where another process has it.
        say: told why a directory is not taken.

    Raises:
        SurroundingsError: another process works on this very flow run.
        UserError: as ``opened`` does; a new directory is removed again.
    """
    with _one_at_a_time():
        mine, unfinished = _candidates(deployment, config.digest, flow_run)
        for directory, binding in mine:
            try:
                return _continued(directory, binding, flow_run, opened)
            except JournalError as error:
                raise SurroundingsError(f"this flow run is already at work elsewhere: {error}") from error
        for directory, binding in unfinished:
            try:
                return _continued(directory, binding, flow_run, opened)
            except (JournalError, OlderRunError) as error:
                say(f"Not continued: {error}")
        directory = create_run_directory(config)
        _write(directory, Binding(deployment, config.digest, (flow_run,)))
        try:
            return Taken(directory, opened(directory))
        except UserError:
            if not (directory / "journal.jsonl").exists():  # refused before it began
                shutil.rmtree(directory)
            raise


def end(directory: Path, how: str) -> None:
    """Note that a run directory is done with, whether well or not: no later flow run continues it."""
    binding = read_binding(directory)
    if binding is not None:
        _write(directory, replace(binding, ended=how))


def read_binding(directory: Path) -> Binding | None:
    """Whose a run directory is; None where it belongs to no schedule."""
    try:
        data = json.loads((directory / BINDING).read_text(encoding="utf-8"))
        return Binding(**{**data, "flow_runs": tuple(data["flow_runs"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


Bound = list[tuple[Path, Binding]]


def _candidates(deployment: str, config: str, flow_run: str) -> tuple[Bound, Bound]:
    """Directories of this flow run, and unfinished ones of the deployment and configuration; the oldest first."""
    folders = sorted((home() / "runs").glob(f"*/{BINDING}"), key=lambda file: file.parent.stat().st_mtime)
    bound = [(f.parent, b) for f in folders if (b := read_binding(f.parent)) is not None]
    mine = [(d, b) for d, b in bound if flow_run in b.flow_runs]
    wanted = [
        (d, b)
        for d, b in bound
        if (b.deployment, b.config, b.ended) == (deployment, config, "") and b.idle_starts < MAX_IDLE_STARTS
    ]
    return mine, wanted


def _continued(directory: Path, binding: Binding, flow_run: str, opened: Callable[[Path], Opened]) -> Taken[Opened]:
    run = opened(directory)
    earlier = binding.flow_runs[-1] if binding.flow_runs else None
    size = _size(directory / "journal.jsonl")
    idle = binding.idle_starts + 1 if size <= binding.journal_bytes else 0
    others = tuple(known for known in binding.flow_runs if known != flow_run)
    _write(directory, replace(binding, flow_runs=(*others, flow_run), journal_bytes=size, idle_starts=idle))
    return Taken(directory, run, earlier if earlier != flow_run else None)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write(directory: Path, binding: Binding) -> None:
    write_whole(directory / BINDING, json.dumps(asdict(binding)) + "\n")


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Only one process of this home chooses a directory at a time; a killed one lets go."""
    folder = home() / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".choosing", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SurroundingsError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
