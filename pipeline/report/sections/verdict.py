"""Whether to ship, and the figures that say so."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Section, Table, Tile
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.table import final_table
from secateur.pipeline.run.facts import GateFacts

TITLE = "Verdict"


def section(m: Material) -> Section:
    """In one sentence; then tiles, the conditions, and what changed as a table."""
    if m.gate is None or m.timed is None or m.export is None or m.search is None:
        done = [name for name in ("baseline", "search", "finetune", "export", "benchmark") if name in vars(m.facts)]
        far = f"came as far as the stage {done[-1]}" if done else "finished no stage"
        said = f"No verdict yet: the run {far}. `secateur resume` with its directory continues it."
        return Section(TITLE, said, "bad", text=[conditions(m)], missing=["Verdict: the run did not reach its gate."])
    return Section(
        TITLE,
        _sentence(m, m.gate),
        "good" if m.gate.passed else "bad",
        tiles=_tiles(m, m.gate),
        text=[text for text in (_unstable(m), conditions(m), _status(m)) if text],
        tables=[Table("Baseline and compact network", ("", "baseline|", "compact|", "change|"), final_table(m.facts))],
    )


def _sentence(m: Material, gate: GateFacts) -> str:
    assert m.timed is not None
    held = sum(check.ok for check in gate.checks)
    parts = [
        f"{faster(m)} on {m.timed.device}, {accuracy_change(m, gate)}",
        f"{held} of {say.plural(len(gate.checks), 'gate')}",
        _version(m),
    ]
    verdict = "Ship" if gate.passed else "Do not ship"
    unsure = ", but the timing is UNSTABLE" if m.timed.flags else ""
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
    alias = "champion" if m.promote is not None and m.promote.promoted else "challenger"
    return f"version {m.register.version}, {alias}"


def _tiles(m: Material, gate: GateFacts) -> list[Tile]:
    assert m.timed is not None
    base, compact = gate.models
    found, told = m.timed.speedup, gate.accuracy
    ends = "" if told is None else say.between(told.compact.low, told.compact.high, scale=100)
    tiles = [
        Tile("Speed-up", say.times(found.value), say.between(found.low, found.high) or "no interval"),
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
    flags = say.listing(list(m.timed.flags))
    return (
        f"UNSTABLE: the timing was disturbed ({flags}): other work ran on the device or it drifted. Milliseconds are "
        "then less certain than the ratio; measure again on an idle device before you rely on them."
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
