"""A chain of real runs that are killed, ended and interrupted at random: ``make chaos KILLS=50 SEED=1``.

Each step starts a run, or resumes it, in a terminal of its own, waits for a stage and a random moment in it, and sends
a signal to the process or to its whole group. Candidates are scored by the run itself or by worker processes. After
each step: the exit code is right, nothing that the run has started is left, both within ten seconds, and no evaluation
is gone. At the end of each run: no candidate is missing or doubled in the journal or in MLflow. The seed repeats every
choice; where in a stage a signal falls depends on the machine, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from secateur.pipeline.errors import EXIT_GATE, EXIT_OK
from secateur.pipeline.stages.order import STAGES
from secateur.pipeline.tracking import CANDIDATE_TAG, PARENT_TAG, RUN_TAG
from tests.pipeline.helpers import write_tiny
from tests.pipeline.test_children import of_home, wait_until
from tests.terminal import CTRL_C, Terminal

ROOT = Path(__file__).parents[2]
LIMIT_S, STEP_S = 10.0, 300.0
PLACES = ("before Prefect", *(stage.name for stage in STAGES))
RUNNERS: dict[str, dict[str, Any]] = {
    "itself": {},
    "processes": {"workers": {"engine": "processes", "count": 2, "batch": 1}},
}
HOW: dict[str, tuple[Callable[[Terminal], None], int]] = {
    "SIGKILL": (lambda t: os.kill(t.process.pid, signal.SIGKILL), -signal.SIGKILL),
    "SIGKILL to the group": (lambda t: os.killpg(t.process.pid, signal.SIGKILL), -signal.SIGKILL),
    "SIGTERM": (lambda t: os.kill(t.process.pid, signal.SIGTERM), 143),
    "SIGTERM to the group": (lambda t: os.killpg(t.process.pid, signal.SIGTERM), 143),
    "Ctrl-C": (lambda t: t.press(CTRL_C), 130),
}


@dataclass
class Tally:
    """What a chain has seen."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    runs: int = 0
    candidates: int = 0
    lost: int = 0
    doubled: int = 0
    left: int = 0
    wrong_codes: int = 0
    late: int = 0

    def summary(self) -> dict[str, Any]:
        ends = sorted(step["end_s"] for step in self.steps)
        return {
            "signals": len(self.steps),
            "runs": self.runs,
            "by stage": dict(Counter(step["hit"] for step in self.steps)),
            "by signal": dict(Counter(step["how"] for step in self.steps)),
            "by runner": dict(Counter(step["runner"] for step in self.steps)),
            "candidates": self.candidates,
            "lost": self.lost,
            "doubled": self.doubled,
            "left processes": self.left,
            "wrong exit codes": self.wrong_codes,
            "ended late": self.late,
            "slowest end, s": round(ends[-1], 1) if ends else None,
            "faults": self.faults,
        }


