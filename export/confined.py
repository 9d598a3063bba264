"""A program of others, run in a folder: no more memory and time than it is given, no network, no writes outside.

Limits of memory and time always hold. The network is taken away by a namespace of its own, and writes outside of the
folder by Landlock, both where the kernel offers them to this user.

This file is also the child that confines itself before it becomes that program; it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

KEPT_OUTPUT = 20_000
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
"""Numbers of system calls, the same on every architecture (asm-generic/unistd.h)."""
PR_SET_NO_NEW_PRIVS, BENEATH, O_PATH = 38, 1, 0o10000000
WRITES = 0b1_1111_1111_0010
"""What Landlock's first version (linux/landlock.h) knows of that writes: files, folders, links, sockets, removals."""


class ConfinedError(RuntimeError):
    """The program failed, or reached one of its limits."""


def run_confined(command: Sequence[str], folder: Path, *, seconds: float, memory_bytes: int) -> str:
    """Run a program in a folder; returns the end of what it printed, without control codes.

    Args:
        folder: its working directory, home, and the only place it may write to.
        seconds: of wall time.
        memory_bytes: of address space, and of each file it writes.

    Raises:
        ConfinedError: it cannot be started, ends with another code than 0 or by a signal, or takes too long.
    """
    own = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    child = [sys.executable, "-I", __file__, str(folder), str(memory_bytes), str(int(seconds) + 1), *command]
    with (folder / ".output").open("w+b") as output:
        process = subprocess.Popen(
            child, cwd=folder, env=own, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise ConfinedError(f"it was not done after {seconds:g} s") from error
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - KEPT_OUTPUT))
        said = printable(output.read().decode("utf-8", "replace"))
    if code:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it printed nothing")
        raise ConfinedError(f"{_ending(code)}: {last.strip()[:300]}")
    return said


def printable(text: str) -> str:
    """Text without escape sequences and control characters; lines stay."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.", "", text)
    return "".join(c for c in text if c == "\n" or c.isprintable())


def _ending(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with code {code}"


def main(folder: str, memory_bytes: str, seconds: str, *command: str) -> None:
    """Confine this process, and become the program."""
    for limit, value in (
        (resource.RLIMIT_AS, int(memory_bytes)),
        (resource.RLIMIT_FSIZE, int(memory_bytes)),
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(limit)
        resource.setrlimit(limit, (value if most == resource.RLIM_INFINITY else min(value, most), most))
    libc = ctypes.CDLL(None, use_errno=True)
    leave_network(libc)
    write_only_beneath(libc, folder)
    try:
        os.execv(command[0], command)  # noqa: S606 - our own caller gave it
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")


def leave_network(libc: ctypes.CDLL) -> bool:
    """Enter a namespace without network devices (unshare(2)); whether that was allowed."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        return bool(libc.unshare(CLONE_NEWNET) == 0)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text, encoding="ascii")
    return True


def write_only_beneath(libc: ctypes.CDLL, folder: str) -> bool:
    """Let no file be written or removed outside of a folder, by Landlock; whether the kernel has it."""
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", WRITES), ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    for place in (folder, "/dev/null"):
        opened = os.open(place, O_PATH)
        allowed = WRITES if place == folder else 0b10
        libc.syscall(LANDLOCK_ADD, rules, BENEATH, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    done = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return bool(done)


if __name__ == "__main__":
    main(*sys.argv[1:])
