"""Single-shot detectors: what the one tensor of raw heads means that is the output of such a network.

SSD (Liu et al. 2016, arXiv 1512.02325) predicts, for every default box, an offset and a score per class. A network
gives shape (N, boxes, 4 + classes + 1): offsets (x, y, w, h), then class logits with the background first. Decoding and
non-maximum suppression are functions outside of it, so that a detector is traced, cut and exported like a classifier.

Boxes are fractions of the image's sides: (x1, y1, x2, y2), or (cx, cy, w, h) for default boxes. Targets are one tensor
of shape (N, most boxes, 5): corners and class from 0; unused rows are -1, and class ``-2 - c`` is a *difficult* object
of class c, which is learned from like any other but neither rewarded nor missed when a metric is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

Scores = Literal["softmax", "sigmoid"]
VARIANCES = (0.1, 0.2)
"""Units of the offsets of centres and of the logarithms of sides (Liu et al.'s code; TensorFlow's 10 and 5)."""
LARGEST_LOG = math.log(1000 / 16)
"""Sides grow by no more than this over a default box's."""
MATCH_IOU = 0.5
NEGATIVES = 3
"""Default boxes of the background that the loss looks at, per matched one."""


# -- boxes -------------------------------------------------------------------------------------------------------------


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) boxes (cx, cy, w, h) as (x1, y1, x2, y2)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def encode(boxes: Tensor, default_boxes: Tensor) -> Tensor:
    """Offsets of boxes (..., 4; corners) from default boxes (..., 4; centre and size), in units of the variances.

    Sides below 1e-6 are taken as 1e-6.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    shift = (centre - default_boxes[..., :2]) / (default_boxes[..., 2:] * VARIANCES[0])
    return torch.cat([shift, (size / default_boxes[..., 2:]).log() / VARIANCES[1]], -1)


def decode(offsets: Tensor, default_boxes: Tensor) -> Tensor:
    """Corners (..., 4) from offsets; the inverse of ``encode``."""
    centre = default_boxes[..., :2] + offsets[..., :2] * VARIANCES[0] * default_boxes[..., 2:]
    size = default_boxes[..., 2:] * (offsets[..., 2:] * VARIANCES[1]).clamp(max=LARGEST_LOG).exp()
    return corners(torch.cat([centre, size], -1))


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., n, 4) and (..., m, 4), corners: shape (..., n, m); 0 for empty boxes."""
    ax1, ay1, ax2, ay2 = a[..., :, None, :].unbind(-1)
    bx1, by1, bx2, by2 = b[..., None, :, :].contiguous().unbind(-1)
    wide = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    common = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0).mul_(wide)
    areas = [(x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0) for x1, y1, x2, y2 in (a.unbind(-1), b.unbind(-1))]
    union = areas[0][..., :, None] + areas[1][..., None, :] - common
    return common / union.clamp_(min=1e-12)


def classes_of(targets: Tensor) -> Tensor:
    """Class of every target row, shape (N, most boxes), int64; -1 for unused rows, difficult objects like others."""
    label = targets[..., 4].round().long()
    return torch.where(label <= -2, -2 - label, label)


