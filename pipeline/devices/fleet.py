"""Several devices in one run: each candidate is measured on all of them at once, and one latency stands for them.

One thread per device; a device is used by one thread at a time, and so is a machine that is several devices. What
counts is the worst ratio or the mean (``device.combine``); every device's own figures are kept beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from secateur.device_profiles import DeviceError, DeviceProfile, Target
from secateur.device_profiles.target import Progress, machine_of
from secateur.pipeline.devices.device import RunDevice, check_same
from secateur.pipeline.progress import ProgressView, Report

T = TypeVar("T")
Combine = Literal["worst", "mean"]
UNREACHABLE = (
    *("unreachable", "unknown-host", "connect-timeout", "connection-refused", "connection-closed", "link-dead"),
    "transfer-broken",
)
"""Codes of the errors of a device that may come back by itself: switched off, restarting, out of the network."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
LISTEN_S = 0.5


@dataclass(frozen=True)
class Device:
    """A device that measures candidates.

    Args:
        facts: what the run found out about it; None = it was not met yet.
        noise_floor: half-width (fraction) of a network against itself (see ``BenchmarkResult``).
    """

    profile: DeviceProfile
    target: Target
    facts: RunDevice | None = None
    noise_floor: float | None = None

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def machine(self) -> tuple[str, ...]:
        """Devices of one machine cannot be measured at the same time."""
        return machine_of(self.profile)


class Fleet:
    """Devices that work at the same time.

    Args:
        devices: the first is the run's own (``device.profile``).
        combine: which latency ratio counts: the ``worst``, or the ``mean`` of all.
        wait_s: how long each device may be unreachable, at a time, before that is an error.
        say: told once per attempt that a device is unreachable.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        combine: Combine = "worst",
        wait_s: float = 0.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.combine: Combine = combine
        self._stop = threading.Event()
        locks = {device.machine: threading.Lock() for device in devices}
        self.devices = tuple(
            replace(device, target=_Attended(device, locks[device.machine], self._stop, wait_s, say))
            for device in devices
        )

    def __len__(self) -> int:
        return len(self.devices)

    def __iter__(self) -> Iterator[Device]:
        return iter(self.devices)

    def __getitem__(self, name: str) -> Device:
        return next(device for device in self.devices if device.name == name)

    @property
    def primary(self) -> Device:
        return self.devices[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(device.name for device in self.devices)

    def file(self, stem: str, suffix: str, name: str) -> str:
        """Name of a file about one device: without the device's name for the run's own."""
        return f"{stem}{suffix}" if name == self.primary.name else f"{stem}.{name}{suffix}"

    def meet(self, meet: Callable[[Device], RunDevice]) -> None:
        """Take in what a run has to know of every device; ``meet`` finds it out."""
        facts = self.each(meet)
        self.devices = tuple(
            replace(device, facts=facts[device.name], noise_floor=facts[device.name].noise_floor)
            for device in self.devices
        )
        for device in self.devices:
            assert isinstance(device.target, _Attended)
            device.target.device = device

    def each(self, work: Callable[[Device], T], names: Sequence[str] | None = None) -> dict[str, T]:
        """Do something on several devices at once; the answers by name. What one device finds does not stop another.

        Args:
            names: of the devices concerned; None = all.

        Raises:
            DeviceError: devices failed; says which, and why.
        """
        chosen = [device for device in self.devices if names is None or device.name in names]
        if len(self.devices) == 1:
            return {device.name: work(device) for device in chosen}
        with ThreadPoolExecutor(max(1, len(chosen)), thread_name_prefix="device") as pool:
            try:
                futures = {device.name: pool.submit(work, device) for device in chosen}
                while wait(futures.values(), LISTEN_S).not_done:
                    pass  # a signal may reach another thread than this one, which must run to see it
            except BaseException:  # Ctrl-C: the threads end at the agents' next sign of life, and with them the agents
                self._stop.set()
                raise
        _raise_failures(futures)
        return {name: future.result() for name, future in futures.items()}


def _raise_failures(futures: Mapping[str, Future[Any]]) -> None:
    """One error for those of all devices; any other than a device's own goes first."""
    failures = {name: error for name, future in futures.items() if (error := future.exception()) is not None}
    for error in failures.values():
        if not isinstance(error, DeviceError):
            raise error
    if failures:
        first = next(iter(failures.values()))
        text = "; ".join(f"device {name}: {error}" for name, error in failures.items())
        raise DeviceError(text, getattr(first, "code", "device")) from first


