"""Where are digits, and are they low or high? A detector like SSD, with heads on two feature maps, judged by mAP50.

Liu et al. 2016 (arXiv 1512.02325): default boxes are matched with objects; every box learns its offsets and its class.
The network's two kinds of outputs are concatenated into one tensor, and taken apart where they are used.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision.ops import batched_nms, box_convert, box_iou, sigmoid_focal_loss

CLASSES = ("low digit", "high digit")  # 0 to 4, and 5 to 9
MOST, KEPT = 4, 20  # objects, and detections, of an image


class Task:
    """Object detection with two classes."""

    def __init__(self, size: int = 64, scenes: int = 800, width: int = 16) -> None:
        self.size, self.scenes, self.width = size, scenes, width
        self.boxes = default_boxes(((size // 8, (0.25, 0.35)), (size // 16, (0.35, 0.5))))

    # -- the five that are required ------------------------------------------------------------------------------------

    def model(self, weights: bool) -> nn.Module:
        return Detector(self.width)

    def data(self, split: str) -> "Scenes":
        num = self.scenes if split == "train" else self.scenes // 4
        return Scenes(split, num, self.size)

    def loss(self, outputs, targets):
        """Targets: (n, MOST, 5), corners in 0..1 and the class; -1 where there is no object."""
        offsets, scores = outputs[..., :4], outputs[..., 4:]
        wanted, matched, labels = (torch.stack(t) for t in zip(*map(self.match, targets), strict=True))
        num = matched.sum().clamp(min=1)
        boxes = F.smooth_l1_loss(offsets[matched], wanted[matched], reduction="sum")
        return (boxes + sigmoid_focal_loss(scores, labels, alpha=0.5, reduction="sum")) / num

    def answers(self, outputs, targets):
        """The best detections of each image: (n, KEPT, 6), corners, score and class; a score of -1 is none."""
        return torch.stack([self.detect(rows) for rows in outputs.float()])

    def metrics(self, answers, targets):
        return {"map50": np.mean([average_precision(answers, targets, label) for label in range(len(CLASSES))])}

    # -- what may be left out ------------------------------------------------------------------------------------------

    def augment(self, image, target):
        return image + 0.05 * torch.randn_like(image), target

    def distill(self, student, teacher, temperature):
        """Learn from the teacher where it sees something, and its classes everywhere."""
        sure = teacher[..., 4:].sigmoid().amax(-1)
        boxes = ((student - teacher)[..., :4].square().mean(-1) * sure).sum() / sure.sum()
        return boxes + F.binary_cross_entropy_with_logits(student[..., 4:], teacher[..., 4:].sigmoid())

    # -- boxes ---------------------------------------------------------------------------------------------------------

    def match(self, rows):
        """(offsets, whether matched, classes one-hot) of every default box; each object has at least its best one."""
        objects, default = rows[rows[:, 4] >= 0], self.boxes.to(rows)
        labels = torch.zeros(len(default), len(CLASSES), device=rows.device)
        if not len(objects):
            return torch.zeros_like(default), labels.any(1), labels
        iou = box_iou(box_convert(default, "cxcywh", "xyxy"), objects[:, :4])
        iou[iou.argmax(0), torch.arange(len(objects))] = 2.0
        best, which = iou.max(1)
        matched, mine = best > 0.5, box_convert(objects[which, :4], "xyxy", "cxcywh")
        labels[matched, objects[which, 4].long()[matched]] = 1.0
        centres = (mine[:, :2] - default[:, :2]) / default[:, 2:] / 0.1
        return torch.cat([centres, (mine[:, 2:] / default[:, 2:]).log() / 0.2], 1), matched, labels

    def detect(self, rows):
        default, (scores, labels) = self.boxes.to(rows), rows[:, 4:].sigmoid().max(1)
        centres = default[:, :2] + 0.1 * rows[:, :2] * default[:, 2:]
        sides = default[:, 2:] * (0.2 * rows[:, 2:4]).clamp(max=4).exp()
        corners = box_convert(torch.cat([centres, sides], 1), "cxcywh", "xyxy")
        kept = batched_nms(corners, scores, labels, 0.45)[:KEPT]
        found = torch.cat([corners[kept], scores[kept, None], labels[kept, None].float()], 1)
        return F.pad(found, (0, 0, 0, KEPT - len(found)), value=-1.0)


class Detector(nn.Module):
    """Four blocks, and heads on the last two: (n, boxes, 4 offsets + a score for each class)."""

    def __init__(self, width: int, shapes: int = 2) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 4 * width, 4 * width]
        self.blocks = nn.ModuleList(block(a, b) for a, b in pairwise(widths))
        self.heads = nn.ModuleList(nn.Conv2d(4 * width, shapes * (4 + len(CLASSES)), 3, padding=1) for _ in range(2))
        for head in self.heads:
            nn.init.constant_(head.bias, -1.0)

    def forward(self, x):
        maps = []
        for part in self.blocks:
            maps.append(x := part(x))
        rows = [head(m).permute(0, 2, 3, 1) for head, m in zip(self.heads, maps[-2:], strict=True)]
        return torch.cat([row.reshape(row.shape[0], -1, 4 + len(CLASSES)) for row in rows], 1)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def default_boxes(maps):
    """Centre and sides, (boxes, 4), in the order of the network's outputs; maps: (cells along a side, sides)."""
    rows = []
    for cells, sides in maps:
        for y, x in np.ndindex(cells, cells):
            rows += [((x + 0.5) / cells, (y + 0.5) / cells, side, side) for side in sides]
    return torch.tensor(rows, dtype=torch.float32)


