"""Device profiles as the commands find them: those of the user beside those that are shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli import completers

if TYPE_CHECKING:
    from secateur.device_profiles import DeviceProfile, Target

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A device profile; `secateur devices list` names them.", autocompletion=completers.devices
    ),
]
LONGEST_S = 86_400
"""A measurement takes a day at most."""


def folder() -> Path:
    """Where the user's own profiles lie, and what probes found."""
    from secateur.pipeline.surroundings import home

    return home() / "devices"


def known() -> dict[str, Path]:
    """Name -> file of every profile."""
    from secateur.device_profiles import known_profiles

    return known_profiles([folder()])


def load(name: str) -> DeviceProfile:
    """The profile, a template or not.

    Raises:
        UserError: there is none of that name, or it is not valid.
    """
    from secateur.device_profiles import DeviceError, load_profile

    try:
        return load_profile(name, [folder()])
    except DeviceError as error:
        raise errors.UserError(str(error)) from error


def usable(name: str) -> DeviceProfile:
    """The profile of a device that can be reached.

    Raises:
        UserError: as ``load``, or it is a template.
    """
    from secateur.device_profiles import DeviceError
    from secateur.device_profiles.target import require_complete

    profile = load(name)
    try:
        require_complete(profile)
    except DeviceError as error:
        raise errors.UserError(str(error)) from error
    return profile


def require_timing(profile: DeviceProfile, instead: str) -> None:
    """See that times of a device mean something.

    Args:
        instead: what can be done with it instead, for the message.

    Raises:
        UserError: it is emulated.
    """
    if not profile.timing:
        raise errors.UserError(
            f"{profile.name} is emulated (timing: false): times of an emulator mean nothing{instead}"
        )


@contextmanager
def opened(profile: DeviceProfile) -> Iterator[Target]:
    """The device, reached; it is let go of in the end."""
    from secateur.pipeline.config.trust import open_target

    target = open_target(profile)
    try:
        yield target
    finally:
        target.close()


def probe_file(name: str) -> Path:
    """Where what a probe of the device found is kept."""
    return folder() / f"{name}.probe.json"


def calibrated(name: str) -> bool:
    """Whether the device was probed."""
    return probe_file(name).is_file()
