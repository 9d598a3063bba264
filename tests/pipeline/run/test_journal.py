"""The journal: whole after a crash, loud about damage, safe on a full disk."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.pipeline.errors import JournalError, UserError
from secateur.pipeline.run.journal import Journal, read_journal


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


def rearranged(lines: Sequence[bytes]) -> st.SearchStrategy[list[bytes]]:
    """The lines of a journal, all but the last of them possibly missing, doubled or elsewhere."""
    places = st.lists(st.integers(0, len(lines) - 1), min_size=1, max_size=2 * len(lines))
    return places.map(lambda chosen: [lines[i] for i in chosen])


@given(data=st.data())
def test_lines_that_are_missing_doubled_or_swapped_are_found_by_every_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    write_some(folder)
    file = folder / "journal.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    others = data.draw(rearranged(whole))
    file.write_bytes(b"".join(others))
    if others == whole[: len(others)]:  # cut off after a line, which is what a kill before the next line leaves
        assert len(read_journal(file)) == len(others)
        return
    with pytest.raises(JournalError, match=r"was written as line|is not a Secateur journal"):
        read_journal(file)
    with pytest.raises(JournalError, match=r"was written as line|is not a Secateur journal"):
        journal(folder)
    assert file.read_bytes() == b"".join(others)  # nothing was cut off


def test_the_message_names_the_first_line_that_is_wrong(tmp_path: Path) -> None:
    write_some(tmp_path)
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(JournalError, match=r"line 4 was written as line 5: lines are missing.*before line 4"):
        read_journal(file)


def lines_of(*records: dict[str, object]) -> bytes:
    """Lines as they were written before they had numbers."""
    bodies = [json.dumps(record, separators=(",", ":")) for record in records]
    return b"".join(f'{body[:-1]},"crc":{zlib.crc32(body.encode())}}}\n'.encode() for body in bodies)


@pytest.mark.parametrize(("number", "numbered"), [(2, False), (3, True)])
def test_a_journal_of_an_earlier_version_is_read_and_not_continued(tmp_path: Path, number: int, numbered: bool) -> None:
    records: list[dict[str, object]] = [
        {"kind": "run", "format": number, "run_id": "run-1", "config": "abc", "time": 1.0},
        {"kind": "evaluation", "value": 0.5, "time": 2.0},
    ]
    if numbered:
        records = [{"line": i, **record} for i, record in enumerate(records, start=1)]
    file = tmp_path / "journal.jsonl"
    file.write_bytes(lines_of(*records))
    assert [r.get("value") for r in read_journal(file)] == [None, 0.5]
    with pytest.raises(UserError, match=r"older version of Secateur.*format \d.*secateur run .*run\.yaml"):
        journal(tmp_path)
    assert [r.get("value") for r in read_journal(file)] == [None, 0.5]


def test_a_run_is_not_continued_under_other_options_than_it_was_begun_with(tmp_path: Path) -> None:
    def opened(**options: object) -> Journal:
        return Journal(tmp_path / "journal.jsonl", "run-1", "abc", options=options)

    opened(population=8, operators=("swap", "drop")).close()
    opened(population=8, operators=("swap", "drop")).close()
    with pytest.raises(UserError, match=r"begun with 8 for search\.options\.population.*go on with 16.*secateur run"):
        opened(population=16, operators=("swap", "drop"))
    with pytest.raises(UserError, match=r'begun with "nothing" for search\.options\.patience.*go on with 3'):
        opened(population=8, operators=("swap", "drop"), patience=3)


DEEP = b"[" * 10_000 + b"]" * 10_000


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"kind":"x","deep":' + DEEP + b',"crc":1}',
        b'{"crc":' + b"9" * 5000 + b"}",
    ],
    ids=["lists", "mappings", "within a record", "a number without end"],
)
def test_a_line_nested_too_deep_is_damage(tmp_path: Path, line: bytes) -> None:
    write_some(tmp_path)
    file = tmp_path / "journal.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(JournalError, match="line 7 is damaged"):
        read_journal(file)
    with pytest.raises(JournalError, match="line 7 is damaged"):
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


FULL_DISK = """
import resource, sys
from pathlib import Path
from secateur.pipeline.errors import JournalError
from secateur.pipeline.run.journal import Journal

resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # for this process the disk is full after 2,000 bytes
with Journal(Path(sys.argv[1]), "run-1", "abc") as opened:
    try:
        for i in range(1000):
            opened.append({"kind": "evaluation", "value": i})
    except JournalError as error:
        print(len(opened.records) - 1, error)
"""


def test_a_full_disk_leaves_the_journal_whole_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "journal.jsonl")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    written, message = said.split(" ", 1)
    assert int(written) > 10
    assert f"secateur resume {tmp_path}" in message
    assert values(tmp_path) == list(range(int(written)))