def average_precision(answers, targets, label: int) -> float:
    """The area under precision over recall of a class, at IoU 0.5; a detection counts once for an object."""
    hits, objects = [], int((targets[..., 4] == label).sum())
    for found, rows in zip(answers, targets, strict=True):
        found, wanted = found[(found[:, 4] >= 0) & (found[:, 5] == label)], rows[rows[:, 4] == label]
        free = torch.ones(len(wanted), dtype=torch.bool)
        for row in found:  # the best first
            iou = F.pad(box_iou(row[None, :4], wanted[:, :4])[0] * free, (0, 1))  # the last one is no object
            hit = bool(iou.max() > 0.5)
            free &= (torch.arange(len(free)) != iou.argmax()) | torch.tensor(not hit)
            hits.append((float(row[4]), hit))
    if not objects or not hits:
        return 0.0
    right = np.cumsum([hit for _, hit in sorted(hits, key=lambda pair: -pair[0])])
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float(np.sum(precision * np.diff(right, prepend=0)) / objects)


class Scenes(torch.utils.data.Dataset):
    """Digits of scikit-learn at random places on noise: (image, rows) of shapes (1, size, size) and (MOST, 5)."""

    def __init__(self, split: str, num: int, size: int) -> None:
        digits = load_digits()
        last = np.arange(len(digits.images)) % 5 == 4
        mine = last if split == "test" else ~last
        self.images, self.labels = digits.images[mine] / 16, digits.target[mine]
        self.seed, self.num, self.size = int(split == "train"), num, size

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int):
        rng = np.random.default_rng((self.seed, index))  # a scene depends on its index alone
        image = rng.normal(0.2, 0.1, (self.size, self.size)).astype(np.float32)
        rows = torch.full((MOST, 5), -1.0)
        for row in range(rng.integers(1, MOST)):
            digit, side = rng.integers(len(self.images)), int(rng.integers(self.size // 4, self.size // 2))
            top, left = rng.integers(0, self.size - side, 2)
            drawn = Image.fromarray(np.uint8(255 * self.images[digit])).resize((side, side), Image.Resampling.BILINEAR)
            place = np.s_[top : top + side, left : left + side]
            image[place] = np.maximum(image[place], np.asarray(drawn, dtype=np.float32) / 255)
            corners = np.array([left, top, left + side, top + side]) / self.size
            rows[row] = torch.tensor([*corners, self.labels[digit] > 4], dtype=torch.float32)
        return torch.from_numpy(image)[None] - 0.3, rows
