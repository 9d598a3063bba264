"""What a search goes by where its images are known by heart, and how that is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pipeline.config.schema import SearchSection
from secateur.pipeline.evaluation.accuracy import AccuracyEvaluator, AccuracyRequest
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.run.metric import MEMORISED
from secateur.pipeline.training.statistics import recalibrate, training_images
from secateur.pipeline.workloads import classification, detection
from secateur.pipeline.workloads.classification import Classification
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.trace import trace

CPU = torch.device("cpu")


def digits(search: str = "top1") -> Classification:
    data = {"source": "digits", "image_size": 8, "augment": "shift"}
    options = {"model": {"name": "cifar_resnet8"}, "data": data, "metrics": {"search": search}}
    return classification.build(classification.Options.model_validate(options))


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    workload = digits()
    model = workload.build_model()
    recalibrate(model, training_images(workload, workload.train, 256, CPU))
    return model, trace(model, workload.example_input())


def evaluator(
    network: tuple[nn.Module, ChannelGraph], folder: Path, search: str = "top1", **settings: Any
) -> AccuracyEvaluator:
    section = SearchSection(**{"images": 100, "recalibrate_images": 0, **settings})
    return AccuracyEvaluator(Baseline(*network, digits(search)), folder, section, lambda: None)


def test_divergence_is_that_of_class_probabilities_and_zero_for_the_unpruned_network(
    network: tuple[nn.Module, ChannelGraph], tmp_path: Path
) -> None:
    """On augmented images, the same for all; less memory for a batch changes nothing that matters."""
    model, graph = network
    full = PruningPlan.full(graph.groups)
    pruned = uniform_plan(graph, 0.5, model=model, saliency="random", seed=0)
    accuracy = evaluator(network, tmp_path, "divergence")
    dense = accuracy.evaluate(AccuracyRequest(full)).metrics
    assert dense["divergence"] == pytest.approx(0, abs=1e-6)
    assert dense["divergence_score"] == pytest.approx(1, abs=1e-6)
    images = torch.cat([images for images, _ in accuracy.batches()])
    assert torch.equal(images, torch.cat([images for images, _ in accuracy.batches()]))
    assert not torch.equal(images, torch.cat([images for images, _ in accuracy.batches(augmented=False)]))
    with torch.inference_mode():
        wanted, found = model(images).softmax(1), accuracy.weights.network(pruned)(images).softmax(1)
    expected = (wanted * (wanted.log() - found.log())).sum(1).mean().item()
    answer = accuracy.evaluate(AccuracyRequest(pruned)).metrics
    assert answer["divergence"] == pytest.approx(expected, rel=1e-3)
    assert 0 < answer["divergence_score"] < 1
    assert {"divergence", "divergence_score"}.isdisjoint(
        evaluator(network, tmp_path).evaluate(AccuracyRequest(pruned)).metrics
    )


def test_a_network_without_batch_norm_is_scored_as_it_was_cut(tmp_path: Path) -> None:
    """It has no statistics to take anew: no training image is looked at, and no number changes."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 10)).eval()
    graph = trace(model, digits().example_input())
    plan = uniform_plan(graph, 0.5, model=model, saliency="random", seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recalibrate(model, training_images(digits(), digits().train, 64, CPU))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = []
    for images in (0, 64):
        accuracy = evaluator((model, graph), tmp_path, recalibrate_images=images)
        asked = accuracy.recalibration_images("", plan, final=True)
        found.append(accuracy.evaluate(AccuracyRequest(plan, recalibration_images=asked)))
    assert found[0].metrics == found[1].metrics
    assert found[0].images_forwarded == found[1].images_forwarded == 100


def test_no_candidate_is_given_up_where_the_metric_has_no_bound(
    network: tuple[nn.Module, ChannelGraph], tmp_path: Path
) -> None:
    plan = uniform_plan(network[1], 0.5, model=network[0], saliency="random", seed=0)
    for search in ("divergence", "loss"):
        found = evaluator(network, tmp_path, search, memory_mb=1).evaluate(AccuracyRequest(plan, floor=0.999))
        assert found.status == "ok"
        assert found.metrics[digits(search).search_metric] < 0.999


class ByHeart(nn.Module):
    """Knows images, and says the class of the one that an image is."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.images, self.labels = images.flatten(1), labels

    def forward(self, x: Tensor) -> Tensor:
        known = (torch.cdist(x.flatten(1), self.images) < 1e-3).float()
        return known @ F.one_hot(self.labels, 10).float()


@pytest.mark.parametrize("by_heart", [True, False])
def test_search_images_that_are_known_by_heart_are_found_out(
    by_heart: bool, network: tuple[nn.Module, ChannelGraph], tmp_path: Path
) -> None:
    workload = digits()
    split = workload.search if by_heart else workload.train
    known = workload.batch(split, torch.arange(100), train=False, generator=None, device=CPU)
    model = cast(nn.Module, ByHeart(*known))
    accuracy, augmented = evaluator((model, network[1]), tmp_path).memorised()
    assert (accuracy - augmented > MEMORISED) == by_heart


def test_detectors_are_compared_by_their_raw_heads_on_images_that_are_mirrored_with_their_boxes(tmp_path: Path) -> None:
    data = {"source": "digits", "image_size": 64, "scenes": 30}
    sections = {"data": data, "input": {"flip": 1.0}, "metrics": {"search": "divergence"}}
    workload = detection.build(detection.Options.model_validate(sections))
    torch.manual_seed(0)
    model = workload.build_model()
    graph = trace(model, workload.example_input())
    accuracy = AccuracyEvaluator(
        Baseline(model, graph, workload), tmp_path, SearchSection(images=6, recalibrate_images=0), lambda: None
    )
    full = PruningPlan.full(graph.groups)
    pruned = uniform_plan(graph, 0.5, model=model, saliency="random", seed=0)
    dense, cut = (accuracy.evaluate(AccuracyRequest(plan, brief=True)).metrics for plan in (full, pruned))
    assert dense["divergence_score"] == pytest.approx(1, abs=1e-5)
    assert 0 < cut["divergence_score"] < 0.999
    assert "map50" not in cut
    ((_, plain),), ((_, mirrored),) = (tuple(accuracy.batches(augmented=altered)) for altered in (False, True))
    used = plain[..., 4] >= 0
    turned = torch.cat([1 - plain[..., 2:3], plain[..., 1:2], 1 - plain[..., :1], plain[..., 3:]], -1)
    assert used.any() and torch.allclose(mirrored[used], turned[used], atol=1e-5)
