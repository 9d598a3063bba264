"""The client's side of the agent's protocol (see ``agent.py``), the same for every target.

A target starts the agent, writes ``request_line``, keeps the agent's stdin open (its end tells the agent that the
client is gone), feeds a ``Reader`` with whatever comes, and asks it for the answer when the agent has ended.
"""

from __future__ import annotations

import codecs
import json
import signal as signals
from collections.abc import Mapping
from typing import Any

from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.target import Progress

CANCEL_LINE = json.dumps({"cancel": True}) + "\n"
MAX_REPLY_BYTES = 64 * 1024 * 1024  # of stdout and stderr together, in one call of the agent
STDERR_CHARS = 20_000  # what is kept of the agent's stderr: its end


def request_line(request: Mapping[str, Any], **extra: Any) -> str:
    """A request as the one line the agent reads first; ``extra`` fields win, those that are None are left out."""
    fields = {"protocol": PROTOCOL, **request, **extra}
    return json.dumps({key: value for key, value in fields.items() if value is not None}) + "\n"


class Reader:
    """Collects what an agent writes, in whatever chunks it comes; lines that are no JSON objects are noise.

    No device is trusted to stop: after ``MAX_REPLY_BYTES`` it is cut off, and the time that reading takes is linear.

    Args:
        progress: called with each event, in order; what it raises leaves ``feed``.

    Raises:
        DeviceError: from any method that takes or reads text: it is too much, or a line is nested too deeply (code
            ``reply-too-long``).

    Attributes:
        pid: the agent's process on the device, once it said so.
        worker_pid: the process that does the measured work; it leads a process group of its own.
        reply: the last answer or error the agent wrote.
        stderr: the end of what the agent wrote there.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.pid: int | None = None
        self.worker_pid: int | None = None
        self.reply: dict[str, Any] | None = None
        self.stderr = ""
        self._progress = progress
        self._rest: list[str] = []  # pieces of the line that has not ended
        self._taken = 0
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(2)]

    def feed(self, data: bytes | str) -> None:
        """Take a piece of the agent's stdout."""
        self._count(data)
        text = data if isinstance(data, str) else self._decoders[0].decode(data)
        *lines, rest = text.split("\n")
        for line in lines:
            self._rest.append(line)
            self._end_line()
        self._rest.append(rest)

    def feed_stderr(self, data: bytes | str) -> None:
        """Take a piece of the agent's stderr."""
        self._count(data)
        text = data if isinstance(data, str) else self._decoders[1].decode(data)
        self.stderr = (self.stderr + text)[-STDERR_CHARS:]

    def answer(self, returncode: int | None, signal: str | None = None) -> dict[str, Any]:
        """The agent's answer, after it has ended.

        Args:
            returncode: exit code; negative = died of that signal; None = unknown.
            signal: name of the signal it died of, where the transport tells (``KILL``, ``SIGKILL``).

        Raises:
            DeviceError: the answer is an error, or there is none; see ``error_of``.
        """
        self._end_line()
        if self.reply is None or "error" in self.reply or returncode != 0 or signal:
            raise error_of(self.reply, self.stderr, returncode, signal)
        return self.reply

    @property
    def pids(self) -> list[int]:
        """The worker (it leads a group of its own) and the agent, as far as the agent named them."""
        return [pid for pid in (self.worker_pid, self.pid) if type(pid) is int and pid > 1]

    def _count(self, data: bytes | str) -> None:
        self._taken += len(data)
        if self._taken > MAX_REPLY_BYTES:
            size = f"{MAX_REPLY_BYTES // 1024**2} MiB"
            text = f"the device sent more than {size} and was cut off; does something else print there?"
            raise DeviceError(text, "reply-too-long")

    def _end_line(self) -> None:
        line, self._rest = "".join(self._rest), []
        self._line(line)

    def _line(self, line: str) -> None:
        try:
            value = json.loads(line)
        except ValueError:
            return
        except RecursionError:
            text = "the device sent JSON nested too deeply to be an answer; does something else print there?"
            raise DeviceError(text, "reply-too-long") from None
        if not isinstance(value, dict):
            return
        if "event" not in value:
            if "protocol" in value or isinstance(value.get("error"), str):
                self.reply = value
            return
        if value["event"] == "started":
            self.pid, self.worker_pid = value.get("pid"), value.get("worker_pid")
        if self._progress:
            self._progress(value)


def read_answer(out: str, err: str, returncode: int | None, signal: str | None = None) -> dict[str, Any]:
    """The agent's answer from all it wrote.

    Raises:
        DeviceError: the answer is an error, or there is none; see ``error_of``.
    """
    reader = Reader()
    reader.feed(out)
    reader.feed_stderr(err)
    return reader.answer(returncode, signal)


def error_of(
    reply: Mapping[str, Any] | None, stderr: str, returncode: int | None, signal: str | None = None
) -> DeviceError:
    """The agent's error, or what its end says if it left none, with the fix in the text.

    The code is the agent's (``agent.EXIT_CODES``); without an answer it is ``no-python`` (exit code 127),
    ``wrong-arch`` (126) or ``agent-died``.
    """
    if reply is not None and "error" in reply:
        return DeviceError(f"the device reports {reply['error']}: {reply.get('detail', '')}", str(reply["error"]))
    tail = " | ".join(stderr.strip().splitlines()[-3:]) or "nothing on stderr"
    if returncode == 127 and not signal:
        fix = "no such program on the device; set connect.python of the device profile to its Python"
        return DeviceError(f"{fix} (exit code 127): {tail}", "no-python")
    if returncode == 126 and not signal:
        fix = "the device cannot run that program: built for another machine, or not executable"
        return DeviceError(f"{fix}; set connect.python of the device profile (exit code 126): {tail}", "wrong-arch")
    return DeviceError(f"the agent died without an answer ({_cause(returncode, signal)}): {tail}", "agent-died")


def hung(timeout_s: float) -> DeviceError:
    """The error of an agent that does not even report its own time-out (code ``client-timeout``)."""
    return DeviceError(
        f"the agent gave no answer within {timeout_s:g} s, not even that its time is over, and was ended; "
        "see whether the device or the link to it hangs, then try again",
        "client-timeout",
    )


def _cause(returncode: int | None, signal: str | None) -> str:
    if signal:
        return f"signal SIG{signal.removeprefix('SIG')}"
    if returncode is None:
        return "how is not known"
    if returncode < 0:
        try:
            return f"signal {signals.Signals(-returncode).name}"
        except ValueError:
            return f"signal {-returncode}"
    return f"exit code {returncode}"
