"""Published claims repeated: every unit of a row is one run of the product, worked on in pieces.

A piece is a child process ``secateur resume``, which is interrupted when it has had its time, or when the budget of all
is spent; as at Ctrl-C it loses two minutes at most. The unit's state then lies in its folder of the results, from which
a later call goes on, on another machine too. A finished unit leaves its compact model and its facts there instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.device_profiles.wording import printable_lines
from secateur.pipeline import children
from secateur.pipeline.errors import (
    EXIT_GATE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    EXIT_USER,
    SurroundingsError,
    UserError,
)
from secateur.pipeline.files import write_whole
from secateur.pipeline.lifecycle import unit_state
from secateur.pipeline.lifecycle.results import FACTS, give_baselines, write_results
from secateur.pipeline.lifecycle.rows import Unit, read_row
from secateur.pipeline.locks import held
from secateur.pipeline.run.run import create_run_directory
from secateur.pipeline.surroundings import HOME, home

PIECE_S = 3600.0
"""A piece of work takes no longer."""
LEAST_PIECE_S = 60.0
"""No piece is begun for less: starting takes as long."""
STATE, UNIT, LOG, LOCKS = "state.safetensors", "unit.json", "reproduce.log", "reproduce"
ENDING_S = 60.0
"""How long an interrupted piece has to end in order."""
TOLD_LINES = 15
"""Of the log of a piece that failed."""

Say = Callable[[str], None]
Outcome = Literal["finished", "paused", "was finished", "elsewhere"]


@dataclass(frozen=True)
class Budget:
    """The time that a call has.

    Args:
        until: by the clock.
        piece_s: longest piece.
        clock: seconds from any zero.
    """

    until: float
    piece_s: float = PIECE_S
    clock: Callable[[], float] = time.monotonic

    @property
    def next_piece_s(self) -> float:
        """How long the next piece may take; 0 = there is to be none."""
        left = self.until - self.clock()
        return min(self.piece_s, left) if left >= min(LEAST_PIECE_S, self.piece_s) else 0.0


def reproduce(units: Iterable[Unit], results: Path, budget: Budget, say: Say) -> dict[Unit, Outcome]:
    """Work on units, each to its end before the next is begun, until all are finished or the budget is spent.

    Those that another process of this home works on are passed over, so that several calls share the work.

    Args:
        results: folder of the results; ``ROW/UNIT-sSEED`` in it is a unit's own.
        say: told how it goes.

    Raises:
        UserError: a run file or a state is not valid, or the data is not here.
        SurroundingsError: a run failed; shows the end of its log.
    """
    outcomes: dict[Unit, Outcome] = {}
    with children.kept(home(), "reproduce"):
        for unit in units:
            if is_finished(unit, results):
                outcomes[unit] = "was finished"
                say(f"{unit}: was finished before")
                continue
            if not budget.next_piece_s:
                break
            with contextlib.ExitStack() as work:
                try:
                    lock = home() / LOCKS / f"{unit.row}-{unit.label}.lock"
                    work.enter_context(held(lock, str(unit), 0.0, lambda _: None))
                except SurroundingsError:
                    outcomes[unit] = "elsewhere"
                    say(f"{unit}: passed over, another process works on it")
                    continue
                outcomes[unit] = _work(unit, results, budget, say)
            if outcomes[unit] == "paused":
                break
    return outcomes


def is_finished(unit: Unit, results: Path) -> bool:
    """Whether a unit's facts are in the results."""
    return (results / unit.row / unit.label / FACTS).is_file()


