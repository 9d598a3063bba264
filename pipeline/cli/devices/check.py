"""``secateur devices check``: whether a device is ready to be measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from secateur.device_profiles.wording import number_of
from secateur.pipeline import errors
from secateur.pipeline.cli.devices import profiles
from secateur.pipeline.cli.devices.profiles import Name
from secateur.pipeline.cli.options import Json, Trust
from secateur.pipeline.cli.trust import consent_to_profile
from secateur.pipeline.terminal import err, out, table

if TYPE_CHECKING:
    from secateur.device_profiles import DeviceError, DeviceProfile
    from secateur.device_profiles.check import Check

LONG = 120
"""Characters of a finding that does not go into a table."""
MARKS = {"ok": "green", "warning": "yellow", "missing": "bold red"}
"""Status of a check -> its colour."""


def check(name: Name, json_: Json = False, trust: Trust = False) -> None:
    """Check that a device is ready to be measured on, and say how to put right what is not.

    Ends with 0 if all is well or there are only warnings, with 4 if something is missing.

    Example: secateur devices check kitchen
    """
    profile = profiles.load(name)
    consent_to_profile(name, trust)
    checks = ask(profile)
    if json_:
        out.data([vars(c) for c in checks])
    else:
        print_checks(name, checks)
    if any(c.status == "missing" for c in checks):
        raise typer.Exit(errors.EXIT_SURROUNDINGS)


def ask(profile: DeviceProfile) -> tuple[Check, ...]:
    """Ask the device and judge its answer."""
    from importlib.metadata import PackageNotFoundError, version

    from secateur.device_profiles import DeviceError
    from secateur.device_profiles.check import judge
    from secateur.device_profiles.runtime import runtime_of
    from secateur.device_profiles.target import require_complete
    from secateur.pipeline.progress import RichProgress

    newest = {}
    for package in (runtime_of(profile).name, "numpy"):
        try:
            newest[package] = version(package)
        except PackageNotFoundError:
            continue
    answer: Mapping[str, Any] | DeviceError
    try:
        require_complete(profile)
        with profiles.opened(profile) as target, RichProgress(err).stage(f"asking {profile.name}"):
            answer = target.prepare()
    except DeviceError as error:
        answer = error
    return judge(profile, answer, newest)


def print_checks(name: str, checks: tuple[Check, ...]) -> None:
    """Print every check, and how to put right what is not."""
    rows = table("check", "", "found", box=None, header_style="bold")
    long = [entry for entry in checks if len(entry.found) > LONG]  # a command in it could not be copied from a table
    for entry in checks:
        text = "see below" if entry in long else entry.found
        rows.add_row(entry.name, Text(entry.status, style=MARKS[entry.status]), text)
    out.print(rows)
    for entry in long:
        out.print(f"\n{entry.name}: {entry.found}\n")
    for entry in checks:
        if entry.fix:
            out.labelled(f"{entry.name}, fix", "bold", entry.fix)
    missing, warnings = (sum(c.status == status for c in checks) for status in ("missing", "warning"))
    mind = f", {number_of(warnings, 'warning(s)')}" if warnings else ""
    out.print(f"{name} is not ready: {missing} missing{mind}" if missing else f"{name} is ready{mind}")
