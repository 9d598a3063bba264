"""The device profiling report: one self-contained page, the same as JSON and as Markdown; and the final table of a run.

Facts go one way: files of a run directory -> ``Material`` -> sections of plain data -> renderers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.device_profiles import DeviceProfile
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.files import write_whole
from secateur.pipeline.report.document import document, text_of
from secateur.pipeline.report.markdown import markdown
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.page import page
from secateur.pipeline.report.sections import sections
from secateur.pipeline.report.table import final_table, final_table_markdown, interval, registered, went_by
from secateur.pipeline.run.facts import Facts
from secateur.pipeline.run.journal import Record

__all__ = [
    "Written",
    "final_table",
    "final_table_markdown",
    "interval",
    "registered",
    "went_by",
    "write_report",
]


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    html: Path
    json: Path
    markdown: Path


def write_report(
    directory: Path,
    run_id: str,
    config: RunFile,
    facts: Facts,
    records: Sequence[Record],
    profile: DeviceProfile | None = None,
    unreachable: bool = False,
) -> Written:
    """Write ``report.html``, ``report.json`` and ``report.md`` into a run directory.

    Args:
        facts: of the stages that are done, however few.
        records: the journal's.
        profile: of the run's own device; None = it cannot be read here.
        unreachable: whether the tracking server is unreachable just now.
    """
    material = Material.of(directory, run_id, config, facts, records, profile, unreachable)
    made = sections(material)
    told = text_of(document(material, made))
    written = Written(*(directory / f"report.{kind}" for kind in ("html", "json", "md")))
    write_whole(written.json, told + "\n")
    write_whole(written.markdown, markdown(material, made))
    write_whole(written.html, page(material, made, told))
    return written
