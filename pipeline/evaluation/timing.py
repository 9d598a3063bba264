"""One measurement of a candidate on one device, interleaved with the unpruned network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from secateur.device_profiles import BenchmarkResult, Ratio, measure
from secateur.pipeline.devices.fleet import Device
from secateur.pipeline.evaluation.latency import Figures
from secateur.pipeline.evaluation.onnx_files import OnnxFiles, PreciseFiles
from secateur.pipeline.evaluation.precisions import FLOAT
from secateur.pruning.plan import PruningPlan


class Timer:
    """Measures plans of one network on one device, at the search tier.

    Args:
        device: where, and how long.
        files: the plans' ONNX files, in one precision.
        dense: gives the figures of the unpruned network in fp32 on this device, measured if they are not known.
        profiled: whether operators are timed as well, where the network's layers are known: a model learns from them.
    """

    def __init__(
        self, device: Device, files: OnnxFiles | PreciseFiles, dense: Callable[[], Figures], *, profiled: bool
    ) -> None:
        self.device, self.files, self.dense, self.profiled = device, files, dense, profiled

    def measure(self, plan: PruningPlan) -> tuple[dict[str, float], BenchmarkResult]:
        """Figures of a plan, and the raw result."""
        baseline = self.files.dense
        if plan.is_full and self.files.precision == FLOAT:
            result = self._measure({"baseline": baseline})
            tail = result.compared_ms("baseline", 95) / result.compared_ms("baseline", 50)
            idle = result.calibrated_ms("baseline")
            times = {"p50_ms": idle, "p95_ms": idle * tail}
            ratio, size = Ratio(1.0, 1.0, 1.0), baseline.stat().st_size
        else:
            dense = self.dense()
            with self.files.of(plan) as path:
                result = self._measure({"baseline": baseline, "candidate": path})
                size = path.stat().st_size
            ratio = result.ratio("candidate", "baseline")
            times = {figure: ratio.value * dense[figure] for figure in ("p50_ms", "p95_ms")}
        ratios = {"latency_ratio": ratio.value}
        if ratio.known:
            ratios |= {"latency_ratio_low": ratio.low, "latency_ratio_high": ratio.high}
        return {**ratios, **times, "size_bytes": float(size)}, result

    def _measure(self, models: Mapping[str, Path]) -> BenchmarkResult:
        nodes = len(models) > 1 and self.profiled and self.files.layers() is not None
        device = self.device
        return measure(device.target, device.profile, models, "search", nodes=nodes, noise_floor=device.noise_floor)
