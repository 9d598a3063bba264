"""The search loop: request -> answer -> journal -> tell -> notify. Resuming is replaying.

A strategy's requests depend only on its seed and on earlier answers, so a run that was killed is continued by starting
the same strategy again and answering from the journal until the journal ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from pipeline.errors import JournalError
from pipeline.journal import Journal, Record
from pruning.plan import PruningPlan
from pruning.search.protocol import (
    Answer,
    Archive,
    Candidate,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    Request,
    Score,
    Strategy,
)


class Oracle(Protocol):
    """Who answers requests that are not in the journal yet: the evaluator."""

    def evaluate(self, candidate: Candidate, latency: bool) -> Evaluation: ...

    def finetune(self, candidate: Candidate, epochs: float) -> tuple[FineTuned, Mapping[str, str]]:
        """Returns the answer, and the checkpoint as ``{"path", "sha256"}``."""

    def restore(self, base: str, plan: PruningPlan, checkpoint: Mapping[str, str]) -> bool:
        """Make a journalled fine-tuning's weights usable again; False if its checkpoint is gone or altered."""

    def score(self, criterion: str, base: str) -> Mapping[str, np.ndarray]: ...


class Study:
    """Runs strategies and single requests against one journal.

    Args:
        journal: where answers are recorded, and replayed from.
        oracle: who answers what is not recorded.
        notify: called with every record of a candidate, replayed or new.
        stage: name under which this study's records are filed.
    """

    def __init__(
        self, journal: Journal, oracle: Oracle, notify: Callable[[Record], None] = lambda _: None, stage: str = "search"
    ) -> None:
        self.journal, self.oracle, self.notify, self.stage = journal, oracle, notify, stage
        self._replay: Iterator[Record] = iter([r for r in journal.records if r.get("stage") == stage])

    def run(self, strategy: Strategy) -> Archive:
        """Drive a strategy to its end."""
        try:
            request = next(strategy)
            while True:
                request = strategy.send(self.answer(request))
        except StopIteration as end:
            archive: Archive = end.value
            return archive

    def answer(self, request: Request) -> Answer:
        """Answer one request, from the journal where it is recorded."""
        match request:
            case Evaluate(candidates, latency):
                return tuple(self.evaluate(candidate, latency) for candidate in candidates)
            case FineTune(candidate, epochs):
                return self.finetune(candidate, epochs)
            case Score(criterion, base):
                return self._score(criterion, base)

    def evaluate(self, candidate: Candidate, latency: bool) -> Evaluation:
        """One candidate's evaluation, journalled before it is returned."""
        asked = {"kind": "evaluation", "stage": self.stage, "latency": latency, "candidate": describe(candidate)}
        record = self._recorded(asked)
        if record is None:
            evaluation = self.oracle.evaluate(candidate, latency)
            record = self.journal.append({**asked, "evaluation": to_dict(evaluation)})
        self.notify(record)
        return to_evaluation(record["evaluation"])

    def finetune(self, candidate: Candidate, epochs: float) -> FineTuned:
        """One candidate trained and evaluated, journalled before it is returned."""
        asked = {"kind": "finetune", "stage": self.stage, "epochs": epochs, "candidate": describe(candidate)}
        record = self._recorded(asked)
        if record is None:
            answer, checkpoint = self.oracle.finetune(candidate, epochs)
            facts = {"base": answer.base, "checkpoint": dict(checkpoint), "evaluation": to_dict(answer.evaluation)}
            record = self.journal.append({**asked, **facts})
        elif not self.oracle.restore(record["base"], candidate.plan, record["checkpoint"]):
            self.oracle.finetune(candidate, epochs)  # the file is gone: train it again, deterministically
        self.notify(record)
        return FineTuned(record["base"], to_evaluation(record["evaluation"]))

    def _score(self, criterion: str, base: str) -> Mapping[str, np.ndarray]:
        asked = {"kind": "score", "stage": self.stage, "criterion": criterion, "base": base}
        record = self._recorded(asked)
        if record is None:
            scores = {name: values.tolist() for name, values in self.oracle.score(criterion, base).items()}
            record = self.journal.append({**asked, "scores": scores})
        return {name: np.array(values, dtype=np.float64) for name, values in record["scores"].items()}

    def _recorded(self, asked: Mapping[str, Any]) -> Record | None:
        """The next record of this stage, if there is one; it must be the answer to this very request."""
        record = next(self._replay, None)
        if record is None:
            return None
        differing = [key for key, value in asked.items() if record.get(key) != value]
        if differing:
            raise JournalError(
                f"{self.journal.path}: the recorded search and this one part at {asked['kind']} "
                f"{asked.get('candidate', {}).get('id', '')}: {', '.join(differing)} differ. The journal is of "
                "another version of Secateur, of the data or of the model; start a new run"
            )
        return record


def describe(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON; ``plan`` is the text of ``PruningPlan.to_json``."""
    return {
        "id": candidate.id,
        "plan": candidate.plan.to_json(),
        "digest": candidate.plan.digest,
        "origin": candidate.origin,
        "parents": list(candidate.parents),
        "base": candidate.base,
    }


def to_candidate(data: Mapping[str, Any]) -> Candidate:
    """The inverse of ``describe``."""
    plan = PruningPlan.from_json(data["plan"])
    return Candidate(data["id"], plan, data["origin"], tuple(data["parents"]), data["base"])


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON."""
    return {"status": evaluation.status, "reason": evaluation.reason, "metrics": dict(evaluation.metrics)}


def to_evaluation(data: Mapping[str, Any]) -> Evaluation:
    """The inverse of ``to_dict``."""
    return Evaluation(data["status"], data["reason"], data["metrics"])
