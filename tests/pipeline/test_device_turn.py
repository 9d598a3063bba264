"""One flow at a time on a device: the turn that a real Prefect server gives."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_profiles import DeviceProfile, load_profile
from pipeline.flow import device_turn, limit_name

from .helpers import end, free_port, tiny_config

START_S = 120


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real Prefect server on SQLite; its address."""
    port = free_port()
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path / "server.log").open("wb")
    process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/health", process)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        end(process)
        log.close()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError("the Prefect server did not start")


def quick_profile(folder: Path) -> DeviceProfile:
    return load_profile(tiny_config(folder).device.profile)


def ignore(line: str) -> None:
    """Listens to nothing."""


@pytest.mark.long
def test_two_flows_never_use_a_device_at_once(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    active, most, done = [0], [0], []

    def use(number: int) -> None:
        with temporary_settings({PREFECT_API_URL: server}):
            turn = device_turn(quick_profile(tmp_path), ignore)
            for _ in range(2):
                with turn():
                    active[0] += 1
                    most[0] = max(most[0], active[0])
                    time.sleep(0.3)
                    active[0] -= 1
            done.append(number)

    flows = [threading.Thread(target=use, args=(i,)) for i in range(2)]
    for flow in flows:
        flow.start()
    for flow in flows:
        flow.join(60)
    assert sorted(done) == [0, 1]
    assert most[0] == 1


def test_without_a_server_of_its_own_the_device_s_lock_must_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: None}), device_turn(quick_profile(tmp_path), ignore)():
        pass


def test_profiles_of_one_machine_share_a_limit(tmp_path: Path):
    def limit(**settings: object) -> str:
        return limit_name(DeviceProfile.model_validate({"name": "x", **settings}))

    assert limit(target="ssh", connect={"host": "pi"}) == limit(target="ssh", connect={"host": "pi"}, threads=4)
    assert limit(target="ssh", connect={"host": "pi"}) != limit(target="ssh", connect={"host": "pi2"})
    assert "/" not in limit(target="ssh", connect={"host": "a/b c"})