def _work(unit: Unit, results: Path, budget: Budget, say: Say) -> Outcome:
    """One unit, piece by piece."""
    folder = results / unit.row / unit.label
    give_baselines(folder.parent)
    directory = _directory(unit, folder, say)
    number = 0
    while seconds := budget.next_piece_s:
        number += 1
        say(f"{unit}: piece {number}, {seconds / 60:.0f} min at most; log {directory / LOG}")
        code = piece(directory, seconds)
        if code in (EXIT_OK, EXIT_GATE):
            write_results(unit, directory, folder)
            (folder / STATE).unlink(missing_ok=True)
            say(f"{unit}: finished, {folder}")
            return "finished"
        if code != EXIT_INTERRUPTED:
            lines = (directory / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
            told = printable_lines("\n".join(lines[-TOLD_LINES:]))
            said = f"{unit}: the run in {directory} ended with code {code}. Its log ends with:\n{told}"
            if code == EXIT_USER:
                raise UserError(f"{said}\nThe row needs:\n" + "\n".join(read_row(unit.row).needs))
            raise SurroundingsError(said)
        _keep_state(unit, directory, folder)
        say(f"{unit}: paused; its state is {folder / STATE} ({(folder / STATE).stat().st_size / 1e6:.1f} MB)")
    return "paused"


def piece(directory: Path, seconds: float) -> int:
    """Work on a run for a while; the exit code of the process, or that of one that was interrupted.

    Args:
        directory: of the run.
        seconds: after which it is interrupted.
    """
    program = [sys.executable, "-m", "secateur", "resume", str(directory), "--quiet"]
    with (directory / LOG).open("ab") as log:
        child = children.start(program, {**os.environ, HOME: str(home())}, log)
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return _interrupted(child)
        except BaseException:
            _interrupted(child)
            raise


def _interrupted(child: subprocess.Popen[bytes]) -> int:
    """Have a process end in order (SIGINT is ignored by what ``nohup`` starts); if it does not, without any."""
    child.terminate()
    try:
        code = child.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        code = EXIT_INTERRUPTED
    return EXIT_INTERRUPTED if code < 0 or code == EXIT_TERMINATED else code


def _directory(unit: Unit, folder: Path, say: Say) -> Path:
    """The run directory of a unit in this home: the one there is, one made from its state, or a new one.

    Raises:
        UserError: a state is not valid, or is of another configuration.
    """
    config, state = unit.config(), folder / STATE
    known = _known(unit, config.digest)
    if state.is_file():
        run_id, count = unit_state.run_of(state)
        if run_id not in known or count > known[run_id][0]:
            say(f"{unit}: goes on from {state}")
            directory = unit_state.unpack(state)
            if _known(unit, config.digest).get(run_id) is None:
                raise UserError(
                    f"{state} is of another run file, profile or seed than {unit} has now; remove it to begin anew, or "
                    "check out the version that it was made with"
                )
            return directory
    if known:
        return max(known.values(), key=lambda found: found[0])[1]
    directory = create_run_directory(config)
    _write(unit, directory, 0)
    return directory


def _known(unit: Unit, digest: str) -> dict[str, tuple[int, Path]]:
    """Run directories of a unit in this home: id -> how many pieces they had, and where they are."""
    found = {}
    for file in (home() / "runs").glob(f"*/{UNIT}"):
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(told, dict) and {**told, "pieces": 0} == _told(unit, digest, 0):
            found[file.parent.name] = (int(told.get("pieces", 0)), file.parent)
    return found


def _told(unit: Unit, digest: str, pieces: int) -> dict[str, str | int]:
    return {"unit": str(unit), "profile": unit.profile, "config": digest, "pieces": pieces}


def _write(unit: Unit, directory: Path, pieces: int) -> None:
    write_whole(directory / UNIT, json.dumps(_told(unit, unit.config().digest, pieces)) + "\n")


def _keep_state(unit: Unit, directory: Path, folder: Path) -> None:
    """Put the state of a paused unit into its folder of the results."""
    config = unit.config()
    pieces = _known(unit, config.digest).get(directory.name, (0, directory))[0] + 1
    _write(unit, directory, pieces)
    write_whole(folder / STATE, unit_state.pack(directory, config, pieces))
