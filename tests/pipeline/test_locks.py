"""Locks between processes: where they lie, whom they wait for, and that waiting ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateur.device_profiles import agent
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.locks import held, machine_lock
from secateur.pipeline.tracking import Registry
from secateur.pipeline.tracking.registry import _lock_of

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from secateur.pipeline.locks import held
with held(Path(sys.argv[1]), "it", 0, print):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds a lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_waiting_says_for_whom_and_has_an_end(tmp_path: Path) -> None:
    path, said = tmp_path / "deep" / "lock", []
    with holder(path) as other:
        with pytest.raises(SurroundingsError) as caught, held(path, "the store", 0.05, said.append):
            pass
        for text in (said[0], str(caught.value)):
            assert "the store" in text
            assert f"process {other.pid} ({sys.executable}" in text
        assert "try again later" in str(caught.value)
        assert len(said) == 1
        other.kill()
    with held(path, "the store", 0, said.append):  # the kernel frees the lock of a killed process
        pass
    assert len(said) == 1
    with held(path, "the store", 0, said.append):
        pass


@pytest.mark.parametrize("trap", ["link", "pipe", "folder"])
def test_no_trap_is_locked(tmp_path: Path, trap: str) -> None:
    path = tmp_path / "lock"
    {
        "link": lambda: path.symlink_to(tmp_path / "victim"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[trap]()
    with pytest.raises(SurroundingsError, match=str(path)), held(path, "it", 0, print):
        pass
    assert not (tmp_path / "victim").exists()


def test_everybody_may_lock_it(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with held(tmp_path / "lock", "it", 0, print):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize(
    ("mode", "flag", "found"),
    [
        (0o1777, 0, "/run/lock"),
        (0o1777, os.ST_RDONLY, "/tmp"),
        (0o755, 0, "/tmp"),
        (0o777, 0, "/tmp"),
        (None, 0, "/tmp"),
    ],
)
def test_the_machine_s_locks_lie_in_one_folder_whoever_asks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int | None, flag: int, found: str
) -> None:
    monkeypatch.delenv("SECATEUR_LOCKS")
    stood_in = tmp_path / "lock"
    if mode is not None:
        stood_in.mkdir()
        stood_in.chmod(mode)
    real = os.stat
    monkeypatch.setattr(agent.os, "stat", lambda path, **more: real(stood_in if path == "/run/lock" else path, **more))
    monkeypatch.setattr(agent.os, "statvfs", lambda _: SimpleNamespace(f_flag=flag))
    for home in ("a", "b"):
        for name in ("TMPDIR", "SECATEUR_HOME", "HOME"):
            monkeypatch.setenv(name, str(tmp_path / home))
        assert agent.lock_folder() == found
    monkeypatch.setenv("SECATEUR_LOCKS", str(tmp_path))
    assert machine_lock("x") == tmp_path / "secateur-x.lock"


def test_the_lock_of_promotions_belongs_to_the_store_and_not_to_a_home(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert _lock_of(uri) == tmp_path / "mlflow.db.lock"
    (tmp_path / "link").symlink_to(tmp_path)
    assert _lock_of(f"sqlite:///{tmp_path}/link/mlflow.db") == tmp_path / "mlflow.db.lock"
    server = "http://user:secret@mlflow.example:5000"
    assert _lock_of(server) == _lock_of(server + "/")
    assert _lock_of(server).parent == Path(os.environ["SECATEUR_LOCKS"])
    assert "secret" not in str(_lock_of(server))


def test_a_move_of_an_alias_waits_for_another_home_s_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.pipeline.tracking.registry.MOVE_WAIT_S", 0.05)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    said: list[str] = []
    registry = Registry(uri, tmp_path / "home of another", say=said.append)
    with holder(_lock_of(uri)) as other:
        with pytest.raises(SurroundingsError, match=r"waited 0\.05 s"):
            registry.challenge("tiny", "1", "quick")
        other.kill()
    assert f"process {other.pid}" in said[0]
