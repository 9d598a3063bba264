"""nn.Module -> one checked ONNX file."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.utils import _pytree as pytree

from secateur.export import quantize
from secateur.export.artifact import ExportedModel, describe, opset_of
from secateur.export.errors import ExportError
from secateur.export.qdq import Calibration

OPSET = 20
"""Operator set of files, unless told otherwise; templates always have it."""

Example = torch.Tensor | tuple[Any, ...]
"""One tensor, or the tuple of a forward's arguments: tensors, and nested lists and mappings of them."""


def arguments(example: Example) -> tuple[Any, ...]:
    """The arguments of the forward."""
    return example if isinstance(example, tuple) else (example,)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Tensors of nested inputs or outputs, in the order in which the exporter lists them."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def export_onnx(
    model: torch.nn.Module,
    example_input: Example,
    path: str | Path,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = False,
    optimize: bool = True,
    plan_digest: str = "",
    precision: str = "fp32",
    calibration: Calibration | None = None,
    input_names: Sequence[str] = ("input",),
    output_names: Sequence[str] = ("logits",),
) -> ExportedModel:
    """Export a model in eval mode; the file appears whole or not at all.

    Args:
        example_input: one tensor, or a tuple of arguments; without ``dynamic_batch`` its batch size is baked in.
        opset: operator set; below 18 the exporter converts, and an export that it could not convert is refused.
        optimize: fold constants and fuse (initializers lose their state-dict names).
        precision: a name of ``secateur.export.quantize.PRECISIONS``.
        calibration: images that a precision of integers takes its ranges from.

    Raises:
        ExportError: the exporter fails, the file it wrote is not what was asked for, or there is no such precision.
    """
    make = quantize.precision(precision).make
    proto = export_proto(
        model,
        example_input,
        opset=opset,
        dynamic_batch=dynamic_batch,
        optimize=optimize,
        input_names=input_names,
        output_names=output_names,
    )
    path = Path(path)
    write_atomically(path, make(proto, calibration).SerializeToString())
    return describe(path, precision, plan_digest)


def export_proto(
    model: torch.nn.Module,
    example_input: Example,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = False,
    optimize: bool = True,
    input_names: Sequence[str] = ("input",),
    output_names: Sequence[str] = ("logits",),
) -> onnx.ModelProto:
    """``export_onnx`` without the file.

    Raises:
        ExportError: torch.onnx cannot export the model.
    """
    inputs = arguments(example_input)
    shapes: tuple[Any, ...] | None = None
    if dynamic_batch:
        inputs = pytree.tree_map_only(torch.Tensor, lambda x: torch.cat([x, x]), inputs)  # one would be baked in
        shapes = pytree.tree_map_only(torch.Tensor, lambda _: {0: torch.export.Dim("batch")}, inputs)
    with evaluating(model), _silence(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model,
                (*inputs, {}) if inputs and isinstance(inputs[-1], dict) else inputs,  # a last dict is keywords
                dynamo=True,
                optimize=optimize,
                opset_version=opset,
                external_data=False,
                dynamic_shapes=shapes,
                input_names=list(input_names),
                output_names=list(output_names),
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
            raise ExportError(
                f"torch.onnx cannot export {type(model).__name__}: {error}. Operations whose shapes depend on the "
                "data (NMS) must stay outside of the exported module."
            ) from error
    assert program is not None
    proto = program.model_proto
    if opset_of(proto) != opset:
        raise ExportError(f"asked for opset {opset}, the exporter wrote {opset_of(proto)}; ask for opset 18 or newer")
    strip_metadata(proto)
    return proto


def optimise(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What ``export_proto`` gives with ``optimize``, of a model that was exported without."""
    from onnxscript import ir  # half a second, which only exports need

    with _silence():
        program = torch.onnx.ONNXProgram(ir.from_proto(proto), None)
        program.optimize()
        optimised = program.model_proto
    strip_metadata(optimised)
    return optimised


@contextmanager
def _silence() -> Iterator[None]:
    """Without the exporter's warnings and log lines; what matters of them is raised as an error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def strip_metadata(proto: onnx.ModelProto) -> None:
    """Drop what the exporter writes about its machine: stack traces with local paths, tens to hundreds of kB."""
    graph = proto.graph
    holders = [proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]
    for holder in [*holders, *proto.functions, *(node for function in proto.functions for node in function.node)]:
        del holder.metadata_props[:]
        holder.doc_string = ""


def write_atomically(path: Path, *data: bytes | memoryview) -> None:
    """Write pieces beside the target, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
