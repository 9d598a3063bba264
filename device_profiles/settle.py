"""What a value of a YAML text means, given what its place takes: the characters written and the type meant decide.

What a place takes comes from a JSON schema, which pydantic makes of every section and every ``Options``:

- text wanted: a word in quotes, or one that no reader of YAML takes for anything else. ``off``, ``0100``, ``1.10`` and
  ``null`` are refused with the way to write them, for what other readers make of them is not what was written.
- a number wanted: decimal, with or without quotes; ``1e-3`` is one. ``0100`` and ``1:30`` are refused, booleans too.
- a boolean wanted: ``true``, ``yes``, ``on`` and their opposites.
- one of several texts wanted: those characters, whatever readers take them for.
- a section or list wanted: nothing at all is an empty one.
- anything (a free mapping): what all readers agree on.

Every number has a bound: its schema's own, or a general one.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from secateur.device_profiles.plain_yaml import BOOLEANS, Content, Place, Plain, number
from secateur.device_profiles.wording import cut, shown

LARGEST = 1_000_000
"""Bound on numbers whose schema has none."""
LARGEST_FREE = 1_000_000_000_000
"""Bound on numbers in free mappings, whose meaning nobody knows here."""

Schema = Mapping[str, Any]
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


@dataclass(frozen=True)
class Misread:
    """A value that does not mean what its place takes."""

    place: Place
    message: str


@functools.cache
def schema_of(model: Any) -> Schema:
    """The JSON schema of a pydantic model or a dataclass."""
    return TypeAdapter(model).json_schema(schema_generator=_AnythingElse)


class _AnythingElse(GenerateJsonSchema):
    """A type that JSON cannot express takes anything, as far as YAML goes."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


def settle(
    content: Content, schemas: Mapping[Place, Schema | None], place: Place = ()
) -> tuple[Any, tuple[Misread, ...]]:
    """Plain data, and every value that cannot be what its place takes.

    Args:
        content: of a YAML document.
        schemas: place -> the JSON schema of what is there; ``()`` is the whole. A place below another takes its own;
            None = nobody knows what it takes, and nothing is said about it.
        place: where ``content`` stands, for the faults.

    Returns:
        Of a value with a fault, the text that was written. Only values that a schema leaves open are checked no
        further; pydantic looks at the rest.
    """
    settler = _Settler(schemas)
    data = settler.value(content, place, _wanted(schemas[()]))
    return data, tuple(settler.faults)


@dataclass(frozen=True)
class Wanted:
    """What a place takes.

    Args:
        branches: alternatives, none of them a reference or an alternative itself; empty = nobody knows.
        definitions: what references in them refer to.
    """

    branches: tuple[Schema, ...] = ()
    definitions: Mapping[str, Schema] | None = None

    @property
    def known(self) -> bool:
        return bool(self.branches)

    @property
    def free(self) -> bool:
        """Whether it takes anything."""
        return any(not _types(branch) for branch in self.branches)

    @property
    def types(self) -> frozenset[str]:
        types = frozenset(kind for branch in self.branches for kind in _types(branch))
        return types | {"number"} if "integer" in types else types

    @property
    def words(self) -> tuple[str, ...]:
        """The texts it takes, where they are listed."""
        return tuple(v for branch in self.branches for v in _listed(branch) if isinstance(v, str))

    @property
    def only_words(self) -> bool:
        return all(_listed(branch) for branch in self.branches if "string" in _types(branch))

    def takes(self, *types: str) -> bool:
        return bool(self.types & set(types))

    def bound(self) -> float | None:
        """The general bound of its numbers; None = the schema has one itself."""
        if self.free:
            return LARGEST_FREE
        numbers = [branch for branch in self.branches if {"integer", "number"} & _types(branch)]
        own = ("maximum", "exclusiveMaximum", "enum", "const")
        return None if any(key in branch for branch in numbers for key in own) else LARGEST

    def at(self, key: str | int) -> Wanted:
        """What it takes below a key or an index."""
        below = [schema for branch in self.branches for schema in _below(branch, key)]
        return Wanted(tuple(b for s in below for b in _branches(s, self.definitions or {})), self.definitions)


def _wanted(schema: Schema | None) -> Wanted:
    if schema is None:
        return Wanted()
    definitions = schema.get("$defs", {})
    return Wanted(tuple(_branches(schema, definitions)), definitions)


