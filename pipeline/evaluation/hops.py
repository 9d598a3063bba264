"""Whether a file computes on a device what it computes here, or a network in PyTorch; and where it first does not.

The same images go through the very file that is timed, one at a time, in the device's runtime; answers are compared
with those of ONNX Runtime on this machine, in numbers and by the workload's metric.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.device_profiles import DeviceError, DeviceProfile, Target
from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.runtime import runtime_field
from secateur.export.errors import ExportError
from secateur.export.folding import clean
from secateur.export.qdq import DEQUANTISED, LAYERS
from secateur.export.verify import open_session, predict, run_session
from secateur.pipeline.archives import check_archive
from secateur.pipeline.workloads import Workload

Array = npt.NDArray[Any]
IMAGE_S = 30.0
"""Seconds that one image may take at most; an emulator takes long."""
ROUNDED = 0.2
"""Share of a tensor's norm that 8 bits may change, before it is named."""
TENSORS = 64
"""Tensors inside of a network that are compared at a time."""


@dataclass(frozen=True)
class Answers:
    """What a file gave on a device, beside what it gives here.

    Args:
        error: largest difference over the largest magnitude here.
        metric: of the answers there.
        metric_here: of the answers here, on the same images.
        samples: images.
    """

    error: float
    metric: float
    metric_here: float
    samples: int


def compare(
    workload: Workload, target: Target, profile: DeviceProfile, file: Path, images: torch.Tensor, labels: torch.Tensor
) -> Answers:
    """Send images through a file on a device and here.

    Args:
        images: shape (n, channels, height, width).
        labels: what the workload's metric compares answers with.

    Raises:
        DeviceError: the device cannot run it.
        ExportError: ONNX Runtime here cannot.
    """
    pixels = images.contiguous().numpy()
    here = predict(file, pixels)
    (there,) = outputs_on(target, profile, file, pixels).values()
    found = [
        workload.metrics(workload.answers(torch.from_numpy(answers), labels), labels)[workload.metric]
        for answers in (there, here)
    ]
    return Answers(relative_error(there, here), float(found[0]), float(found[1]), len(pixels))


