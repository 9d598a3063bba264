"""How the search went, and what it cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Row, Section, Table, nothing
from secateur.pipeline.report.material import Cost, Material, Point

TITLE = "Search"
NEARLY = 0.95
MOST_TICKS = 500


def section(m: Material) -> Section:
    """Progress, the latency model, and the price."""
    searched = [p for p in m.points if p.stage == "search"]
    known = [p for p in searched if p.status == "ok" and p.accuracy is not None]
    if len(known) < 2:
        return nothing(TITLE, f"The search evaluated {say.plural(len(known), 'candidate')}, which shows no progress.")
    cost = _cost(known)
    volumes = hypervolumes(known, cost)
    total = volumes[-1]
    figures, missing = [], []
    if total > 0:
        reached = next(p for p, volume in zip(known, volumes, strict=True) if volume >= NEARLY * total)
        said = (
            f"{say.percent(NEARLY, 0)} of the final hypervolume after {reached.evaluations:,.0f} of "
            f"{known[-1].evaluations:,.0f} evaluations ({say.seconds(reached.seconds)} of "
            f"{say.seconds(known[-1].seconds)})."
        )
        figures.append(_progress(searched, known, [v / total for v in volumes], cost))
    else:
        said = (
            f"None of {say.plural(len(known), 'candidate')} was both cheaper than the unpruned network and more "
            "accurate than the worst of them: the front did not grow."
        )
        missing.append(f"{TITLE}: the front did not grow, so its progress is not drawn.")
    predicted = _predicted(m)
    if predicted is None:
        missing.append("Search: no plan was both predicted and measured, so the latency model's errors are not drawn.")
    else:
        figures.append(predicted)
    return Section(TITLE, said, text=_text(m, searched), figures=figures, missing=missing)


def _cost(points: Sequence[Point]) -> Cost:
    return "latency" if sum("latency" in p.costs for p in points) >= 0.5 * len(points) else "macs"


def hypervolumes(points: Sequence[Point], cost: Cost) -> list[float]:
    """Area that accuracy and one cost dominate after each point, from cost 1 and the lowest accuracy seen."""
    lowest = min(p.accuracy or 0.0 for p in points)
    front: list[tuple[float, float]] = []  # by rising cost and accuracy
    volumes, volume = [], 0.0
    for point in points:
        place = (point.costs.get(cost, 1.0), point.accuracy or 0.0)
        if place[0] < 1 and not any(c <= place[0] and a >= place[1] for c, a in front):
            front = [(c, a) for c, a in front if not (c >= place[0] and a <= place[1])]
            front.insert(bisect_left(front, place), place)
            ends = [c for c, _ in front[1:]] + [1.0]
            volume = sum((end - c) * (a - lowest) for (c, a), end in zip(front, ends, strict=True))
        volumes.append(volume)
    return volumes


def _progress(searched: Sequence[Point], known: Sequence[Point], shares: Sequence[float], cost: Cost) -> Figure:
    axes = {"evaluations": Axis("Evaluations"), "seconds": Axis("Seconds of search")}
    rows: list[Row] = []
    last = -1.0
    cells = []
    for point, share in zip(known, shares, strict=True):
        if share == last and point is not known[-1]:
            continue
        xs = {"evaluations": point.evaluations, "seconds": round(point.seconds, 2)}
        rows.append(
            {
                "xs": xs,
                "y": round(share, 5),
                "role": "front",
                "tip": f"after {point.evaluations:,.0f} evaluations: {say.percent(share, 1)}",
            }
        )
        cells.append([f"{point.evaluations:,.0f}", say.seconds(point.seconds), say.percent(share, 1)])
        last = share
    layers = [Layer("step", rows), Layer("points", rows)]
    lost = [p for p in searched if p.status != "ok"]
    ticks = [
        {
            "xs": {"evaluations": p.evaluations, "seconds": round(p.seconds, 2)},
            "y": 0.0,
            "role": "failed" if p.status == "failed" else "infeasible",
            "tip": f"{p.key}: {p.status}{', ' + p.reason if p.reason else ''}",
        }
        for p in lost
    ]
    note = ""
    if ticks:
        layers.append(Layer("ticks", ticks[:MOST_TICKS], ticks))
        note = (
            f"{say.plural(len(lost), 'candidate')} at the bottom: outside the window and not evaluated further, "
            "or failed."
        )
    chart = Chart(
        axes["evaluations"],
        Axis("Hypervolume, share of the final", shown="%", domain=(0.0, 1.0)),
        layers,
        "Hypervolume of the front against evaluations, as a share of the final one",
        switch=axes,
        height=220,
    )
    what = "latency" if cost == "latency" else "MACs"
    return Figure(
        "progress",
        f"Progress of the front (accuracy and {what})",
        chart,
        Table("Where the front grew", ("evaluations|", "time|", "hypervolume|"), cells),
        note,
    )


def _predicted(m: Material) -> Figure | None:
    """Plans that were predicted, and measured later."""
    guesses: dict[str, Point] = {}
    pairs = []
    for point in m.points:
        if "latency" not in point.costs:
            continue
        if not point.measured:
            guesses.setdefault(point.plan.digest, point)
        elif point.plan.digest in guesses:
            pairs.append((guesses.pop(point.plan.digest), point))
    if not pairs:
        return None
    rows: list[dict[str, Any]] = [
        {
            "x": round(guess.costs["latency"], 5),
            "y": round(real.costs["latency"], 5),
            "role": "candidate",
            "tip": f"{real.key}: predicted {say.number(guess.costs['latency'])}, measured "
            f"{say.number(real.costs['latency'])}",
        }
        for guess, real in pairs
    ]
    low, high = min(row["x"] for row in rows), max(row["x"] for row in rows)
    lines: list[Row] = [
        {"x": low, "y": low, "x2": high, "y2": high, "role": "both alike", "tip": "predicted = measured"}
    ]
    error = m.search.latency.half_width if m.search is not None else None
    if error:
        lines += [
            {"x": low, "y": low * f, "x2": high, "y2": high * f, "role": "error band", "tip": f"±{error:.1%}"}
            for f in (1 - error, 1 + error)
        ]
    chart = Chart(
        Axis("Predicted latency ratio"),
        Axis("Measured latency ratio"),
        [Layer("spans", lines), Layer("points", rows)],
        "Measured against predicted latency",
        height=260,
    )
    cells = [[real.key, say.number(guess.costs["latency"]), say.number(real.costs["latency"])] for guess, real in pairs]
    return Figure(
        "predicted",
        "The latency model",
        chart,
        Table("Predicted and measured", ("candidate", "predicted|", "measured|"), cells),
        "Red: the model's error band." if error else "",
    )


def _text(m: Material, searched: Sequence[Point]) -> list[str]:
    compat = " (with the quirks of its source, paper_compat)" if m.config.search.options.get("paper_compat") else ""
    said = (
        f"Method: {m.config.search.method}{compat}, going by {say.metric(m.metric)} ({m.metric}) on the search "
        "split, which the test split never touches."
    )
    text = [said]
    if m.search is None:
        return [*text, "The search did not end; this is what its journal holds."]
    spent = m.search.spent
    if spent:
        trained = spent.get("images_trained", 0)
        text.append(
            f"What it cost: {spent.get('images_forwarded', 0):,.0f} images passed forward, {trained:,.0f} trained on "
            f"({say.number(spent.get('epochs', 0))} epochs), "
            f"{say.plural(int(spent.get('measurements', 0)), 'measurement')} on the device, "
            f"{say.seconds(spent.get('seconds'))}."
        )
    latency = m.search.latency
    if latency.samples and latency.median_error is not None and latency.spearman is not None:
        by = [
            f"{say.percent(error, 1)} in multiples of {multiple}" for multiple, error in (latency.errors or {}).items()
        ]
        use = (
            f"it answered for {say.plural(latency.predicted, 'plan')}"
            if latency.trusted
            else "not good enough, so every plan was measured"
        )
        text.append(
            f"The latency model learned from {say.plural(latency.samples, 'measured plan')}; on plans left out its "
            "median error is "
            f"{say.percent(latency.median_error, 1)}{' (' + ', '.join(by) + ')' if by else ''} and its rank "
            f"correlation {say.fixed(latency.spearman, 3)}: {use}."
        )
    else:
        text.append(
            f"{say.plural(latency.measured, 'plan')} {'was' if latency.measured == 1 else 'were'} timed on the "
            f"device, {latency.predicted:,} predicted."
        )
    if (agreement := m.search.agreement) is not None and agreement.spearman is not None:
        text.append(
            f"{agreement.stand_in} and {agreement.metric} rank {agreement.candidates:,} candidates with a "
            f"correlation (Spearman) of {say.fixed(agreement.spearman, 3)}."
        )
    split = m.search.split
    if split is not None and split.memorised:
        text.append(
            "The search images are known by heart to the unpruned network's weights "
            f"({say.percent(split.accuracy, 1)} right, "
            f"{say.percent(split.augmented, 1)} once they are augmented): accuracies of the search are too high."
        )
    return text
