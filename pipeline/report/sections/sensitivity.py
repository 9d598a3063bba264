"""How much accuracy each group costs when it alone is cut."""

from __future__ import annotations

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Ramp, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material
from secateur.pipeline.run.records import of_candidates, to_candidate
from secateur.pruning.plan import PruningPlan

TITLE = "Sensitivity"
KEEPS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Keep ratios that columns may have; a cut stands in the nearest one."""
USUAL = (0.75, 0.5, 0.25)
"""Those that stand there in any case."""


def section(m: Material) -> Section:
    """A heat map of group and keep ratio; what was not measured is hatched."""
    base = m.reference.get(m.metric)
    if base is None:
        return nothing(TITLE, "The baseline was not evaluated, so no loss of accuracy is known.")
    cells = measured(m)
    groups = _groups(m)
    swept = sum(record.get("stage") == "sensitivity" for record in m.records)
    how = "Three evaluations a group fill it: set report.sensitivity: true in the run file and resume."
    if not cells:
        return nothing(TITLE, f"Not measured: the search never cut one group alone. {how}")
    worst = max(cells, key=lambda place: base - cells[place])
    said = (
        f"{worst[0]} is the most sensitive: at {say.percent(worst[1], 0)} of its channels {say.metric(m.metric)} "
        f"falls by {say.points(base - cells[worst]).lstrip('+')}."
    )
    text = [] if swept else [f"From what the search saw: cuts of one group alone. {how}"]
    columns_of = [keep for keep in KEEPS if keep in USUAL or any(place[1] == keep for place in cells)]
    rows: list[Row] = []
    table = []
    for group in groups:
        line = [group]
        for keep in columns_of:
            accuracy = cells.get((group, keep))
            lost = None if accuracy is None else base - accuracy
            told = "not measured" if lost is None else f"{say.points(-lost)}"
            value = None if lost is None else round(max(0.0, 100 * lost), 3)
            rows.append(
                {
                    "x": f"{keep:.1%}".replace(".0", ""),
                    "y": group,
                    "value": value,
                    "tip": f"{group} at {keep:.1%}: {told}",
                }
            )
            line.append(told)
        table.append(line)
    most = max([row["value"] for row in rows if row["value"] is not None], default=0.0)
    names = tuple(f"{keep:.1%}".replace(".0", "") for keep in columns_of)
    chart = Chart(
        Axis("Share of its channels kept", scale="names", names=names),
        Axis("Channel group", scale="names", names=tuple(groups)),
        [Layer("cells", rows)],
        "Accuracy lost when one group alone is cut, by group and share of its channels",
        height=max(80, 22 * len(groups)),
        ramp=Ramp(f"{say.metric(m.metric)} lost", "0 pp", f"{say.number(most)} pp") if most else None,
    )
    columns = ("group", *(f"{name}|" for name in names))
    note = f"Darker: more {say.metric(m.metric)} lost, before any training; hatched: not measured."
    figure = Figure(
        "sensitivity", "Accuracy lost by cutting one group", chart, Table("Change of accuracy", columns, table), note
    )
    missing = (
        []
        if len(cells) >= len(groups)
        else [f"Sensitivity: {len(cells)} of {len(groups) * len(columns_of)} cuts of one group were measured."]
    )
    return Section(TITLE, said, text=text, figures=[figure], missing=missing)


def _groups(m: Material) -> list[str]:
    plan = next((point.plan for point in m.points), None)
    return [] if plan is None else list(plan.sizes)


def measured(m: Material) -> dict[tuple[str, float], float]:
    """(group, keep ratio) -> accuracy, of every cut that touches one group alone and was not trained after."""
    found: dict[tuple[str, float], float] = {}
    plans: dict[str, PruningPlan] = {}
    for record in of_candidates(m.records):
        accuracy = record["evaluation"]["metrics"].get(m.metric)
        told = record["candidate"]
        if accuracy is None or record["kind"] == "finetune" or told["base"]:
            continue
        plan = plans.get(told["digest"]) or plans.setdefault(told["digest"], to_candidate(told).plan)
        cut = [name for name in plan.sizes if plan.widths[name] < plan.sizes[name]]
        if len(cut) == 1:
            ratio = plan.widths[cut[0]] / plan.sizes[cut[0]]
            found[cut[0], min(KEEPS, key=lambda keep: abs(keep - ratio))] = accuracy
    return found
