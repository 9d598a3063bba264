"""The whole run file as JSON Schema, for editors and for ``secateur explain``: every key with its meaning.

What a key chooses by name decides what its options take: of workload, method and reward each choice is a branch
(``if`` its name, ``then`` its options), which editors follow and which says of a mistake where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from secateur.device_profiles.shelf import IN_FILE, Shelf, in_file
from secateur.pipeline.config.choices import DEFAULTS, WORKLOADS, reward_model
from secateur.pipeline.config.documented import meanings, summary
from secateur.pipeline.config.schema import RunFile

Json = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
DEFINED = "#/$defs/{model}"
FILE = f"^{IN_FILE.pattern.replace('?P<file>', '').replace('?P<name>', '')}$".replace(r"\0", r"\x00")
"""A thing of one's own: ``FILE.py:NAME``."""


@dataclass(frozen=True)
class Choice:
    """A key by which a section chooses whose options it holds.

    Args:
        options: the section's key that holds them; empty = the section itself does.
        kinds: gives name -> what its options take.
        from_files: whether the name may be ``FILE.py:NAME``.
    """

    section: str
    key: str
    options: str
    kinds: Callable[[], Mapping[str, type]]
    from_files: bool = True


def _workloads() -> Mapping[str, type]:
    return _options_of(WORKLOADS)


def _methods() -> Mapping[str, type]:
    from secateur.pruning.search import METHODS

    return _options_of(METHODS)


def _rewards() -> Mapping[str, type]:
    from secateur.pruning.search import reward

    return {preset: reward_model(preset) for preset in reward.PRESETS}


def _options_of(shelf: Shelf) -> Mapping[str, type]:
    return {name: module.Options for name, module in shelf.loaded().items() if not in_file(name)}


CHOICES = (
    Choice("workload", "name", "", _workloads),
    Choice("search", "method", "options", _methods),
    Choice("reward", "preset", "options", _rewards, from_files=False),
)


PACKAGED = Path(__file__).parent / "run-file.schema.json"
"""The schema of Secateur's own parts, made before: making it imports every workload."""


def packaged() -> Json:
    """The schema in this file."""
    schema: Json = json.loads(PACKAGED.read_text(encoding="utf-8"))
    return schema


def whole() -> Json:
    """The schema of a run file with everything that it can name here, what other packages add included."""
    schema, definitions = _schema_of(RunFile, "run")
    for choice in CHOICES:
        section = schema["properties"][choice.section]
        section = definitions[section["$ref"].rpartition("/")[2]] if "$ref" in section else section
        definitions |= _add_branches(section, choice)
    schema["properties"]["workload"].pop("additionalProperties")  # the branches say which keys there are
    return {"$schema": DIALECT, "title": "Secateur run file", **schema, "$defs": dict(sorted(definitions.items()))}


def _add_branches(section: Json, choice: Choice) -> Json:
    """Let a section's schema branch by the name it chooses; returns the definitions that it refers to now."""
    definitions: Json = {}
    names, key = choice.kinds(), choice.key
    default = DEFAULTS.get(f"{choice.section}.{key}")
    section["allOf"] = []
    for name, kind in names.items():
        place = f"{choice.section}.{name}"
        definitions[place], others = _schema_of(kind, place)
        definitions |= others
        options = {"$ref": DEFINED.format(model=place)}
        section["allOf"].append(
            {
                "if": {"properties": {key: {"const": name}}} | ({} if name == default else {"required": [key]}),
                "then": {"properties": {choice.options: options}} if choice.options else options,
            }
        )
    described = section.setdefault("properties", {}).get(key, {})
    described.pop("type", None)
    listed: Json = {"enum": sorted(names)}
    file: Json = {"title": "FILE.py:NAME", "type": "string", "pattern": FILE}
    section["properties"][key] = described | ({"anyOf": [listed, file]} if choice.from_files else listed)
    if default is None:
        section["required"] = [key]
    return definitions


def _schema_of(kind: type, name: str) -> tuple[Json, Json]:
    """The schema of a section or a dataclass of options, and those that it refers to, as ``name.CLASS``."""
    schema = TypeAdapter(kind).json_schema(
        schema_generator=Documented, ref_template=DEFINED.format(model=f"{name}.{{model}}")
    )
    definitions = {f"{name}.{key}": value for key, value in schema.pop("$defs", {}).items()}
    return schema, definitions


class Documented(GenerateJsonSchema):
    """Pydantic's schema, with what the docstrings say of the keys."""

    def model_schema(self, schema: Any) -> Json:
        return _with_meanings(super().model_schema(schema), schema["cls"])

    def dataclass_schema(self, schema: Any) -> Json:
        return _with_meanings(super().dataclass_schema(schema), schema["cls"])


def _with_meanings(schema: Json, kind: type) -> Json:
    said = meanings(kind)
    for name, field in schema.get("properties", {}).items():
        field.pop("title", None)
        if "$ref" in field:
            field.pop("default", None)  # that of each of its keys stands there
        if name in said:
            field["description"] = said[name]
    schema.pop("title", None)
    schema["description"] = summary(kind)
    return schema
