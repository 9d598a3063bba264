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
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.answers import BenchmarkAnswer, ResultHead, SamplesAnswer, parse
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.intervals import (
    MANY_PROCESSES,
    MIN_PROCESSES_TO_STOP,
    Ratio,
    is_look,
    of_processes,
    rounding_of,
)
from secateur.device_profiles.profile import DeviceProfile, Tier
from secateur.device_profiles.runtime import runtime_field
from secateur.device_profiles.target import Target

FloatArray = npt.NDArray[np.float64]
TierName = Literal["search", "final"]

MAX_PRESSURE = 0.05  # share of time in which some process waited for a CPU
MAX_WALL_OVER_CPU = 1.05
MAX_DRIFT = 0.03
MAX_CLOCK_LOSS = 0.05
MAX_ROUNDING = 0.05
"""Half a step of the clock of CPU time, as a share of a call, above which wall time tells more."""
CLEAN = 1.05  # wall over CPU time of a call that nobody interrupted


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
class Second:
    """A second of a sustained run, or one call where that takes longer.

    Args:
        t_s: where it begins, seconds from the run's beginning.
        calls: in it.
        p50_ms, p95_ms: wall time of one of them.
    """

    t_s: float
    calls: int
    p50_ms: float
    p95_ms: float


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
        precision_asked: what layers of floating point were to compute in; None in results of earlier versions.
        precision_used: what layers really computed in, ``fp32`` or several as ``fp32+int8``; None where the runtime
            does not tell.
        sustained: the seconds of a sustained run, where one was asked for.
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
    precision_asked: str | None = None
    precision_used: str | None = None
    sustained: tuple[Second, ...] = ()


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
        temperature = self.environment.get("temperature_c")
        return temperature.get("max") if isinstance(temperature, Mapping) else temperature

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
        statistic: ``cpu`` (ratio of medians of CPU time) or ``wall`` (median of paired wall ratios); every figure that
            is compared with another one comes from this clock.
        processes: one entry per fresh process.
        seed: of the inputs.
        noise_floor: half-width (fraction, 95 %) of a model against itself in one process, as the device's probe found
            it; widens comparisons of measurements of different days (see ``secateur.pipeline.lifecycle.reprofile``).
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

    def compared_ms(self, name: str, q: float) -> float:
        """Percentile ``q`` (0-100) of a call by the clock that ratios come from, so that a result's figures agree."""
        return float(np.percentile(self.cpu_ms(name) if self.statistic == "cpu" else self.wall_ms(name), q))

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
        energies = [p.models[name].energy_mj for p in self.processes]
        known = [value for value in energies if value is not None]
        return float(np.median(known)) if known else None

    def precision(self, name: str) -> str | None:
        """What a model's layers really computed in; None where the runtime does not tell."""
        return self.processes[-1].models[name].precision_used

    @property
    def environment(self) -> Mapping[str, Any]:
        """The device as the last process saw it."""
        return self.processes[-1].environment

    def ratio(self, name: str, reference: str) -> Ratio:
        """Latency of ``name`` / latency of ``reference``, with Student's 95 % interval over processes.

        Under three processes it is a point estimate: one process cannot tell what another would have found.

        Raises:
            DeviceError: a model was not measured.
        """
        pairs = [(self._samples(p, name), self._samples(p, reference)) for p in self.processes]
        if name == reference:
            return Ratio(1.0, 1.0, 1.0)
        estimates = [self._estimate(a, b) for a, b in pairs]
        return of_processes(estimates, max(rounding_of(a, b) for a, b in pairs))

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
            processes = data.pop("processes")
            head = parse(ResultHead, data).model_dump(exclude={"format"})
            made = cls(**head, processes=tuple(_process(process, head["names"]) for process in processes))
            if not made.processes:
                raise ValueError("no process")
            return made
        except (DeviceError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DeviceError(f"not a benchmark result written by BenchmarkResult.to_json: {error!r}") from error

    def _samples(self, process: Process, name: str, kind: str | None = None) -> FloatArray:
        if name not in process.models:
            raise DeviceError(f"model {name!r} was not measured; measured: {', '.join(self.names)}")
        return np.asarray(getattr(process.models[name], kind or f"{self.statistic}_ms"), dtype=np.float64)

    def _estimate(self, a: FloatArray, b: FloatArray) -> float:
        """Paired samples, shape ``(repeats,)`` each -> latency ratio a / b."""
        return float(np.median(a) / np.median(b) if self.statistic == "cpu" else np.median(a / b))


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
    until: Callable[[BenchmarkResult], bool] | None = None,
    inputs: Path | None = None,
    precisions: Mapping[str, str] | None = None,
    sustain_s: float = 0.0,
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
            seven processes at least, instead of the tier's number of processes.
        seconds: with ``half_width``: when to stop anyway.
        until: asked after the tier's number of processes, and each time it has doubled, whether the result decides what
            it was made for; ends at the tier's ``max_processes`` anyway.
        inputs: ``.npz`` with an array for every input of the models, where their latency depends on the values; None =
            random ones.
        precisions: name -> what a model's layers of floating point are to compute in, where that is not fp32.
        sustain_s: seconds in which each model is called without a pause, in every process, when all else is done.

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
    limit_s += 2 * sustain_s * len(models)
    request: dict[str, Any] = {
        "protocol": PROTOCOL,
        "op": "benchmark",
        "models": [
            {"name": name, "path": places[name], "sha256": digests[name], **_asked(name, precisions)} for name in models
        ],
        **runtime_field(profile),
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
        **({"sustain_s": sustain_s} if sustain_s else {}),
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
    while not _enough(result, rules, half_width, seconds, time.monotonic() - begin, until):
        if profile.cool_down_s and (result.processes or result.spoiled):
            time.sleep(profile.cool_down_s)
        turn = len(result.processes) + len(result.spoiled)
        order = request["models"][:: -1 if turn % 2 else 1]  # what is loaded first tends to be slower by half a percent
        process = _process(target.run({**request, "models": order}, timeout_s=limit_s + 30), result.names)
        if _too_coarse(process):
            result = replace(result, statistic="wall")
        faults = _faults(replace(result, processes=(process,)), rules)
        if faults and len(result.spoiled) < rules.retries:
            result = replace(result, spoiled=(*result.spoiled, ", ".join(faults)))
            continue
        disturbed = (*result.disturbed, ", ".join(faults)) if faults and rules.retries else result.disturbed
        result = replace(result, processes=(*result.processes, process), disturbed=disturbed)
        if progress:
            progress(len(result.processes), max(rules.processes, len(result.processes)))
    return result


def _asked(name: str, precisions: Mapping[str, str] | None) -> dict[str, str]:
    """What a request says of a model's precision: nothing where it is fp32."""
    asked = (precisions or {}).get(name, "fp32")
    return {} if asked == "fp32" else {"precision": asked}


def _enough(
    result: BenchmarkResult,
    rules: Tier,
    half_width: float | None,
    seconds: float | None,
    elapsed_s: float,
    until: Callable[[BenchmarkResult], bool] | None,
) -> bool:
    """Whether a measurement can end."""
    count = len(result.processes)
    if half_width is None:
        if until is None or count >= max(rules.processes, rules.max_processes):
            return count >= rules.processes
        return is_look(count, rules.processes) and until(result)
    if count and elapsed_s >= (math.inf if seconds is None else seconds):
        return True
    if count >= MANY_PROCESSES or not is_look(count, MIN_PROCESSES_TO_STOP):
        return count >= MANY_PROCESSES
    ratios = [result.ratio(name, result.names[0]) for name in result.names[1:]]
    return all(ratio.half_width / ratio.value <= half_width for ratio in ratios)


def _too_coarse(process: Process) -> bool:
    """Whether the device's clock of CPU time has steps too large for a call of some model."""
    samples = [np.asarray(model.cpu_ms) for model in process.models.values()]
    return any(np.median(cpu) <= 0 or rounding_of(cpu) > MAX_ROUNDING for cpu in samples)


def _faults(alone: BenchmarkResult, rules: Tier) -> list[str]:
    """Why a process does not count, given as a result of its own."""
    checks = {"throttled": alone.throttled}
    if rules.strict:
        checks |= {"contended": alone.contended, "drift": alone.drifted}
    return [name for name, raised in checks.items() if raised]


def _process(data: Any, names: Sequence[str]) -> Process:
    """From the agent's answer or from JSON.

    Raises:
        DeviceError: a field is not what it has to be, or a model is missing.
    """
    answer = parse(BenchmarkAnswer, data)
    missing = [name for name in names if name not in answer.models]
    if missing:
        raise DeviceError(f"the device gave an answer that is none: nothing about {missing[0]!r}", "bad-answer")
    models = {name: _samples_of(answer.models[name]) for name in names}
    told = {name: fact for name, fact in data["environment"].items() if name != "host"}  # as earlier versions wrote it
    return Process(models, told, answer.started, answer.ended)


def _samples_of(answer: SamplesAnswer) -> ModelSamples:
    nodes = tuple(Node(n.name, n.op, n.ms, n.input_shapes, n.output_shapes) for n in answer.nodes)
    seconds = tuple(Second(each.t_s, each.calls, each.p50_ms, each.p95_ms) for each in answer.sustained)
    fields = {name: getattr(answer, name) for name in ModelSamples.__dataclass_fields__}
    return ModelSamples(**{**fields, "nodes": nodes, "sustained": seconds})
