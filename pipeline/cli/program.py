"""The program ``secateur``: signals are its own from the first import on."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from typing import NoReturn

from secateur.pipeline.cli import interrupts
from secateur.pipeline.errors import EXIT_USER


def run_program() -> NoReturn:
    """Perform the command of this command line, and exit as it says, or as a signal says.

    Raises:
        ModuleNotFoundError: a package is missing that no part of Secateur brings.
    """
    debug = "--debug" in sys.argv
    interrupts.current = stop = interrupts.Interrupts(quiet=not debug).install()
    try:
        if not debug:
            keep_libraries_quiet()
        from secateur.pipeline import children, parts

        gc.disable()  # nothing of what imports make is garbage
        try:
            from secateur.pipeline.cli import app as cli
        except ModuleNotFoundError as error:
            if (part := parts.missing(error)) is None:
                raise
            os.write(2, f"Error: {part}\n".encode())  # what else prints is not installed
            sys.exit(EXIT_USER)
        finally:
            gc.enable()
        stop.last = children.end_all
        cli.main()
    except BaseException:
        if not stop.stopping:
            raise
    stop.leave()


def keep_libraries_quiet() -> None:
    """No log line and no traceback of a library reaches the terminal: what a user has to know is a message of ours."""
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None


if __name__ == "__main__":
    run_program()
