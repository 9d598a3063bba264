"""How many processor cores this process may use: no more than its affinity and its control groups leave it.

``os.cpu_count()`` counts what the machine has. In a container, under a batch system or ``taskset``, threads beyond what
is allowed only wait for each other: at 1 of 8 cores the same work takes 3.6 times as long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

V1_MOUNTS = ("cpu,cpuacct", "cpuacct,cpu", "cpu")
"""Where version 1 of control groups has its processor controller, below ``/sys/fs/cgroup``."""
V2_MOUNTS = ("", "unified")


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may use, at least 1; a share of a core counts as none beside whole ones.

    Args:
        root: where ``proc`` and ``sys`` are; the affinity is always this process's.
    """
    return max(1, min([allowed_cores(), *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """What each control group that this process is in gives it, in cores; those above it count too."""
    mounts = root / "sys/fs/cgroup"
    for controllers, group in _groups(root):
        if controllers == "":
            quotas = (_v2(folder) for mount in V2_MOUNTS for folder in _folders(mounts / mount, group))
        elif "cpu" in controllers.split(","):
            quotas = (_v1(folder) for mount in V1_MOUNTS for folder in _folders(mounts / mount, group))
        else:
            continue
        yield from (quota for quota in quotas if quota is not None)


def _groups(root: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """(controllers, path) of the control groups of this process; version 2 names no controllers."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator:
            yield controllers, PurePosixPath(path)


def _folders(mount: Path, group: PurePosixPath) -> Iterator[Path]:
    """The folder of a group and those above it, up to the mount.

    A container without a namespace of its own sees its host's path, but mounts its own group as the top: the mount
    counts in any case, and folders that are not there do not.
    """
    inner = group.relative_to("/") if group.is_absolute() else group
    yield from (mount / part for part in (inner, *inner.parents) if ".." not in part.parts)


def _v2(folder: Path) -> float | None:
    """``cpu.max``: a quota and a period in microseconds, or ``max``."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    return _ratio(quota, period or "100000")


def _v1(folder: Path) -> float | None:
    """Two files; a quota of -1 is none."""
    return _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return share if share > 0 else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def cores_of_machine() -> int:
    """The machine's cores, whoever may use them."""
    return os.cpu_count() or 1


def allowed_cores() -> int:
    """The cores that this process's affinity allows."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores_of_machine()
