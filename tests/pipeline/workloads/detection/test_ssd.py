"""Raw heads of detectors: boxes and back, who matches whom, the loss, suppression, and networks that can be cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.export.onnx_export import export_onnx
from secateur.export.slicing import OnnxTemplate
from secateur.export.verify import predict
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.detection import networks, ssd
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.surgery import certify, prune
from secateur.pruning.trace import trace

GRID = networks.grid_boxes([4, 2], [[(0.2, 0.2), (0.3, 0.15)], [(0.5, 0.5), (0.35, 0.7)]])


def random_boxes(generator: torch.Generator, *shape: int) -> Tensor:
    """Corners (*shape, 4) inside the image, with sides of 0.05 at least."""
    low = torch.rand((*shape, 2), generator=generator) * 0.7
    return torch.cat([low, (low + 0.05 + 0.4 * torch.rand((*shape, 2), generator=generator)).clamp(max=1)], -1)


def random_targets(seed: int, images: int = 3, rows: int = 4, num_classes: int = 3) -> Tensor:
    """Targets with a different number of used rows in each image."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.full((images, rows, 5), -1.0)
    for i in range(images):
        used = int(torch.randint(0, rows + 1, (), generator=generator))
        targets[i, :used, :4] = random_boxes(generator, used)
        targets[i, :used, 4] = torch.randint(0, num_classes, (used,), generator=generator).float()
    return targets


def padded(targets: Tensor, more: int) -> Tensor:
    return torch.cat([targets, torch.full((len(targets), more, 5), -1.0)], 1)


def perfect(targets: Tensor, default_boxes: Tensor, num_classes: int) -> Tensor:
    """Raw heads that say exactly what the targets do."""
    labels, boxes = ssd.match(default_boxes, targets)
    logits = 20.0 * F.one_hot(labels, num_classes + 1)
    return torch.cat([ssd.encode(boxes, default_boxes).masked_fill(labels[..., None] == 0, 0), logits], -1)


# -- boxes -------------------------------------------------------------------------------------------------------------

side = st.floats(0.01, 1.0)
place = st.floats(0.0, 1.0)


@given(x=place, y=place, w=side, h=side, default=st.tuples(place, place, side, side))
def test_decoding_undoes_encoding(x: float, y: float, w: float, h: float, default: tuple[float, ...]) -> None:
    box = torch.tensor([x, y, x + w, y + h], dtype=torch.float64)
    default_box = torch.tensor(default, dtype=torch.float64)
    found = ssd.decode(ssd.encode(box, default_box), default_box)
    if max(w / default[2], h / default[3]) < 1000 / 16:
        assert torch.allclose(found, box, atol=1e-9)


def test_offsets_are_those_of_the_paper_in_units_of_the_variances() -> None:
    box, default = torch.tensor([0.2, 0.2, 0.6, 0.4]), torch.tensor([0.5, 0.5, 0.2, 0.2])
    expected = [(0.4 - 0.5) / 0.2 / 0.1, (0.3 - 0.5) / 0.2 / 0.1, math.log(2) / 0.2, 0.0]
    assert torch.allclose(ssd.encode(box, default), torch.tensor(expected), atol=1e-5)
    assert torch.allclose(ssd.encode(ssd.corners(default), default), torch.zeros(4), atol=1e-5)


def test_boxes_grow_by_a_bounded_factor_whatever_the_network_says() -> None:
    found = ssd.decode(torch.tensor([0.0, 0.0, 1e6, 1e6]), torch.tensor([0.5, 0.5, 0.1, 0.1]))
    assert torch.isfinite(found).all()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_overlaps_are_torchvisions(seed: int) -> None:
    from torchvision.ops import box_iou

    generator = torch.Generator().manual_seed(seed)
    a, b = random_boxes(generator, 2, 5), random_boxes(generator, 2, 7)
    expected = torch.stack([box_iou(a[i], b[i]) for i in range(2)])
    assert torch.allclose(ssd.overlaps(a, b), expected, atol=1e-6)
    assert torch.equal(ssd.overlaps(torch.zeros(1, 4), torch.zeros(1, 4)), torch.zeros(1, 1))


