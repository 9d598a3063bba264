"""Number types side by side."""

from __future__ import annotations

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Section, Table, nothing
from secateur.pipeline.report.material import Material, Point

TITLE = "Precision"


def section(m: Material) -> Section:
    """Accuracy, latency and size of the best candidate in each precision that was tried, and of what ships."""
    best = _best(m)
    if m.export is None and not best:
        return nothing(TITLE, "Nothing was exported, so no file has a precision yet.")
    chosen = m.export.compact.artifact.precision if m.export is not None else None
    tried = list(dict.fromkeys(m.config.ships))
    said = f"The compact network ships in {chosen}" if chosen is not None else "No file was exported yet"
    said += (
        f"; tried: {say.listing(tried)}."
        if len(tried) > 1
        else f"; only {tried[0]} was asked for (precision in the run file)."
    )
    text = []
    if m.export is not None and (rounded := m.export.compact.rounded) is not None:
        text.append(
            f"Against PyTorch in fp32 the file in {chosen} has the same argmax in "
            f"{say.percent(rounded.argmax_agreement, 1)} of "
            f"{rounded.samples} images; its largest relative difference is {say.number(rounded.max_relative_error, 2)}."
        )
    absent = [name for name in ("fp32", "bf16", "int8") if name not in best and name not in (chosen, "fp32")]
    missing = [f"Precision: {name} was not tried." for name in absent]
    return Section(
        TITLE, said, text=text, figures=[_figure(m, best)] if len(best) > 1 else [], tables=_tables(m), missing=missing
    )


def _best(m: Material) -> dict[str, Point]:
    """The most accurate candidate in each precision, those after training before those as cut."""
    found: dict[str, Point] = {}
    for point in m.candidates:
        known = found.get(point.precision)
        if known is None or (point.stage == "final", point.accuracy or 0.0) > (
            known.stage == "final",
            known.accuracy or 0.0,
        ):
            found[point.precision] = point
    return found


def _figure(m: Material, best: dict[str, Point]) -> Figure:
    rows = [
        {
            "x": p.costs["latency"],
            "y": p.accuracy,
            "role": "compact" if m.chosen is not None and p.key == m.chosen.key else "candidate",
            "hollow": not p.measured,
            "tip": f"{name}: {say.percent(p.accuracy)}, {say.number(p.costs['latency'])} of the latency",
        }
        for name, p in best.items()
        if "latency" in p.costs
    ]
    chart = Chart(
        Axis(f"Latency on {m.device}, share of the baseline's"),
        Axis(f"{say.metric(m.metric)} on the search split", shown="%"),
        [Layer("points", rows)],
        "Accuracy and latency of the best candidate in each precision",
        height=200,
    )
    cells = [
        [name, p.weights, say.percent(p.accuracy), say.number(p.costs.get("latency")), say.number(p.costs.get("size"))]
        for name, p in best.items()
    ]
    columns = ("precision", "weights", f"{say.metric(m.metric)}|", "latency ratio|", "file size ratio|")
    return Figure(
        "precisions", "The best candidate in each precision", chart, Table("Precisions of the search", columns, cells)
    )


def _tables(m: Material) -> list[Table]:
    tables = []
    if m.gate is not None and m.export is not None and m.timed is not None:
        rows = []
        for (name, model), (_, exported) in zip(m.gate.models.items(), m.export.networks.items(), strict=True):
            told = None if m.gate.accuracy is None else getattr(m.gate.accuracy, name)
            ends = "" if told is None else say.between(told.low, told.high, scale=100)
            ratio = "1" if name == "baseline" else say.number(1 / m.timed.speedup.value)
            rows.append(
                [
                    name,
                    exported.artifact.precision,
                    say.percent(model[m.gate.metric]),
                    f"{ends} %" if ends else "",
                    ratio,
                    say.size(model.size_bytes),
                    _used(m, name),
                ]
            )
        columns = (
            "network",
            "precision",
            f"{say.metric(m.gate.metric)}, test split|",
            "interval",
            "latency ratio|",
            "file size|",
            "layers compute in",
        )
        tables.append(Table("The files that ship", columns, rows))
    return tables


def _used(m: Material, name: str) -> str:
    return (m.benchmark.precision(name) if m.benchmark is not None else None) or "the runtime does not tell"
