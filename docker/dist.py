"""Build what is given away: an sdist, and a wheel made of it with its bill of materials (PEP 770), into ``dist/``.

    python docker/dist.py [FOLDER]

The bill has what pyproject.toml asks for, with all parts and without what only developers need, in the versions of the
environment that builds (the lock's). Built by the environment's setuptools: nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from packaging.requirements import Requirement
from sbom import PROJECT, bill, normal
from wanted import wanted

ROOT = Path(__file__).parents[1]
PARTS = "all"
BILL = "sboms/secateur.cdx.json"
"""Below the wheel's ``.dist-info``."""


def asked(project: Path, installed: Iterable[Distribution]) -> list[Distribution]:
    """The installed distributions that a project asks for, with those that these ask for here, and the project."""
    packages = {normal(each.metadata["Name"]): each for each in installed}
    todo = {(PROJECT, "")}
    todo |= {pair for line in wanted(project, [PARTS]) for pair in _pairs(Requirement(line))}
    found = set[tuple[str, str]]()
    while todo:
        found.add(pair := todo.pop())
        name, extra = pair
        lines = (packages[name].requires or ()) if name in packages and name != PROJECT else ()
        needs = [
            need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate({"extra": extra})
        ]
        todo |= {pair for need in needs for pair in _pairs(need)} - found
    return [packages[name] for name in sorted({name for name, _ in found}) if name in packages]


def _pairs(need: Requirement) -> set[tuple[str, str]]:
    """A requirement as names with the extras that are asked for; "" = the package itself."""
    return {(normal(need.name), extra) for extra in ("", *need.extras)}


def put_into(wheel: Path, name: str, content: bytes) -> None:
    """Add a file below a wheel's ``.dist-info``, and its line to the record."""
    with ZipFile(wheel) as before:
        files = {info: before.read(info) for info in before.infolist()}
    record = next(info for info in files if info.filename.endswith(".dist-info/RECORD"))
    place = record.filename.removesuffix("RECORD") + name
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    lines = files[record].decode().splitlines()
    lines.insert(-1, f"{place},sha256={digest},{len(content)}")
    files[record] = "\n".join([*lines, ""]).encode()
    with ZipFile(wheel, "w", ZIP_DEFLATED) as after:
        for info, data in files.items():
            if info is record:
                after.writestr(place, content)
            after.writestr(info, data)


def build(folder: Path, to: Path, kind: str) -> Path:
    """An sdist or a wheel of a folder, by setuptools in a process of its own."""
    code = f"from setuptools import build_meta; print('made', build_meta.build_{kind}({str(to)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the {kind} cannot be built:\n{done.stderr}")
    return to / done.stdout.strip().splitlines()[-1].removeprefix("made ")


def main() -> int:
    to = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    to.mkdir(parents=True, exist_ok=True)
    for old in (*to.glob("secateur-*.tar.gz"), *to.glob("secateur-*.whl")):
        old.unlink()
    sdist = build(ROOT, to, "sdist")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        wheel = build(next(Path(folder).iterdir()), to, "wheel")
    content: dict[str, Any] = bill(asked(ROOT / "pyproject.toml", distributions()))
    put_into(wheel, BILL, json.dumps(content, indent=1).encode() + b"\n")
    for made in (sdist, wheel):
        print(f"{os.path.relpath(made)}: {made.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
