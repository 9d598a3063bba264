"""``secateur devices add`` and ``remove``: devices of the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from secateur.pipeline import errors
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.devices import check, listing, profiles
from secateur.pipeline.cli.options import Trust
from secateur.pipeline.cli.trust import consent_to_profile
from secateur.pipeline.terminal import command, one_line, out

if TYPE_CHECKING:
    from secateur.device_profiles import DeviceProfile
    from secateur.device_profiles.target import AddOption

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
GIVEN = "secateur.devices.add"
"""Where a command's context keeps the options of the kinds of target."""


class AddCommand(TyperCommand):
    """``devices add``, with the options of every kind of target behind ``--from``."""

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        after = next(i for i, parameter in enumerate(own) if "--from" in parameter.opts)
        taken = {parameter.name for parameter in own}
        options = [_parameter(own[after], option) for option in _add_options() if option.name not in taken]
        return [*own[: after + 1], *options, *own[after + 1 :]]


def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="How the device shall be called.")],
    base: Annotated[
        str,
        typer.Option("--from", metavar="BASE", help="The profile it is based on.", autocompletion=completers.devices),
    ],
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of ONNX Runtime, instead of the base's.")
    ] = None,
    emulated: Annotated[bool, typer.Option("--emulated", help="An emulator: compare outputs, never times.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace your profile of that name, or hide a shipped one.")
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Only write the profile.")] = False,
    trust: Trust = False,
) -> None:
    """Add a device of your own, based on a template or on another device, and check it.

    Writes SECATEUR_HOME/devices/NAME.yaml, where every other setting can be changed.

    Example: secateur devices add kitchen --from raspberry-pi-5 --host pi@192.168.1.20

    Example: secateur devices add lab --from generic-arm64 --host lab.example:2222 --python /opt/ort/bin/python
    """
    _check_name(name, base, force)
    parent = profiles.load(base)
    settings: dict[str, Any] = {"extends": base}
    connect = _connect(parent, context.meta.get(GIVEN, {}))
    settings |= {"connect": connect} if connect else {}
    settings |= {"threads": threads} if threads else {}
    settings |= {"timing": False} if emulated else {}
    path = _write(name, settings)
    out.print(f"Written: {one_line(path)}")
    if "python" in connect:  # said on the command line, by whoever is asked otherwise
        consent_to_profile(name, given=True)
    if no_check:
        out.print(f"Next: {command('secateur', 'devices', 'check', name)}")
        return
    consent_to_profile(name, trust)
    checks = check.ask(profiles.load(name))
    check.print_checks(name, checks)
    if any(c.status == "missing" for c in checks):
        out.print(f"Put that right, then: {command('secateur', 'devices', 'check', name)}")
        raise typer.Exit(errors.EXIT_SURROUNDINGS)
    following = ("benchmark", "MODEL.onnx", "--device", name, "--parity") if emulated else ("probe", name)
    out.print(f"Next: {command('secateur', 'devices', *following)}")


def remove(name: Annotated[str, typer.Argument(help="A device of your own.")]) -> None:
    """Remove a device of your own, and what a probe found out about it. Shipped profiles stay.

    Example: secateur devices remove kitchen
    """
    from secateur.device_profiles import calibration

    path = profiles.folder() / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.is_file():
        own = ", ".join(sorted(p.stem for p in profiles.folder().glob("*.yaml"))) or "none"
        shipped = f"{name} is shipped with Secateur and stays. " if name in profiles.known() else ""
        raise errors.UserError(f"{shipped}no device {name!r} of your own; your own are: {own}")
    heirs = [p.stem for p in sorted(profiles.folder().glob("*.yaml")) if p != path and _extends(p) == name]
    if heirs:
        raise errors.UserError(
            f"{', '.join(heirs)} extends {name}; remove that first, or let it extend another profile"
        )
    path.unlink()
    of_networks = calibration.networks_of(profiles.folder(), name)
    for kept in (*calibration.probes_of(profiles.folder(), name), *of_networks):
        kept.unlink(missing_ok=True)
    out.print(f"Removed: {one_line(path)}")


