"""Every check of the gate: its value beside its bound."""

from __future__ import annotations

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material
from secateur.pipeline.run.facts import Check

TITLE = "Gates"
FURTHEST = 2.0
"""Bars end at twice the bound."""


def section(m: Material) -> Section:
    """Bullet bars of the checks, and a table."""
    if m.gate is None:
        return nothing(TITLE, "The run did not reach its gate, so no check was made.")
    checks = m.gate.checks
    if not checks:
        return nothing(TITLE, "The run file asks for no check.")
    failed = m.gate.failed
    said = (
        f"All {say.plural(len(checks), 'check')} hold."
        if not failed
        else (
            f"{len(failed)} of {say.plural(len(checks), 'check')} {'does' if len(failed) == 1 else 'do'} not hold: "
            f"{say.listing([_words(m, check) for check in failed])}."
        )
    )
    columns = ("check", "value|", "95 % interval", "must be", "bound|", "result")
    relation = {"<=": "at most", ">": "above"}
    rows = [
        [
            nice(check),
            shown(check, check.value),
            _interval(m, check),
            relation[check.relation],
            shown(check, check.bound),
            "holds" if check.ok else "unknown" if check.value is None else "does not hold",
        ]
        for check in checks
    ]
    table = Table("Checks of the gate", columns, rows)
    return Section(
        TITLE,
        said,
        "bad" if failed else "good",
        figures=[
            Figure(
                "gates",
                "How far each check is from its bound",
                _chart(m),
                table,
                "A dashed line marks the bound. A check that must be at most its bound holds on the left of it, one "
                "that must be above it on the right. Bars end at twice the bound.",
            )
        ],
    )


def nice(check: Check) -> str:
    """A check's name, with the metric as people call it."""
    name = check.name
    if name.startswith("drop in "):
        return f"drop in {say.metric(name.removeprefix('drop in '))}"
    budgets = {
        "p50_ms": "p50 latency",
        "p95_ms": "p95 latency",
        "size_bytes": "file size",
        "peak_rss_bytes": "peak memory",
    }
    first, *rest = name.split(" ", 1)
    return " ".join([f"budget: {budgets[first]}", *rest]) if first in budgets else name


def shown(check: Check, value: float | None) -> str:
    """A value of a check, in its unit."""
    if value is None:
        return say.UNKNOWN
    name = check.name
    if name.startswith("drop in "):
        return say.points(value)
    if name.startswith(("p50_ms", "p95_ms")):
        return say.ms(value)
    if name.startswith(("size_bytes", "peak_rss_bytes")):
        return say.size(value)
    if name.startswith("speed-up"):
        return f"{say.fixed(value, 3)}x"
    return say.number(value) if "ratio" in name else say.number(value, 2)


def _words(m: Material, check: Check) -> str:
    bound = f"must be {'at most' if check.relation == '<=' else 'above'} {shown(check, check.bound)}"
    value = shown(check, check.value)
    told = " (the device does not tell it, or the interval is too wide)" if check.value is None else ""
    return f"{nice(check)} is {value}{told}, {bound}"


def _interval(m: Material, check: Check) -> str:
    """The interval of what is compared, where there is one."""
    assert m.gate is not None
    if check.name.startswith("drop in ") and m.gate.accuracy is not None:
        change = m.gate.accuracy.change
        if change.low is None or change.high is None:
            return "cannot tell"
        return f"{say.between(-change.high, -change.low, say.signed, 100)} pp"
    if check.name.startswith("speed-up") and m.timed is not None:
        name = check.name.removeprefix("speed-up").removesuffix(", lower end").removeprefix(" on ").strip()
        found = m.timed.of_devices.get(name, m.timed).speedup
        return say.between(found.low, found.high)
    return ""


def _share(value: float, bound: float) -> float:
    return FURTHEST if not bound and value > 0 else 0.0 if not bound else max(0.0, min(FURTHEST, value / bound))


def _chart(m: Material) -> Chart:
    assert m.gate is not None
    rows: list[Row] = []
    spans: list[Row] = []
    for check in m.gate.checks:
        role = "holds" if check.ok else "does not hold"
        known = check.value is not None
        rows.append(
            {
                "x": _share(check.value, check.bound) if check.value is not None else FURTHEST,
                "y": nice(check),
                "role": role,
                "hatched": not known,
                "tip": f"{_words(m, check)}: {role}",
            }
        )
        change = m.gate.accuracy.change if m.gate.accuracy is not None else None
        if (
            check.name.startswith("drop in ")
            and check.bound
            and change is not None
            and change.low is not None
            and change.high is not None
        ):
            spans.append(
                {
                    "x": _share(-change.high, check.bound),
                    "x2": _share(-change.low, check.bound),
                    "y": nice(check),
                    "role": "interval",
                    "tip": _interval(m, check),
                }
            )
    names = tuple(dict.fromkeys(row["y"] for row in rows))
    layers = [Layer("bars", rows), Layer("rules", [{"x": 1.0, "role": "bound", "tip": "the bound"}])]
    if spans:
        layers.append(Layer("spans", spans))
    return Chart(
        Axis("Value, share of its bound", zero=True, domain=(0.0, FURTHEST)),
        Axis("Check", scale="names", names=names),
        layers,
        f"How far {len(rows)} checks are from their bounds",
    )
