"""Shelves: folders whose modules are things of one kind (search methods, workloads, targets ...), found by existing.

A thing may also come from elsewhere: from an installed package, by an entry point of the shelf's group, or from a file
that a run file or device profile names, ``FILE.py:NAME``. NAME is the file's own name, and the whole file is the thing;
or a class in it that has what a module would have. Files are loaded only after ``admit``, which is for whoever asks for
consent.

Modules are read, not run, until one is wanted: some import much, and one that is broken must not hide the others.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import pkgutil
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

FIRST_LINE = re.compile(r'\A(?:\s|#[^\n]*\n)*[rR]?"""\s*(.*)')
IN_FILE = re.compile(r"(?P<file>[^:\n\0]+\.py):(?P<name>[A-Za-z_]\w*)")
DEFINES = r"^(?:(?:class|def) {name}\b|{name}\s*[:=]|from \S+ import (?:[^\n(]*\b|\([^)]*\b){name}\b)"
"""A module's text that defines or imports a name."""


class PluginError(ValueError):
    """Something from elsewhere cannot be used; says where it is from, and why."""


class NotAdmittedError(PluginError):
    """A file is named that nobody has consented to."""


PATH = tuple(sys.path)
"""Where packages are looked for: folders that come to the path later hold code that somebody consented to, no more."""
PREFIX = "secateur_plugin_"
_admitted: dict[tuple[str, str], Path] = {}
"""Package of a shelf, and a name as it is written -> the file that may be loaded for it."""


def in_file(name: object) -> tuple[str, str] | None:
    """File and name of a ``FILE.py:NAME``; None for any other text."""
    match = IN_FILE.fullmatch(name) if isinstance(name, str) else None
    return (match["file"], match["name"]) if match else None


def dismiss_all() -> None:
    """Forget what was admitted; for tests."""
    _admitted.clear()


