"""The keys of a run file one by one: what each means, what it takes, its default and bounds; read off the schema."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.pipeline.config.json_schema import CHOICES, Json, whole

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
KINDS = {"string": "text", "object": "mapping"}
"""JSON Schema's words -> those of docs/reference/run-file.md."""


@dataclass(frozen=True)
class Key:
    """A key of the run file.

    Args:
        place: with dots between sections.
        meaning: a text of one line.
        takes: its type and bounds.
        default: as it is written in a run file; empty where it is required, or is a section.
        of: whose option it is, where its section's name decides (``ccep``); else empty.
        required: whether there is no default.
        section: whether it holds keys of its own.
    """

    place: str
    meaning: str
    takes: str
    default: str
    of: str = ""
    required: bool = False
    section: bool = False


def all_keys() -> list[Key]:
    """Every key of the run file, in the order of the schema; once for each thing that has it."""
    return keys_of(whole())


def keys_of(schema: Json) -> list[Key]:
    """The same of a schema that is there already."""
    return list(_keys(schema, schema["$defs"], "", ""))


def keys_at(word: str, keys: list[Key]) -> list[Key]:
    """The keys that a word means: those at this place, else those whose last part it is."""
    return [key for key in keys if key.place == word] or [key for key in keys if key.place.endswith(f".{word}")]


def nearest(word: str, keys: list[Key], others: list[str]) -> list[str]:
    """Places and other words that are written much alike, the nearest first; at most three."""
    places = list(dict.fromkeys(key.place for key in keys))
    close = difflib.get_close_matches(word, [*others, *places], n=3)
    ends = {place.rpartition(".")[2]: place for place in places}
    close += [ends[end] for end in difflib.get_close_matches(word.rpartition(".")[2], ends, n=3)]
    return list(dict.fromkeys(close))[:3]


def _keys(node: Json, definitions: Mapping[str, Json], prefix: str, of: str) -> Iterator[Key]:
    """The keys below a node of the schema, depth first."""
    for name, field in node.get("properties", {}).items():
        below = _section(field, definitions)
        yield Key(
            f"{prefix}{name}",
            field.get("description") or (below or {}).get("description", ""),
            "section" if below else takes(field),
            "" if below or "default" not in field else json.dumps(field["default"]),
            of,
            required=name in node.get("required", ()),
            section=below is not None,
        )
        if below is not None:
            yield from _keys(below, definitions, f"{prefix}{name}.", of)
        for choice in CHOICES:
            if f"{prefix}{name}" == choice.section:
                yield from _options(below or field, definitions, choice.section, choice.options)


def _options(section: Json, definitions: Mapping[str, Json], name: str, options: str) -> Iterator[Key]:
    """The keys of everything that a section can choose."""
    for branch in section["allOf"]:
        (chosen,) = branch["if"]["properties"].values()
        then = branch["then"]["properties"][options] if options else branch["then"]
        prefix = f"{name}.{options}." if options else f"{name}."
        yield from _keys(definitions[then["$ref"].rpartition("/")[2]], definitions, prefix, chosen["const"])


def _section(field: Json, definitions: Mapping[str, Json]) -> Json | None:
    """The section that a key is or may be."""
    for node in (field, *field.get("anyOf", ())):
        if "$ref" in node:
            return definitions[node["$ref"].rpartition("/")[2]]
    return field if "allOf" in field else None


def takes(field: Json) -> str:
    """What a key takes, in words: ``number > 0 and <= 1 or null``."""
    if "title" in field:
        return str(field["title"])
    if "anyOf" in field:
        return " or ".join(takes(node) for node in field["anyOf"])
    if "const" in field or "enum" in field:
        return ", ".join(str(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {takes(field['items'])}" if "items" in field else "list"
    bounds = " and ".join(f"{sign} {_number(field[name])}" for name, sign in BOUNDS.items() if name in field)
    kind = str(field.get("type", "anything"))
    return f"{KINDS.get(kind, kind)} {bounds}".strip()


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
