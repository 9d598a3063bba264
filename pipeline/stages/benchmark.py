"""Both networks timed on the run's devices."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from secateur.device_profiles import BenchmarkResult, measure
from secateur.pipeline.devices.fleet import Device, Tally
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.run.facts import BenchmarkFacts, Both, Facts, Speedup, Timed, TimedOnDevice, TimedResults, Timing
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.loading import parity_images


def benchmark(run: Run, facts: Facts) -> BenchmarkFacts:
    """Baseline and compact model timed on every device, interleaved, with every raw latency kept.

    Then the files with postprocessing, where there are some. What that costs depends on what is found: they are timed
    on a real image: of those of the parity check the one in which the baseline finds the median number.

    Raises:
        DeviceError: a device is unreachable, or its times mean nothing.
    """
    fleet, after, results = run.fleet, run.workload.postprocessing, facts.export.baseline.postprocessing
    devices = ", ".join(fleet.names)
    measured, files = _measure(run, f"Time on {devices}", "")
    behind: dict[str, TimedResults] = {}
    if after is not None and results is not None:
        median = position_of_median(results.counts)
        inputs = _write_input(run, median)
        whole, more = _measure(run, f"Time with {after.name} on {devices}", f".{after.name}", inputs)
        files |= more
        for name, result in whole.items():
            behind[name] = TimedResults(**vars(timed(result)), name=after.name, found=results.counts[median])
    timings = {
        name: TimedOnDevice(**vars(timed(result)), statistic=result.statistic, postprocessing=behind.get(name))
        for name, result in measured.items()
    }
    own = fleet.primary.name
    everywhere = timings if len(fleet) > 1 else None
    return BenchmarkFacts(**vars(timings[own]), device=own, fleet=everywhere, files=files)


def load_benchmark(directory: Path, name: str = "benchmark.json") -> BenchmarkResult:
    """The raw latencies of a run.

    Raises:
        OSError: there is no such file.
        DeviceError: it holds none.
    """
    return BenchmarkResult.from_json((directory / name).read_text(encoding="utf-8"))


def position_of_median(counts: Sequence[int]) -> int:
    """Where the median stands; of an even number, the larger of the two in the middle."""
    return sorted(range(len(counts)), key=lambda i: counts[i])[len(counts) // 2]


def timed(result: BenchmarkResult) -> Timed:
    """The figures of a measurement of baseline and compact model."""
    ends = result.speedup("compact", "baseline").ends
    return Timed(
        latency=Both(_timing(result, "baseline"), _timing(result, "compact")),
        speedup=Speedup(low=ends.get("low"), high=ends.get("high"), value=ends["value"]),
        flags=tuple(result.flags),
    )


def _timing(result: BenchmarkResult, name: str) -> Timing:
    return Timing(
        p50_ms=result.p50_ms(name),
        p95_ms=result.p95_ms(name),
        cpu_p50_ms=result.cpu_p50_ms(name),
        cpu_p95_ms=float(np.percentile(result.cpu_ms(name), 95)),
        load_ms=result.load_ms(name),
        first_ms=result.first_ms(name),
        peak_rss_bytes=result.peak_rss_bytes(name),
        energy_mj=result.energy_mj(name),
    )


def _write_input(run: Run, position: int) -> Path:
    """One of the images of the parity check as a file."""
    file, content = run.directory / promotion.INPUTS, io.BytesIO()
    np.savez(content, **{run.config.export.input_name: parity_images(run)[position : position + 1].numpy()})
    write_whole(file, content.getbuffer())
    return file


def _measure(
    run: Run, title: str, kind: str, inputs: Path | None = None
) -> tuple[Mapping[str, BenchmarkResult], dict[str, str]]:
    """Both ONNX files of a kind, measured at the final tier on every device, and the files that keep the results."""
    models = {name: run.directory / f"{name}{kind}.onnx" for name in ("baseline", "compact")}
    with run.progress.stage(title) as report:
        tally, least = Tally(report, run.fleet.names, run.profile.final.processes), run.config.gate.min_speedup

        def decided(result: BenchmarkResult) -> bool:
            speedup = result.speedup("compact", "baseline")
            return least is None or not speedup.low <= least < speedup.high

        def measured(device: Device) -> BenchmarkResult:
            told = tally.of(device.name)
            result = measure(
                device.target,
                device.profile,
                models,
                "final",
                told,
                energy=True,
                noise_floor=device.noise_floor,
                until=decided,
                inputs=inputs,
            )
            count = len(result.processes)
            told(count, count, f"speed-up {result.speedup('compact', 'baseline').value:.2f}x")
            return result

        results = run.fleet.each(measured)
    files = {}
    for name, result in results.items():
        file = run.directory / run.fleet.file("benchmark", f"{kind}.json", name)
        write_whole(file, result.to_json() + "\n")
        files[file.name] = sha256_of(file)
    return results, files
