"""``secateur devices list`` and ``show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.padding import Padding

from secateur.pipeline.cli.devices import profiles
from secateur.pipeline.cli.devices.profiles import Name
from secateur.pipeline.cli.options import Json
from secateur.pipeline.terminal import command, one_line, out, table


def list_(json_: Json = False) -> None:
    """List the devices that can be used, and the templates a device can be made of.

    Example: secateur devices list --json
    """
    from secateur.device_profiles.target import adding, needs

    entries = [entry_of(name, path) for name, path in sorted(profiles.known().items())]
    if json_:
        out.data([{key: value for key, value in entry.items() if key != "profile"} for entry in entries])
        return
    columns = ("name", "target", "host", "provider", "threads", "calibrated")
    devices = [entry for entry in entries if not entry["template"]]
    rows = [columns, *(_cells(entry) for entry in devices)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for i, row in enumerate(rows):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        out.print(line, style="bold" if i == 0 else None)
        if i:
            out.print(Padding(one_line(_describe(devices[i - 1])), (0, 0, 0, 4)))
    templates = [entry for entry in entries if entry["template"]]
    if templates:
        adds = dict.fromkeys(
            f"each needs {needs(entry['profile'])}:\n  {adding(entry['profile'], 'THIS')}" for entry in templates
        )
        out.print("\ntemplates, " + "\n  or ".join(adds), style="bold")
        listed = table("", "", box=None, show_header=False)
        for entry in templates:
            listed.add_row(entry["name"], entry["description"])
        out.print(listed)


def show(name: Name) -> None:
    """Show a device profile with all its settings, those it inherits included, as YAML.

    Example: secateur devices show raspberry-pi-5
    """
    from secateur.device_profiles import plain_yaml
    from secateur.device_profiles.target import adding, is_template, needs

    profile, path = profiles.load(name), profiles.known().get(name, Path(name))
    notes = [f"# {path}"]
    if is_template(profile):
        notes.append(f"# needs {needs(profile)}: {adding(profile)}")
    if profiles.calibrated(profile.name):
        notes.append(f"# calibrated: {profiles.probe_file(profile.name)}")
    else:
        notes.append(f"# not calibrated: {command('secateur', 'devices', 'probe', name)} finds channel_multiple")
    text = plain_yaml.dump(profile.model_dump(mode="json"))
    out.print("\n".join([*notes, text]))


def descriptions() -> dict[str, str]:
    """Name -> description of every device profile; a broken file is listed with its fault."""
    return {name: _describe(entry_of(name, path)) for name, path in sorted(profiles.known().items())}


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """A device's line in ``devices list``."""
    if entry["fault"]:
        return (entry["name"], *("-" * 5))
    provider, threads = entry["provider"].removesuffix("ExecutionProvider"), str(entry["threads"])
    calibrated = "yes" if entry["calibrated"] else "no"
    return entry["name"], entry["target"], entry["host"] or "-", provider, threads, calibrated


def _describe(entry: Mapping[str, Any]) -> str:
    from secateur.device_profiles.target import needs

    if entry["fault"]:
        return f"unusable: {entry['fault']}"
    lack = [f" (needs {needs(entry['profile'])})"] if entry["template"] else []
    remarks = lack + [" (emulated: no times, only parity)"] * (not entry["timing"])
    return str(entry["description"]) + "".join(remarks)


def entry_of(name: str, path: Path) -> dict[str, Any]:
    """What ``devices list`` tells of a profile, and the ``profile`` itself where it has no fault."""
    from secateur.device_profiles import DeviceError, load_profile
    from secateur.device_profiles.target import is_template, kind_of

    entry: dict[str, Any] = {"name": name, "fault": "", "template": False, "file": str(path)}
    try:
        profile = load_profile(path, [profiles.folder()])
    except DeviceError as error:
        lines = str(error).splitlines()
        return entry | {"fault": lines[0] if len(lines) == 1 else f"{path.name}: {lines[1].strip()}"}
    return entry | {
        "target": profile.target,
        "host": kind_of(profile).address(profile.connect),
        "provider": profile.provider,
        "threads": profile.threads,
        "timing": profile.timing,
        "template": is_template(profile),
        "calibrated": profiles.calibrated(name),
        "description": profile.description,
        "profile": profile,
    }
