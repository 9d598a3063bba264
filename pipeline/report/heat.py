"""A sustained run as a report shows it: the latency of each second, with temperature and clock."""

from __future__ import annotations

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Row, Table
from secateur.pipeline.report.material import Material
from secateur.pipeline.run.facts import SustainedFacts

SENSORS = (("temperature_c", "Temperature", "°C"), ("freq_mhz", "Clock frequency", "MHz"))
SLOWER = 0.05
"""Relative change of p50 from which it is called one."""


def told(m: Material) -> list[str]:
    """What heat does, in a sentence; empty where there was no sustained run."""
    found = m.timed.sustained if m.timed is not None else None
    return [] if found is None else [_sentence(found)]


def _sentence(found: SustainedFacts) -> str:
    change = found.last_p50_ms / found.first_p50_ms - 1
    what = "does not slow it down" if change < SLOWER else "slows it down"
    said = (
        f"Heat: {say.seconds(found.seconds)} of calls without a pause {what}: p50 of the compact network is "
        f"{say.ms(found.first_p50_ms)} in the first seconds, {say.ms(found.last_p50_ms)} in the last "
        f"({say.signed(100 * change, 1)} %)"
    )
    if found.temperature_c is not None:
        begin, most, end = found.temperature_c
        said += f"; {begin:.0f} °C at the beginning, {most:.0f} °C at most, {end:.0f} °C at the end"
    if found.freq_mhz is not None:
        begin, least, end = found.freq_mhz
        said += f"; clock {begin:.0f} MHz at the beginning, {least:.0f} MHz at least, {end:.0f} MHz at the end"
    return f"{said}."


def missing(m: Material) -> list[str]:
    """What is not known of heat, and why."""
    if m.timed is None:
        return []
    if m.timed.sustained is None:
        asked = m.config.device.sustain_s
        why = "the device could not do it" if asked else "none was asked for (device.sustain_s)"
        return [f"Latency: no sustained run, so what heat does is not known: {why}."]
    silent = [title.lower() for key, title, _ in SENSORS if getattr(m.timed.sustained, key) is None]
    return [f"Latency: no {' or '.join(silent)} of the sustained run, because the device tells none."] if silent else []


def figures(m: Material) -> list[Figure]:
    """The latency of each second, and each sensor that the device has."""
    seconds = m.sustained.get("seconds") or ()
    if m.timed is None or m.timed.sustained is None or not seconds:
        return []
    x = Axis("Seconds of calls without a pause", zero=True)
    rows: list[Row] = [
        {
            "x": each["t_s"],
            "y": round(each["p50_ms"], 6),
            "role": "compact",
            "tip": f"second {each['t_s']:.0f}: p50 {say.ms(each['p50_ms'])}, p95 {say.ms(each['p95_ms'])}",
        }
        for each in seconds
    ]
    chart = Chart(
        x,
        Axis("p50 of a second, ms", zero=True),
        [Layer("line", rows), Layer("points", rows)],
        "Median time of a call of the compact network in each second of a sustained run",
        height=180,
    )
    cells = [
        [say.fixed(each["t_s"], 0), f"{each['calls']:,}", say.ms(each["p50_ms"]), say.ms(each["p95_ms"])]
        for each in seconds
    ]
    columns = ("second|", "calls|", "p50|", "p95|")
    made = [Figure("heat", "Heat: a sustained run", chart, Table("Every second of the sustained run", columns, cells))]
    return [*made, *(figure for key, title, unit in SENSORS for figure in _sensor(m, x, key, title, unit))]


def _sensor(m: Material, x: Axis, key: str, title: str, unit: str) -> list[Figure]:
    known = [(each["t_s"], each[key]) for each in m.sustained.get("sensors") or () if key in each]
    if not known:
        return []
    rows = [{"x": at, "y": value, "role": "candidate", "tip": f"{value:g} {unit}"} for at, value in known]
    title = f"{title} during the sustained run"
    chart = Chart(
        x, Axis(f"{title.split(' during')[0]}, {unit}"), [Layer("line", rows), Layer("points", rows)], title, height=120
    )
    cells = [[say.fixed(at, 1), f"{value:g} {unit}"] for at, value in known]
    return [Figure(f"heat-{key}", title, chart, Table(title, ("seconds|", "reading|"), cells))]
