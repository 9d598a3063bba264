"""Batch-norm statistics taken anew, where a network was cut or trained since they were.

A cut changes what every later layer reads, and after n steps of training 0.9^n of the old statistics remain: both leave
statistics that are of another network. They are taken again as the cumulative average over a few training images
without augmentation (the re-estimation of MetaPruning, Liu et al. 2019, arXiv 1903.10258, and of EagleEye, Li et al.
2020, arXiv 2007.02491).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.pipeline.workloads import Split, Workload

IMAGES_AT_ONCE = 128
"""Images of a batch, at most: each batch is normalised by its own statistics."""
RECALIBRATION_SHARE = 4
"""Search images for each training image that a candidate's statistics are taken on, at least: a training image costs
1.3 to 1.4 times what a search image does, and scoring shall not cost more than 1.5 times what it does without."""


def moving_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms whose statistics follow the data, by every name they have; without frozen ones.

    A batch norm is frozen where it has a scale that is not trained, or a momentum of 0. (``FrozenBatchNorm2d`` is a
    class of its own.)
    """
    found = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            frozen = module.momentum == 0 or (module.weight is not None and not module.weight.requires_grad)
            if not frozen:
                found[name] = module
    return found


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take the statistics of a network anew, in place: the cumulative average over batches of images.

    Args:
        network: in eval mode, and left in it.
        batches: each of shape ``(n, channels, height, width)``, n at least 2, on the network's device and in its number
            type; without any, the statistics stay as they are.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    norms = set(moving_norms(network).values())
    momenta = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative
        norm.train()
    try:
        with torch.inference_mode():
            for images in itertools.chain([first], batches) if norms else ():
                network(images)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
            norm.eval()


def training_images(
    workload: Workload, split: Split, num_images: int, compute: torch.device, at_once: int = IMAGES_AT_ONCE
) -> Iterator[Tensor]:
    """The first images of a split (in no order of classes), without augmentation, in batches of nearly equal size.

    None of one image: behind a global pooling it has one value per channel, and that has no variance.
    """
    split = split.first(num_images)
    parts = min(math.ceil(len(split) / at_once), len(split) // 2)
    for chosen in torch.tensor_split(torch.arange(len(split)), parts) if parts else ():
        yield workload.batch(split, chosen, train=False, generator=None, device=compute)[0]
