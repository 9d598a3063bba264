from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.device_profiles import BenchmarkResult, DeviceError, Ratio, Tier, measure
from secateur.device_profiles.measure import ModelSamples, Node, Process
from tests.device_profiles.tiny import quick_profile, synthetic


class FakeTarget:
    """Answers with rising latencies; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def put(self, path: Path) -> str:
        return f"/device/{path.name}"

    def run(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.requests.append(request)
        n = len(self.requests)
        raw = {
            "wall_ms": [n, n + 1, n + 2],
            "cpu_ms": [n, n + 1e-6, n + 2e-6],
            "load_ms": 1.0,
            "first_ms": 2.0,
            "output_sha256": "f",
        }
        models = {model["name"]: raw for model in request["models"]}
        return {"models": models, "environment": {"run": n}, "started": 0.0, "ended": 1.0}

    def close(self) -> None: ...


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    return {name: tmp_path / name for name in "ab"}


def test_measure_asks_once_per_process_and_keeps_every_sample(files):
    target, seen = FakeTarget(), []
    tier = {"processes": 3, "warmup": 4, "min_repeats": 5, "min_seconds": 0.1, "strict": False}  # the fake is contended
    result = measure(
        target, quick_profile(final=tier), files, "final", lambda done, total: seen.append((done, total)), seed=7
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(target.requests) == 3
    request = target.requests[0]
    assert [m["name"] for m in request["models"]] == ["a", "b"]
    assert request["models"][0]["path"] == "/device/a"
    assert len(request["models"][0]["sha256"]) == 64
    assert (request["warmup"], request["min_repeats"], request["seed"]) == (4, 5, 7)
    assert result.wall_ms("a").tolist() == [1, 2, 3, 2, 3, 4, 3, 4, 5]
    assert result.p50_ms("a") == 3
    assert result.p95_ms("a") == np.percentile([1, 2, 3, 2, 3, 4, 3, 4, 5], 95)
    assert result.environment == {"run": 3}
    assert result.peak_rss_bytes("a") is None  # absent, never zero


def test_statistic_is_cpu_time_only_for_one_cpu_thread(files):
    assert measure(FakeTarget(), quick_profile(), files).statistic == "cpu"
    assert measure(FakeTarget(), quick_profile(threads=2), files).statistic == "wall"
    assert measure(FakeTarget(), quick_profile(provider="XExecutionProvider"), files).statistic == "wall"
    with pytest.raises(DeviceError, match="at least one model"):
        measure(FakeTarget(), quick_profile(), {})


def test_ratio_of_a_known_difference():
    result = synthetic(true_ratio=0.8, repeats=200, processes=7)
    ratio = result.ratio("b", "a")
    assert ratio.low < 0.8 < ratio.high
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.half_width < 0.01
    speedup = result.speedup("b", "a")
    assert (speedup.value, speedup.low, speedup.high) == (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)


@pytest.mark.parametrize("processes", [1, 2])
def test_under_three_processes_a_ratio_is_a_point_estimate(processes: int):
    result = synthetic(true_ratio=0.8, repeats=200, processes=processes)
    for ratio in (result.ratio("b", "a"), result.speedup("b", "a").inverse):
        assert ratio.value == pytest.approx(0.8, rel=0.01)
        assert (ratio.known, ratio.low, ratio.high) == (False, 0.0, math.inf)
        assert "point estimate" in str(ratio)
        assert ratio.ends == {"value": ratio.value}


def test_wall_statistic_pairs_iterations():
    result = synthetic(true_ratio=0.5, noise=0.0, statistic="wall", processes=3)
    slow = np.ones(60)
    slow[:30] = 3.0  # both models disturbed alike: the pairs still tell the truth
    for process in result.processes:
        for samples in process.models.values():
            object.__setattr__(samples, "wall_ms", tuple((np.array(samples.wall_ms) * slow).tolist()))
    assert result.ratio("b", "a").value == pytest.approx(0.5)


def test_the_same_answer_every_time():
    assert synthetic(processes=3).ratio("b", "a") == synthetic(processes=3).ratio("b", "a")
    assert synthetic().ratio("a", "a") == Ratio(1.0, 1.0, 1.0)
    with pytest.raises(DeviceError, match="'c' was not measured; measured: a, b"):
        synthetic().ratio("c", "a")


def test_flags():
    assert synthetic().flags == ()
    busy = synthetic(processes=3)
    for process in busy.processes:
        process.environment["cpu_pressure"] = 0.4
    assert busy.contended
    preempted = synthetic()
    samples = preempted.processes[0].models["b"]
    object.__setattr__(samples, "wall_ms", tuple(2 * x for x in samples.wall_ms))
    assert preempted.contended
    heating = synthetic()
    samples = heating.processes[0].models["a"]
    object.__setattr__(samples, "cpu_ms", tuple(x * (1 + i / 300) for i, x in enumerate(samples.cpu_ms)))
    assert heating.drifted
    assert "drift" in heating.flags


def test_json_round_trip():
    result = synthetic(processes=2)
    again = BenchmarkResult.from_json(result.to_json())
    assert again == result
    assert again.ratio("b", "a") == result.ratio("b", "a")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "processes": []}'])
def test_json_of_something_else(text: str):
    with pytest.raises(DeviceError, match=r"BenchmarkResult\.to_json"):
        BenchmarkResult.from_json(text)


def test_a_newer_agent_may_tell_more():
    data = json.loads(synthetic().to_json())
    data["processes"][0]["models"]["a"]["p50"] = 1
    assert BenchmarkResult.from_json(json.dumps(data)) == synthetic()


# -- processes that do not count


class ScriptedTarget(FakeTarget):
    """Answers with the environments it is given, the last one for ever; ``wall_ms`` of a call may be stretched.

    Args:
        environments: one per process.
        drift: the last third of the calls takes so much longer (fraction), per process.
        noise: standard deviation of the logarithm of a call.
    """

    def __init__(self, *environments: dict[str, Any], drift: tuple[float, ...] = (0.0,), noise: float = 0.0) -> None:
        super().__init__()
        self.environments, self.drift, self.noise = environments or ({},), drift, noise

    def run(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        n = len(self.requests)
        self.requests.append(request)
        rng, models = np.random.default_rng(n), {}
        slower = 1 + 1e-6 * np.arange(30)  # a clock that never differs would tell nothing
        slower[20:] += self.drift[min(n, len(self.drift) - 1)]
        for model in request["models"]:
            ms = (10 * slower * np.exp(rng.normal(0, self.noise, 30))).tolist()
            models[model["name"]] = {
                **{"wall_ms": ms, "cpu_ms": ms, "load_ms": 1.0, "first_ms": 2.0, "output_sha256": "f"}
            }
        environment = {"run": n, **self.environments[min(n, len(self.environments) - 1)]}
        return {"models": models, "environment": environment, "started": 0.0, "ended": 1.0}


THROTTLED = {"throttled": True}
BUSY = {"cpu_pressure": 0.5}
STRICT = Tier(processes=2, warmup=0, min_repeats=3, min_seconds=0, strict=True, retries=3)
LENIENT = STRICT.model_copy(update={"strict": False})


@pytest.mark.parametrize(
    ("environment", "drift", "fault"), [(THROTTLED, 0.0, "throttled"), (BUSY, 0.0, "contended"), ({}, 0.1, "drift")]
)
def test_a_spoiled_process_is_thrown_away_and_measured_again(files, environment, drift, fault):
    target = ScriptedTarget(environment, {}, environment, {}, drift=(drift, 0.0, drift, 0.0))
    result = measure(target, quick_profile(), files, STRICT)
    assert len(target.requests) == 4
    assert [process.environment["run"] for process in result.processes] == [1, 3]
    assert result.spoiled == (fault, fault)
    assert result.flags == ()


@pytest.mark.parametrize(("environment", "drift"), [(BUSY, 0.0), ({}, 0.1)])
def test_a_lenient_tier_keeps_what_only_other_work_disturbed(files, environment, drift):
    target = ScriptedTarget(environment, drift=(drift,))
    result = measure(target, quick_profile(), files, LENIENT)
    assert len(target.requests) == 2
    assert result.spoiled == ()
    assert not result.unstable
    assert result.flags  # it is said all the same


@pytest.mark.parametrize("tier", [STRICT, LENIENT])
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_device_that_never_calms_down_is_measured_and_called_unstable(files, tier, retries):
    target = ScriptedTarget(THROTTLED)
    result = measure(target, quick_profile(), files, tier.model_copy(update={"retries": retries}))
    assert len(target.requests) == 2 + retries
    assert len(result.spoiled) == retries
    assert len(result.processes) == 2
    assert result.unstable == (retries > 0)
    assert "throttled" in result.flags
    assert BenchmarkResult.from_json(result.to_json()) == result


def test_every_fault_of_a_process_is_named(files):
    result = measure(ScriptedTarget(THROTTLED | BUSY, {}, drift=(0.1, 0.0)), quick_profile(), files, STRICT)
    assert result.spoiled == ("throttled, contended, drift",)


def process(**environment: Any) -> Process:
    samples = ModelSamples((10.0,) * 9, (10.0,) * 9, 1.0, 10.0, "00")
    return Process({"a": samples, "b": samples}, environment, 0.0, 1.0)


def clocks(*mhz: float | None, phase: str = "timing") -> list[dict[str, Any]]:
    return [{"freq_mhz": value, "phase": phase} for value in mhz]


@pytest.mark.parametrize(
    ("environment", "throttled"),
    [
        ({}, False),
        ({"throttled": False}, False),
        ({"throttled": True}, True),
        ({"telemetry": clocks(1500, 1500, 1440)}, False),
        ({"telemetry": clocks(1500, 1500, 1420)}, True),
        ({"telemetry": clocks(600, 1500, 1500)}, False),  # it only woke up
        ({"telemetry": clocks(1500)}, False),
        ({"telemetry": clocks(1500, 1500) + clocks(600, phase="end")}, False),  # it fell asleep
        ({"telemetry": clocks(2400, phase="start") + clocks(1500, 1500)}, False),
        ({"telemetry": clocks(None, None)}, False),
        ({"telemetry": ["?", None]}, False),
    ],
)
def test_a_device_is_throttled_if_it_says_so_or_its_clock_falls(environment, throttled):
    assert process(**environment).throttled is throttled


@pytest.mark.parametrize("temperature", [81.0, {"start": 50.0, "max": 81.0}])
def test_a_process_hotter_than_the_profile_allows_does_not_count(files, temperature):
    target = ScriptedTarget({"temperature_c": temperature}, {"temperature_c": 60.0})
    result = measure(target, quick_profile(max_temperature_c=80.0), files)
    assert result.spoiled == ("throttled",)
    assert not result.throttled
    assert measure(ScriptedTarget({"temperature_c": temperature}), quick_profile(), files).spoiled == ()
    assert measure(ScriptedTarget({}), quick_profile(max_temperature_c=80.0), files).spoiled == ()


def test_the_device_rests_between_processes(files, monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    measure(ScriptedTarget(THROTTLED, {}), quick_profile(cool_down_s=7.5), files, LENIENT)
    assert naps == [7.5, 7.5]  # three processes, one of them spoiled
    naps.clear()
    measure(ScriptedTarget(), quick_profile(), files, LENIENT)
    assert naps == []


# -- how long to measure


def test_measuring_goes_on_until_the_interval_is_narrow_enough(files):
    target = ScriptedTarget(noise=0.02)
    result = measure(target, quick_profile(), files, LENIENT, half_width=0.012)
    ratio = result.ratio("b", "a")
    assert len(result.processes) > 3
    assert ratio.half_width / ratio.value <= 0.012
    fewer = replace(result, processes=result.processes[: len(result.processes) // 2]).ratio("b", "a")
    assert fewer.half_width / fewer.value > 0.012 or len(result.processes) == 7
    assert len(result.processes) in (7, 14, 28, 56)  # few looks: each is a chance to be narrow by luck


def test_seven_processes_at_least_speak_for_a_narrow_interval(files):
    seen: list[tuple[int, int]] = []
    target = ScriptedTarget()
    measure(target, quick_profile(), files, LENIENT, lambda *done: seen.append(done), half_width=0.5)
    assert len(target.requests) == 7
    assert seen == [(1, 2), (2, 2), *((n, n) for n in range(3, 8))]


def test_measuring_goes_on_while_a_comparison_is_undecided_and_ends_at_the_bound(files):
    counts: list[int] = []

    def decided(result: BenchmarkResult) -> bool:
        counts.append(len(result.processes))
        return len(result.processes) >= 6

    tier = LENIENT.model_copy(update={"processes": 3, "max_processes": 9})
    assert len(measure(ScriptedTarget(), quick_profile(), files, tier, until=decided).processes) == 6
    assert counts == [3, 6]
    assert len(measure(ScriptedTarget(), quick_profile(), files, tier, until=lambda result: False).processes) == 9
    assert len(measure(ScriptedTarget(), quick_profile(), files, LENIENT, until=lambda result: False).processes) == 2


def test_measuring_ends_in_time_however_wide_the_interval(files, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    target = ScriptedTarget(noise=0.5)
    measure(target, quick_profile(), files, LENIENT, half_width=1e-6, seconds=5)
    assert len(target.requests) == 4  # looked at the clock after 1, 2, 3, 4 and 5 seconds
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 0.0)
        assert len(measure(ScriptedTarget(), quick_profile(), files, LENIENT, seconds=0.1).processes) == 2


# -- figures


def timed(wall: list[float], cpu: list[float], statistic: str = "cpu") -> BenchmarkResult:
    samples = ModelSamples(tuple(wall), tuple(cpu), 1.0, 1.0, "00")
    return replace(synthetic(), names=("a",), statistic=statistic, processes=(Process({"a": samples}, {}, 0.0, 1.0),))


def test_calibrated_time_is_that_of_calls_nobody_interrupted():
    assert timed([10.1, 10.3, 30, 40, 50], [10] * 5).calibrated_ms("a") == pytest.approx(10.2)
    assert timed([30] * 19 + [10.2], [10] * 20).calibrated_ms("a") == 10  # one clean call in twenty proves nothing
    assert timed([30] * 9 + [10.2], [10] * 10).calibrated_ms("a") == 10.2
    assert timed([30, 30, 10.2], [10] * 3, "wall").calibrated_ms("a") == 30


def test_a_measurement_is_given_the_noise_floor_and_the_limit_of_its_device(files):
    result = measure(ScriptedTarget(), quick_profile(max_temperature_c=70.0), files, noise_floor=0.05)
    assert (result.noise_floor, result.max_temperature_c) == (0.05, 70.0)


# -- answers that are none


def spoil(change: Callable[[dict[str, Any]], Any]) -> FakeTarget:
    target = FakeTarget()
    honest = target.run
    target.run = lambda request, timeout_s: change(honest(request, timeout_s))  # type: ignore[method-assign]
    return target


def with_samples(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: answer | {"models": {**answer["models"], "b": {**answer["models"]["b"], **changes}}}


def in_environment(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """The answer with other facts of the device."""
    return lambda answer: answer | {"environment": {**answer["environment"], **changes}}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


BAD = {
    "text": lambda answer: "all went well",
    "nothing": lambda answer: None,
    "a list": lambda answer: [answer],
    "empty": lambda answer: {},
    "no model b": lambda answer: answer | {"models": {"a": answer["models"]["a"]}},
    "model is text": lambda answer: answer | {"models": {"a": answer["models"]["a"], "b": "fast"}},
    "no environment": lambda answer: {k: v for k, v in answer.items() if k != "environment"},
    "environment is text": lambda answer: answer | {"environment": "warm"},
    "no start": lambda answer: {k: v for k, v in answer.items() if k != "started"},
    "no calls": with_samples(wall_ms=[], cpu_ms=[]),
    "unequal lengths": with_samples(wall_ms=[1.0, 2.0]),
    "NaN": with_samples(wall_ms=[1.0, math.nan, 2.0]),
    "infinite": with_samples(cpu_ms=[1.0, math.inf, 2.0]),
    "zero": with_samples(wall_ms=[1.0, 0.0, 2.0]),
    "negative": with_samples(wall_ms=[1.0, -1.0, 2.0]),
    "negative CPU time": with_samples(cpu_ms=[1.0, -1.0, 2.0]),
    "latencies are text": with_samples(wall_ms=["fast", "fast", "slow"]),
    "latency is a number": with_samples(wall_ms=3.0),
    "an operator is text": with_samples(nodes=["Conv"]),
    "an operator without a time": with_samples(nodes=[{"name": "n", "op": "Conv"}]),
    "an operator of negative time": with_samples(nodes=[{"name": "n", "op": "Conv", "ms": -1.0}]),
    "an operator named by a number": with_samples(nodes=[{"name": 7, "op": "Conv", "ms": 1.0}]),
    "a negative width": with_samples(nodes=[{"name": "n", "op": "Conv", "ms": 1.0, "input_shapes": [[1, -3]]}]),
    "a width that is text": with_samples(nodes=[{"name": "n", "op": "Conv", "ms": 1.0, "input_shapes": [["N"]]}]),
    "an operator that clears the screen": with_samples(nodes=[{"name": "\x1b[2J", "op": "Conv", "ms": 1.0}]),
    "negative memory": with_samples(peak_rss_bytes=-1),
    "no memory": with_samples(peak_rss_bytes=0),
    "half a byte": with_samples(peak_rss_bytes=1000.5),
    "memory beyond any machine": with_samples(peak_rss_bytes=2**60),
    "memory is text": with_samples(peak_rss_bytes="1000"),
    "memory is true": with_samples(peak_rss_bytes=True),
    "latencies are truths": with_samples(wall_ms=[True, True, True]),
    "a latency of centuries": with_samples(wall_ms=[1.0, 1e300, 2.0]),
    "negative loading": with_samples(load_ms=-5.0),
    "loading is NaN": with_samples(load_ms=math.nan),
    "a first call without end": with_samples(first_ms=math.inf),
    "negative energy": with_samples(energy_mj=-1.0),
    "steady is text": with_samples(steady="yes"),
    "negative warm-up": with_samples(warmup_calls=-1),
    "digest is a number": with_samples(output_sha256=5),
    "digest moves the cursor": with_samples(output_sha256="\x1b[A"),
    "more of it is NaN": with_samples(extra={"a": [math.nan]}),
    "pressure is text": in_environment(cpu_pressure="high"),
    "negative pressure": in_environment(cpu_pressure=-0.5),
    "throttled is text": in_environment(throttled="no"),
    "temperature is text": in_environment(temperature_c="warm"),
    "temperature is NaN": in_environment(temperature_c=math.nan),
    "the highest temperature is text": in_environment(temperature_c={"max": "warm"}),
    "telemetry is text": in_environment(telemetry="none"),
    "telemetry of text": in_environment(telemetry=["?"]),
    "a clock that is text": in_environment(telemetry=[{"freq_mhz": "fast", "phase": "timing"}]),
    "a clock that stands": in_environment(telemetry=[{"freq_mhz": 0, "phase": "timing"}]),
    "a jump that is text": in_environment(clock_jump_s="back"),
    "a name that clears the screen": in_environment(host="\x1b]0;owned\x07"),
    "nested for ever": in_environment(host=nested(50)),
    "a start that is text": lambda answer: answer | {"started": "now"},
    "an end that is NaN": lambda answer: answer | {"ended": math.nan},
    "models are a list": lambda answer: answer | {"models": list(answer["models"].values())},
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_is_none_is_refused(files, name):
    with pytest.raises(DeviceError) as caught:
        measure(spoil(BAD[name]), quick_profile(), files)
    assert caught.value.code == "bad-answer"


def test_a_profile_of_the_operators_is_kept(files):
    shapes = {"input_shapes": [[1, 3], [3, 4]], "output_shapes": [[1, 4]]}
    node = {"name": "n", "op": "Gemm", "ms": 0.5, **shapes, "thread": 7}
    target = spoil(with_samples(nodes=[node, {"name": "m", "op": "Add", "ms": 1}]))
    result = measure(target, quick_profile(), files, nodes=True)
    assert target.requests[0]["profile"] is True
    gemm = Node("n", "Gemm", 0.5, ((1, 3), (3, 4)), ((1, 4),))
    assert result.processes[0].models["b"].nodes == (gemm, Node("m", "Add", 1.0))
    assert result.processes[0].models["a"].nodes == ()
    assert BenchmarkResult.from_json(result.to_json()) == result


def test_an_emulator_is_never_timed(files):
    target = FakeTarget()
    with pytest.raises(DeviceError, match="timing: false") as caught:
        measure(target, quick_profile(timing=False), files)
    assert caught.value.code == "profile"
    assert not target.requests
