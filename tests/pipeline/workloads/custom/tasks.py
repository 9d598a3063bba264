"""A small task of one's own: which of two halves of an image is brighter; it imports nothing of Secateur."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Task:
    def __init__(self, items: int = 40, width: int = 8) -> None:
        self.items, self.width = items, width

    def model(self, weights):
        layers = (
            nn.Conv2d(1, self.width, 3, padding=1),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * self.width, 2))

    def data(self, split):
        generator = torch.Generator().manual_seed(len(split))
        images = torch.rand(self.items, 1, 8, 8, generator=generator)
        return TensorDataset(images, (images[..., :4].sum((1, 2, 3)) > images[..., 4:].sum((1, 2, 3))).long())

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def answers(self, outputs, targets):
        return outputs.argmax(1)

    def metrics(self, answers, targets):
        right = (answers == targets).float().mean()
        return {"hits": right, "misses": (100 * (1 - right), "%", "lower")}
