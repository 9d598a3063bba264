"""What a version's JSON files may hold: read as a stranger's, refused as a whole.

Anybody who can write to the registry can write any JSON at all. It is checked here, once, so that what relies on it
need not ask again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_DEPTH = 32
"""How deep lists and mappings may lie within each other; ours have six levels."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
"""Of a version."""
Name = Annotated[str, Field(max_length=1000)]
Side = Annotated[int, Field(ge=1, le=100_000)]
"""Of an image, in pixels."""
EARLIEST, LATEST = -60_000_000_000, 250_000_000_000
"""Seconds since 1970 that every time zone can show; a clock may be set to any of them."""

Schema = TypeVar("Schema", bound=BaseModel)


class _Known(BaseModel):
    """Types are not converted; keys that nobody here reads are of no concern."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class FileEntry(_Known):
    """A file of a version.

    Args:
        bytes: its size.
    """

    sha256: Digest
    bytes: Annotated[int, Field(ge=0)]


class DeviceEntry(_Known):
    """The device that a version was made for; ``fingerprint`` is that of its hardware."""

    name: str = "?"
    fingerprint: str | None = None


class Provenance(_Known):
    """``provenance.json``."""

    format: int
    kind: str
    files: dict[str, FileEntry]
    name: str | None = None
    run: str | None = None
    data: str | None = None
    code: str | None = None
    plan: str | None = None
    weights: dict[str, str] = {}
    device: DeviceEntry = DeviceEntry()


class Usage(_Known):
    """``usage.json``: how images are prepared, where that is known, and the names of classes."""

    image_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    resize: str | None = None
    resize_size: Side | None = None
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = None
    classes: list[str] = []


class Check(_Known):
    """One check of a run's own gate; ``value`` None = unknown."""

    name: str
    value: float | None
    relation: str
    bound: float


class GateFacts(_Known):
    """``gate.json``: metrics of the models by name, and every check."""

    passed: bool
    metric: str = ""
    checks: list[Check] = []
    models: dict[str, dict[str, float | str | None]] = {}


class Compared(_Known):
    """A model's file compared with its PyTorch model."""

    ok: bool
    max_relative_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tolerance: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class ParityFacts(_Known):
    """``parity.json``."""

    compact: Compared


class DataFacts(_Known):
    """``data.json``: digests of what the data's fingerprint is made of, by name."""

    parts: dict[Name, Name]


class MoveTag(_Known):
    """An entry of the history, in a tag of the registered model."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["promote", "rollback", "found"]
    device: Name
    version: Number
    previous: Number | None
    at: Annotated[float, Field(ge=EARLIEST, le=LATEST, allow_inf_nan=False)]
    done: bool = False
    run_id: Name = ""


class DecisionTag(_Known):
    """What was decided about a version last, in a tag of it."""

    outcome: Name
    champion: Number | None


class CachedVersion(_Known):
    """What a reference meant when it was pulled last."""

    name: Name
    version: Number
    tags: dict[str, str]
    aliases: list[str]
    manifest: Digest


def read_json(raw: bytes | str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is none, or nested deeper than ``MAX_DEPTH``.
    """
    try:
        data = json.loads(raw)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [value for part in level for value in _inside(part)]
        if not level:
            return data
    raise ValueError("it is nested too deeply")


def checked(schema: type[Schema], data: Any) -> Schema:
    """Data of a known form.

    Raises:
        ValueError: it has another one; says where first.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"]) or "it"
        raise ValueError(f"{place}: {first['msg']}") from error


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []
