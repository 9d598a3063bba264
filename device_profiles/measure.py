"""What was measured, and how sure we are of it.

The unit is the ratio to a reference model timed in turn with it in the same process. With one thread on a CPU the ratio
is taken of CPU time, which other load hardly touches (0.2-0.5 % spread at a load of 8, where wall time has 20-40 %);
otherwise of paired wall times. Both are always kept, and so is every single latency.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from device_profiles.agent import PROTOCOL
from device_profiles.errors import DeviceError
from device_profiles.profile import DeviceProfile
from device_profiles.target import Target

FloatArray = npt.NDArray[np.float64]
TierName = Literal["search", "final"]

RESAMPLES = 2000
INNER_RESAMPLES = 200
MAX_PRESSURE = 0.05  # share of time in which some process waited for a CPU
MAX_WALL_OVER_CPU = 1.05
MAX_DRIFT = 0.03
# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def inverse(self) -> Ratio:
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ModelSamples:
    """One model's raw numbers in one process.

    Args:
        wall_ms: shape ``(repeats,)``, wall time of each call.
        cpu_ms: shape ``(repeats,)``, CPU time of the process in each call.
        load_ms: opening the session.
        first_ms: the first call.
        output_sha256: of the outputs on the seeded input.
        peak_rss_bytes: highest resident memory while this model was loaded and first called, the runtime's own
            included, other models not; None where unreadable.
    """

    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    load_ms: float
    first_ms: float
    output_sha256: str
    peak_rss_bytes: int | None = None


@dataclass(frozen=True)
class Process:
    """One fresh process: all models interleaved, and the state of the device around it."""

    models: Mapping[str, ModelSamples]
    environment: Mapping[str, Any]
    started: float
    ended: float


@dataclass(frozen=True)
class BenchmarkResult:
    """Every raw number of a measurement; statistics are derived when asked.

    Args:
        profile: the profile's name.
        tier: ``search`` or ``final``.
        names: the models in the order they were timed; the first is the one that drift is judged by.
        sha256: file digest per model.
        statistic: ``cpu`` (ratio of medians of CPU time) or ``wall`` (median of paired wall ratios).
        processes: one entry per fresh process.
        seed: of the inputs and of the bootstrap.
    """

    profile: str
    tier: TierName
    names: tuple[str, ...]
    sha256: Mapping[str, str]
    statistic: Literal["cpu", "wall"]
    processes: tuple[Process, ...]
    seed: int = 0

    def wall_ms(self, name: str) -> FloatArray:
        """Every wall latency of a model, all processes one after another."""
        return np.concatenate([self._samples(p, name, "wall_ms") for p in self.processes])

    def cpu_ms(self, name: str) -> FloatArray:
        """Every CPU time of a model, all processes one after another."""
        return np.concatenate([self._samples(p, name, "cpu_ms") for p in self.processes])

    def percentile_ms(self, name: str, q: float) -> float:
        """Percentile ``q`` (0-100) of warm single-call wall latency."""
        return float(np.percentile(self.wall_ms(name), q))

    def p50_ms(self, name: str) -> float:
        return self.percentile_ms(name, 50)

    def p95_ms(self, name: str) -> float:
        return self.percentile_ms(name, 95)

    def cpu_p50_ms(self, name: str) -> float:
        """Median CPU time of a call: the latency this model would have on an idle device, at one thread."""
        return float(np.median(self.cpu_ms(name)))

    def load_ms(self, name: str) -> float:
        """Median over processes of the time to open the session."""
        return float(np.median([p.models[name].load_ms for p in self.processes]))

    def first_ms(self, name: str) -> float:
        """Median over processes of the first call."""
        return float(np.median([p.models[name].first_ms for p in self.processes]))

    def peak_rss_bytes(self, name: str) -> int | None:
        """Highest peak over processes; None where the device does not tell."""
        peaks = [p.models[name].peak_rss_bytes for p in self.processes]
        return max((peak for peak in peaks if peak is not None), default=None)

    @property
    def environment(self) -> Mapping[str, Any]:
        """The device as the last process saw it."""
        return self.processes[-1].environment

    def ratio(self, name: str, reference: str) -> Ratio:
        """Latency of ``name`` / latency of ``reference``, with a 95 % bootstrap interval.

        One process: circular block bootstrap over paired iterations (Politis & Romano 1992), blind to what differs
        between processes. Several: cluster bootstrap (processes, then iterations) of the mean log ratio.

        Raises:
            DeviceError: a model was not measured.
        """
        rng = np.random.default_rng([self.seed, len(self.processes)])
        pairs = [(self._samples(p, name), self._samples(p, reference)) for p in self.processes]
        value = float(np.exp(np.mean([np.log(self._estimate(a, b)) for a, b in pairs])))
        if name == reference:
            return Ratio(1.0, 1.0, 1.0)
        if len(pairs) == 1:
            draws = self._resampled(*pairs[0], RESAMPLES, rng)
            low, high = np.quantile(draws, [0.025, 0.975])
        else:
            inner = np.log(np.stack([self._resampled(a, b, INNER_RESAMPLES, rng) for a, b in pairs]))
            processes = rng.integers(len(pairs), size=(RESAMPLES, len(pairs)))
            replicates = rng.integers(INNER_RESAMPLES, size=processes.shape)
            draws = np.exp(inner[processes, replicates].mean(axis=1))
            tail = expanded_tail(len(pairs))
            low, high = np.quantile(draws, [tail, 1 - tail])
        return Ratio(value, min(value, float(low)), max(value, float(high)))

    def speedup(self, name: str, reference: str) -> Ratio:
        """How many times faster ``name`` is than ``reference``: the inverse of ``ratio``."""
        return self.ratio(name, reference).inverse

    @property
    def contended(self) -> bool:
        """Other work used the CPU: processes waited > 5 % of the time, or one-thread wall exceeds CPU time by 5 %."""
        pressures = [p.environment["cpu_pressure"] for p in self.processes if "cpu_pressure" in p.environment]
        waiting = bool(pressures) and float(np.median(pressures)) > MAX_PRESSURE
        if self.statistic != "cpu":
            return waiting
        wall_over_cpu = [np.median(self.wall_ms(n) / np.maximum(self.cpu_ms(n), 1e-9)) for n in self.names]
        return waiting or bool(max(wall_over_cpu) > MAX_WALL_OVER_CPU)

    @property
    def drift(self) -> float:
        """Relative change of the reference (the first model) from the first third of a process's calls to the last.

        The median over processes; what differs between processes is no drift.
        """
        changes = []
        for process in self.processes:
            calls = self._samples(process, self.names[0])
            third = max(1, len(calls) // 3)
            changes.append(float(np.median(calls[-third:]) / np.median(calls[:third]) - 1))
        return float(np.median(changes))

    @property
    def drifted(self) -> bool:
        """The reference changed by more than 3 %: the device warmed up or slowed down meanwhile."""
        return abs(self.drift) > MAX_DRIFT

    @property
    def flags(self) -> tuple[str, ...]:
        """What speaks against the absolute times (ratios survive both)."""
        return tuple(name for name, raised in (("contended", self.contended), ("drift", self.drifted)) if raised)

    def to_json(self) -> str:
        """One line with every raw number."""
        return json.dumps({"format": 1, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            DeviceError: the text is something else.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != 1:
                raise ValueError("unknown format")
            processes = tuple(_process(p) for p in data.pop("processes"))
            return cls(**{**data, "names": tuple(data["names"]), "processes": processes})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DeviceError(f"not a benchmark result written by BenchmarkResult.to_json: {error!r}") from error

    def _samples(self, process: Process, name: str, kind: str | None = None) -> FloatArray:
        if name not in process.models:
            raise DeviceError(f"model {name!r} was not measured; measured: {', '.join(self.names)}")
        return np.asarray(getattr(process.models[name], kind or f"{self.statistic}_ms"), dtype=np.float64)

    def _estimate(self, a: FloatArray, b: FloatArray) -> float:
        """Paired samples, shape ``(repeats,)`` each -> latency ratio a / b."""
        return float(np.median(a) / np.median(b) if self.statistic == "cpu" else np.median(a / b))

    def _resampled(self, a: FloatArray, b: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
        """``_estimate`` on ``count`` bootstrap samples, shape ``(count,)``: pairs stay together, neighbours mostly."""
        n = len(a)
        block = round(n ** (1 / 3))
        blocks = -(-n // block)
        draws = np.empty(count)
        chunk = max(1, 2_000_000 // n)  # bounds the memory, not the result's meaning
        for start in range(0, count, chunk):
            size = min(chunk, count - start)
            heads = rng.integers(n, size=(size, blocks, 1))
            picks = ((heads + np.arange(block)) % n).reshape(size, -1)[:, :n]
            if self.statistic == "cpu":
                draws[start : start + size] = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
            else:
                draws[start : start + size] = np.median((a / b)[picks], axis=1)
        return draws


def expanded_tail(clusters: int) -> float:
    """Tail probability of a 95 % percentile interval widened for few clusters (Hesterberg 2015)."""
    t = T_975[clusters - 2] if clusters - 2 < len(T_975) else 1.96 * (1 + 1.25 / (clusters - 1))
    return NormalDist().cdf(-t * (clusters / (clusters - 1)) ** 0.5)


def measure(
    target: Target,
    profile: DeviceProfile,
    models: Mapping[str, Path],
    tier: TierName = "search",
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> BenchmarkResult:
    """Time ONNX files on a device, interleaved, in as many fresh processes as the tier asks for.

    Args:
        models: name -> file; put the reference first.
        progress: called with (processes done, processes in all).

    Raises:
        DeviceError: no models, a missing file, or whatever the target reports.
    """
    if not models:
        raise DeviceError("nothing to measure: give at least one model")
    rules = profile.tier(tier)
    places = {name: target.put(Path(path)) for name, path in models.items()}
    digests = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in models.items()}
    request = {
        "protocol": PROTOCOL,
        "op": "benchmark",
        "models": [{"name": name, "path": places[name], "sha256": digests[name]} for name in models],
        "provider": profile.provider,
        "threads": profile.threads,
        "warmup": rules.warmup,
        "min_repeats": rules.min_repeats,
        "min_seconds": rules.min_seconds,
        "max_seconds": rules.max_seconds,
        "seed": seed,
    }
    processes = []
    for done in range(rules.processes):
        answer = target.run(request, timeout_s=120 + 3 * rules.max_seconds)
        processes.append(_process(answer))
        if progress:
            progress(done + 1, rules.processes)
    cpu_time_tells = profile.threads == 1 and profile.provider == "CPUExecutionProvider"
    return BenchmarkResult(
        profile=profile.name,
        tier=tier,
        names=tuple(models),
        sha256=digests,
        statistic="cpu" if cpu_time_tells else "wall",
        processes=tuple(processes),
        seed=seed,
    )


def _process(data: Mapping[str, Any]) -> Process:
    """From the agent's answer or from JSON."""
    models = {
        name: ModelSamples(**{**raw, "wall_ms": tuple(raw["wall_ms"]), "cpu_ms": tuple(raw["cpu_ms"])})
        for name, raw in data["models"].items()
    }
    return Process(models, data["environment"], data["started"], data["ended"])
