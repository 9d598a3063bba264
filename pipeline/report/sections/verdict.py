"""Whether to ship, and the figures that say so."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import Literal

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Section, Table, Tile
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.sections.gates import nice
from secateur.pipeline.report.table import final_table
from secateur.pipeline.run.facts import GateFacts

TITLE = "Verdict"
REACHED = {
    "baseline": "the training of the baseline",
    "search": "the search",
    "finetune": "the fine-tuning of the best candidates",
    "export": "the export",
    "benchmark": "the timing of the exported files",
    "gate": "the gate",
}
"""What a verdict needs, by the names of the stages, in their order."""
MOST_NAMED = 2
"""Checks that do not hold and are named in the sentence; the section of the gates has all."""


def section(m: Material) -> Section:
    """In one sentence; then tiles, the conditions, and what changed as a table."""
    if m.gate is None or m.timed is None or m.export is None or m.search is None:
        left = [name for name in REACHED if name not in vars(m.facts)]
        tried = f", after {say.plural(len(m.candidates), 'candidate')}" if left[0] == "search" and m.candidates else ""
        done = len(REACHED) - len(left)
        said = (
            f"No verdict yet: the run is not at its end, {done} of {len(REACHED)} stages are done. It goes on, or "
            f"stopped, in {REACHED[left[0]]}{tried}. `secateur resume` with its directory continues it."
        )
        return Section(TITLE, said, "bad", text=[conditions(m)], missing=["Verdict: the run did not reach its gate."])
    return Section(
        TITLE,
        _sentence(m, m.gate),
        _state(m, m.gate),
        tiles=_tiles(m, m.gate),
        text=[text for text in (_both(m), _unstable(m), conditions(m), _status(m)) if text],
        tables=[Table("Baseline and compact network", ("", "baseline|", "compact|", "change|"), final_table(m.facts))],
    )


def _state(m: Material, gate: GateFacts) -> Literal["", "good", "bad"]:
    """Good only where nothing speaks against it: a disturbed timing does, and so does a registry that keeps another."""
    assert m.timed is not None
    unsure = bool(m.timed.flags) or (m.promote is not None and not m.promote.promoted)
    return "bad" if not gate.passed else "" if unsure else "good"


def _both(m: Material) -> str:
    """What the speed-up is of, where it is of more than removed channels."""
    number = _precision(m)
    if number is None:
        return ""
    return f"The compact network computes in {number}, the baseline in fp32: speed-up and file size are of both steps."


def _precision(m: Material) -> str | None:
    """Of the compact network; None where it is fp32, as the baseline."""
    number = m.export.compact.artifact.precision if m.export is not None else "fp32"
    return None if number == "fp32" else number


def _sentence(m: Material, gate: GateFacts) -> str:
    assert m.timed is not None
    held = sum(check.ok for check in gate.checks)
    failed = [
        f"{nice(check).removeprefix('budget: ')} {'is unknown' if check.value is None else 'does not hold'}"
        for check in gate.failed
    ]
    parts = [
        say.listing(failed[:MOST_NAMED]),
        f"{faster(m)} on {m.timed.device}, {accuracy_change(m, gate)}",
        f"{held} of {say.plural(len(gate.checks), 'gate')}{'' if gate.passed else ' hold'}",
        _version(m),
    ]
    verdict = "Ship" if gate.passed else "Do not ship"
    unsure = f", {'but' if gate.passed else 'and'} the timing is UNSTABLE" if m.timed.flags else ""
    return f"{verdict}{unsure}: {'; '.join(part for part in parts if part)}."


def faster(m: Material) -> str:
    """1.26x faster (95 % 1.255-1.264)."""
    assert m.timed is not None
    found = m.timed.speedup
    ends = say.between(found.low, found.high) or "no interval: under 3 processes"
    return f"{say.times(found.value)} {'faster' if found.value >= 1 else 'as fast'} ({ends})"


def accuracy_change(m: Material, gate: GateFacts) -> str:
    """-0.84 pp top-1 (95 % -2.1 to +0.5, n = 359)."""
    base, compact = gate.models
    change = compact[gate.metric] - base[gate.metric]
    if gate.metric in (gate.others or {}):
        change_text = f"{gate.metric} {say.number(compact[gate.metric])} after {say.number(base[gate.metric])}"
    else:
        change_text = f"{say.points(change)} {say.metric(gate.metric)}"
    if gate.accuracy is None:
        return f"{change_text} (interval not recorded)"
    told = gate.accuracy
    ends = say.between(told.change.low, told.change.high, say.signed, 100) or "cannot tell"
    return f"{change_text} ({ends}, n = {told.images:,})"


def _version(m: Material) -> str:
    if m.register is None:
        return "not registered"
    if m.promote is None:
        return f"version {m.register.version}, challenger"
    return f"version {m.register.version}, {'champion' if m.promote.promoted else 'challenger (not promoted)'}"


def _tiles(m: Material, gate: GateFacts) -> list[Tile]:
    assert m.timed is not None
    base, compact = gate.models
    found, told = m.timed.speedup, gate.accuracy
    ends = "" if told is None else say.between(told.compact.low, told.compact.high, scale=100)
    interval, number = say.between(found.low, found.high) or "no interval", _precision(m)
    against = f"{number} against the baseline in fp32" if number is not None else ""
    tiles = [
        Tile("Speed-up", say.times(found.value), "; ".join(filter(None, (interval, against)))),
        Tile(
            say.metric(gate.metric)[:1].upper() + say.metric(gate.metric)[1:],
            say.percent(compact[gate.metric]),
            f"{ends + ' %; ' if ends else ''}baseline {say.percent(base[gate.metric])}",
        ),
    ]
    return [
        *tiles,
        _memory(m),
        Tile("File size", say.size(compact.size_bytes), f"exact; baseline {say.size(base.size_bytes)}"),
    ]


def _memory(m: Material) -> Tile:
    assert m.timed is not None
    before, after = (timing.peak_rss_bytes for timing in m.timed.latency)
    if after is None:
        return Tile("Peak memory", say.UNKNOWN, "the device does not tell it")
    peaks = [p.models["compact"].peak_rss_bytes for p in m.benchmark.processes] if m.benchmark else []
    known = [peak for peak in peaks if peak is not None]
    spread = f"processes {say.size(min(known))} to {say.size(max(known))}; " if len(known) > 1 else ""
    return Tile("Peak memory", say.size(after), f"{spread}baseline {say.size(before)}")


def _unstable(m: Material) -> str:
    assert m.timed is not None
    if not m.timed.flags:
        return ""
    flags = "; ".join(say.FLAGS.get(flag, flag) for flag in m.timed.flags)
    return (
        f"UNSTABLE: the timing was disturbed: {flags}. Measure again on an idle device before you rely on milliseconds."
    )


def conditions(m: Material) -> str:
    """One line: runtime and version, threads, batch, precision, calls and processes, date, run."""
    parts = []
    if m.profile is not None:
        version = m.benchmark.environment.get(m.profile.runtime) if m.benchmark else None
        parts.append(f"{m.profile.runtime}{f' {version}' if version else ''}, {m.profile.provider}")
        parts += [say.plural(m.profile.threads, "thread"), f"batch {m.profile.batch}"]
    if m.export is not None:
        parts.append(m.export.compact.artifact.precision)
    if m.benchmark is not None:
        processes, calls = len(m.benchmark.processes), len(m.benchmark.wall_ms("compact"))
        parts.append(f"{calls:,} calls in {say.plural(processes, 'process', 'processes')} of each network")
        parts.append(f"{datetime.fromtimestamp(m.benchmark.processes[-1].ended, UTC):%Y-%m-%d %H:%M} UTC")
    elif m.begun is not None:
        parts.append(f"begun {datetime.fromtimestamp(m.begun, UTC):%Y-%m-%d %H:%M} UTC")
    return f"Conditions: {'; '.join([*parts, f'run {m.run_id}'])}."


def _status(m: Material) -> str:
    """What became of the model in the registry."""
    history = f"`{shlex.join(['secateur', 'history', m.model])}` says what became of it since."
    if m.register is None:
        if m.unreachable:
            return (
                "Not registered yet: the tracking server was unreachable when this page was made. `secateur "
                "resume` delivers it."
            )
        return f"When this page was made the model was not registered yet as a version of {m.model}; {history}"
    said = f"Registered as {m.register.name} version {m.register.version}; its card is CARD.md, beside this page. "
    for device, decision in (m.promote.devices if m.promote is not None else {}).items():
        if not decision.promoted:
            failed = "; ".join(f"{gate.name}: {gate.reason}" for gate in decision.gates if not gate.ok)
            said += f"Not promoted on {device}: {failed or decision.reason}. "
    if m.promote is not None and m.promote.reason:
        said += f"Not promoted: {m.promote.reason}. "
    return said + history
