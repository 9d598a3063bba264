"""Ctrl-C and SIGTERM: one request to stop, an end within seconds, and nothing printed but how to go on.

The first signal raises ``KeyboardInterrupt`` (``Terminated`` for SIGTERM) in the main thread, so that work under way is
ended in order; later ones change nothing. A thread that the kernel wakes sees the signal too, whatever the main thread
is busy with and whichever handler a library has put in place, and ends the process when order takes too long.

Imports next to nothing: it is in place before anything else is imported.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from secateur.pipeline.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated

GRACE_S, LOOK_S = 6.0, 1.0
"""How long work under way has to end in order; and after how long the thread looks whether another one was told."""
SIGNALS = {signal.SIGINT: ("Interrupted", EXIT_INTERRUPTED), signal.SIGTERM: ("Terminated", EXIT_TERMINATED)}
SHOW_CURSOR = b"\r\x1b[K\x1b[?25h"


class Interrupts:
    """The signals of this process.

    Args:
        quiet: whether nothing but the last word is printed once a signal has come.
    """

    def __init__(self, quiet: bool = True) -> None:
        self.quiet = quiet
        self.number: int | None = None
        """The first signal that came."""
        self.go_on = ""
        """The command that continues what was interrupted; empty = nothing was begun that could be."""
        self.last: Callable[[], None] = lambda: None
        """Called before the process ends: ends what it has started."""
        self._raised = False
        self._reader: int | None = None
        self._looking, self._leaving = threading.Lock(), threading.Lock()
        self._terminal = os.dup(2) if _is_open(2) else None

    def install(self) -> Interrupts:
        """Receive the signals from now on; one that is ignored (``nohup``, a job in the background) stays so."""
        self._reader, writer = os.pipe()
        for end in (self._reader, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        threading.Thread(target=self._watch, args=(self._reader,), name="interrupts", daemon=True).start()
        return self

    @property
    def stopping(self) -> bool:
        """Whether a signal has come, and be it that a library's handler was faster than anything here."""
        self._look()
        return self.number is not None

    def leave(self) -> NoReturn:
        """Say how to go on, and end this process with the signal's exit code."""
        with self._leaving:  # once; the other thread that comes here waits for the end
            word, code = SIGNALS[signal.Signals(self.number or signal.SIGINT)]
            with contextlib.suppress(Exception):
                self.last()
            text = f"{word}; nothing is lost. Continue with: {self.go_on}" if self.go_on else f"{word}."
            if self._terminal is not None:
                with contextlib.suppress(OSError):
                    clear = SHOW_CURSOR if os.isatty(self._terminal) else b""
                    os.write(self._terminal, clear + text.encode(errors="backslashreplace") + b"\n")
            os._exit(code)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._note(number)
        if not self._raised:
            self._raised = True
            raise Terminated if self.number == signal.SIGTERM else KeyboardInterrupt

    def _note(self, number: int) -> None:
        if self.number is None:
            self.number = number
            if self.quiet:
                self._silence()

    def _silence(self) -> None:
        """Whatever libraries print while they are ended goes nowhere."""
        threading.excepthook = lambda _: None
        sys.unraisablehook = lambda _: None
        with contextlib.suppress(OSError, ValueError):
            if sys.__stdout__ is not None:
                sys.__stdout__.flush()
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)

    def _look(self) -> None:
        """Note what the kernel has told by now."""
        if self._reader is None:
            return
        with self._looking, contextlib.suppress(BlockingIOError):
            for number in os.read(self._reader, 64):
                if number in SIGNALS:
                    self._note(number)

    def _watch(self, reader: int) -> None:
        """Wait for the first signal, and see that the process ends."""
        while self.number is None:
            select.select([reader], [], [], LOOK_S)
            self._look()
        threading.Event().wait(GRACE_S)
        self.leave()


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


current = Interrupts()
"""Those of this process; received once the program has installed them."""
