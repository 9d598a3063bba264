"""Re-profiling: a registered champion is timed again on its device and compared with what it was registered with.

A process is the unit: figures of fresh processes, then and now, are compared as the mean of their logarithms, with
Welch's interval. Where the unpruned network of its run is at hand, that is timed in turn with it, and tells a slower
device from a slower model. A figure has regressed when the whole 95 % interval lies beyond the tolerance; wall times
of a device that was busy decide nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from secateur.device_profiles import BenchmarkResult, DeviceError, DeviceProfile, Target, load_profile, measure
from secateur.device_profiles.intervals import MIN_PROCESSES, Ratio
from secateur.device_profiles.staircase import FINGERPRINT_KEYS
from secateur.device_profiles.wording import printable
from secateur.pipeline.config import trust
from secateur.pipeline.devices.device import Leased
from secateur.pipeline.errors import TrackingError, UserError, VersionError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.progress import ProgressView
from secateur.pipeline.surroundings import home
from secateur.pipeline.tracking import Registry, Version
from secateur.pipeline.tracking.fetched import text_of

MODEL = "model.onnx"
INPUTS = "benchmark-input.npz"
SYSTEM_KEYS = (*FINGERPRINT_KEYS, "system", "python", "governor", "providers", "host_sha256")
"""What is named when it differs between then and now: firmware and kernel, runtime, clocks."""
Lease = Callable[[], AbstractContextManager[None]]


class Tolerances(BaseModel):
    """By how much (fraction) a figure may grow before it is a regression."""

    model_config = ConfigDict(extra="forbid")

    p50: Annotated[float, Field(gt=0, description="Median latency: CPU time on one CPU thread, else wall time.")] = 0.05
    p95: Annotated[float, Field(gt=0, description="95th percentile of the wall time.")] = 0.15
    first: Annotated[float, Field(gt=0, description="The first call.")] = 0.5
    rss: Annotated[float, Field(gt=0, description="Highest resident memory.")] = 0.1


@dataclass(frozen=True)
class Figure:
    """One figure of a champion, then and now.

    Args:
        then: median over processes, in the unit of the name.
        change: now / then, with its 95 % interval; the interval is (0, inf) where one process cannot tell.
        verdict: ``same``, ``better``, ``regressed``, ``disturbed`` (it would be a regression, on a busy device), or
            ``unknown``: the interval reaches over the tolerance, so nothing is proven.
    """

    name: str
    then: float
    now: float
    change: Ratio
    tolerance: float
    verdict: str


@dataclass(frozen=True)
class Reprofile:
    """A champion timed again.

    Args:
        figures: of the champion.
        reference: change of the median latency of the unpruned network; None where that is not at hand.
        speedup: of the champion over it, then and now.
        changed: what is different on the device, in words.
        flags: what speaks against the measurement now (``BenchmarkResult.flags``).
        outputs: whether the outputs on the same input are the same, bit for bit.
    """

    name: str
    device: str
    version: str
    figures: tuple[Figure, ...]
    reference: Ratio | None
    speedup: tuple[Ratio, Ratio] | None
    changed: tuple[str, ...]
    flags: tuple[str, ...]
    outputs: bool
    benchmark: BenchmarkResult

    @property
    def regressions(self) -> tuple[Figure, ...]:
        return tuple(figure for figure in self.figures if figure.verdict == "regressed")

    @property
    def cause(self) -> str:
        """What the readings say about where a regression comes from."""
        if self.reference is None:
            where = "the device or the model, which is not known: the unpruned network of its run is not at hand"
        elif self.reference.low > 1:
            where = f"the unpruned network changed too, to {self.reference} of what it took: the device is slower"
        else:
            where = f"the unpruned network takes {self.reference} of what it took: the model is slower, not the device"
        signs = [*self.changed, *(f"the device was {flag}" for flag in self.flags if flag == "throttled")]
        return f"{where}; {'; '.join(signs) or 'nothing else is known to have changed'}"

    def metrics(self) -> dict[str, float]:
        """For the tracker: figures, and changes with their intervals."""
        metrics: dict[str, float] = {"regressed": float(bool(self.regressions))}
        for figure in self.figures:
            metrics[figure.name] = figure.now
            for part in ("value", "low", "high"):
                metrics[f"change.{figure.name}.{part}"] = getattr(figure.change, part)
        if self.reference is not None:
            metrics["change.reference"] = self.reference.value
        if self.speedup is not None:
            metrics["speedup"] = self.speedup[1].value
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def to_json(self) -> str:
        data = asdict(replace(self, benchmark=None))  # type: ignore[arg-type]
        del data["benchmark"]
        return json.dumps({"format": 1, **data}, indent=1)


class Champions(Protocol):
    """What is needed of the registry."""

    def champions(self) -> list[tuple[str, str, Version]]: ...

    def fetch(self, version: Version, folder: Path) -> Any: ...


def chosen(registry: Champions, names: Sequence[str], device: str | None) -> list[tuple[str, str, Version]]:
    """The champions that are meant: (model, device, version).

    Args:
        names: of models; none = all.
        device: only this one's.

    Raises:
        UserError: there is no such champion; names those there are.
    """
    every = registry.champions()
    champions = [c for c in every if (not names or c[0] in names) and device in (None, c[1])]
    missing = sorted(set(names) - {name for name, _, _ in champions})
    if missing or not champions:
        known = ", ".join(f"{name} on {where}" for name, where, _ in every) or "none"
        wanted = ", ".join(missing) or "any"
        raise UserError(f"no champion of {wanted}{f' on {device}' if device else ''}; there are: {known}")
    return champions


def reprofile(
    registry: Registry | Champions,
    champions: Sequence[tuple[str, str, Version]],
    tolerances: Tolerances,
    *,
    lease: Callable[[DeviceProfile], Lease],
    progress: ProgressView,
    profiles: Sequence[Path] = (),
    opened: Callable[[DeviceProfile], Target] = trust.open_target,
) -> Iterator[Reprofile | tuple[str, str, Exception]]:
    """Time champions again, one after another; a device that is unreachable spoils no other champion's re-profile.

    Args:
        champions: as ``chosen`` gives them.
        lease: for a device's profile, what to enter around each use of it.
        profiles: files of device profiles that are not among the installed ones, nor in ``SECATEUR_HOME``.
        opened: reaches a device.

    Yields:
        a re-profile, or (model, device, what prevented it).
    """
    for name, device, version in champions:
        try:
            profile = profile_of(device, profiles)
            with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
                registry.fetch(version, Path(folder))
                target = Leased(opened(profile), lease(profile))
                try:
                    yield time_again(version, device, profile, target, Path(folder), tolerances, progress)
                finally:
                    target.close()
        except (DeviceError, TrackingError, UserError) as error:
            yield name, device, error


def time_again(
    version: Version,
    device: str,
    profile: DeviceProfile,
    target: Target,
    folder: Path,
    tolerances: Tolerances,
    progress: ProgressView,
) -> Reprofile:
    """Time the files of a version, fetched into ``folder``, as they were timed when it was registered.

    Raises:
        UserError: it carries no benchmark of its model, so there is nothing to compare with.
        DeviceError: as measuring does.
    """
    before, own, reference = recorded(folder, profile.name)
    files = {path.name: path for path in folder.rglob("*") if path.is_file()}
    kept = home() / "runs" / (version.run or "-")  # a version carries its model only
    digests = {sha256_of(path): path for place in (kept, folder) for path in place.rglob("*.onnx")}
    models = {own: folder / MODEL}
    if reference is not None and (known := digests.get(before.sha256.get(reference, ""))) is not None:
        models = {reference: known, **models}
    with progress.stage(f"Time {version.name} {version.version} on {device} again") as report:
        now = measure(
            target,
            profile,
            models,
            "final",
            lambda done, total: report(done, total, ""),
            seed=before.seed,
            noise_floor=before.noise_floor,
            inputs=files.get(INPUTS),
        )
    return compared(version, device, before, now, own, tolerances)


def recorded(folder: Path, device: str) -> tuple[BenchmarkResult, str, str | None]:
    """The benchmark a version was registered with, the model's name in it, and its unpruned network's.

    Raises:
        UserError: it has none.
    """
    digest = sha256_of(folder / MODEL)
    for file in sorted(folder.rglob("*.json")):
        try:
            result = BenchmarkResult.from_json(text_of(file) or "")
        except (DeviceError, VersionError):
            continue  # another kind of document
        own = [name for name in result.names if result.sha256.get(name) == digest]
        if own and result.profile == device:
            return result, own[0], result.names[0] if result.names[0] != own[0] else None
    raise UserError("the version carries no benchmark of its model on this device; register it anew with a run")


def compared(
    version: Version, device: str, before: BenchmarkResult, now: BenchmarkResult, own: str, tolerances: Tolerances
) -> Reprofile:
    """What changed between two measurements of one model."""
    busy = now.contended or now.unstable
    figures = []
    for name, tolerance, of in _FIGURES:
        limit = getattr(tolerances, tolerance)
        then, current = _of_processes(before, own, of), _of_processes(now, own, of)
        if not then or not current:
            continue  # a device that does not tell
        change = growth(current, then, now.noise_floor)
        steady = name == "p50_ms" and now.statistic == "cpu"  # CPU time: hardly touched by other load
        verdict = _verdict(change, limit, busy and not steady and name != "peak_rss_bytes")
        figures.append(Figure(name, float(np.median(then)), float(np.median(current)), change, limit, verdict))
    reference = next((name for name in now.names if name != own), None)
    drift = speedups = None
    if reference is not None:
        latency = _FIGURES[0][2]
        pair = _of_processes(now, reference, latency), _of_processes(before, reference, latency)
        drift, speedups = growth(*pair, now.noise_floor), (before.speedup(own, reference), now.speedup(own, reference))
    outputs = before.processes[-1].models[own].output_sha256 == now.processes[-1].models[own].output_sha256
    return Reprofile(
        version.name,
        device,
        version.version,
        tuple(figures),
        drift,
        speedups,
        changes(before.environment, now.environment),
        now.flags,
        outputs,
        now,
    )


def growth(now: Sequence[float], then: Sequence[float], noise_floor: float | None) -> Ratio:
    """Ratio of the geometric means of two samples, shapes ``(n,)`` and ``(m,)``, with Welch's 95 % interval.

    Args:
        noise_floor: half-width (fraction) of a model against itself, added in quadrature.
    """
    a, b = np.log(np.asarray(now, dtype=float)), np.log(np.asarray(then, dtype=float))
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < MIN_PROCESSES:
        return Ratio.unknown(float(np.exp(value)))
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    spread = 0.0
    if va + vb > 0:
        freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        spread = float(stats.t.ppf(0.975, freedom) * math.sqrt(va + vb))
    width = math.hypot(spread, noise_floor or 0.0)
    with np.errstate(over="ignore"):
        return Ratio(*np.exp([value, value - width, value + width]).tolist())


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs between a device as it was described then and now, for people; unknown on one side is no change."""
    lines = [
        f"{key} {before[key]} -> {now[key]}"
        for key in SYSTEM_KEYS
        if key in before and key in now and before[key] != now[key]
    ]
    warmth = [_warmest(facts) for facts in (before, now)]
    if warmth[0] is not None and warmth[1] is not None and abs(warmth[1] - warmth[0]) >= 5:
        lines.append(f"highest temperature {warmth[0]:.0f} -> {warmth[1]:.0f} C")
    return tuple(lines)


