"""Progress of long work: bars on a terminal, one line a stage elsewhere, nothing in tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.pipeline.terminal import Terminal, one_line


class Report(Protocol):
    """How far the work of a stage is; a ``total`` of 0 says that nobody knows."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


def silent(done: int, total: int, note: str = "") -> None:
    """Reports nothing."""


Say = Callable[[str], None]
"""Told one line."""


def unsaid(line: str) -> None:
    """Says nothing."""


LINE_EVERY_S = 30.0
"""Where there is no terminal, long work says this often how far it is."""


class ProgressView(Protocol):
    """Where progress is shown."""

    def stage(self, title: str) -> AbstractContextManager[Report]: ...

    def say(self, line: str) -> None:
        """One line that belongs to no stage."""


class Silent:
    """Shows nothing."""

    def stage(self, title: str) -> AbstractContextManager[Report]:
        return nullcontext(silent)

    def say(self, line: str) -> None:
        """Says nothing."""


class Several:
    """Shows everything in several places.

    Args:
        views: the places.
    """

    def __init__(self, *views: ProgressView) -> None:
        self.views = views

    def say(self, line: str) -> None:
        for view in self.views:
            view.say(line)

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        with ExitStack() as stages:
            reports = [stages.enter_context(view.stage(title)) for view in self.views]

            def report(done: int, total: int, note: str = "") -> None:
                for each in reports:
                    each(done, total, note)

            yield report


class RichProgress:
    """Bars on a terminal; where there is none, a line when a stage begins and ends."""

    def __init__(self, console: Terminal) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def say(self, line: str) -> None:
        self.console.print(line)

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        if not self.console.is_terminal:
            self.console.print(f"{title} ...")
        task = self._bars.add_task(one_line(title), total=None, note="")
        if len(self._bars.task_ids) == 1:
            self._bars.start()
        last_note, last_line = "", time.monotonic()
        began = last_line

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last_note, last_line
            last_note = one_line(note) or last_note
            if not self.console.is_terminal and time.monotonic() - last_line > LINE_EVERY_S:
                last_line = time.monotonic()
                left = f", {_left(last_line - began, done, total)} left" if 0 < done < total else ""
                self.console.print(f"  {done} of {total or '?'}{left}, {last_note}")
            self._bars.update(task, completed=done, total=total or None, note=last_note)

        try:
            yield report
        finally:
            if not self.console.is_terminal and last_note:
                self.console.print(f"  {last_note}")
            done = self._bars.tasks[self._bars.task_ids.index(task)].completed or 1
            self._bars.update(task, completed=done, total=done)
            self._bars.refresh()
            if self.console.is_terminal:
                self._bars.stop_task(task)
            if all(t.stop_time is not None for t in self._bars.tasks):
                self._bars.stop()
                for task_id in self._bars.task_ids:
                    self._bars.remove_task(task_id)


def _left(spent_s: float, done: int, total: int) -> str:
    """How long the rest takes at this pace, in words."""
    left_s = spent_s * (total - done) / done
    return f"{left_s / 3600:.1f} h" if left_s > 5400 else f"{left_s / 60:.0f} min" if left_s > 90 else f"{left_s:.0f} s"
