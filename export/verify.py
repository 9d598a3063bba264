"""Does the file compute what the model computes?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from secateur.device_profiles.wording import number_of
from secateur.export.artifact import ExportedModel
from secateur.export.errors import ExportError
from secateur.export.onnx_export import Example, arguments, evaluating, tensors_in

Array = npt.NDArray[Any]
TOLERANCE = 1e-4
"""Relative error up to which two computations are the same, unless told otherwise."""
MAX_INPUT = 1 << 28
"""Numbers of an input that is tried with zeros: a gigabyte."""


@dataclass(frozen=True)
class Parity:
    """Outcome of a comparison of an ONNX file with a torch model.

    Args:
        ok: within the tolerance.
        max_relative_error: ``max |onnx - torch| / max |torch|`` over all samples, of the output where it is largest.
        argmax_agreement: share of rows (last axis of the first output) with the same argmax.
        samples: inputs compared (entries of the first input's first dimension).
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
    batches: Iterable[Array | Example],
    tolerance: float = TOLERANCE,
    threads: int = 1,
) -> Parity:
    """Run both on the same inputs.

    Args:
        exported: a file, or the bytes of one.
        batches: each of the shape the file takes (a static batch size must match); a tuple holds the arguments of
            the forward, which may be nested lists and mappings of tensors.
        tolerance: on the relative error.

    Raises:
        ExportError: ONNX Runtime refuses the model, or there is no batch.
    """
    session = open_session(exported, threads)
    names = [port.name for port in session.get_inputs()]
    errors: list[float] = []
    scales: list[float] = []
    agreed = rows = samples = 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs = arguments(torch.as_tensor(batch) if isinstance(batch, np.ndarray) else batch)
            feed = [x.numpy().copy() for x in tensors_in(inputs)]  # a model may write to its inputs
            if len(feed) != len(names):
                return Parity(
                    False,
                    float("inf"),
                    0.0,
                    samples,
                    f"the file takes {names}, given {number_of(len(feed), 'tensor(s)')}",
                )
            expected = [x.numpy() for x in tensors_in(model(*inputs))]
            outputs = run_session(session, dict(zip(names, feed, strict=True)))
            shapes = [a.shape for a in outputs], [b.shape for b in expected]
            if shapes[0] != shapes[1]:
                return Parity(False, float("inf"), 0.0, samples, f"output shapes {shapes[0]}, expected {shapes[1]}")
            errors = errors or [0.0] * len(outputs)
            scales = scales or [0.0] * len(outputs)
            for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
                errors[i] = float(np.maximum(errors[i], _largest(np.subtract(a, b, dtype=np.float64))))  # keeps NaN
                scales[i] = max(scales[i], _largest(b))
            if outputs and outputs[0].ndim and outputs[0].size:
                same = outputs[0].argmax(-1) == expected[0].argmax(-1)
                agreed, rows = agreed + int(np.sum(same)), rows + np.size(same)
            samples += len(feed[0]) if feed and feed[0].ndim else 1
    if not samples:
        raise ExportError("no parity without data: give at least one batch")
    floor = max(1e-12, 1e-6 * max(scales, default=0.0))  # an output of zeros has no scale of its own
    relative = float(np.max([e / max(s, floor) for e, s in zip(errors, scales, strict=True)], initial=0.0))
    ok = bool(relative <= tolerance)  # NaN compares False
    reason = "" if ok else f"relative error {relative:.2e} exceeds {tolerance:g}"
    return Parity(ok, relative, agreed / rows if rows else 1.0, samples, reason)


def predict(
    model: ExportedModel | str | Path | onnxruntime.InferenceSession,
    inputs: Array,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """First output of an ONNX file for every sample, whatever its batch size (the last batch is padded).

    Args:
        model: a file, or a session of one, which has its own number of threads.
        inputs: shape ``(samples, ...)``.
        progress: called with (samples done, samples in all).

    Returns:
        shape ``(samples, ...)``.

    Raises:
        ExportError: ONNX Runtime refuses the model, or there is no sample.
    """
    if not len(inputs):
        raise ExportError("nothing to predict: no samples")
    session = model if isinstance(model, onnxruntime.InferenceSession) else open_session(model, threads)
    port = session.get_inputs()[0]
    batch = port.shape[0] if isinstance(port.shape[0], int) else 32
    outputs = []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        padding = [(0, batch - len(part))] + [(0, 0)] * (inputs.ndim - 1)
        outputs.append(run_session(session, {port.name: np.pad(part, padding)})[0][: len(part)])
        if progress:
            progress(start + len(part), len(inputs))
    return np.concatenate(outputs)


def rehearse(path: Path) -> None:
    """Run an ONNX file of float32 inputs once, on zeros; open dimensions are 1.

    Raises:
        ExportError: it has other inputs or too large ones, ONNX Runtime refuses it, or it fails.
    """
    session = open_session(path)
    feed = {}
    for port in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in port.shape]
        if port.type != "tensor(float)" or not 0 < math.prod(shape) <= MAX_INPUT:
            raise ExportError(f"{path.name} takes a {port.type} of shape {port.shape}")
        feed[port.name] = np.zeros(shape, np.float32)
    run_session(session, feed)


def run_session(session: onnxruntime.InferenceSession, feed: dict[str, Array]) -> list[Array]:
    """All outputs.

    Raises:
        ExportError: ONNX Runtime cannot run the model.
    """
    try:
        outputs: list[Array] = session.run(None, feed)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ExportError(f"ONNX Runtime cannot run the model: {error}") from error
    return outputs


def _largest(values: Array) -> float:
    """Largest absolute value; 0 of nothing."""
    return float(np.abs(values.astype(np.float64)).max(initial=0.0))
