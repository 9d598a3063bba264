"""A report as one page: nothing is fetched, scripts run by their hash, static drawings stand where no script runs."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from secateur.pipeline.report import charts, vega
from secateur.pipeline.report.content import Section, Table
from secateur.pipeline.report.document import figures_of
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.roles import DARK, LIGHT
from secateur.pipeline.report.sections.tradeoff import NOUNS, base_ms, widths_of

VENDORED = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")
SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
FIGURE = re.compile(r"[-+]?[\d.,]+ \S{1,2}")
"""A number with its unit."""
PLAIN_BYTES = 50_000
"""JSON that is longer is offered compressed."""


def page(m: Material, sections: Sequence[Section], told: str) -> str:
    """The page.

    Args:
        told: the report as JSON, for its download.
    """
    scripts = [*_vendored(), _script()]
    made: str = _template().render(
        title=f"{m.config.name} on {m.device}",
        about=about(m),
        m=m,
        sections=[(anchor(section.title), section) for section in sections],
        policy=policy(scripts),
        scripts=[Markup(script) for script in scripts],  # noqa: S704  files of this package
        data=Markup(_data(m, sections)),  # noqa: S704  escaped there
        downloads=_downloads(m, sections, told),
        light=LIGHT,
        dark=DARK,
    )
    return made


def about(m: Material) -> str:
    """What the page is about, for somebody who has seen none before."""
    workload = m.config.workload
    network = str(workload.get("model", {}).get("name") or workload.get("task") or "A network")
    data = workload.get("data", {})
    source = str(data.get("source") or data.get("path") or "") if isinstance(data, dict) else ""
    task = ", ".join(filter(None, (str(workload["name"]), _last(source))))
    cpu = m.search.device.facts.get("cpu") if m.search is not None else None
    done = "made" if m.gate is not None else "to be made"
    return (
        f"{_last(network)} ({task}), {done} smaller and faster for the device {m.device}{f' ({cpu})' if cpu else ''} "
        f"by removing channels; the method {m.config.search.method} chose which. The baseline is the network before, "
        "the compact one the network after, which would ship; gates are what the run file asks of it."
    )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def compared(title: str, columns: Sequence[tuple[str, Material, Sequence[Section]]], table: Table) -> str:
    """Two reports side by side.

    Args:
        columns: name, material and sections of each; figures have names of their own.
        table: what both measured, in one table.
    """
    scripts = [*_vendored(), _script()]
    every = [section for _, _, sections in columns for section in sections]
    made: str = _template("compare.html.j2").render(
        title=title,
        columns=columns,
        rows=list(zip(*(sections for _, _, sections in columns), strict=True)),
        table=table,
        policy=policy(scripts),
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        data=Markup(_json({**_drawn(every), "widths": None, "base_ms": None})),  # noqa: S704
        light=LIGHT,
        dark=DARK,
    )
    return made


def policy(scripts: Sequence[str]) -> str:
    """The content policy: these scripts and no others."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


def anchor(title: str) -> str:
    """The id of a section."""
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def prose(text: str) -> Markup:
    """A sentence; what stands in backticks is code."""
    return Markup(CODE.sub(r"<code>\1</code>", escape(text)))  # noqa: S704  escaped


def cells(table: Table) -> Markup:
    """The rows of a table, in few bytes: end tags that HTML does not need are left out."""
    parts = []
    for row in table.rows:
        first, *rest = row
        others = (f"<td>{escape(_unbroken(cell))}" for cell in rest)
        parts.append(f"<tr><th scope=row>{escape(first)}{''.join(others)}")
    return Markup("\n".join(parts))  # noqa: S704  escaped


def _unbroken(cell: str) -> str:
    """A figure that keeps its unit beside it."""
    return cell.replace(" ", "\u00a0") if FIGURE.fullmatch(cell) else cell


@cache
def _template(name: str = "report.html.j2") -> Any:
    loader = PackageLoader("secateur.pipeline.report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "prose": prose,
        "cells": cells,
        "still": charts.svg,
        "swatch": charts.swatch,
        "ramp": charts.ramp,
    }
    return environment.get_template(name)


@cache
def _vendored() -> tuple[str, ...]:
    folder = files("secateur.pipeline.report") / "vendor"
    texts = [(folder / name).read_text(encoding="utf-8") for name in VENDORED]
    return tuple(SOURCE_MAP.sub("", text) for text in texts)


@cache
def _script() -> str:
    return (files("secateur.pipeline.report") / "templates" / "page.js").read_text(encoding="utf-8")


def _drawn(sections: Sequence[Section]) -> dict[str, Any]:
    """The charts, and what the script has to know of their controls."""
    charted = {figure.name: figure.chart for figure in figures_of(sections)}
    return {
        "charts": {name: vega.spec(chart) for name, chart in charted.items()},
        "switches": {
            name: {key: axis.title for key, axis in chart.switch.items()}
            for name, chart in charted.items()
            if chart.switch
        },
        "least": {name: asdict(chart.least) for name, chart in charted.items() if chart.least},
        "nouns": NOUNS,
    }


def _data(m: Material, sections: Sequence[Section]) -> str:
    """What the script draws, as JSON inside of a page."""
    figures = figures_of(sections)
    kept = {
        row["key"] for f in figures if f.chart.pinned for layer in f.chart.layers for row in layer.rows if "key" in row
    }
    widths = widths_of(m)
    widths["widths"] = {key: value for key, value in widths["widths"].items() if key in kept}
    return _json({**_drawn(sections), "widths": widths, "base_ms": base_ms(m)})


def _json(data: Any) -> str:
    text = json.dumps(data, separators=(",", ":"), default=list)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _downloads(m: Material, sections: Sequence[Section], told: str) -> list[tuple[str, str, Markup]]:
    """(text, file name, address) of what can be taken from the page."""
    links = []
    plain = told.encode()
    if len(plain) <= PLAIN_BYTES:
        links.append(("The report as JSON", f"{m.run_id}.json", _link("application/json", plain)))
    else:
        packed = gzip.compress(plain, mtime=0)
        links.append(("The report as JSON, compressed", f"{m.run_id}.json.gz", _link("application/gzip", packed)))
    found = [figure.table for figure in figures_of(sections) if figure.name == "tradeoff"]
    for table in found:
        file = io.StringIO()
        csv.writer(file).writerows([table.titles, *table.rows])
        packed = file.getvalue().encode()
        if len(packed) <= PLAIN_BYTES:
            links.append(("All candidates as CSV", f"{m.run_id}.csv", _link("text/csv", packed)))
        else:
            links.append(
                (
                    "All candidates as CSV, compressed",
                    f"{m.run_id}.csv.gz",
                    _link("application/gzip", gzip.compress(packed, mtime=0)),
                )
            )
    return links


def _link(kind: str, content: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode()}")  # noqa: S704
