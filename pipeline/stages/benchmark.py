"""Both networks timed on the run's devices."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from secateur.device_profiles import BenchmarkResult, DeviceError, DeviceProfile, measure
from secateur.device_profiles.profile import Tier
from secateur.device_profiles.runtime import DEFAULT
from secateur.device_profiles.target import kind_of
from secateur.export.quantize import precision
from secateur.pipeline.devices.fleet import Device, Tally
from secateur.pipeline.evaluation import hops
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.run.facts import (
    BenchmarkFacts,
    Both,
    Facts,
    Hop,
    InRuntime,
    Speedup,
    Timed,
    TimedOnDevice,
    TimedResults,
    Timing,
)
from secateur.pipeline.run.kept_facts import LAYERS
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.loading import first_batch, parity_images
from secateur.pipeline.stages.sustained import sustained

NETWORKS = ("baseline", "compact")
FUSED = ("Relu", "Clip", "Add", "BatchNormalization", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")
"""Nodes that a runtime may compute together with the layer before them."""
PROFILED = Tier(processes=1, warmup=3, min_repeats=5, min_seconds=0.0, max_warmup_seconds=1.0, retries=0)
"""How the process is measured in which operators are timed; its calls count for nothing."""


def benchmark(run: Run, facts: Facts) -> BenchmarkFacts:
    """Baseline and compact model timed on every device, interleaved, with every raw latency kept.

    Then the files with postprocessing, where there are some. What that costs depends on what is found: they are timed
    on a real image: of those of the parity check the one in which the baseline finds the median number.

    Raises:
        DeviceError: a device is unreachable, or its times mean nothing.
    """
    fleet, after, results = run.fleet, run.workload.postprocessing, facts.export.baseline.postprocessing
    devices = ", ".join(fleet.names)
    measured, files = _measure(run, facts, f"Time on {devices}", "")
    behind: dict[str, TimedResults] = {}
    if after is not None and results is not None:
        median = position_of_median(results.counts)
        inputs = _write_input(run, median)
        whole, more = _measure(run, facts, f"Time with {after.name} on {devices}", f".{after.name}", inputs)
        files |= more
        for name, result in whole.items():
            behind[name] = TimedResults(**vars(timed(result)), name=after.name, found=results.counts[median])
    timings = {
        name: TimedOnDevice(**vars(timed(result)), statistic=result.statistic, postprocessing=behind.get(name))
        for name, result in measured.items()
    }
    own = fleet.primary.name
    files |= layer_times(run, facts)
    runtimes, more = further_runtimes(run, facts)
    asked, file = run.config.device.sustain_s, files_for(run, facts, own)["compact"]
    heat, kept = sustained(fleet.primary, file, run.directory, asked, run.progress)
    return BenchmarkFacts(
        **vars(timings[own]),
        device=own,
        fleet=timings if len(fleet) > 1 else None,
        runtimes=runtimes or None,
        hops=hops_of(run, facts) or None,
        sustained=heat,
        files=files | more | kept,
    )


def layer_times(run: Run, facts: Facts) -> dict[str, str]:
    """Every operator of both files timed on the run's own device: a pass of its own, because profiling slows calls.

    Returns:
        The file with what was found and its sha256; empty where the device or its runtime cannot tell.
    """
    device = run.fleet.primary
    models = files_for(run, facts, device.name)
    with run.progress.stage(f"Time layers on {device.name}") as report:
        try:
            result = measure(device.target, device.profile, models, PROFILED, nodes=True)
        except DeviceError as error:
            report(1, 1, f"not timed: {error}")
            return {}
        report(1, 1, "")
    sampled = result.processes[0].models
    if not all(samples.nodes for samples in sampled.values()):
        return {}
    told = {"format": 1, "device": device.name, "runtime": device.profile.runtime}
    networks = {}
    for name, samples in sampled.items():
        layers = layers_of(models[name])
        networks[name] = [
            {**asdict(node), "layer": layers.get(node.name.removesuffix("_nchwc"))} for node in samples.nodes
        ]
    file = run.directory / LAYERS
    write_whole(file, json.dumps({**told, "networks": networks}) + "\n")
    return {file.name: sha256_of(file)}


def files_for(run: Run, facts: Facts, device: str, kind: str = "") -> dict[str, Path]:
    """Both networks' files for a device."""
    return {name: run.directory / facts.export.file(name, device, kind) for name in NETWORKS}


