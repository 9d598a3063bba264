"""A method run as a pipeline runs it: with a budget, a journal and a target, against the study made of arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.study import Study
from secateur.pruning.search import METHODS
from secateur.pruning.search.landing import at_target
from secateur.pruning.search.protocol import (
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
    Score,
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


class KilledError(Exception):
    """The process ends here."""


class Accounted:
    """The oracle of a study that a fake answers, with image-MACs counted."""

    def __init__(self, fake: FakeStudy) -> None:
        self.fake, self.image_macs = fake, 0.0

    @property
    def spent(self) -> Mapping[str, float]:
        return {"image_macs": self.image_macs, "measurements": 0}

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation:
        self.image_macs += IMAGES * self.fake.macs(candidate.plan)
        (evaluation,) = self.fake(Evaluate((candidate,), latency, floor))  # type: ignore[misc]
        return evaluation

    def ahead(self, *_: Any) -> None: ...

    def remember(self, *_: Any, **__: Any) -> None: ...

    def finetune(self, request: FineTune) -> tuple[FineTuned, Mapping[str, str]]:
        self.image_macs += request.epochs * self.epoch_work(request)
        return cast(FineTuned, self.fake(request)), {"sha256": ""}

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, Mapping[str, str]]:
        self.image_macs += request.epochs * self.epoch_work(request)
        return cast(AuxiliaryTrained, self.fake(request)), {"sha256": ""}

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        return False

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        plan = request.candidate.plan if isinstance(request, FineTune) else self.fake.space.full
        return 3 * TRAINING_IMAGES * self.fake.macs(plan)

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        return cast(Mapping[str, np.ndarray], self.fake(request))

    def masked_loss(self, request: MaskedLoss) -> np.ndarray:
        self.image_macs += IMAGES * sum(map(self.fake.macs, request.plans))
        return cast(np.ndarray, self.fake(request))

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        self.image_macs += 2 * request.batch_size * len(request.removed) * self.fake.macs(request.plan)
        return cast(Mapping[str, np.ndarray], self.fake(request))

    def time(self, request: Time) -> np.ndarray:
        return cast(np.ndarray, self.fake(request))

    def predict(self, request: Any) -> Mapping[str, np.ndarray]:
        return {}


def bounded(
    name: str, options: object, fake: FakeStudy, goal: Goal, budget: Budget, pages: Pages | None = None, seed: int = 0
) -> tuple[Archive, Study]:
    """Run a method to its end, or to the end of its budget; the archive as a pipeline gets it, and the study."""
    pages = pages or Pages()
    study = Study(cast(Journal, pages), Accounted(fake), budget=budget, closes=True)  # type: ignore[arg-type]
    problem = fake.problem(goal, seed, budget)
    return study.run(at_target(problem, METHODS.load(name).search(problem, options))), study


def work(fake: FakeStudy, evaluations: float = 0, epochs: float = 0) -> float:
    """Image-MACs of so many evaluations and epochs of the unpruned network."""
    return fake.macs(fake.space.full) * (IMAGES * evaluations + 3 * TRAINING_IMAGES * epochs)
