"""The judgement of what a device answers, on answers written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from secateur.device_profiles import DeviceError, DeviceProfile, LocalTarget, load_profile
from secateur.device_profiles.check import Check, judge, throttle_signs
from tests.device_profiles.tiny import quick_profile

NEWEST = {"onnxruntime": "1.31.1", "numpy": "2.4.0"}
GOOD: dict[str, Any] = {
    "protocol": 2,
    "host": "kitchen",
    "device": {
        "board": "Raspberry Pi 5",
        "machine": "aarch64",
        "python": "3.11.2",
        "cpus": 4,
        "governor": "performance",
        "freq_mhz": 2400.0,
        "freq_max_mhz": 2400.0,
        "temperature_c": 51.2,
    },
    "runtime": {"onnxruntime": "1.31.1", "numpy": "2.4.1", "providers": ["CPUExecutionProvider"]},
    "limits": {
        "libc": "glibc 2.36",
        "store": "/home/pi/.cache/secateur",
        "store_writable": True,
        "free_bytes": 4_000_000_000,
        "memory_available_bytes": 3_000_000_000,
        "memory_total_bytes": 4_000_000_000,
        "lock": {"held": False},
        "sensors": ["cpu_pressure_us", "freq_mhz", "temperature_c", "throttled"],
        "cores": [0, 1, 2, 3],
        "cgroup": [],
        "energy": "none",
    },
    "now": {"throttled": 0, "cpu_pressure": 0.01},
}


def board(**changes: Any) -> DeviceProfile:
    connect = {"host": "10.0.0.5", "user": "pi", "port": 2222}
    facts = {"arch": "aarch64"}
    settings = {"target": "ssh", "connect": connect, "facts": facts, "threads": 2, "max_temperature_c": 78}
    return quick_profile(**{**settings, **changes})


def answer(**changes: Any) -> dict[str, Any]:
    """``GOOD`` with changes, ``device__governor="powersave"``; None takes a key away."""
    result = copy.deepcopy(GOOD)
    for place, value in changes.items():
        *sections, key = place.split("__")
        section = result
        for name in sections:
            section = section[name]
        section[key] = value
        if value is None:
            del section[key]
    return result


def found(checks: tuple[Check, ...], name: str) -> Check:
    (check,) = [c for c in checks if c.name == name]
    return check


def test_a_device_in_order_is_all_ok():
    checks = judge(board(), answer(), NEWEST)
    assert {c.status for c in checks} == {"ok"}
    assert [c.fix for c in checks] == [""] * len(checks)
    names = [c.name for c in checks]
    assert names[:7] == ["profile", "reachable", "agent", "python", "onnxruntime", "numpy", "provider"]
    assert {"architecture", "store", "disk", "memory", "lock", "governor", "clocks", "temperature"} < set(names)
    assert {"throttling", "load", "sensors"} < set(names)


@pytest.mark.parametrize(
    ("changes", "name", "status", "says", "fix"),
    [
        ({"device__python": "3.7.3"}, "python", "missing", "3.7.3", "3.8"),
        ({"device__python": "3.9.2"}, "python", "warning", "3.9.2", "3.11"),
        ({"runtime": {}}, "onnxruntime", "missing", "missing-runtime", "pip install onnxruntime numpy"),
        (
            {"runtime": {"error": "runtime-crashes-on-import", "detail": "SIGILL"}},
            "onnxruntime",
            "missing",
            "SIGILL",
            "another version",
        ),
        ({"runtime": {}, "limits__libc": "glibc 2.27"}, "onnxruntime", "missing", "", "need glibc 2.28"),
        ({"runtime__onnxruntime": "1.21.0"}, "onnxruntime", "warning", "1.21.0; 1.31.1", "-U onnxruntime"),
        ({"runtime__numpy": "1.26.4"}, "numpy", "warning", "1.26.4; 2.4.0", "-U numpy"),
        ({"runtime__providers": ["XnnpackExecutionProvider"]}, "provider", "missing", "Xnnpack", "pip install"),
        ({"device__machine": "x86_64"}, "architecture", "warning", "the profile says aarch64", "extends"),
        ({"limits__store_writable": False}, "store", "missing", "not writable", "connect.folder"),
        ({"limits__free_bytes": 5e6}, "disk", "missing", "5 MB free", "connect.folder"),
        ({"limits__free_bytes": 9e7}, "disk", "warning", "90 MB free", "make room"),
        ({"limits__memory_available_bytes": 3e7}, "memory", "missing", "30 MB free of 4,000 MB", "end other"),
        ({"limits__memory_available_bytes": 2e8}, "memory", "warning", "200 MB", "end other"),
        ({"limits__lock": {"held": True, "pid": 77, "run_id": "r1"}}, "lock", "warning", "77 of run r1", "wait"),
        ({"device__governor": "powersave"}, "governor", "warning", "powersave", "performance"),
        ({"device__freq_mhz": 1500.0}, "clocks", "warning", "1500 of 2400", "cooled"),
        ({"device__freq_hardware_max_mhz": 3000.0}, "clocks", "warning", "2400 of 3000", "lift"),
        ({"device__temperature_c": 80.1}, "temperature", "warning", "80 degrees C, at most 78", "fan"),
        ({"now__throttled": 0x50005}, "throttling", "warning", "under-voltage now", "power supply"),
        ({"now__cooling": 2}, "throttling", "warning", "cooling now", "fan"),
        ({"limits__cores": [3]}, "cores", "warning", "1 can be used (numbers 3), threads: 2", "threads: 1"),
        ({"now__cpu_pressure": 0.4}, "load", "warning", "40%", "end other"),
    ],
)
def test_whatever_is_wrong_is_named_with_its_fix(changes: dict[str, Any], name: str, status: str, says: str, fix: str):
    checks = judge(board(), answer(**changes), NEWEST)
    check = found(checks, name)
    assert check.status == status
    assert says in check.found
    assert fix in check.fix
    assert all(c.status == "ok" for c in checks if c.name != name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "can hold ncnn, onnxruntime, openvino"),
        ({"limits__libc": "glibc 2.31"}, "not openvino: its wheels need glibc 2.35, this device has glibc 2.31"),
        ({"device__machine": "armv7l"}, "can hold ncnn; not onnxruntime: there is no wheel for armv7l; not openvino"),
        ({"device__python": "3.9.2"}, "can hold ncnn; not onnxruntime: its wheels need Python 3.11; not openvino"),
        ({"device__machine": "riscv64"}, "can hold none by their wheels; not ncnn: there is no wheel for riscv64"),
    ],
)
def test_what_a_board_can_hold_is_said(changes: dict[str, Any], says: str):
    check = found(judge(board(), answer(**changes), NEWEST), "runtimes")
    assert check.status == "ok" and says in check.found


def test_a_runtime_that_is_older_than_its_file_works_with_is_missing():
    told = answer(runtime={"openvino": "2022.3.1", "numpy": "2.4.1", "providers": ["CPUExecutionProvider"]})
    check = found(judge(board(runtime="openvino"), told), "openvino")
    assert check.status == "missing" and "install openvino 2023.1 or newer" in check.fix


def test_what_the_device_does_not_tell_is_left_out():
    bare = {"protocol": 2, "host": "kitchen", "device": {}, "runtime": GOOD["runtime"]}
    checks = judge(board(), bare)
    assert {c.status for c in checks} == {"ok"}
    names = [c.name for c in checks]
    assert names == ["profile", "reachable", "agent", "onnxruntime", "numpy", "provider"]


def test_a_sensor_that_cannot_be_read_is_no_fault():
    check = found(judge(board(), answer(limits__sensors=["freq_mhz"], limits__energy="counter")), "sensors")
    assert check.status == "ok"
    assert check.found.startswith("clocks, energy; not readable, which is no fault: temperature")


@pytest.mark.parametrize(("folders", "status"), [(["/sys/fs/cgroup/cpu"], "ok"), ([], "missing")])
def test_a_share_of_a_core_needs_a_cgroup(folders: list[str], status: str):
    profile = quick_profile(connect={"cpu_share": 0.5})
    check = found(judge(profile, answer(limits__cgroup=folders)), "cpu share")
    assert check.status == status


def test_idle_clocks_are_no_fault_where_the_governor_lowers_them():
    checks = judge(board(), answer(device__governor="ondemand", device__freq_mhz=600.0))
    assert found(checks, "clocks").status == "ok"


def test_an_emulator_is_said_to_be_one():
    check = found(judge(board(timing=False), answer()), "profile")
    assert check.status == "warning"
    assert "its times mean nothing" in check.found


def test_a_template_says_how_to_make_a_device_of_it():
    profile = load_profile("raspberry-pi-4")
    (check,) = judge(profile, DeviceError("no host", "profile"))
    assert check.status == "missing"
    assert check.fix == "secateur devices add NAME --from raspberry-pi-4 --host user@address"


@pytest.mark.parametrize("code", ["host-key", "key-refused", "connection-refused", "link-dead", "something-new"])
def test_a_device_out_of_reach_has_one_missing_check(code: str):
    checks = judge(board(), DeviceError("what happened; do this", code))
    assert [(c.name, c.status) for c in checks] == [("profile", "ok"), ("reachable", "missing")]
    assert checks[-1].found == f"{code}: what happened; do this"  # the target's own words name the fix
    assert "secateur devices check test" in checks[-1].fix


@pytest.mark.parametrize(
    ("code", "name", "status"),
    [
        ("no-python", "python", "missing"),
        ("wrong-arch", "python", "missing"),
        ("missing-runtime", "onnxruntime", "missing"),
        ("runtime-crashes-on-import", "onnxruntime", "missing"),
        ("busy", "lock", "warning"),
        ("agent-died", "agent", "missing"),
        ("bad-request", "agent", "missing"),
        ("disk-full", "disk", "missing"),
    ],
)
def test_an_error_of_the_agent_means_that_the_device_was_reached(code: str, name: str, status: str):
    checks = judge(board(), DeviceError("what happened", code))
    assert found(checks, "reachable").status == "ok"
    assert checks[-1].name == name
    assert checks[-1].status == status
    assert checks[-1].fix


@pytest.mark.parametrize(
    ("value", "now", "since"),
    [
        (0, [], []),
        (0x5, ["under-voltage", "throttled"], []),
        (0x50000, [], ["under-voltage", "throttled"]),
        (0x40004, ["throttled"], []),
    ],
)
def test_throttling_bits(value: int, now: list[str], since: list[str]):
    assert throttle_signs(value) == (now, since)


def test_this_machine_is_ready():
    checks = judge(load_profile("local"), LocalTarget().prepare())
    assert not [c for c in checks if c.status == "missing"]
    assert found(checks, "python").found
