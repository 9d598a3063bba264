"""A table of images: CSV with the columns ``path`` and ``label``, and perhaps ``split``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.device_profiles.wording import shown
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.content import Reading
from secateur.pipeline.workloads.data.listing import role_of, same_name
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.paths import find, read_text
from secateur.pipeline.workloads.data.sources import ImageData, Wanted, labelled_files

KEYS, NEEDS = ("path", "classes", "damaged", "columns"), ("path",)
COLUMNS = ("path", "label", "split")
ALSO = {
    "path": ("file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("class", "class_name", "category", "target"),
}
"""What the columns are often called, in any case, where a table has none of our names."""
DELIMITERS = ",;\t"


def looks_like(path: Path) -> str | None:
    """What is seen where a path is a table of images, or a folder with one and nothing else that could be data."""
    file = _table(path)
    if file is None:
        return None
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as opened:
        first = opened.readline()
    header = next(csv.reader([first], delimiter=_delimiter(first)), [])
    columns = _columns(header, {})
    if not {columns["path"], columns["label"]} <= set(header):
        return None
    other = "" if columns["path"] == "path" and columns["label"] == "label" else " ({path} and {label})"
    return f"a table of images, {file.name}{other.format(**columns)}"


def what_lacks(path: Path) -> str:
    """What a table of images lacks where a path is a table; empty where it is none."""
    if not path.is_file() or _table(path) is None:
        return ""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as opened:
        first = opened.readline().strip()
    return (
        f"its first line is {shown(first)}; a table of images has the columns path and label, or says which they are: "
        "data.columns: {path: COLUMN, label: COLUMN}"
    )


def load_images(options: Any, wanted: Wanted, reading: Reading) -> ImageData:
    """The images of a table; their paths count from its folder.

    Args:
        options: the ``data`` section: ``path``, ``columns`` (``path``, ``label`` and ``split`` -> what they are called
            in the table), ``classes``, ``damaged``.

    Raises:
        UserError: a column, a value or a file is missing or wrong; names the line.
    """
    place = find(options.path, "table of images")
    file = _table(place)
    if file is None:
        raise UserError(f"{place} is no CSV file, and has none; name the file in data.path")
    columns, rows = _rows(file, options.columns or {})
    names = _classes(file, rows, columns["label"], options.classes)
    tally = Tally()
    parts: dict[str, tuple[list[Path], list[int]]] = {}
    seen: dict[Path, int] = {}
    for line, row in rows:
        path = _image(file.parent, row["path"])
        if path in seen:
            raise UserError(f"{file}, line {line}: {row['path']} stands in line {seen[path]} too; remove one")
        seen[path] = line
        if not path.is_file():
            raise UserError(
                f"{file}, line {line}: there is no image {path}; correct the path (it counts from the table)"
            )
        files, labels = parts.setdefault(_role(file, line, row.get("split", "train")), ([], []))
        files.append(path)
        labels.append(names.index(same_name(row["label"])))
    if "train" not in parts:
        raise UserError(f"{file}: no image of the split train ({columns['split']}: {some(sorted(parts))})")
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        tally.say("the images of the split val serve as test split, as there is none of test")
    return labelled_files(parts, file.parent, names, str(file), wanted, options.damaged, reading, tally)


def _table(path: Path) -> Path | None:
    """The CSV file that a path means: itself, or the only one of a folder."""
    if path.is_file():
        return path if path.suffix.lower() in (".csv", ".tsv") else None
    tables = [entry for entry in sorted(path.glob("*.csv")) if not entry.name.startswith(".")]
    return tables[0] if len(tables) == 1 else None


def _image(folder: Path, written: str) -> Path:
    """The image that a path of a table means; Windows writes it with backslashes."""
    path = folder / written
    return folder / written.replace("\\", "/") if "\\" in written and not path.exists() else path


def _delimiter(header: str) -> str:
    """What parts the columns: what the first line has most of."""
    return max(DELIMITERS, key=header.count)


def _columns(header: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """What the columns are called in a table: as the run file says, by our names, or by what they are often called."""
    columns = {name: given.get(name, name) for name in COLUMNS}
    for name, others in ALSO.items():
        found = [column for column in header if column.strip().lower() in others]
        if name not in given and name not in header and len(found) == 1:
            columns[name] = found[0]
    return columns


def _rows(file: Path, given: Mapping[str, str]) -> tuple[dict[str, str], list[tuple[int, dict[str, str]]]]:
    """(what the columns are called, (line, ``path``, ``label`` and ``split``) of every image).

    Args:
        given: what the run file says that they are called.
    """
    lines = read_text(file).splitlines()
    reader = csv.DictReader(lines, delimiter=_delimiter(lines[0] if lines else ""))
    header = list(reader.fieldnames or [])
    columns = _columns(header, given)
    for name in COLUMNS if given.get("split") else COLUMNS[:2]:
        if columns[name] not in header:
            raise UserError(
                f"{file}: no column {columns[name]!r}; {known(header, columns[name])}. Say which one it is: "
                f"data.columns: {{{name}: COLUMN}}"
            )
    rows = []
    for row in reader:
        values = {name: (row.get(column) or "").strip() for name, column in columns.items() if column in header}
        empty = [columns[name] for name, value in values.items() if not value]
        if empty:
            where = f"{file}, line {reader.line_num}"
            raise UserError(f"{where}: no value in column {' and '.join(empty)}; fill it, or remove the line")
        rows.append((reader.line_num, values))
    if not rows:
        raise UserError(f"{file}: no images; expected a line for each, after the header")
    return columns, rows


def _classes(file: Path, rows: list[tuple[int, dict[str, str]]], column: str, wanted: Any) -> tuple[str, ...]:
    """Names of the classes, by index: as the run file says, else numbers by size, else sorted as text."""
    found = {same_name(row["label"]): line for line, row in reversed(rows)}
    if wanted is None:
        numbers = all(name.isascii() and name.isdigit() for name in found)
        names = tuple(sorted(found, key=int) if numbers else sorted(found))
        if len(names) < 2:
            raise UserError(f"{file}: column {column!r} needs at least two classes; found {some(names)}")
        return names
    names = tuple(same_name(name) for name in wanted)
    for name, line in found.items():
        if name not in names:
            raise UserError(
                f"{file}, line {line}: class {name!r} is not among data.classes; {known(list(names), name)}. Name "
                "every class, or correct the table"
            )
    return names


def _role(file: Path, line: int, word: str) -> str:
    role = role_of(word)
    if role is None:
        raise UserError(f"{file}, line {line}: split {word!r}; expected train, val or test")
    return role