def outputs_on(target: Target, profile: DeviceProfile, file: Path, pixels: Array) -> dict[str, Array]:
    """Every output of an ONNX file of one input for every image, as a device computes it.

    Args:
        pixels: shape (n, channels, height, width).

    Raises:
        DeviceError: the device cannot run it, or sends something else.
    """
    name = next(port.name for port in open_session(file).get_inputs())
    with tempfile.TemporaryDirectory(prefix="secateur-hop-") as folder:
        sent, fetched = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        named: dict[str, Any] = {name: pixels}
        np.savez(sent, **named)
        entry = {"name": file.stem, "path": target.put(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        request: dict[str, Any] = {"protocol": PROTOCOL, "op": "infer", "models": [entry], "each": True}
        request |= {**runtime_field(profile), "provider": profile.provider, "threads": profile.threads}
        answer = target.run({**request, "inputs": target.put(sent)}, 120 + IMAGE_S * len(pixels))
        target.fetch(answer["outputs"], fetched)
        check_archive(fetched, "the device sent no outputs of this model")
        with np.load(fetched, allow_pickle=False) as arrays:
            return {output: arrays[output] for output in arrays.files}


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference over the largest magnitude expected; infinite where shapes differ or a number is none."""
    if found.shape != expected.shape:
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    scale = max(float(np.abs(expected.astype(np.float64)).max(initial=0.0)), 1e-12)
    return float(difference / scale) if np.isfinite(difference) else float("inf")


def first_divergence(target: Target, profile: DeviceProfile, file: Path, image: Array, tolerance: float) -> str:
    """The first tensor inside of a file, in its order, that a device computes otherwise; empty where there is none.

    Tensors are made outputs, which keeps a runtime from fusing over them: what only a fusion does is not found.

    Args:
        image: shape (1, channels, height, width).
        tolerance: relative to the largest magnitude of the tensor.
    """
    model = onnx.load(file)
    with tempfile.TemporaryDirectory(prefix="secateur-hop-") as folder:
        for nodes, opened in _opened(model):
            part = Path(folder, "part.onnx")
            onnx.save(opened, part)
            try:
                session = open_session(part)
                names = [port.name for port in session.get_outputs()]
                here = run_session(session, {session.get_inputs()[0].name: image})
                there = outputs_on(target, profile, part, image)
            except (DeviceError, ExportError):
                return ""  # what it opens cannot be run; the file itself could
            for name, expected in zip(names, here, strict=True):
                if name in nodes and relative_error(there[name], expected) > tolerance:
                    return f"{nodes[name].op_type} {nodes[name].name or name}, tensor {name}"
    return ""


def first_apart(network: nn.Module, file: Path, image: Array, tolerance: float) -> str:
    """The first layer of a file whose output is not that of the network's module; empty where all agree.

    Layers are told by their weights' names. Where a file has a batch norm in the layer before it, its output is that of
    the batch norm.

    Args:
        network: in PyTorch, in eval mode.
        image: shape (1, channels, height, width).
        tolerance: relative to the largest magnitude of a tensor.

    Raises:
        ExportError: ONNX Runtime cannot run the file.
    """
    model = onnx.load(file)
    modules = dict(network.named_modules())
    layers = [
        (node, name.removesuffix(".weight"))
        for node in model.graph.node
        for name in node.input[1:2]
        if node.op_type in LAYERS and name.removesuffix(".weight") in modules
    ]
    known = {port.name for port in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
        for node, _ in layers
        if node.output[0] not in known
    )
    found = _tensors(model, image, [node.output[0] for node, _ in layers])
    outputs, agreed = _outputs_of_modules(network, torch.from_numpy(image)), ""
    for node, layer in layers:
        expected = outputs.get(layer, [])
        errors = [relative_error(found[node.output[0]], each) for each in expected]
        if errors and min(errors) > tolerance:
            before = f" (up to {agreed} all agree)" if agreed else ""
            return f"{node.op_type} {layer}, tensor {node.output[0]}{before}"
        agreed = layer if errors else agreed
    return ""


def _outputs_of_modules(network: nn.Module, image: torch.Tensor) -> dict[str, list[Array]]:
    """What every convolution and linear layer puts out at each call, and what a batch norm right behind it does."""
    outputs: dict[str, list[Array]] = {}
    made_by: dict[int, tuple[str, torch.Tensor]] = {}  # tensors are kept, so that no other one gets their id

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                return
            before = made_by.get(id(inputs[0])) if inputs else None
            if isinstance(module, _BatchNorm):
                name_of = before[0] if before is not None else None
            else:
                name_of = name
                made_by[id(output)] = name, output
            if name_of is not None:
                outputs.setdefault(name_of, []).append(output.detach().float().cpu().numpy().copy())

        return hook

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, _BatchNorm)
    handles = [m.register_forward_hook(look(name)) for name, m in network.named_modules() if isinstance(m, kinds)]
    try:
        with torch.inference_mode():
            network(image.to(next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def first_rounded(floats: bytes, rounded: bytes, image: Array, bound: float = ROUNDED) -> str:
    """The first tensor that 8 bits change by more than a share of its norm, with its layer; empty where there is none.

    Args:
        floats, rounded: two files of one network, whose tensors have the same names.
        image: shape (1, channels, height, width).
    """
    plain, other = clean(onnx.load_from_string(floats))[0], onnx.load_from_string(rounded)
    names = {name for node in other.graph.node for name in node.output}
    for nodes, opened in _opened(plain):
        common = [name for name in nodes if name + DEQUANTISED in names]
        other_opened = onnx.ModelProto()
        other_opened.CopyFrom(other)
        kind = onnx.TensorProto.FLOAT
        other_opened.graph.output.extend(
            onnx.helper.make_tensor_value_info(name + DEQUANTISED, kind, None) for name in common
        )
        expected = _tensors(opened, image, common)
        found = _tensors(other_opened, image, [name + DEQUANTISED for name in common])
        for name in common:
            size = max(float(np.linalg.norm(expected[name])), 1e-12)
            if float(np.linalg.norm(found[name + DEQUANTISED] - expected[name])) > bound * size:
                return f"{_layer_behind(plain, name)}, tensor {name}"
    return ""


def _layer_behind(model: onnx.ModelProto, tensor: str) -> str:
    """The layer that made a tensor, or the nearest one before it, by its module; the operator where there is none."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    node = made_by[tensor]
    while True:
        weights = [name.removesuffix(".weight") for name in node.input if name.endswith(".weight")]
        if weights or node.input[0] not in made_by:
            return f"{node.op_type} {weights[0] if weights else node.name}"
        node = made_by[node.input[0]]


def _tensors(model: onnx.ModelProto, image: Array, names: Sequence[str]) -> dict[str, Array]:
    session = open_session(model.SerializeToString())
    feed = {session.get_inputs()[0].name: image}
    return dict(zip(names, session.run(list(names), feed), strict=True)) if names else {}


def _opened(model: onnx.ModelProto) -> Iterator[tuple[Mapping[str, onnx.NodeProto], onnx.ModelProto]]:
    """The model with parts of its float tensors as further outputs, in order, and which node each is from."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = {v.name: v for v in inferred.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    made = [(name, node) for node in model.graph.node for name in node.output if name in values]
    for start in range(0, len(made), TENSORS):
        part = made[start : start + TENSORS]
        opened = onnx.ModelProto()
        opened.CopyFrom(model)
        opened.graph.output.extend(values[name] for name, _ in part)
        yield dict(part), opened