def _parameter(like: Any, option: AddOption) -> Any:
    """A target's option as one of the command line, which is kept in the context's ``meta``."""
    made = copy(like)
    made.name, made.opts, made.metavar, made.help = option.name, [f"--{option.name}"], option.metavar, option.help
    made.required, made.default, made.expose_value = False, None, False
    made.callback = _keep
    return made


def _keep(ctx: typer.Context, parameter: Any, value: str | None) -> None:
    if value:
        ctx.meta.setdefault(GIVEN, {})[parameter.name] = value


def _add_options() -> list[AddOption]:
    """The options of every kind of target, each name once; a kind that cannot be loaded is told where it is used."""
    from secateur.device_profiles.target import kinds

    options = {option.name: option for kind in kinds() for option in kind.add_options}
    return [options[name] for name in sorted(options)]


def _check_name(name: str, base: str, force: bool) -> None:
    """Refuse a name that is no file name, or one that is taken."""
    if not NAME.fullmatch(name) or name.endswith((".yaml", ".yml", ".probe")):
        raise errors.UserError(f"{name!r} cannot be a device's name: use letters, digits, '-', '_' and '.'")
    taken = profiles.known().get(name)
    if taken is None or force:
        return
    if taken.parent == profiles.folder():
        raise errors.UserError(f"you have a device {name} ({taken}); choose another name, or replace it with --force")
    if base != name:
        raise errors.UserError(f"{name} is a shipped profile; choose another name, or hide it with --force")


def _connect(base: DeviceProfile, given: Mapping[str, str]) -> dict[str, Any]:
    """The ``connect`` section of a new profile.

    Args:
        given: option of ``devices add`` -> text.

    Raises:
        UserError: the base's kind of target has no such option, a text cannot be read, or what is needed is not given.
    """
    from secateur.device_profiles.target import kind_of

    kind, connect = kind_of(base), dict[str, Any]()
    known = {option.name: option for option in kind.add_options}
    for name, text in given.items():
        if name not in known:
            raise errors.UserError(f"{base.name} is a target of kind {base.target}, which has no {name}{_other(name)}")
        try:
            connect |= known[name].read(text)
        except ValueError as error:
            raise errors.UserError(f"--{name} {text!r}: {error}") from error
    if missing := kind.missing({**base.connect, **connect}):
        words = " ".join(f"--{option.name} {option.example}" for option in kind.giving(missing))
        say = f"say where the device is with {words}" if words else f"give it a profile with connect.{missing[0]}"
        raise errors.UserError(f"{base.name} is a template: {say}")
    return connect


def _other(option: str) -> str:
    """Which base a device with this option needs."""
    from secateur.device_profiles.target import kinds

    owners = {kind.name for kind in kinds() if option in [known.name for known in kind.add_options]}
    entries = [listing.entry_of(name, path) for name, path in sorted(profiles.known().items())]
    bases = [entry for entry in entries if entry.get("target") in owners]
    if not bases:
        return ""
    listed = command("secateur", "devices", "list")
    return f"; use --from {bases[0]['name']} or another one of kind {bases[0]['target']} ({listed})"


def _write(name: str, settings: Mapping[str, Any]) -> Path:
    """Write a profile of the user's own; one that turns out not to be valid is taken back.

    Raises:
        UserError: it is not valid.
        SurroundingsError: the file cannot be written.
    """
    from secateur.device_profiles import plain_yaml

    path = profiles.folder() / f"{name}.yaml"
    comment = (
        "# Written by `secateur devices add`. `secateur devices show NAME` prints every setting that can stand here.\n"
    )
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(comment + plain_yaml.dump(dict(settings)), encoding="utf-8")
    except OSError as error:
        raise errors.SurroundingsError(f"cannot write {path}: {error.strerror}") from error
    try:
        profiles.load(name)
    except errors.UserError:
        if before is None:
            path.unlink()
        else:
            path.write_text(before, encoding="utf-8")
        raise
    return path


def _extends(path: Path) -> str | None:
    """The profile that a file names as its base; None where it names none or cannot be read."""
    import yaml

    from secateur.device_profiles import plain_yaml

    try:
        content = plain_yaml.read(path.read_text(encoding="utf-8")).content
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    base = content.get("extends") if isinstance(content, dict) else None
    return base.written if isinstance(base, plain_yaml.Plain) else None if base is None else str(base)
