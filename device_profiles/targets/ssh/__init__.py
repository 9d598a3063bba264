"""A device reached over SSH: files go by SFTP, the agent runs there, host keys are always checked.

The user's SSH configuration is honoured (aliases, users, ports, keys, jump hosts), but nothing in it and nothing in a
profile can switch the check of host keys off. One connection is kept per target; after it breaks the next call opens
another. What the device holds lies in one folder (``Settings.folder``): the agent and the models under the names of
their SHA-256, so that nothing is sent twice; a file appears under its name only when it is whole.

asyncssh is imported with the first device that is reached: it takes longer than the commands that reach none.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.profile import DeviceProfile
from secateur.device_profiles.runtime import DEFAULT, Runtime, runtime_named, runtime_of
from secateur.device_profiles.target import PYTHON, AddOption, Progress, Started, Target
from secateur.device_profiles.targets.ssh.settings import DEFAULT_PYTHON, Settings
from secateur.device_profiles.wording import command, printable

if TYPE_CHECKING:
    from secateur.device_profiles.targets.ssh.session import Work, Worker

T = TypeVar("T")

HOST = re.compile(r"(?:(?P<user>[^@\s]+)@)?(?P<host>\[[0-9a-fA-F:.%\w]+\]|[^\s:@/\[\]]+)(?::(?P<port>\d+))?")
PREPARE_S = 180.0


def open_target(profile: DeviceProfile, settings: Settings) -> Target:
    """The device at ``settings.host``; it is not reached before its first use."""
    return SshTarget(settings, runtime_of(profile))


def machine(connect: Mapping[str, Any]) -> tuple[str, ...]:
    """Host and port."""
    return (str(connect.get("host")), str(connect.get("port")))


def address(connect: Mapping[str, Any]) -> str:
    """``user@host:port``, as far as they are given; empty without a host."""
    if not connect.get("host"):
        return ""
    user = f"{connect['user']}@" if connect.get("user") else ""
    port = f":{connect['port']}" if connect.get("port") else ""
    return f"{user}{connect['host']}{port}"


def starts(connect: Mapping[str, Any]) -> Iterator[Started]:
    """A Python of the user's own on the device; and an SSH configuration, in which commands can stand."""
    python = connect.get("python") or ()
    words = (python,) if isinstance(python, str) else tuple(map(str, python))
    if words and words != DEFAULT_PYTHON:
        yield Started("python", f"{command(*words)} (on {printable(address(connect))})")
    if connect.get("config"):
        file = Path(connect["config"]).expanduser().absolute()
        yield Started("config", f"{printable(file)} (an SSH configuration can start commands here)", file)


def read_address(text: str) -> dict[str, Any]:
    """``user@host:port`` as settings.

    Raises:
        ValueError: it is no address.
    """
    match = HOST.fullmatch(text)
    if match is None or (match["port"] and not 0 < int(match["port"]) < 65536):
        raise ValueError("that is no address; write user@host:port, for example pi@192.168.1.20")
    parts: dict[str, Any] = {"host": match["host"].strip("[]"), "user": match["user"]}
    parts["port"] = int(match["port"]) if match["port"] else None
    return {key: value for key, value in parts.items() if value is not None}


ADD_OPTIONS = (
    AddOption(
        "host", "USER@HOST:PORT", "Where it is; user and port may be left out.", read_address, example="user@address"
    ),
    PYTHON,
)


class SshTarget:
    """A device reached over SSH. Its methods may be called from any thread; ``close`` it after use.

    Args:
        settings: how to reach it.
        runtime: what networks run with there; None = ONNX Runtime.
    """

    def __init__(self, settings: Settings, runtime: Runtime | None = None) -> None:
        self.settings = settings
        self.runtime = runtime or runtime_named(DEFAULT)
        self._guard = threading.Lock()
        self._worker: Worker | None = None

    def prepare(self) -> Mapping[str, Any]:
        """Connect, bring the agent, sweep, probe; see ``Target.prepare``.

        Raises:
            DeviceError: among others ``host-key``, ``key-refused``, ``connection-refused``, ``unknown-host``,
                ``connect-timeout``, ``no-python``, ``wrong-arch``, ``disk-full``; each text names the fix.
        """
        self.run({"op": "sweep"}, PREPARE_S)
        return self.run({"op": "probe"}, PREPARE_S)

    def put(self, path: Path) -> str:
        """Bring a file to the device, unless one of its SHA-256 and size is there; returns its path on the device.

        Raises:
            DeviceError: no such file; ``transfer-broken`` after four attempts; ``link-dead``; ``disk-full``.
        """
        digest, size = _digest(path)
        return self._wait(lambda session, _: session.put(path, digest, size))

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        """Run the agent once; see ``Target.run``. Whatever happens here, no process of it stays on the device.

        Args:
            timeout_s: seconds; the agent ends its own work then, and is ended a little later if it does not.
            progress: called in this thread; an exception it raises ends the run.

        Raises:
            DeviceError: whatever the agent reports; ``client-timeout``; ``transfer-broken`` or ``link-dead`` if the
                connection is lost; ``reply-too-long``; ``busy`` after ``busy_wait_s``.
        """
        wait_s = self.settings.busy_wait_s
        give_up = time.monotonic() + wait_s
        while True:
            try:
                return self._wait(lambda session, report: session.run(request, timeout_s, report), progress)
            except DeviceError as error:
                if error.code != "busy":
                    raise
                if time.monotonic() >= give_up:
                    text = f"{error}; waited {wait_s:g} s. End that process or try again later."
                    raise DeviceError(text, "busy") from error
            time.sleep(min(1.0, max(0.05, wait_s / 20)))

    def fetch(self, path: str, to: Path) -> None:
        """Bring a file of at most 1 GiB from the device; see ``Target.fetch``.

        Raises:
            DeviceError: ``no-such-file``, ``too-large``, ``transfer-broken``, ``link-dead``; ``local-file`` if it
                cannot be written here.
        """
        self._wait(lambda session, _: session.fetch(path, to))

    def close(self) -> None:
        """Close the connection; work under way ends with a ``DeviceError``. A later call opens another."""
        with self._guard:
            worker, self._worker = self._worker, None
        if worker:
            worker.stop()

    def _wait(self, work: Work[T], progress: Progress | None = None) -> T:
        from secateur.device_profiles.targets.ssh.session import Worker

        with self._guard:
            if self._worker is None:
                self._worker = Worker(self.settings, self.runtime)
            worker = self._worker
        return worker.wait(work, progress)


def _digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a local file.

    Raises:
        DeviceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except FileNotFoundError as error:
        raise DeviceError(f"no model file at {path}; export it first", "model-load") from error
    except OSError as error:
        raise DeviceError(f"cannot read {path}: {error.strerror}", "local-file") from error
