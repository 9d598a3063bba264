"""``secateur pull``, ``promote``, ``rollback`` and ``history``: the registry from the command line."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.device_profiles.wording import number_of
from secateur.pipeline import errors
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.options import Json, Trust
from secateur.pipeline.cli.trust import asker, consent_to_profile
from secateur.pipeline.terminal import err, one_line, out, table

if TYPE_CHECKING:
    from secateur.pipeline.tracking import Decision, Registry

Name = Annotated[str, typer.Argument(metavar="NAME", help="A registered model.")]
Uri = Annotated[
    str | None,
    typer.Option("--uri", help="MLflow's address; default SECATEUR_TRACKING_URI, or SQLite in SECATEUR_HOME."),
]
Device = Annotated[
    str | None, typer.Option("--device", "-d", metavar="D", help="Whose champion; default: the model's first device.")
]


def pull(
    reference: Annotated[
        str, typer.Argument(metavar="NAME[@ALIAS|@VERSION]", help="Default: @champion; also @champion@DEVICE.")
    ],
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder, or one of a former pull.")
    ],
    device: Device = None,
    uri: Uri = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what was pulled last; ask no server.")] = False,
    json_: Json = False,
) -> None:
    """Fetch a version from the registry: verified, with a loader and a model card.

    Example: secateur pull digits-resnet20@champion --device local -o model
    """
    from secateur.pipeline.tracking.pull import pull as pull_

    name, which, named = split(reference)
    if device and named and device != named:
        raise errors.UserError(f"{reference} says device {named}, --device says {device}: give one of them")
    got = pull_(registry_at(uri), name, folder, which=which, device=device or named, offline=offline)
    if got.notice:
        err.print(f"Note: {got.notice}")
    if json_:
        version = {"name": got.version.name, "version": got.version.version}
        files = {name: file["sha256"] for name, file in got.manifest.files.items()}
        out.data({**version, "folder": str(folder), "notice": got.notice, "sha256": files})
        return
    digest = got.manifest.files["model.onnx"]["sha256"]
    out.print(f"{got.version.name} version {got.version.version} in {one_line(folder)}")
    out.print(f"sha256 of model.onnx: {digest} ({number_of(len(got.manifest.files), 'file(s)')} verified)")


def promote(
    name: Name,
    device: Annotated[
        str,
        typer.Option(
            "--device", "-d", metavar="D", help="The device profile to time both on.", autocompletion=completers.devices
        ),
    ],
    version: Annotated[str | None, typer.Option("--version", help="Default: the device's challenger.")] = None,
    uri: Uri = None,
    json_: Json = False,
    trust: Trust = False,
) -> None:
    """Time the challenger and the champion in one measurement, compare, and promote if every gate holds.

    Example: secateur promote digits-resnet20 --device local
    """
    from secateur.device_profiles import DeviceError, load_profile
    from secateur.pipeline.config.trust import open_target, require
    from secateur.pipeline.lifecycle.promotion import promote as promote_
    from secateur.pipeline.progress import RichProgress
    from secateur.pipeline.surroundings import home

    try:
        profile = load_profile(device, [home() / "devices"])
    except DeviceError as error:
        raise errors.UserError(f"--device: {error}") from error
    consent_to_profile(device, trust)
    target = open_target(profile)
    try:
        decision = promote_(
            registry_at(uri),
            name,
            profile,
            target,
            version=version,
            progress=RichProgress(err),
            consent=partial(require, ask=asker(trust)),
        )
    finally:
        target.close()
    if json_:
        out.data(decision.to_dict())
    else:
        show(decision)
    if not decision.promoted:
        raise typer.Exit(errors.EXIT_GATE)


def rollback(name: Name, device: Device = None, uri: Uri = None) -> None:
    """Make the previous champion the champion again; called again, the one before that.

    Example: secateur rollback digits-resnet20
    """
    registry = registry_at(uri)
    version = registry.rollback(name, device)
    where = device or registry.default_device(name)
    out.print(f"Champion of {name} on {where}: version {version.version}")


def history(name: Name, uri: Uri = None, json_: Json = False) -> None:
    """Show who was champion on which device, and since when."""
    registry = registry_at(uri)
    if json_:
        champions = {device: version.version for model, device, version in registry.champions() if model == name}
        out.data({"name": name, "events": [asdict(event) for event in registry.history(name)], "champions": champions})
        return
    rows = table("when", "device", "what", "version", "before", "decision", title=name)
    for event in registry.history(name):
        when = f"{datetime.fromtimestamp(event.at):%Y-%m-%d %H:%M:%S}"
        what = event.kind if event.done else f"{event.kind} (cut short: it did not take place)"
        if event.kind == "found":
            what = "found as plain champion, set by somebody else"
        rows.add_row(when, event.device, what, event.version, event.previous or "-", event.run_id)
    out.print(rows)
    for model, device, version in registry.champions():
        if model == name:
            out.print(f"Champion on {device}: version {version.version}")


def show(decision: Decision) -> None:
    """Every gate, and the outcome."""
    where = f"version {decision.version} of {decision.name} on {decision.device}"
    if decision.gates:
        against = f"champion version {decision.champion}" if decision.champion else "no champion there yet"
        rows = table("gate", "value", "95 % interval", "bound", "", "why", title=f"{where}, against {against}")
        for gate in decision.gates:
            value = "unknown" if gate.value is None else f"{gate.value:.4g}"
            interval = "" if gate.low is None or gate.high is None else f"{gate.low:.4g} to {gate.high:.4g}"
            rows.add_row(gate.name, value, interval, f"{gate.bound:.4g}", "ok" if gate.ok else "no", gate.reason)
        out.print(rows)
    outcome = "promoted" if decision.promoted else "not promoted"
    out.print(f"{where}: {outcome}{f' ({decision.reason})' if decision.reason else ''}")


def split(reference: str) -> tuple[str, str, str | None]:
    """``NAME[@WHICH[@DEVICE]]`` -> (name, alias or number, device).

    Raises:
        UserError: a part is empty.
    """
    name, *rest = reference.split("@", 2)
    if not name or not all(rest):
        raise errors.UserError(f"{reference!r}: write NAME, NAME@ALIAS, NAME@VERSION or NAME@champion@DEVICE")
    return name, rest[0] if rest else "champion", rest[1] if len(rest) > 1 else None


def registry_at(uri: str | None) -> Registry:
    """The registry at an address; None = the usual one."""
    from secateur.pipeline.config.schema import TrackingSection
    from secateur.pipeline.surroundings import home
    from secateur.pipeline.tracking import Registry, store_uri

    return Registry(uri or store_uri(TrackingSection(), home()), home(), say=err.print)
