"""The search loop: request -> answer -> journal -> tell -> notify. Resuming is replaying.

A strategy's requests depend only on its seed and on earlier answers, so a run that was killed is continued by starting
the same strategy again and answering from the journal until the journal ends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import JournalError
from secateur.pipeline.run.journal import Journal, Record
from secateur.pipeline.run.records import heading, heading_of_exact, pack, to_dict, to_evaluation, unpack
from secateur.pruning.search.protocol import (
    Answer,
    Archive,
    AuxiliaryTrained,
    AuxiliaryTraining,
    Budget,
    BudgetSpent,
    Candidate,
    Distort,
    Entry,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    Left,
    MaskedLoss,
    Predict,
    Remaining,
    Request,
    Score,
    Strategy,
    Time,
)

PATIENCE = 1000
"""How often a strategy may ask again for what the budget refuses."""
USEFUL = 0.1
"""A training is shortened to what is left of the budget, but not to less than this share of what was asked for."""
ASIDES = 12
"""Requests beside the last evaluation that are answered when the budget is spent: what projecting a plan needs."""
MASKS = 64
"""Masks of such a request."""
SCORED_OVER_TRAINED = 0.4
"""Seconds per image-MAC of scoring, by the fastest forward pass, to those of training: before any training is timed."""


Training = TypeVar("Training", FineTune, AuxiliaryTraining)


class Oracle(Protocol):
    """Who answers requests that are not in the journal yet: the evaluator.

    Answers that leave weights behind come with their checkpoint (``{"sha256"}``; empty = nothing was saved).
    """

    @property
    def spent(self) -> Mapping[str, int]:
        """Running totals: ``images_forwarded``, ``images_trained``, ``image_macs``, ``measurements``."""

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        """Image-MACs of one epoch of a training."""

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation: ...

    def ahead(self, candidates: Sequence[Candidate], latency: bool, floor: float | None = None) -> None:
        """These will be asked for next, one by one in this order: it may begin with all of them at once."""

    def remember(self, candidate: Candidate, latency: bool, evaluation: Evaluation, *, exact: bool = False) -> None:
        """An answer that an earlier process found; the same question again is answered as it would have been there.

        Args:
            exact: it is the evaluation after a training.
        """

    def exact(self, candidate: Candidate, precision: str = "fp32") -> Evaluation:
        """Accuracy alone, by the workload's own metric, in float32 or in the precision that was chosen."""

    def finetune(self, request: FineTune) -> tuple[FineTuned, Mapping[str, str]]: ...

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, Mapping[str, str]]: ...

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        """Make a journalled training's weights usable again; False if its checkpoint is gone or altered."""

    def score(self, request: Score) -> Mapping[str, np.ndarray]: ...

    def masked_loss(self, request: MaskedLoss) -> np.ndarray: ...

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]: ...

    def time(self, request: Time) -> np.ndarray: ...

    def predict(self, request: Predict) -> Mapping[str, np.ndarray]: ...


