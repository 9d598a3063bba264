"""Other winners of a finished or running search, from its journal alone: nothing is evaluated again.

Metrics are stored and rewards derived, so another reward is another ranking of the same candidates. Candidates as they
were cut and fine-tuned ones are marked wherever they stand together, and neither keeps the other from the Pareto front:
fine-tuning may turn their order around.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from secateur.device_profiles.wording import command, number_of
from secateur.pipeline.errors import JournalError, UserError
from secateur.pipeline.files import write_whole
from secateur.pipeline.run.journal import Journal, Record, read_journal
from secateur.pipeline.run.metric import settled
from secateur.pipeline.run.records import describe, to_candidate, to_dict, to_evaluation
from secateur.pipeline.run.run import open_run_directory
from secateur.pipeline.workloads.data.record import read as read_record
from secateur.pruning.search.front import pareto_front
from secateur.pruning.search.protocol import Candidate, Evaluation
from secateur.pruning.search.reward import make_reward

STAGES = ("search", "final")
FIRST_METRICS = ("map50", "top1", "loss_score")
"""Of the first journals, which do not name theirs; nothing comes to them any more."""


@dataclass(frozen=True)
class Past:
    """A candidate of a journal.

    Args:
        stage: ``search``, or ``final`` = fine-tuned after the search.
        candidate: with the weights it was evaluated with as its base.
        tuned: whether it was fine-tuned; otherwise it was evaluated as it was cut.
    """

    stage: str
    candidate: Candidate
    evaluation: Evaluation
    tuned: bool

    @property
    def weights(self) -> str:
        """The mark that tells the one from the other, and a precision that is not fp32."""
        mark, precision = "tuned" if self.tuned else "as cut", self.evaluation.precision
        return mark if precision == "fp32" else f"{mark}, {precision}"

    def to_dict(self) -> dict[str, Any]:
        """The candidate as JSON."""
        told = {"stage": self.stage, "weights": self.weights}
        return {**told, "candidate": describe(self.candidate), "evaluation": to_dict(self.evaluation)}


@dataclass(frozen=True)
class Ranking:
    """Candidates under one reward, best first; ``front`` marks those on the Pareto front; ``metric`` = what it sees."""

    rows: tuple[tuple[float, Past], ...]
    front: frozenset[int]
    reference: Evaluation
    metric: str


def history(records: Sequence[Record]) -> list[Past]:
    """Every pruned candidate of a journal that was evaluated, in order."""
    candidates = []
    for record in records:
        if record.get("stage") in STAGES and record["kind"] in ("evaluation", "finetune"):
            tuned = record["kind"] == "finetune"
            candidate = to_candidate({**record["candidate"], **({"base": record["base"]} if tuned else {})})
            if not candidate.plan.is_full:
                candidates.append(Past(record["stage"], candidate, to_evaluation(record["evaluation"]), tuned))
    return candidates


def front_rows(records: Sequence[Record], metric: str) -> list[dict[str, Any]]:
    """The Pareto archives over accuracy, latency and MACs of a journal, as JSON: fine-tuned ones, then those as cut.

    Of each, highest accuracy first.
    """
    return [past.to_dict() for past in _front(history(records), metric)]


def _front(past: Sequence[Past], metric: str) -> list[Past]:
    """What no other candidate of the same kind of weights beats."""
    kinds = ([p for p in past if p.tuned], [p for p in past if not p.tuned])
    return [kind[i] for kind in kinds for i in pareto_front([p.evaluation for p in kind], metric)]


def rescore(directory: Path, preset: str, options: Mapping[str, Any]) -> Ranking:
    """Rank a run's candidates by another reward.

    Args:
        directory: a run directory; the run may still be going on.
        preset: name of a reward.
        options: its parameters.

    Raises:
        UserError: no run directory, no evaluated candidate in it, no accuracy that all of them have, or an unknown
            reward or parameter.
        JournalError: the journal is damaged.
    """
    open_run_directory(directory)
    records = read_journal(directory / "journal.jsonl")
    check_same_data(directory, records)
    measured = [r for r in records if r.get("stage") == "reference" and r["kind"] == "evaluation"]
    past = history(records)
    if not measured or not any(p.evaluation.status == "ok" for p in past):
        resume = command("secateur", "resume", directory)
        raise UserError(f"{directory} holds no evaluated candidate yet; continue it with: {resume}")
    reference = to_evaluation(measured[0]["evaluation"])
    split, named = settled(records), records[0].get("metrics") or FIRST_METRICS
    metric = shared_metric(named if split is None else (split.metric, *named), reference, past)
    try:
        reward = make_reward(preset, reference, metric, **options)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    front = {id(p) for p in _front(past, metric)}
    scored = sorted(((reward(p.evaluation), p) for p in past if p.evaluation.status == "ok"), key=lambda row: -row[0])
    on_front = frozenset(i for i, (_, p) in enumerate(scored) if id(p) in front)
    return Ranking(tuple(scored), on_front, reference, metric)


def check_same_data(directory: Path, records: Sequence[Record]) -> None:
    """See that a journal is about the images that its run directory's record names.

    Raises:
        UserError: it is about others, so its accuracies are not those of this run; or the record was altered.
    """
    recorded, about = read_record(directory), records[0].get("data")
    if recorded is not None and about is not None and recorded.fingerprint != about:
        raise UserError(
            f"the journal of {directory} was written about other data ({about}) than its data.json names "
            f"({recorded.fingerprint}): its candidates cannot be compared. Restore the run directory's own files"
        )


def check_whole(journal: Journal, num_candidates: int) -> None:
    """See that a journal still holds every candidate of a search that has ended: a cut after a line has no other trace.

    Args:
        num_candidates: how many the search evaluated.

    Raises:
        JournalError: candidates are missing.
    """
    held = sum(r.get("stage") == "search" and r["kind"] in ("evaluation", "finetune") for r in journal.records)
    if held < num_candidates:
        raise JournalError(
            f"{journal.path} holds {number_of(held, 'candidate(s)')} of the search, which evaluated "
            f"{num_candidates}: its end was cut "
            f"off. Restore the file from a copy, or remove {journal.path.parent / 'stages'} to repeat the work"
        )


def write_ranking(directory: Path, preset: str, options: Mapping[str, Any], ranking: Ranking, top: int) -> Path:
    """Write the best ``top`` rows as ``rescore-PRESET.json`` and the winner's plan beside it; returns the first."""
    rows = [
        {"reward": reward, "front": i in ranking.front, **past.to_dict()}
        for i, (reward, past) in enumerate(ranking.rows[:top])
    ]
    path = directory / f"rescore-{preset}.json"
    data = {"format": 1, "reward": {"preset": preset, "options": dict(options)}, "candidates": rows}
    write_whole(path, json.dumps(data, indent=1) + "\n")
    plan = directory / f"rescore-{preset}.plan.json"
    write_whole(plan, ranking.rows[0][1].candidate.plan.to_json() + "\n")
    return path


