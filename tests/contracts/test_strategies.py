"""What every search method promises. A new module in ``pruning/search/methods`` joins this suite by existing."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import pytest

from secateur.pipeline.run.opening import least_budget
from secateur.pruning.search import METHODS
from secateur.pruning.search.testing import CHECKS, GOAL, SPACES, check_method, of_space
from tests.seams.things import METHOD


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", METHODS.names())
def test_a_method_keeps_its_promises(method: str, check: Any) -> None:
    check(METHODS.load(method))


@pytest.mark.parametrize("method", METHODS.names())
def test_the_least_budget_that_lists_show_is_that_of_the_defaults(method: str) -> None:
    """``Least budget: 2 evaluations and 1 a group, 1 epoch.``: read without importing, for a network of any size."""
    stated = METHODS.stated("Least budget")[method]
    shape = r"(\d+) evaluations?(?: and (\d+) a group)?(?:, ([\d.]+) epochs?)?"
    fixed, each, epochs = re.fullmatch(shape, stated).groups(default="0")
    for name in SPACES:
        problem = of_space(name).problem(GOAL)
        least = least_budget(method, problem, METHODS.load(method).Options())
        assert least.evaluations == int(fixed) + int(each) * len(problem.space.names)
        assert (least.epochs or 0.0) == pytest.approx(float(epochs))
        assert least.seconds is None and least.work is None


def made(text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A method of somebody else's."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(text, module.__dict__)
    return module


def test_a_method_from_elsewhere_is_checked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    check_method(made(METHOD, monkeypatch))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("Mine: every group", "mine, every group"),
        ("        shares: of the channels", "        portions: of the channels"),
        ('"extra": "forbid"', '"extra": "ignore"'),
        ("Candidate(i, ", "Candidate(i + 1, "),
        ('"mine")', '"")'),
        ("return best_first", "return () and best_first"),
        ("for share in options.shares", "for share in (1.0, 0.9)"),
        ("for share in options.shares", "for share in (0.01, 0.02)"),
        ("for share in options.shares", "for share in __import__('random').sample((0.5, 0.6, 0.7), 2)"),
    ],
)
def test_a_method_that_breaks_a_promise_is_told(good: str, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert good in METHOD
    with pytest.raises(AssertionError):
        check_method(made(METHOD.replace(good, bad), monkeypatch))
