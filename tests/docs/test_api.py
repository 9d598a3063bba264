"""The public API, which is what the API pages show, keeps its promises since the commit in `docs/api-baseline`.

A change that breaks a caller is a line in CHANGELOG.md and a new commit in that file.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("pruning", "export", "device_profiles", "pipeline")
BASELINE = (ROOT / "docs" / "api-baseline").read_text(encoding="utf-8").strip()
MODULES = sorted(
    name
    for page in (ROOT / "docs" / "reference" / "api").glob("*.md")
    for name in re.findall(r"automodule:: (\S+)", page.read_text(encoding="utf-8"))
)


def loaded(folder: Path) -> griffe.Object | griffe.Alias:
    """The package in a checkout, read and not imported."""
    loader = griffe.GriffeLoader(search_paths=[folder], allow_inspection=False)
    package = loader.load("secateur", try_relative_path=False)
    loader.resolve_aliases()
    return package


def breakages(old: griffe.Object | griffe.Alias, new: griffe.Object | griffe.Alias) -> Iterator[str]:
    """What would break callers of the public modules."""
    for name in MODULES:
        before, after = (member(package, name.removeprefix("secateur.")) for package in (old, new))
        if before is not None and after is None:
            yield f"{name} is gone"
        elif before is not None and after is not None:  # else it became public later
            known = shown(before)
            for breakage in griffe.find_breaking_changes(before, after):
                if any(breakage.obj.path == path or breakage.obj.path.startswith(f"{path}.") for path in known):
                    yield f"{breakage.obj.path}: {breakage.explain()}"


def shown(module: griffe.Object | griffe.Alias) -> set[str]:
    """Where what a page shows of a module stands: in it, or in a module below it, which is no page for that."""
    members = [each for each in module.members.values() if each.is_alias or not each.is_module]
    return {each.path for each in members} | {each.target_path for each in members if isinstance(each, griffe.Alias)}


def member(package: griffe.Object | griffe.Alias, path: str) -> griffe.Object | griffe.Alias | None:
    """What lies below a package under a dotted name; None = nothing."""
    try:
        return package[path]
    except KeyError:
        return None


def test_no_caller_of_the_public_api_is_broken(tmp_path: Path) -> None:
    known = subprocess.run(["git", "cat-file", "-e", BASELINE], cwd=ROOT, capture_output=True)
    if known.returncode:
        pytest.skip(f"commit {BASELINE[:12]} of docs/api-baseline is not in this checkout")
    words = ["git", "archive", BASELINE, "secateur", *FOLDERS]
    archive = subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=tmp_path, input=archive.stdout, check=True)
    assert MODULES
    found = sorted(set(breakages(loaded(tmp_path), loaded(ROOT))))
    assert not found, "a line in CHANGELOG.md, and the commit before the change in docs/api-baseline"


@pytest.mark.parametrize("name", MODULES)
def test_pages_and_shells_see_every_public_name(name: str) -> None:
    module = importlib.import_module(name)
    assert set(getattr(module, "__all__", ())) <= set(dir(module)), "the page would not have it"
    for each in getattr(module, "__all__", ()):
        assert getattr(module, each).__doc__, f"{each} has no docstring, so the page leaves it out"


def test_a_broken_promise_is_found(tmp_path: Path) -> None:
    texts = {"old": "def cost(graph, plan=None):\n    ...\n", "new": "def cost(plan):\n    ...\n"}
    names = "from secateur.pruning.costs import cost as count\n"
    for name, text in texts.items():
        (tmp_path / name / "secateur" / "pruning").mkdir(parents=True)
        (tmp_path / name / "secateur" / "__init__.py").touch()
        (tmp_path / name / "secateur" / "pruning" / "__init__.py").write_text(names + text)
        (tmp_path / name / "secateur" / "pruning" / "costs.py").write_text(text)
        (tmp_path / name / "secateur" / "pruning" / "inner.py").write_text(text)
    found = list(breakages(loaded(tmp_path / "old"), loaded(tmp_path / "new")))
    for place in ("pruning.cost:", "pruning.costs.cost:"):
        assert any(f"secateur.{place}" in line and "removed" in line.lower() for line in found), found
    assert not any("inner" in line for line in found), "what no page shows may change"
