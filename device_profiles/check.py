"""Whether a device is ready to be measured on: a list of checks, each with what was found and what to do about it.

A pure judgement of what ``Target.prepare`` answered; nothing is reached from here. What a device does not tell is left
out: no sensor is no fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from secateur.device_profiles.agent import EXIT_CODES
from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.profile import RUNTIMES, DeviceProfile
from secateur.device_profiles.runtime import Runtime, runtime_named, runtime_of
from secateur.device_profiles.target import adding, is_template, needs
from secateur.device_profiles.wording import command

Status = Literal["ok", "warning", "missing"]

OLDEST_PYTHON = (3, 8)
"""What the agent is written for."""
LEAST_DISK_BYTES, ENOUGH_DISK_BYTES = 20_000_000, 200_000_000
LEAST_MEMORY_BYTES, ENOUGH_MEMORY_BYTES = 64_000_000, 256_000_000
MAX_PRESSURE = 0.05
MIN_CLOCK = 0.95
AGENT_CODES = {*EXIT_CODES, "no-python", "wrong-arch", "agent-died"}
"""Errors that only a device that was reached can report."""
RUNTIME_CODES = {"missing-runtime", "runtime-crashes-on-import", "runtime-too-old"}
MACHINES = {"arm64": "aarch64", "amd64": "x86_64", "armv8l": "armv7l"}
"""Other names of the same architecture."""
PI_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
"""Of the Raspberry Pi's ``get_throttled``; 16 bits further up: the same since it was started."""
SENSORS = {
    "temperature_c": "temperature",
    "freq_mhz": "clocks",
    "throttled": "throttling (Raspberry Pi)",
    "cooling": "cooling",
    "cpu_pressure_us": "load",
}


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Args:
        status: ``missing``: nothing can be measured until it is put right; ``warning``: measuring works, mind this.
        fix: what to do; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def judge(
    profile: DeviceProfile, answer: Mapping[str, Any] | DeviceError, newest: Mapping[str, str] | None = None
) -> tuple[Check, ...]:
    """What stands between this profile and a measurement.

    Args:
        answer: what ``Target.prepare`` returned or raised.
        newest: package -> newest version known, for comparison (the runtime's, ``numpy``).
    """
    checks = [_profile(profile)]
    if isinstance(answer, DeviceError):
        return (*checks, *_failure(profile, answer))
    device, limits = _section(answer, "device"), _section(answer, "limits")
    now = {**device, **limits, **_section(answer, "now")}
    named = (answer.get("host"), device.get("board"), device.get("cpu"))
    host = ", ".join(str(name) for name in named if name)
    checks += [
        Check("reachable", "ok", host),
        Check("agent", "ok", f"answers (protocol {answer.get('protocol', '?')})"),
    ]
    checks += _python(device, runtime_of(profile))
    checks += _runtime(profile, _section(answer, "runtime"), newest or {}, now)
    checks += _holds(now)
    checks += _architecture(profile, device)
    checks += _cores(profile, limits)
    checks += _room(limits)
    checks += _lock(limits)
    checks += _clocks(now)
    checks += _heat(profile, now)
    checks += _load(now)
    checks += _sensors(limits)
    return tuple(checks)