def shared_metric(metrics: Sequence[str], reference: Evaluation, past: Sequence[Past]) -> str:
    """The metric that all candidates can be compared by: a search may go by a stand-in of the workload's metric.

    Args:
        metrics: those of the run: the one that the search went by, where it is known, then the workload's own.

    Raises:
        UserError: they have none of them in common.
    """
    known = [reference.metrics, *(p.evaluation.metrics for p in past if p.evaluation.status == "ok")]
    for name in metrics:
        if all(name in recorded for recorded in known):
            return name
    held = sorted(set.intersection(*(set(recorded) for recorded in known)))
    raise UserError(
        f"the run's candidates cannot be compared: none of {', '.join(metrics)} was recorded for each (all have "
        f"{', '.join(held)}). Start a new run with `secateur run`, which records its metric"
    )


def rank_agreement(records: Sequence[Record], metric: str, stand_in: str) -> dict[str, Any] | None:
    """How alike a workload's metric and what the search went by rank its candidates.

    None where both are the same, fewer than three candidates have both, or all are equal.
    """
    metrics = [p.evaluation.metrics for p in history(records) if p.stage == "search" and p.evaluation.status == "ok"]
    pairs = [(each[stand_in], each[metric]) for each in metrics if stand_in in each and metric in each]
    if stand_in == metric or not pairs or any(len(set(values)) < 3 for values in zip(*pairs, strict=True)):
        return None
    correlation = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return {"stand_in": stand_in, "metric": metric, "spearman": correlation, "candidates": len(pairs)}


def mixed(ranking: Ranking, top: int) -> bool:
    """Whether candidates as cut and fine-tuned ones are both among the best ``top``."""
    return len({past.tuned for _, past in ranking.rows[:top]}) > 1


def ranking_rows(ranking: Ranking, top: int) -> list[tuple[str, ...]]:
    """Rows of the printed table: rank, candidate, weights, accuracy, MACs, latency, reward, on the front."""
    metric, reference = ranking.metric, ranking.reference
    rows: list[tuple[str, ...]] = []
    for i, (reward, past) in enumerate(ranking.rows[:top]):
        evaluation = past.evaluation
        latency = evaluation["latency_ratio"]
        rows.append(
            (
                str(i + 1),
                " ".join(dict.fromkeys((past.stage, past.candidate.origin, str(past.candidate.id)))),
                past.weights,
                f"{evaluation[metric]:.2%}",
                f"{evaluation['macs'] / reference['macs']:.3f}",
                "-" if latency != latency else f"{latency:.3f}",
                f"{reward:.4g}",
                "front" if i in ranking.front else "",
            )
        )
    return rows
