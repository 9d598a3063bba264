"""Words and keys of the run file that were renamed: an old one is read for one release, and means the same as the new.

``reading.py``, which asks here, reads all run files, also those of run directories and registered versions.
A digest is taken of the words by which a setting was first known, so that a run that has begun stays the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from secateur.device_profiles.plain_yaml import Content, Place, Plain

RENAMED: Mapping[Place, Mapping[str, str]] = {
    ("search", "forward"): {"steady": "deterministic"},
    ("workload", "model", "name"): {f"cifar_resnet{n}": f"cifar/resnet{n}" for n in (8, 20, 32, 44, 56, 110)},
}
"""Place of a value -> its old word -> its new word."""
KEYS: Mapping[Place, str] = {("baseline", "precision"): "autocast", ("finetune", "precision"): "autocast"}
"""Place of an old key -> its new name; ``Section.formerly`` has them for digests."""


def with_new_keys(content: dict[str, Content]) -> dict[Place, Place]:
    """Put the new key in the place of each old one, and say so; returns old place -> new place of what was renamed.

    Where a section has both, the old one is left to the schema, which knows it no longer.
    """
    moved = {}
    for place, new in KEYS.items():
        section, old = _section(content, place), place[-1]
        if old in section and new not in section:
            section[new] = section.pop(old)
            moved[place] = (*place[:-1], new)
            _say(".".join(map(str, place[:-1])), str(old), new)
    return moved


def with_new_words(content: dict[str, Content]) -> None:
    """Put the new word in the place of each old one, and say so."""
    for place, words in RENAMED.items():
        section, key = _section(content, place), place[-1]
        value = section.get(key)
        written = value.written if isinstance(value, Plain) else value
        if isinstance(written, str) and written in words:
            section[key] = words[written]
            _say(".".join(map(str, place)), written, words[written])


def with_first_words(content: dict[str, Any]) -> None:
    """Put the word by which a setting was first known in the place of each new one."""
    for place in RENAMED:
        section, key = _section(content, place), place[-1]
        if isinstance(section.get(key), str):
            section[key] = first(place, section[key])


def newest(place: Place, word: str) -> str:
    """What a word is called today."""
    return RENAMED[place].get(word, word)


def first(place: Place, word: str) -> str:
    """The word by which a setting was first known."""
    return {new: old for old, new in RENAMED[place].items()}.get(word, word)


def _section(content: Mapping[str, Any], place: Place) -> dict[str | int, Any]:
    """The section that a place lies in; an empty one where there is none."""
    section: Any = content
    for part in place[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}


@functools.cache
def _say(place: str, old: str, new: str) -> None:
    """Tell the user, once a process."""
    from secateur.pipeline.terminal import err

    err.print(f"Note: {place}: {old} is called {new} now; write that, the old word is read in this release only.")
