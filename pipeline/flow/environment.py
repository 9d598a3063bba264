"""Settings of Prefect that have to be made before it is imported."""

from __future__ import annotations

import os
from pathlib import Path

from secateur.pipeline.surroundings import HOME, home, made, prepare


def runtime_env(directory: Path | None = None, debug: bool = False) -> None:
    """Settings of the embedded Prefect, to be made before it is imported; the user's own settings win.

    Args:
        directory: of the run, where results are kept.

    Raises:
        UserError: a variable names the folder of a user that is not there.
        SurroundingsError: ``PREFECT_HOME`` or ``SECATEUR_HOME`` cannot be used.
    """
    prepare()
    defaults = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_LOGGING_LEVEL": "INFO",  # its server gets these lines, the terminal only to debug (see `logs`)
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING" if debug else "CRITICAL",  # it complains when it is stopped with us
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "PREFECT_HOME" not in os.environ:
        os.environ["PREFECT_HOME"] = str(made(home(), HOME) / "prefect")
    made(Path(os.environ["PREFECT_HOME"]), "PREFECT_HOME")
    if directory is not None:
        os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] = str(directory.absolute() / "stages")
