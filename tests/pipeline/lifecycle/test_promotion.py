"""Promotion: gates by hand, and challengers against champions on a real device (this machine, briefly)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from secateur.device_profiles import BenchmarkResult, DeviceProfile, Target, load_profile, open_target
from secateur.device_profiles.measure import ModelSamples, Process
from secateur.export import batching, export_onnx
from secateur.pipeline.config.schema import GateSection
from secateur.pipeline.errors import UserError
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.lifecycle.promotion import Contender, absolute_gates, paired, relative_gates, resampled
from secateur.pipeline.tracking import ChampionMovedError, Decision, Registry, Version
from secateur.pipeline.workloads import Workload, detection
from tests.pipeline.helpers import QUICK_DEVICE, digits, quick_device
from tests.pipeline.registered import add, crown, embedded, linear_model, make_template, migrated_home

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
LOOSE = GateSection(max_latency_increase=1e6, max_resource_increase=1e6)
"""Gates that this machine's noise cannot decide."""


# -- the test split ----------------------------------------------------------------------------------------------------


def scenes() -> detection.Detection:
    """Scenes of digits, with a detector."""
    data = {"source": "digits", "image_size": 64, "scenes": 60}
    return detection.build(detection.Options.model_validate({"data": data}))


@pytest.mark.parametrize("make", [digits, scenes])
def test_the_test_split_is_answered_in_batches_as_image_by_image(
    make: Callable[[], Workload], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    workload = make()
    file = export_onnx(workload.build_model(), workload.example_input(), tmp_path / "network.onnx").path
    twins, wide = [], batching.twin_of
    monkeypatch.setattr(batching, "WIDE", 4)
    monkeypatch.setattr(batching, "WORTH", 10**9)
    expected, targets = promotion.test_answers(workload, file)
    monkeypatch.setattr(batching, "WORTH", 4)
    monkeypatch.setattr(batching, "twin_of", lambda *args: twins.append(args) or wide(*args))
    found, again = promotion.test_answers(workload, file)
    assert len(twins) == 1  # proven once, however many parts the split is read in
    assert torch.equal(targets, again)
    assert len(found) == len(workload.test)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    metric = workload.metric
    assert workload.metrics(found, targets)[metric] == workload.metrics(expected, targets)[metric]


# -- gates, by hand ----------------------------------------------------------------------------------------------------


def result(
    challenger: list[list[float]], champion: list[list[float]], rss: tuple[Any, Any] = (1e6, 1e6)
) -> BenchmarkResult:
    """A measurement with these calls (ms) in each process; the first call takes twice the last."""

    def samples(calls: list[float], peak: Any) -> ModelSamples:
        return ModelSamples(tuple(calls), tuple(calls), 1.0, 2 * calls[-1], "", peak)

    processes = tuple(
        Process({"challenger": samples(a, rss[0]), "champion": samples(b, rss[1])}, {}, 0.0, 1.0)
        for a, b in zip(challenger, champion, strict=True)
    )
    return BenchmarkResult("quick", "final", ("champion", "challenger"), {}, "cpu", processes)


def contender(folder: Path, size: int) -> Contender:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x" * size)
    return Contender(Version("net", "1"), folder / "model.onnx", folder / "model.onnx", {})


def calls(middle: float, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [(middle * (1 + 0.005 * rng.normal(size=30))).tolist() for _ in range(5)]


def decided(found: list[Any]) -> dict[str, bool]:
    return {gate.name: gate.ok for gate in found}


def test_a_challenger_as_good_passes_every_relative_gate_and_a_worse_one_fails_its_own(tmp_path: Path) -> None:
    small, large = contender(tmp_path / "a", 1000), contender(tmp_path / "b", 1200)
    section = GateSection()
    same = relative_gates(section, small, small, result(calls(1.0, 1), calls(1.0, 2)))
    assert set(decided(same)) == {"p50 ratio", "p95 ratio", "first call ratio", "peak RSS ratio", "size ratio"}
    assert all(decided(same).values())
    slower = decided(relative_gates(section, small, small, result(calls(1.2, 1), calls(1.0, 2))))
    assert not slower["p50 ratio"]
    assert not slower["p95 ratio"]
    assert not slower["first call ratio"]
    assert slower["size ratio"]
    assert not decided(relative_gates(section, large, small, result(calls(1.0, 1), calls(1.0, 2))))["size ratio"]
    hungry = result(calls(1.0, 1), calls(1.0, 2), (1.5e6, 1e6))
    assert not decided(relative_gates(section, small, small, hungry))["peak RSS ratio"]


def test_a_rare_slow_call_shows_in_p95_alone(tmp_path: Path) -> None:
    small = contender(tmp_path / "a", 1000)
    slow = [[*row[:27], 1.5, 1.5, 1.5] for row in calls(1.0, 1)]
    found = decided(relative_gates(GateSection(), small, small, result(slow, calls(1.0, 2))))
    assert found["p50 ratio"]
    assert not found["p95 ratio"]


def test_what_the_device_does_not_tell_is_unknown_and_no_pass(tmp_path: Path) -> None:
    small = contender(tmp_path / "a", 1000)
    silent = result(calls(1.0, 1), calls(1.0, 2), (None, 1e6))
    (gate,) = [g for g in relative_gates(GateSection(), small, small, silent) if g.name == "peak RSS ratio"]
    assert gate.value is None
    assert not gate.ok
    assert "does not tell" in gate.reason
    assert not relative_gates(GateSection(max_latency_increase=None, max_resource_increase=None), small, small, silent)


def test_the_interval_of_a_paired_reading_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        a = [[float(x)] for x in 1.1 * np.exp(0.05 * rng.normal(size=7))]
        b = [[float(x)] for x in np.exp(0.05 * rng.normal(size=7))]
        found = paired(result(a, b), lambda m: m.first_ms)
        assert found is not None
        covered += found.low <= 1.1 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def slower(processes: int, ratio: float, seed: int, spread: float = 0.01) -> BenchmarkResult:
    """A challenger that is slower by a ratio, in processes that differ."""
    rng = np.random.default_rng(seed)
    factors = np.exp(spread * rng.standard_normal(processes))
    champion = [(np.exp(0.005 * rng.standard_normal(30))).tolist() for _ in factors]
    return result([[ratio * factor * x for x in row] for factor, row in zip(factors, champion, strict=True)], champion)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_too_few_processes_say_is_unknown_and_no_pass(tmp_path: Path, processes: int) -> None:
    small = contender(tmp_path / "a", 1000)
    for ratio in (10.0, 1.0):
        gates = relative_gates(GateSection(), small, small, slower(processes, ratio, 0))
        timed = [gate for gate in gates if gate.name != "size ratio"]
        assert not any(gate.ok for gate in timed)
        assert all((gate.low, gate.high) == (None, None) for gate in timed)
        assert all("processes would tell" in gate.reason for gate in timed)


@pytest.mark.parametrize(("ratio", "least", "most"), [(1.0, 0.9, 1.0), (1.10, 0.0, 0.05), (1.3, 0.0, 0.01)])
def test_as_good_passes_and_slower_does_not_pass_by_noise(
    tmp_path: Path, ratio: float, least: float, most: float
) -> None:
    small, trials = contender(tmp_path / "a", 1000), 200
    passed = 0
    for seed in range(trials):
        gates = relative_gates(GateSection(max_resource_increase=None), small, small, slower(7, ratio, seed))
        passed += all(gate.ok for gate in gates)
    assert least <= passed / trials <= most


def test_an_undecided_gate_says_how_many_processes_would_tell(tmp_path: Path) -> None:
    small = contender(tmp_path / "a", 1000)
    gates = relative_gates(GateSection(), small, small, slower(3, 1.03, 0, spread=0.03))
    (gate,) = [gate for gate in gates if gate.name == "p50 ratio"]
    assert gate.low is not None
    assert gate.high is not None
    assert gate.low <= 1.05 < gate.high
    assert not gate.ok
    assert "unknown after 3: about" in gate.reason


def test_a_disturbed_timing_is_not_promoted(
    registry: Registry, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1")
    measure = promotion.measure
    monkeypatch.setattr(promotion, "measure", lambda *a, **o: replace(measure(*a, **o), disturbed=("contended",)))
    decision = promote(registry, device)
    (failed,) = [gate for gate in decision.gates if not gate.ok]
    assert failed.name == "stable timing"
    assert "gate.require_stable" in failed.reason
    assert promote(registry, device, section=LOOSE.model_copy(update={"require_stable": False})).promoted


def test_a_close_call_on_few_images_says_that_they_do_not_resolve_it(
    registry: Registry, device: Any, tmp_path: Path
) -> None:
    crown(registry, add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1"))
    add(registry, tmp_path, linear_model(tmp_path / "two.onnx", noise=1.0), "run-2")
    seen = promote(registry, device)
    (drop,) = [gate for gate in seen.gates if gate.name == "accuracy drop"]
    assert drop.value is not None
    close = LOOSE.model_copy(update={"max_drop_champion": drop.value})
    sure = close.model_copy(update={"sure": True})
    for section, holds in ((sure, False), (close, True)):
        (gate,) = [gate for gate in promote(registry, device, section=section).gates if gate.name == drop.name]
        assert gate.ok is holds
        assert "not resolved by" in gate.reason


def test_absolute_gates_take_the_tighter_of_run_file_and_budget(tmp_path: Path) -> None:
    small = contender(tmp_path / "a", 1000)
    profile = DeviceProfile(name="quick", **{**QUICK_DEVICE, "budgets": {"p95_ms": 2.0, "size_bytes": 900}})
    found = {
        gate.name: gate
        for gate in absolute_gates(
            GateSection(max_p95_ms=1.0, max_peak_rss_bytes=10),
            profile,
            small,
            result(calls(1.5, 1), calls(1, 2)),
            "challenger",
        )
    }
    assert found["p95_ms"].bound == 1.0
    assert not found["p95_ms"].ok
    assert not found["size_bytes"].ok
    assert not found["peak_rss_bytes"].ok
    free = absolute_gates(GateSection(budgets=False), profile, small, result(calls(1.5, 1), calls(1, 2)), "challenger")
    assert free == []


def test_resamples_are_paired_and_their_spread_is_that_of_the_images() -> None:
    workload = digits(image_size=8)
    targets = torch.arange(10).repeat(40)
    right = torch.nn.functional.one_hot(targets, 10).float()
    wrong = right.clone()
    wrong[:40] = 1 - wrong[:40]  # a tenth of the images
    drawn = resampled(workload, [right, wrong], targets)
    assert drawn[:, 0].tolist() == pytest.approx([1.0, 0.9])
    assert np.all(drawn[0] == 1.0)
    assert np.std(drawn[1, 1:]) == pytest.approx(math.sqrt(0.9 * 0.1 / 400), rel=0.1)
    same = resampled(workload, [wrong, wrong], targets)
    assert np.all(same[0] == same[1])


# -- on a device -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def registry(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    home = migrated_home(tmp_path / "home", template)
    monkeypatch.setenv("SECATEUR_HOME", str(home))
    return embedded(home)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DeviceProfile, Target]]:
    profile = load_profile(quick_device(tmp_path_factory.mktemp("device"), budgets={}))
    target = open_target(profile)
    yield profile, target
    target.close()


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "RESAMPLES", 500)


def promote(registry: Registry, device: tuple[DeviceProfile, Target], **options: Any) -> Decision:
    return promotion.promote(registry, "net", *device, **{"section": LOOSE, **options})


def test_a_first_champion_needs_no_rival_and_a_worse_challenger_is_refused_with_its_numbers(
    registry: Registry, device: Any, tmp_path: Path
) -> None:
    add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1")
    first = promote(registry, device)
    assert first.promoted
    assert first.champion is None
    add(registry, tmp_path, linear_model(tmp_path / "two.onnx", noise=1.0), "run-2")
    second = promote(registry, device)
    assert not second.promoted
    assert second.champion == "1"
    (drop,) = [gate for gate in second.gates if not gate.ok]
    assert drop.name == "accuracy drop"
    assert drop.low is not None
    assert drop.high is not None
    assert drop.value is not None
    assert 0.01 < drop.low < drop.value < drop.high
    assert registry.version("net").version == "1"
    client = MlflowClient(registry.uri, registry.uri)
    run = client.get_run(second.run_id)
    assert run.data.metrics["accuracy drop.value"] == pytest.approx(drop.value)
    assert run.data.metrics["accuracy drop.ok"] == 0
    assert run.data.tags["outcome"] == "refused"
    kept = json.loads(Path(client.download_artifacts(second.run_id, "decision.json", str(tmp_path))).read_text())
    assert {gate["name"] for gate in kept["gates"]} == {gate.name for gate in second.gates}
    measured = BenchmarkResult.from_json(
        Path(client.download_artifacts(second.run_id, "benchmark.json", str(tmp_path))).read_text()
    )
    assert measured.names == ("champion", "challenger"), "both in one interleaved measurement"


def test_a_challenger_does_not_slip_in_where_the_champion_was_deleted(
    registry: Registry, device: Any, tmp_path: Path
) -> None:
    for i in range(2):
        crown(registry, add(registry, tmp_path, linear_model(tmp_path / f"{i}.onnx", noise=0.01 * i), f"run-{i}"))
    add(registry, tmp_path, linear_model(tmp_path / "worse.onnx", noise=1.0), "run-2")
    client = MlflowClient(registry.uri, registry.uri)
    client.delete_model_version("net", "2")
    refused = promote(registry, device)
    (gate,) = refused.gates
    assert not refused.promoted
    assert "champion version 2 was deleted" in gate.reason
    assert "version 1, with: secateur rollback net --device quick" in gate.reason
    assert registry.rollback("net").version == "1"
    compared = promote(registry, device)
    assert compared.champion == "1"
    assert not compared.promoted
    client.delete_model_version("net", "1")  # none is left to go back to
    first = promote(registry, device)
    assert first.promoted
    (gate,) = [gate for gate in first.gates if gate.name == "champion"]
    assert "version 1 was champion and was deleted" in gate.reason


def test_a_slower_and_larger_challenger_is_refused_by_the_default_gates(
    registry: Registry, device: Any, tmp_path: Path
) -> None:
    crown(registry, add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1"))
    add(registry, tmp_path, linear_model(tmp_path / "two.onnx", extra=40), "run-2")
    decision = promote(registry, device, section=GateSection())
    failed = {gate.name for gate in decision.gates if not gate.ok}
    assert {"p50 ratio", "size ratio"} <= failed
    assert "accuracy drop" not in failed
    assert registry.version("net").version == "1"


def test_a_version_whose_own_gate_failed_is_never_promoted(registry: Registry, device: Any, tmp_path: Path) -> None:
    add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1", own_gate="failed")
    decision = promote(registry, device)
    assert [gate.name for gate in decision.gates] == ["gate of its run"]
    assert not decision.promoted
    assert decision.run_id
    assert registry.champion("net", "quick") is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"workload": {"data": {"source": "arrays", "train": "nowhere"}}}, "cannot be read here"),
        ({"workload": {"data": {"test_fraction": 0.5}}}, "the data here is"),
    ],
)
def test_other_data_fails_the_accuracy_gate_and_says_so(
    registry: Registry, device: Any, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    crown(registry, add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1"))
    add(registry, tmp_path, linear_model(tmp_path / "two.onnx", noise=1e-4), "run-2", **config)
    decision = promote(registry, device)
    (failed,) = [gate for gate in decision.gates if not gate.ok]
    assert failed.name == "accuracy drop"
    assert failed.value is None
    assert said in failed.reason


def test_a_champion_that_appears_during_the_comparison_is_compared_with(
    registry: Registry, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1")
    add(registry, tmp_path, linear_model(tmp_path / "two.onnx", noise=1e-4), "run-2")
    measure, met = promotion.measure, []

    def meanwhile(*arguments: Any, **options: Any) -> BenchmarkResult:
        met.append(tuple(arguments[2]))
        if len(met) == 1:
            crown(embedded(registry.home), one)
        return measure(*arguments, **options)

    monkeypatch.setattr(promotion, "measure", meanwhile)
    decision = promote(registry, device, version="2")
    assert met == [("challenger",), ("champion", "challenger")]
    assert decision.promoted
    assert decision.champion == "1"
    assert [(e.version, e.previous) for e in registry.history("net")] == [("1", None), ("2", "1")]


def test_a_registry_that_never_rests_is_given_up_on(
    registry: Registry, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1")

    def moved(*_: Any) -> None:
        raise ChampionMovedError("moved")

    monkeypatch.setattr(registry, "promote", moved)
    with pytest.raises(ChampionMovedError):
        promote(registry, device)


def test_promoting_again_changes_nothing_and_keeps_no_second_decision(
    registry: Registry, device: Any, tmp_path: Path
) -> None:
    version = add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1")
    assert promote(registry, device, version=version.version, key="run-1").promoted
    again = promote(registry, device, version=version.version, key="run-1")
    assert again.promoted
    assert "already" in again.reason
    client = MlflowClient(registry.uri, registry.uri)
    experiment = client.get_experiment_by_name("secateur-promotions")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1
    assert len(registry.history("net")) == 1


def test_no_challenger_is_said(registry: Registry, device: Any, tmp_path: Path) -> None:
    crown(registry, add(registry, tmp_path, linear_model(tmp_path / "one.onnx"), "run-1"))
    with pytest.raises(UserError, match="no alias challenger-quick"):
        promote(registry, device)


def test_the_gates_of_the_version_s_own_run_file_hold_where_none_are_given(
    registry: Registry, device: Any, tmp_path: Path
) -> None:
    config = {"gate": {"max_drop": 1.0, "min_accuracy": 0.9999}}
    add(registry, tmp_path, linear_model(tmp_path / "one.onnx", noise=1.0), "run-1", **config)
    decision = promote(registry, device, section=None)
    assert {gate.name for gate in decision.gates if not gate.ok} == {"accuracy"}
    assert promote(registry, device, section=GateSection(min_accuracy=0.01)).promoted
