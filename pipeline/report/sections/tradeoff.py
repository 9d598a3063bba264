"""Every candidate: what it costs against what it still gets right."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.pipeline.report import champion
from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material, Point
from secateur.pipeline.run.facts import ControlFacts
from secateur.pruning.plan import PruningPlan

TITLE = "Trade-off"
MOST_DRAWN = 1500
"""Points of a chart; of more, a sample is drawn."""
NAMES = {"latency": "Latency", "macs": "MACs", "params": "Parameters", "size": "File size", "memory": "Peak memory"}
NOUNS = {"latency": "latency", "macs": "MACs", "params": "parameters", "size": "file size", "memory": "peak memory"}
FEWEST = 3
"""Candidates with a latency, for the chart to begin with that axis."""


def section(m: Material) -> Section:
    """The cloud with its front; what is best within a latency."""
    if not m.candidates or not m.reference:
        return nothing(TITLE, "No candidate has been evaluated yet.")
    axes = _axes(m)
    first = next(iter(axes))
    front = m.front(first)
    timed = [point for point in m.candidates if "latency" in point.costs]
    said = f"{say.plural(len(m.candidates), 'candidate')}, {len(front)} on the front"
    if m.chosen is not None:
        said += f"; the compact network is {name_of(m.chosen)}, {_told(m, m.chosen)}"
        said += _best_within(m, m.chosen)
    text = []
    untimed = len(m.candidates) - len(timed)
    if untimed:
        text.append(
            f"{say.plural(untimed, 'candidate')} of {len(m.candidates):,} {'was' if untimed == 1 else 'were'} "
            "neither timed nor predicted, "
            "because the search did not ask; they stand on the axes of MACs, parameters and file size."
        )
    if m.finetune is not None and m.finetune.control is not None:
        chosen, uniform = (m.finetune.control.chosen.evaluation, m.finetune.control.uniform.evaluation)
        text.append(
            f"The uniform control keeps one share of every group at the MACs of the chosen plan. Both as cut from the "
            f"baseline, before any training: {say.percent(uniform[m.metric])} for the uniform control, "
            f"{say.percent(chosen[m.metric])} for the chosen plan.{_control_timed(m.finetune.control)}"
        )
        if m.finetune.control.chosen.candidate.plan == m.finetune.control.uniform.candidate.plan:
            text.append("Both are the same plan: the method chose what cutting every group evenly gives.")
    text += champion.told(m)
    missing = [] if timed else ["Trade-off: no candidate has a latency, because the search did not ask for one."]
    if m.finetune is not None and m.finetune.control is not None and m.finetune.control.uniform_latency is None:
        missing.append("Trade-off: the uniform control was not timed, because the run is of an earlier version.")
    return Section(
        TITLE,
        said + ".",
        text=text,
        figures=[_figure(m, axes, front)],
        tables=[_front_table(m, front, first)],
        missing=missing,
    )


def _control_timed(control: ControlFacts) -> str:
    if control.uniform_latency is None or control.chosen_latency is None:
        return ""
    return (
        f" Timed with the finalists, in {control.uniform.evaluation.precision}, they take "
        f"{say.number(control.uniform_latency)} and {say.number(control.chosen_latency)} of the baseline's latency."
    )


def name_of(point: Point) -> str:
    """What a candidate is called: ``candidate 57 (splice)``, ``final 1``."""
    number = point.key.split()[-1]
    if point.stage == "search":
        return f"candidate {number} ({point.origin})"
    return f"the {point.origin} control" if point.stage == "control" else f"{point.stage} {number}"


def _axes(m: Material) -> dict[str, Axis]:
    """The x axes that candidates have, the one to begin with first."""
    device = m.device
    known = [
        cost for cost in NAMES if sum(cost in p.costs for p in m.candidates) >= (FEWEST if cost == "latency" else 1)
    ]
    if m.timed is not None and all(timing.peak_rss_bytes for timing in m.timed.latency):
        known.append("memory")
    if "latency" not in known and any("latency" in p.costs for p in m.candidates):
        known.append("latency")
    on = {"latency": f" on {device}", "memory": f" on {device}"}
    return {cost: Axis(f"{NAMES[cost]}{on.get(cost, '')}, share of the baseline's") for cost in known}


def _told(m: Material, point: Point) -> str:
    said = f"{say.percent(point.accuracy)} {say.metric(m.metric)} ({point.weights})"
    if "latency" in point.costs:
        return f"{said} at {say.number(point.costs['latency'])} of the latency"
    return f"{said} at {say.number(point.costs.get('macs'))} of the MACs"


def _best_within(m: Material, chosen: Point) -> str:
    base = base_ms(m)
    if base is None or "latency" not in chosen.costs:
        return ""
    limit = chosen.costs["latency"]
    within = [p for p in m.candidates if p.costs.get("latency", 9e9) <= limit]
    best = max(within, key=lambda p: (p.accuracy or 0.0, p.key == chosen.key))
    if best.key == chosen.key:
        return "; no candidate that is as fast is more accurate"
    return f"; at {say.ms(limit * base)} or less the best is {name_of(best)}, {say.percent(best.accuracy)}"


def base_ms(m: Material) -> float | None:
    """Milliseconds of the baseline, by the clock that ratios come from."""
    if m.timed is not None:
        latency = m.timed.latency.baseline
        return latency.cpu_p50_ms if m.timed.statistic == "cpu" else latency.p50_ms
    return m.reference.get("p50_ms")


def drawn(points: Sequence[Point], always: set[str]) -> list[Point]:
    """At most ``MOST_DRAWN`` of them: those that must be there, and a seeded sample of the others."""
    if len(points) <= MOST_DRAWN:
        return list(points)
    others = [point for point in points if point.key not in always]
    room = max(0, MOST_DRAWN - (len(points) - len(others)))
    kept = {point.key for point in random.Random(0).sample(others, min(room, len(others)))} | always  # noqa: S311
    return [point for point in points if point.key in kept]


def _figure(m: Material, axes: Mapping[str, Axis], front: Sequence[Point]) -> Figure:
    controls = [p for p in m.points if p.stage == "control" and p.origin == "uniform" and p.accuracy is not None]
    every = [*m.candidates, *controls]
    always = {p.key for p in every if p.stage != "search"} | {p.key for cost in axes for p in _front(m, cost)}
    shown = drawn(every, always)
    rows, all_rows = [_row(m, p) for p in shown], [_row(m, p) for p in every]
    layers = [*_limits(m, axes)]
    layers.append(Layer("step", _front_rows(m, axes)))
    if spans := [row for p in shown if (row := _span(p)) is not None]:
        layers.append(Layer("spans", spans))
    fixed = [_baseline_row(m), *_champions(m)]
    layers.append(Layer("points", [*rows, *fixed], [*all_rows, *fixed]))
    first = next(iter(axes))
    note = "Filled: measured; hollow: predicted or not timed. A click on a point shows its widths."
    if len(shown) < len(every):
        note += (
            f" {len(shown):,} of {len(every):,} points are drawn: the front, the finalists, the controls and a "
            "sample; the table and the JSON have all."
        )
    chart = Chart(
        axes[first],
        Axis(f"{say.metric(m.metric)} on the search split", shown="%" if _is_share(m) else ""),
        layers,
        f"{say.metric(m.metric)} of {len(every)} candidates against what they cost, with the front as a stepped line",
        switch=axes,
        height=360,
        pinned=True,
    )
    columns = _columns(m)
    table = Table(f"All {len(every):,} candidates", columns, [_cells(p) for p in every])
    return Figure("tradeoff", "What candidates cost and what they get right", chart, table, note)


def _is_share(m: Material) -> bool:
    return 0 <= m.reference.get(m.metric, 0.0) <= 1


def _front(m: Material, cost: str) -> list[Point]:
    return [] if cost == "memory" else m.front(cost)  # only the compact network's is known


def role_of(m: Material, point: Point) -> str:
    """What a candidate's mark stands for."""
    if point.stage == "control":
        return "control"
    return "compact" if m.chosen is not None and point.key == m.chosen.key else "candidate"


