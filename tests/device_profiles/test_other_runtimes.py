"""OpenVINO and ncnn: the same numbers as ONNX Runtime, in the precision that was asked for, and no word to anybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from secateur.device_profiles import DeviceError, LocalTarget, Target, measure
from secateur.device_profiles.runtime import runtime_named
from secateur.export.convert import in_format
from tests.device_profiles import arm
from tests.device_profiles.test_agent import entry_for, infer_request, request_for
from tests.device_profiles.tiny import EXTRAS, quick_profile, skip_without

OTHERS = sorted(EXTRAS)


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return arm.write_resnet(tmp_path / "resnet.onnx")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Opens this machine with a runtime; its lock and store are the test's own."""
    targets = []

    def target_with(name: str) -> Target:
        skip_without(name)
        runtime = runtime_named(name)
        own = {name: str(tmp_path / name) for name in ("SECATEUR_LOCKS", "SECATEUR_AGENT_STORE")}
        (tmp_path / "SECATEUR_LOCKS").mkdir(exist_ok=True)
        targets.append(in_format(LocalTarget(env=own, runtime=runtime), runtime.format))
        return targets[-1]

    yield target_with
    for target in targets:
        target.close()


def outputs(target: Target, model: Path, to: Path, **asked: str) -> npt.NDArray[np.float32]:
    """The model's logits on the seeded input, fetched from a target."""
    entry = {**entry_for(model), "path": target.put(model), **asked}
    answer = target.run({**infer_request(model), "models": [entry]}, 120)
    target.fetch(answer["outputs"], to)
    with np.load(to, allow_pickle=False) as arrays:
        logits: npt.NDArray[np.float32] = arrays["output"]
    return logits


@pytest.mark.parametrize("name", OTHERS)
def test_the_numbers_are_those_of_onnx_runtime(name: str, resnet: Path, tmp_path: Path, opened: Any):
    here = outputs(opened("onnxruntime"), resnet, tmp_path / "here.npz")
    there = outputs(opened(name), resnet, tmp_path / "there.npz")
    assert there.shape == here.shape == (1, arm.CLASSES)
    assert np.abs(there - here).max() < 1e-5 * np.abs(here).max(), "bf16 differs by 1e-2, fp16 by 3e-4"


@pytest.mark.parametrize("name", OTHERS)
def test_precision_asked_for_and_used_are_both_in_the_result(name: str, resnet: Path, opened: Any):
    result = measure(opened(name), quick_profile(runtime=name), {"m": resnet})
    samples = result.processes[0].models["m"]
    assert (samples.precision_asked, samples.precision_used) == ("fp32", "fp32")
    assert result.precision("m") == "fp32" and result.processes[0].environment[name]


def test_openvino_takes_a_quantised_file_as_it_is(resnet: Path, tmp_path: Path, opened: Any):
    target, int8 = opened("openvino"), arm.quantised(resnet, tmp_path / "int8.onnx")
    result = measure(target, quick_profile(runtime="openvino"), {"fp32": resnet, "int8": int8})
    assert (result.precision("fp32"), result.precision("int8")) == ("fp32", "int8")
    exact = outputs(opened("onnxruntime"), int8, tmp_path / "here.npz")
    assert np.abs(outputs(target, int8, tmp_path / "there.npz") - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("onnxruntime", "fp16", "the runtime onnxruntime computes in fp32, not in fp16"),
        ("ncnn", "bf16", "the runtime ncnn computes in fp32, fp16, not in bf16"),
        ("openvino", "int3", "the runtime openvino computes in fp32, fp16, bf16, not in int3"),
    ],
)
def test_a_precision_that_a_runtime_lacks_is_refused(name: str, asked: str, said: str, resnet: Path, opened: Any):
    with pytest.raises(DeviceError, match=said) as caught:
        measure(opened(name), quick_profile(runtime=name), {"m": resnet}, precisions={"m": asked})
    assert caught.value.code == "model-load"


HALF = '''
"""A runtime that computes in bf16 whatever it is told."""
FORMAT = "onnx"
PRECISIONS = ("fp32", "fp16")
def facts(): return {"version": "1.0", "providers": ["CPUExecutionProvider"]}
def load(path, threads, provider, precision="fp32"): return precision
def inputs(session): return [("x", [1], "float32")]
def outputs(session): return ["y"]
def run(session, feeds): return [feeds["x"]]
def precision(session): return {"fp32": "bf16+fp32", "fp16": "fp32"}[session]
'''


@pytest.mark.parametrize(
    ("asked", "said"),
    [("fp32", r"computes in bf16\+fp32, where fp32 was asked"), ("fp16", "computes in fp32, where fp16")],
)
def test_a_runtime_that_silently_takes_another_precision_is_refused(asked: str, said: str, resnet: Path, opened: Any):
    target, file = opened("onnxruntime"), resnet.with_name("half.py")
    file.write_text(HALF)
    request = {**request_for(resnet), "runtime": "half", "runtime_file": str(file)}
    target.runtime = type("Half", (), {"fields": lambda *_: {}, "file": file})()
    request["models"] = [{**entry_for(resnet), "precision": asked}]
    with pytest.raises(DeviceError, match=said):
        target.run(request, 60)


def write_node(path: Path, kind: str) -> Path:
    shape = [1, 3, 3]
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], ["y"])],
        "node",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape[:1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("openvino", "Det", "unknown-operator", "has no Det-20"),
        ("openvino", None, "model-load", "damaged or no ONNX model"),
        ("ncnn", "Det", "model-load", "ncnn has no Det"),
        ("ncnn", None, "model-load", "cannot be written as ncnn"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    name: str, content: str | None, code: str, said: str, tmp_path: Path, opened: Any
):
    file = tmp_path / "m.onnx"
    if content is None:
        file.write_bytes(b"no model")
    else:
        write_node(file, content)
    with pytest.raises(DeviceError, match=said) as caught:
        measure(opened(name), quick_profile(runtime=name), {"m": file})
    assert caught.value.code == code and "\n" not in str(caught.value)


WATCH = """
import importlib.util, json, os, sys

def watch(event, arguments):  # also in children that are forked
    if event.startswith(("socket.", "urllib.", "http.", "subprocess.", "os.exec", "os.posix_spawn", "os.system")):
        os.write(log, (json.dumps([event, repr(arguments)[:200]]) + chr(10)).encode())

def socket_at(place):
    return os.path.lexists(place) and os.readlink(place).startswith("socket:")

log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(watch)
spec = importlib.util.spec_from_file_location("runtime", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.facts()
session = module.load(sys.argv[3], 1, "CPUExecutionProvider")
(name, shape, kind), = module.inputs(session)
import numpy
module.run(session, {name: numpy.zeros(shape, kind)})
print(json.dumps([fd for fd in os.listdir("/proc/self/fd") if socket_at(f"/proc/self/fd/{fd}")]))
import concurrent.futures, threading
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join(10)
"""


def test_openvino_opens_no_socket_and_writes_no_identifier(resnet: Path, tmp_path: Path):
    """Its telemetry reports an import from a child process, under an identifier that it keeps in the home folder."""
    skip_without("openvino")
    home, log = tmp_path / "empty", tmp_path / "log"
    home.mkdir()
    clean = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}
    file = runtime_named("openvino").file
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(log), str(file), str(resnet)],
        env={**clean, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [] and log.read_text() == ""
    assert list(home.rglob("*")) == []
