"""Whether integers are faster at all: the unpruned network in them, timed beside the one in fp32, before the search.

Which kernels a processor has for a scheme of number types decides: int8 in the wrong one is slower than floats. It is
said, with the measured ratio, and not forbidden: files are smaller all the same, and the reward knows the latency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from secateur.export.qdq import SCHEMES
from secateur.export.quantize import layers_in_float, precision
from secateur.pipeline.run.journal import Journal, Record

STAGE = "precision latency"
Ratios = Mapping[str, Mapping[str, float]]
"""Precision -> device -> latency of the unpruned network over that in fp32."""


def settled(records: Sequence[Record]) -> Ratios | None:
    """What a journal says; None before it was measured."""
    return next((record["ratios"] for record in records if record.get("stage") == STAGE), None)


def settle(
    journal: Journal, tried: Sequence[str], devices: Sequence[str], measure: Callable[[str], Mapping[str, float]]
) -> Ratios | None:
    """Measure it and write it down, once a run; None where no integers are tried.

    Args:
        devices: their names.
        measure: gives the figures of the unpruned network in a precision; several devices' behind their names.
    """
    names = [name for name in tried if precision(name).calibrated and not layers_in_float(name)]
    known = settled(journal.records)
    if known is not None or not names:
        return known
    ratios: dict[str, dict[str, float]] = {}
    for name in names:
        figures = measure(name)
        ratios[name] = {device: figures.get(f"latency_ratio.{device}", figures["latency_ratio"]) for device in devices}
    journal.append({"stage": STAGE, "kind": "choice", "ratios": ratios})
    return ratios


def told(ratios: Ratios, schemes: Mapping[str, str]) -> Iterator[str]:
    """What a user should know, a sentence for each precision and device that is slower than fp32.

    Args:
        schemes: device -> number types there.
    """
    for name, of_devices in ratios.items():
        for device, ratio in of_devices.items():
            if ratio > 1:
                scheme = schemes[device]
                yield (
                    f"Warning: on {device} {name} makes the unpruned network slower: {ratio:.2f} of its latency in "
                    f"fp32 (number types {scheme}, for {SCHEMES[scheme].why}). It is tried all the same; where size "
                    "does not matter, leave it out of precision"
                )
