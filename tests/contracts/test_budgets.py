"""Whatever a budget allows, every method ends at its target, and a replay ends there too."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.pruning.plan import PruningPlan
from secateur.pruning.search import METHODS
from secateur.pruning.search.landing import settle
from secateur.pruning.search.protocol import Budget, BudgetSpent, Candidate, Evaluate, FineTune, Goal, Strategy
from secateur.pruning.search.support import Limit, macs_ratios
from secateur.pruning.search.testing import FakeStudy, at_the_target, study
from tests.pruning.search.bounded import IMAGES, TRAINING_IMAGES, Accounted, Pages, begun, bounded, ended, work

TARGET = 0.6
FINE, COARSE = ((8, 12, 16), 1), ((32, 16, 24), 8)
"""Channels of each group, and the multiple that widths keep."""
NEAR = 0.85
"""Of a latency target, where the device is no sum over the groups, which is how latency is predicted."""


def limits(fake: FakeStudy, evaluations: int | None, seconds: float | None, epochs: float | None, scored: int | None):
    """A budget; ``scored`` evaluations of the unpruned network are its work."""
    return Budget(evaluations, seconds, epochs, None if scored is None else work(fake, scored))


any_budget = {
    "evaluations": st.none() | st.integers(2, 40),
    "seconds": st.none() | st.floats(5, 60),
    "epochs": st.none() | st.floats(0, 5),
    "scored": st.none() | st.integers(20, 400),
    "seed": st.integers(0, 99),
}
UNBOUND = {"evaluations": None, "seconds": None, "epochs": None, "scored": None, "seed": 0}


def check_spent(spent: dict[str, float], budget: Budget, fake: FakeStudy, plan: PruningPlan) -> None:
    """A budget is kept, but for the last request and what a plan at the target needs."""
    whole, epoch = fake.macs(fake.space.full), 3 * TRAINING_IMAGES * fake.macs(plan)
    assert budget.evaluations is None or spent["evaluations"] <= budget.evaluations
    assert budget.epochs is None or spent["epochs"] <= 1.1 * budget.epochs
    assert budget.work is None or spent["image_macs"] <= 1.1 * budget.work + max(epoch, 2 * IMAGES * whole)
    assert budget.seconds is None or spent["seconds"] <= 1.1 * budget.seconds + 60


@pytest.mark.parametrize("method", METHODS.names())
@settings(max_examples=5)
@example(**UNBOUND | {"evaluations": 2}, ratio=TARGET, space=FINE)
@example(**UNBOUND | {"evaluations": 20, "epochs": 0}, ratio=TARGET, space=FINE)
@example(**UNBOUND | {"seconds": 9}, ratio=TARGET, space=FINE)
@given(**any_budget, ratio=st.floats(0.3, 0.95), space=st.sampled_from([FINE, COARSE]))
def test_it_ends_at_a_macs_target_within_its_budget_and_so_does_its_replay(
    method: str,
    evaluations: int | None,
    seconds: float | None,
    epochs: float | None,
    scored: int | None,
    seed: int,
    ratio: float,
    space: tuple[tuple[int, ...], int],
) -> None:
    def run(pages: Pages):
        fake = study(*space)
        budget = limits(fake, evaluations, seconds, epochs, scored)
        options, goal = METHODS.load(method).Options(), Goal(macs_ratio=ratio)
        return fake, budget, *bounded(method, options, fake, goal, budget, pages, seed)

    pages = begun(study(*space))
    fake, budget, archive, driver = run(pages)
    first = archive[0].candidate
    assert at_the_target(fake, first.plan, ratio)
    assert 0 <= first.projected_share <= 1
    check_spent(driver.spent, budget, fake, first.plan)
    again = Pages(pages.records)
    _, _, replayed, replay = run(again)
    assert replayed == archive
    assert replay.spent == driver.spent and len(again.records) == len(pages.records)
    assert isinstance(replay.oracle, Accounted) and replay.oracle.clock == 0


class Summed(FakeStudy):
    """On this device the latency is a sum over the groups, as it is predicted."""

    def latency(self, plan: PruningPlan) -> float:
        ratios = [width / plan.sizes[name] for name, width in plan.widths.items()]
        return 0.1 + 0.9 * sum(ratios) / len(ratios)


@pytest.mark.parametrize("method", METHODS.names())
@settings(max_examples=5)
@example(**UNBOUND, ratio=0.71, multiple=1, summed=True)
@example(**UNBOUND | {"evaluations": 12}, ratio=0.71, multiple=1, summed=False)
@given(**any_budget, ratio=st.floats(0.5, 0.95), multiple=st.sampled_from([1, 4]), summed=st.booleans())
def test_it_ends_within_a_width_step_of_a_latency_target(
    method: str,
    evaluations: int | None,
    seconds: float | None,
    epochs: float | None,
    scored: int | None,
    seed: int,
    ratio: float,
    multiple: int,
    summed: bool,
) -> None:
    fake = study((20, 28, 24), multiple)
    fake = Summed(fake.space) if summed else fake
    budget = limits(fake, evaluations, seconds, epochs, scored)
    options, goal = METHODS.load(method).Options(), Goal(latency_ratio=ratio)
    archive, driver = bounded(method, options, fake, goal, budget, seed=seed)
    plan = archive[0].candidate.plan
    assert fake.latency(plan) <= ratio + 1e-9
    assert slowest_step(fake, plan) > (ratio if summed else NEAR * ratio)
    check_spent(driver.spent, budget, fake, plan)


def slowest_step(fake: FakeStudy, plan: PruningPlan) -> float:
    """Latency ratio after the step of one group to its next wider width that costs most; 1 where all are whole."""
    space = fake.space
    wider = [{**plan.widths, name: space.above(name, plan.widths[name])} for name in space.names]
    steps = [space.full.replace({n: range(w) for n, w in ws.items()}) for ws in wider if ws != plan.widths]
    return max(map(fake.latency, steps), default=1.0)


def test_a_refused_training_costs_no_evaluations_and_the_last_one_is_for_a_plan_at_the_target() -> None:
    def asks() -> Strategy:
        first = fake.space.names[0]
        wide, ids = fake.space.full.replace({first: range(7)}), count()
        heard.append(type((yield Evaluate((Candidate(next(ids), wide, "x"),)))).__name__)
        for request in (
            FineTune(Candidate(next(ids), wide, "x"), 1.0),
            *(Evaluate((Candidate(next(ids), wide, "x"),)) for _ in range(3)),
            Evaluate((Candidate(next(ids), settled, "last"),)),
        ):
            try:
                heard.append(type((yield request)).__name__)
            except BudgetSpent:
                heard.append("refused")
        return ()

    fake, heard = study((8, 12, 16)), list[str]()
    budget = Budget(evaluations=4, epochs=0)
    problem = fake.problem(Goal(macs_ratio=TARGET), budget=budget)
    limit = Limit("macs_ratio", macs_ratios(problem), TARGET)
    settled = settle(problem, limit, fake.space.full, fake.value).plan
    driver = ended(asks(), fake, problem, Pages())[1]
    assert heard == ["tuple", "refused", "tuple", "tuple", "refused", "tuple"]
    assert driver.spent["evaluations"] == 4
