"""A terminal for tests: a program in the foreground of a pseudo-terminal of its own, with real keys."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

CTRL_C = b"\x03"


class Terminal:
    """A program with its process group in the foreground of a terminal.

    Args:
        command: the program and its arguments.
        env: its whole environment.
        cwd: where it is started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self._keys, inside = os.openpty()

        def take() -> None:
            fcntl.ioctl(inside, termios.TIOCSCTTY, 0)
            for number in (signal.SIGINT, signal.SIGTERM):  # a test session in the background ignores the first
                signal.signal(number, signal.SIG_DFL)

        self.process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            preexec_fn=take,
        )
        os.close(inside)
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """Everything that was shown so far."""
        return self._seen.decode("utf-8", "replace").replace("\r\n", "\n")

    def press(self, keys: bytes) -> None:
        """Press keys; Ctrl-C reaches the whole process group, as the kernel does it."""
        os.write(self._keys, keys)

    def wait_for(self, text: str, timeout_s: float = 400) -> None:
        """Wait until a text is shown."""
        give_up = time.monotonic() + timeout_s
        while text not in self.output:
            assert time.monotonic() < give_up, self.output[-500:]
            assert self.process.poll() is None or text in self.output, self.output[-3000:]
            time.sleep(0.02)

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for the end of the program; returns its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def close(self) -> None:
        """End what is left, and the terminal."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._reader.join(5)
        with contextlib.suppress(OSError):
            os.close(self._keys)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._keys, 65536)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EBADF):  # the last program has let go of the terminal
                    return
                raise
            if not data:
                return
            self._seen += data

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