class Study:
    """Runs strategies and single requests against one journal.

    Args:
        journal: where answers are recorded, and replayed from.
        oracle: who answers what is not recorded.
        notify: called with every record of a candidate, replayed or new.
        stage: name under which this study's records are filed.
        budget: what the strategy may spend, counted over replayed and new answers alike.
        watch: told what is being worked on, where that is no candidate.
        scores: evaluations that a candidate counts as at most, where its latency is asked for: one a precision.
        closes: keep one candidate back, and grant it once the budget is spent: for a strategy that has a target.
        clock: seconds, from any zero; what answers take is counted by it.
    """

    def __init__(
        self,
        journal: Journal,
        oracle: Oracle,
        notify: Callable[[Record], None] = lambda _: None,
        stage: str = "search",
        budget: Budget = Budget(),  # noqa: B008 - frozen
        watch: Callable[[str], None] = lambda _: None,
        *,
        scores: int = 1,
        closes: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.journal, self.oracle, self.notify, self.stage, self.budget = journal, oracle, notify, stage, budget
        self.watch, self.clock = watch, clock
        self._replay: deque[Record] = deque(r for r in journal.records if r.get("stage") == stage)
        self.spent = {"evaluations": 0.0, "epochs": 0.0, "seconds": 0.0, "image_macs": 0.0}
        self.num_candidates = 0
        self._found: list[Entry] = []
        self._kept_back, self._asides, self._granted = int(closes), ASIDES if closes else 0, False
        self.scores = scores
        self._most = math.inf if budget.evaluations is None else budget.evaluations - scores * self._kept_back
        self._pace = _Pace(r for r in journal.records if r.get("stage") == "reference")

    def run(self, strategy: Strategy) -> Archive:
        """Drive a strategy to its end, or to the end of the budget.

        Raises:
            BudgetSpent: it ended before anything was evaluated.
        """
        thrown = 0
        try:
            request = next(strategy)
            while True:
                spent = self._over(request)
                if not spent or (thrown and self._grants(request)):
                    request = strategy.send(self.answer(request))
                elif (thrown := thrown + 1) > PATIENCE:
                    strategy.close()
                    raise BudgetSpent(spent)
                else:
                    request = strategy.throw(BudgetSpent(spent))
        except StopIteration as end:
            archive: Archive = end.value
            return archive
        except BudgetSpent:
            if not self._found:
                raise
            return tuple(self._found)

    def charge(self, spent: Mapping[str, float]) -> None:
        """Count what another study spent in this one's budget."""
        for name, amount in spent.items():
            self.spent[name] = self.spent.get(name, 0) + amount

    def answer(self, request: Request) -> Answer:
        """Answer one request, from the journal where it is recorded."""
        if work := work_of(request):
            self.watch(work)
        match request:
            case Evaluate(candidates, latency, floor):
                if new := self._new(candidates):
                    self.oracle.ahead(new, latency, floor)
                return tuple(self._evaluate_within(candidate, latency, floor) for candidate in candidates)
            case FineTune():
                return self.finetune(request)
            case AuxiliaryTraining():
                return self._train_auxiliary(request)
            case Score():
                return self._arrays(request, lambda: self.oracle.score(request))
            case Distort():
                return self._arrays(request, lambda: self.oracle.distort(request))
            case MaskedLoss():
                return self._arrays(request, lambda: {"": self.oracle.masked_loss(request)})[""]
            case Time():
                return self._arrays(request, lambda: {"": self.oracle.time(request)})[""]
            case Predict():
                return self._arrays(request, lambda: self.oracle.predict(request))
            case Remaining():
                return self.left()

    def left(self) -> Left:
        """What is left of the budget, by the totals of all answers so far."""
        spent = {name: self.spent[name] for name in ("evaluations", "seconds", "epochs")}
        spent["work"] = self.spent["image_macs"]
        limits = {"evaluations": self._most, **{n: getattr(self.budget, n) for n in ("seconds", "epochs", "work")}}
        set_ = {name: limit for name, limit in limits.items() if limit is not None and limit < math.inf}
        left = {name: max(0.0, limit - spent[name]) for name, limit in set_.items()}
        share = min((left[name] / limit if limit > 0 else 0.0 for name, limit in set_.items()), default=1.0)
        return Left(**left, share=share, spent=spent, epoch=self._epoch())

    def _epoch(self) -> dict[str, float]:
        """What an epoch of the unpruned network takes, where a limit counts it."""
        if self.budget.work is None and self.budget.seconds is None:
            return {}
        work = self.oracle.epoch_work(AuxiliaryTraining("", 1.0))
        return {"work": work, "seconds": work * self._pace.of_training()}

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation:
        """One candidate's evaluation, journalled before it is returned."""
        asked, replayed = heading(Evaluate((candidate,), latency)), bool(self._replay)
        record = self._record(asked, lambda: {"evaluation": to_dict(self.oracle.evaluate(candidate, latency, floor))})
        evaluation = to_evaluation(record["evaluation"])
        self._count(evaluation)
        if replayed:
            self.oracle.remember(candidate, latency, evaluation)
        self._keep(candidate, evaluation)
        self.notify(record)
        return evaluation

    def exact(self, candidate: Candidate, precision: str = "fp32") -> Evaluation:
        """The accuracy of a candidate met before, in float32 or in the precision that was chosen for it.

        It is journalled before it is returned; nobody is notified.
        """
        asked = heading_of_exact(candidate, precision)
        record = self._record(asked, lambda: {"exact": to_dict(self.oracle.exact(candidate, precision))})
        return to_evaluation(record["exact"])

    def finetune(self, request: FineTune) -> FineTuned:
        """One candidate trained and evaluated, journalled before it is returned."""
        afforded = self._afforded(request)

        def train() -> dict[str, Any]:
            answer, checkpoint = self.oracle.finetune(afforded)
            evaluation = to_dict(answer.evaluation)
            facts = {"base": answer.base, "checkpoint": dict(checkpoint), "evaluation": evaluation}
            return {**facts, **_shortened(request, afforded)}

        candidate, replayed = request.candidate, bool(self._replay)
        record = self._record(heading(request), train, afforded)
        self.spent["epochs"] += afforded.epochs
        tuned = FineTuned(record["base"], to_evaluation(record["evaluation"]))
        self._count(tuned.evaluation)
        trained = replace(candidate, base=tuned.base)
        if replayed:
            self.oracle.remember(trained, request.latency, tuned.evaluation, exact=True)
        self._keep(trained, tuned.evaluation)
        self.notify(record)
        return tuned

    def _train_auxiliary(self, request: AuxiliaryTraining) -> AuxiliaryTrained:
        afforded = self._afforded(request)

        def train() -> dict[str, Any]:
            answer, checkpoint = self.oracle.train_auxiliary(afforded)
            facts = {"base": answer.base, "checkpoint": dict(checkpoint), "evaluation": to_dict(answer.evaluation)}
            return {**facts, "scores": pack(answer.scores), **_shortened(request, afforded)}

        record = self._record(heading(request), train, afforded)
        self.spent["epochs"] += afforded.epochs
        return AuxiliaryTrained(record["base"], unpack(record["scores"]), to_evaluation(record["evaluation"]))

    def _arrays(self, request: Request, ask: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        return unpack(self._record(heading(request), lambda: {"scores": pack(ask())})["scores"])

    def _evaluate_within(self, candidate: Candidate, latency: bool, floor: float | None) -> Evaluation:
        """An evaluation, if the budget has one left, or its last one is granted."""
        spent = self._over(Evaluate((candidate,), latency))
        if spent and not self._granted:
            return Evaluation("infeasible", spent)
        self._granted = False
        return self.evaluate(candidate, latency, floor)

    def _new(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those of a request that are not in the journal, as far as the budget of evaluations reaches."""
        if self._granted:
            candidates = candidates[:1]
        elif self._most < math.inf:
            candidates = candidates[: max(0, int(self._most - self.spent["evaluations"]))]
        return candidates[len(self._replay) :]

    def _grants(self, request: Request) -> bool:
        """Whether a request is answered although the budget is spent: one evaluation, and what its plan comes from."""
        if isinstance(request, Evaluate):
            self._granted, self._kept_back = self._kept_back > 0, 0
            return self._granted
        few = isinstance(request, Score | Time | Predict) or (
            isinstance(request, MaskedLoss) and len(request.plans) <= MASKS
        )
        if not (few and self._kept_back and self._asides):
            return False
        self._asides -= 1
        return True

    def _afforded(self, request: Training) -> Training:
        """A training with the epochs that the budget allows it; those of the record where it is replayed."""
        if self._replay:
            return replace(request, epochs=self._replay[0].get("trained", request.epochs))
        epochs = self._affordable(request)
        return request if epochs >= request.epochs * (1 - 1e-9) else replace(request, epochs=epochs)

    def _affordable(self, request: FineTune | AuxiliaryTraining) -> float:
        """Epochs of a training, up to those it asks for, that what is left of the budget allows."""
        left, epochs = self.left(), [request.epochs]
        if self.budget.epochs is not None:
            epochs.append(left.epochs)
        if self.budget.work is None and self.budget.seconds is None:
            return min(epochs)
        work = self.oracle.epoch_work(request)
        if work > 0 and self.budget.work is not None:
            epochs.append(left.work / work)
        if work > 0 and self.budget.seconds is not None and (pace := self._pace.of_training()) > 0:
            seconds = left.seconds / (pace * work)
            epochs.append(seconds if self._pace.timed else max(seconds, USEFUL * request.epochs))
        return min(epochs)

    def _over(self, request: Request) -> str:
        """Why the budget allows no such request any more; empty while it does."""
        if isinstance(request, Remaining):
            return ""
        budget, spent = self.budget, self.spent
        first = not self._found and isinstance(
            request, Evaluate | Score | Time | Predict
        )  # what was learned must not be lost
        if budget.seconds is not None and spent["seconds"] >= budget.seconds and not first:
            return f"the budget of {budget.seconds:g} s is spent"
        if budget.work is not None and spent["image_macs"] >= budget.work and not first:
            return f"the budget of {budget.work:g} image-MACs is spent"
        if isinstance(request, Evaluate | FineTune) and spent["evaluations"] + self._scored(request) > self._most:
            return f"the budget of {number_of(budget.evaluations or 0, 'evaluation(s)')} is spent"
        if isinstance(request, FineTune | AuxiliaryTraining) and request.epochs > 0:
            epochs = self._affordable(request)
            if epochs < USEFUL * request.epochs:
                return (
                    f"{number_of(request.epochs, 'epoch(s) of training exceeds|exceed')} what is left of the budget "
                    f"({epochs:.3g} epochs)"
                )
        return ""

    def _scored(self, request: Evaluate | FineTune) -> int:
        """How many evaluations one candidate of a request may count as."""
        return self.scores if request.latency else 1

    def _record(
        self,
        asked: Mapping[str, Any],
        ask: Callable[[], dict[str, Any]],
        weights: FineTune | AuxiliaryTraining | None = None,
    ) -> Record:
        """The recorded answer to a request, or a new one, recorded; weights it left behind are made usable again."""
        asked = {"stage": self.stage, **asked}
        record = self._recorded(asked)
        if record is None:
            before, started = dict(self.oracle.spent), self.clock()
            facts = ask()
            spent: dict[str, float] = {name: total - before[name] for name, total in self.oracle.spent.items()}
            spent["seconds"] = round(self.clock() - started, 4)
            record = self.journal.append({**asked, **facts, "spent": spent})
        elif weights is not None and not self.oracle.restore(weights, record["base"], record["checkpoint"]):
            ask()  # the file is gone: train it again, deterministically
        for name, amount in record["spent"].items():
            self.spent[name] = self.spent.get(name, 0) + amount
        self._pace.add(record)
        return record

    def _count(self, evaluation: Evaluation) -> None:
        """A candidate more; each precision that was tried is an evaluation."""
        self.num_candidates += 1
        self.spent["evaluations"] += evaluation.scored

    def _keep(self, candidate: Candidate, evaluation: Evaluation) -> None:
        if evaluation.status == "ok" and not candidate.plan.is_full:
            self._found.append(Entry(candidate, evaluation))

    def _recorded(self, asked: Mapping[str, Any]) -> Record | None:
        """The next record of this stage, if there is one; it must be the answer to this very request."""
        if not self._replay:
            return None
        record = self._replay.popleft()
        if any(record.get(key) != asked[key] for key in ("kind", "request")):
            differing = [key for key, value in asked.items() if key != "request" and record.get(key) != value]
            raise JournalError(
                f"{self.journal.path}: the recorded search and this one part at {asked['kind']} "
                f"{asked.get('candidate', {}).get('id', '')}: {', '.join(differing) or 'what is asked'} differs. The "
                "journal is of another version of Secateur, of the data or of the model; start a new run"
            )
        return record


class _Pace:
    """Seconds per image-MAC, as records tell them.

    Args:
        records: of the reference, until there are others.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.trained, self.scored = [0.0, 0.0], [0.0, 0.0]
        for record in records:
            self.add(record)

    @property
    def timed(self) -> bool:
        """Whether a training has been timed."""
        return min(self.trained) > 0

    def add(self, record: Record) -> None:
        """Learn from one more record."""
        kinds = {"finetune": self.trained, "learn": self.trained, "evaluation": self.scored}
        spent = record.get("spent", {})
        if (totals := kinds.get(record["kind"])) is not None:
            totals[0] += spent.get("seconds", 0.0)
            totals[1] += spent.get("image_macs", 0.0)

    def of_training(self) -> float:
        """Seconds per image-MAC of a training; by what scoring takes before the first one, 0 = unknown."""
        if self.timed:
            return self.trained[0] / self.trained[1]
        return self.scored[0] / self.scored[1] / SCORED_OVER_TRAINED if min(self.scored) > 0 else 0.0


def _shortened(asked: FineTune | AuxiliaryTraining, trained: FineTune | AuxiliaryTraining) -> dict[str, float]:
    """What a record says of a training that the budget shortened."""
    return {} if trained.epochs == asked.epochs else {"trained": trained.epochs}


def work_of(request: Request) -> str:
    """What a user reads while a request that is no candidate's is answered; empty for those of candidates."""
    match request:
        case Score(criterion):
            return f"score channels by {criterion}"
        case MaskedLoss(plans):
            return f"try {len(plans)} masks"
        case Distort(_, removed):
            return f"look at the next layers in {len(removed)} batches"
        case Time(plans):
            return f"time {number_of(len(plans), 'plan(s)')}"
        case Predict():
            return "model the latency"
    return ""
