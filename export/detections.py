"""Raw heads -> detections, inside the ONNX file; and the comparison of such files.

A detector is exported up to its raw heads: one tensor (N, boxes, 4 + classes + 1) of offsets (x, y, w, h) and class
logits, the background's first. ``append_detections`` adds what turns them into detections, in ONNX's own operators:
decoding, scores, non-maximum suppression within each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx.compose
import onnx.parser
from onnx import numpy_helper
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from secateur.export.artifact import opset_of
from secateur.export.errors import ExportError

Array = npt.NDArray[Any]
_PREFIX = "detections/"


@dataclass(frozen=True)
class Suppression:
    """How raw heads become detections.

    Args:
        default_boxes: (boxes, 4); centre and size as fractions of the image's sides.
        scores: softmax over all logits, or sigmoid of each but the background's.
        least_score: what scores less is dropped.
        nms_iou: of two boxes of one class that overlap more, the less sure one is dropped.
        per_class: how many boxes of a class are looked at.
        most: how many detections an image may have.
        variances: units of the offsets of centres, and of the logarithms of sides.
        largest_log: the logarithm of the most by which a side grows over a default box's.
    """

    default_boxes: Tensor
    scores: Literal["softmax", "sigmoid"]
    least_score: float
    nms_iou: float
    per_class: int
    most: int
    variances: tuple[float, float]
    largest_log: float


def append_detections(proto: onnx.ModelProto, how: Suppression) -> onnx.ModelProto:
    """The same network with detections for its only output; the file given stays as it is.

    Where several boxes of a class have exactly the same score, the first of them are looked at first (ONNX's rule).

    Args:
        proto: its only output is raw heads, float32 (N, boxes, 4 + classes + 1); N may be dynamic.

    Returns:
        Its only output ``detections``, float32 (N, most, 6), holds x1, y1, x2, y2 (clipped to 0..1), score and class
        from 0, the surest first; unused rows are -1.

    Raises:
        ExportError: the network has another output, its opset is below 18, or a tensor of it is named ``detections``.
    """
    batch, classes = _heads(proto, len(how.default_boxes))
    post = onnx.compose.add_prefix_graph(_graph(how, classes), _PREFIX, rename_outputs=False)
    heads = (proto.graph.output[0].name, post.input[0].name)
    try:
        graph = onnx.compose.merge_graphs(proto.graph, post, io_map=[heads], name=proto.graph.name, doc_string="")
    except ValueError as error:
        raise ExportError(f"the network's names clash with those of its detections: {error}") from error
    graph.output[0].type.tensor_type.shape.dim[0].CopyFrom(batch)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.graph.CopyFrom(graph)
    onnx.checker.check_model(result, full_check=True)
    return result


def _heads(proto: onnx.ModelProto, boxes: int) -> tuple[onnx.TensorShapeProto.Dimension, int]:
    """The batch dimension of the raw heads, and the number of classes."""
    opset, outputs = opset_of(proto), proto.graph.output
    if opset < 18:
        raise ExportError(f"detections need opset 18 or newer, the network has {opset}; export it again")
    if len(outputs) != 1:
        names = ", ".join(output.name for output in outputs)
        raise ExportError(f"detections need a network whose one output is raw heads; this one has {names}")
    tensor = outputs[0].type.tensor_type
    shape: list[Any] = [dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim]
    fits = len(shape) == 3 and shape[1] == boxes and isinstance(shape[2], int) and shape[2] > 5
    if not fits or tensor.elem_type != onnx.TensorProto.FLOAT:
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise ExportError(
            f"detections need raw heads (N, {boxes}, 4 + classes + 1) of type float for {boxes} default boxes; "
            f"{outputs[0].name} is ({', '.join(map(str, shape))}) of type {dtype}"
        )
    return tensor.shape.dim[0], shape[2] - 5


_GRAPH = """
detections (float[N, {boxes}, {width}] heads) => (float[N, {most}, 6] detections)
<
    int64[3] parts = {{2, 2, {logits}}}, int64[2] ground_and_classes = {{1, {classes}}},
    int64[1] last = {{2}}, int64[2] flat_shape = {{0, {cells}}},
    int64 number = {{{boxes}}}, float looked_at = {{{looked_at}}}, int64[1] limit = {{{limit}}},
    int64[1] kept = {{{kept}}}, int64[6] rest = {{0, 0, 0, 0, {rest}, 0}},
    float zero = {{0}}, float half = {{0.5}}, float one = {{1}}, float none = {{-1}}
>
{{
    shift, growth, logits = Split<axis = 2>(heads, parts)
    shift_in_sides = Mul(shift, shift_unit)
    moved = Mul(shift_in_sides, default_sides)
    centre = Add(default_centre, moved)
    log = Mul(growth, growth_unit)
    capped = Min(log, largest_log)
    factor = Exp(capped)
    sides = Mul(default_sides, factor)
    half_sides = Mul(sides, half)
    low = Sub(centre, half_sides)
    high = Add(centre, half_sides)
    unclipped = Concat<axis = 2>(low, high)
    boxes = Clip(unclipped, zero, one)

    {scores}
    scores = Transpose<perm = [0, 2, 1]>(by_box)
    score_shape = Shape(scores)
    nothing = ConstantOfShape<value = float[1] {{-1}}>(score_shape)
    {candidates}

    picked = NonMaxSuppression(boxes, candidates, limit, nms_iou, least_score)
    picked_scores = GatherND(candidates, picked)
    survivors = ScatterND(nothing, picked, picked_scores)
    flat = Reshape(survivors, flat_shape)
    score, place = TopK<axis = 1>(flat, kept)

    which = Mod(place, number)
    which_column = Unsqueeze(which, last)
    corners = GatherND<batch_dims = 1>(boxes, which_column)
    class_index = Div(place, number)
    class_float = Cast<to = 1>(class_index)
    class_column = Unsqueeze(class_float, last)
    score_column = Unsqueeze(score, last)
    rows = Concat<axis = 2>(corners, score_column, class_column)
    used = GreaterOrEqual(score_column, zero)
    found = Where(used, rows, none)
    detections = Pad(found, rest, none)
}}
"""
_SCORES = {
    "softmax": """
    probabilities = Softmax<axis = 2>(logits)
    ground, by_box = Split<axis = 2>(probabilities, ground_and_classes)""",
    "sigmoid": """
    ground, by_class = Split<axis = 2>(logits, ground_and_classes)
    by_box = Sigmoid(by_class)""",
}
_CANDIDATES = """
    sure = Greater(scores, least_score)
    counted = Cast<to = 1>(sure)
    per_class = ReduceSum<keepdims = 0>(counted, last)
    most_of_a_class = ReduceMax<keepdims = 0>(per_class)
    too_many = Greater(most_of_a_class, looked_at)
    candidates = If(too_many) <
        then_branch = fewer () => (float[N, {classes}, {boxes}] best_only)
        {{
            number_of_best = Constant<value = int64[1] {{{looked_at}}}>()
            best, best_place = TopK<axis = 2>(scores, number_of_best)
            best_only = ScatterElements<axis = 2>(nothing, best_place, best)
        }},
        else_branch = as_they_are () => (float[N, {classes}, {boxes}] all_of_them) {{ all_of_them = Identity(scores) }}
    >"""
"""The sort takes longer than all else, and trained heads hardly ever need it."""


def _graph(how: Suppression, classes: int) -> onnx.GraphProto:
    """From ``heads`` to ``detections``."""
    boxes = len(how.default_boxes)
    kept = min(how.most, classes * boxes)
    numbers = {
        "boxes": boxes,
        "classes": classes,
        "logits": classes + 1,
        "width": 4 + classes + 1,
        "cells": classes * boxes,
        "looked_at": min(how.per_class, boxes),
        "limit": min(how.per_class, boxes, how.most),  # a class's next ones cannot be among the surest of all
        "most": how.most,
        "kept": kept,
        "rest": how.most - kept,
    }
    candidates = (_CANDIDATES if how.per_class < boxes else "candidates = Identity(scores)").format(**numbers)
    graph: onnx.GraphProto = onnx.parser.parse_graph(
        _GRAPH.format(**numbers, scores=_SCORES[how.scores], candidates=candidates)
    )
    values: dict[str, Any] = {
        "default_centre": how.default_boxes[:, :2].detach().cpu().numpy(),
        "default_sides": how.default_boxes[:, 2:].detach().cpu().numpy(),
        "shift_unit": how.variances[0],
        "growth_unit": how.variances[1],
        "largest_log": how.largest_log,
        "nms_iou": [how.nms_iou],
        "least_score": [how.least_score],
    }
    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float32), name))
    return graph


@dataclass(frozen=True)
class DetectionParity:
    """Outcome of a comparison of detections.

    Args:
        ok: every detection has a partner, but for borderline ones.
        max_score_error: largest difference of scores between partners.
        max_box_error: largest difference of a corner between partners, as a fraction of the image's side.
        matched: pairs of partners.
        unmatched: detections of either side without a partner, borderline ones too.
        samples: images compared.
        reason: what is wrong; empty when ok.
    """

    ok: bool
    max_score_error: float
    max_box_error: float
    matched: int
    unmatched: int
    samples: int
    reason: str = ""


def compare_detections(
    found: Array | Tensor,
    expected: Array | Tensor,
    *,
    tolerance: float = 1e-3,
    least_score: float = 0.0,
    nms_iou: float | None = None,
) -> DetectionParity:
    """Are these the same detections, in whatever order?

    Partners are of the same image and class, one to one; their scores and each of their corners differ by no more than
    the tolerance. Borderline, and so excused from having a partner, is what scores within the tolerance of
    ``least_score``, or of the last detection of the other side where that fills all its rows; and what a surer one of
    the other side overlaps by ``nms_iou`` within the tolerance, or by more if that one is borderline itself.

    Args:
        found, expected: (N, most, 6) as from ``append_detections``.
        tolerance: of scores, and of corners as fractions of the image.
        least_score: what scores less was dropped.
        nms_iou: what overlapped a surer one by more was dropped; None = no overlap excuses anything.

    Raises:
        ExportError: there is no image.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 6:
        return _failed(f"detections of shapes {a.shape} and {b.shape}, expected the same (N, most, 6)")
    if not len(a):
        raise ExportError("no parity without data: give the detections of at least one image")
    for name, values in (("found", a), ("expected", b)):
        broken = ~np.isfinite(values).all((1, 2))
        if broken.any():
            return _failed(f"image {broken.argmax()}: NaN or infinity among the {name} detections")
    score_error = box_error = 0.0
    matched = unmatched = 0
    reason = ""
    for i in range(len(a)):
        sides = [rows[(rows != -1).any(1)] for rows in (a[i], b[i])]
        pairs, scores, boxes = _partners(sides[0], sides[1], tolerance)
        matched += len(pairs[0])
        score_error = max(score_error, scores)
        box_error = max(box_error, boxes)
        alone = [np.delete(side, own, axis=0) for side, own in zip(sides, pairs, strict=True)]
        unmatched += len(alone[0]) + len(alone[1])
        borderline = []
        for rows, other in zip(alone, sides[::-1], strict=True):
            last = other[:, 4].min() if len(other) and len(other) == a.shape[1] else least_score
            borderline.append((abs(rows[:, [4]] - [least_score, last]) <= tolerance).any(1))
        if nms_iou is not None:
            _excuse_overlaps(sides, alone, borderline, nms_iou, tolerance)
        for what, rows, excused in zip(
            ("found but not expected", "expected but not found"), alone, borderline, strict=True
        ):
            if not excused.all() and not reason:
                wrong = rows[~excused][0]
                reason = f"image {i}: a detection of class {wrong[5]:g} with score {wrong[4]:.4f} is {what}"
    return DetectionParity(not reason, score_error, box_error, matched, unmatched, len(a), reason)


def _excuse_overlaps(
    sides: Sequence[Array], alone: Sequence[Array], borderline: Sequence[Array], nms_iou: float, tolerance: float
) -> None:
    """Mark what the other side may have suppressed by a hair, and what follows from that; the surest first."""
    order = sorted(((rows[n, 4], k, n) for k, rows in enumerate(alone) for n in range(len(rows))), reverse=True)
    for score, k, n in order:
        row, other, excused = alone[k][n], sides[1 - k], alone[1 - k][borderline[1 - k]]
        for rivals, near in ((other, True), (excused, False)):
            surer = rivals[(rivals[:, 5] == row[5]) & (rivals[:, 4] >= score - tolerance)]
            excess = _overlaps(row, surer) - nms_iou
            borderline[k][n] |= bool(((abs(excess) if near else -excess) <= tolerance).any())


def _overlaps(row: Array, others: Array) -> Array:
    """IoU of one detection with others, shape (n,)."""
    sides = np.minimum(row[2:4], others[:, 2:4]) - np.maximum(row[:2], others[:, :2])
    common = sides.clip(min=0).prod(1)
    union = (row[2:4] - row[:2]).prod() + (others[:, 2:4] - others[:, :2]).prod(1) - common
    shares: Array = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return shares


def _failed(reason: str) -> DetectionParity:
    return DetectionParity(False, float("inf"), float("inf"), 0, 0, 0, reason)


def _partners(a: Array, b: Array, tolerance: float) -> tuple[tuple[Array, Array], float, float]:
    """As many pairs as possible of one image's detections, the nearest ones; their largest differences.

    Args:
        a, b: (n, 6) and (m, 6).

    Returns:
        Rows of a, rows of b; largest difference of scores, and of corners.
    """
    scores = abs(a[:, None, 4] - b[None, :, 4])
    boxes = abs(a[:, None, :4] - b[None, :, :4]).max(2, initial=0)
    allowed = (a[:, None, 5] == b[None, :, 5]) & (scores <= tolerance) & (boxes <= tolerance)
    rows, columns = linear_sum_assignment(np.where(allowed, boxes, 1 + tolerance * len(a)))  # one pair outweighs all
    rows, columns = (x[allowed[rows, columns]] for x in (rows, columns))
    return (rows, columns), float(scores[rows, columns].max(initial=0)), float(boxes[rows, columns].max(initial=0))
