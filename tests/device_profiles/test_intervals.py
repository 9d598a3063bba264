"""Intervals of ratios: what they cover, what they never claim."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.device_profiles.intervals import MANY_PROCESSES, Ratio, of_processes, processes_that_tell, rounding_of

TRIALS = 4000


def estimates(rng: np.random.Generator, processes: int, true: float = 1.0) -> np.ndarray:
    """Ratios of processes that differ by 1 %, each known to 0.1 %."""
    return true * np.exp(rng.normal(0, 0.01, processes) + rng.normal(0, 0.001, processes))


@pytest.mark.parametrize("processes", [3, 4, 7, 20])
def test_an_interval_covers_the_truth_as_often_as_it_says(processes: int):
    rng = np.random.default_rng(processes)
    found = [of_processes(estimates(rng, processes, 0.8)) for _ in range(TRIALS)]
    covered = np.mean([ratio.low <= 0.8 <= ratio.high for ratio in found])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / TRIALS))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0, 0.1))
def test_an_interval_is_ordered_and_no_narrower_than_the_clocks_step(values: list[float], rounding: float):
    ratio = of_processes(values, rounding)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.known == (len(values) >= 3)
    if ratio.known:
        assert math.log(ratio.high / ratio.low) / 2 >= rounding - 1e-9
        other = ratio.inverse.inverse
        assert (other.value, other.low, other.high) == pytest.approx((ratio.value, ratio.low, ratio.high))


def test_equal_estimates_of_a_coarse_clock_claim_nothing():
    a, b = np.array([10.0, 10.0, 20.0]), np.array([10.0, 20.0, 20.0])  # milliseconds, ticks of ten
    assert rounding_of(a, b) == pytest.approx(0.5 + 0.25)
    ratio = of_processes([0.5] * 7, rounding_of(a, b))
    assert ratio.low < 0.5 * math.exp(-0.7)
    assert rounding_of(np.full(9, 10.0)) == 0.5  # it never differs: its step may be as large as what it shows


def test_a_fine_clock_costs_nothing():
    rng = np.random.default_rng(0)
    assert rounding_of(np.round(rng.normal(5, 0.1, 500), 6)) < 1e-5


def test_how_many_processes_would_tell():
    ratio = of_processes([1.01, 1.05, 1.09, 1.03, 1.07])
    needed = processes_that_tell(ratio, 1.06, 5)
    assert 5 < needed < MANY_PROCESSES
    spread, rng = np.log([1.01, 1.05, 1.09, 1.03, 1.07]).std(ddof=1), np.random.default_rng(0)
    more = of_processes(ratio.value * np.exp(rng.normal(0, spread, needed * 2)))
    assert more.high < 1.06  # twice as many do
    assert processes_that_tell(Ratio(1.05, 1.0, 1.1), 1.05, 5) == MANY_PROCESSES
    assert processes_that_tell(Ratio.unknown(1.0), 1.05, 1) == 7
