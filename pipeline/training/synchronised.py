"""Batch norm over the whole batch of several GPUs, for the length of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.errors import UserError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""What ``SyncBatchNorm`` computes like; classes made of these may do more."""


def check_synchronised(recipe: Recipe, compute: torch.device, compute_count: int) -> None:
    """See that batch norm is synchronised only where there is something to synchronise.

    Raises:
        UserError: PyTorch's ``SyncBatchNorm`` is for several processes, each on a GPU.
    """
    if not recipe.sync_batchnorm:
        return
    if compute.type != "cuda":
        raise UserError("PyTorch's SyncBatchNorm runs on GPUs only, and this run trains on the CPU; leave it out")
    if compute_count == 1:
        raise UserError(
            "joins the batch norm of several GPUs, and one trains here; set compute_count to how many there are, or "
            "leave it out"
        )


def check_norms(network: nn.Module) -> None:
    """See that every batch norm of a network is one that can be synchronised.

    Raises:
        UserError: some are of a class of their own, whose forward pass ``SyncBatchNorm`` does not know.
    """
    own = {name: module for name, module in network.named_modules() if _is_of_its_own(module)}
    if own:
        name, module = next(iter(own.items()))
        raise UserError(
            f"{name} is a {type(module).__name__}, a batch norm of a class of its own, which PyTorch's SyncBatchNorm "
            f"cannot stand for; leave it out"
        )


def _is_of_its_own(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and type(module) not in (*PLAIN, nn.SyncBatchNorm)


@contextlib.contextmanager
def synchronised(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block batch norms take their statistics over the batches of all processes.

    Modules, tensors, names and hooks are the same objects, within and afterwards; torch's own
    ``convert_sync_batchnorm`` makes new modules, which lose hooks, and has no way back.

    Args:
        wanted: False = nothing is changed.
    """
    before = {module: type(module) for module in network.modules() if wanted and type(module) in PLAIN}
    for module in before:
        module.__class__ = nn.SyncBatchNorm
        vars(module)["process_group"] = None  # that of all processes
    try:
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind
            del vars(module)["process_group"]
