"""Shelves: folders whose modules are things of one kind (search methods, workloads, targets ...), found by existing.

Modules are read, not run, until one is wanted: some import much.
"""

from __future__ import annotations

import difflib
import pkgutil
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

FIRST_LINE = re.compile(r'\A\s*"""\s*(.*)')


@dataclass(frozen=True)
class Shelf:
    """A folder of modules of one kind.

    Args:
        package: dotted name of the folder.
        kind: what stands there, as messages call one of them.
        defines: names that make a module one of them, and no helper.
    """

    package: str
    kind: str
    defines: tuple[str, ...]

    def descriptions(self) -> dict[str, str]:
        """Everything on the shelf: name -> first line of its docstring."""
        texts = {name: file.read_text(encoding="utf-8") for name, file in self._files().items()}
        found = {name: FIRST_LINE.match(text) for name, text in sorted(texts.items()) if self._belongs(text)}
        return {name: "" if line is None else line[1].rstrip('"').strip() for name, line in found.items()}

    def names(self) -> list[str]:
        """The names of everything on the shelf, sorted."""
        return list(self.descriptions())

    def load(self, name: str) -> ModuleType:
        """One module of the shelf, imported.

        Raises:
            ValueError: there is none of this name; lists the known ones and the nearest.
        """
        if name not in (known := self.names()):
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(known)}")
        return import_module(f"{self.package}.{name}")

    def loaded(self) -> dict[str, ModuleType]:
        """Every module of the shelf that can be imported."""
        return {name: self.load(name) for name in self.names()}

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


DEFINES = r"^(?:(?:class|def) {name}\b|{name}\s*[:=]|from \S+ import (?:[^\n(]*\b|\([^)]*\b){name}\b)"
"""A module's text that defines or imports a name."""
