"""The shipped boards: complete, cautious, and nothing in them that nobody has looked up without saying so."""

from __future__ import annotations

import pytest

from secateur.device_profiles import known_profiles, load_profile
from secateur.device_profiles.target import is_template

BOARDS = sorted(set(known_profiles()) - {"local"})
GENERIC = {"generic-arm64", "generic-x86-64"}


def test_the_boards_that_are_promised_are_there():
    promised = {"raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano", "rk3588", "imx8m-plus", "stm32mp2"}
    assert promised | GENERIC <= set(BOARDS)


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_a_template_with_an_architecture_and_no_claims(name: str):
    board = load_profile(name)
    assert is_template(board)
    assert board.timing
    assert board.description
    assert board.facts["arch"] in ("aarch64", "x86_64", "armv7l")
    assert board.budgets == load_profile("local").budgets  # none
    assert (board.threads, board.channel_multiple) == (1, 8)  # the robust statistic; the cautious step
    assert board.final.processes >= 5
    assert board.search.max_seconds <= board.final.max_seconds


@pytest.mark.parametrize("name", sorted(set(BOARDS) - GENERIC))
def test_facts_have_a_source_or_are_called_unverified(name: str):
    board = load_profile(name)
    assert board.sources
    assert set(board.facts.get("unverified", [])) <= set(board.facts)
    assert all({"core", "count", "max_mhz"} <= set(core) for core in board.facts["cpu"])
    assert "channel_multiple" not in board.facts


@pytest.mark.parametrize("name", BOARDS)
def test_an_unknown_step_is_said_to_be_unknown(name: str):
    text = known_profiles()[name].read_text(encoding="utf-8")
    assert "secateur devices probe" in " ".join(text.replace("#", " ").split())
    if name != "generic-x86-64":
        assert "AVX" not in text


def test_slower_boards_repeat_less():
    fast, slow = load_profile("raspberry-pi-5").final, load_profile("stm32mp1").final
    assert slow.min_repeats < fast.min_repeats
    assert slow.max_seconds > fast.max_seconds
