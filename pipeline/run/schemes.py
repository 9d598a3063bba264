"""Which number types int8 has on a run's devices: one template serves all of them, so the most careful one counts."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

from secateur.device_profiles import DeviceProfile
from secateur.device_profiles.target import kind_of

X86 = {"x86_64", "amd64", "x86-64"}


def scheme_of(profiles: Iterable[DeviceProfile]) -> str:
    """A name of ``secateur.export.qdq.SCHEMES``: 7-bit weights where an x86 processor is not known to have VNNI."""
    return "U8S7" if any(map(_clips, profiles)) else "U8S8"


def _clips(profile: DeviceProfile) -> bool:
    """Whether a device's 8-bit kernels may add pairs of products in 16 bits and clip."""
    here = kind_of(profile).this_machine
    architecture = platform.machine() if here else str(profile.facts.get("arch", ""))
    said = _flags() if here else str(profile.facts.get("isa", "")).lower()
    return architecture.lower() in X86 and "vnni" not in said


def _flags() -> str:
    """What the processor of this machine can do; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.lower() for line in lines if line.startswith("flags")), "")
