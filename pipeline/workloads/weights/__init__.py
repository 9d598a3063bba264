"""Trained weights of a run file: found or downloaded, read without running code, and put into a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import paths
from secateur.pipeline.workloads.data.notes import some
from secateur.pipeline.workloads.weights.files import SAVE, describe, read_file
from secateur.pipeline.workloads.weights.names import Copy, alternatives, copies, faults_of, flattened, notes
from secateur.pipeline.workloads.weights.tensors import is_one_array, plain, taken, value_fault

TORCHVISION, TIMM = "torchvision", "timm"
"""``model.weights`` that are those of whoever made a network, instead of a file."""


def find_weights(weights: str | None) -> Path | None:
    """The file that ``model.weights`` of a run file names; None where it is not set.

    Raises:
        UserError: there is no such file.
    """
    return paths.find(weights, "weights file") if weights else None


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


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a weights file holds, never unpickling code: a state dict, or mappings that have some within.

    Raises:
        UserError: the file cannot be read, or holds no named tensors.
    """
    content = read_file(path)
    if isinstance(content, list | tuple):
        content = {str(i): value for i, value in enumerate(content)}
    try:
        tensors = flattened(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as weights: {error}; {SAVE}") from error
    if not isinstance(content, Mapping) or not tensors:
        raise UserError(
            f"{path} holds no state dict (a mapping of names to tensors) but {describe(content)}. Where the model was "
            f"made, save one: {SAVE}"
        )
    odd = [name for name, entry in tensors.items() if not is_one_array(entry.tensor)]
    if odd:
        raise UserError(
            f"{path} holds {number_of(len(odd), 'nested or distributed tensor(s)')} ({some(odd)}); save whole "
            f"ones: {SAVE}"
        )
    return content


def choose_weights(
    content: Mapping[str, Any], own: Mapping[str, Tensor], weights: str | None, spare: tuple[str, ...] = ()
) -> tuple[Copy, tuple[str, ...]]:
    """The tensors of a file that fit a network best, and notes on the choice.

    Averaged ones (EMA) come before trained ones that fit as well.

    Args:
        content: as ``read_weights`` gives it.
        own: the network's state dict.
        weights: what messages call the file.
        spare: beginnings of names that need not be there, or fit.

    Raises:
        UserError: several fit alike, and nothing says which is meant.
    """
    ordered = copies(flattened(content), own, spare)
    if not ordered:
        return Copy("", {}, (), ()), ()
    best = ordered[0]
    equals = [copy for copy in alternatives(ordered) if copy.rank == best.rank and not _same(copy, best)]
    if equals and not best.faults:
        named = " and ".join(repr(copy.prefix.rstrip(".")) for copy in (best, *equals))
        raise UserError(
            f"weights {weights} hold several networks that fit: {named}. Save the one that is meant: "
            f'torch.save(content[...], "weights.pt")'
        )
    return best, tuple(f"weights {weights}: {note}" for note in notes(ordered))


def fit_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    weights: str | None,
    network: str,
    *,
    held: str = "",
    classes: Sequence[str] = (),
) -> None:
    """Load a state dict strictly, in the model's precision; batch counters may be missing.

    Args:
        state: the network's names -> tensors.
        weights, network: what errors call them.
        held: what the file holds, for errors.
        classes: names of the data's classes, for errors; none where a last layer does not follow them.

    Raises:
        UserError: names, shapes or kinds of tensors differ, or values are none; lists the first ones.
    """
    own = model.state_dict()
    faults = faults_of(state, own)
    if faults:
        raise UserError(_misfit(state, own, faults, weights, network, held, classes))
    loaded = {name: taken(tensor, own[name]) for name, tensor in state.items() if name in own}
    wrong = [f"{name}: {fault}" for name, t in loaded.items() if (fault := value_fault(name, t, own[name]))]
    if wrong:
        raise UserError(
            f"weights {weights} are none of a trained network:\n  {_first(wrong)}\nThe training diverged, or the file "
            "is damaged; use an earlier checkpoint"
        )
    model.load_state_dict(loaded, strict=False)


def _misfit(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    faults: Sequence[str],
    weights: str | None,
    network: str,
    held: str,
    classes: Sequence[str],
) -> str:
    other = [name for name in own if name in state and state[name].shape != own[name].shape]
    if classes and len(other) == len(faults) and all(_of_classes(state[n], own[n], len(classes)) for n in other):
        shapes = f"{tuple(state[other[0]].shape)} in the file, {tuple(own[other[0]].shape)} in the network"
        return (
            f"weights {weights} are for {number_of(len(state[other[0]]), 'class(es)')}, the data has {len(classes)} "
            f"({some(list(classes))}); {other[0]}: {shapes}. Everything else fits network {network}. Set model.weights "
            "to weights trained for these classes, or leave it out to train a baseline"
        )
    there = sum(name in own for name in state)
    summary = f"\nThe file holds {held}" if held else ""
    return (
        f"weights {weights} do not fit network {network}:\n  {_first(faults)}{summary}\n{there} of the network's "
        f"{len(own)} tensors are there. Set model.name (and model.options) to the network they are of, or save the "
        f"state dict of this one: {SAVE}"
    )


def _of_classes(tensor: Tensor, own: Tensor, num_classes: int) -> bool:
    """Whether a tensor belongs to the same layer, which knows other classes."""
    return own.ndim == tensor.ndim > 0 and len(own) == num_classes and own.shape[1:] == tensor.shape[1:]


def _first(faults: Sequence[str]) -> str:
    more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
    return "\n  ".join(faults[:5]) + more


def _same(a: Copy, b: Copy) -> bool:
    """Whether two copies are equal, value by value."""
    return a.tensors.keys() == b.tensors.keys() and all(
        t.dtype == b.tensors[n].dtype and torch.equal(*(plain(x) for x in (t, b.tensors[n])))
        for n, t in a.tensors.items()
    )
