"""What a version consists of: the list of its files with their digests (its provenance), and what a file may be."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from secateur.device_profiles.wording import printable
from secateur.pipeline.errors import TrackingError, VersionError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.tracking.schemas import Provenance, checked, read_json

FOLDER = "secateur"
MODEL, MANIFEST = "model.onnx", f"{FOLDER}/provenance.json"
MAX_FILES, MAX_BYTES, MAX_MANIFEST = 200, 4 << 30, 4 << 20
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "mlflow", "prefect", "secateur")
SOURCES = ("device_profiles", "export", "pipeline", "pruning")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}")


@dataclass(frozen=True)
class Manifest:
    """A version's ``provenance.json``.

    Args:
        raw: its bytes.
        sha256: of these bytes.
        data: what they say.
    """

    raw: bytes
    sha256: str
    data: Mapping[str, Any]

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Path within the version -> its ``sha256`` and ``bytes``; every file but this list."""
        files: Mapping[str, Mapping[str, Any]] = self.data["files"]
        return files

    @classmethod
    def read(cls, raw: bytes, expected: str, what: str) -> Manifest:
        """Check the bytes against their digest, then everything they claim before it is relied on.

        Raises:
            TrackingError: they are others.
            VersionError: they name files that no version may have, or are no list at all.
        """
        digest = hashlib.sha256(raw).hexdigest()
        if digest != expected:
            raise TrackingError(f"the provenance of {what} was changed: sha256 {digest}, expected {expected}")
        try:
            if len(raw) > MAX_MANIFEST:
                raise ValueError("it is too large")
            data = read_json(raw)
            known = checked(Provenance, data)
            if (known.format, known.kind) != (1, "secateur-version"):
                raise ValueError("unknown format")
            for path in known.files:
                check_name(path)
            sizes = [entry.bytes for entry in known.files.values()]
            if len({path.casefold() for path in known.files}) != len(sizes) or MODEL not in known.files:
                raise ValueError("files are named twice, or the model is not")
        except ValueError as error:
            raise VersionError(f"the provenance of {what} cannot be used: {printable(error)}") from error
        if len(sizes) > MAX_FILES or sum(sizes) > MAX_BYTES:
            raise VersionError(f"{what} has {len(sizes)} files of {sum(sizes)} bytes: more than any version should")
        return cls(raw, digest, data)

    def verify(self, path: str, file: Path, what: str) -> None:
        """Compare a file with what is said of it.

        Raises:
            TrackingError: it is another one.
        """
        expected = self.files[path]
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise TrackingError(f"{path} of {what} was changed: {size} bytes, expected {expected['bytes']}")
        if (digest := sha256_of(file)) != expected["sha256"]:
            raise TrackingError(f"{path} of {what} was changed: sha256 {digest}, expected {expected['sha256']}")


def write_manifest(folder: Path, name: str, run_key: str, facts: Mapping[str, Any]) -> str:
    """List a version's files in its folder; returns the list's own sha256."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    data = {"format": 1, "kind": "secateur-version", "name": name, "run": run_key, **facts, "files": files}
    raw = (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
    (folder / MANIFEST).write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def check_name(path: str) -> None:
    """Refuse a path that could leave the folder it is for.

    Raises:
        VersionError: it is not made of plain names.
    """
    if not all(_PART.fullmatch(part) for part in path.split("/")):
        raise VersionError(f"a file of a version cannot be called {path!r}")


def code_facts() -> dict[str, Any]:
    """What made a version: a digest of Secateur's own source, and the packages it ran with."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for file in _sources(root):
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_of(file)}\n".encode())
    packages = {"python": platform.python_version(), "platform": sys.platform}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"code": digest.hexdigest(), "packages": packages}


def _sources(root: Path) -> Iterator[Path]:
    for package in SOURCES:
        for suffix in ("py", "yaml", "j2"):
            yield from sorted((root / package).rglob(f"*.{suffix}"))
