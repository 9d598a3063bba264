"""A device whose runtime loads another format than ONNX: files are converted on their way there.

Whoever measures goes on naming ONNX files, and results stay results of those; only the device sees the other format.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.device_profiles import DeviceError, Target
from secateur.device_profiles.target import Progress
from secateur.export.artifact import sha256_of
from secateur.export.errors import ExportError
from secateur.export.formats import FORMATS

ONNX = ".onnx"
KEPT = 64
"""Converted files that are kept at a time: more than one measurement names."""


def in_format(target: Target, name: str) -> Target:
    """A target that takes ONNX files and brings files of a format to the device.

    Args:
        name: of the format; for ONNX itself it is the target as it is.

    Raises:
        ExportError: there is no such format.
    """
    try:
        kind = FORMATS.load(name)
    except ValueError as error:
        raise ExportError(str(error)) from error
    return target if kind.SUFFIX == ONNX else InFormat(target, kind, name)


def converted(kind: Any, name: str, source: Path, to: Path) -> None:
    """Write a file of a format from an ONNX file; it appears whole or not at all.

    Args:
        kind: module of ``secateur.export.formats``.
        name: of the format.

    Raises:
        ExportError: it cannot be written in that format.
    """
    part = to.with_name(f"part-{to.name}")
    try:
        kind.write(source, part)
        if hasattr(kind, "verify"):
            kind.verify(part)
        part.replace(to)
    except ExportError:
        raise
    except Exception as error:  # converters are others' code, whose exceptions share no base class
        raise ExportError(f"{source.name} cannot be written as {name}: {type(error).__name__}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


class InFormat:
    """A target behind a conversion; see ``in_format``."""

    def __init__(self, target: Target, kind: Any, name: str) -> None:
        self.target, self.kind, self.name = target, kind, name
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-format-")
        self._made: dict[str, Path] = {}  # by sha256 of the ONNX file
        self._sha256: dict[str, str] = {}  # by place on the device

    def prepare(self) -> Mapping[str, Any]:
        return self.target.prepare()

    def put(self, path: Path) -> str:
        """Bring a file in the format; what is no ONNX file is brought as it is.

        Raises:
            DeviceError: as the target; ``model-load`` where it cannot be written in the format.
        """
        if path.suffix != ONNX or not path.is_file():
            return self.target.put(path)
        try:
            file = self._file(path)
        except ExportError as error:
            raise DeviceError(str(error), "model-load") from error
        place = self.target.put(file)
        self._sha256[place] = sha256_of(file)
        return place

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        """See ``Target.run``; the device checks the files it was brought."""
        models = [{**model, "sha256": self._sha256.get(model["path"], model["sha256"])} for model in _models(request)]
        return self.target.run({**request, "models": models} if models else request, timeout_s, progress)

    def fetch(self, path: str, to: Path) -> None:
        self.target.fetch(path, to)

    def close(self) -> None:
        self.target.close()
        self._folder.cleanup()

    def _file(self, path: Path) -> Path:
        digest = sha256_of(path)
        if digest not in self._made:
            made = Path(self._folder.name, digest + self.kind.SUFFIX)
            converted(self.kind, self.name, path, made)
            self._made[digest] = made
            if len(self._made) > KEPT:
                self._made.pop(next(iter(self._made))).unlink(missing_ok=True)
        return self._made[digest]


def _models(request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(request.get("models") or ())
