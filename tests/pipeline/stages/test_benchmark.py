"""What was timed, and which file it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.pipeline.config.faults import FaultsError
from secateur.pipeline.run.opening import device_profiles
from secateur.pipeline.stages.benchmark import load_benchmark, position_of_median, timed
from tests.device_profiles.tiny import skip_without
from tests.pipeline.helpers import opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_the_timed_file_is_the_exported_one(finished: Any) -> None:
    run, facts = finished
    measured = load_benchmark(run.directory)
    assert {name: measured.sha256[name] for name in measured.names} == {
        name: network.artifact.sha256 for name, network in facts.export.networks.items()
    }


def test_the_figures_are_those_of_the_raw_latencies_that_are_kept(finished: Any) -> None:
    run, facts = finished
    measured = timed(load_benchmark(run.directory))
    assert (measured.latency, measured.speedup) == (facts.benchmark.latency, facts.benchmark.speedup)
    assert facts.benchmark.of_devices == {"quick": facts.benchmark}
    for timing in facts.benchmark.latency:
        assert 0 < timing.p50_ms <= timing.p95_ms


@pytest.mark.parametrize(("counts", "position"), [([3], 0), ([5, 1, 3], 2), ([4, 1, 2, 3], 3)])
def test_the_image_with_the_median_number_of_results_is_timed(counts: list[int], position: int) -> None:
    assert position_of_median(counts) == position


@pytest.mark.long
def test_finals_are_timed_in_further_runtimes_and_every_file_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("openvino")
    skip_without("ncnn")
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    changes: dict[str, Any] = {"device": {"runtimes": ["onnxruntime", "openvino", "ncnn"]}}
    changes |= {"search": {"target": {"macs_ratio": 0.8}}, "export": {"input_name": "pixels", "output_name": "scores"}}
    with opened(tiny_config(tmp_path, **changes)) as run:
        run.tracker.start()
        facts = perform(run, until="report")
        page = (run.directory / "report.html").read_text()
    found = facts.benchmark.runtimes
    assert [(entry.runtime, entry.precision, entry.reason) for entry in found] == [
        ("openvino", "fp32", ""),
        ("ncnn", "fp32", ""),
    ]
    assert all(entry.timed.speedup.value > 0 for entry in found)
    assert [(hop.runtime, hop.network) for hop in facts.benchmark.hops] == [
        (runtime, network) for runtime in ("openvino", "ncnn") for network in ("baseline", "compact")
    ]
    assert all(hop.ok and hop.error < 1e-4 and hop.metric == hop.metric_here for hop in facts.benchmark.hops)
    assert {check.name for check in facts.gate.checks} >= {"parity of compact in ncnn on quick"}
    assert {"benchmark.openvino.json", "benchmark.ncnn.json"} <= facts.benchmark.files.keys()
    assert page.count("the fastest here") == 1 and "compact in ncnn on quick" in page


def test_an_unknown_runtime_is_a_fault_of_the_run_file(tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match=r"unknown runtime 'openvno'; known: .*openvino"):
        device_profiles(tiny_config(tmp_path, device={"runtimes": ["openvno"]}))
