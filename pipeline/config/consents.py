"""Consent to run code, as it is kept: under ``SECATEUR_HOME/trust``, a record for every folder, with mode 0600.

Each record is sealed (HMAC-SHA256) with a key of this user that lies elsewhere, in the folder of configurations: a
folder that brings a ``.secateur`` along brings no consent. What others can write gets none.
"""

from __future__ import annotations

import errno
import grp
import hashlib
import hmac
import json
import os
import pwd
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from secateur.device_profiles.wording import command, printable
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.files import write_whole
from secateur.pipeline.surroundings import HOME, folder, home, made

GROUP_ACL = "system.posix_acl_access"


@dataclass(frozen=True, order=True)
class Entry:
    """Something that names code.

    Args:
        place: where it stands: ``workload.model.name``, or ``connect.python`` of a device.
        text: exactly what would run.
        root: the folder that the module is imported from; empty for other entries.
    """

    place: str
    text: str
    root: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Found:
    """The entries of one file that name code.

    Args:
        file: the run file or device profile.
        others: further files that decide what runs: the module, the program, the SSH configuration.
    """

    file: Path
    entries: tuple[Entry, ...]
    others: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """Whose consent is asked."""
        return self.file.absolute().parent.resolve()


def written(entry: Entry) -> list[str]:
    return [entry.place, entry.text, entry.root]


def kept(folder_: Path) -> set[Entry]:
    """What there is consent for in a folder; nothing where the record is damaged or not this user's."""
    try:
        record = json.loads(_record(folder_).read_text(encoding="utf-8"))
        content, seal = record["content"], record["seal"]
        ours = hmac.compare_digest(str(seal).encode(), _seal(content, _key()).encode())
        return {Entry(*entry) for entry in content["entries"]} if ours and content["folder"] == str(folder_) else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def keep(code: Found) -> None:
    """Keep consent for a file's entries, beside what its folder has already.

    Raises:
        SurroundingsError: it cannot be written.
    """
    entries = sorted(kept(code.folder) | set(code.entries))
    content = {"folder": str(code.folder), "entries": [written(entry) for entry in entries]}
    file = _record(code.folder)
    made(home(), HOME)
    file.parent.mkdir(exist_ok=True, mode=0o700)
    write_whole(file, json.dumps({"content": content, "seal": _seal(content, _made_key())}, indent=2) + "\n")
    file.chmod(0o600)


def forget(folder_: Path) -> bool:
    """Take back the consent for a folder; whether there was any."""
    there = bool(kept(folder_.resolve()))
    _record(folder_.resolve()).unlink(missing_ok=True)
    return there


def _record(folder_: Path) -> Path:
    return home() / "trust" / f"{hashlib.sha256(os.fsencode(folder_)).hexdigest()[:32]}.json"


def _seal(content: object, key: bytes) -> str:
    return hmac.new(key, json.dumps(content, sort_keys=True).encode(), "sha256").hexdigest()


def _key_file() -> Path:
    configuration = folder("XDG_CONFIG_HOME", Path("~/.config").expanduser())
    assert configuration is not None
    return configuration / "secateur" / "trust.key"


def _key() -> bytes:
    """This user's key, which no folder of somebody else's can know.

    Raises:
        OSError: there is none, or others can read it.
    """
    file = _key_file()
    about, key = file.stat(), file.read_bytes()
    if about.st_uid != os.geteuid() or about.st_mode & 0o077 or len(key) != 32:
        raise PermissionError(errno.EPERM, f"not 32 bytes of this user's alone; remove it ({command('rm', file)})")
    return key


def _made_key() -> bytes:
    """The same, made where there is none.

    Raises:
        SurroundingsError: it cannot be.
    """
    file = _key_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileExistsError):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(opened, secrets.token_bytes(32))
            os.close(opened)
        return _key()
    except OSError as error:
        raise SurroundingsError(
            f"consent cannot be kept: {printable(file)}: {error.strerror}, or set XDG_CONFIG_HOME to a folder of yours"
        ) from error


def refuse_what_others_write(code: Found) -> None:
    """See that only this user and root decide what is run.

    Raises:
        UserError: somebody else can write a file, its folder or one above; says which, and how to change that.
    """
    for file in (code.file, *code.others):
        for path in dict.fromkeys([file.absolute(), file.resolve()]):
            for part in (path, *path.parents):
                if _others_write(part, is_above=part not in (path, path.parent)):
                    raise UserError(
                        f"{printable(code.file)} names code ({code.entries[0]}), and others than you can write "
                        f"{printable(part)}, so that they could change what runs. See whose it is with "
                        f"`{command('ls', '-ld', part)}`; if it is to be yours alone: "
                        f"`{command('chmod', 'go-w', part)}`"
                    )


def _others_write(path: Path, is_above: bool) -> bool:
    """Whether somebody other than this user and root can write a file or folder.

    Args:
        is_above: it is a folder above the file's own: where it is sticky, nobody can exchange what belongs to others.
    """
    try:
        about = path.stat()
    except OSError:
        return False
    if about.st_uid not in (0, os.geteuid()):
        return True
    if is_above and about.st_mode & stat.S_ISVTX:
        return False
    if about.st_mode & stat.S_IWOTH:
        return True
    return bool(about.st_mode & stat.S_IWGRP) and not _is_own_group(path, about.st_gid)


def _is_own_group(path: Path, number: int) -> bool:
    """Whether a group has this user alone, as many systems make one for every user; and nothing else is said."""
    with suppress(OSError, KeyError):
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
        alone = (group.gr_name, group.gr_gid) == (user.pw_name, user.pw_gid) and set(group.gr_mem) <= {user.pw_name}
        return alone and GROUP_ACL not in os.listxattr(path)
    return False
