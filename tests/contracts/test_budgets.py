"""Whatever a budget allows, every method ends at its target, and a replay ends there too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from secateur.pipeline.run import study as study_module
from secateur.pipeline.run.study import Study
from secateur.pruning.search import METHODS
from secateur.pruning.search.landing import at_target, settle
from secateur.pruning.search.protocol import (
    Archive,
    AuxiliaryTrained,
    AuxiliaryTraining,
    Budget,
    BudgetSpent,
    Candidate,
    Distort,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    Goal,
    MaskedLoss,
    Predict,
    Score,
    Strategy,
    Time,
)
from secateur.pruning.search.support import Limit, macs_ratios
from secateur.pruning.search.testing import FakeStudy, at_the_target, study

TARGET = 0.6
TRAIN, SEARCH = 1000, 100
"""Images of the splits."""
BUDGETS = {
    **{f"{n} evaluations": Budget(evaluations=n) for n in (2, 7, 40)},
    "no training": Budget(evaluations=20, epochs=0),
    "few epochs": Budget(evaluations=30, epochs=0.7),
    "seconds": Budget(seconds=9),
    "work": Budget(work=2e8),
}


class Pages:
    """A journal that is kept in memory."""

    path = "journal"

    def __init__(self, records: Sequence[Mapping[str, Any]] = ()) -> None:
        self.records = list(records)

    def append(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        self.records.append(record)
        return record


class Priced:
    """A study made of arithmetic behind an oracle's port: a second per evaluation, twenty per epoch; images counted."""

    def __init__(self, fake: FakeStudy) -> None:
        self.fake, self.clock, self.image_macs = fake, 0.0, 0.0

    @property
    def spent(self) -> Mapping[str, float]:
        return {"image_macs": self.image_macs}

    def ahead(self, *arguments: Any) -> None: ...

    def remember(self, *arguments: Any, **more: Any) -> None: ...

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        self._train(request)
        return True

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        plan = request.candidate.plan if isinstance(request, FineTune) else self.fake.space.full
        return 3 * TRAIN * self.fake.macs(plan)

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation:
        self.clock, self.image_macs = self.clock + 1, self.image_macs + SEARCH * self.fake.macs(candidate.plan)
        return cast(tuple[Evaluation, ...], self.fake(Evaluate((candidate,), latency, floor)))[0]

    def _train(self, request: FineTune | AuxiliaryTraining) -> Any:
        return self.fake(request)

    def _priced(self, request: FineTune | AuxiliaryTraining) -> Any:
        self.clock += 20 * request.epochs
        self.image_macs += request.epochs * self.epoch_work(request)
        return self._train(request)

    def finetune(self, request: FineTune) -> tuple[FineTuned, Mapping[str, str]]:
        return self._priced(request), {"sha256": "x"}

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, Mapping[str, str]]:
        return self._priced(request), {"sha256": "x"}

    def _looked(self, request: Score | MaskedLoss | Distort | Time | Predict, images: float) -> Any:
        self.clock, self.image_macs = self.clock + 0.1, self.image_macs + images * self.fake.macs(self.fake.space.full)
        return self.fake(request)

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        return self._looked(request, 10)

    def masked_loss(self, request: MaskedLoss) -> np.ndarray:
        return self._looked(request, 10 * len(request.plans))

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        return self._looked(request, 10 * len(request.removed))

    def time(self, request: Time) -> np.ndarray:
        return self._looked(request, 0)

    def predict(self, request: Predict) -> Mapping[str, np.ndarray]:
        return self._looked(request, 0)


def searched(
    method: str, budget: Budget, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> tuple[FakeStudy, Archive, Study, Priced]:
    """A search within a budget, continued from the records there are."""
    fake, module = study((8, 12, 16)), METHODS.load(method)
    priced = Priced(fake)
    monkeypatch.setattr(study_module, "time", SimpleNamespace(perf_counter=lambda: priced.clock))
    problem = fake.problem(Goal(macs_ratio=TARGET), budget=budget)
    driver = Study(cast(Any, pages), cast(Any, priced), budget=budget, closes=True)
    return fake, driver.run(at_target(problem, module.search(problem, module.Options()))), driver, priced


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", METHODS.names())
def test_it_ends_at_the_target_within_its_budget_and_so_does_its_replay(
    method: str, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    macs = study((8, 12, 16)).problem().reference["macs"]
    scored = {"stage": "reference", "kind": "evaluation", "spent": {"seconds": 1.0, "image_macs": SEARCH * macs}}
    limits, pages = BUDGETS[budget], Pages([scored])
    fake, archive, driver, _ = searched(method, limits, pages, monkeypatch)
    first = archive[0].candidate
    assert at_the_target(fake, first.plan, TARGET)
    assert 0 <= first.projected_share <= 1
    assert driver.spent["evaluations"] <= (limits.evaluations or np.inf)
    assert driver.spent["epochs"] <= 1.1 * (np.inf if limits.epochs is None else limits.epochs)
    asked = len(pages.records)
    _, again, replayed, priced = searched(method, limits, Pages(pages.records), monkeypatch)
    assert [entry.candidate for entry in again] == [entry.candidate for entry in archive]
    assert replayed.spent == driver.spent and priced.clock == 0 and len(pages.records) == asked
    last = max(priced.epoch_work(FineTune(first, 0.0)), 2 * SEARCH * fake.macs(fake.space.full))
    if limits.work is not None:  # the last request, and what a plan at the target needs, may overrun it
        assert driver.spent["image_macs"] <= 1.1 * limits.work + last
    if limits.seconds is not None:
        assert driver.spent["seconds"] <= 1.1 * limits.seconds + 60


def test_a_refused_training_costs_no_evaluations_and_the_last_one_is_for_a_plan_at_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    priced, budget = Priced(fake), Budget(evaluations=4, epochs=0)
    monkeypatch.setattr(study_module, "time", SimpleNamespace(perf_counter=lambda: priced.clock))
    problem = fake.problem(Goal(macs_ratio=TARGET), budget=budget)
    limit = Limit("macs_ratio", macs_ratios(problem), TARGET)
    settled = settle(problem, limit, fake.space.full, fake.value).plan
    driver = Study(cast(Any, Pages()), cast(Any, priced), budget=budget, closes=True)
    driver.run(at_target(problem, asks()))
    assert heard == ["tuple", "refused", "tuple", "tuple", "refused", "tuple"]
    assert driver.spent["evaluations"] == 4
