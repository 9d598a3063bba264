"""What a network runs with on a device. Each runtime is one module of ``secateur.device_profiles.runtimes``, named as
its file.

The file goes to the device beside the agent (see ``agent.py`` for the functions it has) and imports nothing of ours.
Here it is asked for its ``FORMAT`` (a module of ``secateur.export.formats``) and, where the defaults of ``Runtime`` do
not fit, for ``PACKAGES``, ``WHEELS``, ``OLDEST``, ``PRECISIONS`` and ``INSTALL_HINT``.
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
    def oldest_python(self) -> tuple[int, ...]:
        """That today's wheels are for; empty where it does not say. ``WHEELS["python"]``."""
        return tuple(getattr(self.module, "WHEELS", {}).get("python", ()))

    @property
    def oldest(self) -> tuple[int, ...]:
        """The oldest version that its file works with. ``OLDEST``; empty by default: any."""
        return tuple(getattr(self.module, "OLDEST", ()))

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it can be told to compute in. ``PRECISIONS``; fp32 by default."""
        return tuple(getattr(self.module, "PRECISIONS", ("fp32",)))

    def oldest_glibc(self, machine: str) -> tuple[int, ...] | None:
        """That today's wheels need; empty where it does not say, None where there is no wheel for such a machine.

        ``WHEELS["glibc"]``: machine, as ``platform.machine()`` gives it, to version; or one version for all.

        Args:
            machine: empty = unknown.
        """
        stated = getattr(self.module, "WHEELS", {}).get("glibc", ())
        if not isinstance(stated, Mapping):
            return tuple(stated)
        return stated.get(machine) if machine else ()

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
