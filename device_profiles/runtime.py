"""What a network runs with on a device. Each runtime is one module of ``secateur.device_profiles.runtimes``, named as
its file.

The file goes to the device beside the agent (see ``agent.py`` for the functions it has) and imports nothing of ours.
Here it is asked for its ``FORMAT`` (a module of ``secateur.export.formats``) and, where the defaults of ``Runtime`` do
not fit, for ``PACKAGES``, ``WHEELS`` and ``INSTALL_HINT``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.profile import RUNTIMES, DeviceProfile

DEFAULT = "onnxruntime"


@dataclass(frozen=True)
class Runtime:
    """What the module of a runtime says of it, with defaults for what it leaves out."""

    name: str
    module: ModuleType

    @property
    def file(self) -> Path:
        """What goes to the device."""
        return Path(str(self.module.__file__))

    @property
    def format(self) -> str:
        """The format of the files it loads."""
        return str(self.module.FORMAT)

    @property
    def wheels(self) -> Mapping[str, tuple[int, ...]]:
        """``python`` and ``glibc`` that its published wheels need, as far as it says. ``WHEELS``; none by default."""
        return getattr(self.module, "WHEELS", {})

    @property
    def install_hint(self) -> str:
        """Where else it can be had. ``INSTALL_HINT``; empty by default."""
        return str(getattr(self.module, "INSTALL_HINT", ""))

    def package(self, provider: str) -> str:
        """What to install for a provider, an unknown one included. ``PACKAGES``; by default its own name."""
        packages = getattr(self.module, "PACKAGES", None)
        return str(packages.get(provider, "")) if packages is not None else self.name

    def fields(self, place: str) -> dict[str, Any]:
        """What a request says of it.

        Args:
            place: of its file on the device.
        """
        return {"runtime": self.name, "runtime_file": place}


def runtime_named(name: str) -> Runtime:
    """A runtime by its name in a profile.

    Raises:
        DeviceError: there is none of this name, or it cannot be used.
    """
    try:
        module = RUNTIMES.load(name)
    except ValueError as error:
        raise DeviceError(str(error), "profile") from error
    if not isinstance(module, ModuleType):
        raise DeviceError(f"runtime {name} is a class; a runtime is a whole file, which goes to the device", "profile")
    return Runtime(name.rpartition(":")[2], module)


def runtime_field(profile: DeviceProfile) -> dict[str, str]:
    """What a request says of the runtime whoever sends it: nothing where it is the default."""
    return {} if profile.runtime == DEFAULT else {"runtime": runtime_of(profile).name}


def runtime_of(profile: DeviceProfile) -> Runtime:
    """The runtime of a profile; as ``runtime_named``."""
    return runtime_named(profile.runtime)
