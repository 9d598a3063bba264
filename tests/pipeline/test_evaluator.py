"""The evaluator: what a candidate's numbers mean, and the bounds it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from device_profiles import load_profile, open_target
from pipeline.config import FinetuneSection, SearchSection
from pipeline.evaluator import Evaluator, recalibrate
from pruning.channels import ChannelGraph
from pruning.cost import count
from pruning.plan import PruningPlan
from pruning.saliency import uniform_plan
from pruning.search.protocol import DENSE, Candidate
from pruning.surgery import prune

from .helpers import digits, quick_device

WORKLOAD = digits(image_size=8)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = WORKLOAD.build_model()
    recalibrate(model, WORKLOAD, 512, torch.device("cpu"))
    return model, ChannelGraph.trace(model, WORKLOAD.example_input())


@pytest.fixture
def make(network: tuple[nn.Module, ChannelGraph], tmp_path: Path) -> Iterator[Any]:
    profile = load_profile(quick_device(tmp_path))
    target = open_target(profile)

    def build(**search: Any) -> Evaluator:
        recipe = FinetuneSection(epochs=1, batch_size=128, lr=0.05)
        settings = SearchSection(images=100, **search)
        return Evaluator(*network, WORKLOAD, profile, target, tmp_path / "c", settings, recipe, seed=1)

    yield build
    target.close()


def candidate(
    network: tuple[nn.Module, ChannelGraph], seed: int = 0, ratio: float = 0.5, base: str = DENSE
) -> Candidate:
    plan = uniform_plan(network[1], ratio, model=network[0], saliency="random", seed=seed)
    return Candidate(seed, plan, "test", (), base)


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The dense ResNet with removed channels silenced after batch norm (scale and shift zero)."""
    import copy

    silent = copy.deepcopy(model)
    norms = {"conv1": "bn1", "layer1.0.conv1": "layer1.0.bn1"}
    norms |= {f"layer{i}.0.conv1": f"layer{i}.0.bn1" for i in (1, 2, 3)}
    for group, kept in plan.kept.items():
        if group == "conv1":
            continue
        norm = silent.get_submodule(norms[group])
        removed = np.setdiff1d(np.arange(plan.sizes[group]), kept)
        with torch.no_grad():
            norm.weight[removed] = 0
            norm.bias[removed] = 0
    return silent


def test_accuracy_of_a_candidate_is_the_masked_networks(network: Any, make: Any) -> None:
    model, _ = network
    plan = candidate(network).plan
    plan = plan.replace({"conv1": range(plan.sizes["conv1"])})
    evaluator = make()
    pruned, _ = evaluator.outputs(evaluator.network(plan))
    silent, targets = evaluator.outputs(masked(model, plan))
    assert torch.allclose(pruned, silent, atol=1e-4)
    evaluation = evaluator.evaluate(Candidate(0, plan, "test"), latency=False)
    assert evaluation["top1"] == WORKLOAD.metrics(silent, targets)["top1"]


def test_costs_are_those_of_the_built_network(network: Any, make: Any) -> None:
    model, graph = network
    chosen = candidate(network)
    evaluation = make().evaluate(chosen, latency=False)
    counted = count(prune(model, graph, chosen.plan), WORKLOAD.example_input())
    assert (evaluation["macs"], evaluation["params"]) == (counted.macs, counted.params)


def test_latency_comes_with_its_interval_and_the_full_plan_is_the_unit(network: Any, make: Any) -> None:
    evaluator = make()
    dense = evaluator.evaluate(Candidate(0, PruningPlan.full(network[1].groups), "reference"), latency=True)
    assert dense["latency_ratio"] == 1
    half = evaluator.evaluate(candidate(network), latency=True)
    assert 0 < half["latency_ratio_low"] <= half["latency_ratio"] <= half["latency_ratio_high"]
    assert half["p50_ms"] == pytest.approx(half["latency_ratio"] * dense["p50_ms"])
    assert half["size_bytes"] < dense["size_bytes"]