# -- matching ----------------------------------------------------------------------------------------------------------


def match_one_by_one(default_boxes: Tensor, rows: Tensor) -> list[int]:
    """Row of the object that each default box belongs to, -1 = none; in plain loops."""

    def iou(a: Tensor, b: Tensor) -> float:
        wide = min(a[2], b[2]) - max(a[0], b[0])
        high = min(a[3], b[3]) - max(a[1], b[1])
        common = max(0.0, float(wide)) * max(0.0, float(high))
        area = sum(float((x[2] - x[0]) * (x[3] - x[1])) for x in (a, b))
        return common / max(area - common, 1e-12)

    corners = ssd.corners(default_boxes)
    table = [[iou(box, row) for row in rows] for box in corners]
    owners = []
    for of_box in table:
        best = max(range(len(rows)), key=lambda j: of_box[j], default=-1)
        owners.append(best if best >= 0 and of_box[best] >= 0.5 else -1)
    for j in range(len(rows)):
        best = max(range(len(corners)), key=lambda i: table[i][j])
        if table[best][j] > 0:
            owners[best] = j
    return owners


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_matching_is_that_of_plain_loops(seed: int) -> None:
    targets = random_targets(seed)
    labels, boxes = ssd.match(GRID, targets)
    for i, rows in enumerate(targets):
        owners = match_one_by_one(GRID, rows[rows[:, 4] >= 0])
        assert labels[i].tolist() == [0 if j < 0 else int(rows[j, 4]) + 1 for j in owners]
        for box, j in zip(boxes[i], owners, strict=True):
            assert j < 0 or torch.equal(box, rows[j, :4])


def test_every_object_has_a_box_of_its_own_even_where_none_overlaps_by_half() -> None:
    targets = torch.tensor([[[0.1, 0.1, 0.14, 0.14, 2.0]]])
    labels, _ = ssd.match(GRID, targets)
    assert sorted(labels[0].tolist())[-2:] == [0, 3]


def test_objects_without_area_and_images_without_objects_match_nothing() -> None:
    nothing = torch.tensor([[[0.3, 0.3, 0.3, 0.3, 1.0]]])
    assert not ssd.match(GRID, nothing)[0].any()
    assert not ssd.match(GRID, torch.full((2, 3, 5), -1.0))[0].any()
    assert ssd.match(GRID, torch.zeros(2, 0, 5))[0].shape == (2, len(GRID))


def test_difficult_objects_are_learned_from_like_others() -> None:
    plain = random_targets(0)
    marked = plain.clone()
    used = plain[..., 4] >= 0
    marked[..., 4] = torch.where(used, -2 - plain[..., 4], plain[..., 4])
    assert torch.equal(ssd.classes_of(marked), ssd.classes_of(plain))
    for one, other in zip(ssd.match(GRID, plain), ssd.match(GRID, marked), strict=True):
        assert torch.equal(one, other)


# -- loss --------------------------------------------------------------------------------------------------------------


def loss_one_by_one(outputs: Tensor, targets: Tensor) -> float:
    """Liu et al.'s loss, image by image and box by box."""
    total, matched = 0.0, 0
    for out, rows in zip(outputs, targets, strict=True):
        rows = rows[rows[:, 4] >= 0]
        owners = match_one_by_one(GRID, rows)
        negatives = []
        positives = sum(j >= 0 for j in owners)
        for i, j in enumerate(owners):
            wanted = 0 if j < 0 else int(rows[j, 4]) + 1
            entropy = -float(out[i, 4:].log_softmax(0)[wanted])
            if j < 0:
                negatives.append(entropy)
                continue
            total += entropy
            for difference in (out[i, :4] - ssd.encode(rows[j, :4], GRID[i])).tolist():
                total += 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5
        total += sum(sorted(negatives, reverse=True)[: 3 * positives])
        matched += positives
    return total / max(1, matched)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_loss_is_that_of_plain_loops(seed: int) -> None:
    targets = random_targets(seed)
    outputs = torch.randn(3, len(GRID), 8, generator=torch.Generator().manual_seed(seed))
    found = ssd.multibox_loss(outputs, targets, GRID).mean.item()
    assert found == pytest.approx(loss_one_by_one(outputs, targets), rel=1e-4)


