"""ONNX, as the exporter and the template write it."""

from __future__ import annotations

import shutil
from pathlib import Path

from secateur.export.artifact import describe

SUFFIX = ".onnx"


def write(source: Path, to: Path) -> None:
    """The same file under another name."""
    shutil.copyfile(source, to)


def verify(file: Path) -> None:
    """See that ONNX's checker takes a file.

    Raises:
        ExportError: it does not.
    """
    describe(file)