def test_a_plan_seen_before_is_neither_run_nor_timed_again(network: Any, make: Any, monkeypatch: Any) -> None:
    evaluator = make()
    chosen = candidate(network)
    first = evaluator.evaluate(chosen, latency=True)
    monkeypatch.setattr(evaluator, "outputs", None)
    monkeypatch.setattr(evaluator, "_time", None)
    again = evaluator.evaluate(Candidate(9, chosen.plan, "again"), latency=True)
    without = ("seconds",)
    assert {k: v for k, v in first.metrics.items() if k not in without} == {
        k: v for k, v in again.metrics.items() if k not in without
    }


def test_a_candidate_beyond_the_time_bound_fails_with_its_reason(network: Any, make: Any) -> None:
    evaluation = make(seconds_per_candidate=1e-9).evaluate(candidate(network), latency=False)
    assert evaluation.status == "failed"
    assert "search.seconds_per_candidate" in evaluation.reason
    assert evaluation["macs"] > 0


def test_memory_bounds_the_batch_but_not_the_result(network: Any, make: Any) -> None:
    sizes = []
    narrow = make(memory_mb=1)
    hook = narrow.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    expected = make().evaluate(Candidate(0, PruningPlan.full(network[1].groups), "x"), latency=False)
    sizes.clear()
    outputs, targets = narrow.outputs(narrow.model)
    hook.remove()
    assert max(sizes) < 100
    assert WORKLOAD.metrics(outputs, targets)["top1"] == expected["top1"]


def test_fine_tuned_weights_are_inherited_by_narrower_plans_and_restored(network: Any, make: Any) -> None:
    evaluator = make()
    wide = candidate(network, ratio=0.75)
    answer, checkpoint = evaluator.finetune(wide, 1)
    assert answer.base != DENSE
    kept = {name: k[: max(1, len(k) - 2)] for name, k in wide.plan.kept.items()}
    narrow = Candidate(5, wide.plan.replace(kept), "narrower", (), answer.base)
    before = evaluator.evaluate(narrow, latency=False)
    other = make()
    assert other.restore(answer.base, wide.plan, checkpoint)
    assert other.evaluate(narrow, latency=False)["loss"] == before["loss"]
    file = evaluator.folder / checkpoint["path"]
    file.write_bytes(file.read_bytes()[:-1])
    assert not make().restore(answer.base, wide.plan, checkpoint)


def test_fine_tuning_learns_and_a_diverging_one_is_a_failed_evaluation(network: Any, make: Any) -> None:
    evaluator = make()
    chosen = candidate(network, ratio=0.75)
    raw = evaluator.evaluate(chosen, latency=False)
    answer, _ = evaluator.finetune(chosen, 2)
    assert answer.evaluation["loss"] < raw["loss"]
    evaluator.recipe = evaluator.recipe.model_copy(update={"lr": 1e9, "warmup_epochs": 0.0})
    failed, checkpoint = evaluator.finetune(Candidate(7, chosen.plan, "x"), 8)
    assert failed.evaluation.status == "failed"
    assert "lower lr" in failed.evaluation.reason
    assert checkpoint == {}


def test_recalibrated_statistics_are_those_of_the_training_images(network: Any) -> None:
    model, _ = network
    with torch.no_grad():
        model.bn1.running_mean.add_(3)
    recalibrate(model, WORKLOAD, 200, torch.device("cpu"))
    cpu = torch.device("cpu")
    images, _ = WORKLOAD.batch(WORKLOAD.train, torch.arange(200), train=False, generator=None, device=cpu)
    expected = model.conv1(images).mean((0, 2, 3))
    assert torch.allclose(model.bn1.running_mean, expected, atol=1e-4)
    assert not model.bn1.training
    assert model.bn1.momentum == 0.1


def test_scores_are_of_the_asked_base(network: Any, make: Any) -> None:
    evaluator = make()
    scores = evaluator.score("l1", DENSE)
    assert {name: len(v) for name, v in scores.items()} == {g.name: g.size for g in network[1].groups}