@dataclass(frozen=True)
class Shelf:
    """A folder of modules of one kind.

    Args:
        package: dotted name of the folder.
        kind: what stands there, as messages call one of them.
        defines: names that make a module one of them, and no helper.
        group: of the entry points by which installed packages add to it; empty = nothing is added.
    """

    package: str
    kind: str
    defines: tuple[str, ...]
    group: str = ""

    def descriptions(self) -> dict[str, str]:
        """Everything on the shelf: name -> first line of its docstring, or why it cannot be used."""
        texts = {name: file.read_text(encoding="utf-8") for name, file in self._files().items()}
        described = {name: _first_line(text) for name, text in texts.items() if self._belongs(text)}
        for name in dict.fromkeys(point.name for point in _points(self.group)):
            try:
                described[name] = self._described(self._point(name))
            except PluginError as error:
                described[name] = f"unusable: {error}"
        return dict(sorted(described.items()))

    def stated(self, label: str) -> dict[str, str]:
        """What the texts of the shelf's own modules say in a line ``LABEL: ...``, without its full stop, by name."""
        line = re.compile(rf"^{re.escape(label)}: (.+?)\.?$", re.MULTILINE)
        texts = {name: file.read_text(encoding="utf-8") for name, file in self._files().items()}
        matches = {name: line.search(text) for name, text in texts.items() if self._belongs(text)}
        return {name: match[1] for name, match in matches.items() if match is not None}

    def names(self) -> list[str]:
        """The names of everything on the shelf, sorted; those of broken additions included."""
        return sorted({*self._own(), *(point.name for point in _points(self.group))})

    def has(self, name: object) -> bool:
        """Whether ``load`` knows a name: it is on the shelf, or of a file that was admitted."""
        return isinstance(name, str) and ((self.package, name) in _admitted or name in self.names())

    def admit(self, name: str, file: Path) -> None:
        """Let a ``FILE.py:NAME`` be loaded: there is consent for it.

        Args:
            file: where FILE is.
        """
        _admitted[self.package, name] = file

    def load(self, name: str) -> Any:
        """One module of the shelf, imported; or the class that a file or an entry point names.

        Raises:
            PluginError: it comes from elsewhere and cannot be used: it does not import, lacks functions or a docstring,
                or has the name of another one.
            NotAdmittedError: it is in a file, and nobody has consented to that.
            ValueError: there is none of this name; lists the known ones and the nearest.
        """
        if in_file(name):
            return self._from_file(name)
        if any(point.name == name for point in _points(self.group)):
            return self._from_point(self._point(name))
        if name not in self._own():
            known = self.names()
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(known)}")
        return import_module(f"{self.package}.{name}")

    def loaded(self) -> dict[str, Any]:
        """Everything on the shelf that can be imported, and every file that was admitted: name -> module."""
        modules = {}
        for name in [*self.names(), *(name for package, name in _admitted if package == self.package)]:
            try:
                modules[name] = self.load(name)
            except PluginError:
                continue  # told where it is asked for
        return modules

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _own(self) -> list[str]:
        return [name for name, file in self._files().items() if self._belongs(file.read_text(encoding="utf-8"))]

    def _files(self) -> dict[str, Path]:
        """Module name -> its file, or the ``__init__.py`` of its folder."""
        spec = find_spec(self.package)
        assert spec is not None
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        return {
            info.name: folder / info.name / "__init__.py" if info.ispkg else folder / f"{info.name}.py"
            for folder in folders
            for info in pkgutil.iter_modules([str(folder)])
        }

    def _belongs(self, text: str) -> bool:
        return all(re.search(DEFINES.format(name=name), text, re.MULTILINE) for name in self.defines)

    # -- what comes from elsewhere -------------------------------------------------------------------------------------

    def _point(self, name: str) -> EntryPoint:
        """The one entry point of a name."""
        points = [point for point in _points(self.group) if point.name == name]
        places = [_place(point) for point in points]
        if name in self._own():
            places.insert(0, str(self._files()[name]))
        if len(places) > 1:
            raise PluginError(f"{self.kind} {name} is there {len(places)} times: {' and '.join(places)}; remove one")
        return points[0]

    def _described(self, point: EntryPoint) -> str:
        """The first line of an entry point's docstring, without importing anything."""
        file = _file_of(point.module)
        if file is None:
            raise PluginError(f"{self.kind} {point.name} of {_place(point)}: there is no such module")
        text = file.read_text(encoding="utf-8")
        if not point.attr:
            self._require([n for n in self.defines if not self._defines(text, n)], _first_line(text), _place(point))
        return _first_line(text)

    def _defines(self, text: str, name: str) -> bool:
        return re.search(DEFINES.format(name=name), text, re.MULTILINE) is not None

    def _from_point(self, point: EntryPoint) -> Any:
        try:
            thing = point.load()
        except Exception as error:  # others' code, which may raise anything
            raise self._broken(_place(point), error) from error
        return self._checked(thing, _place(point))

    def _from_file(self, name: str) -> Any:
        if (self.package, name) not in _admitted:
            raise NotAdmittedError(
                f"{self.kind} {name} is code, and nobody has consented to it here: see `secateur trust --help`"
            )
        file, attribute = _admitted[self.package, name], name.rpartition(":")[2]
        try:
            module = module_of(file)
        except Exception as error:  # others' code, which may raise anything
            raise self._broken(str(file), error) from error
        if attribute == file.stem:
            return self._checked(module, str(file))
        if not hasattr(module, attribute):
            raise PluginError(
                f"{self.kind} {name}: there is no {attribute} in {file}; after the colon comes {file.stem}, for the "
                f"whole file, or a class in it that has {', '.join(self.defines)}"
            )
        return self._checked(getattr(module, attribute), f"{file}:{attribute}")

    def _checked(self, thing: Any, place: str) -> Any:
        missing = [name for name in self.defines if not hasattr(thing, name)]
        self._require(missing, (thing.__doc__ or "").strip(), place)
        return thing

    def _require(self, missing: Sequence[str], described: str, place: str) -> None:
        if missing:
            raise PluginError(f"{place} is no {self.kind}: it has no {', '.join(missing)}")
        if not described:
            raise PluginError(f"{place} has no docstring; its first line is how a {self.kind} is listed")

    def _broken(self, place: str, error: Exception) -> PluginError:
        return PluginError(f"{self.kind} {place} cannot be imported: {type(error).__name__}: {error}")


def _first_line(text: str) -> str:
    match = FIRST_LINE.match(text)
    return "" if match is None else match[1].rstrip('"').strip()


def _points(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group."""
    return tuple(point for point in _all_points(PATH) if point.group == group) if group else ()


@functools.lru_cache(maxsize=8)
def _all_points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Those of every package in these folders, the first of a name; only what has any of ours is read any further."""
    packages: dict[str, Distribution] = {}
    for package in distributions(path=list(path)):
        if "[secateur." in (package.read_text("entry_points.txt") or ""):
            packages.setdefault(str(package.name).lower().replace("_", "-"), package)
    ours = (point for package in packages.values() for point in package.entry_points)
    return tuple(point for point in ours if point.group.startswith("secateur."))


def _place(point: EntryPoint) -> str:
    """Where an entry point is from, for people."""
    package = "" if point.dist is None else f" of package {point.dist.name}"
    return f"{point.value} (entry point {point.name}{package})"


def _file_of(module: str) -> Path | None:
    """The file of a module, found without importing it or the packages above it."""
    path: Sequence[str] | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
        specs = (finder.find_spec(".".join(parts[:depth]), path) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def plugin_files() -> list[Path]:
    """The files that this process has loaded by ``module_of``."""
    loaded = [module.__file__ for name, module in sys.modules.items() if name.startswith(PREFIX)]
    return [Path(file) for file in loaded if file]


def module_of(file: Path) -> ModuleType:
    """A file, imported once under a name of its own."""
    name = f"{PREFIX}{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
