"""YAML that people write, read so that no file can do harm and nothing is silently taken for something else.

PyYAML's safe loader makes plain values only. What it leaves open is closed here:

- Growth: aliases that multiply ("billion laughs") or contain themselves, nesting deeper than Python's stack, files of
  any size, and texts at which PyYAML raises something else than a YAML error.
- Guesses: YAML 1.1 takes ``off`` for false, ``0100`` for 64, ``1:30`` for 90, ``2024-01-01`` for a date, and ``1e-3``
  for a text. Here every word without quotes stays a ``Plain`` that knows the characters written; ``settle`` (in the
  module of that name) decides with the schema what was meant. Keys are names: always the characters written.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from secateur.device_profiles.wording import printable

MAX_CHARS = 1_000_000
MAX_NODES = 100_000
"""Values of a file, each alias counted as what it stands for."""
MAX_DEPTH = 50
MAX_DIGITS = 100
"""Of a number; longer ones are no number that anybody means."""

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""
Content = Any
"""Mappings with text as keys, lists, texts, and ``Plain`` values."""


@dataclass(frozen=True)
class Plain:
    """A value written without quotes that is, or to some reader of YAML is, something other than text.

    Args:
        written: the characters.
        value: None, a boolean or a number; a text where it is text to us, but not to everybody (``y``).
        reading: what some readers take it for (``the octal number 64``); empty = all of them agree on ``value``.
        ways: how the possible meanings are written so that all readers agree.
    """

    written: str
    value: bool | int | float | str | None
    reading: str = ""
    ways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A YAML text.

    Args:
        content: what it says.
        lines: line, from 1, of every place.
        repeated: the places of keys that are given more than once -> the lines, the last of which counts.
    """

    content: Content = Plain("", None)
    lines: Mapping[Place, int] = field(default_factory=dict)
    repeated: Mapping[Place, Sequence[int]] = field(default_factory=dict)


def read(text: str) -> Document:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: it is no YAML, has more than one document, asks for objects, or is unreasonably large.
    """
    if len(text) > MAX_CHARS:
        raise yaml.YAMLError(f"it has {len(text):,} characters; expected at most {MAX_CHARS:,}")
    try:
        _check_growth(text)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise yaml.YAMLError(_located(error)) from error
    except yaml.reader.ReaderError as error:
        line, character = text.count("\n", 0, error.position) + 1, ord(text[error.position])
        raise yaml.YAMLError(f"line {line}: the character U+{character:04X} may not stand in it") from error
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:  # the parser, beyond its depth
        raise yaml.YAMLError(f"something in it is not valid: {error}") from error
    if root is None:
        return Document()
    builder = _Builder()
    content = builder.build(root, ())
    return Document(content, builder.lines, {place: lines for place, lines in builder.given.items() if len(lines) > 1})


def _located(error: yaml.MarkedYAMLError) -> str:
    """The line of an error, and what is wrong, in one line."""
    mark = error.problem_mark or error.context_mark
    words = " ".join(printable(word) for word in filter(None, (error.context, error.problem)) if word)
    hint = "; indent with spaces, not with tabs" if "'\\t'" in words else ""
    return f"line {mark.line + 1}: {words}{hint}" if mark else words


def dump(data: object, width: int = 100) -> str:
    """Data as YAML text that ``read`` and every other reader takes for the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text


# ------------------------------------------------------------------------------------------------------ plain values


NULLS = ("", "~", "null", "Null", "NULL")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
BOOLEANS = {**dict.fromkeys(("yes", "on", "true", "y"), True), **dict.fromkeys(("no", "off", "false", "n"), False)}
"""Words for yes and no, in lower case."""

