"""Children end with whoever started them: in order, when it is killed, and when even the guard is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from secateur.pipeline import children, guard

ROOT = Path(__file__).parents[2]
SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
FAMILY = """
import os, subprocess, sys, threading, time
from pathlib import Path
from secateur.pipeline import children

home = Path(sys.argv[1])
programs = {
    "a child": [sys.executable, "-c", SLEEP],
    "one that ignores SIGTERM": [sys.executable, "-c", STUBBORN],
    "a grandchild in a session of its own": [sys.executable, "-c",
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', %r], start_new_session=True)" % SLEEP],
}
with children.kept(home, "test"):
    # A thread that ends at once: a parent-death signal would have followed it.
    def begin():
        for program in programs.values():
            children.start(program, os.environ, open(os.devnull, "wb"))
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    print("started", flush=True)
    sys.stdin.readline()
"""


def of_home(home: Path) -> list[psutil.Process]:
    """Every process that was started for a home, guards too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("SECATEUR_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def sleepers(home: Path) -> int:
    """How many children there are; 0 while whoever begins the grandchild is still there."""
    words = []
    for process in of_home(home):
        with contextlib.suppress(psutil.Error):
            words.append("".join(process.cmdline()[-1:]))
    begun = not any("Popen" in word and word.startswith("import subprocess") for word in words)
    return sum(word in (SLEEP, STUBBORN) for word in words) if begun else 0


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with children, a stubborn child and a grandchild; and its home."""
    home = tmp_path / "home"
    program = f"SLEEP, STUBBORN = {SLEEP!r}, {STUBBORN!r}\n" + textwrap.dedent(FAMILY)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(home)],
        env={**os.environ, "SECATEUR_HOME": str(home), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert wait_until(lambda: sleepers(home) == 3)
        yield process, home
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        for left in of_home(home):
            left.kill()


def records(home: Path) -> list[Path]:
    return sorted((home / children.FOLDER).iterdir())


def test_children_end_in_order(family: tuple[subprocess.Popen[str], Path]) -> None:
    process, home = family
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(60) == 0
    assert wait_until(lambda: not of_home(home))
    assert records(home) == []


def test_children_end_with_a_process_that_is_killed(family: tuple[subprocess.Popen[str], Path]) -> None:
    process, home = family
    process.kill()
    assert wait_until(lambda: not of_home(home)), of_home(home)
    (record,) = records(home)  # of a process that is gone; the next start clears it away
    assert children.sweep(home) == [record.stem]
    assert records(home) == []


def test_what_even_the_guard_leaves_ends_at_the_next_start(family: tuple[subprocess.Popen[str], Path]) -> None:
    process, home = family
    guards = [p for p in of_home(home) if "guard.py" in " ".join(p.cmdline())]
    assert len(guards) == 1
    guards[0].kill()
    process.kill()
    process.wait()
    assert len(of_home(home)) >= 3
    with children.kept(home, "next"):
        assert [p for p in of_home(home) if p.ppid() != os.getpid()] == []  # but for the guard of this block
        assert len(records(home)) == 1
    assert records(home) == []


def test_nothing_of_a_living_run_is_swept(family: tuple[subprocess.Popen[str], Path]) -> None:
    process, home = family
    before = {p.pid for p in of_home(home)}
    assert children.sweep(home) == []
    with children.kept(home, "another"):
        pass
    assert before == {p.pid for p in of_home(home)}
    (record,) = records(home)
    assert json.loads(record.read_text())["pid"] == process.pid


def test_the_record_is_there_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        assert len(records(tmp_path)) == 1
        raise RuntimeError("as far as this goes")

    monkeypatch.setattr(children.subprocess, "Popen", started)
    with pytest.raises(RuntimeError, match="as far"), children.kept(tmp_path, "test"):
        pass
    assert guard.MARK not in os.environ
    monkeypatch.undo()
    assert len(children.sweep(tmp_path)) <= 1
    assert records(tmp_path) == []


def test_blocks_within_each_other_are_one(tmp_path: Path) -> None:
    with children.kept(tmp_path, "outer"):
        mark = os.environ[guard.MARK]
        with children.kept(tmp_path, "inner"):
            assert os.environ[guard.MARK] == mark
            assert len(records(tmp_path)) == 1
        assert os.environ[guard.MARK] == mark
    assert guard.MARK not in os.environ


def test_no_signal_of_a_terminal_reaches_a_child(tmp_path: Path) -> None:
    with children.kept(tmp_path, "test"), open(os.devnull, "wb") as output:
        child = children.start([sys.executable, "-c", SLEEP], os.environ, output)
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    assert child.wait(60) == -signal.SIGTERM
