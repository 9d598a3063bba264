"""JSON schemas of everything that people write: walked for their numbers, and as strategies of YAML texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]


def branches(schema: Schema, definitions: Mapping[str, Schema]) -> Iterator[Schema]:
    """The alternatives of a schema, references followed."""
    if "$ref" in schema:
        yield from branches(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    elif alternatives := [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        for alternative in alternatives:
            yield from branches(alternative, definitions)
    else:
        yield schema


def numbers(schema: Schema, definitions: Mapping[str, Schema], place: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, how the number stands there, with ``@`` for it) of every number."""
    for branch in branches(schema, definitions):
        kind = branch.get("type")
        if kind in ("integer", "number") and "enum" not in branch:
            yield place, "@"
        for key, below in branch.get("properties", {}).items():
            yield from numbers(below, definitions, f"{place}.{key}".lstrip("."))
        if isinstance(more := branch.get("additionalProperties"), Mapping):
            yield from numbers(more, definitions, f"{place}.anything")
        for below in [branch["items"]] if isinstance(branch.get("items"), Mapping) else branch.get("prefixItems", ()):
            yield from ((at, f"[{form}]") for at, form in numbers(below, definitions, place))


SURPRISES = [
    *("yes", "no", "on", "off", "y", "N", "true", "False", "null", "~", "''", "'0.5'", '"1e3"', "0100", "0o17", "0x1F"),
    *(
        "0b1",
        "1_000",
        "1:30",
        "1:30.5",
        "2024-01-01",
        "2024-13-45",
        ".inf",
        "-.Inf",
        ".nan",
        "1e-3",
        "1e5",
        "+1",
        "1.10",
    ),
    *("1e308", "1e999", "-1e999", "9" * 30, "-" + "9" * 30, "9" * 5000, "1" + "0" * 18, "0", "-1", "0.0", "-0", "007"),
    *("<<", "=", "[]", "{}", "[[]]", "{a: 1}", "{1: 2}", "[1, x]", "!!int 3", "!!str 3", "!!int x", "!x 1", "&a [1]"),
    *(
        "*a",
        "&b [*b]",
        '"\\x00"',
        '"\\ud800"',
        '"\\u202e"',
        '"\\e[2J"',
        "é",
        "日本",
        "'a''b'",
        "#",
        "''''",
        "-",
        "?",
        "|",
        "%",
    ),
]
"""Words that YAML, Python or people take for various things."""


def values(schema: Schema, definitions: Mapping[str, Schema]) -> st.SearchStrategy[str]:
    """YAML texts, on one line, of what a place may hold; mostly of the right kind."""
    found = list(branches(schema, definitions))
    right = st.one_of([_right(branch, definitions) for branch in found])
    return st.one_of(
        right, right, right, st.sampled_from(SURPRISES), st.from_regex(r"[a-z0-9_.:-]{1,8}", fullmatch=True)
    )


def _right(branch: Schema, definitions: Mapping[str, Schema]) -> st.SearchStrategy[str]:
    if "enum" in branch or "const" in branch:
        return st.sampled_from([str(value) for value in branch.get("enum", [branch.get("const")])])
    match branch.get("type"):
        case "object" if "properties" in branch:
            known = {st.just(key): values(below, definitions) for key, below in branch["properties"].items()}
            pairs = st.one_of([st.tuples(key, value) for key, value in known.items()])
            return st.lists(pairs, max_size=4).map(mapping)
        case "object":
            return st.lists(
                st.tuples(st.sampled_from(["a", "width", "yes", "1"]), st.sampled_from(SURPRISES)), max_size=2
            ).map(mapping)
        case "array":
            item = (
                branch["items"] if isinstance(branch.get("items"), Mapping) else (branch.get("prefixItems") or [{}])[0]
            )
            return st.lists(values(item, definitions), max_size=3).map(lambda items: f"[{', '.join(items)}]")
        case "integer":
            return st.integers(-2, 2000).map(str)
        case "number":
            return st.floats(-1, 100, allow_nan=False).map(lambda x: f"{x:g}")
        case "boolean":
            return st.sampled_from(["true", "false", "yes", "off"])
        case "null":
            return st.sampled_from(["null", "", "~"])
    return st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


def mapping(pairs: Sequence[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"


def finite(value: Any, bound: float) -> bool:
    """Whether every number in plain data is finite and within a bound."""
    if isinstance(value, Mapping):
        return all(finite(item, bound) for item in value.values())
    if isinstance(value, list | tuple):
        return all(finite(item, bound) for item in value)
    return not isinstance(value, int | float) or (math.isfinite(value) and abs(value) <= bound)
