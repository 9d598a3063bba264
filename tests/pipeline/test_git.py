"""The commit of a folder, as Git itself tells it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from secateur.pipeline.git import Revision, revision_of

git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
WHO = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")


def run(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *WHO, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@git
def test_a_branch_a_packed_one_a_worktree_and_a_detached_head(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run(home, "init", "-q", "-b", "my/branch")
    assert revision_of(home) is None, "nothing is committed yet"
    run(home, "commit", "-q", "--allow-empty", "-m", "one")
    first = run(home, "rev-parse", "HEAD")
    (home / "deep").mkdir()
    assert revision_of(home / "deep") == Revision(first, "my/branch")
    run(home, "pack-refs", "--all")
    assert revision_of(home) == Revision(first, "my/branch")
    run(home, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    run(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "two")
    assert revision_of(tmp_path / "tree") == Revision(run(tmp_path / "tree", "rev-parse", "HEAD"), "other")
    run(home, "checkout", "-q", "--detach")
    assert revision_of(home) == Revision(first, "")


@pytest.mark.parametrize("head", ["", "ref: refs/heads/../../../secret", "ref: /etc/passwd", "nonsense"])
def test_what_is_no_repository_has_no_commit(tmp_path: Path, head: str) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text(head)
    assert revision_of(tmp_path) is None
