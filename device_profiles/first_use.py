"""A package whose names are imported when they are first asked for: its light modules then cost little."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


def import_on_first_use(package: str, homes: Mapping[str, Sequence[str]]) -> list[str]:
    """Give a package its names.

    A name that a module of the package has too stands for what is in that module: ``from secateur.pruning import
    trace`` gives the function. The import system may bind the module; ``sys.modules`` has it.

    Args:
        package: dotted name of the package.
        homes: module of it -> the names that come from there.

    Returns:
        The names, sorted.
    """
    module_of = {name: module for module, names in homes.items() for name in names}

    def load(self: ModuleType, name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        self.__dict__[name] = value
        return value

    def instead_of_module(name: str) -> property:
        return property(lambda self: load(self, name), lambda self, module: None)

    def names(self: ModuleType) -> list[str]:  # for completion in a shell, and for the pages of the API
        return sorted({*self.__dict__, *module_of})

    shared = {name: instead_of_module(name) for name in module_of if name in homes}
    sys.modules[package].__class__ = type("Package", (ModuleType,), {"__getattr__": load, "__dir__": names, **shared})
    return sorted(module_of)
