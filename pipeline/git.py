"""Which commit a folder is at, read from the files of Git: no program is started, no setting of a repository runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 1 << 20
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
REFERENCE = re.compile(r"refs/[A-Za-z0-9_./+-]{1,200}")


@dataclass(frozen=True)
class Revision:
    """The commit that is checked out; whether files differ from it is not looked at.

    Args:
        commit: its digest, in hexadecimal.
        branch: its name; empty where none is checked out.
    """

    commit: str
    branch: str


def revision_of(folder: Path) -> Revision | None:
    """The commit that a folder, or one above it, is at; None where that is in no repository, or not to be read."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            if (place / ".git").exists():
                return _revision(place / ".git")
        except (OSError, ValueError):
            return None
    return None


def _revision(git: Path) -> Revision | None:
    if git.is_file():  # a worktree, or a submodule
        git = git.parent / _text(git).removeprefix("gitdir: ")
    head = _text(git / "HEAD")
    if COMMIT.fullmatch(head):
        return Revision(head, "")
    reference = head.removeprefix("ref: ")
    if not REFERENCE.fullmatch(reference) or ".." in reference:
        return None
    common = git / _text(git / "commondir") if (git / "commondir").is_file() else git
    commit = next((_text(at / reference) for at in (git, common) if (at / reference).is_file()), "")
    if not commit and (common / "packed-refs").is_file():
        lines = (line.partition(" ") for line in _text(common / "packed-refs").splitlines())
        commit = next((digest for digest, _, name in lines if name == reference), "")
    return Revision(commit, reference.removeprefix("refs/heads/")) if COMMIT.fullmatch(commit) else None


def _text(file: Path) -> str:
    with file.open(encoding="utf-8") as opened:
        return opened.read(MAX_BYTES).strip()
