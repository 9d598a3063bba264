"""Charts as specifications of Vega-Lite: plain data, every row in them, nothing that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.pipeline.report.content import Axis, Chart, Layer, Row
from secateur.pipeline.report.roles import DARKEST, PALE, role

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""The name of the language; nothing is fetched from there."""
TEXT = {"font": "system-ui, sans-serif", "fontSize": 12, "fill": "currentColor"}
CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.15,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 150,
        "labelOverlap": True,
    },
}
BAR = 16
"""Pixels of a name's place on an axis, at least."""
MARGIN = 60
"""Pixels of axis and title."""


def spec(chart: Chart) -> Spec:
    """A chart's specification."""
    switched = chart.switch is not None
    made: Spec = {
        "$schema": SCHEMA,
        "description": chart.describes,
        "width": "container",
        "height": height(chart),
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": CONFIG,
        "layer": [_layer(chart, layer) for layer in chart.layers],
    }
    if switched:
        assert chart.switch is not None
        made["params"] = [{"name": "by", "value": next(iter(chart.switch))}, {"name": "limit", "value": None}]
    if chart.least is not None:
        made["params"] = [*made.get("params", ()), {"name": "least", "value": chart.least.start}]
    return made


def height(chart: Chart) -> int:
    """Pixels between the axes' ends."""
    if chart.height:
        return chart.height
    sides = len(chart.roles) if chart.grouped else 1
    return max(BAR, 9 * sides + 4) * max(1, len(chart.y.names)) if chart.y.scale == "names" else 280


def _axis(axis: Axis) -> Spec:
    shown: Spec = {"title": axis.title, "tickCount": 6}
    if axis.shown:
        shown["format"] = "~%"
    if axis.scale == "names":
        shown |= {"labelAngle": 0, "grid": False}
        return {"type": "nominal", "sort": list(axis.names) or None, "axis": shown, "title": axis.title}
    scale: Spec = {"zero": axis.zero, "nice": axis.domain is None, "padding": 0 if axis.domain or axis.zero else 8}
    if axis.scale == "log":
        scale = {"type": "log", "padding": 8}
        shown |= {"tickCount": 5}
    if axis.domain is not None:
        scale |= {"domain": list(axis.domain), "clamp": True, "nice": False}
    return {"type": "quantitative", "scale": scale, "axis": shown, "title": axis.title}


def _layer(chart: Chart, layer: Layer) -> Spec:
    encoding: Spec = {"tooltip": {"field": "tip", "type": "nominal"}} if any("tip" in r for r in layer.rows) else {}
    painted = layer.mark == "bars" and any("fill" in row for row in layer.rows)
    rows = [_painted(_drawn(row)) if painted else _drawn(row) for row in layer.rows]
    keys = {key for row in layer.rows for key in row}
    switched = chart.switch is not None and "xs" in keys
    if "x" in keys or switched:
        encoding["x"] = {"field": "x", **_axis(chart.x)}
    if "y" in keys:
        encoding["y"] = {"field": "y", **_axis(chart.y)}
    for end in ("x2", "y2"):
        if end in keys or (end == "x2" and switched and "xs2" in keys):
            encoding[end] = {"field": end}
    made = {"data": {"values": rows}, **_MARKS[layer.mark](chart, layer.rows, encoding)}
    if switched:
        made["transform"] = [{"calculate": "datum.xs[by]", "as": "x"}]
        if "xs2" in keys:
            made["transform"].append({"calculate": "datum.xs2[by]", "as": "x2"})
        made["transform"].append({"filter": "isValid(datum.x)"})
    elif "by" in keys:
        made["transform"] = [{"filter": "datum.by === by"}]
    if chart.least is not None and "size" in keys:
        made["transform"] = [*made.get("transform", ()), {"filter": "datum.size >= least"}]
    return made


def _drawn(row: Row) -> Row:
    return {key: value for key, value in row.items() if value is not None and value is not False}


def _painted(row: Row) -> Row:
    return {**row, "paint": row.get("fill", role(row.get("role", "")).colour)}


