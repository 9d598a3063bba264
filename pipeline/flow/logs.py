"""Progress as lines of a flow run's log, and as an artifact that shows how far long work is."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from secateur.pipeline.progress import LINE_EVERY_S, ProgressView, Report, Several

ARTIFACT_AFTER_S, ARTIFACT_EVERY_S = 5.0, 5.0
"""What takes longer than this has a progress artifact; and how often that is brought up to date."""
SEND_S = 5.0
"""How long the end of a run waits for lines that Prefect has not got yet."""


def say(line: str) -> None:
    """A line in the log of the task or flow run that is going on."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        get_run_logger().info(line)
    except MissingContextError:  # a thread of our own, or no run has begun
        logging.getLogger("prefect.secateur").info(line)


def say_in_run(line: str) -> None:
    """The same, but nothing where no run is going on."""
    if "prefect" not in sys.modules:  # it takes seconds to import, for which the first line need not wait
        return
    from prefect.context import FlowRunContext, TaskRunContext

    if FlowRunContext.get() or TaskRunContext.get():
        say(line)


def logged(view: ProgressView) -> ProgressView:
    """A view whose lines also go to the log of the flow run, once there is one."""
    return Several(view, LogProgress(say_in_run))


@contextmanager
def only_for_prefect() -> Iterator[None]:
    """Lines of flow and task runs go to the server and not to the terminal; those that wait are sent at the end."""
    from prefect.logging.handlers import APILogWorker

    raising, logging.raiseExceptions = logging.raiseExceptions, False  # a server that is away is told of elsewhere
    with contextlib.ExitStack() as kept:
        kept.callback(setattr, logging, "raiseExceptions", raising)
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            kept.enter_context(_heard_by_its_handlers(logging.getLogger(name)))
        try:
            yield
        except Exception:  # a Ctrl-C waits for nothing
            APILogWorker.drain_all(timeout=SEND_S)
            raise
        APILogWorker.drain_all(timeout=SEND_S)


@contextmanager
def _heard_by_its_handlers(logger: logging.Logger) -> Iterator[None]:
    """A logger's lines reach its own handlers alone, and do so where the program has switched all logging off."""
    before = logger.propagate
    vars(logger)["isEnabledFor"] = lambda level: level >= logger.getEffectiveLevel()
    logger.propagate = False
    try:
        yield
    finally:
        del vars(logger)["isEnabledFor"]
        logger.propagate = before


class LogProgress:
    """A line when a stage begins and ends, one now and then in between, and a progress artifact where it takes long.

    Args:
        log: takes a line; asked for each one, so that it lands in the log of the task that is running.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self.say = log

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        title = title.strip()
        self.say(f"{title} ...")
        artifact, last_note, last_line = ProgressArtifact(title), "", time.monotonic()

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last_note, last_line
            last_note = note or last_note
            artifact.report(done, total, last_note)
            if time.monotonic() - last_line > LINE_EVERY_S:
                last_line = time.monotonic()
                self.say(f"{title}: {done} of {total or '?'}, {last_note}")

        yield report
        artifact.end(last_note)
        self.say(f"{title}: done{', ' + last_note if last_note else ''}")


class ProgressArtifact:
    """How far a stage is, in Prefect's interface: a decoration, which never fails and never makes the work wait.

    Where nobody knows the total, the bar stays at 0 until the end, and the text says what was done.

    Args:
        title: of the stage.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._key = f"secateur-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}"[:200]
        self._id: Any = None
        self._next = time.monotonic() + ARTIFACT_AFTER_S
        self._lock = threading.Lock()

    def report(self, done: int, total: int, note: str) -> None:
        """Show this, if it is time to."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + ARTIFACT_EVERY_S
        percent = 100 * min(1.0, done / total) if total else 0.0
        self._show(percent, f"{self.title}: {done} of {total or '?'}, {note}")

    def end(self, note: str) -> None:
        """Show that the stage is done, if it was shown at all."""
        if self._id is not None:
            self._show(100.0, f"{self.title}: done{', ' + note if note else ''}")

    def _show(self, percent: float, text: str) -> None:
        from prefect.artifacts import create_progress_artifact
        from prefect.context import TaskRunContext

        if self._id is None:
            if TaskRunContext.get() is None:  # a thread of our own, or no run has begun
                return
            try:
                self._id = create_progress_artifact(percent, self._key, text)
            except Exception:  # noqa: BLE001  whatever a server answers
                self._next = float("inf")
            return
        threading.Thread(target=self._update, args=(percent, text), name="progress artifact", daemon=True).start()

    def _update(self, percent: float, text: str) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        if not self._lock.acquire(blocking=False):
            return  # the server has not answered the last one yet
        try:
            with contextlib.suppress(Exception), get_client(sync_client=True) as client:
                client.update_artifact(self._id, ArtifactUpdate(data=percent, description=text))
        finally:
            self._lock.release()
