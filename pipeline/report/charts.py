"""Charts as SVG text, for pages without scripts: no fonts, no network; drawn axis titles, every mark with a tooltip."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup

from secateur.pipeline.report.content import Axis, Chart, Layer, Row
from secateur.pipeline.report.figures import number, percent
from secateur.pipeline.report.roles import DARKEST, PALE, on_ramp, role
from secateur.pipeline.report.vega import height

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640, 64, 14, 10, 46
NAMES_LEFT = 170
LONGEST_NAME = 24
MANY = 300
"""Points of a layer above which they are drawn in one go."""


def lines(curves: Mapping[str, Mapping[int, float]], x_title: str, y_title: str, grid: int = 0) -> Markup:
    """Lines through (x, y) points, each scaled to its own smallest y; a dashed rule at every multiple of ``grid``."""
    rows = [
        {
            "x": float(x),
            "y": y / min(curve.values()),
            "role": name,
            "tip": f"{name}: {x:g} channels, {y / min(curve.values()):.2f}x",
        }
        for name, curve in curves.items()
        for x, y in sorted(curve.items())
    ]
    multiples = sorted({x for curve in curves.values() for x in curve if grid and x % grid == 0})
    layers = [
        Layer("rules", [{"x": float(x), "role": "baseline"} for x in multiples]),
        Layer("line", rows),
        Layer("points", rows),
    ]
    return svg(Chart(Axis(x_title), Axis(y_title, zero=True), layers, f"{y_title} against {x_title}"))


def svg(chart: Chart) -> Markup:
    """A chart, drawn; marks of a switched chart stand at the first of its x axes, those that a slider hides do not."""
    chart = _begun(chart)
    frame = _Frame(chart)
    marks = "".join(_DRAWN[layer.mark](frame, chart, layer.rows) for layer in chart.layers)
    label = escape(chart.describes, quote=True)
    return Markup(  # noqa: S704  all text in it is escaped
        f'<svg class="still" viewBox="0 0 {WIDTH} {frame.height}" role="img" aria-label="{label}">'
        f"{frame.axes()}{marks}</svg>"
    )


def _begun(chart: Chart) -> Chart:
    """A chart with what its slider shows at the beginning."""
    if chart.least is None:
        return chart
    start = chart.least.start
    layers = [
        replace(each, rows=[row for row in each.rows if row.get("size", start) >= start]) for each in chart.layers
    ]
    left = {row.get("y") for each in layers for row in each.rows}
    names = tuple(name for name in chart.y.names if name in left)
    return replace(chart, layers=layers, y=replace(chart.y, names=names))


class _Frame:
    """Axes: from data to pixels, with round ticks."""

    def __init__(self, chart: Chart) -> None:
        self.chart, self.height = chart, height(chart) + TOP + BOTTOM
        self.by = next(iter(chart.switch)) if chart.switch else ""
        self.x_axis = chart.switch[self.by] if chart.switch else chart.x
        self.left = NAMES_LEFT if chart.y.scale == "names" else LEFT
        rows = [row for layer in chart.layers for row in layer.rows if self.stands(row)]
        self.x_scale = _Scale(self.x_axis, [v for row in rows for v in self.xs(row)], (self.left, WIDTH - RIGHT))
        ys = [row[key] for row in rows for key in ("y", "y2") if row.get(key) is not None]
        upwards = chart.y.scale != "names"
        self.y_scale = _Scale(chart.y, ys, (self.height - BOTTOM, TOP) if upwards else (TOP, self.height - BOTTOM))

    def stands(self, row: Row) -> bool:
        """Whether it is drawn at this x axis."""
        return row.get("by", self.by) == self.by and ("xs" not in row or row["xs"].get(self.by) is not None)

    def xs(self, row: Row) -> list[Any]:
        """Its places on the x axis."""
        told = [row["xs"][self.by]] if "xs" in row else [row.get("x")]
        told += [row["xs2"].get(self.by)] if "xs2" in row else [row.get("x2")]
        return [value for value in told if value is not None]

    def place(self, row: Row) -> tuple[float | None, float | None, float | None, float | None]:
        """x, y, x2 and y2 in pixels; None = it has none."""
        xs = self.xs(row)
        x = self.x_scale(xs[0]) if xs else None
        x2 = self.x_scale(xs[1]) if len(xs) > 1 else None
        y, y2 = (None if row.get(key) is None else self.y_scale(row[key]) for key in ("y", "y2"))
        return x, y, x2, y2

    def axes(self) -> str:
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        parts = []
        for value, text in self.x_scale.ticks():
            at = self.x_scale(value)
            parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{bottom}"/>')
            parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
        for value, text in self.y_scale.ticks():
            at = self.y_scale(value)
            if self.chart.y.scale != "names":
                parts.append(f'<path class="grid" d="M{self.left} {at:.1f}H{right}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        middle = (self.left + right) / 2
        parts.append(
            f'<text class="title" x="{middle:.0f}" y="{self.height - 8}" text-anchor="middle">'
            f"{escape(self.x_axis.title)}</text>"
        )
        at = (TOP + bottom) / 2
        parts.append(
            f'<text class="title" transform="translate(14 {at:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.chart.y.title)}</text>"
        )
        return "".join(parts)


class _Scale:
    """From values of one axis to pixels."""

    def __init__(self, axis: Axis, values: Sequence[Any], pixels: tuple[float, float]) -> None:
        self.axis, self.pixels = axis, pixels
        self.names = list(axis.names or dict.fromkeys(map(str, values))) if axis.scale == "names" else []
        if not self.names:
            known = [float(v) for v in values if math.isfinite(float(v))] or [0.0, 1.0]
            low, high = axis.domain or (min(known), max(known))
            if axis.scale == "log":
                low, high = math.log10(low), math.log10(high)
            elif axis.zero and not axis.domain:
                low = min(0.0, low)
            self.low, self.high = (low, high) if axis.domain else _padded(low, high, axis.zero)

    def __call__(self, value: Any) -> float:
        start, end = self.pixels
        if self.names:
            share = (self.names.index(str(value)) + 0.5) / len(self.names)
        else:
            number = math.log10(value) if self.axis.scale == "log" else float(value)
            share = min(1.0, max(0.0, (number - self.low) / (self.high - self.low)))
        return start + share * (end - start)

    @property
    def band(self) -> float:
        """Pixels of a name's place."""
        return abs(self.pixels[1] - self.pixels[0]) / max(1, len(self.names))

    def ticks(self) -> list[tuple[Any, str]]:
        """Values with what is written there."""
        if self.names:
            return [
                (name, name if len(name) <= LONGEST_NAME else f"...{name[-LONGEST_NAME + 3 :]}") for name in self.names
            ]
        if self.axis.scale == "log":
            first, last = math.ceil(self.low), math.floor(self.high)
            values = [10.0**i for i in range(first, last + 1)]
            if len(values) < 2:
                values = [10**v for v in np.linspace(self.low, self.high, 4)]
            return [(v, number(v, 2)) for v in values]
        values = _round(self.low, self.high)
        decimals = 0 if len(values) < 2 or 100 * (values[1] - values[0]) >= 1 else 1
        return [(v, percent(v, decimals) if self.axis.shown else f"{v + 0.0:g}") for v in values]