LEADING_ZEROS = re.compile(r"[-+]?0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
OTHER_BASE = re.compile(r"[-+]?0(x_*[0-9a-fA-F][0-9a-fA-F_]*|o_*[0-7][0-7_]*|b_*[01][01_]*)")
GROUPED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?")
NUMBERS = (INTEGER, NUMBER, LEADING_ZEROS, OTHER_BASE, GROUPED, BASE_60)
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def plain(written: str) -> Plain | str:
    """What a word without quotes is; a text is given back as it is."""
    if written in NULLS:
        return Plain(written, None)
    if written.lower() in BOOLEANS:
        return _boolean(written)
    if len(written) > MAX_DIGITS and any(pattern.fullmatch(written) for pattern in NUMBERS):
        return Plain(written, written, "a number with far too many digits")
    if INTEGER.fullmatch(written):
        return Plain(written, int(written))
    if NUMBER.fullmatch(written):
        return Plain(written, float(written))
    return next((made(written) for pattern, made in UNCLEAR.items() if pattern.fullmatch(written)), written)


def number(text: str) -> int | float | None:
    """The number that a text is, in decimal; None = it is none."""
    if len(text) > MAX_DIGITS or not NUMBER.fullmatch(text):
        return None
    return int(text) if INTEGER.fullmatch(text) else float(text)


def _boolean(written: str) -> Plain:
    value = BOOLEANS[written.lower()]
    meant = "true" if value else "false"
    if written in (meant, meant.capitalize(), meant.upper()):
        return Plain(written, value)
    if written in ("y", "Y", "n", "N"):
        return Plain(written, written, meant, (meant,))
    agreed = written in (written.lower(), written.capitalize(), written.upper())  # 'yEs' is text to every reader
    return Plain(written, value, meant, (meant,)) if agreed else Plain(written, written, meant, (meant,))


def _leading_zeros(written: str) -> Plain:
    digits = written.lstrip("+-")
    sign = "-" if written.startswith("-") else ""
    whole, dot, rest = digits.replace("_", "").partition(".")
    decimal = f"{sign}{re.sub('^0+(?=[0-9])', '', whole)}{dot}{rest}"
    if re.fullmatch(r"[0-7]+", whole) and not dot:
        octal = f"{sign}{int(whole, 8)}"
        return Plain(written, written, f"the octal number {octal}", tuple(dict.fromkeys((decimal, octal))))
    return Plain(written, written, f"the number {decimal}", (decimal,))


def _other_base(written: str) -> Plain:
    value = str(int(written.replace("_", ""), 0))
    return Plain(written, written, f"the number {value}", (value,))


def _grouped(written: str) -> Plain:
    value = written.replace("_", "")
    return Plain(written, written, f"the number {value}", (value,))


def _base_60(written: str) -> Plain:
    sign = -1 if written.startswith("-") else 1
    parts = written.replace("_", "").lstrip("+-").split(":")
    total: float = 0
    for part in parts:
        total = total * 60 + (float(part) if "." in part else int(part))
    return Plain(written, written, f"the number {sign * total:g} in base 60", (f"{sign * total:g}",))


UNCLEAR: Mapping[re.Pattern[str], Callable[[str], Plain]] = {
    LEADING_ZEROS: _leading_zeros,
    OTHER_BASE: _other_base,
    GROUPED: _grouped,
    BASE_60: _base_60,
    DATE: lambda written: Plain(written, written, "a date"),
    NOT_FINITE: lambda written: Plain(written, float(written.replace(".", "")), "no finite number"),
}
"""Words that readers of YAML disagree about, in the order in which they are tried."""


# ------------------------------------------------------------------------------------------------------------- PyYAML


PLAIN = "plain"
"""The tag of a word without quotes, in place of PyYAML's guess."""
TEXT, MERGE = "tag:yaml.org,2002:str", "<<"
CONTAINERS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
EXPLICIT: Mapping[str, tuple[type, ...]] = {
    "tag:yaml.org,2002:int": (int,),
    "tag:yaml.org,2002:float": (int, float),
    "tag:yaml.org,2002:bool": (bool,),
    "tag:yaml.org,2002:null": (type(None),),
}
"""Tags by which an author says what a value is."""


class _Loader(yaml.SafeLoader):
    """Leaves open what a word without quotes is."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return PLAIN if implicit[0] else TEXT
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what any reader could take for something other than text."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        unclear = kind is yaml.ScalarNode and implicit[0] and tag == TEXT and isinstance(plain(value), Plain)
        return PLAIN if unclear else tag


class _Builder:
    """Content out of nodes; ``lines`` of every place, ``given``: the lines of every key of a mapping's own."""

    def __init__(self) -> None:
        self.lines: dict[Place, int] = {}
        self.given: defaultdict[Place, list[int]] = defaultdict(list)

    def build(self, node: yaml.Node, place: Place) -> Content:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if node.tag not in CONTAINERS:
            raise _refused(node, f"the tag {node.tag!r} means nothing here; leave it out")
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*place, i)) for i, item in enumerate(node.value)]
        for key, _ in node.value:
            if _is_key(key):
                self.given[*place, key.value].append(key.start_mark.line + 1)
        return {name: self._at(key, value, (*place, name)) for name, (key, value) in _entries(node).items()}

    def _item(self, node: yaml.Node, place: Place) -> Content:
        return self._at(node, node, place)

    def _at(self, key: yaml.Node, node: yaml.Node, place: Place) -> Content:
        self.lines[place] = key.start_mark.line + 1
        return self.build(node, place)


