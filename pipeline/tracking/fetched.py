"""A version's files, once they are here: whoever reads one reads it through this module.

That a file is the one that was registered says nothing of what is in it. Each has a kind, and is that or is refused.
"""

from __future__ import annotations

from pathlib import Path

from secateur.device_profiles.wording import printable
from secateur.export.errors import ExportError
from secateur.export.received import check_received
from secateur.pipeline.archives import check_archive
from secateur.pipeline.errors import UserError, VersionError
from secateur.pipeline.tracking.schemas import Schema, checked, read_json

MAX_TEXT = 64 << 20
"""Bytes of a text; benchmarks of many processes are the largest of ours."""


def text_of(file: Path) -> str | None:
    """A text of a version; None where it has none.

    Raises:
        VersionError: it is no text, or larger than any of ours.
    """
    if not file.is_file():
        return None
    if (size := file.stat().st_size) > MAX_TEXT:
        raise VersionError(f"{file.name} of the version has {size} bytes: more than any should")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VersionError(f"{file.name} of the version is no text in UTF-8: {printable(error)}") from error


def facts_of(file: Path, schema: type[Schema]) -> Schema | None:
    """What a JSON file of a version says; None where it has none.

    Raises:
        VersionError: it is not what that of a version can be.
    """
    text = text_of(file)
    if text is None:
        return None
    try:
        return checked(schema, read_json(text))
    except ValueError as error:
        raise VersionError(f"{file.name} of the version cannot be used: {printable(error)}") from error


def check_files(folder: Path) -> None:
    """Refuse models that are none, and arrays that do not fit into memory, among a version's files.

    Raises:
        VersionError: there are.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".onnx":
            check_onnx(file)
        elif file.suffix == ".npz":
            try:
                check_archive(file, "refused")
            except UserError as error:
                raise VersionError(f"{file.name} of the version cannot be used: {printable(error)}") from error


def check_onnx(file: Path) -> None:
    """Refuse a file that is no ONNX model, or one whose weights are elsewhere (in any file of this machine).

    Raises:
        VersionError: it is.
    """
    try:
        check_received(file)
    except ExportError as error:
        raise VersionError(printable(error)) from error
