"""What a shell proposes, as it asks for it; and that it is not slow to say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.cli.test_app import Captured, call
from tests.pipeline.cli.test_startup import ALWAYS_LATE, PERFORM, python


def proposed(monkeypatch: pytest.MonkeyPatch, capsys: Captured, line: str) -> list[str]:
    words = line.split(" ")
    monkeypatch.setenv("_SECATEUR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert call(monkeypatch) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("secateur val", ["validate"]),
        ("secateur devices ch", ["check"]),
        ("secateur run --dry", ["--dry-run"]),
        ("secateur explain rewar", ["rewarded_meta", "reward", "reward.preset", "reward.options"]),
        ("secateur explain search.latency.max", ["search.latency.max_error"]),
        ("secateur run x.yaml --set search.latency.max", ["search.latency.max_error="]),
        ("secateur run x.yaml --set search.method=rewar", ["search.method=rewarded_meta"]),
        ("secateur devices check raspberry-pi-5", ["raspberry-pi-5"]),
        ("secateur rescore . --reward tun", ["tunas_abs"]),
        ("secateur list wo", ["workloads"]),
    ],
)
def test_words_are_completed(monkeypatch: pytest.MonkeyPatch, capsys: Captured, line: str, wanted: list[str]) -> None:
    found = proposed(monkeypatch, capsys, line)
    assert set(wanted) <= set(found)
    assert all(word.startswith(line.split(" ")[-1]) for word in found)


def test_runs_are_completed_by_their_path_or_name(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    for name in ("tiny-1", "other-2"):
        (tmp_path / "home" / "runs" / name).mkdir(parents=True)
        (tmp_path / "home" / "runs" / name / "run.yaml").write_text("name: tiny\n")
    runs = tmp_path / "home" / "runs"
    assert set(proposed(monkeypatch, capsys, "secateur resume ")) == {str(runs / "tiny-1"), str(runs / "other-2")}
    monkeypatch.chdir(tmp_path)
    assert proposed(monkeypatch, capsys, "secateur rescore home/runs/t") == ["home/runs/tiny-1"]
    assert proposed(monkeypatch, capsys, "secateur runs show o") == ["other-2"]


@pytest.mark.parametrize("line", ["secateur ", "secateur explain se", "secateur resume "])
def test_completion_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("_SECATEUR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    printed = python("import sys; sys.argv[0] = 'secateur'" + PERFORM)
    assert set(json.loads(printed.splitlines()[-1])) & ALWAYS_LATE == set()
