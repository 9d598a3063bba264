"""Which images a run began with, and in which split each is: recorded at its start, compared ever after.

A run that goes on with other images would be tested on some that it was trained on. So what is drawn once is written
down (``data.json`` and ``data.jsonl`` of the run directory), and whoever continues compares instead of drawing anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.files import write_whole
from secateur.pipeline.workloads.data.notes import some

FORMAT = 1
FACTS, MEMBERS = "data.json", "data.jsonl"
DIGEST_CHARS = 32


@dataclass(frozen=True)
class Member:
    """An image of a split.

    Args:
        split: ``train``, ``search`` or ``test``.
        place: what it is called to the user.
        content: hexadecimal digits that name its content and what is annotated on it.
    """

    split: str
    place: str
    content: str


@dataclass(frozen=True)
class DataRecord:
    """The data of a run.

    Args:
        fingerprint: names everything that a result depends on: images, annotations, splits, options, weights.
        parts: digests of what the fingerprint is made of, by name: says what differs where the images do not.
        members: every image that is used, the splits one after the other.
        files: whether images are files, so that their places name them; images of arrays are known by content alone.
    """

    fingerprint: str
    parts: Mapping[str, str]
    members: tuple[Member, ...]
    files: bool = True

    def facts(self) -> dict[str, Any]:
        """What is kept besides the members, as JSON."""
        counts = {split: sum(m.split == split for m in self.members) for split in ("train", "search", "test")}
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "parts": dict(self.parts),
            "files": self.files,
            "images": counts,
            "members": hashlib.sha256(_table(self.members)).hexdigest(),
        }


def members_of(
    splits: Mapping[str, npt.NDArray[np.int64]], places: Sequence[str], contents: Sequence[bytes]
) -> tuple[Member, ...]:
    """Members of splits that are indices into one list of images."""
    return tuple(
        Member(name, places[index], contents[index].hex()[:DIGEST_CHARS])
        for name, indices in splits.items()
        for index in indices.tolist()
    )


def digest_of(members: Sequence[Member]) -> str:
    """Names which contents are in which split, in order, whatever the images are called."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(f"{member.split} {member.content}\n".encode())
    return digest.hexdigest()[:16]


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name content of JSON's types."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def parts_of(content: Mapping[str, Any]) -> dict[str, str]:
    """The same for each part of it."""
    return {name: fingerprint_of({name: value}) for name, value in content.items()}


def write(record: DataRecord, directory: Path) -> None:
    """Keep a record in a run directory; the facts come last, so that a record is whole or is none.

    Raises:
        SurroundingsError: it cannot be written.
    """
    try:
        write_whole(directory / MEMBERS, _table(record.members))
        write_whole(directory / FACTS, (json.dumps(record.facts(), indent=1) + "\n").encode())
    except OSError as error:
        raise SurroundingsError(f"cannot write to {directory}: {error.strerror}") from error


def read(directory: Path) -> DataRecord | None:
    """The record of a run directory; None where it has none.

    Raises:
        UserError: it was altered, or is of another format.
    """
    file = directory / FACTS
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        raw = (directory / MEMBERS).read_bytes()
        if facts["format"] != FORMAT or hashlib.sha256(raw).hexdigest() != facts["members"]:
            raise ValueError("it was altered, or is of another version of Secateur")
        rows = (json.loads(line) for line in raw.splitlines())
        members = tuple(Member(split, place, content) for split, content, place in rows)
        return DataRecord(str(facts["fingerprint"]), dict(facts["parts"]), members, bool(facts["files"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} and {MEMBERS} do not tell which images this run began with: {error}; restore them, or start a new "
            "run with `secateur run`"
        ) from error


def differences(recorded: DataRecord, found: DataRecord) -> str:
    """How the data found now differs from a record, in words; empty where it does not."""
    if recorded.fingerprint == found.fingerprint:
        return ""
    told = _images(recorded, found)
    other = [name for name in recorded.parts if recorded.parts[name] != found.parts.get(name) and name != "data"]
    if other:
        told.append(f"{' and '.join(other)} {'differ' if len(other) > 1 else 'differs'}")
    return "; ".join(told) or "the data is read otherwise than then"


def _images(recorded: DataRecord, found: DataRecord) -> list[str]:
    """Images gone, new and changed, each with their number and the first three."""
    if recorded.files:
        before = {m.place: m.content for m in recorded.members}
        now = {m.place: m.content for m in found.members}
        here = set(before.values()) & set(now.values())
        gone = [place for place in before if place not in now and before[place] not in here]
        new = [place for place in now if place not in before and now[place] not in here]
        changed = [place for place in before if place in now and before[place] != now[place]]
    else:
        old, fresh = ({m.content for m in one.members} for one in (recorded, found))
        gone = [m.place for m in recorded.members if m.content not in fresh]
        new = [m.place for m in found.members if m.content not in old]
        changed = []
    told = {"gone": gone, "new": new, "changed": changed}
    lines = [f"{number_of(len(places), 'image(s)')} {how} ({some(places)})" for how, places in told.items() if places]
    moved = _moved(recorded, found)
    if moved:
        lines.append(f"{number_of(len(moved), 'image(s)')} in another split ({some(moved)})")
    return lines


def _moved(recorded: DataRecord, found: DataRecord) -> list[str]:
    """Images that are in both, and not in the same split."""
    before = {(m.place, m.content) if recorded.files else m.content: m.split for m in recorded.members}
    return [
        m.place
        for m in found.members
        if before.get((m.place, m.content) if recorded.files else m.content, m.split) != m.split
    ]


def _table(members: Sequence[Member]) -> bytes:
    """A line of JSON for each image."""
    return "".join(json.dumps([m.split, m.content, m.place]) + "\n" for m in members).encode()