def profile_of(device: str, files: Sequence[Path] = ()) -> DeviceProfile:
    """The profile of a device by its name.

    Raises:
        UserError: nobody knows it, or it names code that nobody has consented to.
    """
    place = next((str(file) for file in files if file.stem == device), device)
    if place == device and device.endswith((".yaml", ".yml")):  # a registry names devices, not files of this machine
        raise UserError(f"the champion's device: {printable(device)} is no name of a device profile, but a path")
    try:
        profile = load_profile(place, [home() / "devices"])
    except DeviceError as error:
        raise UserError(f"the champion's device: {error}") from error
    if (code := trust.code_of_profile(place)) is not None:
        trust.require([code])
    return profile


def markdown(reprofiles: Sequence[Reprofile]) -> str:
    """The re-profiles as a table, and under it what is said about each."""
    lines = ["| model | device | figure | then | now | change | verdict |", "|---|---|---|---|---|---|---|"]
    for one in reprofiles:
        for figure in one.figures:
            model = f"{one.name} {one.version}"
            lines.append(
                f"| {model} | {one.device} | {figure.name} | {figure.then:.4g} | {figure.now:.4g} "
                f"| {figure.change} | {figure.verdict} (tolerance {figure.tolerance:.0%}) |"
            )
    for one in reprofiles:
        flags = f" Flags: {', '.join(one.flags)}." if one.flags else ""
        outputs = "" if one.outputs else " Outputs differ bit by bit from those of the registration."
        lines.append(f"\n**{one.name} {one.version} on {one.device}**: {one.cause}.{flags}{outputs}")
    return "\n".join(lines) + "\n"


