"""Runtimes: each is one file that runs beside the agent, on whatever Python the device has."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from secateur.device_profiles import DeviceError, LocalTarget, measure
from secateur.device_profiles.check import judge
from secateur.device_profiles.profile import RUNTIMES, Tier
from secateur.device_profiles.runtime import Runtime, runtime_named
from secateur.device_profiles.staircase import fingerprint_of
from tests.device_profiles import matrix
from tests.device_profiles.test_agent import infer_request, request_for
from tests.device_profiles.tiny import quick_profile, write_conv

BRIEF = Tier(processes=3, warmup=1, min_repeats=5, min_seconds=0.0)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[LocalTarget]:
    (tmp_path / "lock").mkdir()
    own = {"SECATEUR_LOCKS": str(tmp_path / "lock"), "SECATEUR_AGENT_STORE": str(tmp_path / "store")}
    opened = LocalTarget(env=own, runtime=Runtime("matrix", matrix))
    yield opened
    opened.close()


def write_matrix(path: Path, size: int) -> Path:
    np.save(path, np.random.default_rng(0).standard_normal((size, size)).astype(np.float32))
    return path


def test_another_runtime_is_measured_with_intervals(tmp_path: Path, target: LocalTarget):
    files = {"whole": write_matrix(tmp_path / "a.npy", 512), "half": write_matrix(tmp_path / "b.npy", 64)}
    result = measure(target, quick_profile(), files, BRIEF)
    ratio = result.ratio("half", "whole")
    assert ratio.known and ratio.low < ratio.value < ratio.high
    assert len(result.processes) == 3 and ratio.value < 1
    assert result.processes[0].environment["matrix"] == "1.0"
    assert "onnxruntime" not in result.processes[0].environment


def test_another_runtime_s_outputs_can_be_fetched(tmp_path: Path, target: LocalTarget):
    file = write_matrix(tmp_path / "a.npy", 8)
    answer = target.run(infer_request(file), 60)
    target.fetch(answer["outputs"], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        assert list(found.files) == ["y"] and found["y"].shape == (1, 8)


def test_the_probe_and_the_checks_tell_of_the_runtime(target: LocalTarget):
    answer = target.prepare()
    assert answer["runtime"]["matrix"] == "1.0" and answer["runtime"]["providers"] == ["CPUExecutionProvider"]
    assert fingerprint_of(quick_profile(), answer) != fingerprint_of(quick_profile(), LocalTarget().prepare())


def test_what_a_runtime_cannot_do_is_said(tmp_path: Path, target: LocalTarget):
    request = request_for(write_matrix(tmp_path / "a.npy", 8))
    with pytest.raises(DeviceError, match="no execution provider Moon; this matrix has CPUExecutionProvider") as caught:
        target.run({**request, "provider": "Moon"}, 60)
    assert caught.value.code == "missing-runtime"
    broken = tmp_path / "broken.npy"
    broken.write_bytes(b"no matrix")
    with pytest.raises(DeviceError, match="ValueError") as caught:
        target.run(request_for(broken), 60)
    assert caught.value.code == "model-load"
    nodes = target.run({**request, "profile": True}, 60)["models"]["m"]
    assert "nodes" not in nodes, "it cannot time single nodes, and says nothing of them"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (None, "missing-runtime", "no file of the runtime broken"),
        ("import nothing_of_the_kind", "missing-runtime", "pip install broken numpy"),
        ("def facts(): return 1 / 0", "missing-runtime", "the runtime broken failed here: ZeroDivisionError"),
        ("def (", "missing-runtime", "SyntaxError"),
    ],
)
def test_a_broken_runtime_is_one_message(tmp_path: Path, target: LocalTarget, text: str | None, code: str, said: str):
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    request = request_for(write_matrix(tmp_path / "a.npy", 8))
    target.runtime = Runtime("broken", type(sys)("broken"))
    target.runtime.module.__file__ = str(file)
    with pytest.raises(DeviceError, match=said) as caught:
        target.run(request, 60)
    assert caught.value.code == code


def test_the_runtime_beside_the_agent_is_the_default(tmp_path: Path, target: LocalTarget):
    file = write_conv(tmp_path / "conv.onnx")
    target.runtime = runtime_named("onnxruntime")
    assert target.run(request_for(file), 60)["environment"]["onnxruntime"]


def test_an_unknown_runtime_is_a_fault_of_the_profile(tmp_path: Path):
    from secateur.device_profiles import load_profile

    (tmp_path / "mine.yaml").write_text("extends: local\nruntime: onnx-runtime\n")
    with pytest.raises(DeviceError, match=r"line 2: runtime: unknown runtime 'onnx-runtime'\. Did you mean 'onnxrunt"):
        load_profile(tmp_path / "mine.yaml")


def test_a_device_without_the_runtime_is_told_what_to_install():
    answer = {"device": {}, "runtime": {"error": "missing-runtime"}, "limits": {}, "now": {}}
    (check,) = (c for c in judge(quick_profile(), answer) if c.name == "onnxruntime")
    assert check.status == "missing" and "pip install onnxruntime numpy" in check.fix


@pytest.mark.parametrize("name", RUNTIMES.names())
def test_a_runtime_is_one_file_for_old_pythons(name: str):
    tree = ast.parse(runtime_named(name).file.read_text(), feature_version=(3, 8))
    top = {alias.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    ours = {"secateur"}
    every = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert top <= sys.stdlib_module_names | {"numpy"}, "a runtime itself is imported by facts(), in its own process"
    assert not every & ours
