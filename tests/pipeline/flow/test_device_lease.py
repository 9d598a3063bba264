"""One flow at a time on a device: the lease that a real Prefect server gives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.device_profiles import DeviceProfile, load_profile
from secateur.pipeline.flow import lease_of, limit_name
from tests.pipeline.helpers import tiny_config
from tests.servers import prefect_server, running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real Prefect server on SQLite; its address."""
    with running(prefect_server(tmp_path / "prefect")) as started:
        yield started.url


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
            lease = lease_of(quick_profile(tmp_path), ignore)
            for _ in range(2):
                with lease():
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

    with temporary_settings({PREFECT_API_URL: None}), lease_of(quick_profile(tmp_path), ignore)():
        pass


def test_profiles_of_one_machine_share_a_limit(tmp_path: Path):
    def limit(**settings: object) -> str:
        return limit_name(DeviceProfile.model_validate({"name": "x", **settings}))

    assert limit(target="ssh", connect={"host": "pi"}) == limit(target="ssh", connect={"host": "pi"}, threads=4)
    assert limit(target="ssh", connect={"host": "pi"}) != limit(target="ssh", connect={"host": "pi2"})
    assert "/" not in limit(target="ssh", connect={"host": "a/b c"})
