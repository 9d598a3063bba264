"""Exceptions of Python and of libraries are messages with a path and a fix; a bug stays a bug."""

from __future__ import annotations

import errno
import json
import os
import socket
import sqlite3
import ssl
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy.exc
import torch
import yaml

from secateur.device_profiles import DeviceError
from secateur.export import ExportError
from secateur.pipeline import errors, foreign
from secateur.pipeline.cli import app as cli
from secateur.pipeline.cli import inspect
from secateur.pipeline.errors import EXIT_BUG, EXIT_SURROUNDINGS, EXIT_USER

USER, AROUND, BUG = EXIT_USER, EXIT_SURROUNDINGS, EXIT_BUG


def raised(work: Callable[[], Any]) -> Exception:
    """The very exception, as Python or a library raises it."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  whatever it is
        return error
    raise AssertionError("nothing was raised")


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def endless() -> None:
    endless()


DEEP = "[" * 100_000
PATHS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such file": (lambda p: (p / "none.txt").read_text(), "correct the path"),
    "no such folder": (lambda p: list((p / "none").iterdir()), "correct the path"),
    "a folder as a file": (lambda p: p.read_text(), "it is a folder; name a file"),
    "a file as a folder": (
        lambda p: [(p / "f").write_text(""), (p / "f" / "x").read_text()],
        "a part of the path is a file",
    ),
    "a name too long": (lambda p: (p / ("x" * 300)).write_text(""), "use a shorter name"),
    "a circle of links": (lambda p: loop(p / "l").read_text(), "circle"),
    "a folder that is there": (lambda p: [(p / "d").mkdir(), (p / "d").mkdir()], "choose another name"),
    "a folder that is full": (lambda p: [(p / "d").mkdir(), (p / "d/f").touch(), (p / "d").rmdir()], "empty it"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_cannot_be_is_a_mistake_that_names_it_and_the_fix(name: str, tmp_path: Path) -> None:
    work, fix = PATHS[name]
    error = raised(lambda: work(tmp_path))
    meant = foreign.expected(error)
    assert isinstance(meant, errors.UserError) and foreign.exit_code(error) == USER
    assert str(tmp_path) in str(meant) and fix in str(meant)


@pytest.mark.parametrize("number", sorted(foreign.FAILURES))
def test_failures_of_the_system_name_the_file_and_the_fix(number: int) -> None:
    error = OSError(number, os.strerror(number), "/runs/[old]/x\n")
    meant = foreign.expected(error)
    assert isinstance(meant, errors.SurroundingsError) and foreign.exit_code(error) == AROUND
    assert "/runs/[old]/x\\n" in str(meant) and os.strerror(number) in str(meant)
    assert str(meant).endswith(foreign.FAILURES[number])


KINDS: dict[str, tuple[Callable[[], Any], int, str]] = {
    "full disk without a file": (lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), AROUND, "free some space"),
    "nobody listens": (lambda: socket.create_connection(("127.0.0.1", 9), 5), AROUND, "network"),
    "no such host": (lambda: socket.create_connection(("nosuchhost.invalid", 9), 5), AROUND, "network"),
    "no certificate": (lambda: _raise(ssl.SSLError("certificate verify failed")), AROUND, "network"),
    "memory of Python": (lambda: _raise(MemoryError()), AROUND, "batch_size"),
    "memory of NumPy": (lambda: np.zeros(10**15), AROUND, "batch_size"),
    "memory of PyTorch": (lambda: torch.empty(10**15), AROUND, "batch_size"),
    "memory of a GPU": (lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried ...")), AROUND, "batch_size"),
    "deep JSON": (lambda: json.loads(DEEP), USER, "nested"),
    "deep YAML": (lambda: yaml.safe_load(DEEP[:5000]), USER, "nested"),
    "a name that is no text": (lambda: "caf\udce9".encode(), USER, "rename it"),
    "text in another encoding": (lambda: b"caf\xe9 au lait".decode(), USER, "UTF-8"),
    "no home": (lambda: Path("~nosuchuser/x").expanduser(), USER, "whole path"),
    "a database": (lambda: sqlite3.connect("/nowhere/x.db"), AROUND, "database"),
    "a database in use": (lambda: _raise(sqlite3.OperationalError("database is locked")), AROUND, "database"),
    "a database of a library": (lambda: _raise(sqlalchemy.exc.SQLAlchemyError("no connection")), AROUND, "database"),
    "a server": (lambda: _raise(httpx.ConnectError("All connection attempts failed")), AROUND, "server"),
    "full disk in a library": (
        lambda: _raise(RuntimeError("I/O error: No space left on device (os error 28)")),
        AROUND,
        "space",
    ),
    "no folder for what passes": (
        lambda: _raise(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']")),
        AROUND,
        "TMPDIR",
    ),
    "our own": (lambda: _raise(errors.JournalError("x")), AROUND, "x"),
    "a device": (lambda: _raise(DeviceError("y")), AROUND, "y"),
    "an export": (lambda: _raise(ExportError("z")), USER, "z"),
}


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_exceptions_that_mean_something_to_a_user(name: str) -> None:
    work, code, said = KINDS[name]
    error = raised(work)
    assert foreign.exit_code(error) == code and said in str(foreign.expected(error))
    assert "\n" not in str(foreign.expected(error))


BUGS: dict[str, Callable[[], Any]] = {
    "a key": lambda: {}["x"],
    "an assertion": lambda: _raise(AssertionError()),
    "an attribute": lambda: None.x,  # type: ignore[attr-defined]
    "a type": lambda: 1 + "x",  # type: ignore[operator]
    "a value": lambda: int("x"),
    "a recursion of our own": endless,
    "an error of PyTorch": lambda: torch.ones(2) @ torch.ones(3),
    "an error of a library": lambda: _raise(RuntimeError("the network lost its memory of home")),
    "a file of our own": lambda: (Path(foreign.__file__).parent / "templates" / "none.j2").read_text(),
    "a file of Python": lambda: (Path(sys.prefix) / "lib" / "none.py").read_text(),
    "a right without a file": lambda: _raise(OSError(errno.EPERM, "no")),
    "a system error without a number": lambda: _raise(OSError("what?")),
    "a pause that is over": lambda: _raise(TimeoutError()),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_never_hidden(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = raised(BUGS[name])
    assert foreign.expected(error) is None and foreign.exit_code(error) == BUG
    with pytest.raises(type(error)), foreign.told():
        raise error

    def broken(what: str) -> dict[str, str]:
        raise error

    monkeypatch.setattr(inspect, "listing", broken)
    monkeypatch.setattr(sys, "argv", ["secateur", "list", "methods"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == BUG and f"Bug: {type(error).__name__}" in capsys.readouterr().err


def test_what_is_meant_is_raised_in_place_and_keeps_its_cause(tmp_path: Path) -> None:
    with pytest.raises(errors.UserError, match="correct the path") as caught, foreign.told():
        (tmp_path / "none").read_text()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    own = errors.UserError("mine")
    with pytest.raises(errors.UserError) as kept, foreign.told():
        raise own
    assert kept.value is own


def test_the_command_line_says_it_in_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(what: str) -> dict[str, str]:
        return {"x": (tmp_path / "[none]").read_text()}

    monkeypatch.setattr(inspect, "listing", broken)
    monkeypatch.setattr(sys, "argv", ["secateur", "list", "methods"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == USER and f"Error: {tmp_path}/[none]: No such file or directory; correct the path" in said


def test_passwords_are_not_in_what_is_said() -> None:
    error = sqlite3.OperationalError("cannot open postgresql://me:hunter2@db/x")
    assert "hunter2" not in str(foreign.expected(error))


def test_a_folder_for_what_passes_is_asked_for_as_python_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    assert "TMPDIR" in str(foreign.expected(raised(tempfile._get_default_tempdir)))


def test_a_flow_ends_with_the_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import logging

    from secateur.pipeline.flow import deployed

    monkeypatch.setattr(deployed, "get_run_logger", lambda: logging.getLogger("test"))
    state = deployed.answering(lambda: (tmp_path / "none").read_text())()  # type: ignore[arg-type,return-value]
    assert state.is_failed() and f"{tmp_path}/none: No such file" in str(state.message)
    with pytest.raises(KeyError):
        deployed.answering(lambda: {}["x"])()
