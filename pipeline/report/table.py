"""The final table of a run, and what became of its model; as rows, lines and Markdown."""

from __future__ import annotations

from secateur.pipeline.report import figures as say
from secateur.pipeline.run.facts import Facts, InRuntime, ModelFacts, Speedup

Row = tuple[str, str, str, str]
METRICS = {"map50": "mAP50", "map": "COCO mAP"}
"""Names of metrics as people know them, where these differ."""
SIZES = (("MACs", "macs", say.count), ("parameters", "params", say.count), ("file size", "size_bytes", say.size))


def final_table(facts: Facts) -> list[Row]:
    """Rows (what, baseline, compact, change) of the table a run ends with."""
    base, compact = facts.gate.models
    metric = facts.gate.metric
    rows: list[Row] = []
    for name in (metric, *(name for name in ("map",) if name in base.metrics)):
        values = say.percent(base[name]), say.percent(compact[name])
        rows.append((f"{METRICS.get(name, name)} (test split)", *values, say.points(compact[name] - base[name])))
    rows += [_other(name, told, base, compact) for name, told in (facts.gate.others or {}).items()]
    for title, key, written in SIZES:
        before, after = base.size[key], compact.size[key]
        rows.append((title, written(before), written(after), say.change(before, after)))
    if (rounded := facts.export.compact.rounded) is not None:
        agreement = f"same argmax as PyTorch in {say.percent(rounded.argmax_agreement, 1)}"
        rows.append(("precision", "fp32", facts.export.compact.artifact.precision, agreement))
    rows.append(_milliseconds("p50 latency", base.timing.p50_ms, compact.timing.p50_ms))
    rows.append(_milliseconds("p95 latency", base.timing.p95_ms, compact.timing.p95_ms))
    timed = facts.benchmark
    if (whole := timed.postprocessing) is not None:
        rows.append(_milliseconds(f"p50 with {whole.name}", *(timing.p50_ms for timing in whole.latency)))
    rows.append(("speed-up", "1.00x", f"{timed.speedup.value:.2f}x", interval(timed.speedup)))
    if timed.flags:
        rows.append(("what disturbed the timing", "", "", ", ".join(timed.flags)))
    others = [row for row in _devices(facts) if row[0] != timed.device]
    return rows + [(f"p50 on {name}", before, now, change) for name, before, now, change in others]


def _other(name: str, told: tuple[str, str], base: ModelFacts, compact: ModelFacts) -> Row:
    """A metric of any unit; its change is a share of what it was."""
    unit, better = told
    before, after = (f"{model[name]:.4g} {unit}".strip() for model in (base, compact))
    change = f"{compact[name] / base[name] - 1:+.1%}" if base[name] else ""
    return f"{name} (test split, {better} is better)", before, after, change


def _milliseconds(title: str, before: float, after: float) -> Row:
    return title, f"{before:.3f} ms", f"{after:.3f} ms", say.change(before, after)


def _devices(facts: Facts) -> list[Row]:
    """Rows (device, p50 of the baseline, of the compact model, speed-up), where there are several devices."""
    rows = []
    for name, timed in (facts.benchmark.fleet or {}).items():
        before, now = (f"{timing.p50_ms:.3f} ms" for timing in timed.latency)
        rows.append((name, before, now, f"{timed.speedup.value:.2f}x, {interval(timed.speedup)}"))
    return rows


def runtimes(facts: Facts, own: str) -> list[tuple[str, ...]]:
    """Rows (device, runtime, precision, both medians, speed-up, remark), where there are several runtimes.

    Args:
        own: the runtime of the devices' profiles.
    """
    if not facts.benchmark.runtimes:
        return []
    timed = [InRuntime(device=n, runtime=own, timed=each) for n, each in facts.benchmark.of_devices.items()]
    every = [*timed, *facts.benchmark.runtimes]
    fastest = {
        device: min((e for e in every if e.device == device and e.timed), key=lambda e: _medians(e)[1]).runtime
        for device in facts.benchmark.of_devices
    }
    return [_in_runtime(entry, entry.runtime == fastest[entry.device]) for entry in every]


def _medians(entry: InRuntime) -> tuple[float, float]:
    """Milliseconds of both networks, by the clock that ratios come from."""
    assert entry.timed is not None
    before, after = entry.timed.latency
    cpu = entry.timed.statistic == "cpu"
    return (before.cpu_p50_ms, after.cpu_p50_ms) if cpu else (before.p50_ms, after.p50_ms)


def _in_runtime(entry: InRuntime, is_fastest: bool) -> tuple[str, ...]:
    if entry.timed is None:
        return entry.device, entry.runtime, "", "", "", "", entry.reason
    times = (f"{ms:.3f} ms" for ms in _medians(entry))
    faster = f"{entry.timed.speedup.value:.2f}x, {interval(entry.timed.speedup)}"
    return entry.device, entry.runtime, entry.precision or "", *times, faster, "the fastest here" if is_fastest else ""


def interval(faster: Speedup) -> str:
    """The interval of a speed-up, in words."""
    if faster.low is None or faster.high is None:
        return "no interval: under 3 processes"
    return say.between(faster.low, faster.high).replace("-", " to ")


def final_table_markdown(facts: Facts) -> str:
    """The final table, the gate and the registered version, as Markdown."""
    lines = ["| | baseline | compact | change |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in final_table(facts)]
    lines += ["", f"Gate: **{'passed' if facts.gate.passed else 'not passed'}**", "", went_by(facts)]
    lines += registered(facts)
    return "\n".join(lines)


def went_by(facts: Facts) -> str:
    """What the search went by, as a sentence."""
    split, said = facts.search.split, f"The search went by {facts.gate.search_metric}"
    return f"{said}; the weights know its images by heart" if split is not None and split.memorised else said


def registered(facts: Facts) -> list[str]:
    """What became of the model in the registry, a line each: its version, and whether it was promoted where."""
    entry, decided = facts.register, facts.promote
    if entry is None:
        return []
    alias = "champion" if decided is not None and decided.promoted else "challenger"
    said = [f"Registered: {entry.name} version {entry.version}, alias {alias}"]
    if decided is None:
        return said
    for device, decision in decided.devices.items():
        if not decision.promoted:
            against = f"champion version {decision.champion}" if decision.champion else "no champion"
            failed = "; ".join(f"{gate.name}: {gate.reason}" for gate in decision.gates if not gate.ok)
            said.append(f"Not promoted on {device} ({against}): {failed}")
    return said + ([f"Not promoted: {decided.reason}"] if decided.reason else [])
