"""Devices, clocks, disks and signals that fail in the middle of a run: what is lost, and how it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from secateur.device_profiles import DeviceError
from secateur.pipeline import errors
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.foreign import exit_code
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.journal import read_journal
from secateur.pipeline.run.run import Run, create_run_directory
from tests.device_profiles import sshd
from tests.pipeline.helpers import consent, end, perform, quick_device, tiny_config, write_tiny
from tests.pipeline.run.test_kill import ROOT, evaluations, finish, journal_lines, prefect_home, run_directory, start

__all__ = ["prefect_home"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def searched(num_plans: int = 4, **changes: Any) -> dict[str, Any]:
    """Changes to the tiny run: a search that measures every candidate."""
    options = {"method": "random", "options": {"num_plans": num_plans}, "latency": {"mode": "measure"}}
    return {"search": {**options, **changes}, "finetune": {"top": 1}}


def slow(folder: Path, **device: Any) -> dict[str, Any]:
    """Changes to the tiny run: an agent works most of the time."""
    (folder / "devices").mkdir()  # the tiny run's own device is beside it
    profile = quick_device(folder / "devices", search={"min_seconds": 0.5}, **device)
    return {"device": {"profile": str(profile), "probe": False}, **searched(12)}


def wait_until(process: subprocess.Popen[bytes], home: Path, moment: Callable[[Path], bool]) -> Path:
    """The run directory, as soon as its moment has come while the process lives."""
    assert sshd.wait_for(
        lambda: process.poll() is not None or ((found := run_directory(home)) is not None and moment(found)), 240
    )
    assert process.poll() is None, (home / "output").read_text()
    directory = run_directory(home)
    assert directory is not None
    return directory


def agents_of(process: psutil.Process) -> list[psutil.Process]:
    """The agents that a process has started, and their workers."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(word.endswith("agent.py") for word in child.cmdline()):
                    found.append(child)
    return found


def asked_once(directory: Path) -> int:
    """How many evaluations a journal holds; none of them twice."""
    asked = Counter((r["stage"], r["kind"], r["candidate"]["id"]) for r in evaluations(directory))
    assert set(asked.values()) == {1}, asked
    return len(asked)


# -- SIGTERM


@pytest.mark.long
def test_sigterm_ends_a_run_in_order_and_nothing_is_lost(
    tmp_path: Path, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(tmp_path, prefect_home, "run", str(write_tiny(tmp_path, **slow(tmp_path))))
    wait_until(process, tmp_path, journal_lines(4))
    whole = psutil.Process(process.pid)
    assert sshd.wait_for(lambda: agents_of(whole))
    agents, children = agents_of(whole), whole.children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = finish(process, tmp_path, errors.EXIT_TERMINATED)
    directory = run_directory(tmp_path)
    assert "Terminated; nothing is lost. Continue with: " in output and f"secateur resume {directory}\n" in output
    assert agents
    _, alive = psutil.wait_procs(children, 20)
    assert not alive, [child.cmdline() for child in alive]  # neither an agent nor the embedded server
    assert directory is not None
    before = asked_once(directory)
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path))
    with Run(directory, Silent()) as run:  # nobody holds journal or device
        perform(run, "search")
    assert asked_once(directory) > before >= 3


# -- a device that becomes unreachable


def start_again(device: sshd.Device) -> None:
    """Switch a closed device on again: the same address, the same keys."""
    seen = device.log.count("Server listening")
    command: Sequence[str] = device.process.args  # type: ignore[assignment]
    device.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert sshd.wait_for(lambda: device.log.count("Server listening") > seen)


def be_patient(directory: Path) -> None:
    """Edit a run's own file, as a user may: patience is no part of what a run finds."""
    kept = yaml.safe_load((directory / "run.yaml").read_text())
    kept["device"]["wait_s"] = 3600
    (directory / "run.yaml").write_text(yaml.safe_dump(kept))


def run_on(device: sshd.Device, folder: Path) -> dict[str, Any]:
    """Changes to the tiny run: it measures on a board."""
    return slow(folder, target="ssh", connect=device.settings().model_dump(mode="json"))


