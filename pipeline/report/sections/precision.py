"""Number types side by side."""

from __future__ import annotations

from secateur.export.quantize import kind_of, layers_in_float
from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Section, Table, nothing
from secateur.pipeline.report.material import Material, Point

TITLE = "Precision"
ROUNDED = "compact in "
"""How the step from a network to its file in another precision is called, before that precision's name."""
MOST_LAYERS = 40
"""Of a chart: the most sensitive ones."""


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
    text += [*_rounded_file(m), *_slower(m), *_in_float(m, chosen)]
    seen = {kind_of(name) for name in (*best, chosen or "fp32", "fp32")}
    missing = [f"Precision: {name} was not tried." for name in ("fp32", "bf16", "int8") if name not in seen]
    drawn = len(best) > 1 and sum("latency" in point.costs for point in best.values()) > 1
    return Section(
        TITLE,
        said,
        text=text,
        figures=[*([_figure(m, best)] if drawn else []), *_sensitivities(m, chosen)],
        tables=[*([] if drawn or len(best) < 2 else [_of_search(m, best)]), *_tables(m)],
        missing=missing,
    )


def _rounded_file(m: Material) -> list[str]:
    """The metric of the very file beside that of the network it was made of."""
    return [
        f"On {hop.samples} images of the search split the pruned network has {say.metric(m.own_metric)} "
        f"{say.percent(hop.metric_expected)} in PyTorch, its file in {hop.name.removeprefix(ROUNDED)} "
        f"{say.percent(hop.metric)}."
        for hop in m.hops
        if hop.name.startswith(ROUNDED) and hop.tolerance is None and None not in (hop.metric, hop.metric_expected)
    ]


def _slower(m: Material) -> list[str]:
    """Whether integers are faster on each device at all."""
    return [
        f"The unpruned network in {name} takes {say.number(ratio)} of its latency in fp32 on {device}: {name} is "
        f"{'slower' if ratio > 1 else 'faster'} there."
        for name, of_devices in ((m.search.precision_latency if m.search is not None else None) or {}).items()
        for device, ratio in of_devices.items()
    ]


def _in_float(m: Material, chosen: str | None) -> list[str]:
    """The layers that stay in float in the file that ships, and why."""
    mixtures = m.search.layer_precisions if m.search is not None else None
    if chosen is None:
        return []
    errors = mixtures.sensitivity.get(kind_of(chosen), {}) if mixtures is not None else {}
    if floats := layers_in_float(chosen):
        each = [f"{layer} ({say.percent(errors[layer], 1)})" if layer in errors else layer for layer in floats]
        return [
            f"In float stay {say.listing(each)}. In brackets: what {kind_of(chosen)} in that layer alone changes in "
            "the outputs. First layers and the most sensitive ones are tried; this mixture scored best by the reward."
        ]
    if mixtures is None:
        return []
    tried = say.plural(sum(bool(layers_in_float(name)) for name in mixtures.tried), "mixture")
    return [f"Layers could have stayed in float ({tried} tried); {chosen} for all of them scored best by the reward."]


def _sensitivities(m: Material, chosen: str | None) -> list[Figure]:
    """What 8 bits in one layer alone change in the outputs, by precision."""
    mixtures = m.search.layer_precisions if m.search is not None else None
    figures = []
    for kind, errors in (mixtures.sensitivity if mixtures is not None else {}).items():
        if not errors:
            continue
        floats = layers_in_float(chosen) if chosen is not None and kind_of(chosen) == kind else ()
        drawn = sorted(errors, key=lambda layer: -errors[layer])[:MOST_LAYERS]
        names = tuple(layer for layer in errors if layer in drawn or layer in floats)
        rows = [
            {
                "x": round(errors[layer], 6),
                "y": layer,
                "role": "in float" if layer in floats else f"in {kind}" if floats or kind == chosen else "layer",
                "tip": f"{layer}: {say.percent(errors[layer], 2)}{', stays in float' if layer in floats else ''}",
            }
            for layer in names
        ]
        chart = Chart(
            Axis(f"Change of the outputs where that layer alone is in {kind}, relative", zero=True, shown="%"),
            Axis("Layer, in the network's order", scale="names", names=names),
            [Layer("bars", rows)],
            f"Relative change of the outputs where one layer alone is in {kind}, with the layers that stay in float",
        )
        cells = [
            [layer, say.percent(error, 2), "float" if layer in floats else kind if floats or kind == chosen else ""]
            for layer, error in errors.items()
        ]
        note = (
            f"{len(names)} of {len(errors)} layers are drawn, the most sensitive ones."
            if len(names) < len(errors)
            else ""
        )
        table = Table(f"Layers in {kind} alone", ("layer", "change of the outputs|", "in the file that ships"), cells)
        figures.append(Figure(f"layers-in-{kind}", f"How sensitive layers are to {kind}", chart, table, note))
    return figures


def _best(m: Material) -> dict[str, Point]:
    """The most accurate candidate in each precision, those after training before those as cut."""
    found: dict[str, Point] = {}
    for point in m.candidates:
        known = found.get(point.precision)
        if known is None or _rank(m, point) > _rank(m, known):
            found[point.precision] = point
    return found


def _rank(m: Material, point: Point) -> tuple[bool, float, bool]:
    chosen = m.chosen is not None and point.key == m.chosen.key
    return point.stage == "final", point.accuracy or 0.0, chosen


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
    return Figure("precisions", "The best candidate in each precision", chart, _of_search(m, best))


def _of_search(m: Material, best: dict[str, Point]) -> Table:
    cells = [
        [name, p.weights, say.percent(p.accuracy), say.number(p.costs.get("latency")), say.number(p.costs.get("size"))]
        for name, p in best.items()
    ]
    columns = ("precision", "weights", f"{say.metric(m.metric)}, search split|", "latency ratio|", "file size ratio|")
    return Table("The best candidate in each precision", columns, cells)


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
