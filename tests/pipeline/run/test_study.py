"""Replay is resume: a study answered from its journal asks nobody twice and ends the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.pipeline.errors import JournalError
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.records import request_of
from secateur.pipeline.run.study import Study
from secateur.pruning.plan import ChannelGroup, PruningPlan, SearchSpace
from secateur.pruning.search.methods import ccep
from secateur.pruning.search.protocol import (
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
    Goal,
    Left,
    MaskedLoss,
    Problem,
    Remaining,
    Score,
    Strategy,
    Time,
)

GROUPS = (ChannelGroup("a", 8), ChannelGroup("b", 12))
WORTH = {"a": np.linspace(1, 2, 8), "b": np.linspace(2, 1, 12)}


class KilledError(Exception):
    """The process ends here."""


class FakeOracle:
    """Accuracy = worth of the kept channels; dies after ``lives`` answers."""

    def __init__(self, lives: float = float("inf"), keeps_checkpoints: bool = True) -> None:
        self.lives, self.keeps, self.asked, self.trained = lives, keeps_checkpoints, 0, 0
        self.announced: list[list[int]] = []
        self.remembered: list[tuple[int, str, bool]] = []

    @property
    def spent(self) -> Mapping[str, int]:
        macs = {"image_macs": 10 * self.asked + 300 * self.trained}
        return {"images_forwarded": 10 * self.asked, "images_trained": 100 * self.trained, "measurements": 0, **macs}

    def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation:
        if self.asked >= self.lives:
            raise KilledError
        self.asked += 1
        worth = sum(float(WORTH[name][list(kept)].sum()) for name, kept in candidate.plan.kept.items())
        macs = float(sum(candidate.plan.widths.values()))
        return Evaluation(metrics={"top1": worth / 100, "macs": macs, "params": macs, "latency_ratio": macs / 20})

    def ahead(self, candidates: Sequence[Candidate], latency: bool, floor: float | None = None) -> None:
        self.announced.append([candidate.id for candidate in candidates])

    def remember(self, candidate: Candidate, latency: bool, evaluation: Evaluation, *, exact: bool = False) -> None:
        self.remembered.append((candidate.id, candidate.base, exact))

    def finetune(self, request: FineTune) -> tuple[FineTuned, Mapping[str, str]]:
        self.trained += 1
        return FineTuned(f"base-{request.candidate.id}", self.evaluate(request.candidate, True)), {"sha256": "y"}

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, Mapping[str, str]]:
        self.trained += 1
        return AuxiliaryTrained(f"learned-{request.kind}", WORTH, Evaluation(metrics={"top1": 0.5})), {"sha256": "z"}

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        return 300.0

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        return self.keeps

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        return WORTH

    def masked_loss(self, request: MaskedLoss) -> np.ndarray:
        self.asked += 1
        return np.array([float(sum(plan.widths.values())) for plan in request.plans])

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        return {"a": np.array([0.5, np.nan])}

    def time(self, request: Time) -> np.ndarray:
        return np.array([0.1 * i for i, _ in enumerate(request.plans)])


def run(folder: Path, oracle: FakeOracle, seed: int = 0, told: list[Any] | None = None) -> Archive:
    space = SearchSpace.of(GROUPS)
    reference = FakeOracle().evaluate(Candidate(0, space.full, "reference"), True)
    costs = lambda widths: {"macs": widths.sum(axis=1).astype(float)}  # noqa: E731
    problem = Problem(space, reference, lambda e: e["top1"], costs, Goal(), np.random.default_rng(seed))
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


def plan(width: int) -> PruningPlan:
    full = PruningPlan.full(GROUPS)
    return full.replace({"a": range(width)})


def everything(heard: list[Any]) -> Strategy:
    """Asks one request of every kind."""
    one = Candidate(0, plan(4), "x")
    heard.append((yield Evaluate((one,), latency=True, floor=0.1)))
    heard.append((yield FineTune(one, 2.0, (0.25, 0.5), write_back=True, distill=False, latency=False)))
    heard.append((yield AuxiliaryTraining("indicators", 3.0, options={"target": 0.5})))
    heard.append((yield Score("l1", "learned-indicators", plan(3), {"images": 5})))
    heard.append((yield MaskedLoss((plan(1), plan(2)))))
    heard.append((yield Distort(plan(5), ({"a": (0, 1)},))))
    heard.append((yield Time((plan(1), plan(2)))))
    return (Entry(one, heard[0][0]),)


def plain(value: Any) -> Any:
    """An answer as comparable values."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return {n: plain(v) for n, v in value.items()} if isinstance(value, Mapping) else value


