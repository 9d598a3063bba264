"""What probes found, kept beside the user's device profiles.

``NAME.probe.json`` is of a device, ``NAME.probe-PRECISION.json`` of a device in another precision than fp32,
``NAME.KEY.network.json`` of a network on it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from pathlib import Path

from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.network_probe import NetworkProbe
from secateur.device_profiles.profile import DeviceProfile
from secateur.device_profiles.staircase import FLOAT, Staircase


def path_of(folder: Path, profile: DeviceProfile, precision: str = FLOAT) -> Path:
    """Where a profile's probe in a precision is kept."""
    return folder / f"{profile.name}.probe{'' if precision == FLOAT else f'-{precision}'}.json"


def save(folder: Path, profile: DeviceProfile, staircase: Staircase) -> Path:
    """Keep a probe; it replaces an older one at once or not at all."""
    return _keep(path_of(folder, profile, staircase.precision), staircase.to_json())


def load(
    folder: Path, profile: DeviceProfile, fingerprint: str | None = None, precision: str = FLOAT
) -> Staircase | None:
    """The probe kept for a profile; None if there is none, or it is of another device, runtime or setting.

    Args:
        fingerprint: as the device is now (``staircase.fingerprint_of``); None = whatever was probed.
        precision: that it was probed in.

    Raises:
        DeviceError: the file is damaged.
    """
    try:
        staircase = Staircase.from_json(path_of(folder, profile, precision).read_text(encoding="utf-8"))
    except OSError:
        return None
    return staircase if fingerprint in (None, staircase.fingerprint) else None


def probes_of(folder: Path, name: str) -> list[Path]:
    """The kept probes of the device of a name in every precision, and their pictures."""
    begin = f"{glob.escape(name)}.probe"
    return sorted(path for end in ("json", "html") for one in ("", "-*") for path in folder.glob(f"{begin}{one}.{end}"))


def path_of_network(folder: Path, profile: DeviceProfile, key: str) -> Path:
    """Where the probe of a network on a device is kept.

    Args:
        key: ``network_probe.key_of``.
    """
    return folder / f"{profile.name}.{key}.network.json"


def networks_of(folder: Path, name: str) -> list[Path]:
    """The kept probes of networks on the device of a name."""
    return sorted(folder.glob(f"{glob.escape(name)}.{'[0-9a-f]' * 16}.network.json"))


def save_network(folder: Path, profile: DeviceProfile, probe: NetworkProbe) -> Path:
    """Keep the probe of a network; it replaces an older one at once or not at all."""
    return _keep(path_of_network(folder, profile, probe.key), probe.to_json())


def load_network(folder: Path, profile: DeviceProfile, key: str) -> NetworkProbe | None:
    """The probe kept for a network on a device; None if there is none, or it is damaged: it is found anew then."""
    with contextlib.suppress(OSError, ValueError, DeviceError):
        probe = NetworkProbe.from_json(path_of_network(folder, profile, key).read_text(encoding="utf-8"))
        return probe if probe.key == key else None
    return None


def _keep(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    return path
