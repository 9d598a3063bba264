"""What is in image files: a digest of each, its size, and whether it can be decoded; remembered between runs.

A file is looked at once. What was found is kept under ``cache`` of SECATEUR_HOME, by the file's path, size, inode and
times of change; a file that differs in any of these is looked at again. The cache only saves time: it may be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from secateur.device_profiles.cores import usable_cores
from secateur.pipeline.errors import UserError
from secateur.pipeline.progress import ProgressView, Report, Silent, silent
from secateur.pipeline.surroundings import home
from secateur.pipeline.workloads.data import decode
from secateur.pipeline.workloads.data.notes import Tally, some

Damaged = Literal["refuse", "leave_out"]
MANY, SAMPLE = 20_000, 1_000
"""Of more files than ``MANY``, a check of a sample decodes about ``SAMPLE`` and reads the headers of the others."""
SILENT = Silent()
AT_ONCE = 32
"""Files that a thread looks at before it reports."""


@dataclass(frozen=True)
class Reading:
    """How thoroughly image files are looked at when data is opened.

    Args:
        progress: where that is shown, for it can take long the first time.
        check: ``all`` = every file is decoded once; ``sample`` = some of them, where there are many; ``none`` = their
            content is known, and whether they can be decoded shows when they are read.
    """

    progress: ProgressView = SILENT
    check: Literal["all", "sample", "none"] = "all"

    def about(self, damaged: Damaged) -> Reading:
        """The same, where it has to be known which files cannot be decoded, because they are left out."""
        return replace(self, check="all") if damaged == "leave_out" and self.check == "none" else self


@dataclass(frozen=True)
class Seen:
    """What is known of an image file.

    Args:
        digest: SHA-256 of its content, 32 bytes; of its name where ``read`` is false.
        size: width and height in pixels, as a person sees it; (0, 0) where that is not known.
        orientation: EXIF's, 1 to 8.
        remarks: keys of ``decode.REMARKS``.
        fault: why it cannot be decoded; empty where it can, or where that was not tried.
        decoded: whether that was tried.
        read: whether its content was read.
    """

    digest: bytes
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    remarks: tuple[str, ...] = ()
    fault: str = ""
    decoded: bool = False
    read: bool = True

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height as they are in the file."""
        return decode.turned_size(self.size, self.orientation)


def look(files: Sequence[Path], reading: Reading, *, sizes: bool = False) -> list[Seen]:
    """What is known of every file, after as much reading as is asked for.

    Args:
        sizes: whether the sizes of the images are needed, also of those that are not decoded.
    """
    stamps = [_stamp(file) for file in files]
    with Cache.opened() as cache:
        known = cache.known(files)
        found = [_current(known.get(_key(file)), stamp) for file, stamp in zip(files, stamps, strict=True)]
        wanted = _wanted(len(files), reading)
        todo = [i for i, seen in enumerate(found) if seen is None or _lacks(seen, i in wanted, sizes)]
        brief = reading.check == "sample" and len(files) > MANY
        with _stage(reading, f"Look at {len(todo):,} image files", len(todo)) as report:

            def task(indices: Sequence[int]) -> list[tuple[int, Seen]]:
                return [(i, _look(files[i], i in wanted, brief, sizes)) for i in indices]

            with ThreadPoolExecutor(usable_cores()) as pool:
                parts = [todo[start : start + AT_ONCE] for start in range(0, len(todo), AT_ONCE)]
                done = faults = 0
                for part in pool.map(task, parts):
                    cache.keep([(files[i], stamps[i], seen) for i, seen in part if seen.read and _settled(stamps[i])])
                    for i, seen in part:
                        found[i] = seen
                        faults += bool(seen.fault)
                    done += len(part)
                    report(done, len(todo), f"{faults} damaged" if faults else "")
    return [seen for seen in found if seen is not None]