def _row(m: Material, point: Point) -> Row:
    costs = dict(point.costs)
    how = "measured" if point.measured else "predicted"
    told = [f"{say.number(value)} of the {NOUNS[cost]}" for cost, value in costs.items() if cost in ("latency", "macs")]
    known = f" ({how})" if "latency" in costs else ""
    return {
        "key": point.key,
        "xs": {cost: round(value, 4) for cost, value in costs.items()},
        "y": round(point.accuracy or 0.0, 5),
        "role": role_of(m, point),
        "hollow": "latency" not in costs or not point.measured,
        "tip": f"{name_of(point)}, {point.weights}: {say.percent(point.accuracy)}; {', '.join(told)}{known}",
    }


def _span(point: Point) -> Row | None:
    if point.ends is None:
        return None
    low, high = point.ends
    ends = ({"latency": round(end, 4)} for end in (low, high))
    return {"xs": next(ends), "xs2": next(ends), "y": round(point.accuracy or 0.0, 5), "role": "candidate"}


def _baseline_row(m: Material) -> Row:
    accuracy = m.reference.get(m.metric)
    tip = f"the baseline: {say.percent(accuracy)}"
    return {"key": "baseline", "xs": dict.fromkeys(NAMES, 1.0), "y": accuracy, "role": "baseline", "tip": tip}


