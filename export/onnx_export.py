"""nn.Module -> one checked ONNX file."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.utils import _pytree as pytree

from secateur.export import quantize
from secateur.export.artifact import ExportedModel, describe, opset_of
from secateur.export.blame import explained
from secateur.export.errors import ExportError
from secateur.export.qdq import Calibration

LOG = logging.getLogger(__name__)

OPSET = 20
"""Operator set of files, unless told otherwise; templates always have it."""

TALKERS = ("torch", "onnxscript", "onnx_ir")
"""Packages whose log lines would tell of an export, graphs of it included."""

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
    metadata: Mapping[str, Any] | None = None,
) -> ExportedModel:
    """Export a model in eval mode; the file appears whole or not at all.

    Args:
        example_input: one tensor, or a tuple of arguments; without ``dynamic_batch`` its batch size is baked in.
        opset: operator set; below 18 the exporter converts, and an export that it could not convert is refused.
        optimize: fold constants and fuse (initializers lose their state-dict names).
        precision: a name of ``secateur.export.quantize.PRECISIONS``.
        metadata: what the file says of itself, beside its precision and the digest of its plan; see ``describing``.

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
    path, made = Path(path), make(proto, calibration)
    if metadata is not None:
        describing(made, {**metadata, "precision": precision, "plan_digest": plan_digest})
    write_atomically(path, made.SerializeToString())
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
            raise ExportError(explained(error, model, inputs)) from error
    assert program is not None
    proto = program.model_proto
    if opset_of(proto) != opset:
        fix = "ask for opset 18 or newer" if opset < opset_of(proto) else "ask for an older one"
        raise ExportError(f"asked for opset {opset}, the exporter wrote {opset_of(proto)}; {fix}")
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
    """Without the exporter's warnings and log lines; what matters of them is raised as an error.

    It prints, too: what it printed is a line of the log for those who debug.
    """
    known = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in TALKERS]
    loggers = [logging.getLogger(name) for name in {*TALKERS, *known}]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) as printed:
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        LOG.debug("the exporter printed: %s", printed.getvalue())
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


def describing(proto: onnx.ModelProto, facts: Mapping[str, Any]) -> None:
    """Write facts into a model's metadata, sorted; what is no text as JSON. Empty ones are left out."""
    texts = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {name: texts[name] for name in sorted(texts) if texts[name] not in ("", "null")})


def renamed(proto: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Give inputs and outputs of a model other names.

    Args:
        names: their names -> new ones.

    Raises:
        ExportError: something else in the graph has such a name.
    """
    graph = proto.graph
    holders = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
    taken = {h.name for h in holders} | {name for node in graph.node for name in (*node.input, *node.output)}
    wanted = {old: new for old, new in names.items() if old != new}
    if clash := sorted(set(wanted.values()) & taken):
        raise ExportError(f"{', '.join(clash)} is the name of another tensor of the network; choose another name")
    for holder in holders:
        holder.name = wanted.get(holder.name, holder.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [wanted.get(name, name) for name in side]


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
