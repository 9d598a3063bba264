"""A report as JSON: the facts of the run, and every section with the numbers of its charts. Its schema is published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import TypeAdapter

from secateur.pipeline.report.content import Chart, Figure, Row, Section
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.untold import untold
from secateur.pipeline.run.facts import EARLIER_NAMES

SCHEMA_FILE = "report.schema.json"


@dataclass(frozen=True)
class Document:
    """``report.json``.

    Args:
        format: raised when a key changes its meaning or goes.
        name: of the run file.
        run: the run's id.
        begun: when the run was begun; null = unknown.
        config: the run file, without addresses and places of a machine.
        facts: what each stage found, by the stage's name.
        environment: the device as the last process saw it.
        sections: in their order; a chart's rows are everything that there is, also where a page draws a part.
    """

    format: Literal[1]
    name: str
    run: str
    begun: str | None
    config: dict[str, Any]
    facts: dict[str, Any]
    environment: dict[str, Any]
    sections: tuple[Section, ...]


def document(m: Material, sections: Sequence[Section]) -> Document:
    """A report's facts and sections."""
    facts = m.facts.only(tuple(vars(m.facts))).to_json()
    facts |= {earlier: facts[name] for name, earlier in EARLIER_NAMES.items() if name in facts}
    config = m.config.model_dump(mode="json", exclude={"tracking": {"uri"}})  # an address may hold a password
    begun = None if m.begun is None else datetime.fromtimestamp(m.begun, UTC).isoformat(timespec="seconds")
    return Document(
        format=1,
        name=m.config.name,
        run=m.run_id,
        begun=begun,
        config=untold(config),
        facts=untold({name: told for name, told in facts.items() if told is not None}),
        environment=untold(dict(m.benchmark.environment)) if m.benchmark is not None else {},
        sections=tuple(_whole(section) for section in sections),
    )


def _whole(section: Section) -> Section:
    """A section with all rows of its charts, and without the images of its pictures."""
    figures = [replace(figure, chart=whole(figure.chart)) for figure in section.figures]
    pictures = [replace(picture, source="") for picture in section.pictures]
    return replace(section, figures=figures, pictures=pictures)


def whole(chart: Chart) -> Chart:
    """A chart with every row there is, in place of those that are drawn."""
    layers = [
        replace(each, rows=_numbers(each.rows if each.every is None else each.every), every=None)
        for each in chart.layers
    ]
    return replace(chart, layers=layers)


def _numbers(rows: Sequence[Row]) -> list[Row]:
    """Rows without what is said of them, which follows from their numbers."""
    return [{key: value for key, value in row.items() if key != "tip"} for row in rows]


def figures_of(sections: Sequence[Section]) -> list[Figure]:
    """All figures, in their order."""
    return [figure for section in sections for figure in section.figures]


def text_of(told: Document) -> str:
    """As JSON; a number that is none is null."""
    text = json.dumps(asdict(told), default=list)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None))
    return text


def schema() -> dict[str, Any]:
    """JSON Schema of ``report.json``."""
    made = TypeAdapter(Document).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Secateur report", **made}
