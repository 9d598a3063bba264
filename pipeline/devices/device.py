"""A run's device: who it is, what its probe found, and that it stays the same device until the run ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.device_profiles import DeviceProfile, Target
from secateur.device_profiles.calibration import load, save
from secateur.device_profiles.runtime import runtime_of
from secateur.device_profiles.staircase import (
    FINGERPRINT_KEYS,
    FLOAT,
    Staircase,
    fingerprint_of,
    probe,
    setting_of,
)
from secateur.device_profiles.target import Progress
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.files import write_whole
from secateur.pipeline.progress import ProgressView

IN_FLOAT = {FLOAT: ""}


@dataclass(frozen=True)
class RunDevice:
    """What a run found out about its device at its start; kept in ``device.json`` of the run directory.

    Args:
        fingerprint: of device, runtime and settings.
        multiples: width granularity per kind of layer.
        noise_floor: half-width (fraction) of a network against itself; None = not probed.
        curves: kind of layer -> width -> ms, as the probe found them; empty = not probed.
        origin: where the multiples come from, for people.
        facts: the device as its agent described it.
    """

    fingerprint: str
    multiples: Mapping[str, int]
    noise_floor: float | None
    curves: Mapping[str, Mapping[int, float]]
    origin: str
    facts: Mapping[str, Any]


class Leased:
    """A target that is used only under a lease, which is somebody else's to give (a scheduler's).

    The lock on the device itself holds in any case; leases keep whole flows from waiting at it.
    """

    def __init__(self, target: Target, lease: Callable[[], AbstractContextManager[None]]) -> None:
        self.target, self.lease = target, lease

    def prepare(self) -> Mapping[str, Any]:
        return self.target.prepare()

    def put(self, path: Path) -> str:
        return self.target.put(path)

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        with self.lease():
            return self.target.run(request, timeout_s, progress)

    def fetch(self, path: str, to: Path) -> None:
        self.target.fetch(path, to)

    def close(self) -> None:
        self.target.close()


def meet(
    target: Target,
    profile: DeviceProfile,
    directory: Path,
    home: Path,
    *,
    probing: bool,
    progress: ProgressView,
    name: str = "device.json",
    precise: Mapping[str, str] = IN_FLOAT,
) -> RunDevice:
    """Reach the device; find out what the run needs to know of it, or check that it still is the device it began with.

    Args:
        directory: of the run.
        home: whose ``devices`` folder keeps probes.
        probing: whether a device that was never probed is probed now.
        name: of the file in the run directory that keeps what was found.
        precise: the precisions in which widths have to pay -> their number types, as ``U8S8``; empty = floats. Only
            runtimes that load ONNX are probed in integers.

    Raises:
        SurroundingsError: it is another device, or its runtime changed.
        DeviceError: it cannot be reached.
    """
    answer = target.prepare()
    fingerprint = fingerprint_of(profile, answer)
    file = directory / name
    if file.is_file():
        known = _read(file)
        check_same(known, profile, answer)
        return known
    found = []
    for precision, scheme in precise.items():
        if scheme and runtime_of(profile).format != "onnx":
            continue
        wanted = fingerprint_of(profile, answer, setting_of(precision, scheme))
        staircase = load(home / "devices", profile, wanted, precision)
        if staircase is None and probing:
            with progress.stage(f"Probe {profile.name}" + (f" in {precision}" if scheme else "")) as report:
                staircase = probe(target, profile, progress=report, precision=precision, scheme=scheme)
            save(home / "devices", profile, staircase)
        found += [] if staircase is None else [staircase]
    facts = _of(found, profile, fingerprint, {**answer["device"], **answer["runtime"]})
    write_whole(file, json.dumps(asdict(facts)) + "\n")
    return facts


def check_same(known: RunDevice, profile: DeviceProfile, answer: Mapping[str, Any]) -> None:
    """See that a device is the one a run began with.

    Args:
        answer: of its target's ``prepare``.

    Raises:
        SurroundingsError: it is another one, or its runtime changed.
    """
    if known.fingerprint != fingerprint_of(profile, answer):
        raise SurroundingsError(_changed(known.facts, {**answer["device"], **answer["runtime"]}, profile))


def _of(found: Sequence[Staircase], profile: DeviceProfile, fingerprint: str, facts: Mapping[str, Any]) -> RunDevice:
    """Of what probes found in every precision: widths that pay in all of them."""
    if not found:
        return RunDevice(fingerprint, profile.multiples.model_dump(), None, {}, "the profile, unprobed", facts)
    each = [staircase.multiples.model_dump() for staircase in found]
    multiples = {kind: math.lcm(*(of[kind] for of in each)) for kind in each[0]}
    curves = {
        kind if staircase.precision == FLOAT else f"{kind} in {staircase.precision}": curve
        for staircase in found
        for kind, curve in staircase.curves.items()
    }
    names = [staircase.precision for staircase in found]
    origin = "a probe of the device" if names == [FLOAT] else f"probes of the device in {' and '.join(names)}"
    return RunDevice(fingerprint, multiples, found[0].noise_floor, curves, origin, facts)


def _read(file: Path) -> RunDevice:
    data = json.loads(file.read_text(encoding="utf-8"))
    data["curves"] = {kind: {int(w): ms for w, ms in curve.items()} for kind, curve in data["curves"].items()}
    return RunDevice(**data)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], profile: DeviceProfile) -> str:
    changes = [f"{k} {before.get(k)} -> {now.get(k)}" for k in FINGERPRINT_KEYS if before.get(k) != now.get(k)]
    return (
        f"device {profile.name} is not the one this run began with ({'; '.join(changes) or 'its settings changed'}): "
        "latencies would not be comparable. Restore it and resume, or start a new run"
    )
