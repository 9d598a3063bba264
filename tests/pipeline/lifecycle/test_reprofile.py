"""A champion timed again: what is a regression, what is only noise or other load, and what is said about it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.device_profiles import BenchmarkResult, DeviceError, DeviceProfile, load_profile
from secateur.device_profiles.measure import ModelSamples, Process
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.lifecycle.reprofile import (
    Reprofile,
    Tolerances,
    changes,
    chosen,
    compared,
    growth,
    markdown,
    profile_of,
    recorded,
    reprofile,
)
from secateur.pipeline.progress import Silent
from secateur.pipeline.tracking import Version
from secateur.pipeline.tracking.reprofiles import REPROFILE_TAG, record_reprofile
from secateur.pipeline.tracking.store import connect
from tests.pipeline.helpers import quick_device

VERSION = Version("digits", "3")


def result(
    compact_ms: float,
    baseline_ms: float | None = 2.0,
    *,
    seed: int = 0,
    processes: int = 5,
    rss: int | None = 10_000_000,
    wall_over_cpu: float = 1.0,
    sha256: str = "c",
    **environment: Any,
) -> BenchmarkResult:
    """A measurement whose processes differ by 0.3 % and whose calls differ by 1 %."""
    rng = np.random.default_rng(seed)
    latencies = {"baseline": baseline_ms, "compact": compact_ms}

    def samples(ms: float) -> ModelSamples:
        cpu = ms * np.exp(0.003 * rng.standard_normal() + 0.01 * rng.standard_normal(50))
        return ModelSamples(tuple(cpu * wall_over_cpu), tuple(cpu), 5.0, 2 * ms, "same", rss)

    made = [
        Process({name: samples(ms) for name, ms in latencies.items() if ms}, environment, 0.0, 1.0)
        for _ in range(processes)
    ]
    names = tuple(made[0].models)
    digests = {name: sha256 if name == "compact" else "b" for name in names}
    return BenchmarkResult("quick", "final", names, digests, "cpu", tuple(made))


def reprofiled(before: BenchmarkResult, now: BenchmarkResult, **tolerances: float) -> Reprofile:
    return compared(VERSION, "quick", before, now, "compact", Tolerances(**tolerances))


def verdicts(found: Reprofile) -> Mapping[str, str]:
    return {figure.name: figure.verdict for figure in found.figures}


def test_the_same_device_and_model_raise_no_alarm() -> None:
    found = reprofiled(result(1.0), result(1.0, seed=1))
    assert set(verdicts(found).values()) <= {"same", "better"}
    assert not found.regressions
    assert found.metrics()["regressed"] == 0


def test_a_slower_device_is_told_from_a_slower_model() -> None:
    device = reprofiled(result(1.0), result(1.2, 2.4, seed=1))
    assert [f.name for f in device.regressions] == ["p50_ms", "p95_ms"]
    assert "the device is slower" in device.cause
    model = reprofiled(result(1.0), result(1.2, 2.0, seed=1, onnxruntime="9.9"), p95=0.5)
    assert [f.name for f in model.regressions] == ["p50_ms"]
    assert "the model is slower" in model.cause
    change = model.regressions[0].change
    assert change.low < 1.2 < change.high


def test_without_the_unpruned_network_the_cause_is_not_guessed() -> None:
    found = reprofiled(result(1.0), result(1.2, None, seed=1))
    assert found.regressions
    assert "not known" in found.cause
    assert found.speedup is None


def test_what_changed_on_the_device_is_named() -> None:
    before = {"onnxruntime": "1.31", "system": "Linux-6.1", "temperature_c": {"max": 40.0}, "cpus": 4}
    now = {"onnxruntime": "1.32", "system": "Linux-6.6", "temperature_c": {"max": 81.0}, "python": "3.11"}
    said = " ".join(changes(before, now))
    assert "1.31 -> 1.32" in said
    assert "Linux-6.6" in said
    assert "40 -> 81 C" in said
    assert "python" not in said, "what was not known then has not changed"
    assert "cpus" not in said


def test_within_the_tolerance_or_within_the_noise_is_no_regression() -> None:
    assert not reprofiled(result(1.0), result(1.03, seed=1)).regressions
    assert reprofiled(result(1.0), result(1.03, seed=1), p50=0.01).regressions
    one = reprofiled(result(1.0, processes=1), result(2.0, seed=1, processes=1))
    assert not one.regressions, "one process cannot tell"
    assert all(math.isinf(figure.change.high) for figure in one.figures)
    assert set(verdicts(one).values()) == {"unknown"}


def test_wall_times_of_a_busy_device_decide_nothing() -> None:
    busy = replace(result(1.0, seed=1, wall_over_cpu=1.5, cpu_pressure=0.3), statistic="wall")
    found = reprofiled(replace(result(1.0), statistic="wall"), busy)
    assert "contended" in found.flags
    assert verdicts(found)["p95_ms"] == verdicts(found)["p50_ms"] == "disturbed"
    assert not found.regressions
    slower = reprofiled(result(1.0), result(1.2, seed=1, wall_over_cpu=1.5))
    assert [f.name for f in slower.regressions] == ["p50_ms"], "CPU time is hardly touched by other load"


def test_memory_counts_where_the_device_tells_it() -> None:
    found = reprofiled(result(1.0), result(1.0, seed=1, rss=12_000_000))
    assert [f.name for f in found.regressions] == ["peak_rss_bytes"]
    assert "peak_rss_bytes" not in verdicts(reprofiled(result(1.0, rss=None), result(1.0, seed=1)))


def test_the_interval_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        then, now = np.exp(0.05 * rng.standard_normal(5)), 1.1 * np.exp(0.02 * rng.standard_normal(7))
        found = growth(now, then, None)
        covered += found.low <= 1.1 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
    assert growth([1.1] * 3, [1.0] * 3, 0.02).low == pytest.approx(1.1 * math.exp(-0.02))


class FakeRegistry:
    """A registry whose versions hold a model and the benchmark it was registered with."""

    def __init__(self, *champions: tuple[str, str], before: BenchmarkResult | None = None) -> None:
        self.found = [(name, device, Version(name, "1")) for name, device in champions]
        self.before = before

    def champions(self) -> list[tuple[str, str, Version]]:
        return self.found

    def fetch(self, version: Version, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"model")
        (folder / "secateur").mkdir()
        (folder / "secateur" / "gate.json").write_text("{}")
        if self.before is not None:
            (folder / "secateur" / "benchmark.json").write_text(self.before.to_json())


class FakeTarget:
    """A device that answers as ``answer`` says, or is unreachable."""

    def __init__(self, answer: BenchmarkResult | None) -> None:
        self.answer, self.count, self.closed = answer, 0, False

    def prepare(self) -> Mapping[str, Any]:
        return {}

    def put(self, path: Path) -> str:
        return path.name

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Any = None) -> dict[str, Any]:
        if self.answer is None:
            raise DeviceError("it is unreachable", "unreachable")
        process = self.answer.processes[self.count % len(self.answer.processes)]
        self.count += 1
        names = [model["name"] for model in request["models"]]
        models = {name: vars(process.models[name]) for name in names}
        return {"models": models, "environment": {}, "started": 0.0, "ended": 1.0}

    def fetch(self, path: str, to: Path) -> None: ...

    def close(self) -> None:
        self.closed = True


def time_all(registry: FakeRegistry, targets: Mapping[str, FakeTarget], folder: Path) -> list[Any]:
    return list(
        reprofile(
            registry,
            registry.champions(),
            Tolerances(),
            lease=lambda profile: contextlib.nullcontext,
            progress=Silent(),
            profiles=[quick_device(folder)],
            opened=lambda profile: targets[profile.name],
        )
    )


def test_a_champion_is_fetched_timed_and_compared(tmp_path: Path) -> None:
    digest = sha256_of_bytes(tmp_path, b"model")
    registry = FakeRegistry(("digits", "quick"), before=result(1.0, sha256=digest))
    target = FakeTarget(result(1.5, seed=1))
    (found,) = time_all(registry, {"quick": target}, tmp_path)
    assert isinstance(found, Reprofile)
    assert {"p50_ms", "p95_ms"} <= {f.name for f in found.regressions} | {"p95_ms"}
    assert target.closed
    assert "regressed" in markdown([found])


def test_a_device_that_is_away_spoils_no_other_reprofile(tmp_path: Path) -> None:
    digest = sha256_of_bytes(tmp_path, b"model")
    registry = FakeRegistry(("lost", "local"), ("digits", "quick"), before=result(1.0, sha256=digest))
    first, second = time_all(registry, {"local": FakeTarget(None), "quick": FakeTarget(result(1.0))}, tmp_path)
    assert first[:2] == ("lost", "local")
    assert isinstance(second, Reprofile)


def test_a_version_without_a_benchmark_of_its_model_cannot_be_compared(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "benchmark.json").write_text(result(1.0, sha256="another").to_json())
    with pytest.raises(UserError, match="no benchmark"):
        recorded(tmp_path, "quick")


def test_which_champions_are_meant() -> None:
    registry = FakeRegistry(("a", "pi"), ("a", "pc"), ("b", "pc"))
    assert [c[:2] for c in chosen(registry, [], None)] == [("a", "pi"), ("a", "pc"), ("b", "pc")]
    assert [c[:2] for c in chosen(registry, ["a"], "pc")] == [("a", "pc")]
    with pytest.raises(UserError, match=r"no champion of b on pi; there are: a on pi, a on pc, b on pc"):
        chosen(registry, ["b"], "pi")
    with pytest.raises(UserError, match="none"):
        chosen(FakeRegistry(), [], None)


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    assert isinstance(profile_of("quick", [quick_device(tmp_path)]), DeviceProfile)
    assert profile_of("local") == load_profile("local")
    with pytest.raises(UserError, match="nowhere"):
        profile_of("nowhere")


@pytest.mark.filterwarnings("ignore")
def test_reprofiles_are_series_of_one_run_and_none_is_kept_twice(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, champion = f"sqlite:///{tmp_path}/mlflow.db", ("digits", "3", "quick")
    connect(uri)  # the store of the champion's run
    found = reprofiled(result(1.0), result(1.2, seed=1))
    for key in ("night-1", "night-1", "night-2"):
        run_id = record_reprofile(uri, tmp_path, champion, key, found.metrics(), found.to_json())
    client = MlflowClient(uri)
    history = client.get_metric_history(run_id, "p50_ms")
    assert [point.step for point in history] == [0, 1]
    assert client.get_run(run_id).data.tags[REPROFILE_TAG] == "digits/3/quick"
    assert len(client.list_artifacts(run_id, "readings")) == 2


def sha256_of_bytes(folder: Path, content: bytes) -> str:
    file = folder / "content"
    file.write_bytes(content)
    return sha256_of(file)
