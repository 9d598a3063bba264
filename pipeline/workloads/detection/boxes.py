"""Arithmetic of boxes, and average precision: VOC07 (11 points), the area under the curve, and COCO.

Boxes are rows x1, y1, x2, y2 in any one unit (pixels, or shares of the image): the edges of the box, so its area is
(x2 - x1)(y2 - y1). What is measured comes as two lists with one tensor an image:

* detections, shape (n, 6): x1, y1, x2, y2, score, class from 0;
* truths, shape (m, 5): x1, y1, x2, y2, class from 0; and, optionally, flags of shape (m,) that mark the *difficult*
  ones, which are neither to be found nor, if found, counted as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import ops

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import UserError

Curve = Literal["voc07", "area"]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision, as fractions.

    Args:
        mean: over the classes that have something to be found.
        per_class: class index -> average precision, of those classes.
    """

    mean: float
    per_class: dict[int, float]


@dataclass(frozen=True)
class CocoPrecision:
    """COCO's summary, as fractions: ``mean`` over IoU 0.50:0.95, ``at50`` and ``at75`` at one IoU."""

    mean: float
    at50: float
    at75: float


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        a: boxes, shape (n, 4).
        b: boxes, shape (m, 4).

    Returns:
        Shape (n, m), in 0..1; 0 for pairs of which neither has an area.
    """
    pairs: Tensor = ops.box_iou(a, b)
    return pairs.nan_to_num(0.0)


def to_centres(boxes: Tensor) -> Tensor:
    """Rows x1, y1, x2, y2 as centre x, centre y, width, height; shape (..., 4)."""
    centres: Tensor = ops.box_convert(boxes, "xyxy", "cxcywh")
    return centres


def to_corners(boxes: Tensor) -> Tensor:
    """Rows centre x, centre y, width, height as x1, y1, x2, y2; shape (..., 4)."""
    corners: Tensor = ops.box_convert(boxes, "cxcywh", "xyxy")
    return corners


def average_precision(
    detections: Sequence[Tensor],
    truths: Sequence[Tensor],
    difficult: Sequence[Tensor] | None = None,
    *,
    curve: Curve = "voc07",
    threshold: float = 0.5,
) -> AveragePrecision:
    """Mean average precision as PASCAL VOC defines it (Everingham et al. 2010).

    Each detection belongs to the truth of its image and class that it overlaps most. It is right if they overlap by
    ``threshold`` or more and no detection with a higher score has that truth; further ones are wrong. Detections that
    belong to a difficult truth are left out. Precision and recall are read off between different scores only, so the
    order of equal scores does not matter. A detection with a value that is not finite is wrong.

    Args:
        detections: one tensor an image, shape (n, 6).
        truths: one tensor an image, shape (m, 5).
        difficult: one tensor an image, shape (m,), bool; None = no truth is difficult.
        curve: ``voc07`` = mean of the best precision at recall 0, 0.1, ..., 1; ``area`` = area under the best
            precision (VOC 2010 and later).
        threshold: least IoU.

    Raises:
        ValueError: the lists or shapes do not fit.
        UserError: there is nothing to be found in these images.
    """
    told = matches(detections, truths, difficult, threshold=threshold)
    per_class = {}
    for label, wanted in zip(*torch.unique(told.truth_label, return_counts=True), strict=True):
        own = (told.label == label).nonzero()[:, 0]
        per_class[int(label)] = _area(told.right[own], told.score[own], int(wanted), curve)
    return AveragePrecision(sum(per_class.values()) / len(per_class), per_class)


@dataclass(frozen=True)
class Matches:
    """Which detections are right, and what was to be found: all that average precision needs to know.

    Args:
        image, label, score, right: of each detection, shape (n,), by falling score; those of difficult truths are left
            out.
        truth_image, truth_label: of each truth that is not difficult, shape (m,).
    """

    image: Tensor
    label: Tensor
    score: Tensor
    right: Tensor
    truth_image: Tensor
    truth_label: Tensor


def matches(
    detections: Sequence[Tensor],
    truths: Sequence[Tensor],
    difficult: Sequence[Tensor] | None = None,
    *,
    threshold: float = 0.5,
) -> Matches:
    """Detections matched with truths, as ``average_precision`` says.

    Raises:
        ValueError: the lists or shapes do not fit.
        UserError: there is nothing to be found in these images.
    """
    found, found_in, true, true_in, easy = _pooled(detections, truths, difficult)
    broken = ~found.isfinite().all(1)
    scores = found[:, 4].nan_to_num(nan=-torch.inf)
    order = scores.argsort(descending=True, stable=True)
    owner = _owners(found, found_in, true, true_in, threshold).masked_fill_(broken, len(true))[order]
    right = _first_of_each(owner, len(true))
    counted = torch.cat([easy, easy.new_ones(1)])[owner]
    order, right = order[counted], right[counted]
    return Matches(found_in[order], found[order, 5], scores[order], right, true_in[easy], true[easy, 4])


def resampled_precision(told: Matches, weights: Tensor, *, curve: Curve = "voc07") -> Tensor:
    """Mean average precision of bootstrap samples of the images, shape (draws,).

    Args:
        weights: how often each image is in a sample, shape (draws, images).
    """
    by_image = weights.double().numpy().T
    total, counted = np.zeros(len(weights)), np.zeros(len(weights))
    for label in torch.unique(told.truth_label):
        own = told.label == label
        truth = told.truth_image[told.truth_label == label]
        wanted = _sums_of(torch.zeros_like(truth), truth, 1, by_image)[0]
        total += _areas(told.image[own], told.right[own], told.score[own], by_image, wanted, curve)
        counted += wanted > 0
    return torch.from_numpy(total / np.maximum(counted, 1))


def coco_precision(
    detections: Sequence[Tensor], truths: Sequence[Tensor], difficult: Sequence[Tensor] | None = None
) -> CocoPrecision:
    """COCO's mean average precision (Lin et al. 2014), by faster-coco-eval; 100 detections an image at most.

    Difficult truths are treated as COCO's crowds: a detection of which the share asked for lies in one is left out. So
    are detections with a value that is not finite. Takes about a second for 200 images of 100 detections, where
    ``average_precision`` takes some hundredths: for the end of a run, not for the inside of a search.

    Raises:
        ValueError: the lists or shapes do not fit.
        UserError: there is nothing to be found in these images.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    found, found_in, true, true_in, easy = _pooled(detections, truths, difficult)
    keep = found.isfinite().all(1)
    found, found_in = found[keep], found_in[keep]
    if not len(found):
        return CocoPrecision(0.0, 0.0, 0.0)
    known = COCO(_coco_truths(true, true_in, easy, len(truths)))
    sizes = found[:, 2:4] - found[:, :2]
    columns = [found_in[:, None], found[:, :2], sizes, found[:, 4:5], found[:, 5:6]]
    judge = COCOeval_faster(known, known.loadRes(torch.cat(columns, 1).numpy()), "bbox")
    judge.params.catIds = torch.unique(true[easy, 4]).long().tolist()
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return CocoPrecision(*(float(value) for value in judge.stats[:3]))


