"""How to reach a device: a port of five methods. Each kind of target is one module of
``secateur.device_profiles.targets``.

The module's file name is the ``target`` of a profile. It has

- ``Settings``: a pydantic model, the profile's ``connect`` section,
- ``open_target(profile, settings)``: a ``Target``; nothing is reached yet,

and, where the defaults of ``TargetKind`` do not fit, ``THIS_MACHINE``, ``ADD_OPTIONS``, ``missing(connect)``,
``machine(connect)``, ``address(connect)`` and ``starts(connect)``. Nothing outside the module knows more about a kind
of target.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from secateur.device_profiles.errors import DeviceError
from secateur.device_profiles.profile import TARGETS, DeviceProfile
from secateur.device_profiles.shelf import in_file
from secateur.device_profiles.wording import command

AGENT = Path(__file__).with_name("agent.py")
Progress = Callable[[Mapping[str, Any]], None]


class Target(Protocol):
    """A device that can hold files and run the agent. Every method raises ``DeviceError``, never anything else."""

    def prepare(self) -> Mapping[str, Any]:
        """Reach the device, bring the agent, sweep what dead sessions left; returns the agent's answer to ``probe``."""
        ...

    def put(self, path: Path) -> str:
        """Bring a file to the device, unless one of the same sha256 is there; returns its path on the device."""
        ...

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
        """Run the agent with one request (see ``agent.py``) in a fresh process and return its answer.

        Args:
            progress: called with each event the agent reports before its answer.

        Raises:
            DeviceError: the agent reports an error, dies, is busy or takes longer than ``timeout_s``.
        """
        ...

    def fetch(self, path: str, to: Path) -> None:
        """Bring a file that the agent left (an answer names it) from the device; it appears whole or not at all."""
        ...

    def close(self) -> None:
        """End the connection, and what was started for it."""


@dataclass(frozen=True)
class AddOption:
    """An option of ``secateur devices add``: a text on the command line that becomes settings of ``connect``.

    Args:
        name: without its dashes.
        metavar: what the text is, in the help.
        help: one sentence.
        read: the text -> settings; raises ``ValueError`` where it cannot be read, with what to write instead.
        example: a text that could be given.
    """

    name: str
    metavar: str
    help: str
    read: Callable[[str], dict[str, Any]]
    example: str


def read_program(text: str) -> dict[str, Any]:
    """A program and its arguments, as the setting ``python``; one that is a file may have spaces in its path.

    Raises:
        ValueError: a quotation mark is not closed.
    """
    return {"python": [text] if Path(text).is_file() else shlex.split(text)}


@dataclass(frozen=True)
class Started:
    """Something of a user's that a target starts, or reads commands from: it needs consent.

    Args:
        setting: of ``connect``, that names it.
        text: what it is, for whoever is asked.
        file: on this machine; who can write it can change what runs.
    """

    setting: str
    text: str
    file: Path | None = None


def started_here(python: object) -> tuple[Started, ...]:
    """The program of a setting ``python``, started on this machine; nothing where it is not set.

    Args:
        python: a program, or a program and its arguments.
    """
    words = [python] if isinstance(python, str) else [str(word) for word in python or ()]  # type: ignore[attr-defined]
    if not words:
        return ()
    program = shutil.which(words[0])
    file = Path(program).absolute() if program is not None else None
    shown = command(file or words[0], *words[1:])
    return (Started("python", f"{shown} (on this machine)", file),)


PYTHON = AddOption("python", "COMMAND", "The Python there that has onnxruntime.", read_program, "/opt/ort/bin/python")
"""The option of kinds of target that have a setting ``python``: a program and its arguments."""


