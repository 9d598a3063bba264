"""Code that run files and device profiles name, and the consent it needs before any of it is imported or started.

A run file chooses a run; it is no program. Where it names one all the same (a ``module:factory``, an interpreter, an
SSH configuration of its own, which may start commands), whoever runs it must have said yes: once per folder and set of
such entries (``consents.py`` keeps it). What stands in one's own module may change meanwhile.

Doors at which nothing passes without it, whatever was forgotten before: ``factory`` and ``open_target``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.device_profiles.profile import RUNTIMES, TARGETS
from secateur.device_profiles.shelf import dismiss_all, in_file, module_of
from secateur.device_profiles.wording import command, printable
from secateur.pipeline.config.choices import WORKLOADS
from secateur.pipeline.config.consents import Entry, Found, keep, kept, refuse_what_others_write, written
from secateur.pipeline.errors import UserError
from secateur.pipeline.surroundings import home
from secateur.pruning.search import METHODS

if TYPE_CHECKING:
    from torch import nn

    from secateur.device_profiles import DeviceProfile, Target
    from secateur.pipeline.config.schema import RunFile

CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""``module:attribute``, which imports."""
PLACES = (("name",), ("task",), ("model", "name"), ("model", "factory"))
"""Places of the ``workload`` section that may name code."""
FILES = (("name",), ("task",), ("model", "name"))
"""Those of them that may name a ``FILE.py:NAME``."""
ZOOS = ("torchvision", "timm")
"""Packages whose own builders of networks need no consent."""
LOADING = re.compile(r"pretrained|checkpoint|weights")
"""Options with which a builder of theirs reads files or addresses."""
FIX = (
    "name an nn.Module builder, or a task's class, in a file beside the run file (FILE.py:NAME), of a module in its "
    "folder, or of an installed package"
)


SHELVES = {"search.method": METHODS, "workload.name": WORKLOADS, "target": TARGETS, "runtime": RUNTIMES}
"""Places that may name a ``FILE.py:NAME``, and the shelf that it is added to."""


class ClosedError(UserError):
    """Code would be imported that nobody has consented to here, or that is not found."""


_allowed: dict[Entry, None] = {}
"""What this process may run, in the order in which that was found."""


# ------------------------------------------------------------------------------------------------- what names code


def code_in(config: RunFile, file: Path) -> list[Found]:
    """What names code in a run file and in the device profiles that it names; nothing is imported or started.

    Args:
        file: where the run file is; relative modules are looked for in ``config.folder``.

    Raises:
        UserError: a factory's module is not in the run file's folder or the environment, or is one of Python's own.
    """
    code = [code_of_method(config, file), code_of_workload(config, file)]
    code += [code_of_profile(name) for name in (config.device.profile, *config.device.others)]
    return [one for one in code if one is not None]


def code_of_profile(name: str | Path) -> Found | None:
    """What names code in a device profile, by name or path; None where nothing does, or where it is not valid."""
    from secateur.device_profiles import DeviceError, known_profiles, load_profile

    folders = [home() / "devices"]
    try:
        profile = load_profile(name, folders)
    except DeviceError:  # whoever uses it says so
        return None
    entries, others = _of_profile(profile)
    if not entries:
        return None
    file = Path(name) if str(name).endswith((".yaml", ".yml")) else known_profiles(folders)[str(name)]
    return Found(file, entries, others)


def code_of_method(config: RunFile, file: Path) -> Found | None:
    """What names code in the choice of a search method; as ``code_in``."""
    entry_and_file = _of_file(config.search.method, "search.method", config.folder)
    return Found(file, (entry_and_file[0],), (entry_and_file[1],)) if entry_and_file else None


def _of_file(name: object, place: str, near: Path | None) -> tuple[Entry, Path] | None:
    """What a ``FILE.py:NAME`` would run, and the file; None for any other text.

    Args:
        near: where a relative file is looked for.

    Raises:
        UserError: there is no such file.
    """
    parts = in_file(name)
    if parts is None:
        return None
    file = ((near or Path()) / parts[0]).absolute()
    if not file.is_file() or not str(name).isprintable():
        raise UserError(
            f"{place}: {printable(name)}: there is no file {printable(file)}; "
            "a relative one is looked for beside the run file or profile"
        )
    return Entry(place, f"{name} of {printable(file)}", str(file)), file


