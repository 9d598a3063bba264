"""Weights files of others, read without running code; what one holds, in words."""

from __future__ import annotations

import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from secateur.device_profiles.wording import cut, number_of, printable, shown
from secateur.pipeline.archives import check_archive
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data.notes import some

SAVE = 'torch.save(model.state_dict(), "weights.pt")'
OTHERS: Mapping[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"<": "a web page or XML, so the download failed; download it again, and look at it",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"(\xb5/\xfd": "compressed by zstd; unpack it first",
    b"\x89HDF": f"an HDF5 file (Keras), not PyTorch's; write a state dict: {SAVE}",
    b"\x93NUMPY": "a NumPy array; write a mapping of names to tensors with torch.save",
    b"GGUF": f"a GGUF file; write a state dict: {SAVE}",
    b"{": "JSON (perhaps the index of a file in parts); join the parts: load each and save one state dict",
}
"""First bytes of files that are sometimes taken for weights -> what they are, and what to do."""
MODULES = ("models/model.json", "archive_format")
UNKNOWN = re.compile(r"Unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)|Unsupported class (\S+)")


class Inert:
    """Stands for an object of a checkpoint that is no tensor (a namespace of arguments, a path); it keeps nothing."""

    def __new__(cls, *_: object) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    "_codecs.encode",
    *(f"datetime.{name}" for name in ("datetime", "date", "timedelta")),
)
"""What trainers often save beside weights. None of it is made: ``Inert`` takes its place."""


def read_file(path: Path) -> object:
    """What a weights file holds: mappings, lists, tensors and plain values; nothing in it is run.

    The content says what the file is, not its name: safetensors, or what ``torch.save`` writes, today or before 1.6.

    Raises:
        UserError: it cannot be read; says what it is and what to do.
    """
    _check_plain(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if _is_safetensors(path, start):
            from safetensors.torch import load_file

            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        _check_others(path, start)
        check_archive(path, "torch.save compresses nothing, so this is none of its files", compressed=False)
        inert = torch.serialization.safe_globals([(Inert, name) for name in HARMLESS])
        with path.open("rb") as file, warnings.catch_warnings(), inert:  # torch.load would go by a path's suffix
            warnings.simplefilter("ignore")
            content: object = torch.load(file, map_location="cpu", weights_only=True)
            return content
    except Exception as error:  # safetensors and torch raise many kinds for a foreign file
        if isinstance(error, MemoryError | UserError):
            raise
        raise _refusal(path, error) from error


def describe(content: object) -> str:
    """What a file holds at its top, in one line.

    Args:
        content: as ``read_file`` gives it.
    """
    if not isinstance(content, Mapping):
        return kind_of(content)
    if not content:
        return "an empty mapping"
    tensors = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)]
    others = [f"{_key(key)} ({kind_of(value)})" for key, value in content.items() if key not in set(tensors)]
    parts = [f"{number_of(len(tensors), 'tensor(s)')} ({some([_key(t) for t in tensors])})"] if tensors else []
    return "; ".join([*parts, some(others, 8)] if others else parts)


def kind_of(value: object) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, Inert):
        return "an object"
    if isinstance(value, Mapping):
        tensors = sum(isinstance(inner, Tensor) for inner in value.values())
        odd = "" if all(isinstance(key, str) for key in value) else ", keys that are no text"
        return f"mapping of {len(value):,}, {tensors:,} of them tensors{odd}" if value else "empty mapping"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value):,}"
    return type(value).__name__


def _key(key: object) -> str:
    return cut(printable(key)) if isinstance(key, str) else f"{shown(key)}, a key of kind {type(key).__name__}"


def _check_plain(path: Path) -> None:
    """A file with something in it, that fits into memory."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {error.strerror}; correct the path or its permissions") from error
    if stat.S_ISDIR(found.st_mode):
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        hint = f"name a file in it: {some([printable(name) for name in inside])}" if inside else "name a file"
        raise UserError(f"cannot read weights {path}: it is a folder; {hint}")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"cannot read weights {path}: it is no regular file; name one")
    if not found.st_size:
        raise UserError(f"cannot read weights {path}: the file is empty; copy or download it again")
    free = psutil.virtual_memory().available
    if found.st_size > free:
        raise UserError(
            f"{path} would take {found.st_size:,} bytes of memory and {free:,} are free; use a machine with more"
        )


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Whether to read it so: by the name, unless it begins like a file of torch.save; or by the content."""
    if path.suffix == ".safetensors":
        return not start.startswith((b"PK\x03\x04", b"\x80\x02")) and not any(
            start.startswith(magic) for magic in OTHERS
        )
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _check_others(path: Path, start: bytes) -> None:
    """Files of other kinds, by their first bytes; programs in zip files."""
    for magic, what in OTHERS.items():
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(magic):
            raise UserError(f"cannot read weights {path}: it is {what}")
    if not start.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read weights {path}: it is cut short or damaged ({error}); copy or download it again"
        ) from error
    if "constants.pkl" in names:
        how = 'torch.save(torch.jit.load(FILE).state_dict(), "weights.pt")'
    elif names & {*MODULES}:
        how = 'torch.save(torch.export.load(FILE).state_dict, "weights.pt")'
    else:
        return
    raise UserError(
        f"cannot read weights {path}: it holds a program (TorchScript, torch.export), and none is run; {how}"
    )


def _refusal(path: Path, error: Exception) -> UserError:
    text = str(error)
    found = UNKNOWN.search(text)
    if found:
        name = cut(printable(next(filter(None, found.groups()))))
        return UserError(
            f"cannot read weights {path}: it holds objects of {name}, which would run code, and that is never done. "
            f"Where the model was made, save its state dict: {SAVE}"
        )
    said = printable(text.splitlines()[0]) if text else type(error).__name__
    if "weights_only" in said:  # torch's advice to read it in another way, which would run code
        said = "it is neither safetensors nor what torch.save writes"
    return UserError(
        f"cannot read weights {path}: {said}; expected a state dict. It is damaged or of another kind: copy or "
        f"download it again, or write {SAVE}"
    )
