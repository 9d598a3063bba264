"""Figures as people read them: units, digits that mean something, intervals, words for what is unknown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

UNKNOWN = "unknown"
METRICS = {
    "map50": "mAP50",
    "map": "COCO mAP",
    "top1": "top-1",
    "top5": "top-5",
    "balanced_accuracy": "balanced accuracy",
}
"""Names of metrics as people know them, where these differ."""
FLAGS: Mapping[str, str] = {
    "contended": "other programs used the processor: ratios hold, milliseconds are too long",
    "drift": "times drifted while they were taken",
    "throttled": "the device slowed itself down",
    "clock-jump": "the device's clock was set meanwhile, which changes no latency",
    "unstable": "processes count although they were disturbed",
}
"""What disturbed a timing, in words."""
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def metric(name: str) -> str:
    """A metric as people call it."""
    return METRICS.get(name, name.replace("_", " "))


def known(value: float | None) -> bool:
    """Whether it is a finite number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, no exponent between a thousandth and a million, no minus before zero."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def fixed(value: float, decimals: int) -> str:
    """So many decimals, without a minus before zero."""
    text = f"{value:,.{decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text


def ms(value: float | None) -> str:
    """Milliseconds, in microseconds below one hundredth, in seconds from a thousand."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value >= 1000:
        return f"{number(value / 1000)} s"
    return f"{number(value * 1000)} µs" if value < 0.01 else f"{number(value)} ms"


def seconds(value: float | None) -> str:
    """Seconds, in minutes or hours where these read better."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value >= 5400:
        return f"{value / 3600:.1f} h"
    return f"{value / 60:.1f} min" if value >= 120 else f"{number(value)} s"


def size(value: float | None) -> str:
    """Bytes, in the unit that leaves one to three digits before the point."""
    return _scaled(value, BYTES, " B", " ")


def count(value: float | None) -> str:
    """A count such as MACs or parameters: 10.1 M."""
    return _scaled(value, COUNTS, "", " ")


def _scaled(value: float | None, units: tuple[tuple[float, str], ...], plain: str, space: str) -> str:
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for scale, unit in units:
        if abs(value) >= scale:
            return f"{number(value / scale)}{space}{unit}"
    return f"{value:,.0f}{plain}"


def percent(value: float | None, decimals: int = 2) -> str:
    """A fraction as per cent."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{fixed(100 * value, decimals)} %"


def change(before: float | None, after: float | None) -> str:
    """A relative change: -23.8 %."""
    if before is None or after is None or not before or not math.isfinite(after / before):
        return UNKNOWN
    return signed(100 * (after / before - 1), 1) + " %"


def signed(value: float, decimals: int) -> str:
    """A number with its sign; zero has none."""
    text = fixed(value, decimals)
    return f"+{text}" if value > 0 and text.strip("0.,") else text


def points(value: float | None, decimals: int = 2) -> str:
    """A difference of fractions in percentage points: -0.84 pp."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{signed(100 * value, decimals)} pp"


def times(value: float | None) -> str:
    """How many times: 1.26x."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.2f}x"


def between(
    low: float | None, high: float | None, shown: Callable[[float, int], str] = fixed, scale: float = 1.0
) -> str:
    """The ends of a 95 % interval, with as many decimals as it takes to tell them apart; empty where there is none.

    Args:
        shown: how an end with so many decimals is written.
        scale: that both are multiplied by.
    """
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    gap = scale * (high - low)
    decimals = 2 if gap <= 0 else min(6, max(0, 1 - math.floor(math.log10(gap))))
    joint = " to " if shown is signed else "-"
    return f"95 % {shown(scale * low, decimals)}{joint}{shown(scale * high, decimals)}"


def plural(number: int, one: str, many: str = "") -> str:
    """``1 plan``, ``2 plans``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listing(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