def _section(answer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = answer.get(name)
    return value if isinstance(value, Mapping) else {}


def _profile(profile: DeviceProfile) -> Check:
    if is_template(profile):
        return Check("profile", "missing", f"valid, but it needs {needs(profile)}", adding(profile))
    if not profile.timing:
        verdict = "valid; timing: false, so outputs can be compared here, but its times mean nothing"
        return Check("profile", "warning", verdict)
    return Check("profile", "ok", f"valid: {profile.provider}, threads: {profile.threads}")


def _failure(profile: DeviceProfile, error: DeviceError) -> Iterator[Check]:
    """The checks up to the one that failed; what comes after it is not known."""
    if is_template(profile):
        return
    if error.code not in AGENT_CODES:
        fix = f"as it says there; then: {command('secateur', 'devices', 'check', profile.name)}"
        yield Check("reachable", "missing", f"{error.code}: {error}", fix)
        return
    yield Check("reachable", "ok", "")
    if error.code == "no-python":
        yield Check("python", "missing", str(error), "install python3 there, or say where it is: connect.python")
    elif error.code == "wrong-arch":
        fix = "connect.python names a program for another processor; name one of the device's own"
        yield Check("python", "missing", str(error), fix)
    elif error.code in RUNTIME_CODES:
        yield Check("agent", "ok", "answers")
        yield Check(runtime_of(profile).name, "missing", str(error), _runtime_fix(error.code, profile))
    elif error.code == "busy":
        yield Check("agent", "ok", "answers")
        yield Check("lock", "warning", str(error), "wait until that measurement is over, or end it")
    elif error.code == "disk-full":
        yield Check("disk", "missing", str(error), "make room, or put connect.folder on another disk")
    else:
        yield Check("agent", "missing", f"{error.code}: {error}", "see the table of docs/how-to/device-errors.md")


def _python(device: Mapping[str, Any], runtime: Runtime) -> Iterator[Check]:
    wheels = runtime.oldest_python or OLDEST_PYTHON
    version = str(device.get("python", ""))
    if not version:
        return
    if _version(version) < OLDEST_PYTHON:
        yield Check("python", "missing", version, "the agent needs Python 3.8 or newer; set connect.python")
    elif _version(version) < wheels:
        fix = f"the {runtime.name} of today needs Python {_dotted(wheels)}; this one gets an older one"
        yield Check("python", "warning", version, fix)
    else:
        yield Check("python", "ok", version)


def _runtime(
    profile: DeviceProfile, runtime: Mapping[str, Any], newest: Mapping[str, str], device: Mapping[str, Any]
) -> Iterator[Check]:
    kind = runtime_of(profile)
    code = str(runtime.get("error") or ("missing-runtime" if not runtime.get(kind.name) else ""))
    if code:
        fix = "; ".join(filter(None, [_runtime_fix(code, profile), _unfit(kind, device)]))
        yield Check(kind.name, "missing", str(runtime.get("detail") or code), fix)
        return
    if _version(str(runtime[kind.name])) < kind.oldest:
        fix = f"install {kind.name} {_dotted(kind.oldest)} or newer there; files are written for that"
        yield Check(kind.name, "missing", str(runtime[kind.name]), fix)
        return
    for package in (kind.name, "numpy"):
        version, known = str(runtime.get(package, "")), newest.get(package, "")
        if not version:
            continue
        if known and _version(version)[:2] < _version(known)[:2]:
            fix = f"update it if you can (python -m pip install -U {package}); models of newer operators need it"
            yield Check(package, "warning", f"{version}; {known} is known here", fix)
        else:
            yield Check(package, "ok", version)
    providers = [str(name) for name in runtime.get("providers", [])]
    if providers and profile.provider not in providers:
        package = kind.package(profile.provider) or f"an {kind.name} built with it"
        fix = f"python -m pip install {package}, or name one of these in the profile"
        yield Check("provider", "missing", f"no {profile.provider}; there are {', '.join(providers)}", fix)
    elif providers:
        yield Check("provider", "ok", profile.provider)


def _holds(device: Mapping[str, Any]) -> Iterator[Check]:
    """Which runtimes this device can hold, of those that say what their wheels need."""
    if not all(device.get(key) for key in ("machine", "python", "libc")):
        return
    stated = [runtime_named(name) for name, module in RUNTIMES.loaded().items() if hasattr(module, "WHEELS")]
    reasons = {runtime.name: _unfit(runtime, device, python=True) for runtime in stated}
    text = f"can hold {', '.join(name for name, reason in reasons.items() if not reason) or 'none by their wheels'}"
    yield Check("runtimes", "ok", "; ".join([text, *(f"not {name}: {r}" for name, r in reasons.items() if r)]))


def _unfit(runtime: Runtime, device: Mapping[str, Any], python: bool = False) -> str:
    """Why today's wheels of a runtime do not fit a device; empty where they do, or nothing is known.

    Args:
        python: whether its Python is looked at, too.
    """
    machine, libc = str(device.get("machine", "")), str(device.get("libc", ""))
    glibc = runtime.oldest_glibc(MACHINES.get(machine, machine))
    if glibc is None:
        return f"there is no wheel for {machine}"
    if libc.startswith("glibc") and _version(libc) < glibc:
        return f"its wheels need glibc {_dotted(glibc)}, this device has {libc}"
    if python and _version(str(device.get("python", ""))) < runtime.oldest_python:
        return f"its wheels need Python {_dotted(runtime.oldest_python)}"
    return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _runtime_fix(code: str, profile: DeviceProfile) -> str:
    kind = runtime_of(profile)
    package = kind.package(profile.provider) or kind.name
    if code == "runtime-crashes-on-import":
        return f"this build does not fit the processor: install another version of {package}"
    return "; ".join(filter(None, [f"on the device: python -m pip install {package} numpy", kind.install_hint]))


def _architecture(profile: DeviceProfile, device: Mapping[str, Any]) -> Iterator[Check]:
    said, machine = profile.facts.get("arch"), device.get("machine")
    if not said or not machine:
        return
    if MACHINES.get(str(said), str(said)) == MACHINES.get(str(machine), str(machine)):
        yield Check("architecture", "ok", str(machine))
    else:
        fix = "base the profile on one of the same architecture (extends: ...): facts and steps are of another"
        yield Check("architecture", "warning", f"{machine}; the profile says {said}", fix)


def _cores(profile: DeviceProfile, limits: Mapping[str, Any]) -> Iterator[Check]:
    cores = limits.get("cores")
    if isinstance(cores, list):
        text = f"{len(cores)} can be used (numbers {', '.join(map(str, cores))})"
        if profile.threads > len(cores):
            yield Check("cores", "warning", f"{text}, threads: {profile.threads}", f"set threads: {len(cores)} or less")
        else:
            yield Check("cores", "ok", text)
    if profile.connect.get("cpu_share") is not None and "cgroup" in limits:
        if limits["cgroup"]:
            yield Check("cpu share", "ok", f"{profile.connect['cpu_share']:.0%} of a core can be enforced")
        else:
            fix = "run as a user that may write to the cpu cgroup, or leave connect.cpu_share out"
            yield Check("cpu share", "missing", "no cgroup with a cpu controller is writable", fix)


def _room(limits: Mapping[str, Any]) -> Iterator[Check]:
    store, writable = limits.get("store", "the store"), limits.get("store_writable")
    if writable is not None:
        fix = "" if writable else "give the user that folder, or set connect.folder to another one"
        text = f"{store}" if writable else f"{store} is not writable"
        yield Check("store", "ok" if writable else "missing", text, fix)
    rows = (
        ("disk", "free_bytes", LEAST_DISK_BYTES, ENOUGH_DISK_BYTES, "make room, or set connect.folder"),
        ("memory", "memory_available_bytes", LEAST_MEMORY_BYTES, ENOUGH_MEMORY_BYTES, "end other programs there"),
    )
    for name, key, least, enough, fix in rows:
        free = limits.get(key)
        if not isinstance(free, int | float):
            continue
        status: Status = "ok" if free >= enough else "warning" if free >= least else "missing"
        total = limits.get("memory_total_bytes") if name == "memory" else None
        text = f"{free / 1e6:,.0f} MB free" + (f" of {total / 1e6:,.0f} MB" if total else "")
        yield Check(name, status, text, "" if status == "ok" else fix)


def _lock(limits: Mapping[str, Any]) -> Iterator[Check]:
    lock = limits.get("lock")
    if not isinstance(lock, Mapping):
        return
    if not lock.get("held"):
        yield Check("lock", "ok", "free")
        return
    holder = f"held by process {lock.get('pid', 'unknown')}"
    holder += f" of run {lock['run_id']}" if lock.get("run_id") else ""
    yield Check("lock", "warning", holder, "another measurement is running; yours will wait for it")


def _clocks(now: Mapping[str, Any]) -> Iterator[Check]:
    governor = str(now.get("governor") or "")
    if governor == "powersave":
        fix = "sudo cpupower frequency-set -g performance (until the next start)"
        yield Check("governor", "warning", governor, fix)
    elif governor:
        yield Check("governor", "ok", governor)
    clock, most, limit = (now.get(key) for key in ("freq_mhz", "freq_hardware_max_mhz", "freq_max_mhz"))
    if most and limit and limit < MIN_CLOCK * most:
        fix = "something holds the clocks down (a power mode, a limit in cpufreq): lift it"
        yield Check("clocks", "warning", f"limited to {limit:.0f} of {most:.0f} MHz", fix)
    elif clock and limit and governor == "performance" and clock < MIN_CLOCK * limit:
        fix = "wait until it has cooled down; then look at its power supply"
        yield Check("clocks", "warning", f"{clock:.0f} of {limit:.0f} MHz", fix)
    elif clock and limit:
        yield Check("clocks", "ok", f"{clock:.0f} MHz now, up to {limit:.0f} MHz")


def _heat(profile: DeviceProfile, now: Mapping[str, Any]) -> Iterator[Check]:
    heat, most = now.get("temperature_c"), profile.max_temperature_c
    if isinstance(heat, int | float):
        text = f"{heat:.0f} degrees C" + (f", at most {most:.0f} allowed" if most else "")
        if most and heat > most:
            yield Check("temperature", "warning", text, "let it cool down, or give it a fan: times would not count")
        else:
            yield Check("temperature", "ok", text)
    bits, cooling = now.get("throttled"), now.get("cooling")
    if bits is None and cooling is None:
        return
    active, since = throttle_signs(bits or 0)
    active += ["slowed down by the kernel's cooling"] if cooling else []
    if active or since:
        signs = [*(f"{sign} now" for sign in active), *(f"{sign} since it was started" for sign in since)]
        yield Check("throttling", "warning", ", ".join(signs), "a better power supply or a fan; then start it again")
    else:
        yield Check("throttling", "ok", "none")


def throttle_signs(bits: int) -> tuple[list[str], list[str]]:
    """What slows a Raspberry Pi down now, and what has done so since it was started.

    Args:
        bits: of its firmware's ``get_throttled``.
    """
    now = [text for bit, text in PI_BITS.items() if bits >> bit & 1]
    since = [text for bit, text in PI_BITS.items() if bits >> (bit + 16) & 1 and text not in now]
    return now, since


def _load(now: Mapping[str, Any]) -> Iterator[Check]:
    pressure = now.get("cpu_pressure")
    if not isinstance(pressure, int | float):
        return
    text = f"programs wait for a CPU {pressure:.0%} of the time"
    if pressure > MAX_PRESSURE:
        yield Check("load", "warning", text, "end other work; with one thread ratios survive it, times do not")
    else:
        yield Check("load", "ok", text)


def _sensors(limits: Mapping[str, Any]) -> Iterator[Check]:
    """Which sensors can be read; one that is absent is no fault."""
    if not isinstance(limits.get("sensors"), list):
        return
    readable = [text for key, text in SENSORS.items() if key in limits["sensors"]]
    absent = [text for key, text in SENSORS.items() if key not in limits["sensors"]]
    (absent if limits.get("energy", "none") == "none" else readable).append("energy")
    summary = ", ".join(readable) or "none can be read"
    yield Check(
        "sensors", "ok", summary + (f"; not readable, which is no fault: {', '.join(absent)}" if absent else "")
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