def match(default_boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which object each default box is to find.

    A box belongs to the object it overlaps most, if by an IoU of at least 0.5; besides, the best box of every object
    belongs to it (to the last one, where several objects have the same best box). Objects without area match nothing.

    Args:
        default_boxes: (boxes, 4), centre and size.
        targets: (N, most boxes, 5).

    Returns:
        Classes with the background as 0, shape (N, boxes), int64; and corners of the object, shape (N, boxes, 4).
    """
    used = classes_of(targets) >= 0
    n, num_boxes = len(targets), len(default_boxes)
    if targets.shape[1] == 0:
        background = torch.zeros((n, num_boxes), dtype=torch.int64, device=targets.device)
        return background, targets.new_zeros((n, num_boxes, 4))
    iou = overlaps(targets[..., :4], corners(default_boxes)).masked_fill(~used[..., None], 0)
    best_iou, owner = iou.max(1)
    found, best_box = iou.max(2)
    order = torch.arange(targets.shape[1], device=targets.device).expand_as(best_box)
    order = order.masked_fill(found <= 0, -1)
    forced = torch.full_like(owner, -1).scatter_reduce(1, best_box, order, "amax")
    owner = torch.where(forced >= 0, forced, owner)
    matched = (forced >= 0) | (best_iou >= MATCH_IOU)
    labels = (classes_of(targets).gather(1, owner) + 1).masked_fill(~matched, 0)
    return labels, targets[..., :4].gather(1, owner[..., None].expand(-1, -1, 4))


# -- loss --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxLosses:
    """The multibox loss of every image, before it is divided by the number of matched boxes.

    Args:
        boxes: shape (N,); smooth L1 of the offsets of matched boxes.
        classes: shape (N,); cross-entropy of matched boxes and of the hardest negatives.
        matched: shape (N,); number of matched boxes.
    """

    boxes: Tensor
    classes: Tensor
    matched: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss of the batch, a scalar: per matched box (0 where there is none)."""
        return (self.boxes + self.classes).sum() / self.matched.sum().clamp(min=1)

    @property
    def per_image(self) -> Tensor:
        """The loss of every image by itself, shape (N,)."""
        return (self.boxes + self.classes) / self.matched.clamp(min=1)


def multibox_loss(
    outputs: Tensor, targets: Tensor, default_boxes: Tensor, scores: Scores = "softmax", label_smoothing: float = 0.0
) -> BoxLosses:
    """Liu et al.'s loss, section 2.2: smooth L1 of matched boxes, cross-entropy with 3 hard negatives per match.

    Args:
        outputs: raw heads, (N, boxes, 4 + classes + 1).
        targets: (N, most boxes, 5).
        default_boxes: (boxes, 4), centre and size.
        scores: sigmoid = binary cross-entropy of every class but the background, whose logit is not looked at.
    """
    outputs = outputs.float()
    offsets, logits = outputs[..., :4], outputs[..., 4:]
    labels, boxes = match(default_boxes, targets)
    positive = labels > 0
    distance = F.smooth_l1_loss(offsets, encode(boxes, default_boxes), reduction="none").sum(-1)
    each = _class_losses(logits, labels, scores, label_smoothing)
    hard = each.detach().masked_fill(positive, -torch.inf)
    rank = hard.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = positive | ((rank < NEGATIVES * positive.sum(1, keepdim=True)) & ~positive)
    return BoxLosses(
        distance.masked_fill(~positive, 0).sum(1), each.masked_fill(~chosen, 0).sum(1), positive.sum(1).float()
    )


def _class_losses(logits: Tensor, labels: Tensor, scores: Scores, label_smoothing: float) -> Tensor:
    """Shape (N, boxes)."""
    if scores == "softmax":
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=label_smoothing)
    wanted = F.one_hot(labels, logits.shape[-1])[..., 1:].to(logits.dtype)
    wanted = wanted * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits[..., 1:], wanted, reduction="none").sum(-1)


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, scores: Scores = "softmax", least: float = 0.1
) -> Tensor:
    """Learning a detector's raw heads from another's: T^2 * KL of the classes plus smooth L1 of the offsets; a scalar.

    Nearly all default boxes show background, and say nothing. Classes are compared where teacher or student sees an
    object with a probability above ``least``; offsets where the teacher does, weighted with its probability. Both are
    means over such boxes. (After Hinton et al. 2015, arXiv 1503.02531, and Chen et al. 2017, NeurIPS, who weight the
    background down.)

    Args:
        student: (N, boxes, 4 + classes + 1).
        teacher: the same shape; no gradient flows into it.
        temperature: T; softens the class probabilities of both.
    """
    apart = _apart(student.float(), teacher.detach().float(), temperature, scores, least)
    classes = temperature**2 * (apart.seen * apart.classes).sum() / apart.seen.sum().clamp(min=1)
    return classes + (apart.weight * apart.offsets).sum() / apart.weight.sum().clamp(min=1)


def divergence(outputs: Tensor, dense: Tensor, scores: Scores = "softmax", least: float = 0.1) -> Tensor:
    """How far a detector's raw heads are from another's for the same images: shape (N,), >= 0.

    The KL divergence of the classes (nats) plus the smooth L1 distance of the offsets, of each image by itself, over
    the default boxes that ``distillation_loss`` looks at: all the others show background in both networks, and a mean
    over them hardly differs from network to network.

    Args:
        outputs: (N, boxes, 4 + classes + 1), of a candidate.
        dense: the same shape, of the unpruned network.
    """
    apart = _apart(outputs.float(), dense.float(), 1.0, scores, least)
    classes = (apart.seen * apart.classes).sum(1) / apart.seen.sum(1).clamp(min=1)
    offsets = (apart.weight * apart.offsets).sum(1) / apart.weight.sum(1).clamp(min=1)
    return (classes + offsets).clamp(min=0)