def _padded(low: float, high: float, zero: bool) -> tuple[float, float]:
    pad = 0.04 * (high - low) or 0.05 * (abs(high) or 1)
    return (low if zero and low == 0 else low - pad), high + pad


def _round(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) + 0.0 for i in range(first, first + 12) if step * i <= high + 1e-9]


def _tip(row: Row) -> str:
    return f"<title>{escape(str(row['tip']))}</title>" if row.get("tip") else ""


def _shape(shape: str, x: float, y: float) -> str:
    """The outline of a point."""
    r = 4
    match shape:
        case "square":
            return f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z"
        case "diamond":
            return f"M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6Z"
        case "triangle-up":
            return f"M{x:.1f} {y - 5:.1f}l5 9h-10Z"
        case "triangle-down":
            return f"M{x:.1f} {y + 5:.1f}l5 -9h-10Z"
        case "cross":
            return f"M{x - 5:.1f} {y:.1f}h10M{x:.1f} {y - 5:.1f}v10"
    return f"M{x - r:.1f} {y:.1f}a4 4 0 1 0 8 0 4 4 0 1 0-8 0"


def swatch(name: str) -> Markup:
    """The mark of a role, for a list of what is what."""
    looks = role(name)
    shape = _shape(looks.shape, 8, 8) if looks.shape != "stroke" else "M1 8H15"
    fill = "url(#hatch)" if looks.hatched else looks.colour
    dash = f' stroke-dasharray="{" ".join(map(str, looks.dash))}"' if looks.shape == "stroke" and looks.dash else ""
    return Markup(  # noqa: S704
        f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true"><path d="{shape}" fill="{fill}" '
        f'stroke="{looks.colour}" stroke-width="2"{dash}/></svg>'
    )