def test_every_kind_of_answer_comes_back_from_the_journal_as_it_was_given(tmp_path: Path) -> None:
    heard: list[list[Any]] = [[], []]
    totals = []
    for i, oracle in enumerate((FakeOracle(), FakeOracle(lives=0))):
        with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
            study = Study(journal, oracle)
            study.run(everything(heard[i]))
            totals.append(study.spent)
    first, second = ([plain(a) for a in answers] for answers in heard)
    assert first[:2] == second[:2]
    assert first[2].base == second[2].base and plain(first[2].scores) == plain(second[2].scores)
    np.testing.assert_equal(first[3:], second[3:])
    assert first[4] == [13.0, 14.0]
    assert totals[0] == totals[1]
    assert totals[0]["epochs"] == 5 and totals[0]["evaluations"] == 2
    assert totals[0]["images_trained"] == 200 and totals[0]["images_forwarded"] == 30


def test_a_request_that_differs_in_any_part_is_not_answered_from_the_journal(tmp_path: Path) -> None:
    def asks(request: Any) -> Strategy:
        yield request
        return ()

    pairs = [
        (MaskedLoss((plan(1),)), MaskedLoss((plan(2),))),
        (AuxiliaryTraining("a", 1.0), AuxiliaryTraining("a", 1.0, options={"x": 1.0})),
        (Score("l1"), Score("l1", plan=plan(2))),
        (FineTune(Candidate(0, plan(2), "x"), 1.0), FineTune(Candidate(0, plan(2), "x"), 1.0, write_back=True)),
    ]
    for i, (first, second) in enumerate(pairs):
        (tmp_path / str(i)).mkdir()
        with Journal(tmp_path / str(i) / "journal.jsonl", "run", "config") as journal:
            Study(journal, FakeOracle()).run(asks(first))
        with (
            Journal(tmp_path / str(i) / "journal.jsonl", "run", "config") as journal,
            pytest.raises(JournalError, match="start a new run"),
        ):
            Study(journal, FakeOracle()).run(asks(second))


def greedy(asked: list[int], catch: bool = False) -> Strategy:
    """Never stops asking by itself; three candidates at a time."""
    try:
        for i in range(1_000_000):
            found = yield Evaluate(tuple(Candidate(3 * i + j, plan(1 + j), "x") for j in range(3)))
            asked += [e.status == "ok" for e in found]  # type: ignore[union-attr]
            yield FineTune(Candidate(3 * i + 2, plan(2), "x"), 1.5)
    except BudgetSpent:
        if not catch:
            raise
    return ()


@pytest.mark.parametrize(
    ("budget", "evaluations", "epochs"),
    [(Budget(evaluations=10), 10, 3.0), (Budget(evaluations=3), 3, 0), (Budget(epochs=4), 15, 4.0)],
)
def test_a_budget_is_never_exceeded_and_everything_found_by_then_is_the_archive(
    tmp_path: Path, budget: Budget, evaluations: int, epochs: float
) -> None:
    oracle, asked = FakeOracle(), []  # type: ignore[var-annotated]
    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
        study = Study(journal, oracle, budget=budget)
        archive = study.run(greedy(asked))
    assert oracle.asked == len(archive) == evaluations
    assert study.spent["epochs"] == epochs
    assert sum(bool(e.candidate.base) for e in archive) == oracle.trained  # tuned ones come with their weights
    assert sum(asked) == evaluations - oracle.trained
    with Journal(tmp_path / "other.jsonl", "run", "config") as journal:
        assert Study(journal, FakeOracle(), budget=budget).run(greedy([], catch=True)) == ()


