"""The one memory of a run: an append-only file of JSON lines, each on disk before anybody acts on it.

Replaying the journal is resuming the run (``study.py``), delivering it is tracking (``tracking.py``), and re-scoring
it is choosing another winner. A line carries its number and a checksum; a last line cut short by a crash is dropped on
opening (that was the evaluation in flight), any other damage is an error, and so are lines that are missing, doubled or
out of order. Journals of formats 2 to 4 are read; they cannot be continued, for methods would ask other questions or
give them other digests. Those of format 2 have no numbers.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.device_profiles.wording import command
from secateur.pipeline.errors import JournalError, OlderRunError

FORMAT, UNNUMBERED = 5, 2
READABLE = (FORMAT, 4, 3, UNNUMBERED)
NOT_THERE = "nothing"
"""What an option is said to be that one of two versions does not have."""
Record = Mapping[str, Any]


class Journal:
    """An open journal; hold one per run directory (a second opener is refused).

    Args:
        path: the ``journal.jsonl`` of a run directory; created if missing.
        run_id: which run it must belong to.
        config_digest: which configuration it must have been written under.
        data: fingerprint of the data it must have been written about; empty = not asked.
        metrics: the accuracies that its candidates have, the one that counts first; a new journal writes them down.
        options: of the search method, defaults included, which it must have been written under; None = not asked.

    Raises:
        JournalError: in use, damaged, of another run, configuration or data, or not writable.
        OlderRunError: an older version of Secateur began it, or this version's method would search with other options.
    """

    def __init__(
        self,
        path: Path,
        run_id: str,
        config_digest: str,
        data: str = "",
        metrics: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.metrics = path, tuple(dict.fromkeys(metrics))
        self.options = None if options is None else json.loads(json.dumps(options))
        self.records: list[Record] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise JournalError(f"cannot open journal {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise JournalError(f"{path} is in use by another process; wait for that run to end, or end it") from error
        try:
            self._load(run_id, config_digest, data)
        except BaseException:
            os.close(self._fd)
            raise

    def _load(self, run_id: str, config_digest: str, data: str) -> None:
        content = self.path.read_bytes()
        self.records, good = _parse(content, self.path)
        if good < len(content):
            os.ftruncate(self._fd, good)
        if not self.records:
            header = {"kind": "run", "format": FORMAT, "run_id": run_id, "config": config_digest}
            told = {"data": data, "metrics": list(self.metrics), "options": self.options}
            self.append({**header, **{name: value for name, value in told.items() if value}})
            return
        first = self.records[0]
        require_format(self.path, first)
        if first.get("run_id") != run_id or first.get("config") != config_digest:
            raise JournalError(
                f"{self.path} belongs to run {first.get('run_id')} with configuration {first.get('config')}, "
                f"not to run {run_id} with configuration {config_digest}; "
                "start a new run with `secateur run`, or restore the run directory's own run.yaml"
            )
        if data and first.get("data", data) != data:
            raise JournalError(
                f"{self.path} was written about other data ({first['data']}) than {data}; restore the run directory's "
                "own files, or start a new run with `secateur run`"
            )
        self._require_options(first.get("options", {}))

    def _require_options(self, recorded: Mapping[str, Any]) -> None:
        if self.options is None:
            return
        for name in dict.fromkeys((*recorded, *self.options)):
            before, now = (json.dumps(options.get(name, NOT_THERE)) for options in (recorded, self.options))
            if before != now:
                raise OlderRunError(
                    f"the run was begun with {before} for search.options.{name}, and this version of Secateur would "
                    f"go on with {now}: a default has changed. {_anew(self.path)}"
                )

    def append(self, record: Record) -> Record:
        """Write one record and wait until it is on disk; returns it as stored (with its time).

        Raises:
            JournalError: the disk is full or failing; the journal is left whole, without this record.
        """
        stored = {**record, "time": round(time.time(), 3)}
        line = _encode({"line": len(self.records) + 1, **stored})
        before = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, before)
            raise JournalError(
                f"cannot write to {self.path}: {error.strerror}; everything before is safe. "
                f"Free some space and run: {command('secateur', 'resume', self.path.parent)}"
            ) from error
        self.records.append(stored)
        return stored

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> list[Record]:
    """The records of a journal, without opening it for writing; a run may be going on in it.

    Raises:
        JournalError: it cannot be read, is damaged, or is of another format.
    """
    try:
        records, _ = _parse(path.read_bytes(), path)
    except OSError as error:
        raise JournalError(f"cannot read journal {path}: {error.strerror}") from error
    if not records:
        raise JournalError(f"{path} holds no record yet")
    return records


def _parse(content: bytes, path: Path) -> tuple[list[Record], int]:
    """The whole records of a journal, and where the last of them ends.

    Raises:
        JournalError: it is damaged, of another format, or its lines are not all there in their order.
    """
    records: list[Record] = []
    good = start = 0
    numbered = True
    for number, line in enumerate(content.split(b"\n"), start=1):
        end = start + len(line) + 1
        if end > len(content):  # no newline: the write was cut short
            break
        record = _decode(line, path, number)
        if number == 1:
            numbered = _is_numbered(record, path)
        if numbered and (found := record.pop("line", None)) != number:
            raise JournalError(
                f"{path}, line {number} was written as line {found}: lines are missing, doubled or out of order; "
                f"restore the file from a copy, or cut it off before line {number} to repeat the work from there"
            )
        records.append(record)
        good = start = end
    return records, good


def _is_numbered(header: Record, path: Path) -> bool:
    """Whether the lines of a journal with this first line carry numbers.

    Raises:
        JournalError: it is no first line, or of a format that this version does not know.
    """
    if header.get("kind") == "run" and header.get("format") in READABLE:
        return bool(header["format"] != UNNUMBERED)
    said = f"its first line is of kind {header.get('kind')!r}, format {header.get('format')!r}"
    raise JournalError(
        f"{path} is not a Secateur journal of format {FORMAT} ({said}); restore the file from a copy, or use a new run "
        "directory"
    )


def require_format(path: Path, header: Record) -> None:
    """See that a journal can be continued.

    Raises:
        OlderRunError: it was begun by an older version of Secateur.
    """
    if header["format"] != FORMAT:
        raise OlderRunError(
            f"{path.parent} was begun by an older version of Secateur (its journal has format {header['format']}, this "
            f"version continues format {FORMAT}) and cannot be continued. Its report stays as it is, and `secateur "
            f"rescore` and `secateur finish` still read it. {_anew(path)}"
        )


def _anew(path: Path) -> str:
    return f"Start it anew with: {command('secateur', 'run', path.parent / 'run.yaml')}"


def _encode(record: Record) -> bytes:
    body = json.dumps(record, separators=(",", ":"))
    return f'{body[:-1]},"crc":{zlib.crc32(body.encode())}}}\n'.encode()


def _decode(line: bytes, path: Path, number: int) -> dict[str, Any]:
    damaged = JournalError(
        f"{path}, line {number} is damaged; restore the file from a copy, or cut it off before line {number} "
        "to repeat the work from there"
    )
    try:
        record = json.loads(line)
        crc = record.pop("crc")
        whole = zlib.crc32(json.dumps(record, separators=(",", ":")).encode()) == crc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if not whole:
        raise damaged
    return dict(record)
