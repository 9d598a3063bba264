"""Plans go on to fine-tuning in the order of accuracies that all come from float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.pipeline.run.journal import Journal, read_journal
from secateur.pipeline.run.ranking import PER_PLACE, rank_exactly
from secateur.pipeline.run.study import Study
from secateur.pruning.plan import ChannelGroup, PruningPlan
from secateur.pruning.search.protocol import Candidate, Entry, Evaluation

GROUP = ChannelGroup("a", 40)
FULL = PruningPlan.full([GROUP])
FAST, EXACT = "PyTorch with batch norm folded, bf16", "ONNX Runtime, fp32"


def accuracy(candidate: Candidate) -> float:
    return candidate.plan.widths["a"] / 40


class Oracle:
    """Knows exact accuracies; ends the process after ``lives`` answers."""

    def __init__(self, lives: float = float("inf"), fails: Callable[[Candidate], bool] = lambda _: False) -> None:
        self.lives, self.fails, self.asked = lives, fails, []  # type: ignore[var-annotated]
        self.spent = {"images_forwarded": 0, "images_trained": 0, "measurements": 0}

    def exact(self, candidate: Candidate, precision: str = "fp32") -> Evaluation:
        if len(self.asked) >= self.lives:
            raise KeyboardInterrupt
        self.asked.append(candidate.plan.widths["a"])
        if self.fails(candidate):
            return Evaluation("failed", "out of memory", {"macs": 1.0}, EXACT)
        return Evaluation("ok", "", {"top1": accuracy(candidate), "seconds": 9.0}, EXACT)

    def remember(self, *_: Any, **__: Any) -> None: ...


def archive(number: int) -> list[Entry]:
    """Widths 1, 2, ...: the fast pass finds each one as good as the next but one, so that neighbours change places."""
    entries = []
    for width in range(1, number + 1):
        candidate = Candidate(width, FULL.replace({"a": range(width)}), "x")
        found = {"top1": (width + (2 if width % 2 else 0)) / 40, "latency_ratio": 0.5, "seconds": 1.0}
        entries.append(Entry(candidate, Evaluation("ok", "", found, FAST)))
    return entries


def merit_against(reference: Evaluation) -> Callable[[Evaluation], tuple[bool, float]]:
    return lambda evaluation: (True, evaluation["top1"] - reference["top1"])


def ranked(folder: Path, oracle: Oracle, entries: list[Entry], top: int = 1) -> tuple[list[Entry], Evaluation]:
    reference = Evaluation("ok", "", {"top1": 0.9, "p50_ms": 3.0}, FAST)
    with Journal(folder / "journal.jsonl", "run", "config") as journal:
        study = Study(journal, oracle, stage="ranking")  # type: ignore[arg-type]
        return rank_exactly(study, entries, reference, FULL, top, merit_against)


def widths(entries: list[Entry]) -> list[int]:
    return [entry.candidate.plan.widths["a"] for entry in entries]


def test_the_best_and_the_reference_are_scored_again_and_ordered_by_that(tmp_path: Path) -> None:
    oracle = Oracle()
    found, reference = ranked(tmp_path, oracle, archive(9), top=1)
    assert oracle.asked == [40, 9, 7, 8, 5]  # the reference, then as the fast pass has them
    assert widths(found) == [9, 8, 7, 5, 6, 3, 4, 1, 2]
    assert [entry.evaluation.forward for entry in found] == [EXACT] * PER_PLACE + [FAST] * 5
    assert (reference["top1"], reference["p50_ms"], reference.forward) == (1.0, 3.0, EXACT)
    best = found[0].evaluation
    assert (best["top1"], best["latency_ratio"], best["seconds"]) == (9 / 40, 0.5, 1.0)  # all else stays as it was


def test_four_distinct_plans_for_each_that_is_fine_tuned_and_never_the_full_one(tmp_path: Path) -> None:
    twins = [
        Entry(Candidate(100 + e.candidate.id, e.candidate.plan, "y", (), "tuned"), e.evaluation) for e in archive(12)
    ]
    full = Entry(Candidate(0, FULL, "full"), Evaluation("ok", "", {"top1": 2.0}, FAST))
    oracle = Oracle()
    found, _ = ranked(tmp_path, oracle, [full, *archive(12), *twins], top=2)
    assert len(set(oracle.asked) - {40}) == 2 * PER_PLACE
    assert len(oracle.asked) == 1 + 2 * 2 * PER_PLACE
    assert len(found) == 25


@pytest.mark.parametrize("lives", range(6))
def test_a_kill_costs_the_evaluation_in_flight_and_nothing_else(tmp_path: Path, lives: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = ranked(tmp_path / "whole", Oracle(), archive(9))
    first, second = Oracle(lives), Oracle()
    if lives < PER_PLACE + 1:
        with pytest.raises(KeyboardInterrupt):
            ranked(tmp_path, first, archive(9))
    else:
        ranked(tmp_path, first, archive(9))
    assert ranked(tmp_path, second, archive(9)) == whole
    assert len(first.asked) + len(second.asked) == PER_PLACE + 1
    kinds = [record["kind"] for record in read_journal(tmp_path / "journal.jsonl") if record.get("stage") == "ranking"]
    assert kinds == ["exact"] * (PER_PLACE + 1)


def test_a_plan_that_fails_in_float32_is_not_fine_tuned(tmp_path: Path) -> None:
    found, _ = ranked(tmp_path, Oracle(fails=lambda candidate: candidate.plan.widths["a"] == 9), archive(9))
    assert 9 not in widths(found)
    assert len(found) == 8