class _StoppedError(Exception):
    """The run ends; leaves a thread only after the error that ends it."""


class _Attended:
    """A device's target as a fleet uses it: one at a time of those of its machine, waited for while it is unreachable.

    Args:
        machine: the lock of its machine.
        stop: set when the run ends; work under way ends then.
        wait_s: how long the device may be unreachable.
    """

    def __init__(
        self,
        device: Device,
        machine: threading.Lock,
        stop: threading.Event,
        wait_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.device, self.target = device, device.target
        self._machine, self._stop, self._wait_s, self._say = machine, stop, wait_s, say

    def prepare(self) -> Mapping[str, Any]:
        return self._patiently(self.target.prepare)

    def put(self, path: Path) -> str:
        return self._patiently(lambda: self.target.put(path))

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        def watch(event: Mapping[str, Any]) -> None:
            self._go_on()
            if progress:
                progress(event)

        def measure() -> dict[str, Any]:
            with self._machine:
                self._go_on()
                return self.target.run(request, timeout_s, watch)

        return self._patiently(measure)

    def fetch(self, path: str, to: Path) -> None:
        self._patiently(lambda: self.target.fetch(path, to))

    def close(self) -> None:
        self.target.close()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _patiently(self, work: Callable[[], T]) -> T:
        """``work``, again after a while where the device is unreachable; back again, it must be the device it was."""
        began, pause, was_away = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            self._go_on()
            try:
                if was_away and self.device.facts is not None:
                    check_same(self.device.facts, self.device.profile, self.target.prepare())
                return work()
            except DeviceError as error:
                if error.code not in UNREACHABLE or not self._wait_s:
                    raise
                if not was_away:
                    began, was_away = time.monotonic(), True
                left = self._wait_s - (time.monotonic() - began)
                if left <= 0:
                    raise DeviceError(f"{error}; waited {self._wait_s:g} s for it", error.code) from error
                said = str(error).splitlines()[0]
                self._say(f"Device {self.device.name} is unreachable ({said}); waiting for another {duration(left)}")
            self._stop.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def duration(seconds: float) -> str:
    """``"90 s"``, ``"45 min"``."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@dataclass
class Tally:
    """How far the work of several devices is, told as one; may be used from any thread.

    Args:
        report: told the sums, and whose step it was.
        names: of the devices.
        each: steps of a device that has not said anything yet.
    """

    report: Report
    names: Sequence[str] | Mapping[str, Any]
    each: int = 0
    _steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def of(self, name: str) -> Callable[..., None]:
        """What one device reports to: ``(done, total, note="")``."""

        def told(done: int, total: int, note: str = "") -> None:
            with self._lock:
                self._steps[name] = (done, total)
                steps = [self._steps.get(n, (0, self.each)) for n in self.names]
                self.report(sum(d for d, _ in steps), sum(t for _, t in steps), f"{name}: {note}" if note else "")

        return told


class FleetProgress:
    """One stage in which several devices say how far they are."""

    def __init__(self, report: Report, names: Sequence[str]) -> None:
        self._tally = Tally(report, names)

    def of(self, name: str) -> ProgressView:
        """What one device shows its progress to."""
        return _Part(self._tally.of(name))


@dataclass(frozen=True)
class _Part:
    """The part of a stage that is one device's."""

    report: Report

    def stage(self, title: str) -> AbstractContextManager[Report]:
        return nullcontext(self.report)

    def say(self, line: str) -> None:
        self.report(0, 0, line)
