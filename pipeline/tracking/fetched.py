"""A version's files, once they are here: whoever reads one reads it through this module.

That a file is the one that was registered says nothing of what is in it. Each has a kind, and is that or is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from secateur.device_profiles.wording import printable
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
        model = onnx.load_model(file, load_external_data=False)
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
            raise VersionError(
                f"{file.name} reads its weights from other files, which no version of ours does: refused"
            )
        onnx.checker.check_model(model)
    except VersionError:
        raise
    except (DecodeError, onnx.checker.ValidationError, ValueError, RecursionError) as error:
        text = (str(error).splitlines() or ["it is damaged"])[0]
        raise VersionError(f"{file.name} is no valid ONNX model: {printable(text)}") from error


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a protobuf message, at any depth."""
    for described, value in message.ListFields():
        if described.message_type is None:
            continue
        parts = value if hasattr(value, "__len__") else [value]
        if described.message_type.name == "TensorProto":
            yield from parts
        else:
            for part in parts:
                yield from _tensors(part)
