"""Devices that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device_profiles import sshd


@pytest.fixture(scope="session")
def shared_device() -> Iterator[sshd.Device]:
    """A real SSH server for an ordinary user."""
    with sshd.board() as device:
        yield device


@pytest.fixture
def device(shared_device: sshd.Device) -> Iterator[sshd.Device]:
    """The shared device; whoever leaves a process or an unfinished file there fails."""
    yield shared_device
    assert sshd.wait_for(lambda: not shared_device.agents()), [p.cmdline() for p in shared_device.agents()]
    assert not shared_device.parts()
