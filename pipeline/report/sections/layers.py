"""Where the time of a call goes, operator by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Least, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material

TITLE = "Where the time goes"
MOST_DRAWN, MOST_AT_FIRST = 300, 40
"""Layers of the chart, in the network's order: those with the largest differences. A slider shows fewer or more."""
MULTIPLIES = ("Conv", "FusedConv", "QLinearConv", "Gemm", "MatMul", "FusedMatMul")


@dataclass(frozen=True)
class Operator:
    """An operator of both files.

    Args:
        ms: by network; missing = it is not in that file.
        shapes: of its output, by network.
        macs: by network, where these follow from its shapes.
    """

    name: str
    op: str
    ms: Mapping[str, float]
    shapes: Mapping[str, str]
    macs: Mapping[str, float]

    @property
    def saved(self) -> float:
        """Milliseconds that the compact network spends less."""
        return self.ms.get("baseline", 0.0) - self.ms.get("compact", 0.0)


def section(m: Material) -> Section:
    """Paired bars in network order, sums per operator."""
    networks = m.layers.get("networks")
    if not isinstance(networks, Mapping) or not {"baseline", "compact"} <= set(networks):
        why = (
            "the runtime on the device cannot time single layers"
            if m.timed is not None
            else "the exported files were not timed"
        )
        return nothing(TITLE, f"No layer was timed: {why}, or the run is of an earlier version of Secateur.")
    every = operators(networks)
    totals = {name: sum(node["ms"] for node in networks[name]) for name in ("baseline", "compact")}
    top = sorted(every, key=lambda each: -each.ms.get("compact", 0.0))[:3]
    share = sum(each.ms.get("compact", 0.0) for each in top) / (totals["compact"] or 1)
    best = max(every, key=lambda each: each.saved)
    said = (
        f"{_words(len(top))} of the compact network take {say.percent(share, 0)} of its layers' time; most was "
        f"saved in {best.name} ({say.ms(max(0.0, best.saved))})."
    )
    whole = [timing.cpu_p50_ms for timing in m.timed.latency] if m.timed is not None else []
    text = []
    if whole:
        text.append(
            f"The layers' times add up to {say.ms(totals['baseline'])} and {say.ms(totals['compact'])}, where whole "
            "calls "
            f"take {say.ms(whole[0])} and {say.ms(whole[1])} (CPU time): the profile is a pass of its own after the "
            "timed calls, "
            "it slows each layer, and it keeps the shortest of its calls."
        )
    return Section(TITLE, said, text=text, figures=[_figure(every)], tables=[_sums(every, totals)])


def _words(number: int) -> str:
    return {1: "One layer", 2: "Two layers", 3: "Three layers"}.get(number, f"{number} layers")


def operators(networks: Mapping[str, Any]) -> list[Operator]:
    """Operators of both files, in the order of the baseline's.

    Layers go by their names in the network; what a runtime adds has other names in every file, and goes by its kind and
    place.
    """
    told: dict[str, dict[str, Any]] = {}
    for network in ("baseline", "compact"):
        counts: Counter[str] = Counter()
        for node in networks[network]:
            counts[node["op"]] += 1
            name = node.get("layer") or f"{node['op']} {counts[node['op']]}"
            entry = told.setdefault(name, {"op": node["op"], "ms": {}, "shapes": {}, "macs": {}})
            entry["ms"][network] = entry["ms"].get(network, 0.0) + node["ms"]
            entry["shapes"][network] = "x".join(str(side) for side in (node["output_shapes"] or [[]])[0])
            if (found := macs_of(node)) is not None:
                entry["macs"][network] = found
    return [Operator(name, **entry) for name, entry in told.items()]