def _champions(m: Material) -> list[Row]:
    """The device's champion, and the one before it; a click on this run's own shows the compact network's widths."""
    rows = champion.rows(m)
    own = {} if m.chosen is None else _row(m, m.chosen)
    return [{**own, **row} if row["role"] == "champion" and "xs" not in row else row for row in rows]


def _front_rows(m: Material, axes: Mapping[str, Axis]) -> list[Row]:
    return [
        {"by": cost, "x": round(p.costs[cost], 4), "y": round(p.accuracy or 0.0, 5), "role": "front"}
        for cost in axes
        for p in _front(m, cost)
    ]


def _limits(m: Material, axes: Mapping[str, Axis]) -> list[Layer]:
    """Targets and budgets as lines, and what lies beyond them shaded."""
    target, bounds = m.config.search.target, dict[str, tuple[float, str]]()
    if target.macs_ratio is not None:
        bounds["macs"] = target.macs_ratio, "target of MACs"
    if target.latency_ratio is not None:
        bounds["latency"] = target.latency_ratio, "target of latency"
    base = m.gate.models.baseline if m.gate is not None else None
    budgets = m.profile.budgets if m.profile is not None and m.config.gate.budgets else None
    if budgets is not None and base is not None:
        told: dict[str, tuple[Any, Any]] = {
            "latency": (budgets.p50_ms, base.timing.p50_ms),
            "size": (budgets.size_bytes, base.size_bytes),
            "memory": (budgets.peak_rss_bytes, base.timing.peak_rss_bytes),
        }
        for cost, (limit, value) in told.items():
            if limit is not None and value:
                bounds[cost] = limit / value, f"budget of {NOUNS[cost]}"
    rows: list[dict[str, Any]] = [
        {"by": cost, "x": bounds[cost][0], "role": "target or budget", "tip": bounds[cost][1]}
        for cost in axes
        if cost in bounds
    ]
    if not rows:
        return []
    highest = {cost: max([1.0, bounds[cost][0], *(p.costs.get(cost, 0.0) for p in m.candidates)]) for cost in bounds}
    beyond = [{"by": r["by"], "x": r["x"], "x2": 1.05 * highest[r["by"]], "role": "target or budget"} for r in rows]
    return [Layer("regions", beyond), Layer("rules", rows)]


def _cells(p: Point) -> list[str]:
    ratio = {cost: say.number(p.costs[cost]) if cost in p.costs else "" for cost in NAMES}
    how = ("measured" if p.measured else "predicted") if "latency" in p.costs else "not timed"
    return [
        name_of(p),
        p.weights,
        say.percent(p.accuracy),
        ratio["latency"],
        how,
        ratio["macs"],
        ratio["params"],
        ratio["size"],
    ]


def _columns(m: Material) -> tuple[str, ...]:
    """Of ``_cells``."""
    costs = ("latency ratio|", "known", "MACs ratio|", "parameters|", "file size|")
    return "candidate", "weights", f"{say.metric(m.metric)}|", *costs


def _front_table(m: Material, front: Sequence[Point], cost: str) -> Table:
    rows = [_cells(point) for point in front[:15]]
    columns = _columns(m)
    more = f" (15 of {len(front)})" if len(front) > 15 else ""
    return Table(
        f"The front: what no other candidate beats in {say.metric(m.metric)} and {NOUNS[cost]}{more}",
        columns,
        rows,
    )


def widths_of(m: Material) -> dict[str, Any]:
    """The widths of every candidate that can be pinned, in the order of the groups."""
    plans: dict[str, PruningPlan] = {point.key: point.plan for point in m.points}
    if not plans:
        return {"groups": [], "sizes": [], "widths": {}}
    sizes = next(iter(plans.values())).sizes
    return {
        "groups": list(sizes),
        "sizes": list(sizes.values()),
        "widths": {key: [plan.widths[name] for name in sizes] for key, plan in plans.items()},
    }
