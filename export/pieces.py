"""A serialised ONNX model in pieces, so that no weight is copied before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from secateur.export.errors import TemplateError

Array = npt.NDArray[Any]
Pieces = list[bytes | memoryview]
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5  # field numbers in onnx.proto, fixed for ever by protobuf's rules
_TENSOR_RAW_DATA = 9


def model(rest: bytes, nodes: onnx.GraphProto, initializers: Pieces) -> Pieces:
    """A model.

    Args:
        rest: the serialised model without its graph.
        nodes: its graph without initializers.
        initializers: what ``initializer`` gave for each of them.
    """
    return [rest, *_field(_MODEL_GRAPH, [nodes.SerializeToString(), *initializers])]


def initializer(name: str, array: Array, kind: int) -> Pieces:
    """An initializer of a graph.

    Args:
        kind: its ``data_type``.

    Raises:
        TemplateError: several of its numbers are in one byte.
    """
    head = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
    if array.dtype.kind not in "biuf" and array.dtype.itemsize == 1:  # several numbers in one byte, some of them
        raise TemplateError(f"{name}: initializers of type {onnx.TensorProto.DataType.Name(kind)} cannot be cut")
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = _field(_TENSOR_RAW_DATA, [little.reshape(-1).view(np.uint8).data])
    return _field(_GRAPH_INITIALIZER, [head.SerializeToString(), *data])


def unchanged(tensor: bytes) -> Pieces:
    """An initializer that is serialised already."""
    return _field(_GRAPH_INITIALIZER, [tensor])


def _field(number: int, payload: Sequence[bytes | memoryview]) -> Pieces:
    """A length-delimited field of a protobuf message."""
    return [_varint(number << 3 | 2) + _varint(sum(len(part) for part in payload)), *payload]


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)
