"""What an exported file is: its digest, its interface, where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import onnx

from secateur.export.errors import ExportError


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Args:
        shape: one entry per dimension; a string names a dynamic one.
        dtype: NumPy name (``float32``).
    """

    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file that passed the checker.

    Args:
        path: the file.
        sha256: of its bytes.
        opset: of the default operator domain.
        precision: a name of ``secateur.export.quantize.PRECISIONS``.
        inputs: per name, shape and dtype.
        outputs: per name, shape and dtype.
        size_bytes: of the file.
        plan_digest: of the pruning plan; empty for an unpruned model.
    """

    path: Path
    sha256: str
    opset: int
    precision: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    size_bytes: int
    plan_digest: str = ""

    def verify_unchanged(self) -> None:
        """Compare the file with its digest.

        Raises:
            ExportError: the file is gone or another one.
        """
        digest = sha256_of(self.path)
        if digest != self.sha256:
            raise ExportError(f"{self.path} has changed since its export: sha256 {digest}, expected {self.sha256}")

    def to_dict(self) -> dict[str, Any]:
        """Made of JSON's types."""
        return {**asdict(self), "path": str(self.path)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote (also after a trip through JSON).

        Raises:
            ExportError: fields are missing, unknown or of another shape.
        """
        try:
            ports = {
                key: {name: TensorSpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in data[key].items()}
                for key in ("inputs", "outputs")
            }
            return cls(**{**data, **ports, "path": Path(data["path"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"not an exported model written by ExportedModel.to_dict: {error!r}") from error


def describe(path: str | Path, precision: str = "fp32", plan_digest: str = "") -> ExportedModel:
    """Check an ONNX file and describe it.

    Raises:
        ExportError: the file cannot be read or is no valid ONNX model.
    """
    path = Path(path)
    digest = sha256_of(path)
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, OSError) as error:
        raise ExportError(f"{path} is no valid ONNX model: {error}; export it again") from error
    except Exception as error:
        if type(error).__name__ != "DecodeError":  # protobuf's, whose module is no stable name
            raise
        raise ExportError(f"{path} is damaged: {error}; export it again") from error
    return ExportedModel(
        path=path,
        sha256=digest,
        opset=opset_of(model),
        precision=precision,
        inputs=_specs(model.graph.input),
        outputs=_specs(model.graph.output),
        size_bytes=path.stat().st_size,
        plan_digest=plan_digest,
    )


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default operator domain."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _specs(values: Iterable[onnx.ValueInfoProto]) -> dict[str, TensorSpec]:
    specs = {}
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param or int(d.dim_value) for d in tensor.shape.dim)
        specs[value.name] = TensorSpec(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)
    return specs


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}; export it again") from error
