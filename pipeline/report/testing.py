"""A whole run, made up: what tests and benchmarks of reports draw, with as many candidates as they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.device_profiles import BenchmarkResult, DeviceProfile
from secateur.device_profiles.measure import ModelSamples, Process
from secateur.export.artifact import ExportedModel, TensorSpec
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.devices.device import RunDevice
from secateur.pipeline.report.material import Material
from secateur.pipeline.run import facts as found
from secateur.pipeline.run.records import describe
from secateur.pipeline.training.curve import EpochFacts, Fitted
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import Candidate, Entry, Evaluation

GROUPS = {f"layer{stage}.{block}.conv1": 16 * stage for stage in (1, 2, 3) for block in range(3)}
CLASSES = tuple("ABCDEFGHIJ")
BASE = {"macs": 10e6, "params": 270e3, "size_bytes": 1.1e6, "p50_ms": 0.25}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Erk"
    "Jggg=="
)


def made_up(num_candidates: int = 60, seed: int = 0, **changes: Any) -> Material:
    """A run of a small classifier that went to its end.

    Args:
        changes: fields of the material that are to be others.
    """
    rng = np.random.default_rng(seed)
    records = _records(num_candidates, rng)
    told: dict[str, Any] = {
        "run_id": "made-up-20260101-000000-abcd",
        "config": RunFile.model_validate(
            {"name": "made-up", "workload": {"name": "classification"}, "search": {"target": {"macs_ratio": 0.6}}}
        ),
        "facts": _facts(records, rng),
        "records": records,
        "profile": DeviceProfile(name="local", description="A machine that does not exist"),
        "benchmark": _benchmark(rng),
        "layers": _layers(rng),
        "groups": {
            "groups": [{"name": name, "channels": size, "macs_share": 0.1} for name, size in GROUPS.items()],
            "frozen": [{"layer": "fc", "channels": 10, "macs_share": 0.001, "reason": "reaches the model's output"}],
        },
        "sustained": {
            "seconds": [
                {"t_s": float(i), "calls": 5000, "p50_ms": 0.17 + 0.001 * i, "p95_ms": 0.25} for i in range(30)
            ],
            "sensors": [{"t_s": 0.5 * i, "temperature_c": min(71.0, 50.0 + 0.5 * i)} for i in range(60)],
        },
        "images": _images(rng),
        "changed": [{"image": at, "picture": PIXEL} for at in (0, 1)],
        "code": {"secateur": "0.0", "git": "0" * 40, "lock": "0" * 64},
    }
    return Material(**{**told, **changes})


def _plan(widths: Mapping[str, int]) -> PruningPlan:
    return PruningPlan(GROUPS, {name: tuple(range(width)) for name, width in widths.items()})


def _records(num: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    full = _plan(GROUPS)
    header = {
        "kind": "run",
        "format": 5,
        "run_id": "made-up",
        "data": "0123456789abcdef",
        "metrics": ["top1"],
        "time": 1.767e9,
    }
    reference = {**BASE, "top1": 0.95, "latency_ratio": 1.0}
    records: list[dict[str, Any]] = [header, _record("reference", 0, "reference", full, reference)]
    for number in range(num):
        keep = rng.uniform(0.3, 1.0, len(GROUPS))
        if number < len(GROUPS):  # cuts of one group alone
            keep[:] = 1.0
            keep[number] = 0.5
        widths = {name: max(1, round(share * size)) for (name, size), share in zip(GROUPS.items(), keep, strict=True)}
        share = float(np.mean(keep))
        metrics = {key: value * share**2 for key, value in BASE.items()}
        metrics |= {"top1": float(0.95 - 0.2 * (1 - share) ** 2 + rng.normal(0, 0.005)), "loss": 0.2}
        measured = float(number % 3 == 0)
        ratio = float(share + rng.normal(0, 0.02))
        metrics |= {"latency_ratio": ratio, "latency_measured": measured}
        if measured:
            metrics |= {"latency_ratio_low": 0.98 * ratio, "latency_ratio_high": 1.02 * ratio}
        records.append(_record("search", number, "random", _plan(widths), metrics))
    lost = _record("search", num, "random", full.replace({"layer1.0.conv1": range(3)}), {"macs": 9e6})
    lost["evaluation"] |= {"status": "infeasible", "reason": "outside the window"}
    best = _plan({name: size // 2 for name, size in GROUPS.items()})
    tuned = {**{key: 0.5 * value for key, value in BASE.items()}, "top1": 0.94, "latency_ratio": 0.7}
    final = {**_record("final", 0, "final", best, tuned), "kind": "finetune", "base": "tuned"}
    control = {**{key: 0.5 * value for key, value in BASE.items()}, "top1": 0.86}
    return [*records, lost, final, _record("control", 0, "uniform", best, control)]


def _record(stage: str, number: int, origin: str, plan: PruningPlan, metrics: Mapping[str, float]) -> dict[str, Any]:
    evaluation = {"status": "ok", "reason": "", "metrics": dict(metrics)}
    candidate = describe(Candidate(number, plan, origin))
    return {
        "stage": stage,
        "kind": "evaluation",
        "candidate": candidate,
        "evaluation": evaluation,
        "spent": {"seconds": 0.5},
    }


def _timing(scale: float) -> found.Timing:
    return found.Timing(
        p50_ms=0.25 * scale,
        p95_ms=0.4 * scale,
        cpu_p50_ms=0.24 * scale,
        cpu_p95_ms=0.3 * scale,
        load_ms=40.0,
        first_ms=0.9,
        peak_rss_bytes=round(80e6 * (0.9 + 0.1 * scale)),
    )


def _fitted(epochs: int) -> Fitted:
    curve = tuple(
        EpochFacts(epoch=epoch, loss=2 / epoch, lr=0.1 / epoch, metrics={"top1": 0.95 - 0.3 / epoch})
        for epoch in range(1, epochs + 1)
    )
    return Fitted(precision="fp32", keep="last", kept_epoch=epochs, curve=curve)


def _facts(records: list[dict[str, Any]], rng: np.random.Generator) -> found.Facts:
    best = _plan({name: size // 2 for name, size in GROUPS.items()})
    metrics = {**{key: 0.5 * value for key, value in BASE.items()}, "top1": 0.94, "latency_ratio": 0.7}
    entry = Entry(Candidate(0, best, "final", (1,), "tuned"), Evaluation(metrics=metrics))
    uniform = Entry(Candidate(0, best, "uniform"), Evaluation(metrics={**metrics, "top1": 0.86}))
    proof = found.Proof(ok=True, max_relative_error=2e-7, reason="")
    parity = found.ParityFacts(**vars(proof), argmax_agreement=1.0, samples=64)
    timings = found.Both(_timing(1.0), _timing(0.72))
    models = [
        found.ModelFacts(
            metrics={"top1": top1},
            macs=round(BASE["macs"] * share),
            params=round(BASE["params"] * share),
            size_bytes=round(BASE["size_bytes"] * share),
            timing=timing,
        )
        for top1, share, timing in zip((0.955, 0.945), (1.0, 0.5), timings, strict=True)
    ]
    curves = {
        kind: {width: float(0.1 + 0.01 * (-(-width // 16) * 16) + rng.uniform(0, 0.01)) for width in range(4, 65, 4)}
        for kind in ("conv", "depthwise")
    }
    checks = (
        found.Check(name="certificate of the cut", value=2e-7, relation="<=", bound=1e-4, ok=True),
        found.Check(name="drop in top1", value=0.01, relation="<=", bound=0.02, ok=True),
        found.Check(name="speed-up, lower end", value=1.38, relation=">", bound=1.0, ok=True),
        found.Check(name="peak_rss_bytes", value=None, relation="<=", bound=1e8, ok=False),
    )
    latency = found.LatencyFacts(
        measured=20, predicted=40, trusted=True, median_error=0.03, spearman=0.97, half_width=0.06, samples=20
    )

    hops = (
        found.ProofHop(
            name="cut",
            expected="unpruned network in PyTorch, removed channels masked",
            found="pruned network in PyTorch",
            error=2e-7,
            tolerance=1e-4,
            metric_expected=0.95,
            metric=0.94,
            samples=64,
        ),
    )

    def interval(value: float) -> found.Interval:
        return found.Interval(value=value, low=value - 0.012, high=value + 0.012)

    return found.Facts(
        baseline=found.BaselineFacts(
            origin="trained (0)", training=_fitted(8), files={"baseline.safetensors": "0" * 64}
        ),
        search=found.SearchFacts(
            reference=Evaluation(metrics={**BASE, "top1": 0.95}),
            archive=(entry,),
            num_candidates=len(records) - 4,
            agreement=None,
            spent={
                "evaluations": float(len(records) - 4),
                "seconds": 30.0,
                "images_forwarded": 9000,
                "measurements": 20,
            },
            latency=latency,
            device=RunDevice("f", {"conv": 16}, 0.02, curves, "a probe of the device", {"cpus": 4, "cpu": "Made up"}),
            certificate=proof,
            graph="9 channel groups",
            layer_precisions=found.LayerPrecisions(
                tried=("fp32", "int8", f"int8 except {next(iter(GROUPS))}"),
                sensitivity={"int8": {name: round(0.4 / (i + 2), 4) for i, name in enumerate(GROUPS)}},
            ),
            precision_latency={"int8": {"local": 1.21}},
            files={},
        ),
        finetune=found.FinetuneFacts(
            best=entry,
            finals=(entry,),
            control=found.ControlFacts(uniform=uniform, chosen=entry, uniform_latency=0.79, chosen_latency=0.7),
            training=_fitted(5),
            files={"compact.safetensors": "1" * 64},
        ),
        export=found.ExportFacts(
            baseline=_exported("baseline", parity),
            compact=_exported("compact", parity),
            certificate=proof,
            usage={"image_size": 16, "mean": [0.3], "std": [0.3], "classes": list(CLASSES)},
            files={"compact.onnx": "2" * 64},
        ),
        benchmark=found.BenchmarkFacts(
            latency=timings,
            speedup=found.Speedup(low=1.38, high=1.40, value=1.39),
            flags=(),
            statistic="cpu",
            device="local",
            sustained=found.SustainedFacts(
                seconds=30.0, calls=150_000, first_p50_ms=0.17, last_p50_ms=0.2, temperature_c=(50.0, 71.0, 70.0)
            ),
            files={},
        ),
        gate=found.GateFacts(
            models=found.Both(*models),
            checks=checks,
            passed=False,
            metric="top1",
            search_metric="top1",
            accuracy=found.AccuracyFacts(
                images=400, draws=1000, baseline=interval(0.955), compact=interval(0.945), change=interval(-0.01)
            ),
            hops=hops,
            files={},
        ),
    )


def _exported(name: str, parity: found.ParityFacts) -> found.ExportedNetwork:
    ports = {"input": TensorSpec((1, 1, 16, 16), "float32")}
    artifact = ExportedModel(Path(f"/somewhere/{name}.onnx"), "3" * 64, 20, "fp32", ports, {}, 1_100_000)
    return found.ExportedNetwork(artifact=artifact, parity=parity)


def _benchmark(rng: np.random.Generator) -> BenchmarkResult:
    def samples(ms: float) -> ModelSamples:
        cpu = tuple(map(float, ms * rng.lognormal(0, 0.05, 200)))
        wall = tuple(map(float, np.asarray(cpu) * rng.lognormal(0.05, 0.1, 200)))
        return ModelSamples(wall, cpu, load_ms=40.0, first_ms=0.9, output_sha256="", peak_rss_bytes=80_000_000)

    processes = []
    for number in range(5):
        telemetry = [
            {"t_s": 0.1 * i, "phase": "timing", "freq_mhz": 2000 + i, "temperature_c": 50.0 + i} for i in range(5)
        ]
        environment = {
            "onnxruntime": "1.31.1",
            "host": "a-name",
            "steal": 0.0,
            "loadavg": [0.4, 0.3, 0.2],
            "cpu_pressure": 0.001,
            "telemetry": telemetry,
        }
        models = {"baseline": samples(0.24), "compact": samples(0.17)}
        processes.append(Process(models, environment, 1.767e9 + 2 * number, 1.767e9 + 2 * number + 1))
    digests = {"baseline": "0", "compact": "1"}
    return BenchmarkResult(
        "local", "final", ("baseline", "compact"), digests, "cpu", tuple(processes), noise_floor=0.02
    )


def _layers(rng: np.random.Generator) -> dict[str, Any]:
    def nodes(share: float) -> list[dict[str, Any]]:
        return [
            {
                "name": f"conv_{i}",
                "op": "Conv" if i % 4 else "Add",
                "ms": float(share * rng.uniform(0.005, 0.03)),
                "input_shapes": [[1, 16, 16, 16], [16, 16, 3, 3]],
                "output_shapes": [[1, 16, 16, 16]],
            }
            for i in range(12)
        ]

    return {"format": 1, "device": "local", "networks": {"baseline": nodes(1.0), "compact": nodes(0.7)}}


def _images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    targets = np.arange(400) % len(CLASSES)
    before, after = targets.copy(), targets.copy()
    before[rng.choice(np.arange(2, 400), 18, replace=False)] += 1
    after[rng.choice(np.arange(2, 400), 22, replace=False)] += 1
    before[1], after[0] = before[1] + 1, after[0] + 1
    found = {"baseline.found": before % len(CLASSES), "compact.found": after % len(CLASSES)}
    return {**found, "baseline.target": targets, "compact.target": targets}
