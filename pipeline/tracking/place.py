"""Where MLflow is, and how it is called to people; nothing here needs MLflow itself."""

from __future__ import annotations

from pathlib import Path

from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.errors import masked
from secateur.pipeline.surroundings import HOME, TRACKING_URI, folder, variable

SQLITE = "sqlite:///"
SERVER = ("http://", "https://")


def store_uri(section: TrackingSection, home: Path) -> str:
    """Where MLflow is: ``tracking.uri`` of the run file, ``SECATEUR_TRACKING_URI``, or SQLite under ``home``."""
    return section.uri or variable(TRACKING_URI) or f"{SQLITE}{(home / 'mlflow.db').absolute()}"


def redacted(uri: str) -> str:
    """An address without the password in it, for people, logs and journals."""
    return masked(uri)


def first_line(error: BaseException) -> str:
    """What an error says, in one line without secrets."""
    return masked((str(error).splitlines() or [type(error).__name__])[0][:300])


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None where ``uri`` names no such file.

    What follows a ``?`` is for SQLite's driver (``sqlite:///x.db?timeout=30``) and no part of the name.
    """
    scheme, separator, rest = uri.partition(":///")
    if not separator or scheme.partition("+")[0] != "sqlite":
        return None
    name = rest.partition("?")[0]
    return None if name in ("", ":memory:") or name.startswith("file:") else Path(name)


def no_store(file: Path) -> str:
    """What is said where a store is looked for to be read, and there is none."""
    home = folder(HOME, ".secateur")
    because = ""
    if file.absolute().parent == home:
        because = f" ({HOME} is {home})" if variable(HOME) else f" ({HOME} is not set, which means {home})"
    return (
        f"there is no MLflow store at {file}{because}, and none is made to be read. Set {HOME} to the one that the run "
        f"was made with, or name its store with --uri or {TRACKING_URI}"
    )


def equals(key: str, text: str) -> str:
    """A condition of MLflow's searches for a text with any characters; what it finds has to be compared all the same.

    MLflow knows no escapes: a text with both kinds of quotes is searched with any character in the place of one kind.
    """
    if "'" not in text:
        return f"{key} = '{text}'"
    if '"' not in text:
        return f'{key} = "{text}"'
    return f"{key} LIKE '{text.replace(chr(39), '_')}'"
