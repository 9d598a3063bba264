"""Lines of the model's own code: what runs now, and where an exception comes from."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from typing import Any

import torch

HERE = f"{Path(__file__).parent}/"
TORCH = f"{Path(torch.__file__).parent}/"

BETWEEN = tuple(f"/site-packages/{name}/" for name in ("einops", "einx", "opt_einsum", "numpy", "jaxtyping"))
"""Libraries that a model calls to rearrange tensors: the line that calls them is the one to name."""


def running_line() -> str:
    """The line of the model's code that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None and is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else describe(frame.f_code.co_filename, frame.f_lineno)


def line_of(error: Exception) -> str:
    """The innermost line of the model's code in a traceback, and the message."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if not is_foreign(code.co_filename):
            found = describe(code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return f"{found} ({error})"


def is_foreign(filename: str) -> bool:
    """Whether a file is torch's, ours or of a library between, not the model's."""
    return filename.startswith((HERE, TORCH, "<")) or any(part in filename.replace("\\", "/") for part in BETWEEN)


def describe(filename: str, line: int) -> str:
    """File, number and text of a line."""
    return f"{Path(filename).name}:{line} `{linecache.getline(filename, line).strip()}`"
