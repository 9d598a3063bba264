"""What was measured, and how sure we are of it.

The unit is the ratio to a reference model timed in turn with it in the same process. With one thread on a CPU the ratio
is taken of CPU time, which other load hardly touches (0.2-0.5 % spread at a load of 8, where wall time has 20-40 %);
otherwise of paired wall times. Both are always kept, and so is every single latency.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from device_profiles.agent import PROTOCOL
from device_profiles.errors import DeviceError
from device_profiles.profile import DeviceProfile, Tier
from device_profiles.target import Target

FloatArray = npt.NDArray[np.float64]
TierName = Literal["search", "final"]

RESAMPLES = 2000
INNER_RESAMPLES = 200
MAX_PRESSURE = 0.05  # share of time in which some process waited for a CPU
MAX_WALL_OVER_CPU = 1.05
MAX_DRIFT = 0.03
MAX_CLOCK_LOSS = 0.05
CLEAN = 1.05  # wall over CPU time of a call that nobody interrupted
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
class Node:
    """One operator of a model as the runtime ran it (after its own fusions).

    Args:
        name: the runtime's name for it.
        op: its type (``Conv`` ...).
        ms: the shortest of its calls.
        input_shapes: of its inputs, weights included; the runtime may report them padded to its blocks.
        output_shapes: of its outputs.
    """

    name: str
    op: str
    ms: float
    input_shapes: tuple[tuple[int, ...], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()


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
        warmup_calls: untimed calls before the first timed one.
        steady: whether the warm-up ended because calls had become steady.
        energy_mj: millijoules of one call, alone; None where the device counts no energy.
        nodes: per operator, where a profile was asked for.
    """

    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    load_ms: float
    first_ms: float
    output_sha256: str
    peak_rss_bytes: int | None = None
    warmup_calls: int | None = None
    steady: bool | None = None
    energy_mj: float | None = None
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Process:
    """One fresh process: all models interleaved, and the state of the device around it."""

    models: Mapping[str, ModelSamples]
    environment: Mapping[str, Any]
    started: float
    ended: float

    def drift(self, name: str, kind: str) -> float:
        """Relative change of a model's latency from the first third of its calls to the last.

        Args:
            kind: ``wall_ms`` or ``cpu_ms``.
        """
        calls = np.asarray(getattr(self.models[name], kind))
        third = max(1, len(calls) // 3)
        return float(np.median(calls[-third:]) / np.median(calls[:third]) - 1)

    @property
    def pressure(self) -> float | None:
        """Share of the time in which some process of the device waited for a CPU; None where it is not told."""
        return self.environment.get("cpu_pressure")

    @property
    def temperature_c(self) -> float | None:
        """The highest temperature seen, degrees Celsius; None where no sensor can be read."""
        found = self.environment.get("temperature_c")
        return found.get("max") if isinstance(found, Mapping) else found

    @property
    def throttled(self) -> bool:
        """The device said that it slowed itself down, or its clock fell by more than 5 % while models were timed."""
        samples = [s for s in self.environment.get("telemetry", ()) if isinstance(s, Mapping)]
        clocks = [s["freq_mhz"] for s in samples if s.get("phase") == "timing" and s.get("freq_mhz")]
        slower = len(clocks) > 1 and clocks[-1] < (1 - MAX_CLOCK_LOSS) * max(clocks)
        return bool(self.environment.get("throttled")) or slower


@dataclass(frozen=True)
class BenchmarkResult:
    """Every raw number of a measurement; statistics are derived when asked.

    Args:
        profile: the profile's name.
        tier: ``search``, ``final`` or ``custom``.
        names: the models in the order they were timed; the first is the one that drift is judged by.
        sha256: file digest per model.
        statistic: ``cpu`` (ratio of medians of CPU time) or ``wall`` (median of paired wall ratios).
        processes: one entry per fresh process.
        seed: of the inputs and of the bootstrap.
        noise_floor: half-width (fraction, 95 %) of a model against itself in one process, as the device's probe found
            it; widens intervals from one process, which cannot see what differs between processes.
        max_temperature_c: the profile's limit.
        spoiled: what was wrong with each process that was thrown away and measured again.
        disturbed: what is wrong with processes that count all the same, because no more were to be thrown away.
    """

    profile: str
    tier: str
    names: tuple[str, ...]
    sha256: Mapping[str, str]
    statistic: Literal["cpu", "wall"]
    processes: tuple[Process, ...]
    seed: int = 0
    noise_floor: float | None = None
    max_temperature_c: float | None = None
    spoiled: tuple[str, ...] = ()
    disturbed: tuple[str, ...] = ()

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

    def calibrated_ms(self, name: str) -> float:
        """What a call takes on an idle device: the median wall time of calls that nobody interrupted.

        On one CPU thread those are the calls whose wall time is within 5 % of their CPU time; where they are fewer
        than one in ten, the median CPU time stands for them. Otherwise the median wall time.
        """
        wall, cpu = self.wall_ms(name), self.cpu_ms(name)
        if self.statistic != "cpu":
            return float(np.median(wall))
        clean = wall[wall <= CLEAN * cpu]
        return float(np.median(clean)) if len(clean) >= 0.1 * len(wall) else float(np.median(cpu))

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

    def energy_mj(self, name: str) -> float | None:
        """Median over processes of the energy of one call, millijoules; None where the device counts none."""
        found = [p.models[name].energy_mj for p in self.processes]
        known = [value for value in found if value is not None]
        return float(np.median(known)) if known else None

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
            low, high = (value * np.exp(-self._with_floor(value, low)), value * np.exp(self._with_floor(value, high)))
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
        pressures = [p.pressure for p in self.processes if p.pressure is not None]
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
        return float(np.median([p.drift(self.names[0], f"{self.statistic}_ms") for p in self.processes]))

    @property
    def drifted(self) -> bool:
        """The reference changed by more than 3 %: the device warmed up or slowed down meanwhile."""
        return abs(self.drift) > MAX_DRIFT

    @property
    def throttled(self) -> bool:
        """The device slowed itself down in a process, or was hotter than its profile allows."""
        limit = self.max_temperature_c
        hot = limit is not None and any((p.temperature_c or 0.0) > limit for p in self.processes)
        return hot or any(p.throttled for p in self.processes)

    @property
    def clock_jumped(self) -> bool:
        """The device's wall clock was set meanwhile; latencies do not depend on it, dates do."""
        return any(abs(p.environment.get("clock_jump_s", 0.0)) > 1.0 for p in self.processes)

    @property
    def unstable(self) -> bool:
        """Processes were measured again until the bound was reached, and some that count are still disturbed."""
        return bool(self.disturbed)

    @property
    def flags(self) -> tuple[str, ...]:
        """What speaks against the absolute times (ratios survive all but ``throttled``)."""
        named = {
            "contended": self.contended,
            "drift": self.drifted,
            "throttled": self.throttled,
            "clock-jump": self.clock_jumped,
            "unstable": self.unstable,
        }
        return tuple(name for name, raised in named.items() if raised)

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
            processes = tuple(_process(p, data["names"]) for p in data.pop("processes"))
            lists = {key: tuple(data[key]) for key in ("names", "spoiled", "disturbed") if key in data}
            return cls(**{**data, **lists, "processes": processes})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DeviceError(f"not a benchmark result written by BenchmarkResult.to_json: {error!r}") from error

    def _samples(self, process: Process, name: str, kind: str | None = None) -> FloatArray:
        if name not in process.models:
            raise DeviceError(f"model {name!r} was not measured; measured: {', '.join(self.names)}")
        return np.asarray(getattr(process.models[name], kind or f"{self.statistic}_ms"), dtype=np.float64)

    def _with_floor(self, value: float, bound: float) -> float:
        """Distance of a bound from the value in logarithms, with the noise floor added."""
        return float(np.hypot(np.log(bound / value), self.noise_floor or 0.0))

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
    tier: TierName | Tier = "search",
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
    *,
    nodes: bool = False,
    energy: bool = False,
    noise_floor: float | None = None,
    half_width: float | None = None,
    seconds: float | None = None,
    inputs: Path | None = None,
) -> BenchmarkResult:
    """Time ONNX files on a device, interleaved, in as many fresh processes as the tier asks for.

    A process in which the device slowed itself down (and, at a strict tier, was busy or drifted) is thrown away and
    measured again, up to ``retries`` times in all; after that the result says ``unstable``.

    Args:
        models: name -> file; put the reference first.
        progress: called with (processes done, processes in all).
        nodes: also time every operator of every model.
        energy: also take the energy of a call, where the device counts it.
        noise_floor: see ``BenchmarkResult``.
        half_width: go on until the 95 % interval of every ratio to the first model is no wider than +- this fraction,
            three processes at least, instead of the tier's number of processes.
        seconds: with ``half_width``: when to stop anyway.
        inputs: ``.npz`` with an array for every input of the models, where their latency depends on the values; None =
            random ones.

    Raises:
        DeviceError: no models, a missing file, a device whose times mean nothing, or whatever the target reports.
    """
    if not models:
        raise DeviceError("nothing to measure: give at least one model", "bad-request")
    if not profile.timing:
        raise DeviceError(
            f"device profile {profile.name} is emulated (timing: false): its times say nothing about a device",
            "profile",
        )
    rules = tier if isinstance(tier, Tier) else profile.tier(tier)
    places = {name: target.put(Path(path)) for name, path in models.items()}
    digests = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in models.items()}
    limit_s = 120 + 3 * (rules.max_seconds + rules.max_warmup_seconds) * (2 if nodes or energy else 1)
    request: dict[str, Any] = {
        "protocol": PROTOCOL,
        "op": "benchmark",
        "models": [{"name": name, "path": places[name], "sha256": digests[name]} for name in models],
        "provider": profile.provider,
        "threads": profile.threads,
        "warmup": rules.warmup,
        "max_warmup_seconds": rules.max_warmup_seconds,
        "min_repeats": rules.min_repeats,
        "min_seconds": rules.min_seconds,
        "max_seconds": rules.max_seconds,
        "seed": seed,
        "profile": nodes,
        "energy": energy,
        "timeout_s": limit_s,
        **({} if inputs is None else {"inputs": target.put(inputs)}),
    }
    cpu_time_tells = profile.threads == 1 and profile.provider == "CPUExecutionProvider"
    result = BenchmarkResult(
        profile=profile.name,
        tier="custom" if isinstance(tier, Tier) else tier,
        names=tuple(models),
        sha256=digests,
        statistic="cpu" if cpu_time_tells else "wall",
        processes=(),
        seed=seed,
        noise_floor=noise_floor,
        max_temperature_c=profile.max_temperature_c,
    )
    begin = time.monotonic()
    while not _enough(result, rules, half_width, seconds, time.monotonic() - begin):
        if profile.cool_down_s and (result.processes or result.spoiled):
            time.sleep(profile.cool_down_s)
        turn = len(result.processes) + len(result.spoiled)
        order = request["models"][:: -1 if turn % 2 else 1]  # what is loaded first tends to be slower by half a percent
        process = _process(target.run({**request, "models": order}, timeout_s=limit_s + 30), result.names)
        faults = _faults(replace(result, processes=(process,)), rules)
        if faults and len(result.spoiled) < rules.retries:
            result = replace(result, spoiled=(*result.spoiled, ", ".join(faults)))
            continue
        disturbed = (*result.disturbed, ", ".join(faults)) if faults and rules.retries else result.disturbed
        result = replace(result, processes=(*result.processes, process), disturbed=disturbed)
        if progress:
            progress(len(result.processes), max(rules.processes, len(result.processes)))
    return result


