"""The sections of a report, one module each: ``TITLE``, and ``section(material)`` which makes it."""

from __future__ import annotations

from secateur.pipeline.report.content import Section
from secateur.pipeline.report.material import Material
from secateur.pipeline.report.sections import (
    accuracy,
    cuts,
    device,
    gates,
    latency,
    layers,
    limits,
    macs,
    precision,
    proofs,
    reproduce,
    search,
    sensitivity,
    tradeoff,
    training,
    verdict,
)
from secateur.pipeline.report.untold import placed_nowhere

ORDER = (
    *(verdict, tradeoff, macs, gates, latency, layers, cuts, sensitivity),
    *(search, accuracy, precision, device, proofs, training, reproduce),
)
"""As they stand in a report; the last one is made of what the others miss."""


def sections(material: Material) -> list[Section]:
    """All sections of a report; none tells where files lay."""
    made = [placed_nowhere(module.section(material)) for module in ORDER]
    return [*made, limits.section(material, made)]
