"""How both networks were trained."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material
from secateur.pipeline.training.curve import Fitted

TITLE = "Training"


def section(m: Material) -> Section:
    """Curves of loss, held-out metric and learning rate."""
    known = {
        "baseline": m.baseline.training if m.baseline is not None else None,
        "compact": m.finetune.training if m.finetune is not None else None,
    }
    fitted = {name: each for name, each in known.items() if each is not None and each.curve}
    if not fitted:
        origin = f" The baseline: {m.baseline.origin}." if m.baseline is not None else ""
        return nothing(TITLE, f"No training of this run is recorded.{origin}")
    said = "; ".join(_sentence(name, each) for name, each in fitted.items()) + "."
    names = {name: each.series() for name, each in fitted.items()}
    metric = m.gate.metric if m.gate is not None else m.metric
    figures = [_figure("loss", "Training loss", "loss", names)]
    if any(f"search_split.{metric}" in series for series in names.values()):
        figures.append(
            _figure("held-out", f"{say.metric(metric)} on the search split", f"search_split.{metric}", names)
        )
    figures.append(_figure("lr", "Learning rate", "lr", names))
    absent = [name for name in known if name not in fitted]
    missing = [
        f"Training: no curve of the {name} network{' (its weights came trained)' if name == 'baseline' else ''}."
        for name in absent
    ]
    return Section(TITLE, said, figures=figures, missing=missing)


def _sentence(name: str, fitted: Fitted) -> str:
    what = "the fine-tuning of the compact network" if name == "compact" else "The baseline's training"
    kept = (
        f"epoch {fitted.kept_epoch:g} is kept, the best by the search split"
        if fitted.keep == "best"
        else "the last weights are kept"
    )
    return (
        f"{what} took {fitted.curve[-1].epoch:g} epochs in {fitted.precision}, to a loss of "
        f"{say.number(fitted.curve[-1].loss)}; {kept}"
    )


def _figure(key: str, title: str, series: str, networks: Mapping[str, Mapping[str, list[tuple[int, float]]]]) -> Figure:
    rows: list[Row] = []
    cells = []
    for name, told in networks.items():
        for epoch, value in told.get(series, []):
            rows.append(
                {"x": epoch, "y": round(value, 6), "role": name, "tip": f"{name}, epoch {epoch}: {say.number(value)}"}
            )
            cells.append([name, str(epoch), say.number(value)])
    share = series.startswith("search_split.") and all(0 <= row["y"] <= 1 for row in rows)
    y = Axis(title, shown="%" if share else "", zero=key != "held-out")
    chart = Chart(
        Axis("Epoch"),
        y,
        [Layer("line", rows), Layer("points", rows)],
        f"{title} by epoch, of both trainings",
        height=180,
    )
    return Figure(f"training-{key}", title, chart, Table(title, ("network", "epoch|", f"{title.lower()}|"), cells))
