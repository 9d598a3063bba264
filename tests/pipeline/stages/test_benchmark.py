"""What was timed, and which file it was."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.pipeline.stages.benchmark import load_benchmark, position_of_median, timed

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
