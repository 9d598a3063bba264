"""Which widths pay in one network on one device: found by timing the network itself, cut alike in several ways.

Layers are not alone. A layout that suits one costs a reorder at the next, so that chains of equal layers
(``secateur.device_profiles.staircase``) can praise widths that are slow in a network. Here whole networks of equal
MACs are compared that differ in one number, what all their widths are multiples of; then the finest number is kept for
each kind of channel group that costs nothing beyond noise.

This module is the arithmetic and what is kept; who cuts and times the networks is
``secateur.pipeline.run.network_probe``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.intervals import of_processes

FORMAT = 1
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
MACS_RATIOS = (0.7, 0.5, 0.35)
"""How much the compared networks keep of the MACs."""
LEAST, MOST = 0.005, 0.01
"""A finer multiple costs nothing if its loss is within the interval of the comparison, or within the first of these
fractions, and not above the second."""
STEEPEST, FLATTEST = 1.2, 0.3
"""Bounds of how strongly latency follows MACs where widths change little."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cut:
    """One network that was timed.

    Args:
        macs_ratio: to the unpruned network.
        latency_ratios: to the unpruned network, one per process, shape ``(processes,)``.
    """

    macs_ratio: float
    latency_ratios: tuple[float, ...]

    @property
    def latency_ratio(self) -> float:
        """The geometric mean over processes."""
        return float(np.exp(np.mean(np.log(self.latency_ratios))))


