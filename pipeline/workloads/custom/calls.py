"""Calls into code of a user's: what fails is told with its line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.pipeline.errors import UserError


def kind(thing: Any) -> str:
    """What something is, for messages."""
    if isinstance(thing, Tensor):
        return f"a tensor of {thing.dtype} and shape {tuple(thing.shape)}"
    if isinstance(thing, tuple | list | dict):
        return f"a {type(thing).__name__} of {len(thing)}"
    return f"{thing!r}"[:40] if isinstance(thing, str | int | float | None) else f"a {type(thing).__name__}"


@contextmanager
def blaming(what: str, fix: str = "") -> Iterator[None]:
    """Say of an exception in a user's code what failed, and on which line of which file.

    Raises:
        UserError: anything was raised.
        OutOfMemoryError: memory of the compute device is not enough; passes as it is.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename != __file__ and not _is_installed(f.filename)]
        at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise UserError(f"{what} failed: {type(error).__name__}: {error}{at}{f'; {fix}' if fix else ''}") from error


def _is_installed(file: str) -> bool:
    """Whether a file is of Python, of a package or of Secateur: no line that a user wrote."""
    places: tuple[str | Path, ...] = (*sysconfig.get_paths().values(), Path(__file__).parents[2])
    return not Path(file).is_file() or any(Path(file).resolve().is_relative_to(Path(p).resolve()) for p in places)
