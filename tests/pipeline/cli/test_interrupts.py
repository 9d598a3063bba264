"""Ctrl-C and SIGTERM at any moment: one request, an end within seconds, and nothing said but how to go on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from secateur.pipeline import errors
from secateur.pipeline.cli.interrupts import SHOW_CURSOR
from tests.pipeline.helpers import write_tiny
from tests.pipeline.run.test_kill import journal_lines, prefect_home, run_directory
from tests.pipeline.test_children import of_home, wait_until
from tests.terminal import CTRL_C, Terminal

__all__ = ["prefect_home"]
ROOT = Path(__file__).parents[3]
CODES = {signal.SIGINT: errors.EXIT_INTERRUPTED, signal.SIGTERM: errors.EXIT_TERMINATED}
WORDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
PROGRAM = """
import hashlib, os, signal, sys, threading, time
from secateur.pipeline.cli import interrupts, program
import types

interrupts.GRACE_S = {grace}
cli = types.ModuleType("secateur.pipeline.cli.app")
sys.modules["secateur.pipeline.cli.app"] = cli
def main():
    interrupts.current.go_on = "secateur resume '/a b'"
    work()
cli.main = main
import secateur.pipeline.cli
secateur.pipeline.cli.app = cli
def begin():
    os.write(1, b"working\\n")
{work}
program.run_program()
"""
WORK = {
    "waits": """
        def work():
            begin()
            time.sleep(600)
    """,
    "waits for a thread that does not end": """
        def work():
            thread = threading.Thread(target=time.sleep, args=(600,))
            thread.start()
            begin()
            thread.join()
    """,
    "is in code that takes no signal": """
        def work():
            begin()
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
    """,
    "never comes to an end of its cleaning up": """
        def work():
            begin()
            try:
                time.sleep(600)
            finally:
                time.sleep(600)
    """,
    "fails while it is ended": """
        def work():
            begin()
            try:
                time.sleep(600)
            finally:
                raise ConnectionError("the server died first")
    """,
    "prints while it is ended, from everywhere": """
        def fail():
            while not interrupts.current.stopping:
                time.sleep(0.01)
            time.sleep(0.2)
            raise RuntimeError("in a thread")
        def work():
            threading.Thread(target=fail).start()
            begin()
            try:
                time.sleep(600)
            finally:
                print("noise")
                print("noise", file=sys.stderr)
                os.write(2, b"noise")
                os.system("echo noise")
                time.sleep(0.5)
    """,
    "has given the signals to a library": """
        class Ended(BaseException):
            pass
        def theirs(number, frame):
            raise Ended
        def work():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, theirs)
            begin()
            time.sleep(600)
    """,
    "has a library that swallows the request": """
        def work():
            begin()
            while True:
                try:
                    time.sleep(600)
                except BaseException:
                    pass
    """,
}


def program(work: str, grace_s: float = 0.5) -> list[str]:
    text = PROGRAM.replace("{grace}", str(grace_s)).replace("{work}", textwrap.dedent(WORK[work]))
    return [sys.executable, "-c", text]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
@pytest.mark.parametrize("work", list(WORK))
def test_the_end_comes_whatever_is_under_way(tmp_path: Path, work: str, number: signal.Signals) -> None:
    with Terminal(program(work), environment(), tmp_path) as terminal:
        terminal.wait_for("working")
        if number == signal.SIGINT:
            terminal.press(CTRL_C)
        else:
            terminal.process.send_signal(number)
        assert terminal.wait() == CODES[number]
        said = terminal.output.replace(SHOW_CURSOR.decode(), "").replace("^C", "")
        expected = f"{WORDS[number]}; nothing is lost. Continue with: secateur resume '/a b'\n"
        assert said == "working\n" + expected


def test_many_signals_are_one_request(tmp_path: Path) -> None:
    with Terminal(program("never comes to an end of its cleaning up", 2), environment(), tmp_path) as terminal:
        terminal.wait_for("working")
        for _ in range(5):
            terminal.press(CTRL_C)
            terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait() in CODES.values()
        assert terminal.output.count("Continue with") == 1


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As with ``nohup``, and for a job in the background of a script."""
    process = subprocess.Popen(
        program("waits"),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == errors.EXIT_TERMINATED


@pytest.mark.parametrize("words", [["list", "methods"], ["validate", "none.yaml"]])
def test_a_command_that_began_nothing_only_says_that_it_ended(tmp_path: Path, words: list[str]) -> None:
    stopped = """
        import os, sys, time
        class Slow:
            def find_spec(self, name, *_):
                if name == "typer":
                    os.write(1, b"importing\\n")
                    time.sleep(600)
        sys.meta_path.insert(0, Slow())
        sys.argv = ["secateur", *{words}]
        from secateur.pipeline.cli.program import run_program
        run_program()
    """
    text = textwrap.dedent(stopped).replace("{words}", repr(words))
    with Terminal([sys.executable, "-c", text], environment(), tmp_path) as terminal:
        terminal.wait_for("importing")
        terminal.press(CTRL_C)
        assert terminal.wait() == errors.EXIT_INTERRUPTED
        assert terminal.output.replace(SHOW_CURSOR.decode(), "").replace("^C", "") == "importing\nInterrupted.\n"


START, SEARCH, EXPORT = "Start Prefect", "Search (ccep)", "Export to ONNX"
HELD = """
import os, sys, time
from secateur.pipeline.stages import order
keep = order.keep
def held(directory, stage, result):
    if stage == os.environ["HELD"]:
        os.write(2, f"held in {stage}\\n".encode())
        time.sleep(600)
    keep(directory, stage, result)
order.keep = held
from secateur.pipeline.cli.program import run_program
run_program()
"""
"""The program, held at the end of a stage that is short: all is done and written, nothing is noted."""
SHORT = [f"held in {stage}" for stage in ("gate", "report", "register", "promote")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "moments",
    [
        {START: signal.SIGINT},
        pytest.param(
            {START: signal.SIGTERM, SEARCH: signal.SIGTERM, EXPORT: signal.SIGINT}
            | dict.fromkeys(SHORT, signal.SIGINT)
            | {"": None},
            marks=pytest.mark.long,
        ),
    ],
    ids=["once", "again and again, to the end"],
)
def test_a_run_in_a_terminal_is_interrupted_and_ended_and_goes_on(
    tmp_path: Path, prefect_home: Path, moments: dict[str, signal.Signals | None]
) -> None:
    """A signal to the whole group as Prefect starts, in mid-search, and in every later stage; then to the end."""
    home = tmp_path / "home"
    env = environment(SECATEUR_HOME=str(home), PREFECT_HOME=str(prefect_home), COLUMNS="200")
    arguments = ["run", str(write_tiny(tmp_path))]
    for shown, number in moments.items():
        stage = shown.removeprefix("held in ")
        words = [sys.executable, *(["-c", HELD] if stage != shown else ["-m", "secateur"])]
        with Terminal([*words, *arguments], {**env, "HELD": stage}, tmp_path) as terminal:
            if number is None:
                assert terminal.wait(1000) == 0, terminal.output[-3000:]
                assert "alias champion" in terminal.output
                assert not of_home(home)
                return
            terminal.wait_for(shown)
            if shown.startswith("Search"):
                directory = run_directory(home)
                assert directory is not None
                assert wait_until(lambda where=directory: journal_lines(4)(where), 240)
            if number == signal.SIGINT:
                terminal.press(CTRL_C)
            else:
                os.killpg(terminal.process.pid, number)
            assert terminal.wait() == CODES[number], terminal.output[-3000:]
            directory = run_directory(home)
            last = terminal.output.rstrip().splitlines()[-1]
            before, _, go_on = last.partition("; nothing is lost. Continue with: ")
            assert re.search(f"(^|K|h){WORDS[number]}$", before), last
            program, *arguments = shlex.split(go_on)
            assert (Path(program).name, arguments) == ("secateur", ["resume", str(directory)])
            assert not re.search(r"Traceback|Error|Bug|Crashed", terminal.output), terminal.output[-3000:]
            assert wait_until(lambda: not of_home(home)), of_home(home)
