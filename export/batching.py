"""Many samples through an ONNX file of one sample a run: by a twin whose batch is wider, proven equal.

A call of ONNX Runtime costs the same for one sample and for many, and the threads of one call share little where it has
one sample. The twin has the file's own nodes and weights; only its batch axis is wider, and the first entry of constant
``Reshape`` targets follows it. Whatever else knows the batch makes the twin fail or differ, and then every sample goes
through the very file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper

from secateur.export.errors import ExportError
from secateur.export.verify import TOLERANCE, open_session, predict, run_session

Array = npt.NDArray[Any]

WIDE = 16
"""Samples in one run of a twin; as many are answered both ways to prove it."""

WORTH = 8 * WIDE
"""Samples from which on a twin is worth its proof."""


class Predictor:
    """First output of an ONNX file for every sample.

    Where the file takes one sample a run, a twin is proven on the first ``WIDE`` samples. Where outputs are rows of
    numbers for classes, those of the twin must be within the tolerance (relative to the largest one), and the very file
    answers anew where the two largest numbers lie so close that the tolerance could turn them. Other outputs must be
    the same to the last bit. Without a proven twin the very file answers everything.

    Args:
        path: the file, or its content; it has one input.
        threads: of ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime refuses the model.
    """

    def __init__(self, path: str | Path | bytes, threads: int = 1, tolerance: float = TOLERANCE) -> None:
        self.path, self.threads, self.tolerance = path, threads, tolerance
        self.session = open_session(path, threads)
        self.twin: onnxruntime.InferenceSession | None = None
        """What answers for the file; None = not proven."""
        self.margin = 0.0
        """Distance of the two largest outputs of a sample up to which the twin's word does not do."""
        self._tried = self.session.get_inputs()[0].shape[0] != 1

    def __call__(self, inputs: Array) -> Array:
        """Shape ``(samples, ...)`` for inputs of shape ``(samples, ...)``.

        Raises:
            ExportError: ONNX Runtime cannot run the model, or there is no sample.
        """
        if not self._tried and len(inputs) >= WORTH:
            self._tried = True
            self._prove(inputs[:WIDE])
        if self.twin is None:
            return predict(self.session, inputs)
        outputs = predict(self.twin, inputs)
        if self.margin and (near := ties(outputs, self.margin)).any():
            outputs[near] = predict(self.session, inputs[near])
        return outputs

    def _prove(self, inputs: Array) -> None:
        """Set ``twin`` and ``margin`` if a twin gives what the very file gives."""
        expected = predict(self.session, inputs)
        try:
            twin = open_session(twin_of(self._model(), WIDE).SerializeToString(), self.threads)
            found = run_session(twin, {twin.get_inputs()[0].name: inputs})[0]
        except (ExportError, ValueError):  # ValueError: larger than one message of protobuf can be
            return
        if found.shape != expected.shape:
            return
        bound = self.tolerance * float(np.abs(expected).max(initial=0.0))
        of_classes = expected.ndim == 2 and expected.shape[1] > 1
        if of_classes and float(np.abs(found - expected).max()) <= bound:
            self.twin, self.margin = twin, 2 * bound  # both of the two largest may be off by it
        elif np.array_equal(found, expected):
            self.twin = twin

    def _model(self) -> onnx.ModelProto:
        if isinstance(self.path, bytes):
            return onnx.load_model_from_string(self.path)
        return onnx.load(self.path)


def twin_of(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy of a model of batch size 1 with another batch size; nothing says that it computes the same."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph = twin.graph
    del graph.value_info[:]
    for port in (*graph.input, *graph.output):
        if (dims := port.type.tensor_type.shape.dim) and dims[0].dim_value == 1:
            dims[0].dim_value = batch
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        target = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        sizes = np.ones(0) if target is None else numpy_helper.to_array(target).copy()
        if target is not None and sizes.size and sizes[0] == 1 and sizes.all():
            sizes[0] = 0  # that of the input
            for attribute in node.attribute:
                attribute.i = 0  # its only one says that 0 stands for an empty dimension
            node.input[1] = f"{target.name} of any batch"
            if node.input[1] not in constants:
                constants[node.input[1]] = numpy_helper.from_array(sizes, node.input[1])
                graph.initializer.append(constants[node.input[1]])
    return twin


def ties(outputs: Array, margin: float) -> npt.NDArray[np.bool_]:
    """Which rows of ``outputs``, shape ``(samples, classes)``, have two largest numbers at most ``margin`` apart."""
    largest = np.partition(outputs, -2, axis=1)[:, -2:]
    near: npt.NDArray[np.bool_] = ~(largest[:, 1] - largest[:, 0] > margin)  # where there is NaN, too
    return near