def _colours(chart: Chart) -> Spec:
    names = chart.roles  # of every layer, so that scales that are shared are the same
    scale = {"domain": names, "range": [role(name).colour for name in names]}
    return {"field": "role", "type": "nominal", "scale": scale, "legend": None}


def _points(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    del rows
    colours = _colours(chart)
    names = colours["scale"]["domain"]
    shapes = {"domain": names, "range": [role(name).shape for name in names]}
    filled: Spec = {"condition": {"test": "datum.hollow", "value": 0.0}, "value": 0.85}
    mark: Spec = {"type": "point", "filled": False, "size": 64, "strokeWidth": 1.6}
    faint: Spec = {}
    if chart.pinned:
        mark["cursor"] = "pointer"
        faint = {"opacity": {"condition": {"test": "limit !== null && !(datum.x <= limit)", "value": 0.15}, "value": 1}}
    return {
        "mark": mark,
        "encoding": {
            **encoding,
            **faint,
            "stroke": colours,
            "fill": colours,
            "fillOpacity": filled,
            "shape": {"field": "role", "type": "nominal", "scale": shapes, "legend": None},
        },
    }


def _line(chart: Chart, rows: Sequence[Row], encoding: Spec, how: str = "linear") -> Spec:
    colours = _colours(chart)
    names = colours["scale"]["domain"]
    dashes = {"domain": names, "range": [list(role(name).dash) or [1, 0] for name in names]}
    series = {"detail": {"field": "series", "type": "nominal"}} if any("series" in row for row in rows) else {}
    return {
        "mark": {"type": "line", "interpolate": how, "strokeWidth": 2},
        "encoding": {
            **encoding,
            **series,
            "color": colours,
            "strokeDash": {"field": "role", "type": "nominal", "scale": dashes, "legend": None},
        },
    }


def _step(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    return _line(chart, rows, encoding, "step-after")


def _bars(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    colours = _colours(chart)
    beside: Spec = {}
    if chart.grouped:
        sides = list(dict.fromkeys(row["side"] for row in rows))
        beside = {"yOffset": {"field": "side", "type": "nominal", "sort": sides, "scale": {"paddingInner": 0.1}}}
    faint = {"condition": {"test": "datum.hollow", "value": 0.25}, "value": 1.0}
    fill: Spec = colours
    if any("fill" in row for row in rows):  # a colour of its own, where a row has one
        fill = {"field": "paint", "type": "nominal", "scale": None, "legend": None}
    if any(row.get("hatched") for row in rows):
        fill = {"condition": {"test": "datum.hatched", "value": "url(#hatch)"}, **fill}
    return {
        "mark": {"type": "bar", "strokeWidth": 1.2},
        "encoding": {**encoding, **beside, "stroke": colours, "fill": fill, "fillOpacity": faint},
    }


def _spans(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    del rows
    return {"mark": {"type": "rule", "strokeWidth": 1.6}, "encoding": {**encoding, "color": _colours(chart)}}


def _rules(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    del rows
    mark = {"type": "rule", "strokeWidth": 1.4, "strokeDash": [4, 4]}
    return {"mark": mark, "encoding": {**encoding, "color": _colours(chart)}}


def _ticks(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    del rows
    return {"mark": {"type": "tick", "thickness": 2, "size": 14}, "encoding": {**encoding, "color": _colours(chart)}}


def _regions(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    del rows
    return {"mark": {"type": "rect", "opacity": 0.12}, "encoding": {**encoding, "color": _colours(chart)}}


def _cells(chart: Chart, rows: Sequence[Row], encoding: Spec) -> Spec:
    del chart
    ends = {"domain": [0.0, max([row["value"] for row in rows if row.get("value") is not None], default=1.0) or 1.0]}
    colour: Spec = {
        "condition": {"test": "!isValid(datum.value)", "value": "url(#hatch)"},
        "field": "value",
        "type": "quantitative",
        "scale": {"range": [PALE, DARKEST], "clamp": True, **ends},
        "legend": None,
    }
    mark = {"type": "rect", "stroke": "currentColor", "strokeWidth": 0.4, "invalid": None}
    return {"mark": mark, "encoding": {**encoding, "fill": colour}}


_MARKS: Mapping[str, Any] = {
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
