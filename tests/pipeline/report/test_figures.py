"""Figures in the units that people read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from secateur.pipeline.report import figures as say


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (say.size(83_259_392), "83.3 MB"),
        (say.size(512), "512 B"),
        (say.ms(0.1731), "0.173 ms"),
        (say.ms(0.0052), "5.20 µs"),
        (say.ms(2500), "2.50 s"),
        (say.points(-0.0084), "-0.84 pp"),
        (say.points(-1e-9), "0.00 pp"),
        (say.percent(0.9612), "96.12 %"),
        (say.percent(None), "unknown"),
        (say.number(7.59e-05, 2), "7.6e-05"),
        (say.number(math.nan), "unknown"),
        (say.number(-0.0), "0"),
        (say.change(2.0, 1.5), "-25.0 %"),
        (say.plural(1, "plan"), "1 plan"),
        (say.listing(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_a_figure_reads_well(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    ("ends", "more", "text"),
    [
        ((1.2553, 1.2641), {}, "95 % 1.2553-1.2641"),
        ((1.2, 1.4), {}, "95 % 1.20-1.40"),
        ((-0.021, 0.005), {"shown": say.signed, "scale": 100}, "95 % -2.1 to +0.5"),
        ((None, 1.0), {}, ""),
        ((1.0, math.inf), {}, ""),
    ],
)
def test_the_ends_of_an_interval_can_be_told_apart(ends: Any, more: Any, text: str) -> None:
    assert say.between(*ends, **more) == text
