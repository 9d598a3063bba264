"""Formats and precisions: what a runtime loads is made of the ONNX file on its way to the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from secateur.device_profiles import DeviceError, LocalTarget, measure
from secateur.device_profiles.runtime import Runtime
from secateur.export import ExportError, export_onnx
from secateur.export.convert import converted, in_format
from secateur.export.formats import FORMATS
from secateur.export.qdq import Calibration
from secateur.export.quantize import PRECISIONS
from secateur.export.verify import verify_parity
from tests.device_profiles import matrix
from tests.device_profiles.tiny import quick_profile, skip_without, write_conv


def format_of(write: Any, suffix: str = ".npy") -> ModuleType:
    module = ModuleType("mine")
    module.SUFFIX, module.write = suffix, write  # type: ignore[attr-defined]
    return module


def write_matrix(source: Path, to: Path) -> None:
    """The one weight of a network."""
    with to.open("wb") as file:
        np.save(file, numpy_helper.to_array(onnx.load(source).graph.initializer[0]))


def write_product(path: Path, width: int) -> Path:
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, width])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("name", FORMATS.names())
def test_a_format_writes_a_file_from_an_onnx_file(tmp_path: Path, name: str):
    skip_without(name)
    kind = FORMATS.load(name)
    converted(kind, name, write_conv(tmp_path / "a.onnx"), tmp_path / f"b{kind.SUFFIX}")
    assert (tmp_path / f"b{kind.SUFFIX}").stat().st_size > 0


def test_onnx_files_are_not_converted(tmp_path: Path):
    target = LocalTarget()
    assert in_format(target, "onnx") is target
    with pytest.raises(ExportError, match="unknown format 'onyx'; did you mean 'onnx'"):
        in_format(target, "onyx")


def test_another_format_is_measured_under_the_onnx_file_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lock").mkdir()
    own = {"SECATEUR_LOCKS": str(tmp_path / "lock"), "SECATEUR_AGENT_STORE": str(tmp_path / "store")}
    monkeypatch.setattr("secateur.export.convert.FORMATS", Known(matrix=format_of(write_matrix)))
    target = in_format(LocalTarget(env=own, runtime=Runtime("matrix", matrix)), matrix.FORMAT)
    files = {"whole": write_product(tmp_path / "a.onnx", 64), "half": write_product(tmp_path / "b.onnx", 32)}
    try:
        result = measure(target, quick_profile(), files)
        again = measure(target, quick_profile(), files)
    finally:
        target.close()
    assert result.processes[0].environment["matrix"] == "1.0"
    assert result.sha256 == again.sha256 and result.names == ("whole", "half")


class Known:
    """A shelf of given modules."""

    def __init__(self, **modules: ModuleType) -> None:
        self.modules: Mapping[str, ModuleType] = modules

    def load(self, name: str) -> ModuleType:
        return self.modules[name]


def test_a_converter_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(source: Path, to: Path) -> None:
        to.write_text("half")
        raise RuntimeError("no such operator")

    model = write_conv(tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=r"a\.onnx cannot be written as mine: RuntimeError: no such operator"):
        converted(format_of(fail), "mine", model, tmp_path / "b.npy")
    assert list(tmp_path.iterdir()) == [model]
    monkeypatch.setattr("secateur.export.convert.FORMATS", Known(mine=format_of(fail)))
    target = in_format(LocalTarget(), "mine")
    with pytest.raises(DeviceError, match="no such operator") as caught:
        target.put(model)
    target.close()
    assert caught.value.code == "model-load"


def test_fp32_is_the_export_itself(tmp_path: Path):
    model, example = torch.nn.Linear(3, 2), torch.zeros(1, 3)
    exported = export_onnx(model, example, tmp_path / "a.onnx", precision="fp32")
    assert exported.precision == "fp32" and PRECISIONS["fp32"].tolerance(1e-4) == 1e-4
    with pytest.raises(ExportError, match="cannot be exported in 'int3' so far; known: fp32, fp16, int8"):
        export_onnx(model, example, tmp_path / "b.onnx", precision="int3")


def test_another_precision_is_one_more_argument(tmp_path: Path):
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)), torch.randn(16, 8)
    calibration = Calibration(x.numpy())
    files = {
        name: export_onnx(model, x[:1], tmp_path / f"{name}.onnx", precision=name, calibration=calibration)
        for name in PRECISIONS
    }
    assert files["int8"].precision == "int8" and files["int8"].inputs == files["fp32"].inputs
    assert files["fp16"].size_bytes < 0.8 * files["fp32"].size_bytes and files["fp16"].outputs == files["fp32"].outputs
    for name, exported in files.items():
        parity = verify_parity(exported, model, [row[None].numpy() for row in x])
        assert parity.max_relative_error < {"fp32": 1e-5, "fp16": 2e-2, "int8": 0.1}[name]
    with pytest.raises(ExportError, match="int8 needs images"):
        export_onnx(model, x[:1], tmp_path / "b.onnx", precision="int8")