def without_damaged(places: Sequence[str], seen: Sequence[Seen], damaged: Damaged, tally: Tally) -> list[int]:
    """The files that can be used, as indices; what is done to their pixels is counted.

    Args:
        places: what each file is called to the user.
        damaged: what is to be done about the others.

    Raises:
        UserError: some cannot be decoded, and they are not to be left out; names the first.
    """
    faults = {place: one.fault for place, one in zip(places, seen, strict=True) if one.fault}
    if faults and damaged == "refuse":
        raise UserError(
            f"cannot read {_told(faults, len(seen))}; remove or replace the file{'s' * (len(faults) > 1)}, or set "
            "workload.data.damaged: leave_out to do without"
        )
    tally.add(
        "image(s) cannot be read and was|were left out", *(f"{place} ({fault})" for place, fault in faults.items())
    )
    for place, one in zip(places, seen, strict=True):
        for remark in one.remarks:
            tally.add(decode.REMARKS[remark], place)
    return [i for i, one in enumerate(seen) if not one.fault]


def _told(faults: Mapping[str, str], num: int) -> str:
    if len(faults) == 1:
        return "image " + ": ".join(*faults.items())
    return f"{len(faults):,} of {num:,} images: {some([f'{place} ({fault})' for place, fault in faults.items()])}"


def read_file(path: Path, grey: bool = False) -> decode.Picture:
    """An image file, decoded.

    Raises:
        UserError: it cannot be; names it.
    """
    with _naming(path):
        return decode.decode(path, grey)


def read_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file as a person sees it; nothing is decoded.

    Raises:
        UserError: it is none; names it.
    """
    with _naming(path):
        return decode.read_header(path).size


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (decode.DecodeError, OSError) as error:
        raise UserError(
            f"cannot read image {path}: {_why(error)}; remove or replace the file, or start a new run with "
            "workload.data.damaged: leave_out"
        ) from error


def kept(key: str, compute: Callable[[], Any]) -> Any:
    """A value of JSON's types that follows from the content named by ``key``; computed once."""
    name = hashlib.sha256(os.fsencode(key)).hexdigest()
    with Cache.opened() as cache:
        found = cache.fact(name)
        if found is None:
            found = compute()
            cache.keep_fact(name, found)
        return found


# -- one file ----------------------------------------------------------------------------------------------------------

CLOCK_STEP_NS = 50_000_000
"""Files that were changed so recently are not remembered: file systems' clocks tick in steps."""
Stamp = tuple[int, int, int, int]
"""Size, inode, and nanoseconds of the last change of content and of the entry: what tells that a file is another."""


def _stamp(file: Path) -> Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None  # whoever reads it says why
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _settled(stamp: Stamp | None) -> bool:
    """Whether a file was last changed long enough ago that another change would give it another time."""
    return stamp is not None and max(stamp[2:]) < time.time_ns() - CLOCK_STEP_NS


def _lacks(seen: Seen, decoding: bool, sizes: bool) -> bool:
    """Whether more has to be known of a file than is remembered."""
    return not seen.decoded and (decoding or (sizes and seen.size == (0, 0)))


def _current(known: tuple[Stamp, Seen] | None, stamp: Stamp | None) -> Seen | None:
    """What is remembered of a file, if it is still that file."""
    return known[1] if known is not None and stamp is not None and known[0] == stamp else None


