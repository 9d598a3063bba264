"""The local target for real: what it starts, it ends; what it leaves, it removes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from secateur.device_profiles import DeviceError, LocalTarget, open_target
from secateur.device_profiles.agent import PROTOCOL
from secateur.device_profiles.target import AGENT
from secateur.device_profiles.targets import local
from tests.device_profiles.test_agent import ENDLESS, infer_request, is_free, is_gone, request_for, wait_until
from tests.device_profiles.test_agent import work_folders as folders_in
from tests.device_profiles.tiny import quick_profile, write_conv


@pytest.fixture
def target(tmp_path: Path) -> LocalTarget:
    """A target with a lock and a store of its own, so that a real measurement on this machine is not disturbed."""
    (tmp_path / "lock").mkdir()
    own = {"SECATEUR_LOCKS": str(tmp_path / "lock"), "SECATEUR_AGENT_STORE": str(tmp_path / "store")}
    return LocalTarget(busy_wait_s=0.2, env=own)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_conv(tmp_path / "conv.onnx")


class Watch:
    """Remembers the agent's processes and does something once timing begins."""

    def __init__(self, at_timing: Any = None) -> None:
        self.texts: list[str] = []
        self.pids: list[int] = []
        self.at_timing = at_timing

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "started":
            self.pids += [event["pid"], event["worker_pid"]]
        self.texts.append(event.get("text", event["event"]))
        if event.get("text") == "timing" and self.at_timing:
            self.at_timing(self)

    def all_gone(self) -> bool:
        return len(self.pids) >= 2 and wait_until(lambda: all(is_gone(pid) for pid in self.pids))


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_events_come_while_the_agent_works(target: LocalTarget, model: Path):
    watch = Watch()
    before = len(children())
    answer = target.run(request_for(Path(target.put(model)), profile=True), 60, watch)
    assert len(answer["models"]["m"]["wall_ms"]) == 3
    assert answer["models"]["m"]["nodes"]
    assert watch.texts == ["started", "check", "import", "load", "warm-up", "timing", "profile", "done"]
    assert watch.all_gone()
    assert len(children()) == before
    assert folders_in(target.env) == []


