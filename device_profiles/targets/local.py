"""The local machine: the agent runs in a fresh process of this Python."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from device_profiles.agent import PROTOCOL
from device_profiles.errors import DeviceError
from device_profiles.profile import DeviceProfile
from device_profiles.target import AGENT, Progress, Target


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
    return LocalTarget()


class LocalTarget:
    """This machine: the agent runs in a fresh process of this Python.

    Args:
        busy_wait_s: seconds to wait while another process measures on this machine.
        env: environment variables added to the agent's.
    """

    def __init__(self, busy_wait_s: float = 120.0, env: Mapping[str, str] | None = None) -> None:
        self.busy_wait_s = busy_wait_s
        self.env = {**os.environ, **(env or {})}

    def prepare(self) -> Mapping[str, Any]:
        return self.run({"protocol": PROTOCOL, "op": "probe"}, 60)

    def put(self, path: Path) -> str:
        if not path.is_file():
            raise DeviceError(f"no model file at {path}; export it first", "model-load")
        return str(path.resolve())

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        give_up = time.monotonic() + self.busy_wait_s
        while True:
            try:
                return self._run_once(request, timeout_s)
            except DeviceError as error:
                if error.code != "busy":
                    raise
                if time.monotonic() >= give_up:
                    waited = f"waited {self.busy_wait_s:g} s. End that process or try again later."
                    raise DeviceError(f"{error}; {waited}", "busy") from error
            time.sleep(min(1.0, max(0.05, self.busy_wait_s / 20)))

    def fetch(self, path: str, to: Path) -> None:
        shutil.copyfile(path, to)

    def close(self) -> None:
        pass

    def _run_once(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        line = json.dumps({**request, "parent_pid": os.getpid()}) + "\n"
        with subprocess.Popen(
            [sys.executable, str(AGENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.env,
            start_new_session=True,  # its own process group, so that a time-out ends all of it
        ) as agent:
            try:
                out, err = agent.communicate(line, timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise DeviceError(
                    f"the agent gave no answer within {timeout_s:g} s and was ended; "
                    "lower the tier's min_repeats or raise the time-out",
                    "timeout",
                ) from error
            finally:  # also on KeyboardInterrupt
                if agent.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(agent.pid, signal.SIGKILL)
        return read_answer(out, err, agent.returncode)


def read_answer(out: str, err: str, returncode: int) -> dict[str, Any]:
    """The agent's answer: the last JSON object on its stdout; other lines are noise of the shell or a library.

    Raises:
        DeviceError: the answer is an error, or there is none.
    """
    answer: dict[str, Any] | None = None
    for line in out.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            answer = value if isinstance(value, dict) else answer
    if answer is not None and "error" in answer:
        raise DeviceError(f"the device reports {answer['error']}: {answer.get('detail', '')}", str(answer["error"]))
    if answer is None or returncode != 0:
        cause = f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
        tail = " | ".join(err.strip().splitlines()[-3:]) or "nothing on stderr"
        raise DeviceError(f"the agent died without an answer ({cause}): {tail}", "agent-died")
    return answer
