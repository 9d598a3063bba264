"""What the environment says: variables that are set and say nothing count as unset, and this machine needs no proxy.

Everything that reads a folder or an address from the environment does it here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from secateur.pipeline.errors import SurroundingsError, UserError

HOME, DATA, LOCKS, TRACKING_URI = "SECATEUR_HOME", "SECATEUR_DATA", "SECATEUR_LOCKS", "SECATEUR_TRACKING_URI"
FOLDERS = (
    *(HOME, DATA, LOCKS, "PREFECT_HOME", "TORCH_HOME", "TMPDIR"),
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"),
)
"""Variables that name a folder."""
FAMILIES = ("SECATEUR_", "PREFECT_", "MLFLOW_")
OTHERS = ("HOME", "TEMP", "TMP", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""More variables that mean nothing when they are empty, to whoever reads them. (``CUDA_VISIBLE_DEVICES=`` means no
GPU.)"""
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""How threads of OpenMP wait for each other."""
BUSY_PERCENT, FEW_TURNS = 20.0, "1000"
"""Of the last minute in which something waited for a core, from which on a machine is busy; and how often a thread then
looks whether the others are there before it sleeps (by default 300,000 times)."""
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def variable(name: str) -> str | None:
    """What a variable says; None where it is unset or empty."""
    return os.environ.get(name, "").strip() or None


def folder(name: str, default: str | Path | None = None) -> Path | None:
    """The folder that a variable names, or the default.

    Raises:
        UserError: it begins with ``~USER``, and there is no such user.
    """
    given = variable(name)
    if given is None:
        return None if default is None else Path(default).absolute()
    return expanded(given, name).absolute()


def expanded(path: str | Path, what: str) -> Path:
    """A path with the home of a user in place of ``~`` or ``~USER``.

    Args:
        what: where the path comes from, for the error.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise UserError(f"{what} is {path}: there is no user {user[1:]!r} here; write the whole path") from error


def home() -> Path:
    """Where Secateur keeps runs, trained baselines and the embedded stores: ``SECATEUR_HOME``, or ``.secateur``."""
    found = folder(HOME, ".secateur")
    assert found is not None
    return found


def made(path: Path, name: str) -> Path:
    """A folder that a variable names, made where there is none.

    Raises:
        SurroundingsError: it is something else, or cannot be made or written in; names the variable.
    """
    said = f"{name} is {path}" if variable(name) else f"{name} is not set, which means {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise SurroundingsError(f"{said}: {_file_of(path)} is a file; set {name} to a folder") from error
    except OSError as error:
        raise SurroundingsError(
            f"{said}: it cannot be made ({error.strerror}); set {name} to a folder that can"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SurroundingsError(f"{said}: nothing may be written there; set {name} to a folder of yours")
    return path


def _file_of(path: Path) -> Path:
    """The part of a path that is there and is no folder."""
    return next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path)


def prepare() -> None:
    """Let every library see the environment as Secateur does; called before any of them is imported.

    Raises:
        UserError: a variable that names a folder begins with ``~USER``, and there is no such user.
    """
    for name in [*FOLDERS, *OTHERS, *(n for n in os.environ if n.startswith(FAMILIES))]:
        if name in os.environ and variable(name) is None:
            del os.environ[name]
    for name in FOLDERS:
        if (given := variable(name)) is not None and given.startswith("~"):
            os.environ[name] = str(expanded(given, name))
    reach_this_machine()
    spare_a_busy_machine()


def spare_a_busy_machine(pressure: Path = Path("/proc/pressure/cpu")) -> None:
    """Where cores are wanted by others, have PyTorch's threads sleep soon when they wait for each other.

    By default they go on looking, on the core that the one they wait for would need. On a machine of their own that is
    a little quicker, so nothing is changed there, nor where somebody has said how threads are to wait.

    Args:
        pressure: the kernel's file of how long processes waited for a core; without it a machine counts as idle.
    """
    if not any(map(variable, WAITING)) and _waited_percent(pressure) >= BUSY_PERCENT:
        os.environ["GOMP_SPINCOUNT"] = FEW_TURNS


def _waited_percent(pressure: Path) -> float:
    """Share of the last minute in which something waited for a core."""
    try:
        found = re.search(r"^some .*\bavg60=([\d.]+)", pressure.read_text(encoding="ascii"), re.MULTILINE)
        return float(found[1]) if found else 0.0
    except (OSError, ValueError):
        return 0.0


def reach_this_machine() -> None:
    """See that no proxy is asked for this machine's own servers; what else ``NO_PROXY`` says stays.

    Prefect's embedded server is reached over HTTP: a proxy, as every company has one, would not find it, and a run
    would end after four minutes without a word about the proxy.
    """
    given = {name: os.environ[name] for name in ("no_proxy", "NO_PROXY") if variable(name)}
    for name in ("no_proxy", "NO_PROXY"):  # where both are set, the first one counts; where one is, it must go on to
        os.environ[name] = _with_this_machine(given.get(name) or next(iter(given.values()), ""))


def _with_this_machine(hosts: str) -> str:
    known = [host.strip() for host in hosts.split(",") if host.strip()]
    if "*" in known:
        return hosts
    return ",".join(_without_repeats([*known, *THIS_MACHINE]))


def _without_repeats(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