def _branches(schema: Schema, definitions: Mapping[str, Schema]) -> Iterator[Schema]:
    if "$ref" in schema:
        yield from _branches(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return
    alternatives = [s for key in ("anyOf", "oneOf", "allOf") for s in schema.get(key, ())]
    for alternative in alternatives:
        yield from _branches(alternative, definitions)
    if not alternatives:
        yield schema


def _listed(branch: Schema) -> Sequence[Any]:
    listed: Sequence[Any] = branch.get("enum", [branch["const"]] if "const" in branch else ())
    return listed


def _types(branch: Schema) -> set[str]:
    """The JSON types of an alternative; none = it takes anything."""
    if listed := _listed(branch):
        return {TYPES[type(value)] for value in listed if type(value) in TYPES}
    kind = branch.get("type", ())
    return {kind} if isinstance(kind, str) else set(kind)


def _below(branch: Schema, key: str | int) -> Iterator[Schema]:
    if not _types(branch):
        yield {}
    elif isinstance(key, int):
        first = branch.get("prefixItems", ())
        if key < len(first):
            yield first[key]
        elif "items" in branch:
            yield branch["items"] if isinstance(branch["items"], Mapping) else {}
    elif key in branch.get("properties", {}):
        yield branch["properties"][key]
    elif more := branch.get("additionalProperties"):
        yield more if isinstance(more, Mapping) else {}


class _Settler:
    """Goes through a document; collects what is wrong."""

    def __init__(self, schemas: Mapping[Place, Schema | None]) -> None:
        self.schemas = schemas
        self.faults: list[Misread] = []

    def value(self, content: Content, place: Place, wanted: Wanted) -> Any:
        if place and place in self.schemas:
            wanted = _wanted(self.schemas[place])
        if isinstance(content, Mapping):
            for key in content:
                self._fit_to_show(key, (*place, key), "the key")
            return {key: self.value(item, (*place, key), wanted.at(key)) for key, item in content.items()}
        if isinstance(content, list):
            return [self.value(item, (*place, i), wanted.at(i)) for i, item in enumerate(content)]
        if isinstance(content, Plain):
            return self._plain(content, place, wanted)
        self._fit_to_show(content, place, "it")
        return self._text(content, place, wanted)

    def _fault(self, place: Place, message: str) -> None:
        self.faults.append(Misread(place, message))

    def _fit_to_show(self, text: str, place: Place, what: str) -> None:
        """Refuse text that could move a terminal's cursor, or that is no Unicode."""
        if unfit := sorted({c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs")}):
            names = ", ".join(f"U+{ord(c):04X}" for c in unfit)
            self._fault(place, f"{what} contains control characters ({names})")

    def _text(self, text: str, place: Place, wanted: Wanted) -> Any:
        """A word in quotes, or one that is text to every reader."""
        if not wanted.known or wanted.free or wanted.takes("string"):
            return text
        if wanted.takes("number"):
            value = number(text)
            if value is None:
                self._fault(place, f"expected {expected(wanted)}, got {shown(text)}{_hint(text, wanted)}")
                return text
            return self._bounded(value, text, place, wanted)
        if wanted.takes("boolean"):
            if text.lower() in BOOLEANS:
                return BOOLEANS[text.lower()]
            self._fault(place, f"expected {expected(wanted)}, got {shown(text)}")
        return text

    def _plain(self, plain: Plain, place: Place, wanted: Wanted) -> Any:
        if isinstance(plain.value, float) and not math.isfinite(plain.value):
            self._fault(place, f"expected a finite number, got {cut(plain.written)}")
            return plain.written
        if not wanted.known:
            return plain.value if not plain.reading else plain.written
        if plain.written in wanted.words:
            return plain.written
        if plain.value is None:
            return self._nothing(plain, place, wanted)
        if isinstance(plain.value, bool):
            return self._boolean(plain, place, wanted)
        if plain.written.lower() in BOOLEANS:  # 'y': text to us, but not to everybody
            return self._perhaps_boolean(plain, place, wanted)
        return self._number(plain, place, wanted)

    def _nothing(self, plain: Plain, place: Place, wanted: Wanted) -> Any:
        if wanted.free or wanted.takes("null"):
            return None
        if wanted.takes("object"):
            return {}
        if wanted.takes("array"):
            return []
        written = f"{plain.written}, which means nothing" if plain.written else "nothing"
        hint = f'; for the text, write "{plain.written}" in quotes' if self._as_text(wanted) and plain.written else ""
        self._fault(place, f"expected {expected(wanted)}, got {written}{hint}")
        return plain.written

    @staticmethod
    def _as_text(wanted: Wanted) -> bool:
        return wanted.free or (wanted.takes("string") and not wanted.only_words)

    def _boolean(self, plain: Plain, place: Place, wanted: Wanted) -> Any:
        others = wanted.takes("string", "number")
        if wanted.takes("boolean") and (not others or not plain.reading):
            return plain.value
        if wanted.free and not plain.reading:
            return plain.value
        return self._refuse(plain, place, wanted)

    def _perhaps_boolean(self, plain: Plain, place: Place, wanted: Wanted) -> Any:
        boolean, text = wanted.takes("boolean"), wanted.takes("string")
        if boolean and not text:
            return BOOLEANS[plain.written.lower()]
        if text and not boolean and not wanted.only_words:
            return plain.written
        return self._refuse(plain, place, wanted)

    def _number(self, plain: Plain, place: Place, wanted: Wanted) -> Any:
        if plain.reading or isinstance(plain.value, str | bool | None):
            return self._refuse(plain, place, wanted)
        if wanted.free or wanted.takes("number"):
            return self._bounded(plain.value, plain.written, place, wanted)
        if wanted.takes("boolean") and plain.written in ("0", "1"):
            return plain.written == "1"
        if wanted.takes("string", "boolean"):
            return self._refuse(plain, place, wanted)
        return plain.value

    def _bounded(self, value: int | float, written: str, place: Place, wanted: Wanted) -> int | float:
        bound = wanted.bound()
        if not math.isfinite(value):
            self._fault(place, f"expected a finite number, got {cut(written)}")
        elif bound is not None and abs(value) > bound:
            side = "at most " if value > 0 else "at least -"
            self._fault(place, f"expected a number of {side}{bound:,}, got {cut(written)}")
        return value

    def _refuse(self, plain: Plain, place: Place, wanted: Wanted) -> str:
        """Say what some readers take it for, and how to write what may be meant."""
        written = cut(plain.written)
        agreed = {bool: "a boolean", int: "a number", float: "a number"}.get(type(plain.value), "")
        reading = plain.reading if plain.reading not in ("true", "false") else f"the boolean {plain.reading}"
        taken = f", which readers of YAML take for {reading or agreed}" if reading or agreed else ""
        begin = f"expected {expected(wanted)}, got {written}{taken}"
        if wanted.free:
            begin = f"{written} is not the same to all readers of YAML: some take it for {reading}"
        ways = [way for way in plain.ways if wanted.free or wanted.takes(_kind(way))]
        if self._as_text(wanted):
            ways.append(f'"{written}" in quotes for the text')
        elif plain.value is False and wanted.takes("null"):
            ways.append("null")
        elif plain.reading and not ways and wanted.takes("number"):
            ways.append("the number in decimal")
        write = f"; write {' or '.join(ways)}" if ways else ""
        self._fault(place, begin + write)
        return plain.written


def _kind(way: str) -> str:
    return "boolean" if way in ("true", "false") else "number"


def _hint(text: str, wanted: Wanted) -> str:
    if wanted.takes("null") and text.lower() in ("none", "nil"):
        return "; write null"
    if text.count(",") == 1 and number(text.replace(",", ".")) is not None:
        return f"; write {text.replace(',', '.')}"
    return ""


WORDS = {
    "string": "text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "array": "a list",
    "object": "a section",
    "null": "null",
}


def expected(wanted: Wanted) -> str:
    """What a place takes, in words."""
    types = wanted.types - {"number"} if not any("number" in _types(b) for b in wanted.branches) else wanted.types
    if "number" in types:
        types = types - {"integer"}
    words = [word for kind, word in WORDS.items() if kind in types]
    if wanted.words and wanted.only_words:
        words = [*(repr(word) for word in wanted.words), *(word for word in words if word != "text")]
    return " or ".join(words)
