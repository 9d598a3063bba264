"""The detection workload: batches and targets of scenes, mAP of raw heads, and answers to the pipeline's questions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.device_profiles import load_profile, open_target
from secateur.export.onnx_export import export_onnx
from secateur.export.verify import predict
from secateur.pipeline.config.choices import WORKLOADS, workload_options
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.config.schema import FinetuneSection, Recipe, SearchSection
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.training.loop import fit
from secateur.pipeline.workloads import detection
from secateur.pipeline.workloads.detection import networks, ssd
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.search.protocol import Candidate, MaskedLoss, Score
from secateur.pruning.trace import trace
from tests.pipeline.helpers import quick_device
from tests.pipeline.workloads.detection.test_ssd import Bare, perfect

CPU = torch.device("cpu")
DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).parents[5] / "shared" / "data"))
COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
DIGITS = {"source": "digits", "image_size": 64, "scenes": 60}
PLAIN = {"augment": "none"}


def build(**sections: Any) -> detection.Detection:
    sections = {"data": DIGITS, **sections}
    return detection.build(detection.Options.model_validate(sections))


@pytest.fixture(scope="module")
def workload() -> detection.Detection:
    return build(input=PLAIN)


def everything(workload: detection.Detection, split: Any) -> tuple[Tensor, Tensor]:
    return workload.batch(split, torch.arange(len(split)), train=False, generator=None, device=CPU)


def measured(workload: detection.Detection, heads: Tensor, targets: Tensor, *, brief: bool = False) -> Any:
    return workload.metrics(workload.answers(heads, targets, brief=brief), targets)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batches_are_normalised_images_and_padded_targets(workload: detection.Detection) -> None:
    images, targets = everything(workload, workload.train)
    assert images.shape == (len(workload.train), 3, 64, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    source: Any = workload.train.source
    first = int(workload.train.indices[0])
    pixels = source.read(np.array([first]))[0]
    assert torch.allclose(images[0], (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-5)
    rows = torch.from_numpy(source.boxes(first))
    assert torch.allclose(targets[0, : len(rows), :4], rows[:, :4] / 64)
    assert torch.equal(targets[0, : len(rows), 4], rows[:, 4])
    assert (targets[0, len(rows) :] == -1).all()


def test_all_splits_have_targets_of_one_shape(workload: detection.Detection) -> None:
    shapes = {everything(workload, s)[1].shape[1:] for s in (workload.train, workload.search, workload.test)}
    assert shapes == {(workload.most_boxes, 5)}


def test_images_are_resized_to_what_the_network_takes() -> None:
    small = build(data={**DIGITS, "image_size": 100}, input=PLAIN)
    images, targets = everything(small, small.test)
    assert images.shape[2:] == (64, 64)
    used = targets[targets[..., 4] >= 0]
    assert used[:, :4].min() >= 0
    assert used[:, :4].max() <= 1


def test_augmentation_repeats_with_its_generator_and_leaves_torchs_own_alone() -> None:
    workload = build(input={"augment": "ssd", "flip": 0.5})

    def batch(seed: int, train: bool = True) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return workload.batch(workload.train, torch.arange(12), train=train, generator=generator, device=CPU)

    state = torch.get_rng_state()
    (one, first), (two, second), (other, _) = batch(0), batch(0), batch(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert torch.equal(first, second)
    assert not torch.equal(one, other)
    assert not torch.equal(one, batch(0, train=False)[0])
    used = first[first[..., 4] >= 0]
    assert len(used)
    assert ((used[:, 2:4] - used[:, :2]) > 0).all()
    assert used[:, :4].min() >= 0
    assert used[:, :4].max() <= 1
    assert first.shape == (12, workload.most_boxes, 5)


def test_flips_move_boxes_with_the_pixels() -> None:
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[4:10, 2:8] = 255
    scene = detection._scene(picture, np.array([[2, 4, 8, 10, 3]], dtype=np.float32), np.array([False]))
    from torchvision.transforms import v2

    turned = v2.RandomHorizontalFlip(1.0)(scene)
    (row,) = detection._targets(turned)
    assert torch.allclose(row, torch.tensor([32 / 40, 4 / 20, 38 / 40, 10 / 20, 3.0]))
    assert (turned["image"][:, 4:10, 32:38] == 255).all()


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_perfect_heads_have_a_map_of_one(workload: detection.Detection) -> None:
    targets = everything(workload, workload.test)[1]
    heads = perfect(targets, workload.default_boxes, 10)
    found = measured(workload, heads, targets)
    assert found["map50"] == pytest.approx(1.0, abs=0.01)  # two digits may want the same default box
    assert found["loss"] < 0.01
    assert measured(workload, torch.zeros_like(heads), targets)["map50"] < 0.05
    moved = heads.clone()
    moved[..., :2] += 40
    assert measured(workload, moved, targets)["map50"] < 0.05


def test_padding_changes_nothing(workload: detection.Detection) -> None:
    targets = everything(workload, workload.test)[1]
    heads = perfect(targets, workload.default_boxes, 10) + torch.randn(1, 1, 15)
    longer = torch.cat([targets, torch.full((len(targets), 3, 5), -1.0)], 1)
    assert measured(workload, heads, targets) == measured(workload, heads, longer)
    assert torch.equal(workload.ease(heads, targets), workload.ease(heads, longer))


def test_difficult_objects_are_neither_found_nor_missed(workload: detection.Detection) -> None:
    box = workload.default_boxes[120]
    targets = torch.full((2, workload.most_boxes, 5), -1.0)
    targets[:, 0] = torch.cat([ssd.corners(box), torch.tensor([4.0])])
    heads = perfect(targets, workload.default_boxes, 10)
    heads[1] = perfect(torch.full_like(targets, -1), workload.default_boxes, 10)[1]  # sees nothing
    assert measured(workload, heads, targets)["map50"] < 0.6
    targets[1, 0, 4] = -2 - 4
    assert measured(workload, heads, targets)["map50"] == 1
    targets[0, 0, 4] = -2 - 4
    with pytest.raises(UserError, match="not difficult"):
        measured(workload, heads, targets)


def test_worst_images_come_first_and_nothing_is_given_up(workload: detection.Detection) -> None:
    targets = everything(workload, workload.test)[1]
    heads = perfect(targets, workload.default_boxes, 10)
    heads[3] = heads[3].roll(100, 0)
    assert workload.ease(heads, targets).argmin() == 3
    assert workload.bound(heads, targets, 5) == 1.0


def test_metrics_loss_is_the_loss_of_training(workload: detection.Detection) -> None:
    targets = everything(workload, workload.train)[1][:20]
    heads = torch.randn(20, len(workload.default_boxes), 15)
    assert measured(workload, heads, targets)["loss"] == pytest.approx(workload.loss(heads, targets).item(), rel=1e-5)


def test_pictures_show_what_is_sure_and_what_is_there(workload: detection.Detection) -> None:
    images, targets = everything(workload, workload.test)
    heads = perfect(targets, workload.default_boxes, 10)
    after = workload.postprocessing
    found = after.apply(heads)
    plain = after.draw(images, torch.full_like(found, -1))
    assert plain.shape == (len(images), 3, 320, 320)
    assert plain.dtype == torch.uint8
    drawn = after.draw(images, found)
    assert not torch.equal(drawn, plain)
    x1, y1, x2, y2 = (320 * found[0, 0, :4]).long().tolist()
    changed = (drawn[0] != plain[0]).any(0)
    assert changed[(y1 + y2) // 2, max(0, x1 - 3) : x1 + 4].any()
    assert changed[y2 - 4 : y2 + 3, (x1 + x2) // 2].any()
    unsure = found.clone()
    unsure[..., 4] = 0.1
    assert torch.equal(after.draw(images, unsure), plain)
    assert not torch.equal(after.draw(images, unsure, targets), plain)


def test_answers_say_all_of_it_and_brief_ones_only_the_loss(workload: detection.Detection) -> None:
    targets = everything(workload, workload.test)[1]
    heads = perfect(targets, workload.default_boxes, 10) + torch.randn(len(targets), 1, 15)
    whole, brief = measured(workload, heads, targets), measured(workload, heads, targets, brief=True)
    assert brief == {name: whole[name] for name in ("loss", "loss_score")}
    halves = [workload.answers(h, t) for h, t in zip(heads.split(2), targets.split(2), strict=True)]
    assert workload.metrics(torch.cat(halves), targets) == whole
    assert workload.answers(heads, targets).numel() < heads.numel()
    coco = workload.test_metrics(workload.answers(heads, targets), targets)
    assert coco["map50"] == whole["map50"]
    assert 0 < coco["map75"] < coco["map"] < coco["map50"]  # boxes are a little off


# -- networks and weights ----------------------------------------------------------------------------------------------


def test_weights_load_strictly_or_without_heads(workload: detection.Detection, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = workload.build_model().state_dict()
    save_file(state, tmp_path / "ten.safetensors")
    torch.save(state, tmp_path / "ten.pt")
    for name in ("ten.safetensors", "ten.pt"):
        loaded = build(model={"weights": str(tmp_path / name)})
        assert loaded.pretrained
        assert all(torch.equal(v, state[k]) for k, v in loaded.build_model().state_dict().items())
    few = networks.build_detector("small_ssd", 3, {}).state_dict()
    save_file(few, tmp_path / "three.safetensors")
    where = {"weights": str(tmp_path / "three.safetensors")}
    with pytest.raises(UserError, match=r"but_classes.*weight_classes"):
        build(model=where)
    for load, alike in (("but_classes", {"heads.box"}), ("backbone", set())):
        part = build(model={**where, "load": load})
        assert not part.pretrained
        found = part.build_model().state_dict()
        assert torch.equal(found["stem.0.0.weight"], few["stem.0.0.weight"])
        assert torch.equal(found["heads.box.0.weight"], few["heads.box.0.weight"]) == bool(alike)
    narrow = {**where, "load": "but_classes", "options": {"width": 8}}
    with pytest.raises(UserError, match="do not fit network small_ssd"):
        build(model=narrow)


def test_classes_can_be_picked_out_of_the_weights(workload: detection.Detection, tmp_path: Path) -> None:
    torch.manual_seed(2)
    wide = networks.build_detector("small_ssd", 30, {}).eval()
    save_file(wide.state_dict(), tmp_path / "w.safetensors")
    chosen = [3, 29, 0, 7, 8, 9, 10, 11, 12, 5]
    model = {"weights": str(tmp_path / "w.safetensors"), "weight_classes": chosen}
    picked = build(model=model)
    image = picked.example_input()
    with torch.no_grad():
        theirs, ours = wide(image), picked.build_model()(image)
    assert torch.allclose(ours, theirs[..., [0, 1, 2, 3, 4, *(5 + c for c in chosen)]], atol=1e-5)
    with pytest.raises(UserError, match="names 2 classes, the data has 10"):
        build(model={**model, "weight_classes": [0, 1]})
    with pytest.raises(UserError, match="30 classes"):
        build(model={**model, "weight_classes": [*chosen[:-1], 30]})


def test_weights_in_a_checkpoint_are_found_whatever_part_is_wanted(tmp_path: Path) -> None:
    few = networks.build_detector("small_ssd", 3, {}).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in few.items()}, "epoch": 3}, tmp_path / "w.pt")
    for load in ("but_classes", "backbone"):
        found = build(model={"weights": str(tmp_path / "w.pt"), "load": load}).build_model().state_dict()
        assert torch.equal(found["stem.0.0.weight"], few["stem.0.0.weight"])
    torch.save({name: tensor.to("meta") for name, tensor in few.items()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="meta device"):
        build(model={"weights": str(tmp_path / "w.pt"), "load": "but_classes"})


def wrong_heads(num_classes: int) -> nn.Module:
    return Bare(num_classes + 1)


def test_ones_own_detector_is_checked_when_the_run_begins(trusted: Callable[[str], None]) -> None:
    trusted(f"{Bare.__module__}:Bare")
    trusted(f"{__name__}:wrong_heads")
    own = build(model={"name": f"{Bare.__module__}:Bare"}, input={"image_size": 32, **PLAIN})
    assert own.mean.flatten().tolist() == [0.5] * 3
    assert own.build_model()(own.example_input()).shape == (1, 4, 15)
    with pytest.raises(UserError, match="image_size"):
        build(model={"name": f"{Bare.__module__}:Bare"})
    with pytest.raises(UserError, match=r"\(1, 4, 16\), expected one tensor of shape \(1, 4, 15\)"):
        build(model={"name": f"{__name__}:wrong_heads"}, input={"image_size": 32})


def test_building_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprint_names_data_and_options() -> None:
    prints = [
        build().fingerprint,
        build(model={"options": {"width": 8}}).fingerprint,
        build(data={**DIGITS, "seed": 1}).fingerprint,
    ]
    assert len(set(prints)) == 3
    assert prints[0] == build().fingerprint


def test_another_metric_reuses_the_trained_baseline() -> None:
    assert build(metrics={"curve": "area", "search": "loss"}).fingerprint == build().fingerprint


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        detection.Options.model_validate({"metrics": {"iou": 0.5}})


# -- the pipeline's questions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "network"),
    [("digits-ssd", "small_ssd"), ("bccd-ssd300", "ssd300_mobilenet_v1"), ("voc-ssd300", "ssd300_vgg16")],
)
def test_run_files_are_complete(name: str, network: str) -> None:
    assert "detection" in WORKLOADS.names()
    run_file = load_run_file(Path(detection.__file__).parents[2] / "runs" / f"{name}.yaml")
    assert run_file.name == name
    assert workload_options(run_file.workload).model.name == network
    assert run_file.search.target.macs_ratio == 0.5


def test_a_short_training_lowers_the_loss(workload: detection.Detection, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = workload.build_model()
    images, targets = everything(workload, workload.train)

    def loss() -> float:
        with torch.inference_mode():
            return measured(workload, model(images), targets)["loss"]

    before = loss()
    recipe = Recipe(epochs=5, lr=0.02, batch_size=11, clip_norm=5.0, autocast="fp32")
    fit(model, workload, workload.train, recipe, seed=0, checkpoint=tmp_path / "c.ckpt", compute=CPU)
    assert loss() < 0.6 * before


@pytest.fixture
def evaluator(workload: detection.Detection, tmp_path: Path) -> Iterator[Evaluator]:
    torch.manual_seed(0)
    model = workload.build_model()
    graph = trace(model, workload.example_input())
    profile = load_profile(quick_device(tmp_path))
    target = open_target(profile)
    recipe, settings = (
        FinetuneSection(epochs=1, batch_size=32, lr=0.01, distill=None, autocast="fp32"),
        SearchSection(images=6, recalibrate_images=0),
    )
    baseline, fleet = Baseline(model, graph, workload, seed=1), Fleet([Device(profile, target)])
    yield make_evaluator(baseline, fleet, tmp_path / "c", settings, recipe)
    target.close()


def test_the_evaluator_gets_what_it_asks_for(evaluator: Evaluator, workload: detection.Detection) -> None:
    graph, model = evaluator.graph, evaluator.accuracy.baseline.model
    plan = uniform_plan(graph, 0.5, model=model, saliency="random", seed=0)
    found = evaluator.evaluate(Candidate(0, plan, "test"), latency=True, floor=0.99)
    assert found.status == "ok", found.reason
    outputs, targets = evaluator.accuracy.outputs(evaluator.network(plan))
    assert found["map50"] == measured(workload, outputs, targets)["map50"]
    assert found["loss"] == pytest.approx(measured(workload, outputs, targets)["loss"], rel=1e-4)
    assert found["latency_ratio"] > 0
    assert found["size_bytes"] > 0
    (loss,) = evaluator.masked_loss(MaskedLoss((plan,)))
    assert loss == pytest.approx(found["loss"], rel=1e-4)
    scores = evaluator.score(Score("taylor"))
    assert set(scores) == {group.name for group in graph.groups}
    assert all(np.isfinite(values).all() for values in scores.values())


def published() -> detection.Detection:
    """SSD300 on MobileNet V1 0.75 with COCO's weights, for the classes of PASCAL VOC."""
    labels = (DATA / "weights" / "detection" / "coco_labels_90.txt").read_text().split("\n")
    data = {"source": "voc", "path": str(DATA / "voc100"), "official_splits": False}
    names = detection.scenes.load(detection.scenes.SceneOptions.model_validate(data)).source.classes
    return build(
        model={
            "name": "ssd300_mobilenet_v1",
            "weights": str(DATA / "weights" / "detection" / "ssd_mobilenet_v1_075_coco.safetensors"),
            "weight_classes": [labels.index(COCO_NAMES.get(name, name)) for name in names],
        },
        data=data,
        metrics={"curve": "area", "nms_iou": 0.6, "most": 100},
    )


