"""What a shell proposes for the words of a command: methods, devices, run directories, keys of the run file.

Called at every press of the key, so each imports only what it needs; none says anything where it cannot answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def methods(incomplete: str) -> list[str]:
    """Search methods."""
    from secateur.pruning.search import METHODS

    return _beginning(METHODS.names(), incomplete)


def devices(incomplete: str) -> list[str]:
    """Device profiles, one's own included."""
    from secateur.device_profiles import known_profiles
    from secateur.pipeline.surroundings import home

    return _beginning(known_profiles([home() / "devices"]), incomplete)


def run_directories(incomplete: str) -> list[str]:
    """Run directories of the home, the newest first."""
    return _beginning(map(_from_here, _runs()), incomplete)


def run_names(incomplete: str) -> list[str]:
    """The names of these directories."""
    return _beginning((folder.name for folder in _runs()), incomplete)


def rewards(incomplete: str) -> list[str]:
    """Rewards by name."""
    from secateur.pruning.search.reward import PRESETS

    return _beginning(PRESETS, incomplete)


def kinds(incomplete: str) -> list[str]:
    """What ``secateur list`` lists."""
    return _beginning(("methods", "workloads", "devices"), incomplete)


def overrides(incomplete: str) -> list[str]:
    """``KEY=`` of every key of a run file; and the methods, devices and rewards behind theirs."""
    key, given, value = incomplete.partition("=")
    known = {"search.method": methods, "device.profile": devices, "reward.preset": rewards}
    if given:
        return [f"{key}={name}" for name in known[key](value)] if key in known else []
    return _beginning((f"{place}=" for place in _places(sections=False)), incomplete)


def explained(incomplete: str) -> list[str]:
    """What ``secateur explain`` explains: methods and keys."""
    return [*methods(incomplete), *_beginning(_places(sections=True), incomplete)]


def _places(*, sections: bool) -> list[str]:
    """The keys of Secateur's own parts."""
    from secateur.pipeline.config.json_schema import packaged
    from secateur.pipeline.config.keys import keys_of

    keys = keys_of(packaged())
    return list(dict.fromkeys(key.place for key in keys if sections or not key.section))


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _runs() -> list[Path]:
    from secateur.pipeline.surroundings import home

    return sorted((file.parent for file in (home() / "runs").glob("*/run.yaml")), key=_age)


def _age(folder: Path) -> float:
    return -folder.stat().st_mtime


def _from_here(folder: Path) -> str:
    """A folder below the current one by its relative path."""
    here = Path.cwd()
    return os.path.relpath(folder, here) if folder.is_relative_to(here) else str(folder)