def _enough(
    result: BenchmarkResult, rules: Tier, half_width: float | None, seconds: float | None, elapsed_s: float
) -> bool:
    """Whether a measurement can end."""
    count = len(result.processes)
    if half_width is None:
        return count >= rules.processes
    if count and elapsed_s >= (math.inf if seconds is None else seconds):
        return True
    if count < 3:
        return False
    ratios = [result.ratio(name, result.names[0]) for name in result.names[1:]]
    return all(ratio.half_width / ratio.value <= half_width for ratio in ratios)


def _faults(alone: BenchmarkResult, rules: Tier) -> list[str]:
    """Why a process does not count, given as a result of its own."""
    checks = {"throttled": alone.throttled}
    if rules.strict:
        checks |= {"contended": alone.contended, "drift": alone.drifted}
    return [name for name, raised in checks.items() if raised]


def _process(data: Mapping[str, Any], names: Sequence[str]) -> Process:
    """From the agent's answer or from JSON.

    Raises:
        DeviceError: the answer is not about these models, or its latencies are no positive numbers.
    """
    try:
        models = {name: _samples_of(data["models"][name]) for name in names}
        return Process(models, dict(data["environment"]), float(data["started"]), float(data["ended"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeviceError(f"the device gave an answer that is none: {error!r}", "bad-answer") from error


def _samples_of(raw: Mapping[str, Any]) -> ModelSamples:
    known = {key: value for key, value in raw.items() if key in ModelSamples.__dataclass_fields__}
    wall, cpu = (tuple(float(value) for value in raw[kind]) for kind in ("wall_ms", "cpu_ms"))
    if not wall or len(wall) != len(cpu):
        raise ValueError(f"{len(wall)} wall and {len(cpu)} CPU times")
    if not (all(math.isfinite(v) and v > 0 for v in wall) and all(math.isfinite(v) and v >= 0 for v in cpu)):
        raise ValueError("latencies must be positive numbers")
    nodes = tuple(
        Node(
            str(n["name"]),
            str(n["op"]),
            float(n["ms"]),
            tuple(tuple(int(d) for d in shape) for shape in n.get("input_shapes", ())),
            tuple(tuple(int(d) for d in shape) for shape in n.get("output_shapes", ())),
        )
        for n in raw.get("nodes") or ()
    )
    return ModelSamples(**{**known, "wall_ms": wall, "cpu_ms": cpu, "nodes": nodes})