def _warmest(facts: Mapping[str, Any]) -> float | None:
    temperature = facts.get("temperature_c")
    return temperature.get("max") if isinstance(temperature, Mapping) else temperature


def _verdict(change: Ratio, tolerance: float, busy: bool) -> str:
    if change.low > 1 + tolerance:
        return "disturbed" if busy else "regressed"
    if change.high < 1:
        return "better"
    return "same" if change.high <= 1 + tolerance else "unknown"


def _of_processes(
    result: BenchmarkResult, name: str, of: Callable[[BenchmarkResult, str], float | None]
) -> list[float]:
    """A figure of every process; empty where the device does not tell it."""
    values = [of(replace(result, processes=(process,)), name) for process in result.processes]
    return [value for value in values if value is not None]


def _latency(result: BenchmarkResult, name: str) -> float:
    return result.compared_ms(name, 50)


_FIGURES: tuple[tuple[str, str, Callable[[BenchmarkResult, str], float | None]], ...] = (
    ("p50_ms", "p50", _latency),
    ("p95_ms", "p95", lambda result, name: result.compared_ms(name, 95)),
    ("first_ms", "first", lambda result, name: result.first_ms(name)),
    ("peak_rss_bytes", "rss", lambda result, name: result.peak_rss_bytes(name)),
)
"""Name with its unit, the tolerance it is judged by, and how a process tells it."""