def test_padding_rows_never_count() -> None:
    targets = random_targets(1)
    outputs = torch.randn(3, len(GRID), 8)
    few, many = (ssd.multibox_loss(outputs, t, GRID) for t in (targets, padded(targets, 5)))
    assert torch.equal(few.per_image, many.per_image)
    assert torch.equal(few.matched, many.matched)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_gradients_are_finite_with_and_without_objects(scores: Any) -> None:
    for targets in (random_targets(2), torch.full((3, 2, 5), -1.0)):
        outputs = (30 * torch.randn(3, len(GRID), 8)).requires_grad_()
        loss = ssd.multibox_loss(outputs, targets, GRID, scores).mean
        loss.backward()
        assert math.isfinite(loss.item())
        assert outputs.grad is not None
        assert torch.isfinite(outputs.grad).all()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_perfect_heads_cost_nothing_and_wrong_ones_do(scores: Any) -> None:
    targets = random_targets(3)
    assert (targets[..., 4] >= 0).any()
    heads = perfect(targets, GRID, 3)
    heads[..., 4:] -= 10
    right = ssd.multibox_loss(heads, targets, GRID, scores)
    assert right.mean < 1e-3
    assert right.per_image.shape == (3,)
    assert ssd.multibox_loss(heads.flip(1), targets, GRID, scores).mean > 1


# -- distillation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_distillation_pulls_the_student_to_the_teacher(scores: Any) -> None:
    torch.manual_seed(0)
    teacher = perfect(random_targets(3), GRID, 3) / 4 + 0.1 * torch.randn(3, len(GRID), 8)
    assert ssd.distillation_loss(teacher, teacher, 2.0, scores).item() == pytest.approx(0, abs=1e-5)
    student = torch.randn(3, len(GRID), 8).requires_grad_()
    losses = []
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(150):
        loss = ssd.distillation_loss(student, teacher, 2.0, scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_distillation_does_not_look_at_boxes_where_both_see_background() -> None:
    sure = torch.zeros(1, len(GRID), 8)
    sure[..., 4] = 10
    other = sure.clone()
    other[..., :4], other[..., 4] = 5, 9
    assert ssd.distillation_loss(other, sure, 4.0).item() == 0
    assert ssd.distillation_loss(other, sure, 4.0, least=0.0).item() > 0


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_divergence_is_of_each_image_by_itself_and_grows_with_what_is_lost(scores: Any) -> None:
    torch.manual_seed(0)
    dense = perfect(random_targets(3), GRID, 3) / 4
    noise = torch.randn(dense.shape)
    assert torch.allclose(ssd.divergence(dense, dense, scores), torch.zeros(3), atol=1e-5)
    near, far = (ssd.divergence(dense + size * noise, dense, scores) for size in (0.1, 1.0))
    assert (near >= 0).all() and (far > near).all()
    alone = [ssd.divergence((dense + noise)[i : i + 1], dense[i : i + 1], scores) for i in range(3)]
    assert torch.allclose(far, torch.cat(alone), atol=1e-6)


def test_divergence_by_hand() -> None:
    """One default box sees something, sure by a half; the candidate says 0.8 to 0.2, and is 2 off."""
    dense = torch.zeros(1, len(GRID), 6)
    dense[..., 4] = 30
    dense[0, 7, 4] = 0
    candidate = dense.clone()
    candidate[0, 7, 4:] = torch.tensor([0.8, 0.2]).log()
    candidate[0, 7, 0] += 2
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2) + 0.5 * (2 - 0.5)
    assert ssd.divergence(candidate, dense).item() == pytest.approx(expected, rel=1e-5)
    candidate[0, 8, :4] = 9.0  # both see background there
    assert ssd.divergence(candidate, dense).item() == pytest.approx(expected, rel=1e-5)


