"""How sure a ratio of latencies is.

Calls of one process share what that process was given (pages, caches, a core), so they cannot say how far another
process would be off. What is compared is therefore one estimate per fresh process: their logarithms scatter normally,
and Student's t over them is right from three processes on. Calls within a process need no part of their own: what they
scatter is in the estimates already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_PROCESSES = 3
"""Under three processes an interval is unknown: that of two is 12.7 standard errors wide and tells nothing."""
MIN_PROCESSES_TO_STOP = 7
"""A measurement that ends as soon as its interval is narrow looks at it from here on: every look at fewer finds
intervals that are narrow by chance (coverage 0.90 from three on; `benchmarks/noise.py`, `coverage_within`)."""
MANY_PROCESSES = 1000


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its 95 % interval.

    Args:
        value: the point estimate.
        low: lower end of the interval; 0 where it is unknown.
        high: upper end; infinite where it is unknown.
    """

    value: float
    low: float
    high: float

    @classmethod
    def unknown(cls, value: float) -> Ratio:
        """A point estimate: fewer processes than an interval can be drawn from."""
        return cls(value, 0.0, math.inf)

    @property
    def known(self) -> bool:
        """Whether there is an interval; a point estimate may guide a search, and is no ground for a claim or a gate."""
        return self.low > 0 and math.isfinite(self.high)

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2

    @property
    def inverse(self) -> Ratio:
        """The ratio the other way round: a speed-up of a latency ratio."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low if self.low else math.inf)

    @property
    def ends(self) -> dict[str, float]:
        """``value``, and ``low`` and ``high`` where they are known."""
        return {"value": self.value} | ({"low": self.low, "high": self.high} if self.known else {})

    def __str__(self) -> str:
        if not self.known:
            return f"{self.value:.3f} (point estimate; an interval needs {MIN_PROCESSES} processes)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def of_processes(estimates: Sequence[float], rounding: float = 0.0) -> Ratio:
    """The geometric mean of one estimate per process, with Student's 95 % interval on their logarithms.

    Args:
        estimates: a ratio of each process, all positive.
        rounding: half-width (in logarithms) below which the clock cannot tell, at least this much is the interval's.
    """
    logs = np.log(np.asarray(estimates, dtype=np.float64))
    middle, count = float(logs.mean()), len(logs)
    if count < MIN_PROCESSES:
        return Ratio.unknown(math.exp(middle))
    from scipy.special import stdtrit  # not at the top: what only reads profiles needs no SciPy

    half = max(float(stdtrit(count - 1, 0.975)) * float(logs.std(ddof=1)) / math.sqrt(count), rounding)
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def rounding_of(*samples: npt.NDArray[np.float64]) -> float:
    """How far the ratio of the samples' medians may be off by the step of their clock alone, in logarithms.

    Args:
        samples: latencies of each model, all from the same clock. Its step is the smallest difference that occurs; a
            clock that never differs has steps as large as what it shows.
    """
    values = np.unique(np.concatenate(samples))
    step = float(np.diff(values).min()) if len(values) > 1 else float(values[0])
    return sum(step / 2 / float(np.median(sample)) for sample in samples if np.median(sample) > 0)


def is_look(count: int, first: int) -> bool:
    """Whether a measurement that may end early looks at its result after so many processes.

    It does at the first, then each time their number has doubled: every look is another chance to find by luck what was
    hoped for.
    """
    quotient, rest = divmod(count, first)
    return rest == 0 and quotient & (quotient - 1) == 0 and quotient > 0


def processes_that_tell(ratio: Ratio, bound: float, count: int) -> int:
    """About how many processes would decide whether a ratio is within a bound; at most `MANY_PROCESSES`.

    Args:
        ratio: what ``count`` processes found; its interval contains the bound.
    """
    if not ratio.known:
        return MIN_PROCESSES_TO_STOP
    gap, half = abs(math.log(bound / ratio.value)), math.log(ratio.high / ratio.low) / 2
    if gap * math.sqrt(MANY_PROCESSES) <= half * math.sqrt(count):
        return MANY_PROCESSES
    return max(count + 1, math.ceil(count * (half / gap) ** 2))
