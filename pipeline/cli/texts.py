"""What libraries log and warn: without secrets, and shown so that it can do nothing, whichever handler writes it.

MLflow's, Prefect's and PyTorch's own handlers write to the terminal past ``terminal.py``. So a text is made harmless
where it is made, in the record, before any handler sees it.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from typing import Any

from secateur.device_profiles.wording import printable, printable_lines
from secateur.pipeline.errors import masked


def harmless(text: object) -> str:
    """A text of others for a terminal: no secrets and no control characters; line breaks stay."""
    return printable_lines(masked(str(text)))


def make_logs_harmless() -> None:
    """From now on every log record and every warning of this process is ``harmless``."""
    logging.setLogRecordFactory(HarmlessRecord)
    warnings.formatwarning = _warning


class HarmlessRecord(logging.LogRecord):
    """A record of a log whose message and traceback can be shown."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.name = printable(self.name)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = harmless("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")
        if self.stack_info:
            self.stack_info = harmless(self.stack_info)

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return harmless(super().getMessage())


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{printable(filename)}:{lineno}: {category.__name__}: {harmless(message)}\n"
