"""The emulated ARM device that ``tests/tools/install_arm.sh`` installs, and a small network in fp32 and int8."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from secateur.device_profiles import DeviceProfile
from tests.device_profiles.tiny import quick_profile

CHECKOUT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SECATEUR_ARM", CHECKOUT / ".parts" / "arm64")).absolute() / "python"
SHAPE = (1, 3, 16, 16)
CLASSES = 10


def emulated_profile(python: Path = PYTHON) -> DeviceProfile:
    """The emulated device: it proves parity, its times mean nothing."""
    return quick_profile(name="emulated-arm64", connect={"python": [str(python)]}, timing=False)


def write_resnet(path: Path) -> Path:
    """A residual network with folded batch norm: two blocks, the second with a stride and a depthwise layer.

    Shapes: (1, 3, 16, 16) -> (1, 10). Widths of 16 and 32 make x86 with AVX-512 use its blocked kernels.
    """
    rng = np.random.default_rng(7)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def layer(kind: str, source: str, shape: tuple[int, ...], **attributes: int | list[int]) -> str:
        name = f"{kind.lower()}{len(nodes)}"
        scale = np.sqrt(2 / np.prod(shape[1:]))
        weight = scale * rng.standard_normal(shape) * rng.uniform(0.3, 3, (shape[0], *[1] * (len(shape) - 1)))
        bias = 0.1 * rng.standard_normal(shape[0])
        for suffix, values in (("weight", weight), ("bias", bias)):
            weights.append(numpy_helper.from_array(values.astype(np.float32), f"{name}.{suffix}"))
        nodes.append(helper.make_node(kind, [source, f"{name}.weight", f"{name}.bias"], [name], name, **attributes))
        return name

    def conv(source: str, shape: tuple[int, ...], stride: int = 1, group: int = 1, relu: bool = True) -> str:
        pads, strides = [shape[-1] // 2] * 4, [stride] * 2
        out = layer("Conv", source, shape, pads=pads, strides=strides, kernel_shape=list(shape[2:]), group=group)
        return plain("Relu", out) if relu else out

    def plain(kind: str, *sources: str, out: str = "", **attributes: int) -> str:
        out = out or f"{kind.lower()}{len(nodes)}"
        nodes.append(helper.make_node(kind, sources, [out], out, **attributes))
        return out

    stem = conv("input", (16, 3, 3, 3))
    branch = conv(conv(stem, (16, 16, 3, 3)), (16, 16, 3, 3), relu=False)
    block = plain("Relu", plain("Add", branch, stem))
    branch = conv(conv(block, (16, 1, 3, 3), stride=2, group=16), (32, 16, 1, 1), relu=False)
    block = plain("Relu", plain("Add", branch, conv(block, (32, 16, 1, 1), stride=2, relu=False)))
    flat = plain("Flatten", plain("GlobalAveragePool", block), axis=1)
    plain("Identity", layer("Gemm", flat, (CLASSES, 32), transB=1), out="output")

    graph = helper.make_graph(
        nodes,
        "resnet",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, CLASSES])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def quantised(model: Path, path: Path) -> Path:
    """``model`` in int8 (QDQ; unsigned activations, signed weights per channel), calibrated with noise.

    On x86 without VNNI instructions onnxruntime adds pairs of 8-bit products in 16 bits and clips; there the weights
    get 7 bits, which is exact everywhere.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Noise(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"input": noise(seed)} for seed in range(8)])

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            return next(self.batches, None)

    quantize_static(
        model,
        path,
        Noise(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range="vnni" not in Path("/proc/cpuinfo").read_text(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path


def noise(seed: int) -> npt.NDArray[np.float32]:
    """An input of the network."""
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
