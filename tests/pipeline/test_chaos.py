"""Five signals at random, by the script behind ``make chaos``: nothing lost, doubled or left, the right exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.chaos import chain


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [11])
def test_a_chain_of_random_kills_and_group_signals(tmp_path: Path, seed: int) -> None:
    tally = chain(5, seed, tmp_path)
    assert not tally.faults
    assert len(tally.steps) == 5
    assert tally.candidates > 10
