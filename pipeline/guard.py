"""Ends what a process has started, once that process is gone: run as a file, on the standard library alone.

Every process that a run starts inherits a mark in its environment, whichever library started it and however deep, in
whichever session. The guard holds the reading end of a pipe whose writing end only the run has: the kernel closes it
when the run ends, however it ends. (The kernel's parent-death signal follows the thread that started a child, and does
not reach grandchildren.)
"""

import contextlib
import os
import signal
import sys
import time

MARK = "SECATEUR_PROCESS"
GRACE_S, LOOK_S = 1.0, 0.02
LAST_S = 3.0
"""How long what was killed is waited for; the kernel keeps what hangs in a device for as long as it likes."""


def marked(mark: str) -> list[int]:
    """Process ids of this user that carry a mark, without this process."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for name in os.listdir("/proc"):  # noqa: PTH208  names are all that is needed
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:  # noqa: PTH123
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def end_marked(mark: str, grace_s: float = GRACE_S) -> None:
    """End all processes that carry a mark: asked first, killed after ``grace_s``; those they still start, too."""
    give_up = time.monotonic() + grace_s
    asked: set[int] = set()
    while (left := marked(mark)) and time.monotonic() < give_up + LAST_S:
        late = time.monotonic() >= give_up
        for pid in left:
            if late or pid not in asked:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked.update(left)
        time.sleep(LOOK_S)


def main(mark: str) -> None:
    """Wait for the end of standard input, then end what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 64):
        pass
    end_marked(mark)


if __name__ == "__main__":
    main(sys.argv[1])