@dataclass(frozen=True)
class TargetKind:
    """What the module of a kind of target says of it, with defaults for what it leaves out."""

    name: str
    module: Any

    @property
    def settings(self) -> type[BaseModel]:
        """The model of ``connect``."""
        return self.module.Settings  # type: ignore[no-any-return]

    @property
    def this_machine(self) -> bool:
        """Whether it measures on the machine that Secateur runs on. ``THIS_MACHINE``; by default it does not."""
        return bool(getattr(self.module, "THIS_MACHINE", False))

    @property
    def add_options(self) -> tuple[AddOption, ...]:
        """What ``secateur devices add`` takes for it. ``ADD_OPTIONS``; none by default."""
        return tuple(getattr(self.module, "ADD_OPTIONS", ()))

    def missing(self, connect: Mapping[str, Any]) -> tuple[str, ...]:
        """The settings without which no device can be reached. ``missing``; by default those that have no default."""
        if hasattr(self.module, "missing"):
            return tuple(self.module.missing(connect))
        required = (name for name, field in self.settings.model_fields.items() if field.is_required())
        return tuple(name for name in required if connect.get(name) in (None, ""))

    def giving(self, settings: Collection[str]) -> list[AddOption]:
        """The options that give any of these settings."""
        return [option for option in self.add_options if set(settings) & option.read(option.example).keys()]

    def machine(self, connect: Mapping[str, Any]) -> tuple[str, ...]:
        """Words that tell one machine from another, its host first: only one measures on a machine at a time.

        ``machine``; by default all devices of the kind are taken for one machine, which is slow and never wrong.
        """
        return tuple(self.module.machine(connect)) if hasattr(self.module, "machine") else ()

    def address(self, connect: Mapping[str, Any]) -> str:
        """Where the device is, for people. ``address``; by default the machine."""
        if hasattr(self.module, "address"):
            return str(self.module.address(connect))
        return " ".join(self.machine(connect))

    def starts(self, connect: Mapping[str, Any]) -> tuple[Started, ...]:
        """What of a user's it starts. ``starts``; by default the program ``python``, on this machine."""
        if hasattr(self.module, "starts"):
            return tuple(self.module.starts(connect))
        return started_here(connect.get("python"))


def kind_of(profile: DeviceProfile) -> TargetKind:
    """The kind of target of a profile.

    Raises:
        DeviceError: there is none of this name, or it cannot be used.
    """
    try:
        return TargetKind(profile.target.rpartition(":")[2], TARGETS.load(profile.target))
    except ValueError as error:
        raise DeviceError(f"device profile {profile.name}: {error}", "profile") from error


def kinds() -> list[TargetKind]:
    """Every kind of target that can be imported."""
    return [TargetKind(name, module) for name, module in TARGETS.loaded().items()]


def is_template(profile: DeviceProfile) -> bool:
    """Whether a profile describes a kind of board but no board: settings that reach one are missing.

    That is not known of a kind in a file before there is consent for it.
    """
    if in_file(profile.target) and not TARGETS.has(profile.target):
        return False
    return bool(kind_of(profile).missing(profile.connect))


def adding(template: DeviceProfile, base: str = "") -> str:
    """The command that makes a device of a template.

    Args:
        base: what to call the template; empty = by its name.
    """
    kind = kind_of(template)
    options = kind.giving(kind.missing(template.connect))
    words = (word for option in options for word in (f"--{option.name}", option.example))
    return command("secateur", "devices", "add", "NAME", "--from", base or template.name, *words)


def needs(profile: DeviceProfile) -> str:
    """What a template lacks: ``a host``."""
    return " and ".join(f"a{'n' * (name[0] in 'aeiou')} {name}" for name in kind_of(profile).missing(profile.connect))


def started_by(profile: DeviceProfile) -> tuple[Started, ...]:
    """What of a user's the target of a profile starts; a kind in a file, itself such a thing, is never asked."""
    if in_file(profile.target):
        return started_here(profile.connect.get("python"))
    return kind_of(profile).starts(profile.connect)


def require_complete(profile: DeviceProfile) -> None:
    """Refuse a template.

    Raises:
        DeviceError: settings that reach a device are missing; says how to make a device of it.
    """
    if is_template(profile):
        raise DeviceError(f"device profile {profile.name} needs {needs(profile)}: {adding(profile)}", "profile")


def machine_of(profile: DeviceProfile) -> tuple[str, ...]:
    """What tells the machine behind a profile from others; devices of one machine are not measured at the same time."""
    kind = kind_of(profile)
    return ("this machine",) if kind.this_machine else (kind.name, *kind.machine(profile.connect))


def open_target(profile: DeviceProfile) -> Target:
    """The target a profile names; nothing is reached before its first use.

    Raises:
        DeviceError: the profile's ``connect`` section does not fit its kind of target.
    """
    require_complete(profile)
    kind = kind_of(profile)
    try:
        settings = kind.settings(**profile.connect)
    except ValidationError as error:
        faults = "; ".join(f"connect.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DeviceError(f"device profile {profile.name}: {faults}", "profile") from error
    target: Target = kind.module.open_target(profile, settings)
    return target
