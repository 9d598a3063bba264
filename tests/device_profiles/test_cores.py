"""Threads follow what this process may use: its affinity, and the quotas of its control groups, version 1 and 2."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from secateur.device_profiles import cores
from secateur.device_profiles.cores import usable_cores

ROOT = Path(__file__).parents[2]
V2, V1 = "0::/user.slice/job\n", "4:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n0::/\n"
BOTH = "sys/fs/cgroup/cpu,cpuacct"


def machine(root: Path, groups: str, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


CASES: dict[str, tuple[str, Mapping[str, str], int]] = {
    "no control groups": ("", {}, 8),
    "v2, no quota": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n"}, 8),
    "v2": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "300000 100000\n"}, 3),
    "v2, more than the affinity": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "6400000 100000\n"}, 8),
    "v2, a share of a core": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "20000 100000\n"}, 1),
    "v2, a core and a share": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000\n"}, 1),
    "v2, another period": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "100000 50000\n"}, 2),
    "v2, no period": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "200000\n"}, 2),
    "v2, a group above": (
        V2,
        {"sys/fs/cgroup/user.slice/cpu.max": "200000 100000", "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000"},
        2,
    ),
    "v2, in a namespace": ("0::/\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "v2, the host's path": ("0::/system.slice/docker-abc\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "v2, above its namespace": ("0::/../../job\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "v2 beside v1": ("0::/a\n", {"sys/fs/cgroup/unified/a/cpu.max": "200000 100000\n"}, 2),
    "v1, no quota": (V1, v1(f"{BOTH}/docker/abc", -1), 8),
    "v1": (V1, v1(f"{BOTH}/docker/abc", 500_000), 5),
    "v1, a group above": (V1, v1(f"{BOTH}/docker/abc", -1) | v1(f"{BOTH}/docker", 200_000), 2),
    "v1, the mount is the group": (V1, v1(BOTH, 250_000), 2),
    "v1, cpu alone": ("1:cpu:/a\n2:cpuacct:/\n", v1("sys/fs/cgroup/cpu/a", 300_000), 3),
    "v1, cpuacct first": ("1:cpuacct,cpu:/a\n", v1("sys/fs/cgroup/cpuacct,cpu/a", 300_000), 3),
    "v1 and v2": (V1, v1(f"{BOTH}/docker/abc", 500_000) | {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
    "nonsense": ("what\n::\n0\n", {"sys/fs/cgroup/cpu.max": "many few\n"}, 8),
    "a period of nothing": (V2, {"sys/fs/cgroup/user.slice/job/cpu.max": "100000 0\n"}, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_quotas_of_control_groups(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, files, expected = CASES[name]
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores(machine(tmp_path, groups, files)) == expected


def test_the_affinity_counts_where_nothing_else_is_said(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from secateur.device_profiles.cores import usable_cores; print(usable_cores())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "1\n"


def test_where_there_is_no_affinity_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cores.os, "sched_getaffinity")
    monkeypatch.setattr(cores.os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


def test_nothing_else_counts_cores() -> None:
    faults = []
    for package in ("pipeline", "pruning", "export", "device_profiles"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name in ("cores.py", "agent.py"):  # the agent runs alone, on the device
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in (
                    "cpu_count",
                    "sched_getaffinity",
                    "process_cpu_count",
                ):
                    faults.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not faults
