"""Exceptions of Python and of libraries as messages: the one place where it is decided what is no bug.

A full disk, a path that is not there, a name that is no UTF-8, too little memory: these come out of any line of code,
and mean something to a user. Everything else that is not one of our own errors is a bug, and stays one: it is never
hidden behind a message.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from secateur.pipeline import parts
from secateur.pipeline.errors import EXIT_BUG, EXIT_SURROUNDINGS, EXIT_USER, SurroundingsError, UserError, masked

MISTAKES: Mapping[int, str] = {
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "a part of the path is a file; correct the path",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "its links lead in a circle; name the file itself",
    errno.EEXIST: "choose another name, or remove it",
    errno.ENOTEMPTY: "choose another folder, or empty it",
}
"""Errors that a path causes -> what to do about it."""

FAILURES: Mapping[int, str] = {
    errno.EACCES: "give this user the right to it (`ls -ld` shows whose it is), or use another place",
    errno.EPERM: "give this user the right to it (`ls -ld` shows whose it is), or use another place",
    errno.EROFS: "use a place that can be written",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space; this user's quota is used up",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), or use another file system",
    errno.EIO: "the disk or the network share fails; look at its log",
    errno.ESTALE: "the network share was replaced; mount it again",
    errno.EBUSY: "something else uses it; end that",
    errno.ETXTBSY: "something else uses it; end that",
    errno.ENOMEM: "free some memory",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "this machine has too many files open; end other programs",
    errno.EAGAIN: "raise the limit on processes (`ulimit -u`), or end other programs",
    errno.ENODEV: "connect the device again",
    errno.ENXIO: "connect the device again",
}
"""Errors of the surroundings -> what to do about it."""

MEMORY = (
    "there is not enough memory. Make batch_size, search.memory_mb or the images smaller, use fewer workers, or a "
    "machine with more"
)
OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc|failed to allocate", re.I)
LOST_READER = re.compile(r"DataLoader worker .*(killed|exited)")
FEWER_READERS = "there may be too little memory: lower num_workers or cache_mb in the recipe"
FULL_DISK = re.compile(r"No space left on device|os error 28|Disk quota exceeded|PytorchStreamWriter failed writing")
NETWORK = (ConnectionError, TimeoutError, socket.gaierror, socket.herror)
PARSERS = ("json", "yaml", "xml")
"""Packages of Python and others that read nested text, and give up with a RecursionError."""


def expected(error: BaseException) -> Exception | None:
    """The error as one that means something to a user; None = it is a bug."""
    from secateur.device_profiles.errors import DeviceError
    from secateur.export.errors import ExportError

    if isinstance(error, UserError | SurroundingsError | DeviceError | ExportError):
        return error
    if (part := parts.missing(error)) is not None:
        return UserError(part)
    if isinstance(error, MemoryError):
        return SurroundingsError(MEMORY)
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, RecursionError):
        return _of_a_parser(error)
    if isinstance(error, UnicodeEncodeError):
        name = ascii(error.object[max(0, error.start - 40) : error.end + 20])
        return UserError(f"{name} is no text that can be written as {error.encoding}; rename it with other characters")
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"a file that should be text in {error.encoding} is none: {error}; write it in UTF-8")
    return _of_a_library(error)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Errors within mean something to a user, or are bugs: what the first ones mean is raised in their place."""
    try:
        yield
    except Exception as error:
        meant = expected(error)
        if meant is None or meant is error:
            raise
        raise meant from error


def exit_code(error: BaseException) -> int:
    """Which exit code an error means (see ``secateur.pipeline.errors``)."""
    from secateur.export.errors import ExportError

    meant = expected(error)
    if meant is None:
        return EXIT_BUG
    if isinstance(meant, UserError | ExportError):
        return EXIT_USER
    return EXIT_SURROUNDINGS


def _of_the_system(error: OSError) -> Exception | None:
    if _is_of_the_network(error) and str(error):
        return SurroundingsError(f"the network failed: {_reason(error)}; see whether the server can be reached")
    place, number = error.filename, error.errno or 0
    if place is None:
        return _of_no_file(error)
    if number in MISTAKES and not _is_our_own(place):
        return UserError(f"{_shown(place)}: {_reason(error)}; {MISTAKES[number]}")
    if number in FAILURES:
        return SurroundingsError(f"{_shown(place)}: {_reason(error)}; {FAILURES[number]}")
    return None


def _is_of_the_network(error: BaseException) -> bool:
    ssl = sys.modules.get("ssl")  # takes long to import, and whoever raises its error has done that
    return isinstance(error, NETWORK) or (ssl is not None and isinstance(error, ssl.SSLError))


def _of_no_file(error: OSError) -> Exception | None:
    """A system's error that names no file."""
    if isinstance(error, FileNotFoundError):
        if "temporary directory" in str(error):
            return SurroundingsError(f"{_reason(error)}; set TMPDIR to a folder that can be written")
        try:
            Path.cwd()
        except OSError:
            return UserError("the current folder does not exist any more; change to another one")
        return None
    number = error.errno or 0
    if number in FAILURES and number not in (errno.EPERM, errno.EACCES):
        return SurroundingsError(f"{_reason(error)}; {FAILURES[number]}")
    return None


def _is_our_own(place: object) -> bool:
    """Whether a path is that of a part of Secateur or Python, which nobody gave us."""
    if not isinstance(place, str | bytes):
        return False
    path = Path(place.decode(errors="surrogateescape") if isinstance(place, bytes) else place).absolute()
    package = Path(__file__).absolute().parent
    return any(path.is_relative_to(own) for own in (package, *(Path(p) / "lib" for p in (sys.prefix, sys.base_prefix))))


def _of_a_parser(error: RecursionError) -> Exception | None:
    """A recursion that ends within a parser is a text nested without end, any other one is a bug."""
    innermost = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-3:]
    if any(str(name).split(".")[0] in PARSERS for name in innermost):
        return UserError("a file is nested deeper than any that was written by hand; it is damaged, or no such file")
    return None


def _of_a_library(error: BaseException) -> Exception | None:
    """Errors of libraries, known by their kind; nothing is imported to look."""
    kinds = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    text = str(error)
    if "torch.OutOfMemoryError" in kinds or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)):
        return SurroundingsError(MEMORY)
    if isinstance(error, RuntimeError) and LOST_READER.search(text):
        return SurroundingsError(f"a process that reads training images died ({_reason(error)}); {FEWER_READERS}")
    if isinstance(error, RuntimeError | ValueError) or kinds & {"safetensors.SafetensorError", "sqlite3.Error"}:
        if FULL_DISK.search(text):
            return SurroundingsError(f"{_reason(error)}; free some space")
        if "Could not determine home directory" in text:
            return UserError("a path begins with ~ and a name, and there is no such user here; write the whole path")
    if kinds & {"sqlite3.OperationalError", "sqlite3.DatabaseError", "sqlalchemy.SQLAlchemyError"}:
        return SurroundingsError(f"a database failed: {_reason(error)}; see whether its file can be written")
    if kinds & {"httpx.HTTPError"}:
        return SurroundingsError(f"a server does not answer: {_reason(error)}; see whether it can be reached")
    return None


def _reason(error: BaseException) -> str:
    strerror = getattr(error, "strerror", None)
    return masked(str(strerror or error).splitlines()[0] if str(strerror or error) else type(error).__name__)


def _shown(place: object) -> str:
    from secateur.device_profiles.wording import printable

    return printable(place.decode(errors="surrogateescape") if isinstance(place, bytes) else place)