def code_of_workload(config: RunFile, file: Path) -> Found | None:
    """What names code in a run file's workload; as ``code_in``."""
    section, near, entries, others = config.workload, config.folder, [], []
    model = section.get("model")
    options = model.get("options", {}) if isinstance(model, dict) else {}
    for place in PLACES:
        value: Any = section
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, str) or ":" not in value or _is_of_a_zoo(value, options):
            continue
        where = ".".join(("workload", *place))
        of_file = _of_file(value, where, near) if place in FILES else None
        entry, module = of_file or _entry_of(value, where, near)
        entries.append(entry)
        if not _is_installed(module):
            others.append(module)
    return Found(file, tuple(entries), tuple(others)) if entries else None


def _entry_of(name: str, place: str, near: Path | None) -> tuple[Entry, Path]:
    """What a ``module:factory`` would run, and the module's file."""
    if not CODE.fullmatch(name):
        raise UserError(f"{place}: {printable(name)!r} is no module:name; {FIX}, as package.module:name")
    module = name.partition(":")[0]
    file, root = _find(module, near)
    return Entry(place, f"{name} of {printable(file)}", str(root)), file


def _find(module: str, near: Path | None) -> tuple[Path, Path]:
    """The file of a module that the environment or a folder provides, and the folder it is imported from.

    Nothing of it is imported, nor of the packages above it.

    Raises:
        UserError: there is none, or it is a part of Python.
    """
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{module} is a part of Python, which has no networks or tasks; {FIX}")
    parts = module.split(".")
    for start in (None, *([[str(near)]] if near else [])):
        path: Sequence[str] | None = start
        spec = top = None
        for depth in range(1, len(parts) + 1):
            spec = _spec(".".join(parts[:depth]), path)
            if spec is None:
                break
            top = top or spec
            path = list(spec.submodule_search_locations or ())
        place = spec and (spec.origin or next(iter(path or ()), None))
        if place and top:
            first = Path(next(iter(top.submodule_search_locations or ()), top.origin or place))
            return Path(place).absolute(), first.absolute().parent
    raise UserError(f"no module {module} in {f'{near} or ' if near else ''}the environment; {FIX}")


