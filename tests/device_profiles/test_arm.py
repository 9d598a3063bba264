"""The agent on an emulated ARM device: the same file, another instruction set, the same numbers."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from secateur.device_profiles import DeviceError, Target, open_target
from secateur.device_profiles.agent import PROTOCOL
from secateur.export.convert import in_format
from tests.device_profiles import arm
from tests.device_profiles.tiny import quick_profile, skip_without

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_lock_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real measurement on this machine does not disturb the tests."""
    for name in ("SECATEUR_LOCKS", "SECATEUR_AGENT_STORE"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def emulated() -> Target:
    if not arm.PYTHON.is_file():
        pytest.skip(f"no emulated device ({arm.PYTHON}): run tests/tools/install_arm.sh")
    return open_target(arm.emulated_profile())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    fp32 = arm.write_resnet(folder / "fp32.onnx")
    return {"fp32": fp32, "int8": arm.quantised(fp32, folder / "int8.onnx")}


def entry(target: Target, model: Path) -> dict[str, str]:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    return {"name": model.stem, "path": target.put(model), "sha256": digest}


def benchmark_request(models: list[dict[str, str]], min_repeats: int) -> dict[str, Any]:
    request: dict[str, Any] = {"protocol": PROTOCOL, "op": "benchmark", "models": models, "seed": 0}
    request |= {"provider": "CPUExecutionProvider", "threads": 1, "warmup": 1, "max_warmup_seconds": 0.0}
    return request | {"min_repeats": min_repeats, "min_seconds": 0.0, "max_seconds": 60.0}


def infer(target: Target, model: Path, folder: Path, **asked: str) -> npt.NDArray[np.float32]:
    """The model's logits on a device, shape (1, classes), on an input made here."""
    folder.mkdir()
    np.savez(folder / "inputs.npz", input=arm.noise(100))
    request = {"protocol": PROTOCOL, "op": "infer", "models": [{**entry(target, model), **asked}]}
    request |= {"provider": "CPUExecutionProvider", "threads": 1, "inputs": target.put(folder / "inputs.npz")}
    answer = target.run(request, 120)
    target.fetch(answer["outputs"], folder / "outputs.npz")
    assert hashlib.sha256((folder / "outputs.npz").read_bytes()).hexdigest() == answer["sha256"]
    with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
        logits: npt.NDArray[np.float32] = outputs["output"]
    assert logits.shape == (1, arm.CLASSES)
    return logits


def is_gone(pid: int) -> bool:
    """No such process, or only its corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_probe_tells_the_emulated_machine(emulated: Target):
    answer = emulated.run({"protocol": PROTOCOL, "op": "probe"}, 120)
    assert answer["device"]["machine"] == "aarch64"
    assert "ARMv8" in answer["device"]["cpu"]  # the emulator's /proc/cpuinfo, not this machine's
    assert "CPUExecutionProvider" in answer["runtime"]["providers"]


def test_fp32_logits_are_those_of_this_machine(emulated: Target, models: Mapping[str, Path], tmp_path: Path):
    here = infer(open_target(quick_profile()), models["fp32"], tmp_path / "here")
    there = infer(emulated, models["fp32"], tmp_path / "there")
    scale = np.abs(here).max()
    assert scale > 1
    assert np.abs(there - here).max() < 1e-5 * scale  # other kernels add in another order


def test_a_benchmark_runs_and_int8_outputs_are_equal_bit_by_bit(emulated: Target, models: Mapping[str, Path]):
    answers = {}  # each draws the seeded input itself
    for device, target in (("here", open_target(quick_profile())), ("there", emulated)):
        request = benchmark_request([entry(target, model) for model in models.values()], min_repeats=3)
        answers[device] = target.run({**request, "sustain_s": 0.1}, 120)
    assert answers["there"]["environment"]["machine"] == "aarch64"
    assert all(len(found["wall_ms"]) >= 3 for found in answers["there"]["models"].values())
    assert all(found["sustained"] for found in answers["there"]["models"].values())
    digests = {device: answer["models"]["int8"]["output_sha256"] for device, answer in answers.items()}
    assert digests["there"] == digests["here"]
    assert digests["here"] != answers["here"]["models"]["fp32"]["output_sha256"]


def test_ncnn_computes_in_fp32_unless_asked_for_fp16(emulated: Target, models: Mapping[str, Path], tmp_path: Path):
    """A Cortex-A76 computes in fp16, and ncnn left to itself does so: the numbers of both are told apart."""
    skip_without("ncnn")
    if not list((arm.PYTHON.parent / "site").glob("ncnn-*")):
        pytest.skip("no ncnn on the emulated device: run tests/tools/install_arm.sh")
    here = infer(open_target(quick_profile()), models["fp32"], tmp_path / "here")
    profile = arm.emulated_profile().model_copy(update={"runtime": "ncnn"})
    errors = {}
    with closing(in_format(open_target(profile), "ncnn")) as there:
        for asked in ("fp32", "fp16"):
            model = {**entry(there, models["fp32"]), "precision": asked}
            answer = there.run(benchmark_request([model], min_repeats=3), 120)["models"]["fp32"]
            assert (answer["precision_asked"], answer["precision_used"]) == (asked, asked)
            found = infer(there, models["fp32"], tmp_path / asked, precision=asked)
            errors[asked] = np.abs(found - here).max() / np.abs(here).max()
    assert errors["fp32"] < 1e-5 and 1e-4 < errors["fp16"] < 0.1


def test_a_killed_agent_leaves_no_worker(emulated: Target, models: Mapping[str, Path]):
    request = benchmark_request([entry(emulated, models["fp32"])], min_repeats=10**9)
    events: list[Mapping[str, Any]] = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(emulated.run, request, 90, events.append)
        assert wait_until(lambda: running.done() or any(e["event"] == "progress" for e in events), 60)  # worker at work
        started = next(e for e in events if e["event"] == "started")
        pids = [started["pid"], started["worker_pid"]]
        for pid in pids:
            assert b"qemu-aarch64" in Path(f"/proc/{pid}/cmdline").read_bytes()
        os.kill(started["pid"], signal.SIGKILL)
        with pytest.raises(DeviceError) as caught:
            running.result(30)
    assert caught.value.code == "agent-died"
    gone = wait_until(lambda: all(map(is_gone, pids)), 20)
    for pid in pids:  # leave nothing behind, even when the test fails
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)
    assert gone


def test_a_run_on_an_emulated_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from secateur.pipeline.cli import app as cli
    from tests.pipeline.helpers import write_tiny

    profile = arm.emulated_profile().model_dump(mode="json", include={"target", "connect", "timing"})
    devices = tmp_path / "home" / "devices"
    devices.mkdir(parents=True)
    (devices / "emulated-arm64.yaml").write_text(yaml.safe_dump(profile))
    run_file = write_tiny(tmp_path, device={"profile": "emulated-arm64"})
    monkeypatch.setattr(sys, "argv", ["secateur", "run", str(run_file), "--trust"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "emulated-arm64 is emulated (timing: false): its times say nothing about a device" in said
    assert not list((tmp_path / "home").glob("runs/*"))
