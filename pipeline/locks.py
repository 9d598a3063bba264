"""Locks between processes: files that the kernel unlocks with the process that holds them, so that none is ever stale.

Waiting for one has an end, and says for whom. The folder of those that belong to the machine is the same for all users
(``secateur.device_profiles.agent.lock_folder``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from secateur.device_profiles.agent import lock_folder, open_lock
from secateur.device_profiles.wording import printable
from secateur.pipeline.errors import SurroundingsError

FIRST_LOOK_S, LONGEST_LOOK_S = 0.02, 0.5


def machine_lock(name: str) -> Path:
    """The file of a lock that belongs to this machine."""
    return Path(lock_folder()) / f"secateur-{name}.lock"


@contextlib.contextmanager
def held(path: Path, what: str, wait_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: its file, made where there is none; everybody may lock it.
        what: that the lock guards, in words, for messages.
        wait_s: how long to wait for another process.
        say: told for whom is waited.

    Raises:
        SurroundingsError: another process holds it for so long, or its file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(str(path))
    except OSError as error:
        raise SurroundingsError(f"cannot lock {what}: {printable(path)}: {error.strerror}") from error
    try:
        _take(lock, path, what, wait_s, say)
        yield
    finally:
        os.close(lock)


def _take(lock: int, path: Path, what: str, wait_s: float, say: Callable[[str], None]) -> None:
    give_up, pause_s = time.monotonic() + wait_s, 0.0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pass
        if not pause_s:
            say(f"Waiting for {what}: {holder_of(lock)} has it")
        if time.monotonic() >= give_up:
            raise SurroundingsError(
                f"{what}: waited {wait_s:g} s for {holder_of(lock)}; end that process, or try again later "
                f"(its lock is {printable(path)})"
            )
        pause_s = min(LONGEST_LOOK_S, 2 * pause_s or FIRST_LOOK_S)
        time.sleep(min(pause_s, max(0.0, give_up - time.monotonic())))
    with contextlib.suppress(OSError):  # another user's file can be locked, but not written to
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def holder_of(lock: int) -> str:
    """Who wrote a lock's file last, in words: the process and what it does."""
    pid = os.pread(lock, 64, 0).decode("ascii", "replace").strip()
    if not pid.isdigit():
        return "another process"
    with contextlib.suppress(psutil.Error):
        words = " ".join(psutil.Process(int(pid)).cmdline())
        return f"process {pid} ({printable(words[:120])})"
    return f"process {pid}"  # of another user or container