class Told(Silent):
    """Keeps what is said, and acts on it once.

    Args:
        words: which, in the line acted on.
    """

    def __init__(self, words: str, act: Callable[[], None]) -> None:
        self.words, self.act, self.lines = words, act, list[str]()

    def say(self, line: str) -> None:
        self.lines.append(line)
        if self.words in line and sum(self.words in said for said in self.lines) == 2:
            self.act()


@pytest.mark.long
def test_a_device_that_is_away_is_waited_for_or_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    with sshd.board() as device:
        config = tiny_config(tmp_path, **run_on(device, tmp_path))
        directory = create_run_directory(config)
        consent(config, directory)
        watched = journal_lines(5)

        def switch_off() -> None:
            assert sshd.wait_for(lambda: watched(directory), 240)
            device.close()

        hand = threading.Thread(target=switch_off)
        hand.start()
        with Run(directory, Silent()) as run, pytest.raises(DeviceError) as caught:
            perform(run, "search")
        hand.join()
        assert exit_code(caught.value) == errors.EXIT_SURROUNDINGS
        before = [line["candidate"] for line in evaluations(directory)]

        be_patient(directory)
        progress = Told("Device quick is unreachable", lambda: start_again(device))
        with Run(directory, progress) as run:
            perform(run, "search")
        assert any("waiting for another 60 min" in line for line in progress.lines)
        assert [line["candidate"] for line in evaluations(directory)][: len(before)] == before
        assert asked_once(directory) > len(before) >= 4


@pytest.mark.long
def test_a_device_that_is_away_for_an_hour_costs_the_evaluation_in_flight(tmp_path: Path, prefect_home: Path) -> None:
    with sshd.board() as device:
        process = start(tmp_path, prefect_home, "run", str(write_tiny(tmp_path, **run_on(device, tmp_path))), "--trust")
        directory = wait_until(process, tmp_path, journal_lines(5))
        device.close()  # an outage without an end: the run says so and ends
        assert "SSH" in finish(process, tmp_path, errors.EXIT_SURROUNDINGS)
        before = [line["candidate"] for line in evaluations(directory)]
        be_patient(directory)
        process = start(tmp_path, prefect_home, "resume", str(directory))
        assert sshd.wait_for(lambda: (tmp_path / "output").read_text().count("Device quick is unreachable") > 1, 120)
        start_again(device)
        finish(process, tmp_path)
        assert [line["candidate"] for line in evaluations(directory)][: len(before)] == before
        assert asked_once(directory) > len(before) >= 4


# -- clocks


class JumpingClock:
    """Seconds since 1970 of a clock that is set by an hour, forward and back, each time somebody looks."""

    def __init__(self) -> None:
        self.real, self.looks = time.time, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.real() + (3600 if self.looks % 2 else -3600)


@pytest.mark.long
def test_a_clock_that_jumps_changes_no_duration_and_no_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    config = tiny_config(tmp_path, device={"wait_s": 60}, **searched(budget={"seconds": 1200}))
    expected = create_run_directory(config)
    with Run(expected, Silent()) as run:
        perform(run, "search")
    directory, clock = create_run_directory(config), JumpingClock()
    monkeypatch.setattr(time, "time", clock)
    begun = time.monotonic()
    with Run(directory, Silent()) as run:
        spent = perform(run, "search").search.spent["seconds"]
    took = time.monotonic() - begun
    with Run(directory, Silent()) as run:  # and once more, from a journal whose times make no sense
        assert perform(run, "search").search.spent["seconds"] == pytest.approx(spent)
    monkeypatch.undo()
    assert clock.looks > 5
    assert 0 <= spent < took
    records = read_journal(directory / "journal.jsonl")
    times = [record["time"] for record in records]
    assert times != sorted(times)
    assert all(0 <= record["spent"]["seconds"] < took for record in records if "spent" in record)
    assert all(0 < record["evaluation"]["metrics"].get("seconds", 1) < took for record in evaluations(directory))
    assert [r["candidate"] for r in evaluations(directory)] == [r["candidate"] for r in evaluations(expected)]


