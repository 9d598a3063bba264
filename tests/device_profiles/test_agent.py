"""The agent for real: separate processes, real locks, real signals; small parts of it in this process."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from secateur.device_profiles import agent as agent_module
from secateur.device_profiles.agent import EXIT_CODES, PROTOCOL, AgentError
from secateur.device_profiles.runtimes.onnxruntime import parse_trace
from secateur.device_profiles.target import AGENT
from tests.device_profiles.tiny import write_conv

ENDLESS = {"min_repeats": 10**9, "max_seconds": 600}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A lock and a store of its own, so that a real measurement on this machine does not disturb the test."""
    (tmp_path / "lock").mkdir()
    own = {"SECATEUR_LOCKS": str(tmp_path / "lock"), "SECATEUR_AGENT_STORE": str(tmp_path / "store")}
    return {**os.environ, **own}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_conv(tmp_path / "conv.onnx")


def write_node(path: Path, op: str, opset: int = 20, ir_version: int = 10, domain: str = "") -> Path:
    """One node from ``x`` to ``y``, shape (1, 4)."""
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], domain=domain)],
        "node",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version).SerializeToString())
    return path


def write_giant(path: Path) -> Path:
    """A small file whose output takes 8 GB: shape (2 G,), float."""
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["big"], value=value),
            helper.make_node("ReduceSum", ["big"], ["y"], keepdims=0),
        ],
        "giant",
        [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    graph.initializer.append(helper.make_tensor("size", TensorProto.INT64, [1], [1 << 31]))
    graph.node.insert(0, helper.make_node("Add", ["in", "size"], ["shape"]))
    graph.input[0].name = "in"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def entry_for(path: Path, name: str = "m") -> dict[str, str]:
    return {"name": name, "path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def request_for(*paths: Path, **changes: Any) -> dict[str, Any]:
    names = ["m"] if len(paths) == 1 else [path.stem for path in paths]
    models = [entry_for(path, name) for path, name in zip(paths, names, strict=True)]
    request = {"protocol": PROTOCOL, "op": "benchmark", "models": models, "provider": "CPUExecutionProvider"}
    request |= {"threads": 1, "warmup": 1, "min_repeats": 3, "min_seconds": 0, "max_seconds": 10, "seed": 0}
    return request | changes


class Agent:
    """An agent process whose stdin stays open; whatever is left of it is killed at the end of the test."""

    def __init__(self, request: dict[str, Any] | str, env: dict[str, str], command: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*(command or (sys.executable,)), str(AGENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self.said: list[dict[str, Any]] = []
        self.rest = b""
        self.worker = 0
        line = request if isinstance(request, str) else json.dumps(request)
        self.say(line + "\n")

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (self.process.pid, self.worker):
            with contextlib.suppress(ProcessLookupError):
                if pid:
                    os.killpg(pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()

    def say(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def hang_up(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    def listen(self, until: Callable[[dict[str, Any]], bool], seconds: float = 60.0) -> dict[str, Any] | None:
        """The first line (JSON object) that fits, or None at the end of stdout."""
        assert self.process.stdout
        end = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"silence; so far: {self.said}"
            data = os.read(self.process.stdout.fileno(), 65536)
            *lines, self.rest = (self.rest + data).split(b"\n")
            for i, line in enumerate(lines):
                value = json.loads(line)
                self.said.append(value)
                self.worker = value.get("worker_pid", self.worker)
                if until(value):
                    self.rest = b"\n".join([*lines[i + 1 :], self.rest])
                    return value
            if not data:
                return None

    def until_timing(self) -> Agent:
        assert self.listen(lambda value: value.get("text") == "timing")
        return self

    def answer(self) -> dict[str, Any]:
        found = self.listen(lambda value: "event" not in value)
        assert found is not None, self.process.stderr.read() if self.process.stderr else ""
        self.code = self.process.wait(20)
        return found


def run(request: dict[str, Any] | str, env: dict[str, str], command: tuple[str, ...] = ()) -> dict[str, Any]:
    """The agent's answer; an error must come with its own exit code."""
    with Agent(request, env, command) as agent:
        answer = agent.answer()
        assert agent.code == (EXIT_CODES[answer["error"]] if "error" in answer else 0)
        assert not agent.worker or wait_until(lambda: is_gone(agent.worker))
        return answer


def error(request: dict[str, Any] | str, env: dict[str, str], command: tuple[str, ...] = ()) -> tuple[str, str]:
    answer = run(request, env, command)
    return answer["error"], answer["detail"]


def is_gone(pid: int) -> bool:
    """No such process, or only its corpse."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def work_folders(env: dict[str, str]) -> list[Path]:
    return list((Path(env["SECATEUR_AGENT_STORE"]) / "work").glob("*"))


def is_free(env: dict[str, str]) -> bool:
    with (Path(env["SECATEUR_LOCKS"]) / "secateur-device.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


# ---- what it measures ----


def test_measures_models_in_turn_and_their_nodes(env: dict[str, str], tmp_path: Path):
    paths = write_conv(tmp_path / "dense.onnx", 8), write_conv(tmp_path / "pruned.onnx", 4)
    answer = run(request_for(*paths, min_repeats=5, profile=True, energy=True), env)
    for name in ("dense", "pruned"):
        facts = answer["models"][name]
        assert len(facts["wall_ms"]) == len(facts["cpu_ms"]) == 5
        assert min(facts["wall_ms"]) > 0
        assert facts["load_ms"] > 0 < facts["first_ms"]
        assert facts["import_ms"] > 0
        assert facts["peak_rss_bytes"] > answer["runtime_rss_bytes"] > 10_000_000  # onnxruntime takes tens of MB
        assert len(facts["output_sha256"]) == 64
        assert facts["warmup_calls"] == 1
        assert facts["steady"] is False  # one call tells nothing
        conv = next(node for node in facts["nodes"] if node["op"] == "Conv")
        assert conv["calls"] >= 3
        assert conv["input_shapes"][0] == [1, 3, 8, 8]
        assert conv["output_shapes"][0][2:] == [8, 8]
        assert conv["ms"] >= 0
    environment = answer["environment"]
    assert environment["provider"] == "CPUExecutionProvider"
    assert environment["threads"] == 1
    assert len(environment["cores"]) == 1
    assert {"onnxruntime", "python", "host_sha256", "machine", "elapsed_s", "nivcsw", "loadavg"} <= environment.keys()
    assert abs(environment["clock_jump_s"]) < 60
    times = [sample["t_s"] for sample in environment["telemetry"]]
    assert times == sorted(times)
    phases = [sample["phase"] for sample in environment["telemetry"]]
    assert phases[0] == "before"
    assert phases[-1] == "end"
    assert {"warm-up", "timing"} <= set(phases)
    assert answer["started"] <= answer["ended"]
    assert work_folders(env) == []


def test_same_seed_same_output_and_dynamic_batch(env: dict[str, str], tmp_path: Path):
    paths = write_conv(tmp_path / "fixed.onnx"), write_conv(tmp_path / "free.onnx", batch="n")
    one, two = (run(request_for(*paths, seed=seed), env)["models"] for seed in (1, 2))
    assert one["fixed"]["output_sha256"] == one["free"]["output_sha256"]  # a dynamic dimension is 1
    assert one["fixed"]["output_sha256"] != two["fixed"]["output_sha256"]


def test_stops_at_max_seconds(env: dict[str, str], model: Path):
    answer = run(request_for(model, min_repeats=10**9, max_seconds=0.1), env)
    assert len(answer["models"]["m"]["wall_ms"]) >= 3


@pytest.mark.parametrize(
    ("calls", "steady"),
    [
        ([10.0] * 8, True),
        ([10.0] * 7, False),  # too few to tell
        ([10.0] * 4 + [10.15] * 4, True),
        ([10.0] * 4 + [10.3] * 4, False),
        ([20.0 - 0.5 * i for i in range(20)], False),
        ([20.0 - 0.5 * i for i in range(20)] + [10.0] * 60, True),
        ([10.0, 10.0, 99.0, 10.0] * 2, True),  # an outlier is not the median
        ([0.010] * 4 + [0.011] * 4, True),  # a microsecond is the clock's
    ],
)
def test_steady_calls(calls: list[float], steady: bool):
    assert agent_module.is_steady(calls) is steady


class Sleeper:
    """A model whose calls take the given seconds, then those of the last."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.seconds = seconds

    def call(self) -> None:
        time.sleep(next(self.seconds))


def test_warm_up_goes_on_until_every_model_is_steady():
    job = {"threads": 2, "provider": "CPUExecutionProvider", "warmup": 2, "max_warmup_seconds": 60}
    cold = [0.02 * 0.8**i for i in range(12)]
    slow = Sleeper(iter(cold + [0.002] * 10_000))
    even = Sleeper(iter([0.002] * 10_000))
    facts = agent_module.warm_up([even, slow], job)  # type: ignore[list-item]
    assert facts[0]["warmup_calls"] == facts[1]["warmup_calls"] > 12
    assert [fact["steady"] for fact in facts] == [True, True]
    endless = Sleeper(0.0005 * 1.2**i for i in range(1000))
    (fact,) = agent_module.warm_up([endless], job | {"max_warmup_seconds": 0.05})  # type: ignore[list-item]
    assert fact["steady"] is False
    assert fact["warmup_calls"] >= 2
    (fact,) = agent_module.warm_up([even], job | {"max_warmup_seconds": 0})  # type: ignore[list-item]
    assert fact == {"warmup_calls": 2, "steady": False}


def test_trace_keeps_the_least_time_of_each_node():
    def event(name: str, dur: float, index: str, **facts: Any) -> dict[str, Any]:
        return {"cat": "Node", "name": name, "dur": dur, "args": {"op_name": "Conv", "node_index": index, **facts}}

    shapes = {"input_type_shape": [{"float": [1, 3]}, {"int64": [2]}], "output_type_shape": [{"float": [1, 4]}]}
    events = [
        {"cat": "Session", "name": "session_initialization", "dur": 5000, "args": {}},
        event("a_kernel_time", 300, "1", **shapes),
        event("_kernel_time", 70, "2"),
        event("_kernel_time", 50, "3"),  # nodes without a name are told apart
        event("a_fence_before", 1, "1"),
        event("a_kernel_time", 200, "1", **shapes),
        event("a_kernel_time", 900, "1", **shapes),
        {"cat": "Node", "name": "old_kernel_time", "dur": 10},
    ]
    nodes = parse_trace(events)
    assert [(node["name"], node.get("index"), node["ms"], node["calls"]) for node in nodes] == [
        ("a", 1, 0.2, 3),
        ("", 2, 0.07, 1),
        ("", 3, 0.05, 1),
        ("old", None, 0.01, 1),
    ]
    assert nodes[0]["input_shapes"] == [[1, 3], [2]]
    assert nodes[0]["input_types"] == ["float", "int64"]
    assert nodes[0]["output_shapes"] == [[1, 4]]


def test_energy_per_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_module, "SYSROOT", str(tmp_path))
    assert agent_module.energy_per_call(lambda: time.sleep(0.001), 0.01) is None  # nothing counts
    power, domain = tmp_path / "sys/class/hwmon/hwmon0", tmp_path / "sys/class/powercap/intel-rapl:0"
    files = {f"{power}/curr1_input": "500", f"{power}/in1_input": "4000", f"{power}/power2_input": "1500000"}
    write_tree(tmp_path, files)
    per_call = agent_module.energy_per_call(lambda: time.sleep(0.01), 0.1)
    assert per_call is not None
    assert 20 <= per_call < 400  # 2 W for 10 ms or a little longer
    (power / "energy1_input").write_text("1000")  # a counter is better than samples
    assert agent_module.energy_per_call(lambda: time.sleep(0.001), 0.01) is None  # but it stands still
    write_tree(tmp_path, {f"{domain}/energy_uj": "999000", f"{domain}/max_energy_range_uj": "999999"})
    write_tree(tmp_path, {f"{domain}/name": "package-0", f"{domain}:0/energy_uj": "5"})  # a part of the package

    def call() -> None:
        time.sleep(0.001)
        used = int((domain / "energy_uj").read_text()) + 2000  # begins anew once
        (domain / "energy_uj").write_text(str(used % 1_000_000))

    assert agent_module.energy_per_call(call, 0.02) == pytest.approx(2.0)


# ---- what it knows of the device ----


def test_probe(env: dict[str, str]):
    answer = run({"protocol": PROTOCOL, "op": "probe"}, env)
    assert "CPUExecutionProvider" in answer["runtime"]["providers"]
    assert answer["device"]["machine"]
    limits = answer["limits"]
    assert limits["store"] == env["SECATEUR_AGENT_STORE"]
    assert limits["store_writable"] is True
    assert limits["free_bytes"] > 0
    assert limits["lock"] == {"held": False}
    assert set(limits["cores"]) == os.sched_getaffinity(0)
    assert limits["memory_total_bytes"] >= limits["memory_available_bytes"] > 0
    assert not Path(limits["store"]).exists()  # asking leaves nothing


def test_readings_come_from_the_sysroot_and_are_absent_where_unreadable(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {
        "sys/class/thermal/thermal_zone0/temp": "41000\n",
        "sys/class/thermal/thermal_zone1/temp": "47500\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1800000\n",
        "proc/cpuinfo": "processor: 0\nmodel name\t: Testium 9\n",
    }
    answer = run(
        {"protocol": PROTOCOL, "op": "probe"}, env | {"EDGE_SYSROOT": str(write_tree(tmp_path / "root", files))}
    )
    device = answer["device"]
    assert (device["temperature_c"], device["governor"], device["freq_mhz"]) == (47.5, "powersave", 600.0)
    assert device["cpu"] == "Testium 9"
    assert "freq_max_mhz" not in device
    assert answer["limits"]["sensors"] == ["freq_mhz", "governor", "temperature_c"]
    assert answer["now"] == {
        "temperature_c": 47.5, "governor": "powersave", "freq_mhz": 600.0, "freq_hardware_max_mhz": 1800.0,
    }  # fmt: skip
    monkeypatch.setattr(agent_module, "SYSROOT", str(tmp_path / "nothing"))
    device, limits = agent_module.describe_device(), agent_module.describe_limits()
    assert not {"temperature_c", "governor", "freq_mhz", "freq_max_mhz", "cpu", "board"} & device.keys()
    assert limits["sensors"] == limits["cgroup"] == []
    assert "memory_total_bytes" not in limits


def test_sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_module, "SYSROOT", str(tmp_path))
    assert agent_module.read_sensors([0]) == {}
    cpu, thermal = "sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq", "sys/class/thermal/cooling_device%d/%s"
    files = {
        cpu % 0: "600000",
        cpu % 2: "1500000",
        cpu % 3: "1400000",
        thermal % (0, "type"): "pwm-fan",
        thermal % (0, "cur_state"): "4",
        thermal % (1, "type"): "intel_powerclamp",
        thermal % (1, "cur_state"): "-1",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 total=1\n",
        "proc/loadavg": "0.25 0.20 0.18 1/200 1234\n",
    }
    write_tree(tmp_path, files)
    found = agent_module.read_sensors([2, 3])
    assert found == {
        "freq_mhz": 1400.0,  # of the slowest measured core
        "cooling": 0,  # a fan slows nothing down
        "throttled": 0x50005,
        "cpu_pressure_us": 77,
        "loadavg": 0.25,
    }
    write_tree(tmp_path, {thermal % (2, "type"): "cpufreq-cpu0", thermal % (2, "cur_state"): "3"})
    assert agent_module.read_sensors([2])["cooling"] == 3


@pytest.mark.parametrize(
    ("changes", "throttled"),
    [
        ([{}, {}], None),
        ([{"temperature_c": 99.0}], None),  # hot alone slows nothing down
        ([{"throttled": 0x0}, {"throttled": 0x0}], False),
        ([{"throttled": 0x0}, {"throttled": 0x40000}], True),
        ([{"throttled": 0x4}, {"throttled": 0x0}], True),
        ([{"cooling": 0}, {"cooling": 0}], False),
        ([{"cooling": 0}, {"cooling": 2}, {"cooling": 0}], True),
        ([{"freq_mhz": 1500}] * 6, False),
        ([{"freq_mhz": 1500}] * 5 + [{"freq_mhz": 600}], False),  # one reading is no slow-down
        ([{"freq_mhz": 1500}] * 4 + [{"freq_mhz": 1200}] * 2, True),
        ([{"freq_mhz": 600, "phase": "before"}] * 4 + [{"freq_mhz": 1500}] * 4, False),  # idle before
        ([{"freq_mhz": 1500}, {"freq_mhz": 1200, "phase": "done"}, {"freq_mhz": 1500, "phase": "end"}], True),
    ],
)
def test_signs_of_throttling(changes: list[dict[str, Any]], throttled: bool | None):
    assert agent_module.was_throttled([{"phase": "timing", **change} for change in changes]) is throttled


def test_a_device_that_gets_hot_and_slow_is_seen(env: dict[str, str], model: Path, tmp_path: Path):
    heat = "sys/class/thermal/thermal_zone0/temp"
    clocks = [f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in os.sched_getaffinity(0)]
    root = write_tree(tmp_path / "root", {heat: "40000", **dict.fromkeys(clocks, "1500000")})
    with Agent(request_for(model, min_seconds=2.2), env | {"EDGE_SYSROOT": str(root)}) as agent:
        agent.until_timing()
        time.sleep(0.6)
        write_tree(root, {heat: "85000", **dict.fromkeys(clocks, "900000")})
        agent.listen(lambda value: value.get("text") == "done")
        write_tree(root, {heat: "80000"})
        environment = agent.answer()["environment"]
    assert environment["throttled"] is True
    assert environment["temperature_c"]["start"] == 40.0
    assert environment["temperature_c"]["max"] == 85.0
    assert environment["temperature_c"]["end"] in (80.0, 85.0)
    timed = [sample for sample in environment["telemetry"] if sample["phase"] == "timing"]
    assert len(timed) >= 3
    assert {sample["freq_mhz"] for sample in timed} == {1500.0, 900.0}


def test_calls_without_a_pause_are_told_by_the_second_with_the_sensors_beside_them(
    env: dict[str, str], model: Path, tmp_path: Path
):
    heat = "sys/class/thermal/thermal_zone0/temp"
    clocks = [f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in os.sched_getaffinity(0)]
    root = write_tree(tmp_path / "root", {heat: "40000", **dict.fromkeys(clocks, "1500000")})
    with Agent(request_for(model, sustain_s=2.2), env | {"EDGE_SYSROOT": str(root)}) as agent:
        agent.listen(lambda value: value.get("text") == "sustained")
        write_tree(root, {heat: "70000", **dict.fromkeys(clocks, "1200000")})
        answer = agent.answer()
    windows = answer["models"]["m"]["sustained"]
    assert [int(window["t_s"]) for window in windows] == [0, 1, 2]
    assert all(window["calls"] >= 1 and 0 < window["p50_ms"] <= window["p95_ms"] for window in windows)
    beside = [sample for sample in answer["environment"]["telemetry"] if sample["phase"] == "sustained"]
    assert beside[-1]["temperature_c"] == 70.0 and beside[-1]["freq_mhz"] == 1200.0


def test_nothing_is_sustained_unless_asked(env: dict[str, str], model: Path):
    assert "sustained" not in run(request_for(model), env)["models"]["m"]


def test_a_clock_that_is_set_meanwhile_is_reported(monkeypatch: pytest.MonkeyPatch):
    monitor = agent_module.Monitor()
    assert abs(monitor.facts()["clock_jump_s"]) < 1
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    assert monitor.facts()["clock_jump_s"] == pytest.approx(3600, abs=1)


def test_what_slowed_a_raspberry_pi_long_ago_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_module, "SYSROOT", str(tmp_path))
    path = "sys/devices/platform/soc/soc:firmware/get_throttled"
    with agent_module.Monitor() as monitor:
        assert "throttled" not in monitor.facts()
    write_tree(tmp_path, {path: "50000"})
    with agent_module.Monitor() as monitor:
        assert monitor.facts()["throttled"] is False
        write_tree(tmp_path, {path: "70000"})  # under-voltage and throttling before; a capped clock meanwhile
        facts = monitor.facts()
    assert [sample["throttled"] for sample in facts["telemetry"]] == [0, 0, 0x20000]
    assert facts["throttled"] is True


def test_the_likely_cause_of_a_sigkill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_module, "SYSROOT", str(tmp_path))
    plenty = "MemTotal:  4000000 kB\nMemAvailable:  3000000 kB\n"
    write_tree(tmp_path, {"proc/vmstat": "pgfault 1\noom_kill 2\n", "proc/meminfo": plenty})
    monitor = agent_module.Monitor()
    assert "dmesg" in monitor.killer()
    write_tree(tmp_path, {"proc/meminfo": plenty.replace("3000000", "20000")})
    monitor.tick("timing", due=True)
    write_tree(tmp_path, {"proc/meminfo": plenty})  # free again, once the process is dead
    assert "memory was short (19 MB left)" in monitor.killer()
    write_tree(tmp_path, {"proc/vmstat": "pgfault 1\noom_kill 3\n"})
    assert "kernel ran out of memory" in monitor.killer()


# ---- a share of a core ----


def test_cpu_share_is_kept_and_its_cgroup_removed(env: dict[str, str], model: Path):
    folders = [Path(folder) for folder in agent_module.cgroup_folders()]
    request = request_for(model, cpu_share=0.2, min_seconds=0.3)
    answer = run(request, env)
    if "error" in answer:
        assert answer["error"] == "not-allowed"
        assert "leave cpu_share out" in answer["detail"]
        return
    assert answer["environment"]["nr_throttled"] > 3  # 0.3 s are 30 periods
    facts = answer["models"]["m"]
    assert sum(facts["cpu_ms"]) < 0.5 * sum(facts["wall_ms"])
    assert not [found for folder in folders for found in folder.glob("secateur-*")]
    with Agent(request | ENDLESS, env) as agent:
        agent.until_timing()
        os.kill(agent.process.pid, signal.SIGKILL)
        agent.process.wait()
        left = [found for folder in folders for found in folder.glob("secateur-*")]
        assert left
        assert wait_until(lambda: is_gone(agent.worker))
    run({"protocol": PROTOCOL, "op": "sweep"}, env)
    assert not any(found.exists() for found in left)


def test_cpu_share_in_cgroups_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_module, "SYSROOT", str(tmp_path))
    with pytest.raises(AgentError, match=r"no cgroup with a cpu controller is mounted.*Delegate=yes") as caught:
        agent_module.CpuShare(0.5)
    assert caught.value.code == "not-allowed"
    files = {
        "proc/mounts": "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n",
        "proc/self/cgroup": "0::/user/me\n",
        "sys/fs/cgroup/user/me/cgroup.subtree_control": "memory pids\n",
    }
    write_tree(tmp_path, files)
    share = agent_module.CpuShare(0.25)
    assert share.path == str(tmp_path / f"sys/fs/cgroup/user/me/secateur-{os.getpid()}")
    assert Path(share.path, "cpu.max").read_text() == "2500 10000"
    assert (tmp_path / "sys/fs/cgroup/user/me/cgroup.subtree_control").read_text() == "+cpu"
    Path(share.path, "cpu.max").unlink()
    share.__exit__()
    assert not Path(share.path).exists()
    small = agent_module.CpuShare(0.05)
    assert Path(small.path, "cpu.max").read_text() == "1000 20000"  # the kernel grants no less than 1 ms


# ---- one at a time ----


def test_busy_names_the_holder_and_a_dead_holder_holds_nothing(env: dict[str, str], model: Path):
    with Agent(request_for(model, run_id="night\nrun", **ENDLESS), env) as agent:
        agent.until_timing()
        code, detail = error(request_for(model), env)
        assert code == "busy"
        assert f"holder pid {agent.process.pid}, run night run" in detail
        lock = run({"protocol": PROTOCOL, "op": "probe"}, env)["limits"]["lock"]
        assert lock == {"held": True, "pid": agent.process.pid, "run_id": "night run"}
        assert "models" in run(request_for(model, allow_busy=True), env)
        os.kill(agent.process.pid, signal.SIGKILL)
        agent.process.wait()
        assert "models" in run(request_for(model), env)


def test_other_users_can_lock_too(env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECATEUR_LOCKS", env["SECATEUR_LOCKS"])
    previous = os.umask(0o077)
    try:
        os.close(agent_module.take_lock({}) or 0)
    finally:
        os.umask(previous)
    path = Path(env["SECATEUR_LOCKS"]) / "secateur-device.lock"
    assert path.stat().st_mode & 0o777 == 0o666
    path.unlink()
    path.symlink_to(tmp_path / "victim")  # a trap in a folder that everybody can write to
    with pytest.raises(OSError):
        agent_module.take_lock({})
    assert not (tmp_path / "victim").exists()
    path.unlink()
    path.write_text("77\n")
    real = os.open

    def only_reading(name: Any, flags: int, mode: int = 0o777) -> int:
        if str(name) == str(path) and flags & os.O_RDWR and not flags & os.O_EXCL:
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", only_reading)
    lock = agent_module.take_lock({})
    assert lock
    with pytest.raises(AgentError, match="holder pid 77"):
        agent_module.take_lock({})
    os.close(lock)


# ---- models and runtimes that do not work ----


def test_sha256_mismatch(env: dict[str, str], model: Path):
    request = request_for(model)
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    code, detail = error(request, env)
    assert code == "sha256-mismatch"
    assert request["models"][0]["sha256"] in detail


@pytest.mark.parametrize("content", [b"hello, this is no model", None])
def test_a_damaged_model(env: dict[str, str], model: Path, content: bytes | None):
    model.write_bytes(content or model.read_bytes()[:40])
    code, detail = error(request_for(model), env)
    assert code == "model-load"
    assert detail.startswith("m: ")
    assert "export it again" in detail


def test_a_model_that_is_not_there(env: dict[str, str], model: Path):
    request = request_for(model)
    model.unlink()
    assert error(request, env) == ("model-load", f"{model}: No such file or directory")


@pytest.mark.parametrize(
    ("changes", "code", "detail"),
    [
        ({"op": "Dance"}, "unknown-operator", "Dance"),
        ({"op": "Dance", "domain": "my.own"}, "unknown-operator", "my.own:Dance"),
        ({"op": "Relu", "opset": 99}, "runtime-too-old", "m needs opset 99 of ai.onnx, this onnxruntime "),
        ({"op": "Relu", "ir_version": 99}, "runtime-too-old", "m needs IR version 99, this onnxruntime "),
        ({"op": "MatMul"}, "model-load", "MatMul"),
    ],
)
def test_models_that_this_runtime_does_not_take(
    env: dict[str, str], tmp_path: Path, changes: dict[str, Any], code: str, detail: str
):
    found = error(request_for(write_node(tmp_path / "node.onnx", **changes)), env)
    assert found[0] == code
    assert detail in found[1]
    assert code == "model-load" or "install" in found[1]  # the fix


def test_no_silent_fallback_to_another_provider(env: dict[str, str], model: Path):
    code, detail = error(request_for(model, provider="NoExecutionProvider"), env)
    assert code == "missing-runtime"
    assert "no execution provider NoExecutionProvider; this onnxruntime has" in detail


@pytest.mark.parametrize("op", ["probe", "benchmark"])
def test_missing_runtime(env: dict[str, str], model: Path, op: str):
    bare = (sys.executable, "-S", "-I")  # no site-packages
    code, detail = error(request_for(model, op=op, python=list(bare)), env, bare)
    assert code == "missing-runtime"
    assert "pip install onnxruntime" in detail
    assert os.uname().machine in detail


def test_a_runtime_built_for_another_machine(env: dict[str, str], tmp_path: Path):
    text = "raise ImportError('Advice.\\nOriginal error was: core.so: wrong ELF class: ELFCLASS32')\n"
    write_tree(tmp_path, {"shadow/onnxruntime/__init__.py": text})
    request = {"protocol": PROTOCOL, "op": "probe"}
    code, detail = error(request, env | {"PYTHONPATH": str(tmp_path / "shadow")})
    assert code == "missing-runtime"
    assert detail.startswith("core.so: wrong ELF class: ELFCLASS32; run: pip install")
    assert f"built for another Python or machine; this is Python {sys.version.split()[0]}" in detail


@pytest.mark.parametrize("op", ["probe", "benchmark"])
def test_a_runtime_that_crashes_on_import(env: dict[str, str], model: Path, tmp_path: Path, op: str):
    text = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    write_tree(tmp_path, {"shadow/onnxruntime/__init__.py": text})
    code, detail = error(request_for(model, op=op), env | {"PYTHONPATH": str(tmp_path / "shadow")})
    assert code == "runtime-crashes-on-import"
    assert "SIGILL" in detail
    assert os.uname().machine in detail


def test_memory_short(env: dict[str, str], tmp_path: Path):
    limited = ("sh", "-c", 'ulimit -v 3000000; exec "$0" "$@"', sys.executable)
    code, detail = error(request_for(write_giant(tmp_path / "giant.onnx"), python=list(limited)), env)
    assert code == "no-memory"
    assert "smaller models" in detail


@pytest.mark.parametrize(
    ("python", "code"), [(["/no/such/python"], "no-python"), (["{garbage}"], "wrong-arch"), (["false"], "worker-died")]
)
def test_a_worker_that_does_not_start(env: dict[str, str], tmp_path: Path, python: list[str], code: str):
    garbage = tmp_path / "python"
    garbage.write_bytes(b"\x7fELF" + bytes(60))
    garbage.chmod(0o755)
    python = [part.format(garbage=garbage) for part in python]
    found = error({"protocol": PROTOCOL, "op": "probe", "python": python}, env)
    assert found[0] == code
    assert "connect.python" in found[1] or "exit code 1" in found[1]


def test_noise_of_a_wrapper_is_ignored(env: dict[str, str], model: Path):
    noisy = ("sh", "-c", 'echo "Welcome {"; echo "{}"; echo; echo oops >&2; "$0" "$@"; echo bye', sys.executable)
    assert "models" in run(request_for(model, python=list(noisy)), env)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("hello", "not one line of JSON"),
        ("[1]", "not one line of JSON"),
        ("{}", "protocol 2"),
        ('{"protocol": 1, "op": "probe"}', "protocol 2"),
        ('{"protocol": 2, "op": "dance"}', "'dance'"),
        ('{"protocol": 2, "op": "benchmark", "models": [], "threads": "two"}', "threads"),
        ('{"protocol": 2, "op": "benchmark", "models": [], "threads": 0}', "threads >= 1"),
        ('{"protocol": 2, "op": "probe", "timeout_s": "soon"}', "timeout_s"),
        ('{"protocol": 2, "op": "probe", "cpu_share": -1}', "cpu_share"),
    ],
)
def test_bad_requests(line: str, detail: str):
    with pytest.raises(AgentError, match=re.escape(detail)) as caught:
        agent_module._read_request(line)
    assert caught.value.code == "bad-request"


def test_models_of_one_name_are_refused(env: dict[str, str], model: Path):
    request = request_for(model)
    code, detail = error(request | {"models": request["models"] * 2}, env)
    assert code == "bad-request"
    assert "each once" in detail


# ---- ends of all kinds ----


@pytest.fixture
def busy(env: dict[str, str], model: Path) -> Iterator[Agent]:
    """An agent in the midst of timing, with a work folder."""
    with Agent(request_for(model, profile=True, **ENDLESS), env) as agent:
        agent.until_timing()
        assert not is_gone(agent.worker)
        assert len(work_folders(env)) == 1
        yield agent


def assert_clean(agent: Agent, env: dict[str, str]) -> None:
    assert wait_until(lambda: is_gone(agent.worker))
    assert is_gone(agent.process.pid)
    assert is_free(env)
    assert work_folders(env) == []


def test_worker_killed(busy: Agent, env: dict[str, str]):
    os.kill(busy.worker, signal.SIGKILL)
    answer = busy.answer()
    assert answer["error"] == "worker-died"
    assert answer["detail"].startswith("killed by SIGKILL during timing; ")
    assert busy.code == EXIT_CODES["worker-died"]
    assert_clean(busy, env)


def test_worker_crashed(busy: Agent, env: dict[str, str]):
    os.kill(busy.worker, signal.SIGSEGV)
    answer = busy.answer()
    assert (answer["error"], busy.code) == ("worker-died", EXIT_CODES["worker-died"])
    assert "SIGSEGV during timing" in answer["detail"]
    assert_clean(busy, env)


def test_cancelled(busy: Agent, env: dict[str, str]):
    busy.say('what?\n{"cancel": true}\n')
    assert busy.answer()["error"] == "cancelled"
    assert busy.code == EXIT_CODES["cancelled"]
    assert_clean(busy, env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ended_by_a_signal(busy: Agent, env: dict[str, str], number: signal.Signals):
    os.kill(busy.process.pid, number)
    answer = busy.answer()
    assert answer["error"] == "cancelled"
    assert number.name in answer["detail"]
    assert_clean(busy, env)


def test_client_gone(busy: Agent, env: dict[str, str]):
    busy.hang_up()
    assert busy.process.stdout
    busy.process.stdout.close()  # nobody listens: what it prints now meets a broken pipe
    assert busy.process.wait(20) == EXIT_CODES["cancelled"]
    assert_clean(busy, env)


@pytest.mark.parametrize("stopped", [False, True])
def test_agent_killed_leaves_no_orphan_and_the_next_sweep_clears_up(busy: Agent, env: dict[str, str], stopped: bool):
    if stopped:
        os.kill(busy.process.pid, signal.SIGSTOP)
    os.kill(busy.process.pid, signal.SIGKILL)
    busy.process.wait()
    assert wait_until(lambda: is_gone(busy.worker))
    assert is_free(env)
    left = work_folders(env)
    assert len(left) == 1
    answer = run({"protocol": PROTOCOL, "op": "sweep"}, env)
    assert answer["removed"] == [str(left[0])]
    assert_clean(busy, env)


def test_a_wrapped_worker_dies_with_its_agent_too(env: dict[str, str], model: Path):
    wrapped = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable]  # the kernel's signal reaches only one of the two
    with Agent(request_for(model, python=wrapped, **ENDLESS), env) as agent:
        agent.until_timing()
        family = [agent.worker, *(child.pid for child in psutil.Process(agent.worker).children(recursive=True))]
        assert len(family) == 2
        os.kill(agent.process.pid, signal.SIGKILL)
        agent.process.wait()
        assert wait_until(lambda: all(is_gone(pid) for pid in family))


def test_time_out(env: dict[str, str], model: Path):
    with Agent(request_for(model, profile=True, timeout_s=1.5, **ENDLESS), env) as agent:
        answer = agent.answer()
        assert (answer["error"], agent.code) == ("timeout", EXIT_CODES["timeout"])
        assert "within 1.5 s" in answer["detail"]
        assert "raise the time-out" in answer["detail"]
        assert_clean(agent, env)


def test_waiting_for_a_request_ends_with_the_client_or_a_signal(env: dict[str, str]):
    with Agent("", env) as agent:
        assert agent.answer()["error"] == "bad-request"
    command = [sys.executable, str(AGENT)]
    for end in (lambda process: process.stdin.close(), lambda process: process.send_signal(signal.SIGTERM)):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
            process.wait_for = None  # type: ignore[attr-defined]
            time.sleep(0.3)
            end(process)
            assert process.wait(20) != 0


# ---- inference and files ----


def infer_request(path: Path, **changes: Any) -> dict[str, Any]:
    return request_for(path, **({"op": "infer"} | changes))


def test_models_are_timed_on_the_inputs_that_are_given(env: dict[str, str], tmp_path: Path):
    model, inputs = write_node(tmp_path / "relu.onnx", "Relu"), tmp_path / "in.npz"
    np.savez(inputs, x=np.array([[-1, 2, -3, 4]], dtype=np.float32))
    answer = run(request_for(model, inputs=str(inputs)), env)
    expected = hashlib.sha256(np.array([[0, 2, 0, 4]], dtype=np.float32).tobytes()).hexdigest()
    assert answer["models"]["m"]["output_sha256"] == expected
    assert run(request_for(model), env)["models"]["m"]["output_sha256"] != expected


def test_infer_leaves_outputs_that_the_inputs_give(env: dict[str, str], tmp_path: Path):
    model = write_node(tmp_path / "relu.onnx", "Relu")
    inputs = tmp_path / "in.npz"
    np.savez(inputs, x=np.array([[-1, 2, -3, 4]], dtype=np.float32))
    answer = run(infer_request(model, inputs=str(inputs)), env)
    path = Path(answer["outputs"])
    assert path.parent == Path(answer["work"])
    assert path.parent.parent == Path(env["SECATEUR_AGENT_STORE"]) / "work"
    with np.load(path) as outputs:
        assert outputs["y"].tolist() == [[0, 2, 0, 4]]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == answer["sha256"]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["outputs.npz"]
    run({"protocol": PROTOCOL, "op": "sweep"}, env)
    assert path.exists()  # it may not have been fetched yet
    run({"protocol": PROTOCOL, "op": "sweep", "keep_s": 0}, env)
    assert work_folders(env) == []


def test_infer_runs_on_the_benchmarks_input_and_keeps_odd_names(env: dict[str, str], tmp_path: Path):
    model = onnx.load(write_node(tmp_path / "relu.onnx", "Relu"))
    model.graph.node[0].output[0] = model.graph.output[0].name = "/head/file:0"
    onnx.save(model, tmp_path / "odd.onnx")
    answer = run(infer_request(tmp_path / "odd.onnx", seed=3), env)
    with np.load(answer["outputs"]) as outputs:
        assert outputs["/head/file:0"].shape == (1, 4)
    benchmarked = run(request_for(tmp_path / "odd.onnx", seed=3), env)["models"]["m"]
    assert answer["output_sha256"] == benchmarked["output_sha256"]


@pytest.mark.parametrize(
    ("arrays", "detail"),
    [
        ({"z": np.zeros(1)}, "holds z; the inputs of m are x"),
        ({}, "holds nothing; the inputs of m are x"),
        (None, "no inputs at"),
        (b"PK nonsense", "is no .npz"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path: Path, arrays: Any, detail: str):
    inputs = tmp_path / "in.npz"
    if isinstance(arrays, bytes):
        inputs.write_bytes(arrays)
    elif arrays is not None:
        np.savez(inputs, **arrays)
    runner = SimpleNamespace(name="m", feed={"x": np.zeros((1, 4))})
    with pytest.raises(AgentError, match=re.escape(detail)) as caught:
        agent_module._given_inputs(str(inputs), runner)  # type: ignore[arg-type]
    assert caught.value.code == "bad-request"


def test_inputs_of_the_wrong_shape(env: dict[str, str], tmp_path: Path):
    np.savez(tmp_path / "in.npz", x=np.zeros((2, 9), np.float32))
    request = infer_request(write_node(tmp_path / "relu.onnx", "Relu"), inputs=str(tmp_path / "in.npz"))
    code, detail = error(request, env)
    assert code == "model-run"
    assert "m: InvalidArgument" in detail
    assert work_folders(env) == []


def test_disk_full(env: dict[str, str], model: Path, tmp_path: Path):
    work = tmp_path / "my files"
    work.mkdir()
    (work / "precious").write_text("mine")
    (work / "outputs.npz.part").symlink_to("/dev/full")
    code, detail = error(infer_request(model, work=str(work)), env)
    assert code == "disk-full"
    assert "free some space" in detail
    assert [entry.name for entry in work.iterdir()] == ["precious"]  # only what it made itself goes


def test_a_store_that_cannot_be_made(env: dict[str, str], model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    code, detail = error(infer_request(model), env | {"SECATEUR_AGENT_STORE": str(tmp_path / "file")})
    assert code == "device-error"
    assert str(tmp_path / "file") in detail


def test_a_named_work_folder_in_the_store_goes_when_the_call_fails(env: dict[str, str], model: Path):
    work = Path(env["SECATEUR_AGENT_STORE"]) / "work" / "session 1"
    with Agent(request_for(model, work=str(work), **ENDLESS), env) as agent:
        agent.until_timing()
        assert run({"protocol": PROTOCOL, "op": "sweep", "keep_s": 0}, env)["removed"] == []  # it is in use
        agent.hang_up()
        agent.process.wait(20)
        assert_clean(agent, env)


def test_sweep_spares_what_is_in_use(env: dict[str, str], tmp_path: Path):
    store = write_tree(
        Path(env["SECATEUR_AGENT_STORE"]),
        {"models/old.onnx": "x" * 600, "models/new.onnx": "x" * 600, "models/broken.onnx.part": "x", "a.part": "x"},
    )
    write_tree(store, {"models/growing.onnx.part": "x", "work/fresh/in.npz": "x", "work/stale/in.npz": "x"})
    for path in ("models/broken.onnx.part", "a.part", "work/stale/in.npz", "work/stale", "models/old.onnx"):
        os.utime(store / path, (1e9, 1e9))
    answer = run({"protocol": PROTOCOL, "op": "sweep"}, env)
    assert {Path(path).name for path in answer["removed"]} == {"broken.onnx.part", "a.part", "stale"}
    assert answer["kept_bytes"] == 1200
    small = {"protocol": PROTOCOL, "op": "sweep", "max_store_bytes": 1000}
    lock = Path(env["SECATEUR_LOCKS"]) / "secateur-device.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(small, env)["kept_bytes"] == 1200  # a measurement may need them
    answer = run(small, env)
    assert ([Path(path).name for path in answer["removed"]], answer["kept_bytes"]) == (["old.onnx"], 600)
    assert (store / "models/growing.onnx.part").exists()
    assert (store / "work/fresh/in.npz").exists()


def test_a_model_of_the_store_counts_as_used(env: dict[str, str], tmp_path: Path):
    models = Path(env["SECATEUR_AGENT_STORE"]) / "models"
    models.mkdir(parents=True)
    path = write_conv(models / "m.onnx")
    os.utime(path, (1e9, 1e9))
    run(request_for(path), env)
    assert path.stat().st_mtime > 1e9


# ---- the file itself ----


def test_the_agent_is_one_file_for_old_pythons():
    tree = ast.parse(AGENT.read_text(), feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names | {"numpy"}
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {
        "removeprefix",
        "removesuffix",
        "cache",
        "pidfd_open",
        "waitstatus_to_exitcode",
    }


def test_two_agents_at_once_take_turns_by_being_told(env: dict[str, str], model: Path):
    results: list[dict[str, Any]] = []
    request = request_for(model, min_seconds=1.0)
    threads = [threading.Thread(target=lambda: results.append(run(request, env))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted("models" if "models" in result else result["error"] for result in results) == ["busy", "models"]
