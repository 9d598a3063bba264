"""Reports made anew from run directories, and two of them side by side; nothing is measured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from secateur.device_profiles import DeviceError, DeviceProfile, load_profile
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.files import write_whole
from secateur.pipeline.report import Written, figures, write_report
from secateur.pipeline.report.content import Section, Table
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.page import compared
from secateur.pipeline.report.sections import sections
from secateur.pipeline.report.sections.verdict import accuracy_change, faster
from secateur.pipeline.run import kept_facts
from secateur.pipeline.run.journal import Record, read_journal
from secateur.pipeline.run.run import open_run_directory
from secateur.pipeline.surroundings import home


def render(directory: Path) -> Written:
    """The report of a run, made from the files in its directory; also of one that is going on, or failed.

    Raises:
        UserError: it is no run directory.
        JournalError: the journal is damaged.
        SurroundingsError: the files cannot be written.
    """
    run_id, config = open_run_directory(directory)
    facts = kept_facts.read(directory)
    return write_report(directory, run_id, config, facts, _records(directory), _profile(config))


def compare(first: Path, second: Path, to: Path) -> Table:
    """Two runs on one page, and what both measured as a table.

    Args:
        first, second: run directories.
        to: the file that is written.

    Raises:
        UserError: one of them is no run directory.
        JournalError: a journal is damaged.
    """
    materials = [_material(directory) for directory in (first, second)]
    names = [m.run_id for m in materials]
    if names[0] == names[1]:
        names = [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]
    table = Table("What both measured", ("", *(f"{name}|" for name in names)), _together(materials))
    columns = [
        (name, m, [_renamed(section, mark) for section in sections(m)])
        for name, m, mark in zip(names, materials, ("a", "b"), strict=True)
    ]
    write_whole(to, compared(f"{names[0]} and {names[1]}", columns, table))
    return table


def _records(directory: Path) -> Sequence[Record]:
    file = directory / "journal.jsonl"
    return read_journal(file) if file.is_file() else []


def _profile(config: RunFile) -> DeviceProfile | None:
    """The device's profile as it is now; None where there is none here."""
    try:
        return load_profile(config.device.profile, [home() / "devices"])
    except (DeviceError, OSError):
        return None


def _material(directory: Path) -> Material:
    run_id, config = open_run_directory(directory)
    facts = kept_facts.read(directory)
    return Material.of(directory, run_id, config, facts, _records(directory), _profile(config))


def _renamed(section: Section, mark: str) -> Section:
    """A section whose figures cannot be mistaken for those of the other run; downloads are left to each report."""
    named = [replace(figure, name=f"{figure.name}-{mark}") for figure in section.figures]
    return replace(section, figures=named, downloads=False)


def _together(materials: Sequence[Material]) -> list[list[str]]:
    """Rows (what, of the first run, of the second)."""
    told = [_told(m) for m in materials]
    return [[what, *(each.get(what, figures.UNKNOWN) for each in told)] for what in dict.fromkeys((*told[0], *told[1]))]


def _told(m: Material) -> dict[str, str]:
    found = {"device": m.device, "method": m.config.search.method, "seed": str(m.config.seed)}
    found["candidates"] = f"{len(m.candidates):,}"
    if m.timed is not None:
        found["speed-up"] = faster(m)
        found["p50 of the compact network"] = figures.ms(m.timed.latency.compact.p50_ms)
        found["p95 of the compact network"] = figures.ms(m.timed.latency.compact.p95_ms)
        found["peak memory"] = figures.size(m.timed.latency.compact.peak_rss_bytes)
        found["timing"] = f"UNSTABLE ({', '.join(m.timed.flags)})" if m.timed.flags else "stable"
    if m.gate is not None:
        base, compact = m.gate.models
        found["accuracy on the test split"] = figures.percent(compact[m.gate.metric])
        found["change of accuracy"] = accuracy_change(m, m.gate)
        found["MACs ratio"] = figures.number(compact.macs / base.macs)
        found["parameters"] = figures.count(compact.params)
        found["file size"] = figures.size(compact.size_bytes)
        found["gate"] = "passed" if m.gate.passed else "not passed"
    if m.export is not None:
        found["precision"] = m.export.compact.artifact.precision
    if m.register is not None:
        found["version"] = m.register.version
    return found