def _is_key(node: yaml.Node) -> bool:
    """Whether it is a key, and not ``<<``; raises where it is no name."""
    if not isinstance(node, yaml.ScalarNode):
        raise _refused(node, "a key is a name, not a list or mapping")
    return not (node.tag == PLAIN and node.value == MERGE)


def _entries(node: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a mapping; its own go before merged ones, and of those the earlier."""
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if _is_key(key):
            own[key.value] = (key, value)
            continue
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise _refused(source, "<< takes a mapping, or a list of mappings")
            merged = {**_entries(source), **merged}
    return {**merged, **own}


def _scalar(node: yaml.ScalarNode) -> Plain | str:
    if node.tag == PLAIN:
        return plain(node.value)
    if node.tag == TEXT:
        return str(node.value)
    kinds = EXPLICIT.get(node.tag)
    if kinds is None:
        raise _refused(node, f"the tag {node.tag!r} means nothing here; leave it out")
    content = plain(node.value)
    said = isinstance(content, Plain) and type(content.value) in kinds and (content.reading == "" or bool in kinds)
    if not said or not isinstance(content, Plain):
        raise _refused(node, f"{node.value[:40]!r} is not what its tag says it is; leave the tag out")
    return Plain(content.written, content.value)


def _check_growth(text: str) -> None:
    """Count values and nesting from the parser's events, before anything is built.

    Raises:
        yaml.YAMLError: there are too many; names the line.
    """
    sizes: dict[str, int] = {}  # of what an anchor stands for, aliases within it counted in full
    depths: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and the count before it
    deepest = [0]
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _refused(event, f"*{event.anchor} is unknown, or contains itself")
            count += sizes[event.anchor]
            depth = depths[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor], depths[event.anchor] = 1, 0
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            deepest.append(0)
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            depth = deepest.pop() + 1
            if anchor:
                sizes[anchor], depths[anchor] = count - before, depth
        deepest[-1] = max(deepest[-1], depth)
        if count > MAX_NODES:
            raise _refused(event, f"more than {MAX_NODES:,} values, aliases counted in full")
        if len(open_) + depth > MAX_DEPTH:
            raise _refused(event, f"nested more than {MAX_DEPTH} deep")


def _refused(where: yaml.Event | yaml.Node, why: str) -> yaml.YAMLError:
    line = where.start_mark.line + 1 if where.start_mark else "?"
    return yaml.YAMLError(f"line {line}: {why}")
