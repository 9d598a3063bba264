"""Does the file compute what the model computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from export.artifact import ExportedModel
from export.errors import ExportError
from export.onnx_export import evaluating

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """Outcome of a comparison of an ONNX file with a torch model.

    Args:
        ok: within the tolerance.
        max_relative_error: max |onnx - torch| / max |torch|, over all samples and outputs.
        argmax_agreement: share of rows (last axis of the first output) with the same argmax.
        samples: inputs compared.
        reason: what is wrong; empty when ok.
    """

    ok: bool
    max_relative_error: float
    argmax_agreement: float
    samples: int
    reason: str = ""


def open_session(model: ExportedModel | str | Path | bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """A CPU session.

    Raises:
        ExportError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = model if isinstance(model, bytes) else str(model.path if isinstance(model, ExportedModel) else model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        shown = f"a model of {len(source)} bytes" if isinstance(source, bytes) else source
        raise ExportError(f"ONNX Runtime cannot open {shown}: {error}") from error


def verify_parity(
    exported: ExportedModel | str | Path | bytes,
    model: torch.nn.Module,
    batches: Iterable[Array | torch.Tensor],
    tolerance: float = 1e-4,
    threads: int = 1,
) -> Parity:
    """Run both on the same inputs.

    Args:
        exported: a file, or the bytes of one.
        batches: each of the shape the file takes (a static batch size must match).
        tolerance: on the relative error.

    Raises:
        ExportError: ONNX Runtime refuses the model, or there is no batch.
    """
    session = open_session(exported, threads)
    name = session.get_inputs()[0].name
    error = scale = 0.0
    agreed = rows = samples = 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            x = torch.as_tensor(batch)
            expected = _outputs(model(x))
            found = session.run(None, {name: x.numpy()})
            shapes = [a.shape for a in found], [b.shape for b in expected]
            if shapes[0] != shapes[1]:
                return Parity(False, float("inf"), 0.0, samples, f"output shapes {shapes[0]}, expected {shapes[1]}")
            for a, b in zip(found, expected, strict=True):
                error = float(np.maximum(error, np.abs(a - b).max()))  # unlike max(), keeps NaN
                scale = max(scale, float(np.abs(b).max()))
            same = found[0].argmax(-1) == expected[0].argmax(-1)
            agreed, rows, samples = agreed + int(same.sum()), rows + same.size, samples + len(x)
    if not samples:
        raise ExportError("no parity without data: give at least one batch")
    relative = error / max(scale, 1e-12)
    ok = bool(relative <= tolerance)  # NaN compares False
    reason = "" if ok else f"relative error {relative:.2e} exceeds {tolerance:g}"
    return Parity(ok, relative, agreed / rows, samples, reason)


def predict(
    path: ExportedModel | str | Path,
    inputs: Array,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """First output of an ONNX file for every sample, whatever its batch size (the last batch is padded).

    Args:
        inputs: shape ``(samples, ...)``.
        progress: called with (samples done, samples in all).

    Returns:
        shape ``(samples, ...)``.

    Raises:
        ExportError: ONNX Runtime refuses the model, or there is no sample.
    """
    if not len(inputs):
        raise ExportError("nothing to predict: no samples")
    session = open_session(path, threads)
    port = session.get_inputs()[0]
    batch = port.shape[0] if isinstance(port.shape[0], int) else 32
    outputs = []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        padding = [(0, batch - len(part))] + [(0, 0)] * (inputs.ndim - 1)
        outputs.append(session.run(None, {port.name: np.pad(part, padding)})[0][: len(part)])
        if progress:
            progress(start + len(part), len(inputs))
    return np.concatenate(outputs)


def _outputs(value: Any) -> list[Array]:
    """Tensors of a model's output in the order in which the exporter names them."""
    if isinstance(value, torch.Tensor):
        return [value.numpy()]
    items = value.values() if isinstance(value, dict) else value
    return [array for item in items for array in _outputs(item)]
