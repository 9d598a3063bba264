"""What a target device is, and what was measured on it. Imports onnxruntime, never torch."""

from device_profiles.errors import DeviceError
from device_profiles.intervals import Ratio
from device_profiles.measure import BenchmarkResult, measure
from device_profiles.profile import Budgets, DeviceProfile, Multiples, Tier, known_profiles, load_profile
from device_profiles.target import Target, open_target
from device_profiles.targets.local import LocalTarget

__all__ = [
    "BenchmarkResult",
    "Budgets",
    "DeviceError",
    "DeviceProfile",
    "LocalTarget",
    "Multiples",
    "Ratio",
    "Target",
    "Tier",
    "known_profiles",
    "load_profile",
    "measure",
    "open_target",
]
