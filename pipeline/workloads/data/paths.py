"""Where the files of a run file are: as given, or under the folder ``SECATEUR_DATA``."""

from __future__ import annotations

import os
from pathlib import Path

from secateur.pipeline.errors import UserError


def under_data(path: str) -> Path:
    """Where a data set is, or is to be downloaded to: as given, or under ``SECATEUR_DATA`` if it is not there.

    Raises:
        UserError: the path cannot be one.
    """
    given, data = _expanded(path), data_folder()
    return given if data is None or given.is_absolute() or _exists(given) else data / path


def find(path: str, what: str) -> Path:
    """A file or folder of the run file: as given, or under ``SECATEUR_DATA``.

    Args:
        what: what it is, for errors.

    Raises:
        UserError: it is in neither place, may not be looked at, or is no file or folder; names both places.
    """
    tried = [_expanded(path)]
    data = data_folder()
    if not tried[0].is_absolute() and data is not None:
        tried.append(data / path)
    for candidate in tried:
        if _exists(candidate):
            if not (candidate.is_file() or candidate.is_dir()):
                raise UserError(f"{candidate} is a pipe, a socket or a device; expected the {what}")
            return candidate
    hint = ""
    if len(tried) == 1 and not tried[0].is_absolute():
        hint = "; paths count from the current folder or the run file's; set SECATEUR_DATA to the folder of your data"
    raise UserError(f"{what} not found: tried {' and '.join(str(p.absolute()) for p in tried)}{hint}")


def find_folder(path: str, what: str) -> Path:
    """The same for a folder.

    Raises:
        UserError: it is not there, or is something else.
    """
    folder = find(path, what)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected the {what}")
    return folder


def read_text(file: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}; it must be a text file in UTF-8") from error


def data_folder() -> Path | None:
    """``SECATEUR_DATA``; None where it is unset or empty."""
    found = os.environ.get("SECATEUR_DATA")
    return _expanded(found) if found else None


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = path.split("/")[0]
        raise UserError(f"{path}: there is no user {user.removeprefix('~')!r} here; write the whole path") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path} cannot be looked at: {error.strerror}; correct the path or its permissions") from error