def test_files_of_any_name(target: LocalTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["a b", "$(touch hacked);`id`&|'\"", "line\nbreak", "naïve-模型-🌱", "-rf *"]
    folder = tmp_path / f"in {names[1]}\n"
    folder.mkdir()
    monkeypatch.chdir(folder)
    places = [target.put(write_conv(folder / f"{name}.onnx").relative_to(folder)) for name in names]
    assert places == [str((folder / f"{name}.onnx").resolve()) for name in names]
    answer = target.run(request_for(*map(Path, places)), 60)
    assert list(answer["models"]) == names
    assert sorted(os.listdir(folder)) == sorted(f"{name}.onnx" for name in names)


def test_a_file_that_is_not_there_is_not_put(target: LocalTarget, tmp_path: Path):
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(DeviceError, match="export it first") as caught:
            target.put(path)
        assert caught.value.code == "model-load"


def test_outputs_are_fetched_whole_and_removed_at_the_close(
    target: LocalTarget, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answer = target.run(infer_request(model), 60)
    to = tmp_path / "new" / "out.npz"
    target.fetch(answer["outputs"], to)
    with np.load(to) as outputs:
        assert outputs["output"].shape == (1, 4, 8, 8)
    assert len(folders_in(target.env)) == 1
    target.close()
    assert folders_in(target.env) == []
    with pytest.raises(DeviceError, match=r"cannot copy .*: No such file") as caught:
        target.fetch(answer["outputs"], to)
    assert caught.value.code == "transfer"
    monkeypatch.setattr("secateur.device_profiles.targets.local.uuid.uuid4", lambda: SimpleNamespace(hex="1"))
    with pytest.raises(DeviceError, match="No space left") as caught:
        (tmp_path / ".full.npz.1.part").symlink_to("/dev/full")
        target.fetch(str(to), tmp_path / "full.npz")
    assert caught.value.code == "disk-full"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conv.onnx", "lock", "new", "store"]


def test_prepare_probes_and_clears_up_after_an_interrupted_run(target: LocalTarget, model: Path):
    watch = Watch(lambda watch: os.kill(watch.pids[0], signal.SIGKILL))
    with pytest.raises(DeviceError, match="signal SIGKILL") as caught:
        target.run(request_for(model, profile=True, **ENDLESS), 60, watch)
    assert caught.value.code == "agent-died"
    assert watch.all_gone()
    assert len(folders_in(target.env)) == 1
    assert target.prepare()["runtime"]["onnxruntime"]
    assert folders_in(target.env) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_client_leaves_nothing(target: LocalTarget, model: Path, error: type[BaseException]):
    def interrupt(_: Watch) -> None:
        raise error

    watch = Watch(interrupt)
    before = len(children())
    with pytest.raises(error):
        target.run(request_for(model, profile=True, **ENDLESS), 60, watch)
    assert watch.all_gone()
    assert len(children()) == before
    assert is_free(target.env)
    assert folders_in(target.env) == []


def test_time_out_ends_the_agent(target: LocalTarget, model: Path):
    watch = Watch()
    with pytest.raises(DeviceError, match=r"timeout: no result within 1\.5 s") as caught:
        target.run(request_for(model, profile=True, **ENDLESS), 1.5, watch)
    assert caught.value.code == "timeout"
    assert watch.all_gone()
    assert folders_in(target.env) == []


def test_a_hung_agent_is_ended(target: LocalTarget, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    watch = Watch(lambda watch: os.kill(watch.pids[0], signal.SIGSTOP))
    with pytest.raises(DeviceError, match="the agent gave no answer within") as caught:
        target.run(request_for(model, **ENDLESS), 1.0, watch)
    assert caught.value.code == "client-timeout"
    assert watch.all_gone()
    assert is_free(target.env)


def test_no_orphan_when_the_client_is_killed(target: LocalTarget, model: Path):
    script = """
import json, sys
from secateur.device_profiles import LocalTarget
LocalTarget().run(json.loads(sys.argv[1]), 600, lambda event: print(json.dumps(event), flush=True))
"""
    env = {**target.env, "PYTHONPATH": str(AGENT.parents[1])}
    request = json.dumps(request_for(model, **ENDLESS))
    command = [sys.executable, "-c", script, request]
    watch = Watch()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        for line in client.stdout:
            watch(json.loads(line))
            if watch.texts[-1] == "timing":
                break
        os.kill(watch.pids[0], signal.SIGSTOP)  # even an agent that cannot act
        client.kill()
    gone = watch.all_gone()
    for pid in watch.pids:  # leave nothing behind, even when the test fails
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)
    assert gone


def test_a_busy_device_is_waited_for(target: LocalTarget, model: Path):
    own = {key: target.env[key] for key in ("SECATEUR_LOCKS", "SECATEUR_AGENT_STORE")}
    waits = LocalTarget(busy_wait_s=60, env=own)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(waits.run(request_for(model), 60)))
    with (Path(target.env["SECATEUR_LOCKS"]) / "secateur-device.lock").open("w") as file:
        file.write("12345 r1\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)  # even a shared lock keeps an exclusive one out
        with pytest.raises(DeviceError, match=r"holder pid 12345, run r1; waited 0\.2 s") as caught:
            target.run(request_for(model), 60)
        assert caught.value.code == "busy"
        thread.start()
        time.sleep(0.5)
        assert not answers
    thread.join(60)
    assert "models" in answers[0]


def test_python_and_cpu_share_of_the_profile_reach_the_worker(tmp_path: Path, model: Path, target: LocalTarget):
    seen = tmp_path / "seen"
    wrapper = tmp_path / "my python"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{seen}"\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    profile = quick_profile(connect={"python": [str(wrapper), "-B"], "cpu_share": 0.5})
    opened = open_target(profile)
    assert isinstance(opened, LocalTarget)
    assert (opened.python, opened.cpu_share) == ((str(wrapper), "-B"), 0.5)
    opened.env = target.env
    opened.run({"protocol": PROTOCOL, "op": "probe"}, 60)
    assert seen.read_text().splitlines() == [f"-B {AGENT}", f"-B {AGENT} --worker"]
    try:  # a process that others keep from its half of a core is not throttled: it gets a few tries
        answers = (opened.run(request_for(model, min_seconds=0.3), 60) for _ in range(10))
        assert any(answer["environment"]["nr_throttled"] for answer in answers)
    except DeviceError as error:
        assert error.code == "not-allowed"


@pytest.mark.parametrize(("content", "code"), [(None, "no-python"), (b"\x7fELF" + bytes(60), "wrong-arch")])
def test_a_python_that_does_not_start(tmp_path: Path, content: bytes | None, code: str):
    program = tmp_path / "python"
    if content:
        program.write_bytes(content)
        program.chmod(0o755)
    with pytest.raises(DeviceError, match=rf"cannot start {program}: .*set connect\.python") as caught:
        LocalTarget(python=[str(program)]).run({"protocol": PROTOCOL, "op": "probe"}, 60)
    assert caught.value.code == code


def test_a_wrapper_that_finds_no_python(target: LocalTarget):
    target.python = ("sh", "-c", 'exec /no/such/python "$@"', "sh")
    with pytest.raises(DeviceError, match=r"set connect\.python.*exit code 127.*/no/such/python") as caught:
        target.run({"protocol": PROTOCOL, "op": "probe"}, 60)
    assert caught.value.code == "no-python"
