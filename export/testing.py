"""What every format of exported files promises, as a check for whoever writes one; no pytest needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.export.artifact import sha256_of
from secateur.export.convert import converted
from secateur.export.errors import ExportError


def check_format(module: Any, network: Path, folder: Path) -> None:
    """Write a network twice, and see that a damaged file is told where the format can tell.

    Args:
        module: as those of ``secateur.export.formats``.
        network: an ONNX file.
        folder: an empty one.

    Raises:
        AssertionError: the format breaks a promise.
        ExportError: the network cannot be written in it.
    """
    assert (module.__doc__ or "").strip(), "there is no docstring; its first line is how the format is listed"
    assert module.SUFFIX.startswith(".") and module.SUFFIX.isprintable(), f"{module.SUFFIX!r} is no suffix"
    before = sha256_of(network)
    files = [folder / f"{name}{module.SUFFIX}" for name in ("first", "second")]
    for file in files:
        converted(module, "mine", network, file)
    assert sha256_of(network) == before, "the ONNX file was changed"
    assert sorted(folder.iterdir()) == sorted(files), "something else was left beside the file"
    assert sha256_of(files[0]) == sha256_of(files[1]), "the same network gives other bytes; files are sent by content"
    if hasattr(module, "verify"):
        files[1].write_bytes(files[1].read_bytes()[:-16])
        try:
            module.verify(files[1])
        except ExportError:
            return
        raise AssertionError("verify() takes a file that was cut off")
