"""Trained weights of a run file: found or downloaded, read without running code, and put into a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from pipeline.archives import check_archive
from pipeline.errors import UserError
from pipeline.workloads.data import paths

TORCHVISION = "torchvision"
"""``model.weights`` that are torchvision's own for a network, instead of a file."""


def find_weights(weights: str | None, address: Callable[[], str]) -> Path | None:
    """The file that ``model.weights`` of a run file means; None where it is not set.

    Args:
        weights: a path, or ``torchvision``.
        address: of torchvision's weights for the network; asked for those only.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    if not weights:
        return None
    return download(address()) if weights == TORCHVISION else paths.find(weights, "weights file")


def download(address: str) -> Path:
    """A state dict's file in torch's cache (``TORCH_HOME``), downloaded and compared with its hash if it is not there.

    Raises:
        UserError: it cannot be downloaded; says where to put it.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(urlsplit(address).path).name
    if path.exists():
        return path
    try:
        torch.hub.load_state_dict_from_url(address, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"cannot download torchvision's weights from {address}: {error}; download that file elsewhere and put it "
            f"at {path}, or set model.weights to a file"
        ) from error
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file (.safetensors, or what ``torch.save`` wrote), never unpickling code.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        check_archive(path, "torch.save compresses nothing, so this is none of its files", compressed=False)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise many kinds for a foreign file
        if isinstance(error, MemoryError | UserError):
            raise
        raise UserError(f"cannot read weights {path}: {str(error).splitlines()[0]}; expected a state dict") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict (a mapping of names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], weights: str | None, network: str) -> None:
    """Load a state dict strictly, in the model's precision; batch counters may be missing.

    Args:
        weights, network: what errors call them.

    Raises:
        UserError: names or shapes differ; lists the first ones.
    """
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    faults = [f"{name}: not in the file" for name in own if name not in state and name not in counters]
    faults += [f"{name}: not in the network" for name in state if name not in own]
    faults += [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        listing = "\n  ".join(faults[:5])
        raise UserError(f"weights {weights} do not fit network {network}:\n  {listing}{more}")
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()}, strict=False)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
