"""What a target device is, and what was measured on it. Names are imported on first use; none of them imports torch."""

from __future__ import annotations

if __name__ != "secateur.device_profiles":  # found by its folder: it would be a second copy of every class
    raise ImportError("device_profiles is imported as secateur.device_profiles")

from typing import TYPE_CHECKING

from secateur.device_profiles.first_use import import_on_first_use

if TYPE_CHECKING:
    from secateur.device_profiles.errors import DeviceError as DeviceError
    from secateur.device_profiles.intervals import Ratio as Ratio
    from secateur.device_profiles.measure import BenchmarkResult as BenchmarkResult
    from secateur.device_profiles.measure import measure as measure
    from secateur.device_profiles.profile import Budgets as Budgets
    from secateur.device_profiles.profile import DeviceProfile as DeviceProfile
    from secateur.device_profiles.profile import Multiples as Multiples
    from secateur.device_profiles.profile import Tier as Tier
    from secateur.device_profiles.profile import known_profiles as known_profiles
    from secateur.device_profiles.profile import load_profile as load_profile
    from secateur.device_profiles.target import Target as Target
    from secateur.device_profiles.target import open_target as open_target
    from secateur.device_profiles.targets.local import LocalTarget as LocalTarget

__all__ = import_on_first_use(
    __name__,
    {
        "errors": ("DeviceError",),
        "intervals": ("Ratio",),
        "measure": ("BenchmarkResult", "measure"),
        "profile": ("Budgets", "DeviceProfile", "Multiples", "Tier", "known_profiles", "load_profile"),
        "target": ("Target", "open_target"),
        "targets.local": ("LocalTarget",),
    },
)
