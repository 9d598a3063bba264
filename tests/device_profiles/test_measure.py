from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_profiles import BenchmarkResult, DeviceError, Ratio, measure
from device_profiles.measure import expanded_tail
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
        raw = {"wall_ms": [n, n + 1, n + 2], "cpu_ms": [n, n, n], "load_ms": 1.0, "first_ms": 2.0, "output_sha256": "f"}
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
    profile = quick_profile(final={"processes": 3, "warmup": 4, "min_repeats": 5, "min_seconds": 0.1})
    result = measure(target, profile, files, "final", lambda done, total: seen.append((done, total)), seed=7)
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
    ratio = synthetic(true_ratio=0.8, repeats=200).ratio("b", "a")
    assert ratio.low < 0.8 < ratio.high
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.half_width < 0.01
    speedup = synthetic(true_ratio=0.8, repeats=200).speedup("b", "a")
    assert (speedup.value, speedup.low, speedup.high) == (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    assert str(Ratio(1, 0.9, 1.1)) == "1.000 [0.900, 1.100]"


@pytest.mark.parametrize(("processes", "offset"), [(1, 0.0), (7, 0.0), (7, 0.03)])
def test_interval_covers_the_truth_as_often_as_it_says(processes: int, offset: float):
    trials = 120
    hits = 0
    for seed in range(trials):
        ratio = synthetic(processes=processes, repeats=40, offset=offset, seed=seed).ratio("b", "a")
        hits += ratio.low <= 1.0 <= ratio.high
    assert hits / trials > 0.88  # 95 % less three standard errors of 120 trials


def test_process_offsets_widen_the_interval_only_where_processes_are_resampled():
    calm = synthetic(processes=7, offset=0.0).ratio("b", "a")
    uneven = synthetic(processes=7, offset=0.05).ratio("b", "a")
    assert uneven.half_width > 3 * calm.half_width


def test_wall_statistic_pairs_iterations():
    result = synthetic(true_ratio=0.5, noise=0.0, statistic="wall")
    slow = np.ones(60)
    slow[:30] = 3.0  # both models disturbed alike: the pairs still tell the truth
    models = result.processes[0].models
    for samples in models.values():
        object.__setattr__(samples, "wall_ms", tuple((np.array(samples.wall_ms) * slow).tolist()))
    assert result.ratio("b", "a").value == pytest.approx(0.5)
    assert result.ratio("b", "a").half_width < 1e-9


def test_the_same_answer_every_time():
    assert synthetic(processes=3).ratio("b", "a") == synthetic(processes=3).ratio("b", "a")
    assert synthetic().ratio("a", "a") == Ratio(1.0, 1.0, 1.0)
    with pytest.raises(DeviceError, match="'c' was not measured; measured: a, b"):
        synthetic().ratio("c", "a")


def test_expanded_tail_matches_students_t():
    assert expanded_tail(7) == pytest.approx(0.00411, rel=0.01)  # Phi(-sqrt(7/6) * 2.447)
    assert expanded_tail(16) < expanded_tail(40) < 0.025
    assert expanded_tail(17) == pytest.approx(expanded_tail(16), rel=0.1)  # table and formula meet


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
