"""Files for ncnn: what pnnx makes of a network, what it cannot, and that it is kept in its folder."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from secateur.device_profiles.profile import RUNTIMES
from secateur.export import ExportError, export_onnx, open_session
from secateur.export.confined import ConfinedError, run_confined
from secateur.export.convert import converted
from secateur.export.formats import FORMATS
from secateur.pipeline.workloads.networks.small import CifarResNet
from tests.device_profiles import arm
from tests.device_profiles.tiny import skip_without, write_conv

CPU = "CPUExecutionProvider"


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "confined" not in request.node.name:
        skip_without("ncnn")


def write(source: Path) -> Path:
    to = source.with_suffix(".ncnn")
    converted(FORMATS.load("ncnn"), "ncnn", source, to)
    return to


def difference(source: Path) -> float:
    """Largest difference between ncnn and ONNX Runtime, relative to the largest value of any output."""
    runtime, session = RUNTIMES.load("ncnn"), open_session(source)
    mine = runtime.load(str(write(source)), 1, CPU)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape).astype(kind) for name, shape, kind in runtime.inputs(mine)}
    expected = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    found = dict(zip(runtime.outputs(mine), runtime.run(mine, feeds), strict=True))
    assert found.keys() == expected.keys()
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in expected.items()}
    return max(float(np.abs(found[n] - expected[n]).max() / np.abs(expected[n]).max()) for n in found)


class TwoHeads(nn.Module):
    """Two outputs, one of them an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.relu(self.stem(x))
        return features, self.head(features.mean((2, 3)))


@pytest.mark.parametrize("side", [16, 15])
def test_the_strided_slices_of_cifar_resnets_are_converted(side: int, tmp_path: Path):
    torch.manual_seed(0)
    file = tmp_path / "m.onnx"
    export_onnx(CifarResNet(1), torch.zeros(1, 3, side, side), file)
    assert {node.op_type for node in onnx.load(file).graph.node} >= {"Slice"}
    assert difference(file) < 1e-5


def test_several_outputs_keep_their_names_and_shapes(tmp_path: Path):
    torch.manual_seed(0)
    export_onnx(TwoHeads(), torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx", output_names=("features", "logits"))
    assert difference(tmp_path / "m.onnx") < 1e-5


def node(path: Path, kind: str, shape: list[int], number: int = TensorProto.FLOAT, **attributes: int) -> Path:
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], ["y"], **attributes)],
        "node",
        [helper.make_tensor_value_info("x", number, shape)],
        [helper.make_tensor_value_info("y", number, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_what_cannot_be_converted_says_why(tmp_path: Path):
    with pytest.raises(ExportError, match="one image at a time, and this file takes 4"):
        write(write_conv(tmp_path / "batch.onnx", batch=4))
    with pytest.raises(ExportError, match="x is not of float32, and ncnn takes and gives nothing else"):
        write(node(tmp_path / "whole.onnx", "Neg", [1, 4], TensorProto.INT64))
    with pytest.raises(ExportError, match="ncnn has no Det"):
        write(node(tmp_path / "det.onnx", "Det", [1, 3, 3]))
    int8 = arm.quantised(arm.write_resnet(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx")
    with pytest.raises(ExportError, match=r"ncnn reads no quantised .QDQ. files: take onnxruntime or openvino"):
        write(int8)
    assert not list(tmp_path.glob("*.ncnn*"))


def test_a_changed_file_is_told(tmp_path: Path):
    kind, file = FORMATS.load("ncnn"), write(write_conv(tmp_path / "m.onnx"))
    kind.verify(file)
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("ports.json"))["inputs"][0]["name"] == "input"
    content = bytearray(file.read_bytes())
    content[17] ^= 1
    file.write_bytes(content)
    with pytest.raises(ExportError, match="damaged"):
        kind.verify(file)


def in_a_child(call: str) -> bool:
    """Whether one of the ways to confine a process works here."""
    text = f"import ctypes, sys; from secateur.export.confined import *; libc = ctypes.CDLL(None); sys.exit(not {call})"
    return subprocess.run([sys.executable, "-c", text], check=False).returncode == 0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("open('{outside}', 'w')", "Permission denied"),
        ("import socket; socket.create_connection(('127.0.0.1', {port}), 5)", "unreachable|refused"),
        ("bytearray(3 << 30)", "MemoryError"),
        ("import time; time.sleep(60)", "not done after 5 s"),
        ("import os; os.abort()", "SIGABRT"),
        ("print('\\x1b[31mred'); raise SystemExit(3)", "code 3: red"),
    ],
)
def test_a_confined_program_keeps_to_its_folder_and_limits(code: str, said: str, tmp_path: Path):
    offered = {"socket": "leave_network(libc)", "open(": f"write_only_beneath(libc, {str(tmp_path)!r})"}
    for word, call in offered.items():
        if word in code and not in_a_child(call):
            pytest.skip("this kernel, or what contains us, does not offer that")
    (tmp_path / "folder").mkdir()
    outside = tmp_path / "outside"
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = code.format(outside=outside, port=server.getsockname()[1])
        with pytest.raises(ConfinedError, match=said):
            run_confined([sys.executable, "-c", text], tmp_path / "folder", seconds=5, memory_bytes=1 << 31)
    assert not outside.exists()


def test_a_confined_program_may_write_in_its_folder(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    command = [sys.executable, "-c", "open('mine', 'w').write('1'); print('done')"]
    assert run_confined(command, tmp_path / "folder", seconds=30, memory_bytes=1 << 31) == "done\n"
    assert (tmp_path / "folder" / "mine").read_text() == "1"
