"""Another reward is another ranking of the same journal."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from secateur.pipeline.cli.app import app
from secateur.pipeline.errors import JournalError, UserError
from secateur.pipeline.lifecycle.rescore import front_rows, rescore, write_ranking
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.records import describe
from secateur.pipeline.stages.register import register
from secateur.pipeline.stages.report import report
from secateur.pruning.plan import ChannelGroup, PruningPlan
from secateur.pruning.search.protocol import Candidate
from tests.pipeline.helpers import made_up_facts, tiny_config

FULL = PruningPlan.full([ChannelGroup("a", 8)])


def candidate(i: int, width: int, stage: str, **metrics: float) -> dict[str, Any]:
    described = describe(Candidate(i, FULL.replace({"a": range(width)}), "mutation"))
    evaluation = {"status": "ok", "reason": "", "metrics": {"params": 10.0, **metrics}}
    return {"stage": stage, "kind": "evaluation", "latency": True, "candidate": described, "evaluation": evaluation}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = tiny_config(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "origin.json").write_text(json.dumps({"run_id": "r"}))
    with Journal(tmp_path / "journal.jsonl", "r", config.digest) as journal:
        journal.append(candidate(0, 8, "reference", top1=0.95, macs=100.0, latency_ratio=1.0))
        journal.append(candidate(0, 6, "search", top1=0.94, macs=80.0, latency_ratio=0.5))
        journal.append(candidate(1, 4, "search", top1=0.90, macs=20.0, latency_ratio=0.9))
        journal.append(candidate(2, 3, "search", top1=0.80, macs=30.0, latency_ratio=0.95))
        failed = candidate(3, 2, "search", macs=10.0)
        failed["evaluation"].update(status="failed", reason="x")
        journal.append(failed)
        tuned = {**candidate(0, 4, "final", top1=0.945, macs=20.0, latency_ratio=0.9), "kind": "finetune"}
        journal.append({**tuned, "base": "0-tuned"})
    return tmp_path


def winner(directory: Path, preset: str, **options: float) -> tuple[str, int]:
    past = rescore(directory, preset, options).rows[0][1]
    return past.stage, past.candidate.plan.widths["a"]


def test_the_winner_follows_the_reward_and_nothing_else_changes(directory: Path) -> None:
    before = (directory / "journal.jsonl").read_bytes()
    assert winner(directory, "device", lambda_macs=0.0, lambda_latency=1.0) == ("search", 6)
    assert winner(directory, "rewarded_v2", a0_pp=96.0) == ("final", 4)
    assert (directory / "journal.jsonl").read_bytes() == before


def test_the_front_keeps_what_is_best_in_one_thing_and_marks_it(directory: Path) -> None:
    from secateur.pipeline.run.journal import read_journal

    rows = front_rows(read_journal(directory / "journal.jsonl"), "top1")
    found = [
        (r["stage"], r["weights"], r["candidate"]["id"]) for r in rows
    ]  # the second as cut: only tuned ones beat it
    assert found == [("final", "tuned", 0), ("search", "as cut", 0), ("search", "as cut", 1)]
    assert rows[0]["candidate"]["base"] == "0-tuned"
    ranking = rescore(directory, "device", {})
    assert {ranking.rows[i][1].candidate.id for i in ranking.front} == {0, 1}


def test_the_command_prints_a_ranking_and_writes_the_winners_plan(directory: Path) -> None:
    result = CliRunner().invoke(app, ["rescore", str(directory), "--reward", "mnasnet", "--set", "target_ratio=0.5"])
    assert result.exit_code == 0, result.output
    assert "front" in result.output
    plan = PruningPlan.from_json((directory / "rescore-mnasnet.plan.json").read_text())
    data = json.loads((directory / "rescore-mnasnet.json").read_text())
    assert data["candidates"][0]["candidate"]["digest"] == plan.digest
    assert data["reward"]["options"] == {"target_ratio": 0.5}
    assert {(row["stage"], row["weights"]) for row in data["candidates"]} == {("search", "as cut"), ("final", "tuned")}
    assert "compare each with its kind" in " ".join(result.output.split())
    assert len(data["candidates"]) == 4


def test_programs_are_told_what_the_file_holds_and_where_it_is(directory: Path) -> None:
    told = json.loads(CliRunner().invoke(app, ["rescore", str(directory), "--reward", "mnasnet", "--json"]).stdout)
    file = Path(told.pop("file"))
    assert told == {**json.loads(file.read_text()), "plan": str(directory / "rescore-mnasnet.plan.json")}
    assert Path(told["plan"]).is_file()


def test_it_says_what_is_missing(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="did you mean 'mnasnet'"):
        rescore(directory, "mnasnett", {})
    with pytest.raises(UserError, match="Known: "):
        rescore(directory, "mnasnet", {"alfa": 1})
    with pytest.raises(UserError, match="not a run directory"):
        rescore(tmp_path_factory.mktemp("empty"), "mnasnet", {})
    config = tiny_config(directory, name="fresh")
    (directory / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (directory / "journal.jsonl").unlink()
    with Journal(directory / "journal.jsonl", "r", config.digest):
        pass
    with pytest.raises(UserError, match="secateur resume"):
        rescore(directory, "mnasnet", {})


def test_only_as_many_candidates_are_kept_as_asked(directory: Path) -> None:
    ranking = rescore(directory, "device", {})
    file = write_ranking(directory, "device", {}, ranking, 2)
    assert len(json.loads(file.read_text())["candidates"]) == 2


@pytest.mark.parametrize("stage", [report, register])
def test_a_journal_cut_off_after_the_search_is_found_where_candidates_are_shown(directory: Path, stage: Any) -> None:
    file = directory / "journal.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]))  # the header, the reference, one plan
    config = tiny_config(directory)
    with Journal(file, "r", config.digest) as journal:
        run: Any = SimpleNamespace(journal=journal, directory=directory)
        with pytest.raises(JournalError, match=r"holds 1 candidate of the search, which evaluated 4.*Restore"):
            stage(run, made_up_facts(search={"num_candidates": 4}))


def test_rescore_refuses_a_journal_with_a_line_missing(directory: Path) -> None:
    file = directory / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(JournalError, match="line 3 was written as line 4"):
        rescore(directory, "device", {})


@pytest.mark.parametrize(
    ("metrics", "recorded", "expected"),
    [
        (("miou",), ({"miou": 0.8}, {"miou": 0.7}), "miou"),
        (("miou", "loss_score"), ({"miou": 0.8, "loss_score": 0.5}, {"loss_score": 0.4}), "loss_score"),
        (("miou", "loss_score"), ({"miou": 0.8, "loss_score": 0.5}, {"miou": 0.6, "loss_score": 0.4}), "miou"),
        (("miou",), ({"miou": 0.8, "top1": 0.1}, {"miou": 0.7, "top1": 0.2}), "miou"),
        ((), ({"top1": 0.9}, {"top1": 0.8}), "top1"),  # of an earlier version, which did not write its metric down
        ((), ({"miou": 0.9}, {"miou": 0.8}), None),
        (("miou",), ({"miou": 0.9}, {"top1": 0.8}), None),
    ],
)
def test_candidates_are_compared_by_the_metric_of_the_run(
    directory: Path, metrics: tuple[str, ...], recorded: tuple[dict[str, float], ...], expected: str | None
) -> None:
    file, config = directory / "journal.jsonl", tiny_config(directory)
    file.unlink()
    (directory / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with Journal(file, "r", config.digest, metrics=metrics) as journal:
        journal.append(candidate(0, 8, "reference", macs=100.0, latency_ratio=1.0, **recorded[0]))
        for i, width in enumerate((6, 4)):
            journal.append(candidate(i, width, "search", macs=10.0 * width, latency_ratio=width / 8, **recorded[1]))
    result = CliRunner().invoke(app, ["rescore", str(directory), "--reward", "device"])
    if expected is None:
        assert isinstance(result.exception, UserError)
        assert "cannot be compared" in str(result.exception)
    else:
        assert result.exit_code == 0, result.output
        assert rescore(directory, "device", {}).metric == expected
        assert f"{recorded[1][expected]:.2%}" in result.output
