"""The local machine: the agent runs in a fresh process of this Python, or of an emulator."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.answers import checked
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.profile import DeviceProfile
from secateur.device_profiles.protocol import CANCEL_LINE, Reader, hung, request_line
from secateur.device_profiles.runtime import DEFAULT, Runtime, runtime_named, runtime_of
from secateur.device_profiles.target import AGENT, PYTHON, Progress, Target

GRACE_S = 5.0  # after its time-out, for the agent to say so and to clean up
PREPARE_S = 180.0  # an emulator needs long to import the runtime
THIS_MACHINE = True
ADD_OPTIONS = (PYTHON,)


class Settings(BaseModel):
    """``connect`` of a local target.

    Args:
        python: command that starts the agent's Python; empty = this one. A wrapper makes an emulator a target.
        cpu_share: share of one core's time the measured process may use, through cgroups; None = all of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: tuple[str, ...] = ()
    cpu_share: float | None = Field(default=None, gt=0, le=1)


def open_target(profile: DeviceProfile, settings: Settings) -> Target:
    """This machine."""
    return LocalTarget(python=settings.python, cpu_share=settings.cpu_share, runtime=runtime_of(profile))


class LocalTarget:
    """This machine: the agent runs in a fresh process of this Python.

    Args:
        busy_wait_s: seconds to wait while another process measures on this machine.
        env: environment variables added to the agent's.
        python: command that starts the agent's Python; empty = this one.
        cpu_share: share of one core's time the measured process may use; None = all of it.
        runtime: what networks run with; None = ONNX Runtime.
    """

    def __init__(
        self,
        busy_wait_s: float = 120.0,
        env: Mapping[str, str] | None = None,
        python: Sequence[str] = (),
        cpu_share: float | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.busy_wait_s = busy_wait_s
        self.env = {**os.environ, **(env or {})}
        self.python = tuple(python)
        self.cpu_share = cpu_share
        self.runtime = runtime or runtime_named(DEFAULT)
        self._left: set[str] = set()  # folders that answers named

    def prepare(self) -> Mapping[str, Any]:
        """Sweep what dead sessions left; returns the agent's answer to ``probe``."""
        self.run({"protocol": PROTOCOL, "op": "sweep"}, PREPARE_S)
        return self.run({"protocol": PROTOCOL, "op": "probe"}, PREPARE_S)

    def put(self, path: Path) -> str:
        """The file where it is; nothing is copied.

        Raises:
            DeviceError: there is no such file.
        """
        if not path.is_file():
            raise DeviceError(f"no model file at {path}; export it first", "model-load")
        return str(path.resolve())

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        """See ``Target.run``; waits up to ``busy_wait_s`` while another process measures.

        Raises:
            DeviceError: whatever the agent reports; ``client-timeout`` or ``agent-died`` where it gives no answer;
                ``no-python`` or ``wrong-arch`` where it cannot be started; ``busy`` after ``busy_wait_s``.
        """
        give_up = time.monotonic() + self.busy_wait_s
        while True:
            try:
                return self._run_once(request, timeout_s, Reader(progress))
            except DeviceError as error:
                if error.code != "busy":
                    raise
                if time.monotonic() >= give_up:
                    waited = f"waited {self.busy_wait_s:g} s. End that process or try again later."
                    raise DeviceError(f"{error}; {waited}", "busy") from error
            time.sleep(min(1.0, max(0.05, self.busy_wait_s / 20)))

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file that the agent left; it appears whole or not at all.

        Raises:
            DeviceError: it cannot be read or written.
        """
        part = to.with_name(f".{to.name}.{uuid.uuid4().hex}.part")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part)
            part.replace(to)
        except OSError as error:
            part.unlink(missing_ok=True)
            code = "disk-full" if error.errno == errno.ENOSPC else "transfer"
            raise DeviceError(f"cannot copy {path} to {to}: {error.strerror}", code) from error

    def close(self) -> None:
        """Remove what answers left to be fetched."""
        while self._left:
            shutil.rmtree(self._left.pop(), ignore_errors=True)

    def _run_once(self, request: Mapping[str, Any], timeout_s: float, reader: Reader) -> dict[str, Any]:
        share = self.cpu_share if request.get("op") == "benchmark" else None
        extra: dict[str, Any] = {"parent_pid": os.getpid(), "python": list(self.python) or None}
        extra |= self.runtime.fields(str(self.runtime.file.absolute()))
        line = request_line({"timeout_s": timeout_s, "cpu_share": share, **request}, **extra)
        agent = self._start()
        try:
            _talk(agent, line, reader, timeout_s + GRACE_S)
        except BaseException:  # also KeyboardInterrupt, also what ``progress`` raises
            _cancel(agent)
            raise
        finally:
            _end(agent)
        answer: dict[str, Any] = checked(str(request.get("op")), reader.answer(agent.returncode))
        if "work" in answer and "work" not in request:
            self._left.add(str(answer["work"]))
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        command = [*(self.python or (sys.executable,)), str(AGENT)]
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.env,
                start_new_session=True,  # its own process group, so that a time-out ends all of it
            )
        except OSError as error:
            code = "wrong-arch" if error.errno == errno.ENOEXEC else "no-python"
            detail = f"cannot start {command[0]}: {error.strerror}; set connect.python of the device profile"
            raise DeviceError(detail, code) from error


def _talk(agent: subprocess.Popen[bytes], line: str, reader: Reader, timeout_s: float) -> None:
    """Send the request and read until the agent has closed its output; stdin stays open, or it would stop."""
    assert agent.stdin and agent.stdout and agent.stderr
    with contextlib.suppress(OSError):  # an agent that died at once; its exit tells
        agent.stdin.write(line.encode("ascii"))
        agent.stdin.flush()
    end = time.monotonic() + timeout_s
    sources = {agent.stdout.fileno(): reader.feed, agent.stderr.fileno(): reader.feed_stderr}
    while sources:
        ready, _, _ = select.select(list(sources), [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise hung(timeout_s)
        for source in ready:
            data = os.read(source, 65536)
            if data:
                sources[source](data)
            else:
                del sources[source]
    with contextlib.suppress(subprocess.TimeoutExpired):
        agent.wait(GRACE_S)


def _cancel(agent: subprocess.Popen[bytes]) -> None:
    """Ask the agent to clean up and end, for at most 2 seconds."""
    assert agent.stdin
    with contextlib.suppress(OSError):
        os.set_blocking(agent.stdin.fileno(), False)
        agent.stdin.write(CANCEL_LINE.encode("ascii"))
        agent.stdin.flush()
    with contextlib.suppress(subprocess.TimeoutExpired):
        agent.wait(2.0)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """Kill the agent's process group (the worker dies with the agent) and close the pipes."""
    with contextlib.suppress(OSError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    for pipe in (agent.stdin, agent.stdout, agent.stderr):
        with contextlib.suppress(OSError):
            if pipe:
                pipe.close()
