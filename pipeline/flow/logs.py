"""Progress as lines of a flow run's log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from secateur.pipeline.progress import LINE_EVERY_S, Report


class LogProgress:
    """A line when a stage begins and ends, and one now and then in between.

    Args:
        log: takes a line; asked for each one, so that it lands in the log of the task that is running.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self.say = log

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        self.say(f"{title} ...")
        last_note, last_line = "", time.monotonic()

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last_note, last_line
            last_note = note or last_note
            if time.monotonic() - last_line > LINE_EVERY_S:
                last_line = time.monotonic()
                self.say(f"{title}: {done} of {total or '?'}, {last_note}")

        yield report
        self.say(f"{title}: done{', ' + last_note if last_note else ''}")