def macs_of(node: Mapping[str, Any]) -> float | None:
    """Multiply-accumulates of a node: every output needs one filter; None where its shapes do not tell."""
    shapes, outputs = node["input_shapes"], node["output_shapes"]
    if node["op"] not in MULTIPLIES or len(shapes) < 2 or not outputs or not outputs[0]:
        return None
    if node["op"].endswith("MatMul"):
        return float(prod(outputs[0]) * shapes[0][-1]) if shapes[0] else None
    weight = shapes[3] if node["op"] == "QLinearConv" and len(shapes) > 3 else shapes[1]
    if not weight or not weight[0]:
        return None
    return float(prod(outputs[0]) * prod(weight[1:])) if node["op"] != "Gemm" else float(prod(weight) * outputs[0][0])


def _rate(each: Operator, network: str) -> str:
    if network not in each.macs or not each.ms.get(network):
        return ""
    return say.number(each.macs[network] / each.ms[network] / 1e6)


def _figure(every: list[Operator]) -> Figure:
    largest = sorted(every, key=lambda each: -abs(each.saved))[:MOST_DRAWN]
    kept, start = {each.name for each in largest}, 0.0
    if len(largest) > MOST_AT_FIRST:
        start = round(abs(largest[MOST_AT_FIRST - 1].saved), 6)
    first = sum(round(abs(each.saved), 6) >= start for each in largest)
    rows: list[Row] = []
    all_rows: list[Row] = []
    for each in every:
        for network in ("baseline", "compact"):
            if network not in each.ms:
                continue
            rate = _rate(each, network)
            macs = f", {say.count(each.macs[network])} MACs" if network in each.macs else ""
            row = {
                "x": round(each.ms[network], 6),
                "y": each.name,
                "side": network,
                "size": round(abs(each.saved), 6),
                "role": each.op,
                "hollow": network == "baseline",
                "tip": f"{each.name}, {network}: {say.ms(each.ms[network])}, {each.op} -> "
                f"{each.shapes[network]}{macs}{f', {rate} GMAC/s' if rate else ''}",
            }
            all_rows.append(row)
            if each.name in kept:
                rows.append(row)
    names = tuple(each.name for each in every if each.name in kept)
    chart = Chart(
        Axis("Time of the layer, ms", zero=True),
        Axis("Layer, in the network's order", scale="names", names=names),
        [Layer("bars", rows, all_rows)],
        "Time of each layer before (pale) and after",
        height=max(120, 20 * first),
        grouped=True,
        least=Least("Difference between before and after", "ms", start),
    )
    columns = ("layer", "operator", "baseline|", "compact|", "saved|", "output", "MACs|", "GMAC/s|")
    cells = [
        [
            each.name,
            each.op,
            say.ms(each.ms["baseline"]) if "baseline" in each.ms else "not there",
            say.ms(each.ms["compact"]) if "compact" in each.ms else "not there",
            say.ms(each.saved) if each.saved >= 0 else f"-{say.ms(-each.saved)}",
            each.shapes.get("compact", each.shapes.get("baseline", "")),
            say.count(each.macs.get("compact")) if "compact" in each.macs else "",
            _rate(each, "compact"),
        ]
        for each in every
    ]
    note = "Pale: before; full: after."
    if first < len(every):
        note += f" {first} of {len(every)} layers are shown at first, those with the largest differences."
    if len(names) < len(every):
        note += f" {len(names)} can be drawn; the table has all."
    return Figure("layers", "Time of each layer", chart, Table(f"All {len(every)} layers", columns, cells), note)


def _sums(every: list[Operator], totals: Mapping[str, float]) -> Table:
    rows = []
    for op in dict.fromkeys(each.op for each in every):
        own = [each for each in every if each.op == op]
        before, after = (sum(each.ms.get(name, 0.0) for each in own) for name in ("baseline", "compact"))
        rows.append(
            (
                after,
                [op, str(len(own)), say.ms(before), say.ms(after), say.percent(after / (totals["compact"] or 1), 1)],
            )
        )
    ordered = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    return Table("Sums per operator", ("operator", "layers|", "baseline|", "compact|", "share of compact|"), ordered)
