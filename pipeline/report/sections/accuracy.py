"""Accuracy class by class, and the images that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Axis, Chart, Figure, Layer, Picture, Row, Section, Table, nothing
from secateur.pipeline.report.material import Material

TITLE = "Accuracy in detail"
MOST_CLASSES = 30
"""Classes of the chart: those that lost most, and those that gained most."""
CURVE = 100
"""Points of a precision-recall curve."""


def section(m: Material) -> Section:
    """Classes sorted by loss; images right before and wrong now, and back."""
    if m.gate is None:
        return nothing(TITLE, "The test split was not read, because the run did not reach its gate.")
    pictures = _pictures(m)
    missing = _missing(m, pictures)
    rows = _per_class(m)
    if not rows:
        said = (
            "Nothing is known of single images: the workload does not tell, or the run is of an earlier version "
            "of Secateur."
        )
        return Section(TITLE, said, pictures=pictures, missing=[*missing, f"{TITLE}: {said}"])
    worst = rows[0]
    lost = worst[2] - worst[1]
    said = (
        f"Class {worst[0]} loses most: {say.percent(worst[2], 1)} from {say.percent(worst[1], 1)}."
        if lost < 0
        else "No class loses accuracy."
    )
    text = [_change(m)] if "baseline.found" in m.images else []
    if m.gate.accuracy is not None and m.gate.accuracy.reason:
        text.append(f"Interval of the accuracy: {m.gate.accuracy.reason}.")
    figures = [_classes(m, rows)]
    if "baseline.score" in m.images:
        figures.append(_curves(m))
    return Section(TITLE, said, text=text, figures=figures, pictures=pictures, missing=missing)


def _missing(m: Material, pictures: Sequence[Picture]) -> list[str]:
    if pictures:
        return []
    why = (
        "report.pictures is false"
        if not m.config.report.pictures
        else "no image of the test split changed, or none was kept"
    )
    return [f"{TITLE}: no pictures, because {why}."]


def _name(m: Material, label: int) -> str:
    classes = m.export.usage.get("classes", ()) if m.export is not None else ()
    return str(classes[label]) if 0 <= label < len(classes) else str(label)


def _per_class(m: Material) -> list[tuple[str, float, float, int]]:
    """(class, before, after, how many images or objects), those that lost most first."""
    if "baseline.found" in m.images:
        return sorted(_accuracies(m), key=lambda row: row[2] - row[1])
    return sorted(_precisions(m), key=lambda row: row[2] - row[1]) if "baseline.score" in m.images else []


def _accuracies(m: Material) -> list[tuple[str, float, float, int]]:
    targets, rows = m.images["baseline.target"], []
    for label in np.unique(targets):
        own = targets == label
        before, after = (float((m.images[f"{name}.found"][own] == label).mean()) for name in ("baseline", "compact"))
        rows.append((_name(m, int(label)), before, after, int(own.sum())))
    return rows


def _precisions(m: Material) -> list[tuple[str, float, float, int]]:
    """Area under each class's precision-recall curve."""
    labels, rows = m.images["baseline.truth_label"], []
    for label in np.unique(labels):
        wanted = int((labels == label).sum())
        before, after = (_area(*curve(m.images, name, wanted, label)) for name in ("baseline", "compact"))
        rows.append((_name(m, int(label)), before, after, wanted))
    return rows


def curve(
    told: Mapping[str, np.ndarray], network: str, wanted: int, label: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and the best precision at that recall or more; of one class, or of all together."""
    right = told[f"{network}.right"]
    if label is not None:
        right = right[told[f"{network}.label"] == label]
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    return hits / max(1, wanted), np.maximum.accumulate(precision[::-1])[::-1]


def _area(recall: np.ndarray, precision: np.ndarray) -> float:
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _change(m: Material) -> str:
    before, after = (m.images[f"{name}.found"] == m.images["baseline.target"] for name in ("baseline", "compact"))
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return (
        f"Of {len(before):,} test images {lost} went from right to wrong, {won} from wrong to right; "
        f"{int((before & after).sum()):,} are right before and after."
    )


def _classes(m: Material, rows: Sequence[tuple[str, float, float, int]]) -> Figure:
    what = "images" if "baseline.found" in m.images else "objects"
    measure = "Accuracy" if what == "images" else "Average precision (area)"
    half = MOST_CLASSES // 2
    shown = list(rows) if len(rows) <= MOST_CLASSES else [*rows[:half], *rows[-half:]]
    bars: list[Row] = []
    for name, before, after, count in shown:
        for side, value, role in (("before", before, "baseline"), ("after", after, "compact")):
            bars.append(
                {
                    "x": round(value, 5),
                    "y": name,
                    "side": side,
                    "role": role,
                    "hollow": role == "baseline",
                    "tip": f"{name}, {side}: {say.percent(value, 1)} of {count} {what}",
                }
            )
    chart = Chart(
        Axis(f"{measure} on the test split", shown="%", domain=(0.0, 1.0)),
        Axis("Class, largest loss first", scale="names", names=tuple(row[0] for row in shown)),
        [Layer("bars", bars)],
        f"{measure} of each class before and after",
        grouped=True,
    )
    cells = [
        [name, f"{count:,}", say.percent(before, 1), say.percent(after, 1), say.points(after - before, 1)]
        for name, before, after, count in rows
    ]
    note = (
        ""
        if len(shown) == len(rows)
        else f"{len(shown)} of {len(rows)} classes are drawn: the largest losses and gains."
    )
    return Figure(
        "classes",
        "Class by class",
        chart,
        Table("All classes", ("class", f"{what}|", "baseline|", "compact|", "change|"), cells),
        note,
    )


def _curves(m: Material) -> Figure:
    rows: list[Row] = []
    cells = []
    wanted = len(m.images["baseline.truth_label"])
    for name in ("baseline", "compact"):
        recall, precision = curve(m.images, name, wanted)
        places = np.linspace(0, len(recall) - 1, CURVE if len(recall) else 0)
        at = np.unique(places.round().astype(int))
        rows += [{"x": round(float(recall[i]), 5), "y": round(float(precision[i]), 5), "role": name} for i in at]
        for level in (0.25, 0.5, 0.75):
            reached = np.flatnonzero(recall >= level)
            best = say.percent(float(precision[reached[0]]), 1) if len(reached) else "not reached"
            cells.append([name, say.percent(level, 0), best])
    chart = Chart(
        Axis("Recall (all classes together)", shown="%", domain=(0.0, 1.0)),
        Axis("Precision", shown="%", domain=(0.0, 1.0)),
        [Layer("line", rows)],
        "Precision against recall of both networks, all classes together",
    )
    return Figure(
        "precision-recall",
        "Precision and recall",
        chart,
        Table("Precision at some recalls", ("network", "recall|", "precision|"), cells),
    )


def _pictures(m: Material) -> list[Picture]:
    made = [Picture(str(row["source"]), str(row["alt"]), str(row.get("caption", ""))) for row in m.pictures]
    if "baseline.found" not in m.images:
        return made
    for row in m.changed:
        at = int(row["image"])
        target = _name(m, int(m.images["baseline.target"][at]))
        before, after = (_name(m, int(m.images[f"{name}.found"][at])) for name in ("baseline", "compact"))
        turn = "right to wrong" if before == target else "wrong to right"
        alt = f"test image {at}, class {target}: baseline says {before}, compact says {after}"
        made.append(Picture(str(row["picture"]), alt, f"{turn}: {target}, was {before}, now {after}"))
    return made
