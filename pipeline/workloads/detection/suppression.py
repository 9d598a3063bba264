"""From raw heads to detections: in torch, as a part of an ONNX file, compared, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from secateur.export.detections import Suppression, append_detections, compare_detections
from secateur.pipeline.workloads import Agreement
from secateur.pipeline.workloads.detection import ssd

TOLERANCE = 1e-3
"""On scores, and on boxes as fractions of the image."""
SHOWN_SCORE = 0.4
"""Less sure detections are left out of pictures."""
PICTURE_SIDE = 320
"""Pixels of a picture's side, where the network sees smaller images."""
COLOURS = ("#e6194b", "#0b7a53", "#4363d8", "#f58231", "#911eb4", "#0097a7", "#b8860b", "#f032e6", "#6b7d00", "#8b4513")


class Detections:
    """Decoding, a least score, and suppression within each class (the ``Postprocessing`` of a detector).

    Args:
        default_boxes: (boxes, 4), centre and size, fractions of the image.
        scores: how logits become scores.
        how: the thresholds (``detection.MetricOptions``).
        classes: names.
        mean, std: of the network's input, shape (1, 3, 1, 1).
    """

    name = "detections"

    def __init__(
        self, default_boxes: Tensor, scores: ssd.Scores, how: Any, classes: Sequence[str], mean: Tensor, std: Tensor
    ) -> None:
        self.default_boxes, self.scores, self.how, self.classes = default_boxes, scores, how, tuple(classes)
        self.mean, self.std = mean, std

    def apply(self, outputs: Tensor) -> Tensor:
        """Shape (N, most, 6): x1, y1, x2, y2 (fractions), score, class from 0; unused rows are -1."""
        how = self.how
        return ssd.detect(
            outputs,
            self.default_boxes.to(outputs.device),
            self.scores,
            least_score=how.least_score,
            nms_iou=how.nms_iou,
            per_class=how.per_class,
            most=how.most,
        )

    def append(self, network: onnx.ModelProto) -> onnx.ModelProto:
        """The network with output ``detections`` of the same shape."""
        how = self.how
        return append_detections(
            network,
            Suppression(
                self.default_boxes,
                self.scores,
                least_score=how.least_score,
                nms_iou=how.nms_iou,
                per_class=how.per_class,
                most=how.most,
                variances=ssd.VARIANCES,
                largest_log=ssd.LARGEST_LOG,
            ),
        )

    def compare(self, found: Tensor, expected: Tensor) -> Agreement:
        """Boxes matched within each image and class; scores and boxes (fractions) may differ by a thousandth."""
        how = self.how
        parity = compare_detections(
            found, expected, tolerance=TOLERANCE, least_score=how.least_score, nms_iou=how.nms_iou
        )
        error = max(parity.max_score_error, parity.max_box_error)
        return Agreement(parity.ok, error, parity.matched, 0 if parity.ok else max(1, parity.unmatched), parity.reason)

    def count(self, results: Tensor) -> Tensor:
        return (results[..., 5] >= 0).sum(1)

    def draw(self, images: Tensor, results: Tensor, targets: Tensor | None = None) -> Tensor:
        pixels = ((images.float().cpu() * self.std + self.mean).clamp(0, 1) * 255).round().byte()
        times = max(1, round(PICTURE_SIDE / pixels.shape[-1]))
        pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)
        pictures = []
        for i, picture in enumerate(pixels):
            if targets is not None:
                wanted = targets[i][ssd.classes_of(targets[i : i + 1])[0] >= 0]
                picture = self._boxes(picture, wanted[:, :4], ["white"] * len(wanted), width=4)
            rows = results[i][results[i, :, 4] >= SHOWN_SCORE]
            colours = [COLOURS[int(row[5]) % len(COLOURS)] for row in rows]
            labels = [f"{self.classes[int(row[5])]} {row[4]:.2f}" for row in rows]
            pictures.append(self._boxes(picture, rows[:, :4], colours, labels))
        return torch.stack(pictures)

    @staticmethod
    def _boxes(
        picture: Tensor, boxes: Tensor, colours: list[str], labels: list[str] | None = None, width: int = 2
    ) -> Tensor:
        if not len(boxes):
            return picture
        side = torch.tensor(picture.shape[-1:-3:-1]).repeat(2)
        drawn: Tensor = draw_bounding_boxes(picture, boxes.cpu() * side, labels, colours, width=width)
        return drawn
