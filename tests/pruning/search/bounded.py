"""A method run as a pipeline runs it: with a budget, a journal and a target, against the study made of arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.study import Oracle, Study
from secateur.pruning.search import METHODS
from secateur.pruning.search.landing import at_target
from secateur.pruning.search.protocol import (
    Answer,
    Archive,
    AuxiliaryTrained,
    AuxiliaryTraining,
    Budget,
    Candidate,
    Distort,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    Goal,
    MaskedLoss,
    Predict,
    Problem,
    Request,
    Score,
    Strategy,
    Time,
)
from secateur.pruning.search.testing import FakeStudy

IMAGES, TRAINING_IMAGES = 10, 100


class Pages:
    """A journal in memory; ``dies_after`` new records it ends the process."""

    path = "memory"

    def __init__(self, records: Sequence[Any] = (), dies_after: float = float("inf")) -> None:
        self.records, self.lives = [*records], dies_after

    def append(self, record: Any) -> Any:
        if self.lives <= 0:
            raise KilledError
        self.lives -= 1
        self.records.append(record)
        return record


def begun(fake: FakeStudy) -> Pages:
    """The journal of a run that has evaluated the unpruned network, as every run does first."""
    spent = {"seconds": 1.0, "image_macs": IMAGES * fake.macs(fake.space.full)}
    return Pages([{"stage": "reference", "kind": "evaluation", "spent": spent}])


class KilledError(Exception):
    """The process ends here."""


class Accounted:
    """The oracle of a study that a fake answers: image-MACs are counted, and a clock of its own goes on.

    An evaluation takes a second, an epoch of training 20, whatever else is asked a tenth.
    """

    def __init__(self, fake: FakeStudy) -> None:
        self.fake, self.image_macs, self.clock = fake, 0.0, 0.0

    @property
    def spent(self) -> Mapping[str, float]:
        return {"image_macs": self.image_macs, "measurements": 0}

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation:
        self.clock += 1
        self.image_macs += IMAGES * self.fake.macs(candidate.plan)
        (evaluation,) = self.fake(Evaluate((candidate,), latency, floor))  # type: ignore[misc]
        return evaluation

    def ahead(self, *_: Any) -> None: ...

    def remember(self, *_: Any, **__: Any) -> None: ...

    def finetune(self, request: FineTune) -> tuple[FineTuned, Mapping[str, str]]:
        return cast(FineTuned, self._trained(request)), {"sha256": ""}

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, Mapping[str, str]]:
        return cast(AuxiliaryTrained, self._trained(request)), {"sha256": ""}

    def _trained(self, request: FineTune | AuxiliaryTraining) -> Answer:
        self.clock += 20 * request.epochs
        self.image_macs += request.epochs * self.epoch_work(request)
        return self.fake(request)

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        self.fake(request)
        return True

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        plan = request.candidate.plan if isinstance(request, FineTune) else self.fake.space.full
        return 3 * TRAINING_IMAGES * self.fake.macs(plan)

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        return self._looked(request, self.fake.macs(self.fake.space.full))

    def masked_loss(self, request: MaskedLoss) -> np.ndarray:
        return self._looked(request, IMAGES * sum(map(self.fake.macs, request.plans)))

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        return self._looked(request, 2 * request.batch_size * len(request.removed) * self.fake.macs(request.plan))

    def time(self, request: Time) -> np.ndarray:
        return self._looked(request, 0)

    def predict(self, request: Predict) -> Mapping[str, np.ndarray]:
        return self._looked(request, 0)

    def _looked(self, request: Request, image_macs: float) -> Any:
        self.clock, self.image_macs = self.clock + 0.1, self.image_macs + image_macs
        return self.fake(request)


def bounded(
    name: str, options: object, fake: FakeStudy, goal: Goal, budget: Budget, pages: Pages | None = None, seed: int = 0
) -> tuple[Archive, Study]:
    """Run a method to its end, or to the end of its budget; the archive as a pipeline gets it, and the study."""
    problem = fake.problem(goal, seed, budget)
    return ended(METHODS.load(name).search(problem, options), fake, problem, pages or begun(fake))


def ended(strategy: Strategy, fake: FakeStudy, problem: Problem, pages: Pages) -> tuple[Archive, Study]:
    """Run a strategy as ``bounded`` runs a method."""
    oracle, journal = Accounted(fake), cast(Journal, pages)
    clock = lambda: oracle.clock  # noqa: E731
    driver = Study(journal, cast(Oracle, oracle), budget=problem.budget, closes=True, clock=clock)
    return driver.run(at_target(problem, strategy)), driver


def work(fake: FakeStudy, evaluations: float = 0, epochs: float = 0) -> float:
    """Image-MACs of so many evaluations and epochs of the unpruned network."""
    return fake.macs(fake.space.full) * (IMAGES * evaluations + 3 * TRAINING_IMAGES * epochs)
