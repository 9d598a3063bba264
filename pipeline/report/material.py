"""What a report is made from: the files of a run directory, read and put in order. Nothing is computed by a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from secateur.device_profiles import BenchmarkResult, DeviceError, DeviceProfile
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.run import kept_facts
from secateur.pipeline.run.facts import (
    BaselineFacts,
    BenchmarkFacts,
    ExportFacts,
    Facts,
    FinetuneFacts,
    GateFacts,
    PromoteFacts,
    ProofHop,
    RegisterFacts,
    SearchFacts,
)
from secateur.pipeline.run.hop_table import of_device
from secateur.pipeline.run.journal import Record
from secateur.pipeline.run.metric import settled
from secateur.pipeline.run.origin import CODE, read_origin
from secateur.pipeline.run.records import of_candidates, to_candidate
from secateur.pruning.plan import PruningPlan

Cost = Literal["latency", "macs", "params", "size"]
COSTS: Mapping[Cost, str] = {"latency": "latency_ratio", "macs": "macs", "params": "params", "size": "size_bytes"}
"""What a candidate costs, and the metric of an evaluation that says so."""
UNIFORM = "control 0"
"""The point of the uniform control."""
UNLIKE = ("smallest", "reference", "sensitivity", "scope")
"""Stages of a journal whose candidates are not those of a search."""


@dataclass(frozen=True)
class Point:
    """A candidate of a search, a fine-tuned one, or a control.

    Args:
        key: names it within the run.
        weights: ``as cut`` or ``tuned``, with the precision where it is not fp32.
        accuracy: by the metric of the search; None = it was not evaluated.
        costs: ratios to the baseline, those that are known.
        ends: of the 95 % interval of its latency ratio, where there is one.
        measured: whether its latency was measured; False = predicted.
        evaluations, seconds: what the search had spent by then.
    """

    key: str
    stage: str
    origin: str
    weights: str
    status: str
    reason: str
    accuracy: float | None
    costs: Mapping[str, float]
    ends: tuple[float, float] | None
    measured: bool
    plan: PruningPlan
    evaluations: float
    seconds: float
    precision: str = "fp32"


@dataclass(frozen=True)
class Material:
    """A run, as far as it came.

    Args:
        facts: of the stages that are done.
        records: of the journal.
        layers, groups, sustained, changed, pictures: what its files of those names hold; empty = there are none.
        images: what each test image gave, arrays by name.
        code: which code the run was begun with.
        unreachable: whether the tracking server is unreachable just now.
    """

    run_id: str
    config: RunFile
    facts: Facts
    records: Sequence[Record] = ()
    profile: DeviceProfile | None = None
    benchmark: BenchmarkResult | None = None
    layers: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    sustained: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    changed: Sequence[Mapping[str, Any]] = ()
    pictures: Sequence[Mapping[str, Any]] = ()
    code: Mapping[str, Any] = field(default_factory=dict)
    unreachable: bool = False

    @classmethod
    def of(
        cls,
        directory: Path,
        run_id: str,
        config: RunFile,
        facts: Facts,
        records: Sequence[Record],
        profile: DeviceProfile | None,
        unreachable: bool = False,
    ) -> Material:
        """What a run directory holds; files that are missing or damaged are left out."""
        shown = config.report.pictures
        code = read_origin(directory).get(CODE)
        return cls(
            run_id=run_id,
            config=config,
            facts=facts,
            records=records,
            profile=profile,
            benchmark=_benchmark(directory / "benchmark.json"),
            layers=_json(directory / kept_facts.LAYERS),
            groups=_json(directory / kept_facts.GROUPS),
            sustained=_json(directory / kept_facts.SUSTAINED),
            images=_arrays(directory / kept_facts.PER_IMAGE),
            changed=_json(directory / kept_facts.CHANGED).get("changed", ()) if shown else (),
            pictures=_json(directory / kept_facts.PICTURES).get("pictures", ()) if shown else (),
            code=code if isinstance(code, dict) else {},
            unreachable=unreachable,
        )

    # -- what the stages found; None = the run did not come so far -----------------------------------------------------

    @property
    def baseline(self) -> BaselineFacts | None:
        return vars(self.facts).get("baseline")

    @property
    def search(self) -> SearchFacts | None:
        return vars(self.facts).get("search")

    @property
    def finetune(self) -> FinetuneFacts | None:
        return vars(self.facts).get("finetune")

    @property
    def export(self) -> ExportFacts | None:
        return vars(self.facts).get("export")

    @property
    def timed(self) -> BenchmarkFacts | None:
        return vars(self.facts).get("benchmark")

    @property
    def gate(self) -> GateFacts | None:
        return vars(self.facts).get("gate")

    @property
    def register(self) -> RegisterFacts | None:
        return vars(self.facts).get("register")

    @property
    def promote(self) -> PromoteFacts | None:
        return vars(self.facts).get("promote")

    @property
    def hops(self) -> tuple[ProofHop, ...]:
        """Every step to the files and devices, as far as the run came; empty in runs of earlier versions."""
        if self.gate is not None:
            return self.gate.hops or ()
        devices = self.timed.hops if self.timed is not None else None
        return (*((self.export.hops if self.export is not None else None) or ()), *map(of_device, devices or ()))

    # -- names ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The device's name."""
        return self.profile.name if self.profile is not None else Path(self.config.device.profile).stem

    @property
    def metric(self) -> str:
        """The metric that the search went by."""
        if self.gate is not None:
            return self.gate.search_metric
        split = settled(self.records)
        if split is not None:
            return split.metric
        named = self.records[0].get("metrics") if self.records else None
        return str(named[-1]) if named else "top1"

    @property
    def own_metric(self) -> str:
        """The workload's metric, which the gate looks at."""
        return self.gate.metric if self.gate is not None else self.metric

    @property
    def model(self) -> str:
        """The registered model's name."""
        return self.config.tracking.registered_model or self.config.name

    @property
    def begun(self) -> float | None:
        """When the run was begun, seconds since 1970."""
        return self.records[0].get("time") if self.records else None

    # -- candidates ----------------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> Mapping[str, float]:
        """The baseline's metrics under the protocol of the candidates; empty before it is measured."""
        if self.search is not None:
            return self.search.reference.metrics
        found = [r for r in self.records if r.get("stage") == "reference" and r["kind"] == "evaluation"]
        return dict(found[0]["evaluation"]["metrics"]) if found else {}

    @cached_property
    def points(self) -> list[Point]:
        """Every candidate that was evaluated, in the order of the journal."""
        points, spent = [], {"evaluations": 0.0, "seconds": 0.0}
        plans: dict[str, PruningPlan] = {}
        for record in self.records:
            counts = record.get("stage") == "search"
            spent["seconds"] += record.get("spent", {}).get("seconds", 0.0) if counts else 0.0
            if not of_candidates([record]) or record["stage"] in UNLIKE:
                continue
            told = record["candidate"]
            plan = plans.get(told["digest"])
            if plan is None:
                plan = plans[told["digest"]] = to_candidate(told).plan
            spent["evaluations"] += record["evaluation"].get("scored", 1) if counts else 0
            points.append(self._point(record, plan, spent))
        completed = [self._as_timed(self._control(point)) for point in self._with_known_latency(points)]
        return [point for point in completed if not point.plan.is_full]

    def _control(self, point: Point) -> Point:
        """The uniform control with the latency that was measured beside its accuracy."""
        control = self.finetune.control if self.finetune is not None else None
        if point.key != UNIFORM or control is None or control.uniform_latency is None:
            return point
        return replace(point, costs={**point.costs, "latency": control.uniform_latency}, measured=True)

    def _as_timed(self, point: Point) -> Point:
        """The compact network's candidate with what was measured of its file at the end."""
        if self.timed is None or self.finetune is None or point.key != f"final {self.finetune.best.candidate.id}":
            return point
        found, costs = self.timed.speedup, dict(point.costs)
        ends = (1 / found.high, 1 / found.low) if found.low and found.high else None
        costs["latency"] = 1 / found.value
        before, after = (timing.peak_rss_bytes for timing in self.timed.latency)
        if before and after:
            costs["memory"] = after / before
        return replace(point, costs=costs, ends=ends, measured=True)

    def _point(self, record: Record, plan: PruningPlan, spent: Mapping[str, float]) -> Point:
        told, evaluation = record["candidate"], record["evaluation"]
        metrics, base = evaluation["metrics"], self.reference
        precision = evaluation.get("precision", "fp32")
        mark = "tuned" if record["kind"] == "finetune" else "as cut"
        costs: dict[str, float] = {
            name: metrics[key] / (1.0 if name == "latency" else base[key])
            for name, key in COSTS.items()
            if metrics.get(key) is not None and (name == "latency" or base.get(key))
        }
        ends = metrics.get("latency_ratio_low"), metrics.get("latency_ratio_high")
        return Point(
            key=f"{record['stage']} {told['id']}",
            stage=record["stage"],
            origin=told["origin"],
            weights=mark if precision == "fp32" else f"{mark}, {precision}",
            status=evaluation["status"],
            reason=evaluation["reason"],
            accuracy=metrics.get(self.metric),
            costs=costs,
            ends=(ends[0], ends[1]) if ends[0] and ends[1] else None,
            measured=bool(metrics.get("latency_measured", 1.0)),
            plan=plan,
            evaluations=spent["evaluations"],
            seconds=spent["seconds"],
            precision=precision,
        )

    @staticmethod
    def _with_known_latency(points: list[Point]) -> list[Point]:
        """The same plan in the same precision has the same latency, whichever weights it had when it was timed."""
        known: dict[tuple[str, str], Point] = {}
        for point in points:
            if "latency" in point.costs and point.measured:
                known.setdefault((point.plan.digest, point.precision), point)
        completed = []
        for point in points:
            same = known.get((point.plan.digest, point.precision))
            if "latency" not in point.costs and same is not None:
                costs = {"latency": same.costs["latency"], **point.costs}
                point = replace(point, costs=costs, ends=same.ends, measured=True)
            completed.append(point)
        return completed

    @cached_property
    def candidates(self) -> list[Point]:
        """Those of the search and the fine-tuned ones that could be evaluated."""
        return [
            p for p in self.points if p.stage in ("search", "final") and p.status == "ok" and p.accuracy is not None
        ]

    @cached_property
    def chosen(self) -> Point | None:
        """The compact network's candidate."""
        if self.finetune is None:
            return None
        key = f"final {self.finetune.best.candidate.id}"
        return next((point for point in self.candidates if point.key == key), None)

    def front(self, cost: str) -> list[Point]:
        """The candidates that no other beats in accuracy and one cost, the cheapest first."""
        front: list[Point] = []
        known = [point for point in self.candidates if cost in point.costs]
        for point in sorted(known, key=lambda p: (p.costs[cost], -(p.accuracy or 0.0))):
            if not front or (point.accuracy or 0.0) > (front[-1].accuracy or 0.0):
                front.append(point)
        return front


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _benchmark(file: Path) -> BenchmarkResult | None:
    try:
        return BenchmarkResult.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, DeviceError):
        return None


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError):
        return {}
