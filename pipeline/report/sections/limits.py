"""What this report does not know, and why: collected from all other sections."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Section
from secateur.pipeline.report.material import Material

TITLE = "Limits of this report"


def section(m: Material, others: Sequence[Section]) -> Section:
    """What was not measured.

    Args:
        others: the sections before this one.
    """
    missing = [line for other in others for line in other.missing]
    text = [*missing]
    if m.gate is not None and m.gate.accuracy is not None:
        images = m.gate.accuracy.images
        text.append(
            f"Accuracy: {say.plural(images, 'test image')}; the interval is over images, and says nothing of images "
            "of another kind, nor of another training."
        )
    if m.timed is not None:
        text.append(
            f"Latency: on {m.timed.device} as it was then. Another device, runtime or number of threads has other "
            "ratios."
        )
    said = (
        f"{say.plural(len(missing), 'thing was', 'things were')} not measured; the other sections rest on facts of "
        "this run alone."
        if missing
        else "Nothing that this page could show is missing."
    )
    return Section(TITLE, said, text=text)
