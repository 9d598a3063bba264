"""A tensor of a weights file beside the network's own: may it take its place, and what it is worth then."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_one_array(tensor: Tensor) -> bool:
    """Whether a tensor is one array of numbers with a shape, and not a nested or distributed one."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and not tensor.is_nested


def kind_fault(tensor: Tensor, own: Tensor) -> str:
    """Why a tensor cannot take the place of the network's own, whatever its values; empty = it can.

    Args:
        tensor: of the file.
        own: of the network, same name.
    """
    if tensor.shape != own.shape:
        return f"{tuple(tensor.shape)} in the file, {tuple(own.shape)} in the network"
    if tensor.is_meta:
        return "a tensor of the meta device in the file, which has a shape and no values"
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or (own.is_floating_point() and tensor.dtype not in FLOATS):
        return f"{kind} in the file; expected float32, float16, bfloat16 or float64, so save it before quantisation"
    if tensor.is_complex() and not own.is_complex():
        return f"{kind} in the file, {str(own.dtype).removeprefix('torch.')} in the network"
    return ""


def taken(tensor: Tensor, own: Tensor) -> Tensor:
    """The tensor in the network's precision, dense, on the CPU; ``kind_fault`` has found nothing."""
    return plain(tensor).to(own.dtype)


def plain(tensor: Tensor) -> Tensor:
    """The same as a dense tensor without a history."""
    return tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()


def value_fault(name: str, tensor: Tensor, own: Tensor) -> str:
    """Why values cannot be a network's; empty = they can.

    Args:
        name: of the tensor in the network.
        tensor: as ``taken`` gives it.
        own: of the network as it begins: where that has infinities (masks, say), they are no fault.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong and bool(torch.isfinite(own).all()):
            return f"{wrong:,} of {tensor.numel():,} values are NaN or infinite"
    if name.endswith("running_var") and bool((tensor < 0).any()):
        return "variances below 0"
    return ""
