"""The journal: whole after a crash, loud about damage, safe on a full disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import JournalError
from pipeline.journal import Journal


def journal(path: Path, run: str = "run-1", config: str = "abc") -> Journal:
    return Journal(path / "journal.jsonl", run, config)


def write_some(path: Path, n: int = 5) -> None:
    with journal(path) as opened:
        for i in range(n):
            opened.append({"kind": "evaluation", "stage": "search", "value": i / 3})


def values(path: Path) -> list[float]:
    with journal(path) as opened:
        return [r["value"] for r in opened.records[1:]]


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_some(tmp_path)
    assert values(tmp_path) == [i / 3 for i in range(5)]


def test_a_line_cut_short_at_any_byte_loses_only_itself(tmp_path: Path) -> None:
    write_some(tmp_path)
    file = tmp_path / "journal.jsonl"
    whole = file.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(whole)):
        file.write_bytes(whole[:end])
        assert values(tmp_path) == [i / 3 for i in range(4)]
    write_some(tmp_path, 1)
    assert values(tmp_path) == [0, 1 / 3, 2 / 3, 1, 0]


def test_damage_inside_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    write_some(tmp_path)
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b"0.6666666666666666", b"0.6666666666666667")
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(JournalError, match="line 4 is damaged"):
        journal(tmp_path)


@pytest.mark.parametrize("content", [b"hello\n", b"{}\n", b"[1]\n", b"\x00\xff\n", b"\n"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(JournalError):
        journal(tmp_path)
    assert (tmp_path / "journal.jsonl").read_bytes() == content


@pytest.mark.parametrize("other", [{"run": "run-2"}, {"config": "abd"}])
def test_another_runs_journal_is_refused(tmp_path: Path, other: dict[str, str]) -> None:
    write_some(tmp_path)
    with pytest.raises(JournalError, match="belongs to run run-1"):
        journal(tmp_path, **other)


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    with journal(tmp_path), pytest.raises(JournalError, match="in use"):
        journal(tmp_path)
    write_some(tmp_path, 1)


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """A disk that is full for this process after 2,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield 2000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_journal_whole_and_says_how_to_go_on(tmp_path: Path, file_size_limit: int) -> None:
    with journal(tmp_path) as opened:
        with pytest.raises(JournalError, match="secateur resume"):
            for i in range(1000):
                opened.append({"kind": "evaluation", "value": i})
        written = len(opened.records) - 1
        assert written > 10
    assert values(tmp_path) == list(range(written))
