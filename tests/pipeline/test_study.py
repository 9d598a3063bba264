"""Replay is resume: a study answered from its journal asks nobody twice and ends the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import JournalError
from pipeline.journal import Journal
from pipeline.study import Study
from pruning.plan import ChannelGroup, PruningPlan, SearchSpace
from pruning.search import ccep
from pruning.search.protocol import Archive, Candidate, Evaluation, FineTuned, Problem, Target

GROUPS = (ChannelGroup("a", 8), ChannelGroup("b", 12))
WORTH = {"a": np.linspace(1, 2, 8), "b": np.linspace(2, 1, 12)}


class KilledError(Exception):
    """The process ends here."""


class FakeOracle:
    """Accuracy = worth of the kept channels; dies after ``lives`` answers."""

    def __init__(self, lives: float = float("inf"), keeps_checkpoints: bool = True) -> None:
        self.lives, self.keeps, self.asked, self.trained = lives, keeps_checkpoints, 0, 0

    def evaluate(self, candidate: Candidate, latency: bool) -> Evaluation:
        if self.asked >= self.lives:
            raise KilledError
        self.asked += 1
        worth = sum(float(WORTH[name][list(kept)].sum()) for name, kept in candidate.plan.kept.items())
        macs = float(sum(candidate.plan.widths.values()))
        return Evaluation(metrics={"top1": worth / 100, "macs": macs, "params": macs, "latency_ratio": macs / 20})

    def finetune(self, candidate: Candidate, epochs: float) -> tuple[FineTuned, Mapping[str, str]]:
        self.trained += 1
        return FineTuned(f"base-{candidate.id}", self.evaluate(candidate, True)), {"path": "x", "sha256": "y"}

    def restore(self, base: str, plan: PruningPlan, checkpoint: Mapping[str, str]) -> bool:
        return self.keeps

    def score(self, criterion: str, base: str) -> Mapping[str, np.ndarray]:
        return WORTH


def run(folder: Path, oracle: FakeOracle, seed: int = 0, told: list[Any] | None = None) -> Archive:
    space = SearchSpace.of(GROUPS)
    reference = FakeOracle().evaluate(Candidate(0, space.full, "reference"), True)
    macs = lambda plan: float(sum(plan.widths.values()))  # noqa: E731
    problem = Problem(space, reference, lambda e: e["top1"], macs, Target(), np.random.default_rng(seed))
    options = ccep.Options(outer_iterations=2, population=3, generations=2, finetune_epochs=1)
    with Journal(folder / "journal.jsonl", "run", "config") as journal:
        study = Study(journal, oracle, (told if told is not None else []).append)
        return study.run(ccep.search(problem, options))


def digests(archive: Archive) -> list[str]:
    return [entry.candidate.plan.digest for entry in archive]


def test_a_killed_search_resumes_to_the_same_archive_re_evaluating_nothing(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = FakeOracle()
    expected = digests(run(tmp_path / "whole", whole))
    for lives in range(0, whole.asked, 3):
        folder = tmp_path / str(lives)
        folder.mkdir()
        first = FakeOracle(lives)
        with pytest.raises(KilledError):
            run(folder, first)
        second = FakeOracle()
        assert digests(run(folder, second)) == expected
        assert first.asked + second.asked == whole.asked


def test_every_candidate_is_told_once_per_process_and_journalled_before(tmp_path: Path) -> None:
    told: list[Any] = []
    oracle = FakeOracle()
    run(tmp_path, oracle, told=told)
    assert len(told) == oracle.asked
    again: list[Any] = []
    run(tmp_path, FakeOracle(lives=0), told=again)
    assert again == told


def test_a_journal_of_another_search_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, FakeOracle(), seed=0)
    with pytest.raises(JournalError, match="start a new run"):
        run(tmp_path, FakeOracle(), seed=1)


def test_a_lost_checkpoint_is_trained_again(tmp_path: Path) -> None:
    expected = digests(run(tmp_path, FakeOracle()))
    oracle = FakeOracle(keeps_checkpoints=False)
    assert digests(run(tmp_path, oracle)) == expected
    assert oracle.trained == 2
