"""Which number types int8 has on each of a run's devices: as its processor asks for, or as measures faster there.

Files are made in the number types of the device that they are for. Where devices differ, a candidate's accuracy is that
of the most careful number types among them, and each device is timed with, and gets, a file of its own.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from secateur.device_profiles import DeviceProfile
from secateur.device_profiles.target import kind_of
from secateur.export.qdq import most_careful
from secateur.pipeline.run.journal import Journal, Record

STAGE = "int8 scheme"
BEFORE = frozenset({"metric", "scope", "smallest", "reference", "search"})
"""Stages of runs that begin after this one."""
X86 = {"x86_64", "amd64", "x86-64"}
ARM = ("arm", "aarch64")
"""Beginnings of the names of architectures."""
MARGIN = 0.02
"""By how much others have to be faster than the first that a processor is known for."""


def candidates(profile: DeviceProfile) -> tuple[str, ...]:
    """The number types that may be best on a device: names of ``secateur.export.qdq.SCHEMES``, the likeliest first.

    7-bit weights where an x86 processor is not known to have VNNI; on ARM either kernel may be the faster one.
    """
    if _clips(profile):
        return ("U8S7",)
    return ("U8S8", "S8S8") if _architecture(profile).startswith(ARM) else ("U8S8",)


def scheme_of(profiles: Iterable[DeviceProfile]) -> str:
    """The most careful of the likeliest number types, as long as nothing is measured."""
    return most_careful(candidates(profile)[0] for profile in profiles)


def settled(records: Sequence[Record]) -> Mapping[str, str] | None:
    """Device -> number types, as a journal says; None before it is settled."""
    return next((record["schemes"] for record in records if record.get("stage") == STAGE), None)


def settle(
    journal: Journal,
    profiles: Sequence[DeviceProfile],
    measure: Callable[[str, tuple[str, ...]], Mapping[str, float]],
) -> Mapping[str, str]:
    """Find the number types of every device, and write them down; once a run.

    Args:
        measure: a device's name, and number types -> the unpruned network's latency in each over that in fp32.
    """
    if (known := settled(journal.records)) is not None:
        return known
    if any(record.get("stage") in BEFORE for record in journal.records):  # of an earlier version: one for all
        return dict.fromkeys((profile.name for profile in profiles), scheme_of(profiles))
    ratios = {p.name: measure(p.name, tried) for p in profiles if len(tried := candidates(p)) > 1}
    schemes = {p.name: _fastest(candidates(p), ratios.get(p.name, {})) for p in profiles}
    journal.append({"stage": STAGE, "kind": "choice", "schemes": schemes, "ratios": ratios})
    return schemes


def _fastest(tried: Sequence[str], ratios: Mapping[str, float]) -> str:
    """The likeliest, or what is clearly faster."""
    first = tried[0]
    best = min(tried, key=lambda scheme: ratios.get(scheme, 0.0))
    return best if ratios and ratios[best] < (1 - MARGIN) * ratios[first] else first


def _clips(profile: DeviceProfile) -> bool:
    """Whether a device's 8-bit kernels may add pairs of products in 16 bits and clip."""
    said = _flags() if kind_of(profile).this_machine else str(profile.facts.get("isa", "")).lower()
    return _architecture(profile) in X86 and "vnni" not in said


def _architecture(profile: DeviceProfile) -> str:
    here = kind_of(profile).this_machine
    return (platform.machine() if here else str(profile.facts.get("arch", ""))).lower()


def _flags() -> str:
    """What the processor of this machine can do; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.lower() for line in lines if line.startswith("flags")), "")
