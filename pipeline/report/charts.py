"""Small charts as SVG text: no script, no fonts, no network; every mark has a tooltip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 56, 44
COLOURS = ("#8a93a6", "#0b7a53", "#c2571a", "#3a5fcd", "#7a3fa0")


def cloud(points: Sequence[tuple[float, float, str, str]], x_title: str, y_title: str) -> Markup:
    """Scatter plot of (x, y, kind, label); one colour per kind, in order of appearance."""
    if not points:
        return Markup("")
    frame = _Frame([p[0] for p in points], [p[1] for p in points])
    kinds = list(dict.fromkeys(p[2] for p in points))
    marks = [
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{3 if kind == "evaluation" else 5}" '
        f'fill="{COLOURS[kinds.index(kind) % len(COLOURS)]}" fill-opacity=".65"><title>{escape(label)}</title></circle>'
        for x, y, kind, label in points
    ]
    return frame.svg("".join(marks), x_title, y_title, kinds)


def lines(curves: Mapping[str, Mapping[int, float]], x_title: str, y_title: str, grid: int = 0) -> Markup:
    """Lines through (x, y) points, each scaled to its own smallest y; a dashed rule at every multiple of ``grid``."""
    scaled = {
        name: [(float(x), y / min(curve.values())) for x, y in sorted(curve.items())] for name, curve in curves.items()
    }
    every = [point for points in scaled.values() for point in points]
    frame = _Frame([x for x, _ in every], [0.0, *(y for _, y in every)])
    marks = [
        f'<line x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="28" y2="{HEIGHT - BOTTOM}" stroke="#b3bac8" '
        'stroke-dasharray="3 3"/>'
        for x in sorted({x for x, _ in every})
        if grid and x % grid == 0
    ]
    for colour, (name, points) in zip(COLOURS, scaled.items(), strict=False):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        marks += [
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5" fill="{colour}">'
            f"<title>{escape(name)}: {x:g} channels, {y:.2f}x</title></circle>"
            for x, y in points
        ]
    return frame.svg("".join(marks), x_title, y_title, list(scaled))


def courses(curves: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str) -> Markup:
    """Lines through (x, y) points, in the order of x."""
    every = [point for points in curves.values() for point in points]
    frame = _Frame([x for x, _ in every], [0.0, *(y for _, y in every)])
    marks = []
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        marks += [
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5" fill="{colour}">'
            f"<title>{escape(name)}: {y:.4g} after epoch {x:g}</title></circle>"
            for x, y in points
        ]
    return frame.svg("".join(marks), x_title, y_title, list(curves))


def histogram(samples: Mapping[str, npt.NDArray[np.float64]], x_title: str) -> Markup:
    """Overlaid histograms of samples, up to the 99th percentile of all."""
    top = max(float(np.percentile(values, 99)) for values in samples.values())
    edges = np.linspace(min(float(values.min()) for values in samples.values()), top, 61)
    counts = {name: np.histogram(values, edges)[0] / len(values) for name, values in samples.items()}
    frame = _Frame(edges.tolist(), [0.0, max(float(c.max()) for c in counts.values())])
    marks = []
    for colour, (name, shares) in zip(COLOURS, counts.items(), strict=False):
        for share, low, high in zip(shares, edges, edges[1:], strict=False):
            if share:
                wide, high_px = frame.x(high) - frame.x(low), frame.y(0) - frame.y(share)
                marks.append(
                    f'<rect x="{frame.x(low):.1f}" y="{frame.y(share):.1f}" width="{wide:.1f}" height="{high_px:.1f}" '
                    f'fill="{colour}" fill-opacity=".6"><title>{escape(name)}: {low:.3f} to {high:.3f} ms, '
                    f"{share:.1%} of calls</title></rect>"
                )
    return frame.svg("".join(marks), x_title, "share of calls", list(samples))


class _Frame:
    """Axes: from data to pixels, with round ticks."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.x_range, self.y_range = _padded(min(xs), max(xs)), _padded(min(ys), max(ys))

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 12)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - 28)

    def svg(self, marks: str, x_title: str, y_title: str, legend: Sequence[str]) -> Markup:
        parts = []
        for tick in _ticks(*self.x_range):
            at = self.x(tick)
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="28" y2="{HEIGHT - BOTTOM}" stroke="#e3e6ec"/>')
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
        for tick in _ticks(*self.y_range):
            at = self.y(tick)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e3e6ec"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for i, name in enumerate(legend):
            at = LEFT + 110 * i
            parts.append(f'<circle cx="{at + 5}" cy="12" r="5" fill="{COLOURS[i % len(COLOURS)]}"/>')
            parts.append(f'<text x="{at + 14}" y="16">{escape(name)}</text>')
        parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
        label = escape(f"{y_title} against {x_title}")
        return Markup(  # noqa: S704  all text in it is escaped above
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}{marks}</svg>'
        )


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.04 * (high - low) or 0.05 * (abs(high) or 1)
    return (low if low == 0 else low - pad), high + pad


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [round(float(t), 10) for t in np.arange(np.ceil(low / step) * step, high, step)]
