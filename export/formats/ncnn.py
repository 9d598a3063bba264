"""ncnn: one file with its weights, its graph, and the ONNX file's names of inputs and outputs.

Converted by ``pnnx``, a program of ncnn's authors, which runs confined (``secateur.export.confined``). The file begins
with what ncnn calls ``.bin``, which it reads from the start, and goes on with a zip archive of the ``.param`` and of
``ports.json``; so the runtime loads it where it lies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from secateur.export.confined import ConfinedError, run_confined
from secateur.export.errors import ExportError

SUFFIX = ".ncnn"
GRAPH, PORTS = "graph.param", "ports.json"
CONVERSION_S = 600.0
LEAST_MEMORY_BYTES = 4 << 30
"""Of address space; a conversion takes 40 times its file and 100 MB at most (ResNet-18: 47 MB, 260 MB resident)."""
FLOAT = onnx.TensorProto.FLOAT
INT_MAX = (1 << 31) - 1
REASONS = {
    "Tensor.slice": "ncnn takes slices with a step over whole rows and columns of images only",
    "QuantizeLinear": "ncnn reads no quantised (QDQ) files: take onnxruntime or openvino for int8",
}
"""Layers that are left over by a conversion, and what that means for people."""


def write(source: Path, to: Path) -> None:
    """Convert an ONNX file.

    Raises:
        ExportError: pnnx is not installed or fails; or ncnn has no such inputs or layers.
    """
    model = onnx.load(source)
    ports = _ports(model)
    _without_strided_slices(model)
    with tempfile.TemporaryDirectory(prefix="secateur-ncnn-") as place:
        folder = Path(place)
        onnx.save(model, folder / "m.onnx")
        graph = _converted(folder, source.stat().st_size)
        weights = folder / "m.ncnn.bin"
        described = {
            **_named(ports, graph),
            "weights_bytes": weights.stat().st_size,
            "weights_sha256": _sha256(weights),
        }
        shutil.copyfile(weights, to)
        with zipfile.ZipFile(to, "a", zipfile.ZIP_DEFLATED) as archive:
            for name, text in ((GRAPH, graph), (PORTS, json.dumps(described, sort_keys=True))):
                archive.writestr(zipfile.ZipInfo(name), text)  # its date is 1980: the same bytes each time


def verify(file: Path) -> None:
    """See that a file is whole.

    Raises:
        ExportError: it is cut off or changed.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            ports = json.loads(archive.read(PORTS))
            archive.read(GRAPH)
        whole = _sha256(file, ports["weights_bytes"]) == ports["weights_sha256"]
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise ExportError(f"{file.name} is no file that was written for ncnn, or is damaged: {error}") from error
    if not whole:
        raise ExportError(f"{file.name} is damaged: its weights are not those that were written; export it again")


def _ports(model: onnx.ModelProto) -> dict[str, Any]:
    """Inputs and outputs as ONNX has them: of float32, for one image at a time."""
    given = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in given]
    for value in [*inputs, *model.graph.output]:
        if value.type.tensor_type.elem_type != FLOAT:
            raise ExportError(f"{value.name} is not of float32, and ncnn takes and gives nothing else")
    described = {"inputs": [_port(v) for v in inputs], "outputs": [_port(v) for v in model.graph.output]}
    batches = {port["shape"][0] for port in described["inputs"] if port["shape"]}
    if batches - {1, None}:
        raise ExportError(f"ncnn runs one image at a time, and this file takes {max(batches - {None})}")
    return described


def _port(value: onnx.ValueInfoProto) -> dict[str, Any]:
    sizes = [None if size.dim_param else size.dim_value for size in value.type.tensor_type.shape.dim]
    return {"name": value.name, "shape": [1 if size is None and i == 0 else size for i, size in enumerate(sizes)]}


def _without_strided_slices(model: onnx.ModelProto) -> None:
    """Write every n-th row or column as what ncnn has for it: pooling over one pixel, which is exactly that.

    CIFAR ResNets have such slices in their shortcuts (He et al. 2016, arXiv 1512.03385, option A).
    """
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in [*inferred.value_info, *inferred.input]}
    for node in model.graph.node:
        strides = _strides_of(node, constants) if node.op_type == "Slice" and ranks.get(node.input[0]) == 4 else None
        if strides is not None:
            source, name = node.input[0], node.name
            pooling = onnx.helper.make_node(
                "MaxPool", [source], list(node.output), name, kernel_shape=[1, 1], strides=strides
            )
            node.CopyFrom(pooling)


def _strides_of(node: onnx.NodeProto, constants: Mapping[str, Any]) -> list[int] | None:
    """The steps over rows and columns of a slice that begins at the first ones and takes all; None for any other."""
    if len(node.input) < 5 or not all(name in constants for name in node.input[1:5]):
        return None
    starts, ends, axes, steps = (constants[name].reshape(-1).tolist() for name in node.input[1:5])
    whole = all(start == 0 for start in starts) and all(end >= INT_MAX for end in ends)
    if not whole or not set(axes) <= {2, 3} or all(step == 1 for step in steps) or min(steps) < 1:
        return None
    found = dict(zip(axes, steps, strict=True))
    return [found.get(2, 1), found.get(3, 1)]


def _converted(folder: Path, size_bytes: int) -> str:
    """Run pnnx on ``m.onnx``; returns the graph that it wrote, whose layers ncnn all has."""
    command = [str(_program()), "m.onnx", "fp16=0"]  # weights in fp16 would stay so, whatever ncnn computes in
    try:
        run_confined(command, folder, seconds=CONVERSION_S, memory_bytes=LEAST_MEMORY_BYTES + 40 * size_bytes)
        graph = (folder / "m.ncnn.param").read_text(encoding="utf-8")
    except ConfinedError as error:
        raise ExportError(f"pnnx cannot convert it: {error}") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"pnnx wrote no graph that can be read: {error}") from error
    import ncnn

    kinds = sorted({line.split()[0] for line in graph.splitlines()[2:] if line.strip()})
    unknown = [kind for kind in kinds if ncnn.layer_to_index(kind) < 0]
    if unknown:
        reasons = [REASONS[kind] for kind in unknown if kind in REASONS]
        raise ExportError("; ".join([f"ncnn has no {', '.join(unknown)}", *reasons]))
    return graph


def _program() -> Path:
    """pnnx's program, found without importing the package, which imports torch."""
    found = importlib.util.find_spec("pnnx")
    if found is None or found.origin is None or importlib.util.find_spec("ncnn") is None:
        raise ExportError("files for ncnn are made by pnnx, which is not installed; run: pip install 'secateur[ncnn]'")
    return Path(found.origin).with_name("pnnx")


def _named(ports: Mapping[str, Any], graph: str) -> dict[str, Any]:
    """Each port with its name in ncnn's graph: pnnx calls them ``in0``, ``in1`` and ``out0``, ``out1``, in order."""
    blobs = set(re.findall(r"\b(?:in|out)\d+\b", graph))
    named = {
        side: [{**port, "blob": f"{blob}{i}"} for i, port in enumerate(ports[side])]
        for side, blob in (("inputs", "in"), ("outputs", "out"))
    }
    missing = [port["name"] for side in named.values() for port in side if port["blob"] not in blobs]
    if missing:
        raise ExportError(f"pnnx left out {', '.join(missing)}, which the network has as input or output")
    return named


def _sha256(file: Path, size: int = -1) -> str:
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(size)).hexdigest()
