"""What is known of the device, and how it was while it measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material

TITLE = "Device"
QUIET_LOAD, QUIET_PRESSURE = 1.0, 0.05
KINDS = ("conv", "pointwise", "depthwise", "linear")


def section(m: Material) -> Section:
    """Its state in sentences, its staircase with the chosen widths."""
    if m.search is None and m.benchmark is None:
        return nothing(TITLE, f"Nothing was measured on {m.device} yet.")
    environment = m.benchmark.environment if m.benchmark is not None else {}
    said = f"{m.device}: {_state(m)}"
    text = [text for text in (_hardware(m, environment), _multiples(m), *_probes(m)) if text]
    figures = [figure for figure in (_staircase(m),) if figure is not None]
    missing = (
        []
        if figures
        else ["Device: its staircase was not probed (device.probe), so the chosen widths do not stand on it."]
    )
    if m.search is not None and m.search.devices:
        text.append(f"Widths of the search are common multiples of those of {say.listing(list(m.search.devices))}.")
    return Section(TITLE, said, text=text, figures=figures, tables=_tables(m), missing=missing)


def _state(m: Material) -> str:
    """No throttling, steal 0 %, load 1.5."""
    if m.benchmark is None:
        return "the exported files were not timed on it."
    parts = []
    parts.append("it throttled" if m.benchmark.throttled else "no throttling seen")
    every = [process.environment for process in m.benchmark.processes]
    steal = [each["steal"] for each in every if isinstance(each.get("steal"), int | float)]
    if steal:
        parts.append(f"steal {say.percent(max(steal), 0)}")
    loads = [each["loadavg"][0] for each in every if each.get("loadavg")]
    if loads:
        parts.append(f"load {say.fixed(float(np.median(loads)), 1)}")
    pressures = [p.pressure for p in m.benchmark.processes if p.pressure is not None]
    if pressures:
        waited = float(np.median(pressures))
        busy = "other work waited for a processor" if waited > QUIET_PRESSURE else "nothing waited for a processor"
        parts.append(f"{busy} ({say.percent(waited, 1 if waited < 0.1 else 0)} of the time)")
    parts.append(f"drift {say.signed(100 * m.benchmark.drift, 1)} %")
    temperatures = [p.temperature_c for p in m.benchmark.processes if p.temperature_c is not None]
    parts.append(f"at most {max(temperatures):.0f} °C" if temperatures else "temperature not readable")
    return f"{', '.join(parts)}."


def _hardware(m: Material, environment: Mapping[str, Any]) -> str:
    facts = {**(m.search.device.facts if m.search is not None else {}), **environment}
    what = [str(facts[key]) for key in ("model", "cpu", "machine") if facts.get(key)]
    cpus = facts.get("cpus")
    parts = [", ".join(dict.fromkeys(what))]
    if isinstance(cpus, int):
        parts.append(say.plural(cpus, "core"))
    parts += [f"{name} {facts[name]}" for name in ("onnxruntime", "openvino", "ncnn") if facts.get(name)]
    parts += [f"Python {facts['python']}"] if facts.get("python") else []
    parts += [str(facts["system"])] if facts.get("system") else []
    said = f"{'; '.join(part for part in parts if part)}."
    cores = environment.get("cores")
    if cores:
        said += f" Measured on {'core' if len(cores) == 1 else 'cores'} {say.listing([str(core) for core in cores])}."
    description = f"{m.profile.description}. " if m.profile is not None and m.profile.description else ""
    return description.replace("..", ".") + said


def _multiples(m: Material) -> str:
    if m.search is None:
        return ""
    device = m.search.device
    told = ", ".join(f"{multiple} ({kind})" for kind, multiple in device.multiples.items())
    begin = "Small networks of one kind of layer alone pay in" if m.search.probes else "Widths are"
    said = f"{begin} multiples of {told}, by {device.origin}"
    if m.config.device.channel_multiple is not None:
        said += f"; the run file sets {m.config.device.channel_multiple} for all"
    if device.noise_floor is not None:
        said += (
            f". A network against itself differs by up to {say.percent(device.noise_floor, 1)} in one "
            "measurement (95 %)"
        )
    return said + "."


def _probes(m: Material) -> list[str]:
    probes = (m.search.probes if m.search is not None else None) or {}
    return [
        f"On {name} widths of this very network pay in multiples of {probe.text}, by whole networks of equal MACs "
        f"timed in turn ({say.seconds(probe.seconds)})."
        for name, probe in probes.items()
    ]


def _tables(m: Material) -> list[Table]:
    tables = []
    for name, probe in ((m.search.probes if m.search is not None else None) or {}).items():
        rows = [[str(what), str(found)] for what, found in probe.summary()]
        tables.append(
            Table(
                f"Widths of this network on {name}: how much slower than the fastest (95 %)",
                ("widths", "found"),
                rows,
            )
        )
    return tables


def _staircase(m: Material) -> Figure | None:
    """Each kind's time by width, the narrowest = 1, with the widths that were chosen."""
    curves = m.search.device.curves if m.search is not None else {}
    if not curves:
        return None
    chosen = sorted(set(m.finetune.best.candidate.plan.widths.values())) if m.finetune is not None else []
    rows: list[Row] = []
    marks: list[Row] = []
    cells = []
    for kind, curve in curves.items():
        least = min(curve.values())
        for width, value in sorted(curve.items()):
            row = {
                "x": int(width),
                "y": round(value / least, 4),
                "role": kind,
                "series": kind,
                "tip": f"{kind}, {width} channels: {say.ms(value)}",
            }
            rows.append(row)
            if int(width) in chosen:
                marks.append(row)
            cells.append([kind, str(width), say.ms(value), "chosen" if int(width) in chosen else ""])
    layers = [Layer("line", rows)] + ([Layer("points", marks)] if marks else [])
    chart = Chart(
        Axis("Channels of the layer"),
        Axis("Time, narrowest = 1", zero=True),
        layers,
        "Time of small networks by their width, for each kind of layer, with the chosen widths as points",
    )
    outside = [width for width in chosen if not any(width in map(int, curve) for curve in curves.values())]
    note = (
        "Points: widths of the compact network."
        if marks
        else "No width of the compact network lies in the range that was probed."
    )
    if outside and marks:
        note += f" Outside of the range that was probed: {', '.join(map(str, outside))}."
    return Figure(
        "staircase",
        "How time steps with width",
        chart,
        Table("Staircase", ("kind", "channels|", "time|", "compact network"), cells),
        note,
    )