def _spec(module: str, path: Sequence[str] | None) -> Any:
    """A module's spec as the import system finds it."""
    specs = (finder.find_spec(module, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)


def _is_installed(file: Path) -> bool:
    """Whether a file belongs to the environment that runs us: who can write it there can write all of ours."""
    prefixes = {Path(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    return any(file.is_relative_to(place) for prefix in prefixes for place in (prefix.absolute(), prefix.resolve()))


def _is_of_a_zoo(name: str, options: object) -> bool:
    """Whether this is a builder of the installed torchvision or timm, with options that load nothing."""
    module, _, attribute = name.partition(":")
    top = module.partition(".")[0]
    loads = not isinstance(options, dict) or any(LOADING.search(str(key)) for key in options)
    if top not in ZOOS or not CODE.fullmatch(name) or loads:
        return False
    try:
        installed = all(_is_installed(_find(part, None)[0]) for part in (top, module))
    except UserError:
        return False
    zoo: Any = importlib.import_module("timm" if top == "timm" else "torchvision.models") if installed else None
    return installed and attribute in zoo.list_models()


def _of_profile(profile: DeviceProfile) -> tuple[tuple[Entry, ...], tuple[Path, ...]]:
    """What a device profile would start, beyond the default."""
    from secateur.device_profiles.target import started_by

    entries, others = [], []
    for place, name in (("target", profile.target), ("runtime", profile.runtime)):
        if entry_and_file := _of_file(name, place, None):
            entries.append(entry_and_file[0])
            others.append(entry_and_file[1])
    for started in started_by(profile):
        entries.append(Entry(f"connect.{started.setting}", started.text))
        others += [started.file] if started.file else []
    return tuple(entries), tuple(file for file in others if file.is_file())


# ---------------------------------------------------------------------------------------------------------- consent


def require(code: Iterable[Found], ask: Callable[[Found], bool] | None = None) -> None:
    """See that there is consent for what names code; from here on, this process may run it.

    Args:
        ask: asked where none is kept; a yes is kept.

    Raises:
        UserError: there is none, or others can write what would run; says what would run and the command to paste.
    """
    code, open_ = list(code), list[Found]()
    for one in code:
        refuse_what_others_write(one)
    for one in code:
        known = {*_allowed, *kept(one.folder)}
        if not set(one.entries) <= known:
            if ask is None or not ask(one):
                open_.append(one)
                continue
            keep(one)
        allow(one.entries)
    if open_:
        raise UserError(refusal(open_))


def consented(load: Callable[[], RunFile], file: Path, ask: Callable[[Found], bool] | None = None) -> RunFile:
    """A run file, for which there is consent; what it names in files is checked only then.

    Args:
        load: reads it.
        file: where it is.
        ask: as ``require``.

    Raises:
        UserError: as ``load`` and ``require``.
    """
    config = load()
    code = code_in(config, file)
    require(code, ask)
    return load() if any(entry.place in SHELVES for one in code for entry in one.entries) else config


def allow_typed(code: Iterable[Found]) -> None:
    """Let this process run what its user has named in the command: that is consent, for this once.

    Raises:
        UserError: others can write what would run.
    """
    for found in code:
        refuse_what_others_write(found)
        allow(found.entries)


def method_of_file(name: str) -> Found:
    """The search method that a ``FILE.py:NAME`` means in the current folder.

    Raises:
        UserError: there is no such file.
    """
    of_file = _of_file(name, "search.method", Path.cwd())
    assert of_file is not None, name
    entry, file = of_file
    return Found(file, (entry,), (file,))


def refusal(code: Sequence[Found]) -> str:
    """What would run, and how to say yes."""
    listed = "\n".join(f"  {printable(one.file)}: {entry}" for one in code for entry in one.entries)
    folders = list(dict.fromkeys(one.folder for one in code))
    return (
        f"this names code, which would run with all your rights, and nobody has consented to it:\n{listed}\n"
        f"Look at it; if you trust it, run: {command('secateur', 'trust', *folders)}\n"
        "(or give --trust to this command)"
    )


def allow(entries: Iterable[Entry]) -> None:
    """Let this process run something; a module is found in the folder it was in when it was shown."""
    for entry in entries:
        _allowed.pop(entry, None)
        _allowed[entry] = None
        name = entry.text.removesuffix(f" of {printable(entry.root)}")
        if entry.place in SHELVES and entry.root.endswith(".py"):
            SHELVES[entry.place].admit(name, Path(entry.root))
            continue
        for folder in _folders(name, entry.root):
            if folder not in map(os.path.abspath, sys.path):
                sys.path.append(folder)  # last: nothing there hides an installed module


def _folders(name: str, root: str) -> list[str]:
    """Where code that may run looks for the modules beside it: beside its file, and beside the run file."""
    parts = in_file(name)
    if parts is None or not root.endswith(".py"):
        return [root] if root else []
    return list(dict.fromkeys([str(Path(root).parent), os.path.normpath(root.removesuffix(parts[0]))]))


def allowed() -> list[list[str]]:
    """What this process may run, for one that works for it."""
    return [written(entry) for entry in _allowed]


def accept(entries: Iterable[Sequence[str]]) -> None:
    """Take over what was allowed elsewhere: by the process that this one works for, or when a deployment was made."""
    allow(Entry(*entry) for entry in entries)


def withdraw_all() -> None:
    """Forget what this process may run; for tests."""
    _allowed.clear()
    dismiss_all()


def hand_on(config: RunFile, directory: Path) -> None:
    """A run directory made of a run file that may run here may be resumed without another question."""
    for one in code_in(config, directory / "run.yaml"):
        if one.folder == directory.resolve() and set(one.entries) <= _allowed.keys():
            keep(one)


# ------------------------------------------------------------------------------------------------------------ doors


def factory(name: str, options: object, place: str = "workload.model.name") -> Callable[..., nn.Module]:
    """The builder that a ``module:factory`` or ``FILE.py:factory`` names, imported; what it returns will be a network.

    Args:
        options: what it will be given.
        place: where it is named.

    Raises:
        ClosedError: there is no consent for it, or no such module.
        UserError: there is no such thing in it, or it builds no ``nn.Module``.
    """
    builder, installed = _of_a_file(name, place) if in_file(name) else _of_a_module(name, options, place)
    fix = (
        "a factory is a class derived from torch.nn.Module, or a function that returns one; a function of an installed "
        "package says so (def build(num_classes) -> nn.Module)"
    )
    torch_nn = sys.modules.get("torch.nn")  # whoever made a network has imported it
    if torch_nn is not None and isinstance(builder, torch_nn.Module):
        raise UserError(f"{name} is a network that is made already; write a function that makes one: {fix}")
    if not callable(builder):
        raise UserError(f"{name} is a {type(builder).__name__}, not a callable; {fix}")
    if not _may_build(builder, anything=not installed):
        raise UserError(f"{name} builds no torch.nn.Module; {fix}")

    def build(*arguments: Any, **given: Any) -> nn.Module:
        from torch import nn

        try:
            network = builder(*arguments, **given)
        except (TypeError, UserError):  # options that it does not take, which its caller words
            raise
        except Exception as error:
            raise UserError(f"{name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(network, nn.Module):
            raise UserError(f"{name} returned a {type(network).__name__}; {fix}")
        return network

    return build


def _of_a_module(name: str, options: object, place: str) -> tuple[Any, bool]:
    """(what a ``module:attribute`` names, whether it belongs to the environment)."""
    if not _is_of_a_zoo(name, options):
        try:
            entry, _ = _entry_of(name, place, None)
        except UserError as error:
            raise ClosedError(str(error)) from error
        if entry not in _allowed:
            raise ClosedError(f"{entry} names code, and nobody has consented to it here: see `secateur trust --help`")
    module, _, attribute = name.partition(":")
    try:
        builder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}: {error}; expected an importable module, and in it what the colon precedes") from error
    return builder, _is_installed(_find(module, None)[0])


def _of_a_file(name: str, place: str) -> tuple[Any, bool]:
    """The same of a ``FILE.py:attribute``: of the file that was consented to last under this name."""
    return in_consented_file(name, place)[0], False


def consented_code(name: str, place: str) -> tuple[Any, Path]:
    """(what a ``FILE.py:attribute`` or ``package.module:attribute`` names, the file that it is in).

    Args:
        place: where it is named.

    Raises:
        ClosedError: there is no consent for it.
        UserError: it cannot be imported, or there is no such thing in it.
    """
    if in_file(name):
        return in_consented_file(name, place)
    return _of_a_module(name, {}, place)[0], _find(name.partition(":")[0], None)[0]


def in_consented_file(name: str, place: str) -> tuple[Any, Path]:
    """(what a ``FILE.py:attribute`` names, its file): of the file that was consented to last under this name.

    Args:
        place: where it is named.

    Raises:
        ClosedError: there is no consent for it.
        UserError: the file cannot be imported, or there is no such thing in it.
    """
    file = next(
        (e.root for e in reversed(_allowed) if e.place == place and e.text == f"{name} of {printable(e.root)}"), None
    )
    if file is None:
        raise ClosedError(
            f"{place}: {name} names code, and nobody has consented to it here: see `secateur trust --help`"
        )
    attribute = name.rpartition(":")[2]
    try:
        return getattr(module_of(Path(file)), attribute), Path(file)
    except AttributeError as error:
        raise UserError(f"{name}: there is no {attribute} in {file}; after the colon comes what it defines") from error
    except Exception as error:  # a user's code, which may raise anything
        raise UserError(f"{name}: {file} cannot be imported: {type(error).__name__}: {error}") from error


def _may_build(builder: Any, anything: bool) -> bool:
    """Whether a callable can be a builder of networks, as far as it can be known before it is called.

    Args:
        anything: whether a function may, that does not say what it returns.
    """
    from torch import nn

    if isinstance(builder, type):
        return issubclass(builder, nn.Module)
    plain = inspect.unwrap(builder)
    if not inspect.isfunction(plain):
        return False
    try:
        returned = typing.get_type_hints(plain).get("return", Any)
    except Exception:  # noqa: BLE001 - annotations of others may raise anything
        returned = Any
    if returned is Any:
        return anything
    kinds = typing.get_args(returned) or (returned,)
    return any(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds)


def open_target(profile: DeviceProfile) -> Target:
    """``secateur.device_profiles.open_target``, for what may be started.

    Raises:
        UserError: the profile names code that nobody has consented to.
        ExportError: its runtime loads a format that there is none of.
    """
    from secateur import device_profiles
    from secateur.device_profiles.runtime import runtime_of

    closed = [entry for entry in _of_profile(profile)[0] if entry not in _allowed]
    if closed:
        raise UserError(
            f"device profile {profile.name} names code, and nobody has consented to it: "
            f"{'; '.join(map(str, closed))}; see `secateur trust --help`"
        )
    target, runtime = device_profiles.open_target(profile), runtime_of(profile)
    if runtime.format == "onnx":
        return target
    from secateur.export.convert import in_format
    from secateur.export.formats import FORMATS

    if parts := in_file(runtime.format):  # named by code that may run here
        FORMATS.admit(runtime.format, runtime.file.parent / parts[0])
    return in_format(target, runtime.format)
