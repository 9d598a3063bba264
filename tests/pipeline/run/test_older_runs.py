"""Runs that an older version of Secateur began are read, and not continued; the error says what to do instead."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from secateur.pipeline.errors import OlderRunError
from secateur.pipeline.lifecycle.rescore import rescore
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.journal import Journal, Record, read_journal
from secateur.pipeline.run.run import Run, create_run_directory
from tests.pipeline.helpers import tiny_config
from tests.pipeline.lifecycle.test_rescore import candidate


def write_as(journal: Path, records: list[Record], number: int) -> None:
    """The records as a journal of an older format: numbered from format 3 on."""
    lines = []
    for place, record in enumerate(records, start=1):
        told = {**({"line": place} if number > 2 else {}), **record}
        body = json.dumps(told if place > 1 else {**told, "format": number}, separators=(",", ":"))
        lines.append(f'{body[:-1]},"crc":{zlib.crc32(body.encode())}}}\n')
    journal.write_text("".join(lines))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has evaluated a candidate."""
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    config = tiny_config(tmp_path)
    directory = create_run_directory(config)
    with Journal(directory / "journal.jsonl", directory.name, config.digest, metrics=["top1"]) as journal:
        journal.append(candidate(0, 8, "reference", top1=0.95, macs=100.0, latency_ratio=1.0))
        journal.append(candidate(0, 6, "search", top1=0.94, macs=80.0, latency_ratio=0.5))
    return directory


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_run_of_an_older_format_is_rescored_and_not_continued(directory: Path, number: int) -> None:
    file = directory / "journal.jsonl"
    write_as(file, read_journal(file), number)
    before = file.read_bytes()
    assert rescore(directory, "device", {}).rows[0][1].candidate.id == 0
    with pytest.raises(OlderRunError, match=rf"format {number}, this version continues format 5.*`secateur rescore`"):
        Run(directory, Silent())
    assert file.read_bytes() == before


def test_a_run_is_not_continued_where_a_default_of_its_method_has_changed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.pipeline.run import run as module

    file = directory / "journal.jsonl"
    file.unlink()
    with Run(directory, Silent()) as begun:
        options = begun.journal.records[0]["options"]
    assert options["finetune_epochs"] == 1 and options["outer_iterations"] == 2
    assert len(options) > 4  # those that the run file leaves to their defaults as well
    name = next(name for name, value in options.items() if isinstance(value, float))
    monkeypatch.setattr(module, "asdict", lambda _: {**options, name: 123.0})
    with pytest.raises(OlderRunError, match=rf"{options[name]} for search\.options\.{name}.*go on with 123\.0"):
        Run(directory, Silent())
