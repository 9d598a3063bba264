"""Which mixtures of precisions are tried for every candidate: ``precision.layers``, settled before candidates are.

Each layer of the unpruned network is put in 8 bits alone, on a few training images. A search tries few mixtures: the
first layers in float, which costs little latency and often saves some, and the most sensitive ones besides. What was
found is a line of the journal, which is where everybody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from secateur.export.quantize import mixed, precision
from secateur.pipeline.run.facts import LayerPrecisions
from secateur.pipeline.run.journal import Journal, Record

STAGE = "precision"
FIRST = (1, 3)
"""Layers at the network's beginning that stay in float together."""
SENSITIVE = 0.1
"""Share of the layers that stay in float as the most sensitive ones, beside the first; one at least."""


def mixtures(kind: str, errors: Mapping[str, float]) -> tuple[str, ...]:
    """A precision, and the mixtures of it that are worth a try; each leaves layers in it.

    Args:
        errors: layer, in the order of the network -> relative error of the outputs.
    """
    layers = list(errors)
    worst = sorted(layers, key=lambda layer: -errors[layer])[: max(1, round(SENSITIVE * len(layers)))]
    floats = [layers[:count] for count in FIRST]
    floats.append([layer for layer in layers if layer in {*layers[:1], *worst}])
    names = [kind, *(mixed(kind, chosen) for chosen in floats if len(chosen) < len(layers))]
    return tuple(dict.fromkeys(names))


def settled(records: Sequence[Record]) -> LayerPrecisions | None:
    """What a journal says; None before it is settled, or where layers may not differ."""
    for record in records:
        if record.get("stage") == STAGE:
            return LayerPrecisions(tried=tuple(record["tried"]), sensitivity=record["sensitivity"])
    return None


def settle(journal: Journal, ships: Sequence[str], look: Callable[[str], dict[str, float]]) -> LayerPrecisions:
    """Find which mixtures are tried, and write it down; once a run.

    Args:
        ships: the precisions that may ship.
        look: gives the errors of a precision's layers; none where that cannot be found, and then there are no mixtures.
    """
    if (known := settled(journal.records)) is not None:
        return known
    errors = {kind: look(kind) for kind in ships if precision(kind).calibrated}
    tried = tuple(name for kind in ships for name in (mixtures(kind, errors[kind]) if errors.get(kind) else (kind,)))
    found = LayerPrecisions(tried=tried, sensitivity=errors)
    journal.append({"stage": STAGE, "kind": "choice", "tried": list(tried), "sensitivity": errors})
    return found


def told(errors: Mapping[str, float]) -> str:
    """The most sensitive layers, for people."""
    worst = sorted(errors, key=lambda layer: -errors[layer])[:3]
    listed = ", ".join(f"{layer} {errors[layer]:.1%}" for layer in worst)
    return f"most sensitive: {listed}" if worst else "the network cannot be cut in it, so no layers are told apart"
