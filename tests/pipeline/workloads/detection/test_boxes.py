"""Average precision against worked examples, a plain reference, a published figure, and properties it must have."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.detection import boxes
from secateur.pipeline.workloads.detection.boxes import average_precision, coco_precision

VOC100 = Path(__file__).parents[5] / "shared" / "data" / "voc100"
CURVES: tuple[boxes.Curve, ...] = ("voc07", "area")


def rows(*values: tuple[float, ...], width: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, width)


def truth(*places: float, label: int = 0) -> Tensor:
    """Boxes of 10 x 10 at x = ``places``."""
    return rows(*((x, 0, x + 10, 10, label) for x in places), width=5)


def found(*pairs: tuple[float, float], label: int = 0) -> Tensor:
    """Boxes of 10 x 10 at (x, score)."""
    return rows(*((x, 0, x + 10, 10, score, label) for x, score in pairs), width=6)


def means(detections: list[Tensor], truths: list[Tensor], difficult: list[Tensor] | None = None) -> tuple[float, float]:
    voc07, area = (average_precision(detections, truths, difficult, curve=curve).mean for curve in CURVES)
    return voc07, area


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_iou_of_every_pair() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    b = torch.tensor([[0.0, 0, 10, 5], [5, 5, 15, 15], [20, 20, 30, 30], [5, 5, 5, 5]])
    expected = torch.tensor([[0.5, 25 / 175, 0, 0], [0, 0, 0, 0]])
    assert torch.allclose(boxes.iou(a, b), expected)
    assert boxes.iou(a[:0], b).shape == (0, 4)


def test_centres_and_corners_are_inverse() -> None:
    corners = torch.tensor([[[0.0, 2, 10, 6]], [[-3, 1, 0, 9]]])
    assert boxes.to_centres(corners)[0, 0].tolist() == [5, 4, 10, 4]
    assert torch.equal(boxes.to_corners(boxes.to_centres(corners)), corners)


# --- worked examples --------------------------------------------------------------------------------------------------


def test_a_worked_example() -> None:
    """Right, wrong, right, wrong, right: precision 1, 1/2, 2/3, 1/2, 3/5 at recall 1/3, 1/3, 2/3, 2/3, 1."""
    detections = found((0, 0.9), (300, 0.8), (100, 0.7), (400, 0.6), (200, 0.5))
    voc07, area = means([detections], [truth(0, 100, 200)])
    assert area == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-12)
    assert voc07 == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11, abs=1e-12)


def test_eleven_points_count_recall_in_whole_numbers() -> None:
    """3 of 10 is recall 0.3, though 3 * 0.1 > 0.3 in floating point."""
    detections = found((0, 0.9), (100, 0.9), (200, 0.9))
    voc07, area = means([detections], [truth(*range(0, 1000, 100))])
    assert voc07 == pytest.approx(4 / 11, abs=1e-12)
    assert area == pytest.approx(0.3, abs=1e-12)


def test_the_highest_score_has_the_truth_and_further_detections_are_wrong() -> None:
    assert means([found((0, 0.9), (1, 0.8))], [truth(0)]) == (1.0, 1.0)
    voc07, area = means([found((0, 0.9), (1, 0.8), (100, 0.7))], [truth(0, 100)])
    assert area == pytest.approx((1 + 2 / 3) / 2)
    assert voc07 == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_a_detection_belongs_to_the_truth_it_overlaps_most_even_if_that_is_taken() -> None:
    """As VOC has it, and unlike COCO: the second detection does not fall back to the other truth."""
    truths = truth(0, 3)
    assert means([found((0, 0.9), (1, 0.8))], [truths])[1] == 0.5
    assert coco_precision([found((0, 0.9), (1, 0.8))], [truths]).at50 == pytest.approx(1.0)


def test_image_class_and_overlap_must_fit() -> None:
    detections = found((0, 0.9))
    assert means([detections, detections[:0]], [truth(0), truth()]) == (1.0, 1.0)
    assert means([detections[:0], detections], [truth(0), truth()]) == (0.0, 0.0)
    assert means([found((0, 0.9), label=1)], [truth(0)]) == (0.0, 0.0)
    assert means([found((4, 0.9))], [truth(0)]) == (0.0, 0.0)  # IoU 6 / 14
    half = rows((0, 0, 10, 5, 0.9, 0), width=6)
    assert means([half], [truth(0)]) == (1.0, 1.0)  # exactly 0.5
    assert average_precision([half], [truth(0)], threshold=0.51).mean == 0.0


def test_the_mean_is_over_classes_that_have_something_to_find() -> None:
    truths = torch.cat([truth(0, label=2), truth(100, label=5)])
    result = average_precision([torch.cat([found((0, 0.9), label=2), found((50, 0.9), label=7)])], [truths])
    assert result == boxes.AveragePrecision(0.5, {2: 1.0, 5: 0.0})


def test_difficult_truths_are_neither_wanted_nor_wrong() -> None:
    truths, hard = truth(0, 100), torch.tensor([False, True])
    assert means([found((0, 0.5))], [truths], [hard]) == (1.0, 1.0)
    assert means([found((0, 0.5), (100, 0.9), (101, 0.8))], [truths], [hard]) == (1.0, 1.0)
    assert means([found((0, 0.5), (200, 0.9))], [truths], [hard]) == (0.5, 0.5)
    assert coco_precision([found((0, 0.5), (100, 0.9), (100, 0.8))], [truths], [hard]).mean == pytest.approx(1.0)
    label_only_hard = torch.cat([truth(0), truth(100, label=1)])
    assert average_precision([found((0, 0.5))], [label_only_hard], [hard]).per_class == {0: 1.0}


def test_equal_scores_count_together() -> None:
    """One right, one wrong, same score: precision 1/2 whichever comes first."""
    for detections in (found((0, 0.5), (100, 0.5)), found((100, 0.5), (0, 0.5))):
        assert means([detections], [truth(0)]) == (0.5, 0.5)


def test_values_that_are_not_finite_are_wrong_and_come_last() -> None:
    nan, inf = float("nan"), float("inf")
    broken = rows((0, 0, 10, 10, nan, 0), (nan, 0, 10, 10, 0.9, 0), (0, 0, inf, inf, 0.8, 0), width=6)
    assert means([broken], [truth(0)]) == (0.0, 0.0)
    assert means([torch.cat([broken[:1], found((0, 0.1))])], [truth(0)]) == (1.0, 1.0)
    assert coco_precision([broken], [truth(0)]).mean == 0.0
    inverted = rows((10, 10, 0, 0, 0.9, 0), width=6)
    assert means([inverted], [truth(0)]) == (0.0, 0.0)


def test_nothing_found_is_zero_and_nothing_to_find_is_an_error() -> None:
    assert means([found()], [truth(0)]) == (0.0, 0.0)
    assert coco_precision([found()], [truth(0)]) == boxes.CocoPrecision(0.0, 0.0, 0.0)
    for measure in (average_precision, coco_precision):
        with pytest.raises(UserError, match="nothing to be found in 2 image"):
            measure([found((0, 0.5)), found()], [truth(), truth()])
        with pytest.raises(UserError, match="not difficult"):
            measure([found()], [truth(0)], [torch.tensor([True])])
        with pytest.raises(UserError, match="0 image"):
            measure([], [])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 images of detections, 2 of truths"):
        average_precision([found()], [truth(), truth()])
    with pytest.raises(ValueError, match=r"detections: expected tensors of shape \(n, 6\), got \(1, 5\)"):
        average_precision([truth(0)], [truth(0)])
    with pytest.raises(ValueError, match="one difficult flag for each"):
        average_precision([found()], [truth(0)], [torch.tensor([])])


def test_cocos_mean_is_over_ten_overlaps() -> None:
    """IoU 0.72 passes 0.50, 0.55, 0.60, 0.65 and 0.70."""
    detections = rows((0, 0, 100, 72, 0.9, 3), width=6)
    truths = rows((0, 0, 100, 100, 3), width=5)
    result = coco_precision([found(), detections], [truth(), truths])
    assert (result.mean, result.at50, result.at75) == pytest.approx((0.5, 1.0, 0.0))
    small = [t / torch.tensor([128.0] * 4 + [1] * (t.shape[1] - 4)) for t in (detections, truths)]
    assert coco_precision([small[0]], [small[1]]).mean == pytest.approx(0.5)  # shares of the image do as well


# --- a published figure -----------------------------------------------------------------------------------------------


def read_voc100() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    names = (VOC100 / "voc.names").read_text().split()
    detections, truths, difficult = [], [], []
    for file in sorted((VOC100 / "Annotations").glob("*.xml")):
        objects = ElementTree.parse(file).getroot().findall("object")
        sides = ("xmin", "ymin", "xmax", "ymax")
        values = [
            (*(float(o.findtext(f"bndbox/{s}", "")) for s in sides), names.index(o.findtext("name", "")))
            for o in objects
        ]
        truths.append(rows(*values, width=5))
        difficult.append(torch.tensor([o.findtext("difficult") == "1" for o in objects]))
        results = VOC100 / "detections" / f"{file.stem}.txt"
        lines = results.read_text().splitlines() if results.exists() else []
        values = [tuple(map(float, line.split())) for line in lines]
        detections.append(rows(*values, width=6)[:, [2, 3, 4, 5, 1, 0]])
    return detections, truths, difficult


@pytest.mark.skipif(not VOC100.is_dir(), reason="needs the voc100 data")
def test_the_known_figure_of_somebodys_detector_is_reproduced() -> None:
    detections, truths, difficult = read_voc100()
    assert sum(map(len, detections)) == 452
    assert average_precision(detections, truths, difficult, curve="area").mean == pytest.approx(0.614, abs=0.0005)
    assert average_precision(detections, truths, difficult, curve="area").mean == pytest.approx(
        reference(detections, truths, difficult, "area"), abs=1e-9
    )
    coco = coco_precision(detections, truths, difficult)
    assert coco.at50 == pytest.approx(0.614, abs=0.01)  # 101 points, and crowds for difficult
    assert max(coco.at75, coco.mean) < coco.at50 - 0.1


# --- properties -------------------------------------------------------------------------------------------------------


def reference(detections: list[Tensor], truths: list[Tensor], difficult: list[Tensor], curve: str) -> float:
    """VOC's rules, one detection after the other; precision is read at the end of each run of equal scores."""
    found_at = [(float(row[4]), i, row.double().numpy()) for i, part in enumerate(detections) for row in part]
    scores = {}
    for label in {float(row[4]) for part, hard in zip(truths, difficult, strict=True) for row in part[~hard]}:
        own = [
            (part[part[:, 4] == label], hard[part[:, 4] == label]) for part, hard in zip(truths, difficult, strict=True)
        ]
        wanted = sum(int((~hard).sum()) for _, hard in own)
        taken, marks = set(), []
        for score, image, row in sorted(found_at, key=lambda entry: -entry[0]):
            if row[5] != label:
                continue
            best, which = 0.0, -1
            for j, box in enumerate(own[image][0].double().numpy()):
                wide, high = np.minimum(row[2:4], box[2:4]) - np.maximum(row[:2], box[:2])
                common = max(wide, 0) * max(high, 0)
                union = np.prod(row[2:4] - row[:2]) + np.prod(box[2:4] - box[:2]) - common
                if common / union > best:
                    best, which = common / union, j
            if best >= 0.5 and own[image][1][which]:
                continue
            marks.append((score, best >= 0.5 and (image, which) not in taken))
            taken |= {(image, which)} if best >= 0.5 else set()
        points, right = [], 0
        for n, (score, good) in enumerate(marks, start=1):
            right += good
            if n == len(marks) or marks[n][0] != score:
                points.append((right, right / n))
        if curve == "voc07":
            tops = [max([p for r, p in points if 10 * r >= k * wanted], default=0.0) for k in range(11)]
            scores[label] = sum(tops) / 11
        else:
            steps = np.diff([0] + [r for r, _ in points])
            scores[label] = sum(s * max(p for _, p in points[k:]) for k, s in enumerate(steps)) / wanted
    return sum(scores.values()) / len(scores)


