"""Image folders of Hugging Face in parquet: a column of encoded images and one of labels, with the classes' names.

The images are unpacked once, each as the file it was, under ``cache`` of SECATEUR_HOME; from there on they are files
like others, looked at and decoded in the same way. The folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import UserError
from secateur.pipeline.surroundings import home
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.listing import is_hidden, role_of
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.paths import find
from secateur.pipeline.workloads.data.sources import ImageData, Wanted, labelled_files

KEYS, NEEDS = ("path", "classes", "damaged"), ("path",)
ROWS_AT_ONCE = 256
KINDS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
"""First bytes of an image -> the suffix of its file."""


def looks_like(path: Path) -> str | None:
    """What is seen where a path is a parquet file, or a folder that has some."""
    files = _files(path)
    return f"images in {number_of(len(files), 'parquet file(s)')}" if files else None


def load_images(options: Any, wanted: Wanted, reading: Reading) -> ImageData:
    """The images of parquet files; their splits are those that the files' or folders' names begin with.

    Args:
        options: the ``data`` section: ``path``, ``classes``, ``damaged``.

    Raises:
        UserError: a file cannot be read, has no column of images or labels, or an image is missing or damaged.
    """
    root, tally = find(options.path, "parquet file or folder of them"), Tally()
    parts: dict[str, tuple[list[Path], list[int]]] = {}
    places: dict[Path, str] = {}
    names: tuple[str, ...] | None = options.classes
    found = _files(root)
    if not found:
        raise UserError(
            f"{root} holds no parquet file; expected train-00000-of-00001.parquet, or folders of the splits"
        )
    for file in found:
        own, files, labels = _unpacked(file)
        names = names or own
        if own is not None and options.classes is None and own != names:
            raise UserError(f"{file} has other classes ({some(own)}) than the files before it ({some(names or ())})")
        into = parts.setdefault(_role(file, root), ([], []))
        into[0].extend(files)
        into[1].extend(labels)
        place = str(file.relative_to(root)) if file != root else file.name
        places |= {image: f"{place} row {row}" for row, image in enumerate(files)}
    if "train" not in parts:
        raise UserError(f"{root}: no file of the split train (there is {some(sorted(parts))})")
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        tally.say("the images of validation serve as test split, as there is none of test")
    if names is None:
        every = {label for _, labels in parts.values() for label in labels}
        names = tuple(str(label) for label in range(max(every) + 1))
    return labelled_files(parts, root, names, str(root), wanted, options.damaged, reading, tally, places)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return [file for file in sorted(path.rglob("*.parquet")) if not any(map(is_hidden, file.relative_to(path).parts))]


def _role(file: Path, root: Path) -> str:
    """The split of a file: ``train-00000-of-00001.parquet``, or ``train/0000.parquet``; else ``train``."""
    parts = file.relative_to(root).parts if file != root else (file.name,)
    words = [parts[-1].split(".")[0].split("-")[0], *reversed(parts[:-1])]
    return next((role for word in words if (role := role_of(word))), "train")


def _unpacked(file: Path) -> tuple[tuple[str, ...] | None, list[Path], list[int]]:
    """(names of the classes where the file says them, the images as files, their labels)."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is no readable parquet file: {error}; download it again") from error
    with opened:
        image, label, names = _columns(file, opened.schema_arrow)
        stamp = file.stat()
        key = f"{file.absolute()} {stamp.st_size} {stamp.st_ino} {stamp.st_mtime_ns}"
        folder = home() / "cache" / "parquet" / hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        labels: list[int] = []
        try:
            for batch in opened.iter_batches(ROWS_AT_ONCE, columns=[image, label]):
                for cell, number in zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True):
                    files.append(_written(file, folder, len(files), cell))
                    labels.append(_label(file, len(labels), number, names))
        except pyarrow.ArrowException as error:
            raise UserError(f"{file} is damaged: {error}; download it again") from error
    return names, files, labels


def _columns(file: Path, schema: Any) -> tuple[str, str, tuple[str, ...] | None]:
    """(column of images, column of labels, names of the classes)."""
    import pyarrow

    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = dict(said.get("info", {}).get("features", {}))
    except (ValueError, AttributeError, TypeError, RecursionError):
        features = {}  # what is told beside the table is no JSON, or of another form
    kinds = {name: f.get("_type") if isinstance(f, dict) else None for name, f in features.items()}
    structs = [
        field.name
        for field in schema
        if kinds.get(field.name) == "Image"
        or (pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    numbers = [f.name for f in schema if kinds.get(f.name) == "ClassLabel"]
    whole = [f.name for f in schema if pyarrow.types.is_integer(f.type)]
    numbers = numbers or [name for name in whole if name in ("label", "labels", "fine_label")]
    wanted = (("images (a struct with bytes)", structs), ("labels (ClassLabel, or label of whole numbers)", numbers))
    for what, columns in wanted:
        if len(columns) != 1:
            raise UserError(
                f"{file}: expected one column of {what}, found {some(columns) if columns else 'none'}; it has "
                f"{', '.join(schema.names)}"
            )
    names = features.get(numbers[0], {}).get("names") if kinds.get(numbers[0]) == "ClassLabel" else None
    return structs[0], numbers[0], None if names is None else tuple(map(str, names))


def _written(file: Path, folder: Path, row: int, cell: Mapping[str, Any] | None) -> Path:
    """The image of a row as a file, written where it is not there."""
    content = None if cell is None else cell.get("bytes")
    if not isinstance(content, bytes) or not content:
        raise UserError(
            f"{file}, row {row}: no image in it; a table that names files elsewhere cannot be read: use CSV"
        )
    suffix = next((suffix for start, suffix in KINDS.items() if content.startswith(start)), ".img")
    path = folder / f"{row:08d}{suffix}"
    if not path.is_file() or path.stat().st_size != len(content):
        path.write_bytes(content)
    return path


def _label(file: Path, row: int, number: Any, names: tuple[str, ...] | None) -> int:
    if not isinstance(number, int) or number < 0 or (names is not None and number >= len(names)):
        known = f"0 to {len(names) - 1}" if names else "whole numbers from 0"
        raise UserError(f"{file}, row {row}: label {number!r}; expected {known}, for each image that is in the file")
    return number
