"""Latencies on several devices: each candidate is measured on all of them at once, and one latency stands for them.

What counts is the worst ratio or the mean (``device.combine``); every device's own figures are kept beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from secateur.device_profiles import Ratio
from secateur.pipeline.devices.fleet import Combine, Fleet, Tally
from secateur.pipeline.evaluation.latency import LATENCIES, Figures, Latencies, Watch, unwatched
from secateur.pruning.plan import PruningPlan

RATIO = ("latency_ratio", "latency_ratio_low", "latency_ratio_high")


class FleetLatencies:
    """Latencies of one network's plans on several devices: each has its own measurements and its own model.

    Args:
        members: device name -> its latencies, the run's own device first.
    """

    def __init__(self, fleet: Fleet, members: Mapping[str, Latencies]) -> None:
        self.fleet, self.members = fleet, members

    @property
    def devices(self) -> tuple[str, ...]:
        """Their names, the run's own first."""
        return tuple(self.members)

    @property
    def num_measurements(self) -> int:
        """How often a device has measured, over all of them."""
        return sum(member.num_measurements for member in self.members.values())

    def of(self, plan: PruningPlan, *, exact: bool) -> Figures:
        """Figures of a plan, combined and per device (``NAME`` behind a dot); see ``Latencies.of``.

        It is measured at once on all devices that cannot predict it.
        """
        known = {name: member.known(plan, exact=exact) for name, member in self.members.items()}
        missing = [name for name, figures in known.items() if figures is None]
        measured = self.fleet.each(lambda device: self.members[device.name].measure(plan), missing) if missing else {}
        found = {name: measured[name] if figures is None else figures for name, figures in known.items()}
        return combined(found, self.fleet.combine)

    def take(self, plan: PruningPlan, figures: Figures) -> None:
        """Take a plan's figures from an earlier evaluation."""
        for name, member in self.members.items():
            member.take(plan, {key: figures[f"{key}.{name}"] for key in LATENCIES if f"{key}.{name}" in figures})

    def model(self, watch: Watch = unwatched) -> None:
        """Let every device's model measure what it needs; no model of one device says what all of them take."""
        tally = Tally(lambda done, total, note="": watch(done, total), self.members)
        self.fleet.each(lambda device: self.members[device.name].model(tally.of(device.name)))

    def report(self) -> dict[str, Any]:
        """As ``Latencies.report``, summed, and per device under ``devices``."""
        each = {name: member.report() for name, member in self.members.items()}
        counts = {key: sum(found[key] for found in each.values()) for key in ("measured", "predicted")}
        return {**counts, "trusted": all(found["trusted"] for found in each.values()), "devices": each}


def combined(found: Mapping[str, Figures], combine: Combine) -> dict[str, float]:
    """One device's figures of several, with all of theirs beside them.

    Args:
        found: device name -> its figures; the first is the run's own device, whose milliseconds stand for themselves:
            those of different devices have no common meaning.
    """
    first = next(iter(found.values()))
    ratios = [_ratio(figures) for figures in found.values()]
    ratio = worst_of(ratios) if combine == "worst" else mean_of(ratios)
    own = {f"{key}.{name}": figures[key] for name, figures in found.items() for key in LATENCIES if key in figures}
    size = {k: v for figures in found.values() for k, v in figures.items() if k == "size_bytes"}
    return {
        **dict(zip(RATIO, ratio.ends.values(), strict=False)),
        **{key: first[key] for key in ("p50_ms", "p95_ms")},
        **size,  # the same file everywhere
        "latency_measured": min(figures["latency_measured"] for figures in found.values()),
        **{key: value for key, value in own.items() if not key.startswith("size_bytes.")},
    }


def _ratio(figures: Figures) -> Ratio:
    """A device's ratio; unknown how sure where one process told it."""
    ends = [figures[key] for key in RATIO if key in figures]
    return Ratio(*ends) if len(ends) == len(RATIO) else Ratio.unknown(ends[0])


def worst_of(ratios: Sequence[Ratio]) -> Ratio:
    """The largest ratio. Its interval reaches from the highest lower to the highest upper end of all: a device whose
    ratio is smaller but less certain may be the worst one. The upper end holds with 97.5 % however many devices there
    are; the lower one errs at most n times as often as that of one device.
    """
    if not all(ratio.known for ratio in ratios):
        return Ratio.unknown(max(ratio.value for ratio in ratios))
    return Ratio(*(max(getattr(ratio, end) for ratio in ratios) for end in ("value", "low", "high")))


def mean_of(ratios: Sequence[Ratio]) -> Ratio:
    """The arithmetic mean. Devices err independently, so the distances to each side add up as squares."""
    values, lows, highs = (np.array([getattr(r, end) for r in ratios]) for end in ("value", "low", "high"))
    mean, count = float(values.mean()), len(ratios)
    if not all(ratio.known for ratio in ratios):
        return Ratio.unknown(mean)
    below, above = (float(np.linalg.norm(gap)) / count for gap in (values - lows, highs - values))
    return Ratio(mean, mean - below, mean + above)
