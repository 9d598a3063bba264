"""The gate: whether a run reached what its run file asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from secateur.pipeline.lifecycle import per_image, promotion
from secateur.pipeline.run import hop_table
from secateur.pipeline.run.facts import AccuracyFacts, Both, Check, Facts, GateFacts, ModelFacts, Speedup
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.loading import load_baseline
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan

TELLING = 0.1
"""How far (fraction) above a latency target the interval of a ratio may reach, to be called at the target."""


def gate(run: Run, facts: Facts) -> GateFacts:
    """Read the test split, once, through the very files that were timed; then the gate.

    Raises:
        ExportError: an exported file cannot be run.
    """
    models, accuracy, files = _models(run, facts)
    checks = tuple(checks_of(run, facts, models))
    hops = (*(facts.export.hops or ()), *map(hop_table.of_device, facts.benchmark.hops or ()))
    return GateFacts(
        models=models,
        checks=checks,
        passed=all(check.ok for check in checks),
        metric=run.workload.metric,
        search_metric=run.workload.search_metric,
        others=getattr(run.workload, "others", None),
        accuracy=accuracy,
        hops=hops,
        broken=hop_table.first_broken(hops),
        files=files,
    )


def _models(run: Run, facts: Facts) -> tuple[Both[ModelFacts], AccuracyFacts, dict[str, str]]:
    """What is known of each network at the end, how sure its accuracy is, and the files with what each image gave."""
    _, graph = load_baseline(run)
    plans = (PruningPlan.full(graph.groups), facts.finetune.best.candidate.plan)
    models, every = [], []
    with run.progress.stage("Read the test split") as report:
        named = zip(facts.export.networks.items(), plans, facts.benchmark.latency, strict=True)
        for (name, exported), plan, timing in named:
            answers, targets = promotion.test_answers(run.workload, run.directory / f"{name}.onnx")
            metrics, costs = dict(run.workload.test_metrics(answers, targets)), cost(graph, plan)
            every.append(answers)
            models.append(
                ModelFacts(
                    metrics=metrics,
                    macs=costs.macs,
                    params=costs.params,
                    size_bytes=exported.artifact.size_bytes,
                    timing=timing,
                )
            )
            report(len(models), 2, f"{run.workload.metric} {metrics[run.workload.metric]:.4f}")
    accuracy = per_image.accuracy_of(run.workload, every, targets)
    files = per_image.keep(run.directory, run.workload, every, targets, run.config.report.pictures)
    return Both(*models), accuracy, files


def checks_of(run: Run, facts: Facts, models: Both[ModelFacts]) -> Iterator[Check]:
    """Every check of the gate, of the proofs first, then of what the run file and the devices ask for."""
    section, metric = run.config.gate, run.workload.metric
    base, compact = models
    yield check("certificate of the cut", facts.export.certificate.max_relative_error, "<=", hop_table.CERTIFIED)
    for name, exported in facts.export.networks.items():
        yield check(f"parity of {name}", exported.parity.max_relative_error, "<=", run.config.export.tolerance)
        if exported.postprocessing is not None:
            yield check(f"results of {name} that differ", float(exported.postprocessing.differing), "<=", 0.0)
    for hop in facts.benchmark.hops or ():
        if hop.samples and hop.tolerance is not None:  # one that could not be run was not timed either
            name = f"parity of {hop.network} in {hop.runtime} on {hop.device}"
            yield check(name, float("nan") if hop.error is None else hop.error, "<=", hop.tolerance)
    yield from _search_target(run, facts, base, compact)
    if section.max_drop is not None:
        yield check(f"drop in {metric}", round(base[metric] - compact[metric], 6), "<=", section.max_drop)
    if section.min_speedup is not None:
        for device, timed in facts.benchmark.of_devices.items():
            yield check(f"speed-up{_on(run, device)}, lower end", timed.speedup.low, ">", section.min_speedup)
    if section.max_macs_ratio is not None:
        yield check("MACs ratio", compact.macs / base.macs, "<=", section.max_macs_ratio)
    if section.budgets:
        yield from _budgets(run, facts, compact)


def _search_target(run: Run, facts: Facts, base: ModelFacts, compact: ModelFacts) -> Iterator[Check]:
    """Whether the compact network is at the target that was searched for."""
    target, combine = run.goal, run.config.device.combine
    if target.macs_ratio is not None:
        yield check("search target: MACs ratio", compact.macs / base.macs, "<=", target.macs_ratio)
    if target.latency_ratio is None:
        return
    timed = facts.benchmark.of_devices
    if combine == "mean":
        ends = [[_ratios(each.speedup)[i] for each in timed.values()] for i in (0, 1)]
        yield _latency_check("", math.fsum(ends[0]) / len(timed), math.fsum(ends[1]) / len(timed), target.latency_ratio)
        return
    for device, each in timed.items():
        yield _latency_check(_on(run, device), *_ratios(each.speedup), target.latency_ratio)


def _latency_check(on: str, low: float, high: float, target: float) -> Check:
    """A latency ratio against its target: it holds where the interval reaches down to the target.

    An interval that reaches further than ``TELLING`` above the target, or is not there, cannot tell, and does not hold.
    """
    telling = low > target or high <= (1 + TELLING) * target
    return check(f"search target: latency ratio{on}, lower end", low if telling else None, "<=", target)


def _ratios(speedup: Speedup) -> tuple[float, float]:
    """The 95 % interval of the compact network's latency as a ratio to the unpruned one's; NaN where there is none."""
    if speedup.low is None or speedup.high is None:
        return math.nan, math.nan
    return 1 / speedup.high, 1 / speedup.low


def check(name: str, value: float | None, relation: str, bound: float) -> Check:
    """One comparison; what is unknown does not hold.

    Args:
        value: what was found; None or NaN = unknown.
        relation: ``<=`` or ``>``.
    """
    known = math.nan if value is None else value
    ok = {"<=": known <= bound, ">": known > bound}[relation]
    return Check(name=name, value=None if math.isnan(known) else value, relation=relation, bound=bound, ok=bool(ok))


def _budgets(run: Run, facts: Facts, compact: ModelFacts) -> Iterator[Check]:
    """The limits of every device; what a device does not tell cannot be promised."""
    for profile in run.profiles:
        figures = replace(compact, timing=facts.benchmark.of_devices[profile.name].latency.compact).flat()
        for name, limit in profile.budgets.model_dump().items():
            if limit is not None:
                yield check(f"{name}{_on(run, profile.name)}", figures[name], "<=", limit)


def _on(run: Run, device: str) -> str:
    """What tells a device's check from those of others; empty where there is one device."""
    return f" on {device}" if len(run.profiles) > 1 else ""
