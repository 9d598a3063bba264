"""Files by their content, and the one door through which files are written.

A file appears whole or not at all, whatever ends the process that writes it, and however many processes write the same
one. Its content is first written beside its place, under a name that nobody else has; a lock on that file, which the
kernel frees with the process, tells whether somebody still writes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path

from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.foreign import FAILURES

PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
"""Names of files that are being written."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_swept: set[Path] = set()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file so that it has its old content or its new one at any moment; it is on disk when this returns.

    What dead processes left unfinished in its folder is removed when this process first writes there.

    Raises:
        SurroundingsError: the disk is full, fails, or may not be written to; names the file and how much it needs.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _swept:
            sweep_parts(path.parent)
            _swept.add(path.parent)
        part, file = _new_part(path)
        try:
            _write_all(file, data)
            os.fsync(file)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        _sync_folder(path.parent)
    except OSError as error:
        raise _failure(path, len(data), error) from error


def sweep_parts(folder: Path) -> list[Path]:
    """Remove the files in a folder that a process began to write and did not live to finish; returns them."""
    removed = []
    with contextlib.suppress(OSError):
        for part in [entry for entry in folder.iterdir() if PART.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                file = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is being written
                    part.unlink()
                    removed.append(part)
                finally:
                    os.close(file)
    return removed


def _new_part(path: Path) -> tuple[Path, int]:
    """A new, locked file beside a path, and its descriptor."""
    while True:
        part = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.part")
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can sweep there either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return part, file
        os.close(file)  # swept by another process before it was locked


def _write_all(file: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _sync_folder(folder: Path) -> None:
    """Have the new name on disk too; some file systems cannot."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _failure(path: Path, size: int, error: OSError) -> SurroundingsError:
    from secateur.device_profiles.wording import printable

    needs = f"it needs {_amount(size)}"
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            needs += f", {_amount(shutil.disk_usage(path.parent).free)} are free"
    fix = FAILURES.get(error.errno or 0, "see whether its folder can be written to")
    return SurroundingsError(f"cannot write {printable(path)} ({needs}): {error.strerror or error}; {fix}")


def _amount(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size:,} bytes"
