"""How long calls take, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.device_profiles import BenchmarkResult
from secateur.pipeline.report import figures as say
from secateur.pipeline.report import heat
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material

TITLE = "Latency"
NETWORKS = ("baseline", "compact")
QUANTILES = 200
"""Steps of a drawn distribution; the percentiles in the table are of all calls."""
ENOUGH_FOR_P99 = 1000
FIGURES = (
    ("load", "load_ms", say.ms),
    ("first call", "first_ms", say.ms),
    ("p50", "p50_ms", say.ms),
    ("p95", "p95_ms", say.ms),
    ("CPU time, p50", "cpu_p50_ms", say.ms),
    ("CPU time, p95", "cpu_p95_ms", say.ms),
    ("peak memory", "peak_rss_bytes", say.size),
    ("energy of a call", "energy_mj", lambda value: f"{say.number(value)} mJ"),
)
"""Title, field of the timing, and how it is written."""


def section(m: Material) -> Section:
    """Distributions, ratios of processes, times while it measured, and what a start costs."""
    if m.timed is None:
        return nothing(TITLE, "The exported files were not timed.")
    timed, result = m.timed, m.benchmark
    before, after = timed.latency
    said = (
        f"Of 100 calls 95 take less than {say.ms(after.p95_ms)} (baseline {say.ms(before.p95_ms)}); half take "
        f"less than {say.ms(after.p50_ms)} ({say.ms(before.p50_ms)})."
    )
    text = [_how(m), *heat.told(m)]
    if timed.postprocessing is not None:
        behind = timed.postprocessing
        ends = say.between(behind.speedup.low, behind.speedup.high) or "no interval"
        text.append(
            f"The network alone is timed on random numbers. With {behind.name} behind it the time depends on what is "
            f"found: both were timed on a real image in which the baseline finds {behind.found}, the median of the "
            "images "
            f"compared. Speed-up with {behind.name}: {say.times(behind.speedup.value)} ({ends})."
        )
    figures = [] if result is None else [_ecdf(result), _ratios(m, result), *_course(result), _start(m)]
    figures += heat.figures(m)
    tables = [_table(m)]
    if timed.fleet:
        tables.append(_fleet(m))
        text.append(
            f"Charts and tables are of {timed.device}; the search went by the "
            f"{'worst ratio' if m.config.device.combine == 'worst' else 'mean ratio'} of all devices."
        )
    if timed.runtimes:
        tables.append(runtimes(m))
    missing = [] if result is not None else ["Latency: the raw calls (benchmark.json) are not there."]
    if result is not None and not _has_climate(result):
        missing.append("Latency: no temperature or clock frequency beside the times, because the device tells none.")
    missing += heat.missing(m)
    if after.energy_mj is None:
        missing.append("Latency: no energy of a call, because the device counts none.")
    return Section(TITLE, said, text=text, figures=figures, tables=tables, missing=missing)


def _how(m: Material) -> str:
    assert m.timed is not None
    clock = "CPU time, which other work on the device hardly changes" if m.timed.statistic == "cpu" else "wall time"
    said = (
        f"The ratio is taken of {clock}; milliseconds above are wall time. Both networks take turns in the same "
        "fresh process."
    )
    if "contended" in m.timed.flags:
        said += " Other programs used the processor meanwhile: the slowest calls waited for them, not for the network."
    if m.benchmark is not None and m.benchmark.spoiled:
        reasons = say.listing(list(dict.fromkeys(", ".join(m.benchmark.spoiled).split(", "))))
        said += (
            f" {say.plural(len(m.benchmark.spoiled), 'process', 'processes')} more were thrown away and measured "
            f"again ({reasons})."
        )
    return said


def _ecdf(result: BenchmarkResult) -> Figure:
    rows: list[Row] = []
    marks: list[Row] = []
    cells = []
    for name in NETWORKS:
        calls = np.sort(result.wall_ms(name))
        shares = np.linspace(0, 1, min(QUANTILES, len(calls)))
        rows += [
            {"x": round(float(x), 6), "y": round(float(share), 4), "role": name}
            for x, share in zip(np.quantile(calls, shares), shares, strict=True)
        ]
        levels = (50, 90, 95, 99) if len(calls) >= ENOUGH_FOR_P99 else (50, 90, 95)
        told = {level: float(np.percentile(calls, level)) for level in levels}
        marks += [
            {"x": round(value, 6), "y": level / 100, "role": name, "tip": f"{name}: p{level} {say.ms(value)}"}
            for level, value in told.items()
        ]
        cells.append(
            [
                name,
                f"{len(calls):,}",
                *(say.ms(told[level]) if level in told else "needs 1,000 calls" for level in (50, 90, 95, 99)),
            ]
        )
    chart = Chart(
        Axis("Wall time of one call, ms (logarithmic)", scale="log"),
        Axis("Share of calls that take less", shown="%", domain=(0.0, 1.0)),
        [Layer("line", rows), Layer("points", marks)],
        "Cumulative distribution of the time of one call, of both networks, with the percentiles 50, 90 and 95",
    )
    table = Table("Percentiles of single calls", ("network", "calls|", "p50|", "p90|", "p95|", "p99|"), cells)
    return Figure(
        "ecdf",
        "How long calls take",
        chart,
        table,
        "Points: p50, p90, p95" + (" and p99." if len(marks) > 6 else "; p99 would need 1,000 calls."),
    )


def _ratios(m: Material, result: BenchmarkResult) -> Figure:
    found = result.ratio("compact", "baseline")
    clock = f"{result.statistic}_ms"
    rows: list[Row] = []
    cells = []
    for number, process in enumerate(result.processes, start=1):
        before, after = (np.asarray(getattr(process.models[name], clock)) for name in NETWORKS)
        ratio = (
            float(np.median(after) / np.median(before))
            if result.statistic == "cpu"
            else float(np.median(after / before))
        )
        rows.append(
            {
                "x": round(ratio, 5),
                "y": f"process {number}",
                "role": "compact",
                "tip": f"process {number}: {say.fixed(ratio, 3)}",
            }
        )
        cells.append(
            [str(number), say.fixed(ratio, 3), say.ms(float(np.median(before))), say.ms(float(np.median(after)))]
        )
    names = (*(row["y"] for row in rows), "all together")
    layers = [Layer("rules", [{"x": 1.0, "role": "baseline", "tip": "as fast as the baseline"}])]
    floor = result.noise_floor
    note = "A dot is one fresh process."
    if floor is not None:
        layers.insert(
            0,
            Layer(
                "regions", [{"x": 1 - floor, "x2": 1 + floor, "role": "baseline", "tip": "a network against itself"}]
            ),
        )
        note += f" Shaded: what a network against itself differs by in one process (±{say.percent(floor, 1)}, 95 %)."
    if found.known:
        ends = say.between(found.low, found.high)
        layers.append(
            Layer("spans", [{"x": found.low, "x2": found.high, "y": "all together", "role": "compact", "tip": ends}])
        )
        note += f" The line: all together, {ends}."
    layers.append(
        Layer(
            "points",
            [
                *rows,
                {
                    "x": round(found.value, 5),
                    "y": "all together",
                    "role": "compact",
                    "tip": f"all together: {say.fixed(found.value, 3)}",
                },
            ],
        )
    )
    chart = Chart(
        Axis("Latency, share of the baseline's"),
        Axis("Process", scale="names", names=names),
        layers,
        "Latency ratio of every process, and of all together with its interval",
    )
    columns = ("process", "ratio|", "baseline, median|", "compact, median|")
    return Figure(
        "processes",
        "The same in every process",
        chart,
        Table(f"Ratio of every process ({'CPU' if result.statistic == 'cpu' else 'wall'} time)", columns, cells),
        note,
    )


def _course(result: BenchmarkResult) -> list[Figure]:
    """p50 while it measured, with temperature and clock where these can be read."""
    rows: list[Row] = []
    cells = []
    begun = result.processes[0].started
    for process in result.processes:
        both = [np.asarray(process.models[name].wall_ms) for name in NETWORKS]
        ends = np.cumsum(np.sum([calls[: min(map(len, both))] for calls in both], 0)) / 1000
        offset = process.ended - begun - float(ends[-1])
        for second in range(int(ends[-1]) + 1):
            inside = (ends >= second) & (ends < second + 1)
            if not inside.any():
                continue
            at = round(offset + float(ends[inside].mean()), 2)
            medians = [float(np.median(calls[: len(ends)][inside])) for calls in both]
            rows += [
                {"x": at, "y": round(value, 6), "role": name, "tip": f"{name}: {say.ms(value)}"}
                for name, value in zip(NETWORKS, medians, strict=True)
            ]
            cells.append([say.fixed(at, 1), *map(say.ms, medians)])
    x = Axis("Seconds since the measurement began", zero=True)
    chart = Chart(
        x,
        Axis("p50 of a second, ms", zero=True),
        [Layer("line", rows), Layer("points", rows)],
        "Median time of the calls of each second while it was measured",
        height=180,
    )
    figures = [
        Figure(
            "course",
            "While it was measured",
            chart,
            Table("Median of each second", ("seconds|", "baseline|", "compact|"), cells),
        )
    ]
    for key, title, unit in (("temperature_c", "Temperature", "°C"), ("freq_mhz", "Clock frequency", "MHz")):
        told = _climate(result, key)
        if told:
            points = [
                {"x": round(at, 2), "y": value, "role": "candidate", "tip": f"{value:g} {unit}"} for at, value in told
            ]
            drawn = Chart(
                x,
                Axis(f"{title}, {unit}"),
                [Layer("line", points), Layer("points", points)],
                f"{title} while it was measured",
                height=120,
            )
            numbers = [[say.fixed(at, 1), f"{value:g} {unit}"] for at, value in told]
            figures.append(Figure(key, title, drawn, Table(title, ("seconds|", f"{title.lower()}|"), numbers)))
    return figures


def _climate(result: BenchmarkResult, key: str) -> list[tuple[float, float]]:
    begun, told = result.processes[0].started, []
    for process in result.processes:
        for sample in process.environment.get("telemetry", ()):
            value = sample.get(key) if isinstance(sample, dict) else None
            value = value.get("max") if isinstance(value, dict) else value
            if isinstance(value, int | float) and not isinstance(value, bool):
                told.append((process.started - begun + float(sample.get("t_s", 0.0)), float(value)))
    return told


def _has_climate(result: BenchmarkResult) -> bool:
    return any(_climate(result, key) for key in ("temperature_c", "freq_mhz"))


def _start(m: Material) -> Figure:
    assert m.timed is not None
    rows: list[Row] = []
    cells = []
    for name, timing in m.timed.latency.items():
        at = 0.0
        for part, value in (("load", timing.load_ms), ("first call", timing.first_ms), ("steady", timing.p50_ms)):
            rows.append(
                {
                    "x": round(at, 4),
                    "x2": round(at + value, 4),
                    "y": name,
                    "role": part,
                    "tip": f"{name}, {part}: {say.ms(value)}",
                }
            )
            at += value
        cells.append([name, say.ms(timing.load_ms), say.ms(timing.first_ms), say.ms(timing.p50_ms)])
    chart = Chart(
        Axis("Milliseconds, one after another", zero=True),
        Axis("Network", scale="names", names=NETWORKS),
        [Layer("bars", rows)],
        "Time to load each network, of its first call, and of a steady call",
        height=90,
    )
    return Figure(
        "start",
        "What a start costs",
        chart,
        Table("Start and steady state", ("network", "load|", "first call|", "steady call, p50|"), cells),
    )


def _table(m: Material) -> Table:
    assert m.timed is not None
    rows = []
    for title, key, written in FIGURES:
        values = [getattr(timing, key) for timing in m.timed.latency]
        if None not in values:
            rows.append([title, *(written(value) for value in values), say.change(*values)])
    if (behind := m.timed.postprocessing) is not None:
        for title, key in (("p50", "p50_ms"), ("p95", "p95_ms")):
            values = [getattr(timing, key) for timing in behind.latency]
            rows.append([f"{title} with {behind.name}", *map(say.ms, values), say.change(*values)])
    return Table("What was measured", ("", "baseline|", "compact|", "change|"), rows)


def _fleet(m: Material) -> Table:
    assert m.timed is not None and m.timed.fleet is not None
    known = (m.search.latency.devices if m.search is not None else None) or {}
    rows: list[Sequence[str]] = []
    for name, timed in m.timed.fleet.items():
        before, after = timed.latency
        model = known.get(name)
        told = "" if model is None else f"{say.plural(model.measured, 'plan')} measured, {model.predicted:,} predicted"
        rows.append(
            [
                name,
                say.ms(before.p50_ms),
                say.ms(after.p50_ms),
                say.times(timed.speedup.value),
                say.between(timed.speedup.low, timed.speedup.high),
                say.listing(list(timed.flags)),
                told,
            ]
        )
    return Table(
        "Every device",
        ("device", "baseline, p50|", "compact, p50|", "speed-up|", "interval", "what disturbed it", "latency model"),
        rows,
    )


def runtimes(m: Material) -> Table:
    """Every device in each of its runtimes."""
    from secateur.pipeline.report.table import runtimes as rows

    own = m.profile.runtime if m.profile is not None else ""
    columns = ("device", "runtime", "computes in", "baseline|", "compact|", "speed-up", "remark")
    return Table("Runtimes", columns, rows(m.facts, own))