class Chain:
    """Runs in one home.

    Args:
        folder: for the home and the run file.
        say: told of each step.
    """

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.folder, self.seed, self.say = folder, seed, say
        self.home = folder / "home"
        self.tally = Tally()
        self.random = random.Random(seed)
        self.env = {**os.environ, "SECATEUR_HOME": str(self.home), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.env["PREFECT_HOME"] = str(self.home / "prefect")

    def go(self, signals: int) -> Tally:
        """Send so many signals, and bring every run to its end."""
        hows = list(HOW)
        while len(self.tally.steps) < signals:
            runner = list(RUNNERS)[self.tally.runs % len(RUNNERS)]
            count = min(signals - len(self.tally.steps), self.random.randint(3, 8))
            places = sorted(self.random.sample(range(len(PLACES)), count))
            plan = [(place, self.random.choice(hows), self.random.uniform(0.0, 1.0)) for place in places]
            self._run(runner, plan)
        return self.tally

    def _run(self, runner: str, plan: list[tuple[int, str, float]]) -> None:
        file = write_tiny(self.folder, **RUNNERS[runner], seed=self.seed * 1000 + self.tally.runs)
        arguments, directory, seen = ["run", str(file)], None, 0
        known = set(self._directories())
        for place, how, delay_s in plan:
            with self._started(arguments) as terminal:
                if not self._wait(terminal, known, directory, place):
                    break  # it came to its end
                time.sleep(delay_s)
                hit = PLACES[min(len(PLACES) - 1, self._stages_done(known, directory))] if place else PLACES[0]
                if terminal.process.poll() is not None:
                    break
                self._strike(terminal, runner, how, hit)
            directory = directory or next(iter(set(self._directories()) - known), None)
            if directory is not None:
                arguments = ["resume", str(directory)]
                asked = self._asked(directory)
                if sum(asked.values()) < seen:
                    self._fault("lost", f"{seen - sum(asked.values())} evaluations are gone from {directory}")
                seen = sum(asked.values())
        directory = directory or next(iter(set(self._directories()) - known), None)
        arguments = arguments if directory is None else ["resume", str(directory)]
        with self._started(arguments) as terminal:
            code = terminal.wait(STEP_S)
            if code not in (EXIT_OK, EXIT_GATE):  # to win against the champion of an earlier run is not asked for
                self._fault("wrong_codes", f"the end of {directory}: exit code {code}: {terminal.output[-2000:]}")
        directory = directory or next(iter(set(self._directories()) - known))
        self._check(directory)
        self.tally.runs += 1

    def _started(self, arguments: list[str]) -> Terminal:
        return Terminal([sys.executable, "-m", "secateur", *arguments], self.env, self.folder)

    def _strike(self, terminal: Terminal, runner: str, how: str, hit: str) -> None:
        send, expected = HOW[how]
        began = time.monotonic()
        send(terminal)
        code = terminal.wait(60)
        end_s = time.monotonic() - began
        gone = wait_until(lambda: not of_home(self.home), LIMIT_S)
        number = len(self.tally.steps) + 1
        self.tally.steps.append({"how": how, "hit": hit, "runner": runner, "code": code, "end_s": end_s})
        self.say(
            f"{number:3d}  run {self.tally.runs + 1}  {runner:9s}  {hit:14s}  {how:20s}  {code:4d}  {end_s:4.1f} s"
        )
        if code != expected:
            self._fault("wrong_codes", f"step {number}, {how} in {hit}: exit code {code}: {terminal.output[-2000:]}")
        if end_s > LIMIT_S:
            self._fault("late", f"step {number}, {how} in {hit}: ended after {end_s:.1f} s")
        if not gone:
            left = [" ".join(process.cmdline())[:200] for process in of_home(self.home)]
            self._fault("left", f"step {number}, {how} in {hit}: left {left}")
        if how in ("Ctrl-C", "SIGTERM", "SIGTERM to the group"):
            noise = [word for word in ("Traceback", "Bug", "Error") if word in terminal.output]
            if noise or terminal.output.count("Continue with: ") != 1:
                self._fault("wrong_codes", f"step {number}, {how} in {hit} said: {terminal.output[-2000:]}")

    def _wait(self, terminal: Terminal, known: set[Path], directory: Path | None, place: int) -> bool:
        """Wait until a place is reached; False if the program ended before."""

        def reached() -> bool:
            if terminal.process.poll() is not None:
                return True
            if place == 0:
                return "Run directory" in terminal.output or (directory is not None and "Start" in terminal.output)
            return self._stages_done(known, directory) >= place and "Start Prefect" in terminal.output

        assert wait_until(reached, STEP_S), terminal.output[-3000:]
        return terminal.process.poll() is None

    def _stages_done(self, known: set[Path], directory: Path | None) -> int:
        """How many stages have a kept result, and one more: the place of the stage that is under way."""
        found = directory or next(iter(set(self._directories()) - known), None)
        kept = None if found is None else found / "stages"
        return 1 + (len(list(kept.iterdir())) if kept is not None and kept.is_dir() else 0) if found else 0

    def _directories(self) -> list[Path]:
        return sorted((self.home / "runs").glob("tiny-*"))

    @staticmethod
    def _asked(directory: Path) -> Counter[str]:
        journal = directory / "journal.jsonl"
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else []  # the last is empty or cut short
        rows = [json.loads(line) for line in lines]
        return Counter(f"{r['stage']}:{r['kind']}:{r['candidate']['id']}" for r in rows if "evaluation" in r)

    def _check(self, directory: Path) -> None:
        """Journal and MLflow hold every candidate of a run once."""
        asked = self._asked(directory)
        client = MlflowClient(f"sqlite:///{self.home}/mlflow.db")
        experiment = client.get_experiment_by_name("secateur")
        assert experiment is not None
        (parent,) = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = '{directory.name}'")
        query = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
        told = Counter(
            run.data.tags[CANDIDATE_TAG]
            for run in client.search_runs([experiment.experiment_id], query, max_results=5000)
            if CANDIDATE_TAG in run.data.tags
        )
        told = Counter({key: count for key, count in told.items() if not key.startswith("smallest:")})
        asked = Counter({key: count for key, count in asked.items() if not key.startswith("smallest:")})
        self.tally.candidates += len(asked)
        for name, counted in (("journal", asked), ("MLflow", told)):
            if twice := {key: count for key, count in counted.items() if count > 1}:
                self._fault("doubled", f"{directory.name}: {name} holds more than once: {twice}", len(twice))
        if missing := sorted(set(asked) ^ set(told)):
            self._fault("lost", f"{directory.name}: only in one of journal and MLflow: {missing}", len(missing))

    def _fault(self, kind: str, what: str, count: int = 1) -> None:
        setattr(self.tally, kind, getattr(self.tally, kind) + count)
        self.tally.faults.append(what)
        self.say(f"FAULT ({kind}): {what}")


def chain(signals: int, seed: int, folder: Path, say: Callable[[str], None] = print) -> Tally:
    """Send so many signals to runs in a folder of their own."""
    say(f"seed {seed}: the same choices again with `make chaos KILLS={signals} SEED={seed}`")
    return Chain(folder, seed, say).go(signals)


def main() -> int:
    """Print each step and the summary; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1_000_000)

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="secateur-chaos-") as folder:
        os.environ.setdefault("SECATEUR_LOCKS", folder)  # other measurements on this machine do not matter
        tally = chain(given.kills, seed, Path(folder), say)
    print(json.dumps(tally.summary(), indent=1))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