# -- detections --------------------------------------------------------------------------------------------------------


def heads_for(default_boxes: Tensor, rows: list[tuple[int, tuple[float, ...], int, float]], num_classes: int) -> Tensor:
    """Raw heads (1, boxes, ...) that show background but for rows (default box, corners, class, logit)."""
    heads = torch.zeros(1, len(default_boxes), 4 + num_classes + 1)
    heads[..., 4] = 20
    for i, box, label, logit in rows:
        heads[0, i, :4] = ssd.encode(torch.tensor(box), default_boxes[i])
        heads[0, i, 4], heads[0, i, 5 + label] = 0, logit
    return heads


def test_of_overlapping_boxes_of_a_class_the_surest_is_kept() -> None:
    near, far = (0.1, 0.1, 0.4, 0.4), (0.6, 0.6, 0.9, 0.9)
    rows = [(0, near, 0, 3.0), (1, (0.11, 0.1, 0.41, 0.4), 0, 5.0), (2, near, 1, 4.0), (3, far, 0, 2.0)]
    found = ssd.detect(heads_for(GRID, rows, 2), GRID, least_score=0.3, most=5)[0]
    assert found[:, 5].tolist() == [0, 1, 0, -1, -1]
    assert torch.allclose(found[0, :4], torch.tensor([0.11, 0.1, 0.41, 0.4]), atol=1e-5)
    assert torch.allclose(found[2, :4], torch.tensor(far), atol=1e-5)
    assert (found[:3, 4].diff() <= 0).all()
    assert (found[3:] == -1).all()


def test_detections_are_those_of_torchvision() -> None:
    from torchvision.ops import batched_nms

    torch.manual_seed(0)
    heads = 2 * torch.randn(3, len(GRID), 8)
    found = ssd.detect(heads, GRID, least_score=0.2, nms_iou=0.3, most=100)
    for i in range(3):
        scores = heads[i, :, 4:].softmax(1)[:, 1:]
        where, label = (scores > 0.2).nonzero(as_tuple=True)
        boxes = ssd.decode(heads[i, :, :4], GRID).clamp(0, 1)[where]
        kept = batched_nms(boxes, scores[where, label], label, 0.3)
        rows = found[i][found[i, :, 5] >= 0]
        assert torch.allclose(rows[:, 4], scores[where, label][kept])
        assert torch.allclose(rows[:, :4], boxes[kept])
        assert torch.equal(rows[:, 5].long(), label[kept])


def test_nothing_is_found_where_nothing_is_sure_enough() -> None:
    assert (ssd.detect(heads_for(GRID, [], 2), GRID) == -1).all()
    assert (ssd.detect(torch.full((1, len(GRID), 7), math.nan), GRID) == -1).all()


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Tensor, ChannelGraph]:
    torch.manual_seed(0)
    model = networks.build_detector("small_ssd", 3, {}).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    image = torch.randn(1, 3, 64, 64)
    return model, image, trace(model, image)


def test_small_ssd_is_small_and_gives_raw_heads(small: Any) -> None:
    model, image, _ = small
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert model(image).shape == (1, len(model.default_boxes), 4 + 3 + 1)
    assert networks.build_detector("small_ssd", 3, {"image_size": 96})(torch.randn(2, 3, 96, 96)).shape == (2, 756, 8)