@dataclass(frozen=True)
class Loss:
    """How much slower networks are than others of equal MACs.

    Args:
        value: fraction; below 0 = faster.
        half_width: of its 95 % interval; None = too few processes for one.
    """

    value: float
    half_width: float | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether it is no more than noise."""
        noise = math.inf if self.half_width is None else self.half_width
        return self.value <= min(MOST, max(LEAST, noise))

    def __str__(self) -> str:
        return f"{self.value:+.1%}" + ("" if self.half_width is None else f" +-{self.half_width:.1%}")


@dataclass(frozen=True)
class Trial:
    """One kind of channel group with finer widths, all others as they were.

    Args:
        kind: of the groups.
        multiple: theirs in this trial.
        loss: against the best multiple for all groups.
    """

    kind: str
    multiple: int
    loss: Loss


@dataclass(frozen=True)
class NetworkProbe:
    """What widths pay in a network on a device.

    Args:
        profile: the profile's name.
        fingerprint: of device, runtime and settings (``staircase.fingerprint_of``).
        network: digest of the network's operators, shapes and groups, without its weights.
        multiple: the best one if all groups have the same.
        multiples: kind of channel group -> what its widths are multiples of.
        kinds: channel group -> its kind.
        cuts: multiple -> networks in which all groups have it.
        losses: the same -> how much slower those are than the best.
        trials: what was tried to allow finer widths.
        seconds: that it took.
        created: seconds since 1970.
        precision: that the networks were timed in; the unpruned one beside them is in fp32.
    """

    profile: str
    fingerprint: str
    network: str
    multiple: int
    multiples: Mapping[str, int]
    kinds: Mapping[str, str]
    cuts: Mapping[int, tuple[Cut, ...]]
    losses: Mapping[int, Loss]
    trials: tuple[Trial, ...]
    seconds: float
    created: float
    precision: str = "fp32"

    @property
    def key(self) -> str:
        """Names it among the kept ones."""
        return key_of(self.fingerprint, self.network)

    @property
    def of_groups(self) -> dict[str, int]:
        """Channel group -> what its widths are multiples of."""
        return {group: self.multiples[kind] for group, kind in self.kinds.items()}

    @property
    def text(self) -> str:
        """The result in a line."""
        return ", ".join(f"{kind}: {multiple}" for kind, multiple in self.multiples.items())

    def summary(self) -> list[tuple[str, str]]:
        """Rows (what, what was found) for people."""
        rows = [(f"all widths multiples of {m}", f"{self._latencies(m)}; {loss}") for m, loss in self.losses.items()]
        rows += [(f"{t.kind} of {t.multiple}, others as chosen before", str(t.loss)) for t in self.trials]
        return rows

    def _latencies(self, multiple: int) -> str:
        return ", ".join(f"{cut.latency_ratio:.3f} at {cut.macs_ratio:.2f} of the MACs" for cut in self.cuts[multiple])

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            DeviceError: the text is something else.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("unknown format")
            cuts = {int(m): tuple(_cut(cut) for cut in found) for m, found in data.pop("cuts").items()}
            losses = {int(m): Loss(**loss) for m, loss in data.pop("losses").items()}
            trials = tuple(Trial(t["kind"], int(t["multiple"]), Loss(**t["loss"])) for t in data.pop("trials"))
            made = cls(**data, cuts=cuts, losses=losses, trials=trials)
            if any(not isinstance(multiple, int) or multiple < 1 for multiple in made.of_groups.values()):
                raise ValueError("a multiple below 1")
            return made
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DeviceError(f"not a probe written by NetworkProbe.to_json: {error!r}", "profile") from error


def _cut(data: Mapping[str, Any]) -> Cut:
    return Cut(float(data["macs_ratio"]), tuple(map(float, data["latency_ratios"])))


def key_of(fingerprint: str, network: str) -> str:
    """16 hexadecimal digits that name device, runtime, settings, precision and network.

    Args:
        fingerprint: ``staircase.fingerprint_of``.
        network: digest of the network.
    """
    return hashlib.sha256(f"{FORMAT} {fingerprint} {network}".encode()).hexdigest()[:16]


def slope_of(cuts: Mapping[int, Sequence[Cut]]) -> float:
    """How latency follows MACs within one multiple: the exponent, by least squares over all multiples."""
    rows = [np.log([[cut.macs_ratio, cut.latency_ratio] for cut in found]) for found in cuts.values() if len(found) > 1]
    if not rows:
        return 1.0
    macs, latency = np.concatenate([row - row.mean(axis=0) for row in rows]).T
    moved = float(macs @ macs)
    return float(np.clip(macs @ latency / moved, FLATTEST, STEEPEST)) if moved > 0 else 1.0


def costs_of(cuts: Sequence[Cut], slope: float) -> FloatArray:
    """Logarithm of the latency of such networks at the MACs of the unpruned one, shape ``(processes,)``."""
    logs = np.log([cut.latency_ratios for cut in cuts]) - slope * np.log([[cut.macs_ratio] for cut in cuts])
    mean: FloatArray = logs.mean(axis=0)
    return mean


def loss_of(cuts: Sequence[Cut], best: Sequence[Cut], slope: float) -> Loss:
    """How much slower networks are than the best ones, at equal MACs.

    Args:
        cuts: timed in as many processes as ``best``.
        slope: ``slope_of``.
    """
    ratio = of_processes(np.exp(costs_of(cuts, slope) - costs_of(best, slope)).tolist())
    return Loss(ratio.value - 1, ratio.half_width if ratio.known else None)


def best_of(cuts: Mapping[int, Sequence[Cut]]) -> tuple[int, dict[int, Loss]]:
    """The multiple that all widths should have, and the loss of each against the fastest.

    It is the finest that costs nothing: whatever finer widths allow comes free then.
    """
    slope = slope_of(cuts)
    fastest = min(cuts, key=lambda multiple: float(costs_of(cuts[multiple], slope).mean()))
    losses = {multiple: loss_of(found, cuts[fastest], slope) for multiple, found in cuts.items()}
    return finest({multiple: loss for multiple, loss in losses.items() if multiple <= fastest}), losses


def finest(losses: Mapping[int, Loss]) -> int:
    """The smallest multiple that costs nothing, nor any between it and the largest, which they are held against.

    Widths of a multiple are among those of a smaller one: where some cost, those of the smaller one do too, and what
    was timed without a loss was lucky.
    """
    free = takewhile(lambda multiple: losses[multiple].is_nothing, sorted(losses, reverse=True))
    return min(free, default=max(losses))