def test_seconds_are_counted_over_replayed_answers(tmp_path: Path) -> None:
    class Slow(FakeOracle):
        def evaluate(self, candidate: Candidate, latency: bool, floor: float | None = None) -> Evaluation:
            import time

            time.sleep(0.02)
            return super().evaluate(candidate, latency, floor)

    counts = []
    for oracle in (Slow(), FakeOracle(lives=0)):
        with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
            counts.append(len(Study(journal, oracle, budget=Budget(seconds=0.1)).run(greedy([]))))
    assert counts[0] == counts[1] <= 5


def test_a_budget_spent_before_anything_was_evaluated_is_said(tmp_path: Path) -> None:
    def only_trains() -> Strategy:
        yield AuxiliaryTraining("indicators", 5.0)
        return ()

    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal, pytest.raises(BudgetSpent, match="5 epochs"):
        Study(journal, FakeOracle(), budget=Budget(epochs=0.4)).run(only_trains())


def test_what_was_learned_beyond_the_seconds_is_still_evaluated_once(tmp_path: Path) -> None:
    class Slow(FakeOracle):
        def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, Mapping[str, str]]:
            import time

            time.sleep(0.05)
            return super().train_auxiliary(request)

    def learns() -> Strategy:
        yield AuxiliaryTraining("indicators", 1.0)
        found: Any = yield Evaluate((Candidate(0, plan(3), "x"), Candidate(1, plan(4), "x")))
        assert [e.status for e in found] == ["ok", "infeasible"]
        yield AuxiliaryTraining("indicators", 1.0)
        return ()

    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
        archive = Study(journal, Slow(), budget=Budget(seconds=0.01)).run(learns())
    assert [entry.candidate.id for entry in archive] == [0]


def test_what_is_neither_in_the_journal_nor_beyond_the_budget_is_announced_at_once(tmp_path: Path) -> None:
    def asks() -> Strategy:
        yield Evaluate(tuple(Candidate(i, plan(1 + i), "x") for i in range(4)))
        yield FineTune(Candidate(4, plan(2), "x"), 1.0)
        yield Evaluate(tuple(Candidate(i, plan(i - 4), "x") for i in range(5, 9)))
        return ()

    budget = Budget(evaluations=7)
    first, second = FakeOracle(lives=2), FakeOracle()
    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal, pytest.raises(KilledError):
        Study(journal, first, budget=budget).run(asks())
    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
        Study(journal, second, budget=budget).run(asks())
    assert first.announced == [[0, 1, 2, 3]]
    assert second.announced == [[2, 3], [5, 6]]
    assert second.remembered == [(0, "", False), (1, "", False)]
    third = FakeOracle(lives=0)
    with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
        Study(journal, third, budget=budget).run(asks())
    assert third.announced == []
    assert (4, "base-4", True) in third.remembered


def closing(heard: list[Any]) -> Strategy:
    """Evaluates one by one until it is refused, then asks for what a last plan needs, and for more."""
    try:
        for i in range(100):
            yield Evaluate((Candidate(i, plan(3), "x"),))
    except BudgetSpent:
        yield Score("l1")
    yield Time((plan(1),))
    heard += yield Evaluate((Candidate(100, plan(1), "last"), Candidate(101, plan(2), "last")))  # type: ignore[misc]
    for request in (Evaluate((Candidate(102, plan(1), "x"),)), FineTune(Candidate(103, plan(1), "x"), 1)):
        try:
            yield request
        except BudgetSpent:
            heard.append("refused")
    return ()


@pytest.mark.parametrize("budget", [Budget(evaluations=4), Budget(evaluations=1), Budget(work=25)])
def test_one_evaluation_is_kept_back_and_granted_once_with_what_it_needs(tmp_path: Path, budget: Budget) -> None:
    heard: list[list[Any]] = [[], []]
    for i, oracle in enumerate((FakeOracle(), FakeOracle(lives=0))):
        with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
            study = Study(journal, oracle, budget=budget, closes=True)
            study.run(closing(heard[i]))
            assert study.spent["evaluations"] == (budget.evaluations or 4)
    assert [getattr(e, "status", e) for e in heard[0]] == ["ok", "infeasible", *["refused"] * 2]
    assert heard[0] == heard[1]