def test_rows_of_the_heads_are_in_the_order_of_the_default_boxes() -> None:
    heads = networks._Heads((1, 1), (2, 1), 3, 1)
    for i in range(2):
        for conv, step in ((heads.box[i], 0.001), (heads.cls[i], 0.1)):
            nn.init.ones_(conv.weight)
            conv.bias.data = step * torch.arange(len(conv.bias))
    maps = [torch.arange(6.0).view(1, 1, 2, 3), 10 + torch.arange(2.0).view(1, 1, 1, 2)]
    found = heads(maps)[0]
    cells = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 10, 11]  # row by row, both boxes of a cell side by side
    places = [0, 1] * 6 + [0, 0]
    assert torch.allclose(found[:, 0], torch.tensor(cells) + 0.004 * torch.tensor(places))
    assert torch.allclose(found[:, 4], torch.tensor(cells) + 0.3 * torch.tensor(places))
    assert torch.allclose(found[:, 6] - found[:, 4], torch.tensor(0.2))
    centres = networks.grid_boxes([2], [[(0.1, 0.1), (0.2, 0.1)]])
    assert centres[:, 0].tolist() == [0.25, 0.25, 0.75, 0.75] * 2
    assert centres[:, 1].tolist() == [0.25] * 4 + [0.75] * 4


def test_groups_run_through_the_norm_to_heads_and_extras_and_heads_are_frozen(small: Any) -> None:
    _, _, graph = small
    first = graph.group("middle.0.0")
    tensors = {member.tensor for member in first.members}
    assert {"norm.weight", "heads.box.0.weight", "heads.cls.0.weight", "deep.0.0.weight"} <= tensors
    assert "middle.0.0" in graph.normalising
    assert not any(group.name.startswith("heads") for group in graph.groups)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_half_is_cut_right(small: Any, seed: int) -> None:
    model, image, graph = small
    plan = uniform_plan(graph, 0.5, model=model, saliency="random", seed=seed)
    pruned = prune(model, graph, plan)
    certificate = certify(model, pruned, graph, plan, image)
    assert certificate.ok, certificate.reason
    assert pruned(image).shape == model(image).shape
    assert torch.equal(pruned.default_boxes, model.default_boxes)


def test_onnx_of_the_heads_is_the_torch_model_and_its_template_can_be_cut(small: Any, tmp_path: Path) -> None:
    model, image, graph = small
    export_onnx(model, image, tmp_path / "dense.onnx", output_names=("heads",))
    with torch.no_grad():
        assert np.abs(predict(tmp_path / "dense.onnx", image.numpy()) - model(image).numpy()).max() < 1e-4
    template = OnnxTemplate.export(model, image, graph, tmp_path / "template.onnx")
    plan = uniform_plan(graph, 0.6, model=model, saliency="random", seed=5)
    session = onnxruntime.InferenceSession(template.slice(plan), providers=["CPUExecutionProvider"])
    (sliced,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = prune(model, graph, plan)(image).numpy()
    assert np.abs(sliced - expected).max() < 1e-4


def cut_in_half(name: str, num_boxes: int, **options: Any) -> ChannelGraph:
    torch.manual_seed(0)
    model: Any = networks.build_detector(name, 2, options).eval()
    image = torch.randn(1, 3, model.image_size, model.image_size)
    assert model.default_boxes.shape == (num_boxes, 4)
    graph = trace(model, image)
    plan = uniform_plan(graph, 0.5, model=model, saliency="random", seed=0)
    pruned = prune(model, graph, plan)
    with torch.inference_mode():
        assert pruned(image).shape == (1, num_boxes, 7)
    certificate = certify(model, pruned, graph, plan, image)
    assert certificate.ok, certificate.reason
    return graph


def test_mobilenet_ssd_is_cut_right() -> None:
    graph = cut_in_half("ssd300_mobilenet_v1", 1917, width=0.25)
    readers = {member.tensor for member in graph.group("blocks.10.pw").members if member.reads}
    assert {"box.0.weight", "cls.0.weight", "blocks.11.pw.weight"} >= readers - {"blocks.11.dw.weight"}


@pytest.mark.long
@pytest.mark.parametrize(("name", "num_boxes"), [("ssd300_vgg16_bn", 8732), ("ssdlite320_mobilenet_v3_large", 3234)])
def test_published_detectors_are_cut_right(name: str, num_boxes: int) -> None:
    graph = cut_in_half(name, num_boxes)
    if name == "ssd300_vgg16_bn":
        tensors = {member.tensor for member in graph.group("backbone.features.30").members}
        assert "backbone.scale_weight" in tensors
        assert {"head.regression_head.module_list.0.weight", "backbone.extra.0.1.weight"} <= tensors


@pytest.mark.long
@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"])
def test_torchvisions_weights_fit_and_give_torchvisions_heads(name: str) -> None:
    import torchvision.models.detection as zoo

    theirs = getattr(zoo, name)(weights=None, weights_backbone=None, num_classes=4).eval()
    ours: Any = networks.build_detector(name, 3, {}).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 3, ours.image_size, ours.image_size)
    with torch.inference_mode():
        maps = list(theirs.backbone(image).values())
        heads = theirs.head(maps)
        found = ours(image)
    assert torch.allclose(found[..., :4], heads["bbox_regression"], atol=1e-5)
    assert torch.allclose(found[..., 4:], heads["cls_logits"], atol=1e-5)