def ramp(chart: Chart) -> Markup:
    """What the colours of a chart's ramp stand for."""
    if chart.ramp is None:
        return Markup("")
    low, high = escape(chart.ramp.low), escape(chart.ramp.high)
    return Markup(  # noqa: S704
        f'{escape(chart.ramp.title)}: {low} <span class="ramp" aria-hidden="true" '
        f'style="background:linear-gradient(90deg,{PALE},{DARKEST})"></span> {high}'
    )


def _points(frame: _Frame, chart: Chart, rows: Sequence[Row]) -> str:
    """Points with what is said of each; many are one path for each look, and say nothing."""
    placed = [(row, *frame.place(row)[:2]) for row in rows if frame.stands(row)]
    shapes: dict[tuple[str, bool, str], list[str]] = {}
    for row, x, y in placed:
        if x is None or y is None:
            continue
        name = row.get("role", "")
        told = _tip(row) if len(placed) <= MANY else ""
        shapes.setdefault((name, bool(row.get("hollow")), told), []).append(_shape(role(name).shape, x, y))
    return "".join(
        f'<path d="{"".join(paths)}" fill="{"none" if hollow else role(name).colour}" '
        f'stroke="{role(name).colour}">{told}</path>'
        for (name, hollow, told), paths in shapes.items()
    )


def _line(frame: _Frame, chart: Chart, rows: Sequence[Row], step: bool = False) -> str:
    series: dict[tuple[Any, Any], list[Row]] = {}
    for row in filter(frame.stands, rows):
        series.setdefault((row.get("series"), row.get("role")), []).append(row)
    parts = []
    for (_, name), own in series.items():
        looks = role(name or "")
        places = [frame.place(row)[:2] for row in sorted(own, key=lambda row: frame.xs(row)[0])]
        path, last = "", None
        for x, y in places:
            if x is None or y is None:
                continue
            path += f"M{x:.1f} {y:.1f}" if last is None else f"H{x:.1f}V{y:.1f}" if step else f"L{x:.1f} {y:.1f}"
            last = y
        dash = f' stroke-dasharray="{" ".join(map(str, looks.dash))}"' if looks.dash else ""
        parts.append(f'<path d="{path}" fill="none" stroke="{looks.colour}" stroke-width="2"{dash}/>')
    return "".join(parts)


def _step(frame: _Frame, chart: Chart, rows: Sequence[Row]) -> str:
    return _line(frame, chart, rows, step=True)


