"""Which pixels are a digit? A small U-Net on scenes of handwritten digits, judged by the mean IoU of its classes."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

CLASSES = ("background", "low digit", "high digit")  # 0 to 4, and 5 to 9
WEIGHTS = (0.2, 1.0, 1.0)  # of the classes in the loss: most pixels are background


class Task:
    """Semantic segmentation with three classes."""

    def __init__(self, size: int = 48, scenes: int = 600, width: int = 16) -> None:
        self.size, self.scenes, self.width = size, scenes, width

    # -- the five that are required ------------------------------------------------------------------------------------

    def model(self, weights: bool) -> nn.Module:
        return UNet(self.width, len(CLASSES))

    def data(self, split: str) -> "Scenes":
        num = self.scenes if split == "train" else self.scenes // 4
        return Scenes(split, num, self.size)

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, outputs.new_tensor(WEIGHTS))

    def answers(self, outputs, targets):
        """Pixels of each class that are right, found, and there: (n, 3, classes), all that IoU needs of an image."""
        found, there = (F.one_hot(t, len(CLASSES)).bool().flatten(1, 2) for t in (outputs.argmax(1), targets))
        return torch.stack([(found & there).sum(1), found.sum(1), there.sum(1)], 1).float()

    def metrics(self, answers, targets):
        right, found, there = answers.sum(0)
        iou = right / (found + there - right).clamp(min=1)
        accuracy = right.sum() / there.sum()
        return {
            "miou": iou.mean(),
            "pixel_accuracy": (100 * accuracy, "%", "higher"),
            "iou_digits": (100 * iou[1:].mean(), "%", "higher"),
        }

    # -- what may be left out ------------------------------------------------------------------------------------------

    def augment(self, image, mask):
        shift = tuple(torch.randint(-4, 5, (2,)).tolist())
        return image.roll(shift, (1, 2)), mask.roll(shift, (0, 1))


class Scenes(torch.utils.data.Dataset):
    """Digits of scikit-learn at random places on noise: (image, mask) of shapes (1, size, size) and (size, size)."""

    def __init__(self, split: str, num: int, size: int) -> None:
        digits = load_digits()
        mine = np.arange(len(digits.images)) % 5 < 4 if split == "train" else np.arange(len(digits.images)) % 5 == 4
        self.images, self.labels = digits.images[mine] / 16, digits.target[mine]
        self.seed, self.num, self.size = int(split == "train"), num, size

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int):
        rng = np.random.default_rng((self.seed, index))  # a scene depends on its index alone
        image = rng.normal(0.2, 0.1, (self.size, self.size)).astype(np.float32)
        mask = np.zeros((self.size, self.size), dtype=np.int64)
        for _ in range(rng.integers(1, 4)):
            digit, side = rng.integers(len(self.images)), int(rng.integers(self.size // 4, self.size // 2))
            top, left = rng.integers(0, self.size - side, 2)
            drawn = Image.fromarray(np.uint8(255 * self.images[digit])).resize((side, side), Image.Resampling.BILINEAR)
            ink = np.asarray(drawn, dtype=np.float32) / 255
            place = np.s_[top : top + side, left : left + side]
            image[place] = np.maximum(image[place], ink)
            mask[place][ink > 0.4] = 1 + int(self.labels[digit] > 4)
        return torch.from_numpy(image)[None] - 0.3, torch.from_numpy(mask)


class UNet(nn.Module):
    """Ronneberger et al. 2015 (arXiv 1505.04597), small: three scales, with batch norm."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second, self.third = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.third(F.max_pool2d(b, 2))
        b = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        a = self.up1(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1))
        return self.head(a)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