def test_a_device_whose_clock_is_set_measures_the_same_and_says_so(tmp_path: Path) -> None:
    """The agent of a process whose clock jumps by an hour in mid-measurement."""
    from secateur.device_profiles import LocalTarget, load_profile, measure
    from tests.device_profiles.tiny import write_conv

    (tmp_path / "sitecustomize.py").write_text(
        "import time\nreal, begun = time.time, time.monotonic()\n"
        "time.time = lambda: real() + (3600 if time.monotonic() > begun + 0.5 else 0)\n"
    )
    profile = load_profile(quick_device(tmp_path, search={"min_seconds": 1.5}))
    model = write_conv(tmp_path / "model.onnx")
    target = LocalTarget(env={"PYTHONPATH": str(tmp_path)})
    try:
        result = measure(target, profile, {"baseline": model}, "search")
    finally:
        target.close()
    assert "clock-jump" in result.flags
    assert 0 < result.p95_ms("baseline") < 1000


# -- disks


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """For this process a disk is full where a file would become larger than ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_too_full_for_a_candidate_ends_the_run_and_a_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    directory = create_run_directory(tiny_config(tmp_path, **searched()))
    with Run(directory, Silent()) as run:
        perform(run, "baseline")
        with largest_file(100_000), pytest.raises((OSError, SurroundingsError)) as caught:
            perform(run, "search")
    assert exit_code(caught.value) == errors.EXIT_SURROUNDINGS, caught.value
    with Run(directory, Silent()) as run:
        perform(run, "search")
    assert asked_once(directory) > 3


ON_A_SMALL_DISK = """
set -e
mkdir -p "$1"
mount -t tmpfs -o size=64m,mode=777 tmpfs "$1"
touch "$1/ready"
exec sleep 3600
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """A disk of 64 MB: how to start a program that sees it, and where this process sees it."""
    if os.geteuid() or not all(shutil.which(tool) for tool in ("unshare", "nsenter")):
        pytest.skip("needs root, to mount a small disk")
    place = tmp_path / "home"
    keeper = subprocess.Popen(["unshare", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh", str(place)])
    seen = Path(f"/proc/{keeper.pid}/root{place}")
    try:
        if not sshd.wait_for(lambda: (seen / "ready").exists() or keeper.poll() is not None) or keeper.poll():
            pytest.skip("no disk can be mounted here")
        yield ["nsenter", "--target", str(keeper.pid), "--mount"], seen
    finally:
        keeper.kill()
        keeper.wait()


@pytest.mark.long
def test_a_full_disk_in_mid_search_ends_the_run_and_a_resume_goes_on(
    small_disk: tuple[list[str], Path], tmp_path: Path, prefect_home: Path
) -> None:
    inside, seen = small_disk
    home = tmp_path / "home"
    file = write_tiny(tmp_path, **searched(12))
    env = {**os.environ, "SECATEUR_HOME": str(home), "PREFECT_HOME": str(prefect_home), "PYTHONPATH": str(ROOT)}

    def started(*arguments: str) -> subprocess.Popen[bytes]:
        command = [*inside, sys.executable, "-m", "secateur", *arguments]
        with (tmp_path / "output").open("wb") as output:
            return subprocess.Popen(
                command, env=env, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    # A first migration of the store that a full disk cuts short cannot be taken up again; MLflow's, not this test's.
    MlflowClient(f"sqlite:///{seen}/mlflow.db").create_experiment("x")
    process = started("run", str(file))
    try:
        directory = wait_until_seen(process, tmp_path, seen)
        ballast = seen / "ballast"
        with ballast.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(1 << 12))
        output = finish(process, tmp_path, errors.EXIT_SURROUNDINGS)
        assert "No space left on device" in output
        read_journal(directory / "journal.jsonl")  # whole
        before = [line["candidate"] for line in evaluations(directory)]
        ballast.unlink()
        process = started("resume", str(home / "runs" / directory.name))
        finish(process, tmp_path)
        assert [line["candidate"] for line in evaluations(directory)][: len(before)] == before
        assert asked_once(directory) > len(before) >= 4
        assert json.loads((directory / "report.json").read_text())
    finally:
        end(process)


def wait_until_seen(process: subprocess.Popen[bytes], folder: Path, home: Path) -> Path:
    """The run directory on another disk, in mid-search."""
    moment = journal_lines(5)
    found: list[Path] = []

    def come() -> bool:
        found[:] = sorted((home / "runs").glob("tiny-*"))
        return process.poll() is not None or (bool(found) and moment(found[0]))

    assert sshd.wait_for(come, 240)
    assert process.poll() is None, (folder / "output").read_text()
    return found[0]
