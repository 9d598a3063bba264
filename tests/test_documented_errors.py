"""Public functions say under ``Raises`` which exceptions of theirs a caller meets.

ruff's DOC501 finds what a docstring leaves out. It is a preview rule, and what it cannot leave out is left out here:
private functions, an exception that the function itself catches, the texts of commands (their docstrings are the
help, whose epilog tells the exit codes), and ``AssertionError`` (a bug of ours).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from secateur.pipeline.cli.app import app

ROOT = Path(__file__).parents[1]
FOLDERS = ("device_profiles", "export", "pipeline", "pruning")
RULE = ("--preview", "--select", "DOC501", "--config", "lint.explicit-preview-rules=true", "--output-format", "json")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def left_out(*folders: object) -> list[str]:
    """What public functions raise and do not document: ``file:line function exception``."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *RULE, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for finding in json.loads(done.stdout) if (line := missing(finding))]


def missing(finding: Mapping[str, Any]) -> str:
    """A finding of ruff's as a line; empty where a caller misses nothing."""
    file, row = Path(finding["filename"]), finding["location"]["row"]
    names, function = at(file, row)
    raised = finding["message"].split("`")[1]
    types = made_by(raised) or {raised}
    documented = ast.get_docstring(function) or ""
    known = any(f"{name}: " in documented.partition("Raises:")[2] for name in types)
    private = any(name.startswith("_") for name in names)
    help_text = (file.stem, function.name) in commands()
    if private or known or help_text or raised == "AssertionError" or raised in caught(function):
        return ""
    return f"{file}:{function.lineno} {'.'.join(names)} {raised}"


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def at(file: Path, row: int) -> tuple[list[str], Function]:
    """The innermost function at a line, and the names of it and of what it stands in."""
    names, place = [], None
    for node in ast.walk(tree_of(file)):  # outer ones come first
        if isinstance(node, Function | ast.ClassDef) and node.lineno <= row <= (node.end_lineno or 0):
            names.append(node.name)
            place = node if isinstance(node, Function) else place
    assert place is not None
    return names, place


def caught(function: Function) -> set[str]:
    """The exceptions that the function has a handler for, unless that raises them again."""
    handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
    ends = [h for h in handlers if not any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(h))]
    return {name for handler in ends for name in words(handler.type)}


def words(expression: ast.expr | None) -> set[str]:
    """The names in an expression."""
    return set() if expression is None else {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)}


@cache
def made_by(function: str) -> set[str]:
    """What a function that makes an exception returns: ruff takes its name for a type's."""
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    trees = [tree_of(file) for file in files if f"def {function}(" in file.read_text(encoding="utf-8")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {w for n in nodes if isinstance(n, Function) and n.name == function for w in words(n.returns)}


@cache
def commands() -> set[tuple[str, str]]:
    """Module and name of every command."""
    groups = [app, *(group.typer_instance for group in app.registered_groups if group.typer_instance)]
    callbacks = [command.callback for group in groups for command in group.registered_commands]
    return {(c.__module__.rpartition(".")[2], c.__name__) for c in callbacks if c}


def test_public_functions_document_what_they_raise() -> None:
    assert left_out(*FOLDERS) == []


SAMPLE = """
def error_of_sample(x) -> ValueError: ...

def public(x):
    \"\"\"Text.\"\"\"
    if x:
        raise ValueError
    raise error_of_sample(x)

def documented(x):
    \"\"\"Text.

    Raises:
        ValueError: always.
    \"\"\"
    raise ValueError

def own(x):
    \"\"\"Text.\"\"\"
    try:
        raise KeyError
    except (KeyError, TypeError):
        return 1

def passed_on(x):
    \"\"\"Text.\"\"\"
    try:
        return x()
    except KeyError:
        raise

class Kind:
    def method(self):
        \"\"\"Text.\"\"\"
        raise OSError

    def _private(self):
        \"\"\"Text.\"\"\"
        raise OSError
"""


def test_what_is_left_out_is_found(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(SAMPLE)
    lines = [line.partition(" ")[2] for line in left_out(tmp_path / "sample.py")]
    assert lines == ["public ValueError", "public error_of_sample", "passed_on KeyError", "Kind.method OSError"]