def layers_of(file: Path) -> dict[str, str]:
    """Name of a node, or of what it and the simple nodes behind it put out -> the layer whose weight it multiplies by.

    A runtime that fuses nodes calls the result by the last one's output.
    """
    graph = onnx.load(file, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    found: dict[str, str] = {}
    for node in graph.node:
        weight = next((name for name in node.input[1:2] if name in weights), None)
        if node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None:
            found |= dict.fromkeys((node.name, *node.output), weight.removesuffix(".weight"))
        elif (before := [found[name] for name in node.input if name in found]) and node.op_type in FUSED:
            found |= dict.fromkeys(node.output, before[-1])
    return found


def further_runtimes(run: Run, facts: Facts) -> tuple[tuple[InRuntime, ...], dict[str, str]]:
    """Both networks timed in every further runtime; one that cannot run them says why. The second: files with results.

    Raises:
        DeviceError: a runtime is not installed on a device.
    """
    found, files = [], {}
    for device in run.further:
        models = files_for(run, facts, device.name)
        at = {"device": device.name, "runtime": device.profile.runtime}
        with run.progress.stage(f"Time in {device.profile.runtime} on {device.name}") as report:
            try:
                result = measure(device.target, device.profile, models, "final", noise_floor=device.noise_floor)
            except DeviceError as error:
                found.append(InRuntime(**at, timed=None, reason=str(error)))
                continue
            whole = TimedOnDevice(**vars(timed(result)), statistic=result.statistic)
            report(1, 1, f"speed-up {whole.speedup.value:.2f}x")
        found.append(InRuntime(**at, timed=whole, precision=result.precision("compact")))
        file = run.directory / run.fleet.file("benchmark", f".{device.profile.runtime}.json", device.name)
        write_whole(file, result.to_json() + "\n")
        files[file.name] = sha256_of(file)
    return tuple(found), files


def hops_of(run: Run, facts: Facts) -> tuple[Hop, ...]:
    """Both files on every device and in every runtime but the one that the export was checked with.

    Raises:
        ExportError: ONNX Runtime here cannot run a file.
    """
    elsewhere = [device for device in run.fleet if not _is_here(device.profile)]
    devices = [*elsewhere, *run.further]
    if not devices:
        return ()
    images, labels = first_batch(run, run.workload.search.first(run.config.export.parity_images))
    with run.progress.stage("Compare outputs on devices") as report:
        return tuple(
            _hop(
                run,
                device,
                (name, files_for(run, facts, device.name)[name]),
                exported.artifact.precision,
                images,
                labels,
                partial(report, i + 1, len(devices)),
            )
            for i, device in enumerate(devices)
            for name, exported in facts.export.networks.items()
        )


def _is_here(profile: DeviceProfile) -> bool:
    return kind_of(profile).this_machine and profile.runtime == DEFAULT


def _hop(
    run: Run,
    device: Device,
    exported: tuple[str, Path],
    number: str,
    images: torch.Tensor,
    labels: torch.Tensor,
    told: Callable[[str], None],
) -> Hop:
    """One file on one device.

    Args:
        exported: the network's name, and its file for this device.
        number: the file's precision.
    """
    (name, file), bound = exported, precision(number).tolerance(run.config.export.tolerance)
    tolerance = bound if math.isfinite(bound) else None
    at: dict[str, Any] = {
        "network": name,
        "device": device.name,
        "runtime": device.profile.runtime,
        "tolerance": tolerance,
    }
    try:
        found = hops.compare(run.workload, device.target, device.profile, file, images, labels)
    except DeviceError as error:
        return Hop(**at, error=None, metric=None, metric_here=None, samples=0, reason=str(error))
    told(f"{name}: largest relative difference {found.error:.1e}")
    wrong = "" if found.error <= bound else f"relative error {found.error:.2e} exceeds {bound:g}"
    first = images[:1].numpy()
    return Hop(
        **at,
        error=found.error,
        metric=found.metric,
        metric_here=found.metric_here,
        samples=found.samples,
        reason=wrong,
        tensor=hops.first_divergence(device.target, device.profile, file, first, bound) if wrong else "",
    )


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
    named: dict[str, Any] = {run.config.export.input_name: parity_images(run)[position : position + 1].numpy()}
    np.savez(content, **named)
    write_whole(file, content.getbuffer())
    return file


def _measure(
    run: Run, facts: Facts, title: str, kind: str, inputs: Path | None = None
) -> tuple[Mapping[str, BenchmarkResult], dict[str, str]]:
    """Both ONNX files of a kind, measured at the final tier on every device, and the files that keep the results."""
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
                files_for(run, facts, device.name, kind),
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
