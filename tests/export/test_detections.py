from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from secateur.export import ExportError
from secateur.export.detections import Suppression, append_detections, compare_detections
from secateur.export.onnx_export import export_proto
from secateur.export.verify import open_session
from secateur.pipeline.workloads.detection import networks, ssd

BOXES = 24
DEFAULT_BOXES = networks.grid_boxes([4, 2], [[(0.3, 0.3)], [(0.5, 0.4), (0.3, 0.6)]])


def suppression(default_boxes: Tensor = DEFAULT_BOXES, **changes: Any) -> Suppression:
    """What ``ssd.detect`` does unless told otherwise."""
    usual = Suppression(default_boxes, "softmax", 0.01, 0.45, 400, 200, ssd.VARIANCES, ssd.LARGEST_LOG)
    return replace(usual, **changes)


def reference(heads: Tensor, how: Suppression) -> Tensor:
    return ssd.detect(
        heads,
        how.default_boxes,
        how.scores,
        least_score=how.least_score,
        nms_iou=how.nms_iou,
        per_class=how.per_class,
        most=how.most,
    )


def passing_on(classes: int, batch: int | str = "batch", opset: int = 20, output: str = "logits") -> onnx.ModelProto:
    """A network whose raw heads are its input."""
    heads = f"float[{batch}, {BOXES}, {4 + classes + 1}]"
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]>'
        f"network ({heads} input) => ({heads} {output}) {{ {output} = Identity(input) }}"
    )


def run(proto: onnx.ModelProto, inputs: Tensor) -> Tensor:
    session = open_session(proto.SerializeToString())
    (port,) = session.get_outputs()
    assert port.name == "detections"
    return torch.as_tensor(session.run(None, {"input": inputs.numpy()})[0])


def close_calls(heads: Tensor, how: Suppression) -> bool:
    """May the last bit decide what is detected?"""
    overlaps = ssd.overlaps(*[ssd.decode(heads[..., :4], how.default_boxes).clamp(0, 1)] * 2)
    scores = ssd.probabilities(heads[..., 4:], how.scores).flatten(1).sort(1).values
    shown = scores[:, 1:] > how.least_score - 1e-6
    near = scores.diff(dim=1) < 1e-6
    return bool(
        ((overlaps - how.nms_iou).abs() < 1e-6).any()
        or ((scores - how.least_score).abs() < 1e-6).any()
        or (near & shown).any()
    )


# -- detections in the file --------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    classes=st.sampled_from([1, 2, 5]),
    batch=st.sampled_from([1, 3]),
    dynamic_batch=st.booleans(),
    opset=st.sampled_from([18, 20, 22]),
    per_class=st.sampled_from([1, 3, BOXES, 400]),
    most=st.sampled_from([1, 6, 20, 200]),
    least_score=st.sampled_from([0.01, 0.4]),
    nms_iou=st.sampled_from([0.2, 0.45, 0.8]),
    spread=st.sampled_from([1.0, 12.0]),
)
def test_a_file_finds_what_detect_finds_in_the_same_heads(
    seed: int, classes: int, batch: int, dynamic_batch: bool, opset: int, spread: float, **changes: Any
):
    how = suppression(**changes)
    heads = torch.randn(batch, BOXES, 4 + classes + 1, generator=torch.Generator().manual_seed(seed))
    heads[..., :4] *= spread  # boxes of 12 leave the image and grow beyond the limit
    heads[..., 4:] *= 3
    assume(not close_calls(heads, how))
    expected = reference(heads, how)
    network = passing_on(classes, "batch" if dynamic_batch else batch, opset)
    found = run(append_detections(network, how), heads)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # in the same order, too
    parity = compare_detections(found, expected, tolerance=1e-5)
    assert parity.ok
    assert (parity.matched, parity.unmatched, parity.samples) == (int((expected[..., 4] >= 0).sum()), 0, batch)


@pytest.mark.parametrize("per_class", [3, 400])
@pytest.mark.parametrize("heads", [torch.zeros(3, BOXES, 7) - 20, torch.full((3, BOXES, 7), torch.nan)])
def test_nothing_found_leaves_all_rows_unused(heads: Tensor, per_class: int):
    how = suppression(scores="sigmoid", per_class=per_class, most=7)
    found = run(append_detections(passing_on(2), how), heads)
    assert found.shape == (3, 7, 6)
    assert (found == -1).all()


def test_of_images_with_and_without_objects_each_has_its_own_rows():
    heads = torch.zeros(3, BOXES, 7)
    heads[..., 4] = 20
    heads[1, 5, 6] = 40
    found = run(append_detections(passing_on(2), suppression(most=2)), heads)
    assert (found[[0, 2]] == -1).all()
    assert (found[1, 1] == -1).all()
    torch.testing.assert_close(found[1, 0], torch.cat([ssd.corners(DEFAULT_BOXES[5]), torch.tensor([1.0, 1.0])]))


def test_of_equal_scores_no_more_than_allowed_are_looked_at():
    how = suppression(per_class=3, nms_iou=1.0)
    found = run(append_detections(passing_on(2), how), torch.zeros(1, BOXES, 7))[0]
    assert found[found[:, 4] >= 0][:, 5].tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(found[:, 4], reference(torch.zeros(1, BOXES, 7), how)[0, :, 4])


