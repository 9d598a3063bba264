"""How good a network is in the middle of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.pipeline.workloads import Split, Workload

IMAGES = 1000
"""Held-out images that a curve's metrics are taken on, at most, where nothing is chosen by them."""
TRAINED_PER_JUDGED = 10
"""Images that are trained on for each that is judged for the curve alone, at least: a judged one costs a third."""


@dataclass
class Judge:
    """Takes metrics of a network on held-out images without disturbing its training.

    Args:
        split: the held-out images.
        chooses: whether weights are chosen by it: then every epoch is judged on all images.
        batch_size: images at once.
    """

    workload: Workload
    split: Split
    chooses: bool
    batch_size: int
    compute: torch.device

    def __post_init__(self) -> None:
        if not self.chooses:
            self.split = self.split.first(IMAGES)

    @property
    def metric(self) -> str:
        """What is compared: the workload's own metric."""
        return self.workload.metric

    def is_due(self, trained_before: float, trained: float) -> bool:
        """Whether the end of an epoch is judged.

        Args:
            trained_before: images that the training had seen at the end of the epoch before.
            trained: at the end of this one.
        """
        apart = max(1, TRAINED_PER_JUDGED * len(self.split))
        return self.chooses or int(trained // apart) > int(trained_before // apart)

    def metrics(self, network: nn.Module, bf16: bool) -> Mapping[str, float]:
        """Of a network in training, which is in training mode afterwards; without those that are no finite number."""
        answers, targets = [], []
        network.eval()
        with torch.inference_mode(), torch.autocast(self.compute.type, torch.bfloat16, enabled=bf16):
            for chosen in torch.split(torch.arange(len(self.split)), self.batch_size):
                images, labels = self.workload.batch(
                    self.split, chosen, train=False, generator=None, device=self.compute
                )
                answers.append(self.workload.answers(network(images).float(), labels))
                targets.append(labels)
        network.train()
        found = self.workload.metrics(torch.cat(answers), torch.cat(targets))
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}
