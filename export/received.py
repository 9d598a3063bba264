"""ONNX files that somebody else made: what is refused before a device or a library opens them, in a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from secateur.device_profiles.wording import printable
from secateur.export.errors import ExportError

MOST_BYTES = (1 << 31) - 1
"""Of one file: protobuf's own limit."""
SHOWN = 160
"""Characters of what a library says of a file."""


def check_received(file: Path) -> None:
    """Refuse a file that is no ONNX model in one piece, or that claims sizes which nobody can allocate.

    Raises:
        ExportError: it is one; says why and what to do.
    """
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise ExportError(f"{file.name} has {size / 1e9:.1f} GB, and an ONNX file holds 2 GB at most: refused")
        model = onnx.load_model(file, load_external_data=False)
    except OSError as error:
        raise ExportError(f"{file.name} cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError, RecursionError) as error:
        raise ExportError(f"{file.name} is damaged or no valid ONNX model: {_said(error)}; export it again") from error
    if not model.graph.node:
        raise ExportError(f"{file.name} is no valid ONNX model: there is no operator in it; export it again")
    for tensor in _tensors(model):
        _check_tensor(file, tensor)
    for port in model.graph.input:
        _check_port(file, port)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, RecursionError) as error:
        text = f"{file.name} is no valid ONNX model: {_said(error)}; export it again"
        raise ExportError(text) from error


def _check_tensor(file: Path, tensor: Any) -> None:
    """See that a tensor is in the file, and no larger than a file can be.

    Raises:
        ExportError: it is not.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        outside = " outside of its folder" if _leaves(place) else ""
        raise ExportError(
            f"{file.name} reads its weights from other files{outside} ({place[:SHOWN]!r}), and only what is in it is "
            "used: refused; save it as a single file, with onnx.save(..., save_as_external_data=False)"
        )
    _check_size(file, f"tensor {tensor.name[:SHOWN]!r}", tensor.dims, tensor.data_type)


def _check_port(file: Path, port: Any) -> None:
    """See that an input can be allocated, with 1 for sizes that are left open.

    Raises:
        ExportError: it cannot.
    """
    kind = port.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else 1 for d in kind.shape.dim]
    _check_size(file, f"input {port.name[:SHOWN]!r}", dims, kind.elem_type)


def _check_size(file: Path, what: str, dims: Sequence[int], kind: int) -> None:
    try:
        width = helper.tensor_dtype_to_np_dtype(kind).itemsize
    except (KeyError, ValueError, TypeError):
        width = 1  # of a type that the checker refuses, or strings
    if any(d < 0 for d in dims) or prod(dims) * width > MOST_BYTES:
        raise ExportError(
            f"{file.name}: {what} claims the shape {list(dims)[:8]}, more than 2 GB or less than nothing: refused; "
            "export it again"
        )


def _leaves(place: str) -> bool:
    """Whether a path of a model may lead out of its folder, on any system."""
    paths = PurePosixPath(place), PureWindowsPath(place)
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


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


def _said(error: Exception) -> str:
    """The first line of what a library says, without control codes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable((lines or ["it cannot be read"])[0])[:SHOWN].rstrip(".")
