"""Zip files of others (.npz, .pt): how much they hold is known before anything is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

import psutil

from secateur.pipeline.errors import UserError


def check_archive(path: Path, fix: str, compressed: bool = True) -> None:
    """Look into the directory of a zip file; a file that is none passes, for its reader to say so.

    Unpacking reads no more of an entry than the directory says, so these numbers are a bound.

    Args:
        fix: what to do instead, for the error.
        compressed: False = entries are stored as they are, so that they cannot hold more than the file has.

    Raises:
        UserError: it would not fit into the memory that is free, or holds more than it has bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # no archive, or a damaged one: whoever unpacks it says so
    if not compressed and size > path.stat().st_size:
        raise UserError(f"{path} says that it holds {size:,} bytes but has {path.stat().st_size:,}; {fix}")
    free = psutil.virtual_memory().available
    if size > free:
        raise UserError(f"{path} would take {size:,} bytes of memory and {free:,} are free; {fix}")