def test_boxes_grow_no_further_than_the_limit():
    heads = torch.zeros(1, BOXES, 7)
    heads[..., 2:4], heads[..., 5] = 100, 9
    how = suppression(torch.full((BOXES, 4), 0.004) + torch.tensor([0.5, 0.5, 0, 0]))
    found = run(append_detections(passing_on(2), how), heads)
    torch.testing.assert_close(found[0, 0, 2:4] - found[0, 0, :2], torch.full((2,), 0.004 * 1000 / 16))
    assert compare_detections(found, reference(heads, how), tolerance=1e-6).ok


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_whole_detector_finds_the_same_in_its_file(dynamic_batch: bool):
    torch.manual_seed(0)
    model = networks.SmallSSD(3, width=8).eval()
    for head in model.heads.cls:
        head.weight.data *= 4  # untrained heads are all equally sure
    images = torch.randn(3, 3, 64, 64)
    how = suppression(model.default_boxes, least_score=0.6, most=50)
    network = export_proto(model, images[:1], dynamic_batch=dynamic_batch)
    before = network.SerializeToString()
    proto = append_detections(network, how)
    assert network.SerializeToString() == before
    assert list(proto.graph.node)[: len(network.graph.node)] == list(network.graph.node)
    (output,) = proto.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim]
    assert shape == ["batch" if dynamic_batch else 1, 50, 6]
    with torch.no_grad():
        expected = reference(model(images), how)
    parts = [images, images[:1]] if dynamic_batch else images.split(1)
    found = torch.cat([run(proto, part) for part in parts])
    parity = compare_detections(found[:3], expected, tolerance=1e-4, least_score=0.6)
    assert parity.ok, parity.reason
    assert parity.matched > 20
    if dynamic_batch:
        assert compare_detections(found[3:], expected[:1], tolerance=1e-4, least_score=0.6).ok


def _second_output(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, BOXES, 7]))


def _shape(*shape: int | str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        output = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)
        proto.graph.output[0].CopyFrom(output)

    return change


def _half(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_second_output, "one output is raw heads; this one has logits, input"),
        (_shape(1, 10), r"logits is \(1, 10\) of type float"),
        (_shape(1, 30, 7), r"for 24 default boxes; logits is \(1, 30, 7\)"),
        (_shape(1, "boxes", 7), r"logits is \(1, boxes, 7\)"),
        (_shape(1, BOXES, 5), r"logits is \(1, 24, 5\)"),
        (_half, "of type float16"),
    ],
)
def test_a_network_without_raw_heads_is_refused(change: Callable[[onnx.ModelProto], None], message: str):
    proto = passing_on(2)
    change(proto)
    with pytest.raises(ExportError, match=message):
        append_detections(proto, suppression())


def test_an_old_network_is_refused():
    with pytest.raises(ExportError, match="opset 18 or newer, the network has 17"):
        append_detections(passing_on(2, opset=17), suppression())


def test_a_network_that_uses_the_name_is_refused():
    with pytest.raises(ExportError, match="names clash"):
        append_detections(passing_on(2, output="detections"), suppression())


# -- comparison --------------------------------------------------------------------------------------------------------


def some() -> npt.NDArray[np.float64]:
    """Two images: three detections, and two."""
    rows = np.full((2, 4, 6), -1.0)
    rows[0, 0] = 0.1, 0.1, 0.4, 0.5, 0.9, 0
    rows[0, 1] = 0.1, 0.1, 0.4, 0.5, 0.7, 1
    rows[0, 2] = 0.5, 0.2, 0.8, 0.6, 0.5, 0
    rows[1, 0] = 0.2, 0.2, 0.3, 0.3, 0.8, 2
    rows[1, 1] = 0.6, 0.6, 1.0, 1.0, 0.4, 2
    return rows


def test_equal_detections_are_equal_in_any_order():
    found = some()
    assert compare_detections(found, some()).ok
    parity = compare_detections(torch.as_tensor(found[:, ::-1].copy()), some(), tolerance=0)
    assert (parity.ok, parity.matched, parity.unmatched, parity.samples, parity.reason) == (True, 5, 0, 2, "")
    assert (parity.max_score_error, parity.max_box_error) == (0, 0)


def test_nothing_equals_nothing():
    nothing = np.full((2, 4, 6), -1.0)
    assert compare_detections(nothing, nothing).ok
    assert not compare_detections(nothing, some()).ok
    assert not compare_detections(some(), nothing).ok