def test_what_is_left_is_told_from_the_records(tmp_path: Path) -> None:
    def asks(heard: list[Any]) -> Strategy:
        heard.append((yield Remaining()))
        yield Evaluate((Candidate(0, plan(3), "x"),))
        yield FineTune(Candidate(1, plan(3), "x"), 0.5)
        heard.append((yield Remaining()))
        return ()

    heard: list[list[Left]] = [[], []]
    budget = Budget(evaluations=11, epochs=2.0, work=3200)
    for i, oracle in enumerate((FakeOracle(), FakeOracle(lives=0))):
        with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
            Study(journal, oracle, budget=budget, closes=True).run(asks(heard[i]))
            assert len(journal.records) == 3  # it is no part of the journal
    first, second = heard[0]
    nothing = dict.fromkeys(("evaluations", "seconds", "epochs", "work"), 0.0)
    assert first == Left(10, math.inf, 2.0, 3200, 1.0, nothing, {"work": 300.0, "seconds": 0.0})
    assert first.trainable() == 2.0 and first.trainable(0.1) == pytest.approx(320 / 300)
    assert (second.evaluations, second.epochs, second.work) == (8, 1.5, 3200 - 320)
    assert second.share == 0.75  # of the epochs
    assert second.rounds(first) == 3
    assert heard[1] == heard[0]


class ByEpoch(FakeOracle):
    """Its trainings take 700 image-MACs and ten seconds an epoch, all else takes nothing."""

    epochs = 0.0

    @property
    def spent(self) -> Mapping[str, int]:
        return {"image_macs": round(700 * self.epochs)}

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        return 700.0

    def finetune(self, request: FineTune) -> tuple[FineTuned, Mapping[str, str]]:
        self.epochs += request.epochs
        return super().finetune(request)

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, Mapping[str, str]]:
        self.epochs += request.epochs
        return super().train_auxiliary(request)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (Budget(epochs=9.0), [None, None]),
        (Budget(epochs=2.5), [None, 0.5]),
        (Budget(work=1750), [None, 0.5]),
        (Budget(seconds=25), [None, 0.5]),
        (Budget(epochs=2.1), [None]),  # less than a tenth of what is asked is of no use
        (Budget(work=700), [1.0]),
    ],
)
@pytest.mark.parametrize("learns", [False, True])
def test_a_training_that_would_overrun_is_shortened_and_a_replay_knows(
    tmp_path: Path, budget: Budget, told: list[float | None], learns: bool
) -> None:
    def trains() -> Strategy:
        for i in range(2):
            if learns:
                yield AuxiliaryTraining("indicators", 2.0, options={"i": i})
            else:
                yield FineTune(Candidate(i, plan(3), "x"), 2.0)
        return ()

    totals = []
    for oracle in (ByEpoch(), ByEpoch(), ByEpoch(keeps_checkpoints=False)):
        with Journal(tmp_path / "journal.jsonl", "run", "config") as journal:
            study = Study(journal, oracle, budget=budget, clock=lambda oracle=oracle: 10 * oracle.epochs)
            if len(told) == 1 and learns:
                with pytest.raises(BudgetSpent, match=r"epochs of training exceed|is spent"):
                    study.run(trains())
            else:
                study.run(trains())
            trained = [record for record in journal.records if "epochs" in record]
        assert [record.get("trained") for record in trained] == told
        assert [request_of(record).epochs for record in trained] == [epochs or 2.0 for epochs in told]
        totals.append((oracle.epochs, study.spent["epochs"]))
    epochs = sum(e or 2.0 for e in told)
    assert totals == [(epochs, epochs), (0, epochs), (epochs, epochs)]  # the last one's weights were lost
