"""Processes that a run starts end with it: by itself, by its guard, or by whatever starts next in the same home.

Before the first one there is a record in ``processes`` of SECATEUR_HOME. Its name is the mark that everything started
from then on inherits in its environment (``secateur.pipeline.guard``), and the run's lock on it, which the kernel
frees, says whether the run lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from secateur.pipeline.guard import GRACE_S, MARK, end_marked

FOLDER = "processes"
CLOSE_S = 5.0
PARENT_EVERY_S = 1.0


@contextlib.contextmanager
def kept(home: Path, kind: str) -> Iterator[None]:
    """Whatever this process starts meanwhile ends with it, or at the end of this block; leftovers of others end now.

    Blocks within each other are one.

    Args:
        home: SECATEUR_HOME, where the record is kept.
        kind: of this process, for whoever reads the record.

    Raises:
        OSError: the record cannot be written.
    """
    if os.environ.get(MARK) in _ours:
        yield
        return
    sweep(home)
    mark = uuid.uuid4().hex
    before = os.environ.get(MARK)
    with _record(home / FOLDER, mark, kind):
        _ours.add(mark)
        os.environ[MARK] = mark
        try:
            with _guarded(mark):
                yield
        finally:
            _ours.discard(mark)
            if before is None:
                del os.environ[MARK]
            else:
                os.environ[MARK] = before


def start(command: Sequence[str], env: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that no signal of the terminal reaches it.

    Args:
        env: its whole environment; the mark is added.
        output: takes what it prints.
    """
    mark = {MARK: os.environ[MARK]} if MARK in os.environ else {}
    return subprocess.Popen(
        command,
        env={**env, **mark},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def keep_from_children() -> None:
    """Let no process that this thread starts hear Ctrl-C: it inherits that the signal is blocked.

    For libraries that start processes themselves. Ctrl-C reaches the main thread of this one in any case.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def leave_terminal() -> None:
    """In a process that a library has started for a run: go into a session of its own, for good.

    A worker that somebody else has started (of a cluster) stays where it is.
    """
    if MARK in os.environ and os.getsid(0) != os.getpid():
        with contextlib.suppress(OSError):  # the leader of a group cannot
            os.setsid()


def end_with(parent: int) -> None:
    """End this process soon after its parent, and hear no signal of its terminal."""
    leave_terminal()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_all(grace_s: float = GRACE_S) -> None:
    """End everything that this process has started in a ``kept`` block."""
    for mark in list(_ours):
        end_marked(mark, grace_s)


def sweep(home: Path) -> list[str]:
    """End what runs of a home have started and died without ending; returns their marks."""
    swept: list[str] = []
    try:
        records = sorted((home / FOLDER).glob("*.json"))
    except OSError:
        return swept
    for file in records:
        with contextlib.suppress(OSError):
            lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the run lives
                end_marked(file.stem)
                file.unlink(missing_ok=True)
                swept.append(file.stem)
            finally:
                os.close(lock)
    return swept


_ours: set[str] = set()


@contextlib.contextmanager
def _record(folder: Path, mark: str, kind: str) -> Iterator[None]:
    """A locked record, there before anything is started."""
    folder.mkdir(parents=True, exist_ok=True)
    file, made = folder / f"{mark}.json", folder / f".{mark}"
    lock = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, (json.dumps({"pid": os.getpid(), "kind": kind}) + "\n").encode())
        made.rename(file)  # it is never seen unlocked
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(lock)


@contextlib.contextmanager
def _guarded(mark: str) -> Iterator[None]:
    """A guard beside this process; what carries the mark ends with the block."""
    program = Path(__file__).with_name("guard.py")
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", str(program), mark],
        env={name: value for name, value in os.environ.items() if name != MARK},  # a guard is not guarded
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield
    finally:
        end_marked(mark)
        assert guard.stdin is not None
        guard.stdin.close()
        try:
            guard.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
