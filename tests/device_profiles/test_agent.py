"""The agent for real: separate processes, real locks, real signals."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from device_profiles import DeviceError, LocalTarget, measure, open_target
from device_profiles.agent import EXIT_CODES, PROTOCOL
from device_profiles.target import AGENT
from device_profiles.targets.local import read_answer
from tests.device_profiles.tiny import quick_profile, write_conv


@pytest.fixture
def target(tmp_path: Path) -> LocalTarget:
    """A target with a lock of its own, so that a real measurement on this machine does not disturb the test."""
    (tmp_path / "lock").mkdir()
    return LocalTarget(busy_wait_s=0.2, env={"TMPDIR": str(tmp_path / "lock")})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_conv(tmp_path / "conv.onnx")


def request_for(path: Path, **changes: Any) -> dict[str, Any]:
    entry = {"name": "m", "path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    request = {"protocol": PROTOCOL, "op": "benchmark", "models": [entry], "provider": "CPUExecutionProvider"}
    request |= {"threads": 1, "warmup": 1, "min_repeats": 3, "min_seconds": 0, "max_seconds": 10, "seed": 0}
    return request | changes


def run_agent(line: str, target: LocalTarget) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, AGENT], input=line, capture_output=True, text=True, env=target.env, timeout=60
    )
    return done.returncode, json.loads(done.stdout)


def is_gone(pid: int) -> bool:
    """No such process, or only its corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_measures_two_models_in_turn(target: LocalTarget, tmp_path: Path):
    models = {"dense": write_conv(tmp_path / "a.onnx", 8), "pruned": write_conv(tmp_path / "b.onnx", 4)}
    result = measure(target, quick_profile(), models)
    for name in models:
        assert len(result.wall_ms(name)) == len(result.cpu_ms(name)) == 5
        assert (result.wall_ms(name) > 0).all()
        assert result.load_ms(name) > 0
        assert result.first_ms(name) > 0
        assert (result.peak_rss_bytes(name) or 0) > 10_000_000  # onnxruntime itself takes tens of MB
        assert len(result.processes[0].models[name].output_sha256) == 64
    environment = result.environment
    assert environment["provider"] == "CPUExecutionProvider"
    assert environment["threads"] == 1
    assert len(environment["cores"]) == 1
    assert {"onnxruntime", "python", "host", "machine", "elapsed_s", "nivcsw"} <= environment.keys()
    assert result.processes[0].started <= result.processes[0].ended
    assert 0 < result.ratio("pruned", "dense").value < 100


def test_same_seed_same_output_and_dynamic_batch(target: LocalTarget, tmp_path: Path):
    fixed, free = write_conv(tmp_path / "a.onnx"), write_conv(tmp_path / "b.onnx", batch="n")
    digests = [
        target.run(request_for(path, seed=seed), 60)["models"]["m"]["output_sha256"]
        for path, seed in ((fixed, 1), (free, 1), (fixed, 2))
    ]
    assert digests[0] == digests[1]  # a dynamic dimension is 1
    assert digests[0] != digests[2]


def test_stops_at_max_seconds(target: LocalTarget, model: Path):
    answer = target.run(request_for(model, min_repeats=10**9, max_seconds=0.1), 60)
    assert len(answer["models"]["m"]["wall_ms"]) >= 3


def test_probe(target: LocalTarget):
    answer = open_target(quick_profile()).run({"protocol": PROTOCOL, "op": "probe"}, 60)
    assert "CPUExecutionProvider" in answer["runtime"]["providers"]
    assert answer["device"]["machine"]