class _Apart(NamedTuple):
    """How far two detectors' raw heads are from each other; each of shape (N, boxes).

    Args:
        seen: 1 where one of both sees an object, else 0.
        classes: KL(teacher || student).
        weight: how sure the teacher is, where it sees an object, else 0.
        offsets: smooth L1.
    """

    seen: Tensor
    classes: Tensor
    weight: Tensor
    offsets: Tensor


def _apart(student: Tensor, teacher: Tensor, temperature: float, scores: Scores, least: float) -> _Apart:
    own, taught = (foreground(x[..., 4:], scores) for x in (student.detach(), teacher))
    seen = ((taught > least) | (own > least)).to(student.dtype)
    classes = _divergence(student[..., 4:] / temperature, teacher[..., 4:] / temperature, scores)
    offsets = F.smooth_l1_loss(student[..., :4], teacher[..., :4], reduction="none").sum(-1)
    return _Apart(seen, classes, taught * (taught > least), offsets)


def _divergence(student: Tensor, teacher: Tensor, scores: Scores) -> Tensor:
    """KL(teacher || student) per default box, shape (N, boxes)."""
    if scores == "softmax":
        return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    student, teacher = student[..., 1:], teacher[..., 1:]
    wanted = teacher.sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x, wanted, reduction="none") for x in (student, teacher))
    return (cross - own).sum(-1)


# -- detections --------------------------------------------------------------------------------------------------------


def probabilities(logits: Tensor, scores: Scores = "softmax") -> Tensor:
    """Score of every class but the background, shape (..., classes)."""
    return logits.softmax(-1)[..., 1:] if scores == "softmax" else logits[..., 1:].sigmoid()


def foreground(logits: Tensor, scores: Scores = "softmax") -> Tensor:
    """How likely a default box shows any object, shape (...)."""
    return 1 - logits.softmax(-1)[..., 0] if scores == "softmax" else logits[..., 1:].sigmoid().amax(-1)


def detect(
    outputs: Tensor,
    default_boxes: Tensor,
    scores: Scores = "softmax",
    *,
    least_score: float = 0.01,
    nms_iou: float = 0.45,
    per_class: int = 400,
    most: int = 200,
) -> Tensor:
    """Detections of every image, the surest first.

    Args:
        outputs: raw heads, (N, boxes, 4 + classes + 1).
        least_score: what scores less is dropped.
        nms_iou: of two boxes of one class that overlap more, the less sure one is dropped.
        per_class: how many boxes of a class are looked at.
        most: how many detections an image may have.

    Returns:
        Shape (N, most, 6): x1, y1, x2, y2 (clipped to 0..1), score, class from 0; unused rows are -1.
    """
    result = outputs.new_full((len(outputs), most, 6), -1, dtype=torch.float32)
    chunk = max(1, (1 << 24) // max(1, outputs[:1].numel()))  # bounds the copies
    for start in range(0, len(outputs), chunk):
        part = outputs[start : start + chunk].float()
        found = probabilities(part[..., 4:], scores)
        values, where = found.topk(min(per_class, found.shape[1]), dim=1)  # (n, k, classes)
        boxes = decode(part[..., :4], default_boxes.to(part)).clamp(0, 1)
        for i in range(len(part)):
            kept = _suppress(boxes[i], values[i], where[i], least_score, nms_iou)[:most]
            result[start + i, : len(kept)] = kept
    return result


def _suppress(boxes: Tensor, values: Tensor, where: Tensor, least_score: float, nms_iou: float) -> Tensor:
    """Detections (n, 6) of one image after suppression within each class; values and where are (k, classes)."""
    rank, label = (values > least_score).nonzero(as_tuple=True)
    chosen, score = boxes[where[rank, label]], values[rank, label]
    if chosen.is_cuda:
        kept = nms(chosen + 2.0 * label[:, None], score, nms_iou)  # classes lie side by side: none suppresses another
    else:  # the time grows with the square of the number
        own = [(label == c).nonzero()[:, 0] for c in range(values.shape[1])]
        parts = [which[nms(chosen[which], score[which], nms_iou)] for which in own]
        kept = torch.cat(parts) if parts else label[:0]
        kept = kept[score[kept].argsort(descending=True, stable=True)]
    return torch.cat([chosen[kept], score[kept, None], label[kept, None].to(score.dtype)], 1)
