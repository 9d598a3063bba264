"""YAML that people write, read so that no file can do harm: no objects, no endless growth, one kind of error.

PyYAML's safe loader makes plain values only. What it leaves open is closed here: aliases that multiply ("billion
laughs") or contain themselves, nesting deeper than Python's stack, files of any size, and numbers and dates that raise
something else than a YAML error.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARS = 1_000_000
MAX_NODES = 100_000
"""Values of a file, each alias counted as what it stands for."""
MAX_DEPTH = 50


def load(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and its nodes (for line numbers).

    Raises:
        yaml.YAMLError: it is no YAML, has more than one document, asks for objects, or is unreasonably large.
    """
    if len(text) > MAX_CHARS:
        raise yaml.YAMLError(f"it has {len(text):,} characters; expected at most {MAX_CHARS:,}")
    _check_growth(text)
    try:
        return yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (ValueError, OverflowError) as error:  # a 14th month, a number of 5,000 digits
        raise yaml.YAMLError(f"a value is none: {error}") from error


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


def _refused(event: yaml.Event, why: str) -> yaml.YAMLError:
    line = event.start_mark.line + 1 if event.start_mark else "?"
    return yaml.YAMLError(f"line {line}: {why}")
