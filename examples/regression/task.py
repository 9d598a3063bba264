"""By how many degrees was a digit turned? A small convolutional network with one output, judged by R2."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

MOST = 45  # degrees, to either side; targets are shares of it


class Task:
    """Regression with one output."""

    def __init__(self, size: int = 24, digits: int = 900, turns: int = 3, width: int = 16) -> None:
        self.size, self.digits, self.turns, self.width = size, digits, turns, width

    # -- the five that are required ------------------------------------------------------------------------------------

    def model(self, weights: bool) -> nn.Module:
        width, layers, channels = self.width, [], 1
        for outputs in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, outputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            layers += [nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 1))

    def data(self, split: str) -> "TurnedDigits":
        return TurnedDigits(self.of(split), self.turns, self.size)

    def loss(self, outputs, targets):
        return F.smooth_l1_loss(outputs[:, 0], targets, beta=0.1)

    def answers(self, outputs, targets):
        return outputs[:, 0]

    def metrics(self, answers, targets):
        error = (answers - targets).square().mean()
        spread = targets.var(correction=0).clamp(min=1e-9)
        return {"r2": (1 - error / spread).clamp(0, 1), "rmse": (MOST * error.sqrt(), "degrees", "lower")}

    # -- what may be left out ------------------------------------------------------------------------------------------

    def groups(self, split: str):
        """Every digit stands in the data several times, turned differently: all of them go into one split."""
        return [int(digit) for digit in self.of(split) for _ in range(self.turns)]

    def augment(self, image, target):
        return image + 0.05 * torch.randn_like(image), target

    def of(self, split: str):
        """The digits of a split, of every five the last to the test."""
        every = np.arange(self.digits)
        return every[every % 5 < 4] if split == "train" else every[every % 5 == 4]


class TurnedDigits(torch.utils.data.Dataset):
    """Digits of scikit-learn, each turned several times: (image, share of the largest angle)."""

    def __init__(self, digits, turns: int, size: int) -> None:
        images = load_digits().images[digits]
        self.images = [Image.fromarray(np.uint8(255 * image / 16)).resize((size, size)) for image in images]
        self.digits, self.turns = digits, turns

    def __len__(self) -> int:
        return len(self.images) * self.turns

    def __getitem__(self, index: int):
        which, turn = divmod(index, self.turns)
        share = np.random.default_rng((int(self.digits[which]), turn)).uniform(-1, 1)
        turned = self.images[which].rotate(MOST * share, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(turned, dtype=np.float32))[None] / 255, torch.tensor(
            share, dtype=torch.float32
        )