side = st.integers(1, 12)
place = st.integers(0, 12)
label = st.integers(0, 2)


def corners(x: int, y: int, wide: int, high: int) -> tuple[float, ...]:
    return (x, y, x + wide, y + high)


box = st.builds(corners, place, place, side, side)
a_truth = st.tuples(box, label).map(lambda t: (*t[0], t[1]))
a_detection = st.tuples(box, st.integers(1, 6), label).map(lambda t: (*t[0], t[1] / 8, t[2]))
image_of_truths = st.lists(a_truth, max_size=4).map(lambda values: rows(*values, width=5))
image_of_detections = st.lists(a_detection, max_size=6).map(lambda values: rows(*values, width=6))


@st.composite
def measured(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Up to three images with detections, truths and difficult flags; at least one thing to find."""
    num = draw(st.integers(1, 3))
    truths = [draw(image_of_truths) for _ in range(num)]
    truths[0] = torch.cat([truths[0], rows(draw(a_truth), width=5)])
    hard = [torch.tensor([draw(st.booleans()) for _ in part], dtype=torch.bool) for part in truths]
    hard[0][-1] = False
    return [draw(image_of_detections) for _ in range(num)], truths, hard


@given(measured())
def test_it_agrees_with_the_plain_reference(data: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> None:
    for curve in CURVES:
        assert average_precision(*data, curve=curve).mean == pytest.approx(reference(*data, curve), abs=1e-9)


@given(measured())
def test_perfect_detections_give_one_and_nothing_gives_more(
    data: tuple[list[Tensor], list[Tensor], list[Tensor]],
) -> None:
    detections, truths, hard = data
    apart = [torch.unique(part, dim=0) for part in truths]  # a box that is there twice can be found only once
    perfect = [torch.cat([part[:, :4], torch.full((len(part), 1), 0.5), part[:, 4:]], 1) for part in apart]
    assert means(perfect, apart) == pytest.approx((1.0, 1.0))
    assert coco_precision(perfect, apart).mean == pytest.approx(1.0)
    assert all(0 <= value <= 1 + 1e-12 for value in means(detections, truths, hard))


@given(measured(), st.integers(0, 8))
def test_duplicates_never_help(data: tuple[list[Tensor], list[Tensor], list[Tensor]], eighths: int) -> None:
    detections, truths, hard = data
    copies = [part.clone() for part in detections]
    for part in copies:
        part[:, 4] = (part[:, 4] - eighths / 8).clamp(min=0)
    before = means(detections, truths, hard)
    after = means([torch.cat(pair) for pair in zip(detections, copies, strict=True)], truths, hard)
    assert all(b >= a - 1e-12 for b, a in zip(before, after, strict=True))


@given(measured(), st.integers(0, 8), label)
def test_a_false_positive_never_raises_it(
    data: tuple[list[Tensor], list[Tensor], list[Tensor]], eighths: int, kind: int
) -> None:
    detections, truths, hard = data
    wrong = rows((500, 500, 510, 510, eighths / 8, kind), width=6)
    after = means([torch.cat([wrong, detections[0]]), *detections[1:]], truths, hard)
    assert all(b >= a - 1e-12 for b, a in zip(means(detections, truths, hard), after, strict=True))


@given(measured(), st.randoms(use_true_random=False))
def test_the_order_of_detections_does_not_matter(
    data: tuple[list[Tensor], list[Tensor], list[Tensor]], rng: object
) -> None:
    detections, truths, hard = data
    generator = torch.Generator().manual_seed(rng.randint(0, 999))  # type: ignore[attr-defined]
    mixed = [part[torch.randperm(len(part), generator=generator)] for part in detections]
    assert means(mixed, truths, hard) == means(detections, truths, hard)


@given(measured(), st.sampled_from([0.125, 0.5, 8.0, 1024.0]))
def test_scale_does_not_matter(data: tuple[list[Tensor], list[Tensor], list[Tensor]], scale: float) -> None:
    detections, truths, hard = data

    def scaled(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([scale * part[:, :4], part[:, 4:]], 1) for part in parts]

    assert means(scaled(detections), scaled(truths), hard) == means(detections, truths, hard)


@settings(max_examples=10)
@given(measured())
def test_scores_matter_only_by_their_order(data: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> None:
    detections, truths, hard = data
    squared = [torch.cat([part[:, :4], part[:, 4:5] ** 2, part[:, 5:]], 1) for part in detections]
    assert means(squared, truths, hard) == means(detections, truths, hard)


def test_two_hundred_images_take_hundredths_of_a_second() -> None:
    generator = torch.Generator().manual_seed(0)

    def image(count: int, *more: Tensor) -> Tensor:
        first = 200 * torch.rand(count, 2, generator=generator)
        return torch.cat([first, first + 20 + 80 * torch.rand(count, 2, generator=generator), *more], 1)

    def kinds(count: int) -> Tensor:
        return torch.randint(0, 20, (count, 1), generator=generator).float()

    detections = [image(100, torch.rand(100, 1, generator=generator), kinds(100)) for _ in range(200)]
    truths = [image(4, kinds(4)) for _ in range(200)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        average_precision(detections, truths)
        start = time.process_time()
        average_precision(detections, truths)
        assert time.process_time() - start < 0.3  # about 0.03 on a quiet machine
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("curve", ["voc07", "area"])
def test_a_sample_of_images_has_the_precision_of_those_images(curve: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    truths, detections = [], []
    for _ in range(12):
        corners = torch.rand(4, 2, generator=rng)
        true = torch.cat([corners, corners + 0.2, torch.randint(3, (4, 1), generator=rng)], 1)
        near = true[:, :4] + 0.08 * torch.randn(4, 4, generator=rng)
        scores = (torch.rand(4, 1, generator=rng) * 4).round() / 4  # with equal ones
        truths.append(true)
        detections.append(torch.cat([near, scores, true[:, 4:]], 1))
    drawn = torch.randint(12, (8, 12), generator=rng)
    weights = torch.zeros(8, 12).scatter_add_(1, drawn, torch.ones(8, 12))
    found = boxes.resampled_precision(boxes.matches(detections, truths), weights, curve=curve)
    wanted = [
        boxes.average_precision([detections[i] for i in rows], [truths[i] for i in rows], curve=curve).mean
        for rows in drawn.tolist()
    ]
    assert found.tolist() == pytest.approx(wanted)