def _wanted(num: int, reading: Reading) -> range | frozenset[int]:
    """Which files are to be decoded."""
    if reading.check == "none":
        return frozenset()
    if reading.check == "all" or num <= MANY:
        return range(num)
    return range(0, num, max(1, num // SAMPLE))


def _look(file: Path, decoding: bool, brief: bool, sizes: bool) -> Seen:
    """Read a file once: digest, and header and pixels if they are asked for; only the header if it is to be brief."""
    named = hashlib.sha256(os.fsencode(file)).digest()
    if _is_special(file):
        return Seen(named, fault="it is a pipe, a socket or a device, and no file", decoded=True, read=False)
    try:
        if brief and not decoding:
            header = decode.read_header(file)
            return Seen(named, header.size, header.orientation, read=False)
        content = file.read_bytes()
    except (decode.DecodeError, OSError) as error:
        return Seen(named, fault=_why(error), decoded=True, read=False)
    seen = Seen(hashlib.sha256(content).digest(), decoded=decoding)
    try:
        if not decoding and not sizes:
            return seen
        if not decoding:
            header = decode.read_header(content)
            return replace(seen, size=header.size, orientation=header.orientation)
        picture = decode.decode(content)
    except decode.DecodeError as error:
        return replace(seen, fault=str(error), decoded=True)
    return replace(seen, size=picture.image.size, orientation=picture.orientation, remarks=picture.remarks)


def _is_special(file: Path) -> bool:
    """Whether reading could wait without end; folders and links to nowhere fail at once, each in its own words."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is a link to a file that does not exist, or was removed"
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


def _key(file: Path) -> bytes:
    return os.fsencode(file.absolute())


@contextlib.contextmanager
def _stage(reading: Reading, title: str, num: int) -> Iterator[Report]:
    """Progress, where it is worth showing."""
    if num < AT_ONCE * 4:
        yield silent
        return
    with reading.progress.stage(title) as report:
        yield report


# -- what is remembered ------------------------------------------------------------------------------------------------


class Cache:
    """What was found in files, in a SQLite file; one that cannot be used is done without.

    Args:
        connection: None = nothing is remembered.
    """

    TABLES = f"""
        CREATE TABLE IF NOT EXISTS files_{decode.VERSION} (
            path BLOB PRIMARY KEY, bytes INT, inode INT, changed INT, entry INT,
            digest BLOB, wide INT, high INT, orientation INT, remarks TEXT, fault TEXT, decoded INT
        ) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
    """

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        self.connection = connection

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[Cache]:
        """The cache of this SECATEUR_HOME, made where there is none."""
        connection = _connect(home() / "cache" / "images.sqlite")
        try:
            yield cls(connection)
        finally:
            if connection is not None:
                connection.close()

    def known(self, files: Sequence[Path]) -> dict[bytes, tuple[Stamp, Seen]]:
        """By path, what is remembered of files in the folders that these files share."""
        if self.connection is None or not files:
            return {}
        try:
            parent = os.path.commonpath([_key(folder) for folder in {file.parent for file in files}])
            rows = self.connection.execute(
                f"SELECT * FROM files_{decode.VERSION} WHERE path >= ? AND path < ?",  # noqa: S608  our own number
                (parent, parent + b"\xff"),
            )
            return {row[0]: ((row[1], row[2], row[3], row[4]), _seen(row)) for row in rows}
        except (sqlite3.Error, ValueError):
            return {}

    def keep(self, rows: Sequence[tuple[Path, Stamp | None, Seen]]) -> None:
        """Remember what was found in files."""
        values = [
            (_key(file), *(stamp or ()), s.digest, *s.size, s.orientation, " ".join(s.remarks), s.fault, int(s.decoded))
            for file, stamp, s in rows
        ]
        marks = ", ".join("?" * 12)
        self._write(f"INSERT OR REPLACE INTO files_{decode.VERSION} VALUES ({marks})", values)  # noqa: S608

    def fact(self, key: str) -> Any:
        """A remembered value; None where there is none."""
        if self.connection is None:
            return None
        with contextlib.suppress(sqlite3.Error, ValueError):
            row = self.connection.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])
        return None

    def keep_fact(self, key: str, value: Any) -> None:
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", [(key, json.dumps(value))])

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self.connection is not None:
            with contextlib.suppress(sqlite3.Error), self.connection:
                self.connection.executemany(statement, rows)


def _seen(row: Sequence[Any]) -> Seen:
    return Seen(row[5], (row[6], row[7]), row[8], tuple(row[9].split()), row[10], bool(row[11]))


def _connect(path: Path) -> sqlite3.Connection | None:
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=20)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(Cache.TABLES)
            return connection
        except sqlite3.OperationalError:
            return None  # locked, or a folder that cannot be written to
        except sqlite3.DatabaseError:  # no database, or a damaged one
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:
            return None
    return None