def test_default_boxes_of_the_published_detectors() -> None:
    vgg: Any = networks.TorchvisionSSD  # the boxes need no weights: they come from torchvision's generator
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

    generator = DefaultBoxGenerator([[2], [2, 3]], scales=[0.1, 0.3, 0.5], steps=[8, 16])
    boxes = vgg(nn.Identity(), nn.Identity(), generator, 32, (4, 2), (0.5,) * 3, (0.5,) * 3).default_boxes
    assert boxes.shape == (4 * 4 * 4 + 2 * 2 * 6, 4)
    assert torch.allclose(boxes[0], torch.tensor([0.125, 0.125, 0.1, 0.1]), atol=1e-6)
    assert torch.allclose(boxes[64], torch.tensor([0.25, 0.25, 0.3, 0.3]), atol=1e-6)


# -- by name -----------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A user's detector: one map, one default box per cell."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 16, 1), nn.ReLU())
        self.head = nn.Conv2d(8, 4 + num_classes + 1, 1)
        self.default_boxes = networks.grid_boxes([2], [[(0.5, 0.5)]])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images)).flatten(2).transpose(1, 2)


def boxless(num_classes: int) -> nn.Module:
    return nn.Linear(1, num_classes)


def test_ones_own_network_comes_from_a_factory(trusted: Callable[[str], None]) -> None:
    trusted(f"{__name__}:Bare")
    assert isinstance(networks.build_detector(f"{__name__}:Bare", 2, {}), Bare)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("small_sdd", {}, "did you mean 'small_ssd'"),
        ("small_ssd", {"depth": 3}, "does not take these options"),
        ("small_ssd", {"image_size": 70}, "a multiple of 32"),
        ("no_such_module:Net", {}, "no_such_module"),
        (f"{__name__}:Missing", {}, "Missing"),
        (f"{__name__}:GRID", {}, "not a callable"),
        (f"{__name__}:boxless", {}, "default_boxes"),
    ],
)
def test_wrong_names_and_options_say_what_to_change(
    name: str, options: dict[str, Any], words: str, trusted: Callable[[str], None]
) -> None:
    if name.startswith(__name__):
        trusted(name)
    with pytest.raises(UserError, match=words):
        networks.build_detector(name, 2, options)


def test_every_head_is_listed_among_what_is_frozen() -> None:
    model = networks.SmallSSD(3).eval()
    graph = trace(model, torch.zeros(1, 3, 64, 64))
    heads = {f"heads.{kind}.{k}" for kind in ("box", "cls") for k in range(3)}
    assert {entry.layer for entry in graph.frozen} == heads
    assert {entry.size for entry in graph.frozen} == {16}  # 4 boxes per cell, of 4 offsets or 4 logits