def _coco_truths(true: Tensor, true_in: Tensor, easy: Tensor, num_images: int) -> dict[str, Any]:
    """COCO's annotation structure; ids of annotations from 1, because 0 means "unmatched" there."""
    sizes = true[:, 2:4] - true[:, :2]
    rows = zip(
        true_in.tolist(),
        true[:, 4].long().tolist(),
        torch.cat([true[:, :2], sizes], 1).tolist(),
        sizes.prod(1).tolist(),
        (~easy).int().tolist(),
        strict=True,
    )
    return {
        "info": {},
        "images": [{"id": i} for i in range(num_images)],
        "categories": [{"id": label, "name": str(label)} for label in torch.unique(true[:, 4]).long().tolist()],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            for i, (image, label, box, area, crowd) in enumerate(rows, start=1)
        ],
    }


def _pooled(
    detections: Sequence[Tensor], truths: Sequence[Tensor], difficult: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rows found, image of each, true rows, image of each, whether each counts), on the CPU."""
    if len(detections) != len(truths):
        raise ValueError(f"{len(detections)} images of detections, {len(truths)} of truths")
    found, found_in = _rows(detections, 6, "detections")
    true, true_in = _rows(truths, 5, "truths")
    if difficult is None:
        easy = torch.ones(len(true), dtype=torch.bool)
    else:
        if [len(flags) for flags in difficult] != [len(rows) for rows in truths]:
            raise ValueError("there must be one difficult flag for each truth")
        easy = ~torch.cat([*(flags.cpu().bool() for flags in difficult), torch.zeros(0, dtype=torch.bool)])
    if not easy.any():
        raise UserError(
            f"nothing to be found in {number_of(len(truths), 'image(s)')}: average precision is undefined; "
            "measure on more images, with at least one box that is not difficult"
        )
    return found, found_in, true, true_in, easy


def _rows(tensors: Sequence[Tensor], width: int, what: str) -> tuple[Tensor, Tensor]:
    for tensor in tensors:
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise ValueError(f"{what}: expected tensors of shape (n, {width}), got {tuple(tensor.shape)}")
    counts = torch.tensor([len(tensor) for tensor in tensors], dtype=torch.int64)
    rows = torch.cat([*(tensor.detach() for tensor in tensors), torch.zeros(0, width, device=_device(tensors))])
    return rows.cpu().double(), torch.repeat_interleave(torch.arange(len(tensors)), counts)


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _owners(found: Tensor, found_in: Tensor, true: Tensor, true_in: Tensor, threshold: float) -> Tensor:
    """The truth that each detection belongs to, shape (n,); ``len(true)`` if it overlaps none enough."""
    found_group, true_group = _groups(found, found_in, true, true_in)
    order = true_group.argsort(stable=True)
    sorted_groups = true_group[order].contiguous()
    start = torch.searchsorted(sorted_groups, found_group)
    count = torch.searchsorted(sorted_groups, found_group, right=True) - start
    which = torch.repeat_interleave(torch.arange(len(found)), count)  # pairs of one image and class
    offset = torch.arange(len(which)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    truth = order[start[which] + offset]
    overlap = _overlaps(found[which, :4], true[truth, :4])
    best = found.new_zeros(len(found)).scatter_reduce(0, which, overlap, "amax")
    hit = (overlap == best[which]) & (overlap >= threshold)
    nobody = torch.full((len(found),), len(true))
    return nobody.scatter_reduce(0, which[hit], truth[hit], "amin")


def _groups(found: Tensor, found_in: Tensor, true: Tensor, true_in: Tensor) -> tuple[Tensor, Tensor]:
    """A number for each image and class, of detections and of truths."""
    labels = torch.cat([found[:, 5].nan_to_num(nan=-1.0), true[:, 4]])
    known, place = torch.unique(labels, return_inverse=True)
    groups = torch.cat([found_in, true_in]) * len(known) + place
    return groups[: len(found)].contiguous(), groups[len(found) :].contiguous()


def _overlaps(a: Tensor, b: Tensor) -> Tensor:
    """IoU row by row, shape (n,); 0 where it is not a number."""
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    common = sides.clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common
    return (common / union).nan_to_num(0.0, 0.0, 0.0)


def _first_of_each(owner: Tensor, num_truths: int) -> Tensor:
    """Whether a detection is the first that belongs to its truth, shape (n,); never if it belongs to none."""
    place = torch.arange(len(owner))
    first = torch.full((num_truths + 1,), len(owner)).scatter_reduce(0, owner, place, "amin")
    return (first[owner] == place) & (owner < num_truths)


def _area(right: Tensor, scores: Tensor, wanted: int, curve: Curve) -> float:
    """Average precision of one class; ``right`` and ``scores`` of shape (n,), by falling score."""
    if not len(right):
        return 0.0
    ends = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    hits = right.cumsum(0)[ends]
    precision = hits / (ends + 1).double()
    best = precision.flip(0).cummax(0).values.flip(0)  # at this recall or more
    if curve == "area":
        return float((hits.diff(prepend=hits.new_zeros(1)) * best).sum()) / wanted
    reached = torch.searchsorted(10 * hits, wanted * torch.arange(11))  # whole numbers: 3 of 10 is recall 0.3
    return float(torch.cat([best, best.new_zeros(1)])[reached].mean())


def _areas(
    image: Tensor, right: Tensor, scores: Tensor, weights: FloatArray, wanted: FloatArray, curve: Curve
) -> FloatArray:
    """``_area`` of samples, shape (draws,): each detection counts as often as its image is in the sample.

    Precision is best right after a right detection, so that is where it is looked at.

    Args:
        weights: shape (images, draws).
        wanted: truths in each sample, shape (draws,).
    """
    ends = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])[: len(scores)]
    step = torch.cat([ends.new_zeros(1), ends[:-1]])[: len(scores)].cumsum(0)  # equal scores are one step
    told = torch.unique(step[right])
    if not len(told):
        return np.zeros(len(wanted))
    place = torch.searchsorted(told, step)  # of the first step with a right one that it counts in
    kept = place < len(told)
    seen = _sums_of(place[kept], image[kept], len(told), weights).cumsum(0)
    hits = _sums_of(place[right], image[right], len(told), weights).cumsum(0)
    best = np.maximum.accumulate((hits / np.maximum(seen, 1))[::-1])[::-1]
    if curve == "area":
        gained = np.diff(hits, axis=0, prepend=0)
        return (gained * best).sum(0) / np.maximum(wanted, 1)  # type: ignore[no-any-return]
    reached = [(10 * hits < level * wanted).sum(0) for level in range(11)]
    best = np.concatenate([best, np.zeros((1, len(wanted)))])
    return np.mean([best[rows, np.arange(len(wanted))] for rows in reached], 0)  # type: ignore[no-any-return]


def _sums_of(place: Tensor, image: Tensor, places: int, weights: FloatArray) -> FloatArray:
    """The weights of what stands at each place, added up, shape (places, draws)."""
    from scipy.sparse import csr_array

    ones = np.ones(len(place))
    return csr_array((ones, (place.numpy(), image.numpy())), (places, len(weights))) @ weights  # type: ignore[no-any-return]