needs_voc100 = pytest.mark.skipif(
    not (DATA / "voc100").is_dir(), reason="needs voc100 and the weights of the SSD300 for COCO"
)


@needs_voc100
def test_a_published_detectors_file_finds_what_torch_finds_on_real_images(tmp_path: Path) -> None:
    workload = published()
    model, after = workload.build_model(), workload.postprocessing
    images = workload.batch(workload.train, torch.arange(12), train=False, generator=None, device=CPU)[0].contiguous()
    export_onnx(model, images[:1], tmp_path / "raw.onnx")
    whole = after.append(onnx.load(tmp_path / "raw.onnx"))
    onnx.save(whole, tmp_path / "whole.onnx")
    with torch.inference_mode():
        expected = after.apply(model(images))
    agreement = after.compare(torch.from_numpy(predict(tmp_path / "whole.onnx", images.numpy())), expected)
    assert agreement.ok, agreement.reason
    assert agreement.compared > 100


@pytest.mark.long
@needs_voc100
def test_a_published_detector_reaches_its_published_precision() -> None:
    """Mean average precision on 100 images of PASCAL VOC: 0.690."""
    workload = published()
    model = workload.build_model()
    outputs, targets = [], []
    for split in (workload.train, workload.search, workload.test):
        for indices in torch.split(torch.arange(len(split)), 10):
            images, rows = workload.batch(split, indices, train=False, generator=None, device=CPU)
            with torch.inference_mode():
                outputs.append(model(images.contiguous()))
            targets.append(rows)
    assert sum(map(len, outputs)) == 100
    found = measured(workload, torch.cat(outputs), torch.cat(targets))
    assert found["map50"] == pytest.approx(0.690, abs=0.005)


def test_images_of_a_detector_need_not_be_square() -> None:
    options = {"model": {"name": "small_ssd", "options": {"image_size": [32, 96]}}}
    workload = detection.build(detection.Options.model_validate({**options, "data": {"scenes": 20, "image_size": 64}}))
    assert workload.example_input().shape == (1, 3, 32, 96) and workload.usage["image_size"] == [32, 96]
    boxes = workload.default_boxes
    first = boxes[: 4 * 12 * 4].reshape(4, 12, 4, 4)  # rows, columns, shapes
    assert first[0, :, 0, 0].tolist() == pytest.approx([(i + 0.5) / 12 for i in range(12)])
    assert first[:, 0, 0, 1].tolist() == pytest.approx([(i + 0.5) / 4 for i in range(4)])
    model = workload.build_model()
    assert model(workload.example_input()).shape == (1, len(boxes), 4 + 11)
    with pytest.raises(UserError, match=r"32x64 \(height x width\)|expected one tensor"):
        detection.build(
            detection.Options.model_validate({**options, "data": {"scenes": 20}, "input": {"image_size": [32, 64]}})
        )