def test_errors_are_the_largest_between_partners():
    found = some()
    found[0, 1, 4] += 4e-4
    found[1, 0, 2] -= 7e-4
    parity = compare_detections(found, some())
    assert parity.ok
    assert parity.max_score_error == pytest.approx(4e-4)
    assert parity.max_box_error == pytest.approx(7e-4)
    assert not compare_detections(found, some(), tolerance=5e-4).ok
    assert not compare_detections(found, some(), tolerance=3e-4).ok


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ((1, 1, 0), 0.61, "image 1: a detection of class 2 with score 0.4000 is found but not expected"),
        ((0, 1), -1, "image 0: a detection of class 1 with score 0.7000 is expected but not found"),
        ((1, 2), (0.1, 0.1, 0.2, 0.2, 0.3, 4), "image 1: a detection of class 4 with score 0.3000 is found but"),
        ((0, 2, 5), 1, "image 0: a detection of class 1 with score 0.5000 is found but not expected"),
        ((0, 0, 4), 0.902, "image 0: a detection of class 0 with score 0.9020 is found but not expected"),
        ((1, 0, 1), np.nan, "image 1: NaN or infinity among the found detections"),
        ((1, 0, 4), np.inf, "image 1: NaN or infinity among the found detections"),
        ((0, 3, 0), 0.5, "image 0: a detection of class -1 with score -1.0000 is found but not expected"),
    ],
    ids=["moved", "missing", "extra", "class", "score", "nan", "infinite", "unused row"],
)
def test_a_difference_is_noticed(place: tuple[int, ...], value: Any, reason: str):
    found = some()
    found[place] = value
    parity = compare_detections(found, some())
    assert not parity.ok
    assert parity.reason.startswith(reason)


def test_nan_is_never_equal_to_itself():
    broken = some()
    broken[0, 0, 0] = np.nan
    assert not compare_detections(broken, broken).ok


def test_each_detection_has_one_partner_and_as_many_as_possible_have_one():
    twice, other = some(), some()
    twice[0, 3] = twice[0, 0]
    parity = compare_detections(some(), twice)
    assert (parity.ok, parity.matched, parity.unmatched) == (False, 5, 1)
    twice[0, 3, 0] += 8e-4
    other[0, 0, 0] += 8e-4  # the nearest of the second, and the only one for the first
    other[0, 3] = other[0, 0]
    other[0, 3, 0] += 8e-4
    parity = compare_detections(other, twice)
    assert (parity.ok, parity.matched) == (True, 6)
    assert parity.max_box_error == pytest.approx(8e-4)


@pytest.mark.parametrize("swap", [False, True])
def test_what_scores_no_more_than_the_least_score_may_be_missing(swap: bool):
    pair = [some(), some()]
    pair[swap][1, 2] = 0, 0, 1, 1, 0.3009, 1
    parity = compare_detections(*pair, least_score=0.3)
    assert (parity.ok, parity.matched, parity.unmatched) == (True, 5, 1)
    assert not compare_detections(*pair, least_score=0.29).ok
    assert not compare_detections(*pair, least_score=0.3, tolerance=5e-4).ok
    assert not compare_detections(*pair).ok


@pytest.mark.parametrize("swap", [False, True])
def test_the_last_row_of_a_full_image_may_be_another(swap: bool):
    pair = [some(), some()]
    for rows, x in zip(pair, (0.1, 0.5), strict=True):
        rows[0, 3] = x, x, x + 0.2, x + 0.2, 0.3, 1
    pair[swap][0, 3, 4] = 0.3006
    parity = compare_detections(*pair)
    assert (parity.ok, parity.matched, parity.unmatched) == (True, 5, 2)
    assert not compare_detections(*pair, tolerance=5e-4).ok
    roomy = [np.pad(rows, ((0, 0), (0, 1), (0, 0)), constant_values=-1) for rows in pair]
    assert not compare_detections(*roomy).ok
    pair[swap][0, 2, 0] += 0.1
    assert not compare_detections(*pair).ok


@pytest.mark.parametrize("swap", [False, True])
def test_what_was_suppressed_by_a_hair_may_be_missing_and_what_it_would_have_suppressed_be_there(swap: bool):
    pair = [some(), some()]
    pair[swap][0, 3] = 0.1, 0.1, 0.4, 0.3, 0.45, 0  # overlaps the surest of its class by 0.5
    parity = compare_detections(*pair, nms_iou=0.5)
    assert (parity.ok, parity.matched, parity.unmatched) == (True, 5, 1)
    assert not compare_detections(*pair).ok
    assert not compare_detections(*pair, nms_iou=0.45).ok
    assert not compare_detections(*pair, nms_iou=0.55).ok
    roomy = [np.pad(rows, ((0, 0), (0, 1), (0, 0)), constant_values=-1) for rows in pair]
    roomy[1 - swap][0, 4] = 0.1, 0.1, 0.4, 0.28, 0.44, 0  # the other side's is suppressed by the one above
    assert compare_detections(*roomy, nms_iou=0.5).ok
    roomy[1 - swap][0, 4, 4] = 0.46  # surer than that one, it is suppressed by nobody
    assert not compare_detections(*roomy, nms_iou=0.5).ok
    roomy[1 - swap][0, 4, 4:] = 0.44, 1  # of another class
    assert not compare_detections(*roomy, nms_iou=0.5).ok


def test_only_detections_of_the_same_shape_can_be_equal():
    assert "shapes" in compare_detections(some(), some()[:1]).reason
    assert not compare_detections(some()[..., :5], some()[..., :5]).ok
    with pytest.raises(ExportError, match="at least one image"):
        compare_detections(some()[:0], some()[:0])
