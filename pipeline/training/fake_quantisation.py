"""Trainings that know how the network will be rounded: layers compute with the 8-bit steps of the file that ships.

Inputs, weights and outputs of every layer are rounded in the forward pass, with the ranges of the int8 template, which
the file keeps; in the backward pass rounding is not there, and what was clipped learns nothing (the straight-through
estimator; Jacob et al. 2018, arXiv 1712.05877). A weight has one scale for each filter, which is the same whether the
batch norm behind it is folded in before or after rounding. Sums of branches are not rounded by themselves: what reads
them is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.export.quantised import LayerSteps, Steps


@contextlib.contextmanager
def fake_quantised(network: nn.Module, layers: Sequence[LayerSteps]) -> Iterator[int]:
    """While the context lasts, a network's convolutions and linear layers compute with 8-bit steps.

    Its parameters, buffers and their names stay; copies made meanwhile compute alike. Yields how many layers do.

    Args:
        layers: of the unpruned network; those that this one does not have are left out.
    """
    modules, handles, changed = dict(network.named_modules()), [], list[nn.Module]()
    for layer in layers:
        module, norm = modules.get(layer.weight.removesuffix(".weight")), modules.get(layer.norm)
        if not isinstance(module, nn.Conv2d | nn.Linear) or "forward" in vars(module):
            continue
        vars(module)["forward"] = partial(_forward, module, layer)
        changed.append(module)
        if layer.output is not None:
            behind = norm if layer.norm and norm is not None else module
            handles.append(behind.register_forward_hook(partial(_round_output, layer.output)))
    try:
        yield len(changed)
    finally:
        for handle in handles:
            handle.remove()
        for module in changed:
            del vars(module)["forward"]


def rounded(values: Tensor, steps: Steps) -> Tensor:
    """Numbers as 8 bits hold them, in their own type; the gradient passes where nothing is clipped."""
    found = torch.fake_quantize_per_tensor_affine(values.float(), steps.scale, steps.zero, steps.least, steps.most)
    return found.to(values.dtype)


def rounded_weight(weight: Tensor, stored: Steps) -> Tensor:
    """A weight as 8 bits hold it, with a scale for each entry of dimension 0."""
    numbers = weight.float()
    largest = numbers.detach().abs().flatten(1).amax(1)
    scales = 2 * largest / (stored.most - stored.least)
    scales = torch.where(scales > torch.finfo(scales.dtype).tiny, scales, torch.ones_like(scales))
    zeros = torch.full_like(scales, stored.zero, dtype=torch.int32)
    found = torch.fake_quantize_per_channel_affine(numbers, scales, zeros, 0, stored.least, stored.most)
    return found.to(weight.dtype)


def _forward(module: nn.Module, layer: LayerSteps, values: Tensor) -> Tensor:
    values = rounded(values, layer.input)
    weight = rounded_weight(module.weight, layer.stored)  # type: ignore[arg-type]
    if isinstance(module, nn.Conv2d):
        output: Tensor = module._conv_forward(values, weight, module.bias)
        return output
    assert isinstance(module, nn.Linear)
    return functional.linear(values, weight, module.bias)


def _round_output(steps: Steps, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return rounded(output, steps)
