"""How well MACs tell latency."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Section, Table, nothing
from secateur.pipeline.report.material import Material, Point
from secateur.pipeline.report.sections.tradeoff import drawn, name_of

TITLE = "Why MACs would have misled"
FEWEST = 3


def section(m: Material) -> Section:
    """MACs against measured latency."""
    timed = [p for p in _unique(m.candidates) if "latency" in p.costs and "macs" in p.costs and p.measured]
    if len(timed) < FEWEST:
        return nothing(
            TITLE,
            f"Only {say.plural(len(timed), 'plan')} {'was' if len(timed) == 1 else 'were'} timed, which says nothing "
            "about MACs and latency.",
        )
    correlation = spearman([p.costs["macs"] for p in timed], [p.costs["latency"] for p in timed])
    slower = [p for p in timed if p.costs["latency"] > 1]
    inverted = sum(
        a.costs["macs"] < b.costs["macs"] and a.costs["latency"] > b.costs["latency"] for a in timed for b in timed
    )
    pairs = len(timed) * (len(timed) - 1) // 2
    told = "cannot be told" if correlation is None else say.fixed(correlation, 2)
    said = (
        f"Spearman(MACs, latency) = {told} over {len(timed)} measured plans; {say.plural(len(slower), 'plan')} with "
        "fewer "
        f"MACs than the baseline {'is' if len(slower) == 1 else 'are'} slower than it"
    )
    return Section(
        TITLE,
        f"{said}; in {inverted} of {say.plural(pairs, 'pair')} the plan with fewer MACs is the slower one.",
        figures=[_figure(m, timed)],
    )


def _unique(points: Sequence[Point]) -> list[Point]:
    found: dict[tuple[str, str], Point] = {}
    for point in points:
        found.setdefault((point.plan.digest, point.precision), point)
    return list(found.values())


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; None where one of both does not vary."""
    from scipy.stats import spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def aligned(m: Material, plan_widths: Sequence[int]) -> bool:
    """Whether every width is a multiple of the device's step."""
    multiple = step_of(m)
    return all(width % multiple == 0 for width in plan_widths)


def step_of(m: Material) -> int:
    """The multiple that the widths of convolutions should have on the device."""
    if m.config.device.channel_multiple is not None:
        return m.config.device.channel_multiple
    multiples = m.search.device.multiples if m.search is not None else {}
    return max(1, multiples.get("conv", 1))


def _figure(m: Material, timed: Sequence[Point]) -> Figure:
    shown = drawn(timed, {p.key for p in timed if p.stage == "final"})
    rows = [
        {
            "key": p.key,
            "x": round(p.costs["macs"], 5),
            "y": round(p.costs["latency"], 5),
            "role": "aligned" if aligned(m, list(p.plan.widths.values())) else "unaligned",
            "tip": f"{name_of(p)}: {say.number(p.costs['macs'])} of the MACs, {say.number(p.costs['latency'])} of "
            "the latency",
        }
        for p in shown
    ]
    low = min(0.0, *(row["x"] for row in rows)) if rows else 0.0
    diagonal = [{"x": low, "y": low, "x2": 1.0, "y2": 1.0, "role": "both alike", "tip": "latency falls with MACs"}]
    chart = Chart(
        Axis("MACs, share of the baseline's", zero=True),
        Axis(f"Latency on {m.device}, share of the baseline's", zero=True),
        [Layer("spans", diagonal), Layer("points", rows)],
        "Measured latency against MACs, both as shares of the baseline's, with the diagonal on which both would agree",
        height=320,
    )
    columns = ("candidate", "MACs ratio|", "latency ratio|", "widths")
    cells = [
        [
            name_of(p),
            say.number(p.costs["macs"]),
            say.number(p.costs["latency"]),
            "aligned" if aligned(m, list(p.plan.widths.values())) else "unaligned",
        ]
        for p in timed
    ]
    note = (
        f"Aligned: every width is a multiple of {step_of(m)}, the device's step for convolutions. Above the line: "
        "slower than its MACs say."
    )
    return Figure(
        "macs", "MACs and latency", chart, Table("MACs and latency of every plan that was timed", columns, cells), note
    )