def _bars(frame: _Frame, chart: Chart, rows: Sequence[Row]) -> str:
    sides = list(dict.fromkeys(row.get("side") for row in rows)) if chart.grouped else [None]
    thick = 0.8 * frame.y_scale.band / len(sides)
    zero = frame.x_scale(0) if frame.x_axis.scale != "log" else frame.x_scale.pixels[0]
    parts = []
    for row in filter(frame.stands, rows):
        x, y, x2, _ = frame.place(row)
        if x is None or y is None:
            continue
        start, end = sorted((x, zero if x2 is None else x2))
        place = sides.index(row.get("side")) if chart.grouped else 0
        top = y - 0.4 * frame.y_scale.band + place * thick
        colour = role(row.get("role", "")).colour
        fill = "url(#hatch)" if row.get("hatched") else row.get("fill", colour)
        faint = ' fill-opacity=".25"' if row.get("hollow") else ""
        parts.append(
            f'<rect x="{start:.1f}" y="{top:.1f}" width="{max(0.5, end - start):.1f}" height="{thick:.1f}" '
            f'fill="{fill}"{faint} stroke="{colour}">{_tip(row)}</rect>'
        )
    return "".join(parts)


def _spans(frame: _Frame, chart: Chart, rows: Sequence[Row], dash: str = "") -> str:
    parts = []
    for row in filter(frame.stands, rows):
        x, y, x2, y2 = frame.place(row)
        starts = (frame.x_scale.pixels[0] if x is None else x, frame.y_scale.pixels[0] if y is None else y)
        ends = (
            x2 if x2 is not None else frame.x_scale.pixels[1] if x is None else starts[0],
            y2 if y2 is not None else frame.y_scale.pixels[1] if y is None else starts[1],
        )
        parts.append(
            f'<path d="M{starts[0]:.1f} {starts[1]:.1f}L{ends[0]:.1f} {ends[1]:.1f}" '
            f'stroke="{role(row.get("role", "")).colour}" stroke-width="1.5"{dash}>{_tip(row)}</path>'
        )
    return "".join(parts)


def _rules(frame: _Frame, chart: Chart, rows: Sequence[Row]) -> str:
    return _spans(frame, chart, rows, ' stroke-dasharray="4 4"')


def _ticks(frame: _Frame, chart: Chart, rows: Sequence[Row]) -> str:
    parts = []
    for row in filter(frame.stands, rows):
        x, y, _, _ = frame.place(row)
        if x is not None and y is not None:
            colour = role(row.get("role", "")).colour
            parts.append(f'<path d="M{x:.1f} {y - 7:.1f}v14" stroke="{colour}" stroke-width="2">{_tip(row)}</path>')
    return "".join(parts)


def _regions(frame: _Frame, chart: Chart, rows: Sequence[Row]) -> str:
    parts = []
    for row in filter(frame.stands, rows):
        x, y, x2, y2 = frame.place(row)
        left, right = sorted(
            (frame.x_scale.pixels[0] if x is None else x, frame.x_scale.pixels[1] if x2 is None else x2)
        )
        top, bottom = sorted(
            (frame.y_scale.pixels[0] if y is None else y, frame.y_scale.pixels[1] if y2 is None else y2)
        )
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
            f'fill="{role(row.get("role", "")).colour}" opacity=".12">{_tip(row)}</rect>'
        )
    return "".join(parts)


def _cells(frame: _Frame, chart: Chart, rows: Sequence[Row]) -> str:
    top = max([row["value"] for row in rows if row.get("value") is not None], default=1.0) or 1.0
    wide, high = frame.x_scale.band, frame.y_scale.band
    parts = []
    for row in filter(frame.stands, rows):
        x, y, _, _ = frame.place(row)
        if x is None or y is None:
            continue
        value = row.get("value")
        fill = "url(#hatch)" if value is None else on_ramp(value / top)
        parts.append(
            f'<rect x="{x - wide / 2:.1f}" y="{y - high / 2:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{fill}" '
            f'stroke="currentColor" stroke-width=".4">{_tip(row)}</rect>'
        )
    return "".join(parts)


_DRAWN: Mapping[str, Callable[[_Frame, Chart, Sequence[Row]], str]] = {
    "points": _points,
    "line": _line,
    "step": _step,
    "bars": _bars,
    "spans": _spans,
    "rules": _rules,
    "ticks": _ticks,
    "regions": _regions,
    "cells": _cells,
}
