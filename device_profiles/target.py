"""How to reach a device: a port of five methods. Each kind of target is one module of ``device_profiles.targets``.

The module's file name is the ``target`` of a profile; it has ``Settings`` (a pydantic model: the profile's ``connect``
section) and ``open_target(profile, settings)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from device_profiles.errors import DeviceError
from device_profiles.profile import TARGETS, DeviceProfile

AGENT = Path(__file__).with_name("agent.py")
Progress = Callable[[Mapping[str, Any]], None]


class Target(Protocol):
    """A device that can hold files and run the agent. Every method raises ``DeviceError``, never anything else."""

    def prepare(self) -> Mapping[str, Any]:
        """Reach the device, bring the agent, sweep what dead sessions left; returns the agent's answer to ``probe``."""
        ...

    def put(self, path: Path) -> str:
        """Bring a file to the device, unless one of the same sha256 is there; returns its path on the device."""
        ...

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        """Run the agent with one request (see ``agent.py``) in a fresh process and return its answer.

        Args:
            progress: called with each event the agent reports before its answer.

        Raises:
            DeviceError: the agent reports an error, dies, is busy or takes longer than ``timeout_s``.
        """
        ...

    def fetch(self, path: str, to: Path) -> None:
        """Bring a file that the agent left (an answer names it) from the device; it appears whole or not at all."""
        ...

    def close(self) -> None: ...


def open_target(profile: DeviceProfile) -> Target:
    """The target a profile names; nothing is reached before its first use.

    Raises:
        DeviceError: the profile's ``connect`` section does not fit its kind of target.
    """
    profile.require_host()
    module = TARGETS.load(profile.target)
    try:
        settings = module.Settings(**profile.connect)
    except ValidationError as error:
        faults = "; ".join(f"connect.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DeviceError(f"device profile {profile.name}: {faults}", "profile") from error
    target: Target = module.open_target(profile, settings)
    return target
