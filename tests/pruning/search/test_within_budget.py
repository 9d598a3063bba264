"""Whatever the budget, a search ends at its target, by its own method, and a replay asks the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Archive, Budget, Entry, Goal
from secateur.pruning.search.testing import FakeStudy, study
from tests.pruning.search.bounded import KilledError, Pages, bounded, work

ITERATIVE = {"ccep": 1, "icp": 1, "aofp": 20, "acp": 1, "filter_ensemble": 20, "evofc": 4}
"""Method -> evaluations that the least round takes as much work as, over eight."""
NOT_ITS_OWN = ("uniform", "projected")
"""Origins of ccep's warm start, and of a projection from outside."""
ALONE = 0.98
"""Of the target: what a method reaches itself at the least, with weights that may lack the channels of nearer plans."""


def options_of(name: str) -> object:
    return METHODS.load(name).Options()


def own(archive: Archive) -> list[Entry]:
    """What the method itself put together."""
    return [entry for entry in archive if entry.candidate.origin not in NOT_ITS_OWN]


def kept(fake: FakeStudy, archive: Archive) -> list[float]:
    return [entry.evaluation["macs"] / fake.macs(fake.space.full) for entry in own(archive)]


@pytest.mark.parametrize("name", ITERATIVE)
@settings(max_examples=5, deadline=None)
@given(
    evaluations=st.none() | st.integers(8, 400),
    work_for=st.none() | st.integers(8, 400),
    epochs=st.none() | st.floats(0, 20),
    ratio=st.floats(0.2, 0.9),
    seed=st.integers(0, 99),
)
def test_it_ends_at_the_target_within_any_budget_that_holds_a_round(
    name: str, evaluations: int | None, work_for: int | None, epochs: float | None, ratio: float, seed: int
) -> None:
    fake = study((64, 128, 96))
    budget = Budget(evaluations, None, epochs, None if work_for is None else work(fake, ITERATIVE[name] * work_for))
    archive, ran = bounded(name, options_of(name), fake, Goal(macs_ratio=ratio), budget, seed=seed)
    assert 0.99 * ratio <= archive[0].evaluation["macs"] / fake.macs(fake.space.full) <= ratio
    assert any(ALONE * ratio <= found <= ratio for found in kept(fake, archive))
    if evaluations is not None:
        assert ran.spent["evaluations"] <= evaluations
    if work_for is not None:
        assert ran.spent["image_macs"] <= 1.1 * work(fake, ITERATIVE[name] * work_for) + work(fake, 40)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("budget", [60, 300])
def test_a_killed_search_asks_the_same_again_and_ends_the_same(name: str, budget: int) -> None:
    goal, options = Goal(macs_ratio=0.5), options_of(name)

    def ran(pages: Pages):
        fake = study((16, 24, 32))
        return bounded(name, options, fake, goal, Budget(work=work(fake, ITERATIVE[name] * budget)), pages)[0]

    whole = Pages()
    expected = ran(whole)
    for lives in (1, len(whole.records) // 2, len(whole.records) - 1):
        pages = Pages(dies_after=lives)
        with pytest.raises(KilledError):
            ran(pages)
        again = Pages(pages.records)
        assert ran(again) == expected
        assert [r["request"] for r in again.records] == [r["request"] for r in whole.records]
