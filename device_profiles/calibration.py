"""What a probe found, kept beside the user's device profiles: ``NAME.probe.json``."""

from __future__ import annotations

import os
from pathlib import Path

from secateur.device_profiles.profile import DeviceProfile
from secateur.device_profiles.staircase import Staircase


def path_of(folder: Path, profile: DeviceProfile) -> Path:
    """Where a profile's probe is kept."""
    return folder / f"{profile.name}.probe.json"


def save(folder: Path, profile: DeviceProfile, staircase: Staircase) -> Path:
    """Keep a probe; it replaces an older one at once or not at all."""
    path = path_of(folder, profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(staircase.to_json() + "\n", encoding="utf-8")
    part.replace(path)
    return path


def load(folder: Path, profile: DeviceProfile, fingerprint: str | None = None) -> Staircase | None:
    """The probe kept for a profile; None if there is none, or it is of another device, runtime or setting.

    Args:
        fingerprint: as the device is now (``staircase.fingerprint_of``); None = whatever was probed.

    Raises:
        DeviceError: the file is damaged.
    """
    try:
        staircase = Staircase.from_json(path_of(folder, profile).read_text(encoding="utf-8"))
    except OSError:
        return None
    return staircase if fingerprint in (None, staircase.fingerprint) else None
