"""The search loop: request -> answer -> journal -> tell -> notify. Resuming is replaying.

A strategy's requests depend only on its seed and on earlier answers, so a run that was killed is continued by starting
the same strategy again and answering from the journal until the journal ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

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
    MaskedLoss,
    Predict,
    Request,
    Score,
    Strategy,
    Time,
)

PATIENCE = 1000
"""How often a strategy may ask again for what the budget refuses."""


class Oracle(Protocol):
    """Who answers requests that are not in the journal yet: the evaluator.

    Answers that leave weights behind come with their checkpoint (``{"sha256"}``; empty = nothing was saved).
    """

    @property
    def spent(self) -> Mapping[str, int]:
        """Running totals: ``images_forwarded``, ``images_trained``, ``measurements``."""

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation: ...

    def ahead(self, candidates: Sequence[Candidate], latency: bool, floor: float | None = None) -> None:
        """These will be asked for next, one by one in this order: it may begin with all of them at once."""

    def remember(self, candidate: Candidate, latency: bool, evaluation: Evaluation, *, exact: bool = False) -> None:
        """An answer that an earlier process found; the same question again is answered as it would have been there.

        Args:
            exact: it is the evaluation after a training.
        """

    def exact(self, candidate: Candidate) -> Evaluation:
        """Accuracy alone, in float32 and by the workload's own metric."""

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
    """

    def __init__(
        self,
        journal: Journal,
        oracle: Oracle,
        notify: Callable[[Record], None] = lambda _: None,
        stage: str = "search",
        budget: Budget = Budget(),  # noqa: B008 - frozen
        watch: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.journal, self.oracle, self.notify, self.stage, self.budget = journal, oracle, notify, stage, budget
        self.watch = watch
        self._replay: deque[Record] = deque(r for r in journal.records if r.get("stage") == stage)
        self.spent = {"evaluations": 0.0, "epochs": 0.0, "seconds": 0.0}
        self._found: list[Entry] = []

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
                if not spent:
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

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation:
        """One candidate's evaluation, journalled before it is returned."""
        asked, replayed = heading(Evaluate((candidate,), latency)), bool(self._replay)
        record = self._record(asked, lambda: {"evaluation": to_dict(self.oracle.evaluate(candidate, latency, floor))})
        self.spent["evaluations"] += 1
        evaluation = to_evaluation(record["evaluation"])
        if replayed:
            self.oracle.remember(candidate, latency, evaluation)
        self._keep(candidate, evaluation)
        self.notify(record)
        return evaluation

    def exact(self, candidate: Candidate) -> Evaluation:
        """The accuracy of a candidate met before, in float32, journalled before it is returned; nobody is notified."""
        record = self._record(heading_of_exact(candidate), lambda: {"exact": to_dict(self.oracle.exact(candidate))})
        return to_evaluation(record["exact"])

    def finetune(self, request: FineTune) -> FineTuned:
        """One candidate trained and evaluated, journalled before it is returned."""

        def train() -> dict[str, Any]:
            answer, checkpoint = self.oracle.finetune(request)
            evaluation = to_dict(answer.evaluation)
            return {"base": answer.base, "checkpoint": dict(checkpoint), "evaluation": evaluation}

        candidate, replayed = request.candidate, bool(self._replay)
        record = self._record(heading(request), train, request)
        self.spent["evaluations"] += 1
        self.spent["epochs"] += request.epochs
        tuned = FineTuned(record["base"], to_evaluation(record["evaluation"]))
        trained = replace(candidate, base=tuned.base)
        if replayed:
            self.oracle.remember(trained, request.latency, tuned.evaluation, exact=True)
        self._keep(trained, tuned.evaluation)
        self.notify(record)
        return tuned

    def _train_auxiliary(self, request: AuxiliaryTraining) -> AuxiliaryTrained:
        def train() -> dict[str, Any]:
            answer, checkpoint = self.oracle.train_auxiliary(request)
            facts = {"base": answer.base, "checkpoint": dict(checkpoint), "evaluation": to_dict(answer.evaluation)}
            return {**facts, "scores": pack(answer.scores)}

        record = self._record(heading(request), train, request)
        self.spent["epochs"] += request.epochs
        return AuxiliaryTrained(record["base"], unpack(record["scores"]), to_evaluation(record["evaluation"]))

    def _arrays(self, request: Request, ask: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        return unpack(self._record(heading(request), lambda: {"scores": pack(ask())})["scores"])

    def _evaluate_within(self, candidate: Candidate, latency: bool, floor: float | None) -> Evaluation:
        """An evaluation, if the budget has one left."""
        spent = self._over(Evaluate((candidate,)))
        return Evaluation("infeasible", spent) if spent else self.evaluate(candidate, latency, floor)

    def _new(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those of a request that are not in the journal, as far as the budget of evaluations reaches."""
        limit = self.budget.evaluations
        if limit is not None:
            candidates = candidates[: max(0, limit - int(self.spent["evaluations"]))]
        return candidates[len(self._replay) :]

    def _over(self, request: Request) -> str:
        """Why the budget allows no such request any more; empty while it does."""
        budget, spent = self.budget, self.spent
        closing = not self._found and isinstance(
            request, Evaluate | Score | Time | Predict
        )  # what was learned must not be lost
        if budget.seconds is not None and spent["seconds"] >= budget.seconds and not closing:
            return f"the budget of {budget.seconds:g} s is spent"
        evaluates, epochs = isinstance(request, Evaluate | FineTune), getattr(request, "epochs", 0.0)
        if evaluates and budget.evaluations is not None and spent["evaluations"] >= budget.evaluations:
            return f"the budget of {budget.evaluations} evaluations is spent"
        if epochs and budget.epochs is not None and spent["epochs"] + epochs > budget.epochs + 1e-9:
            left = budget.epochs - spent["epochs"]
            return f"{epochs:g} epochs of training exceed what is left of the budget ({left:g} epochs)"
        return ""

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
            before, started = dict(self.oracle.spent), time.perf_counter()
            facts = ask()
            spent: dict[str, float] = {name: total - before[name] for name, total in self.oracle.spent.items()}
            spent["seconds"] = round(time.perf_counter() - started, 4)
            record = self.journal.append({**asked, **facts, "spent": spent})
        elif weights is not None and not self.oracle.restore(weights, record["base"], record["checkpoint"]):
            ask()  # the file is gone: train it again, deterministically
        for name, amount in record["spent"].items():
            self.spent[name] = self.spent.get(name, 0) + amount
        return record

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
            return f"time {len(plans)} plans"
        case Predict():
            return "model the latency"
    return ""