def test_readings_come_from_the_sysroot_and_are_absent_where_unreadable(target: LocalTarget, tmp_path: Path):
    root = tmp_path / "root"
    for path, text in {
        "sys/class/thermal/thermal_zone0/temp": "41000\n",
        "sys/class/thermal/thermal_zone1/temp": "47500\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "proc/cpuinfo": "processor: 0\nmodel name\t: Testium 9\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    target.env["EDGE_SYSROOT"] = str(root)
    device = target.run({"protocol": PROTOCOL, "op": "probe"}, 60)["device"]
    assert (device["temperature_c"], device["governor"], device["freq_mhz"]) == (47.5, "powersave", 600.0)
    assert device["cpu"] == "Testium 9"
    assert "freq_max_mhz" not in device
    target.env["EDGE_SYSROOT"] = str(tmp_path / "nothing")
    device = target.run({"protocol": PROTOCOL, "op": "probe"}, 60)["device"]
    assert not {"temperature_c", "governor", "freq_mhz", "freq_max_mhz", "cpu", "board"} & device.keys()


def test_busy_names_the_holder_and_a_dead_holder_holds_nothing(target: LocalTarget, model: Path):
    lock = Path(target.env["TMPDIR"]) / "secateur-device.lock"
    with lock.open("w") as file:
        file.write("12345\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)  # even a shared lock keeps an exclusive one out
        code, answer = run_agent(json.dumps(request_for(model)), target)
        assert (code, answer["error"]) == (75, "busy")
        with pytest.raises(DeviceError, match=r"holder pid 12345; waited 0\.2 s") as caught:
            target.run(request_for(model), 60)
        assert caught.value.code == "busy"
    assert "models" in target.run(request_for(model), 60)
    assert lock.read_text().strip() != "12345"


def test_sha256_mismatch(target: LocalTarget, model: Path):
    request = request_for(model)
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    code, answer = run_agent(json.dumps(request), target)
    assert (code, answer["error"]) == (EXIT_CODES["sha256-mismatch"], "sha256-mismatch")
    with pytest.raises(DeviceError, match="sha256-mismatch: m: expected"):
        target.run(request, 60)


def test_corrupted_and_missing_model(target: LocalTarget, model: Path, tmp_path: Path):
    model.write_bytes(model.read_bytes()[:40])
    with pytest.raises(DeviceError, match="model-load: m:") as caught:
        target.run(request_for(model), 60)
    assert caught.value.code == "model-load"
    with pytest.raises(DeviceError, match="export it first"):
        target.put(tmp_path / "none.onnx")


def test_no_silent_fallback_to_another_provider(target: LocalTarget, model: Path):
    with pytest.raises(DeviceError, match="no execution provider NoExecutionProvider; this onnxruntime has"):
        target.run(request_for(model, provider="NoExecutionProvider"), 60)


def test_missing_runtime(target: LocalTarget, model: Path, tmp_path: Path):
    (tmp_path / "shadow" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "shadow" / "onnxruntime" / "__init__.py").write_text("raise ImportError('no runtime here')")
    target.env["PYTHONPATH"] = str(tmp_path / "shadow")
    with pytest.raises(DeviceError, match="no runtime here; run: pip install onnxruntime") as caught:
        target.run(request_for(model), 60)
    assert caught.value.code == "missing-runtime"


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("hello", "not one line of JSON"),
        ("{}", "protocol 1"),
        ('{"protocol": 1, "op": "dance"}', "'dance'"),
        ('{"protocol": 1, "op": "benchmark", "models": [], "threads": "two"}', "threads"),
    ],
)
def test_bad_requests(target: LocalTarget, line: str, detail: str):
    code, answer = run_agent(line + "\n", target)
    assert (code, answer["error"]) == (64, "bad-request")
    assert detail in answer["detail"]


def test_time_out_ends_the_agent(target: LocalTarget, model: Path):
    with pytest.raises(DeviceError, match="no answer within 1 s") as caught:
        target.run(request_for(model, min_repeats=10**9, max_seconds=600), 1.0)
    assert caught.value.code == "timeout"
    assert "models" in target.run(request_for(model), 60)  # the lock is free, so the agent is gone


def test_no_orphan_when_the_parent_is_killed(target: LocalTarget, model: Path):
    script = (
        "import json, sys; from device_profiles import LocalTarget\nLocalTarget().run(json.loads(sys.argv[1]), 600)"
    )
    request = json.dumps(request_for(model, min_repeats=10**9, max_seconds=600))
    lock = Path(target.env["TMPDIR"]) / "secateur-device.lock"
    env = {**target.env, "PYTHONPATH": str(AGENT.parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", script, request], env=env)
    try:
        assert wait_until(lambda: lock.exists() and lock.read_text().strip())
        agent = int(lock.read_text())
        assert not is_gone(agent)
    finally:
        parent.kill()
        parent.wait()
    gone = wait_until(lambda: is_gone(agent))
    if not gone:  # leave nothing behind, even when the test fails
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent, signal.SIGKILL)
    assert gone


def test_noise_around_the_answer_is_ignored():
    assert read_answer('Welcome!\n\n{"models": 1}\n[2]\nbye\n', "", 0) == {"models": 1}


@pytest.mark.parametrize(("returncode", "cause"), [(-4, "signal SIGILL"), (1, "exit code 1"), (0, "exit code 0")])
def test_no_answer(returncode: int, cause: str):
    with pytest.raises(DeviceError, match=f"{cause}.*last words"):
        read_answer("noise", "Traceback\nlast words", returncode)
