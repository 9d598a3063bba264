"""Indicators: exact where they are hard, falling where a channel is dead, and a training that resumes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from secateur.pipeline.config.schema import FinetuneSection, Recipe
from secateur.pipeline.progress import Report, silent
from secateur.pipeline.training.auxiliary import Outcome, Task
from secateur.pipeline.training.auxiliary.indicators import (
    CostTerm,
    Indicators,
    Settings,
    _halves,
    _interleaved,
    interpolated,
    train,
)
from secateur.pipeline.training.curve import TrainingError
from secateur.pipeline.training.loop import fit
from secateur.pipeline.workloads import Split
from secateur.pipeline.workloads.classification import Classification
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost, costs
from secateur.pruning.plan import PruningPlan
from secateur.pruning.reference import run_masked
from secateur.pruning.trace import trace
from secateur.pruning.weights import inherit
from tests.pipeline.helpers import digits
from tests.pruning.models import CifarResNet, Net, PlainCNN, Tied, TwoBranches, half, randomise

CPU = torch.device("cpu")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def mobile() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu6(m.bn1(m.expand(x)))
        return m.head(F.relu(m.bn2(m.point(F.relu6(m.depth(x))))).mean((2, 3)))

    parts = {"expand": nn.Conv2d(3, 8, 1), "bn1": nn.BatchNorm2d(8), "depth": nn.Conv2d(8, 8, 3, groups=8)}
    parts |= {"point": nn.Conv2d(8, 6, 1), "bn2": nn.BatchNorm2d(6), "head": nn.Linear(6, 4)}
    return randomise(Net(run, **parts)).eval()


def product() -> nn.Module:
    """Two projections whose channels no weight reads: they meet in a product."""
    return Net(
        lambda m, x: m.head((m.q(x.flatten(2)) @ m.k(x.flatten(2)).transpose(1, 2)).mean(2) @ m.mix),
        q=nn.Linear(256, 8),
        k=nn.Linear(256, 8),
        head=nn.Linear(4, 2),
        mix=torch.randn(3, 4),
    ).eval()


NETWORKS = {
    "residual": lambda: randomise(CifarResNet("B")).eval(),
    "flatten": lambda: PlainCNN().eval(),
    "concat": lambda: TwoBranches().eval(),
    "depthwise": mobile,
    "product": product,
}


def hard(graph: ChannelGraph, plan: PruningPlan) -> Tensor:
    return torch.cat([torch.from_numpy(plan.mask(group.name)).float() for group in graph.groups])


@pytest.mark.parametrize("name", NETWORKS)
def test_hard_indicators_are_the_masked_network_and_its_cost(name: str) -> None:
    model = NETWORKS[name]()
    graph = trace(model, IMAGES)
    plan = half(graph)
    assert not plan.is_full
    indicators = Indicators(model, graph)
    soft = hard(graph, plan)
    with torch.no_grad():
        found = functional_call(model, indicators.scaled(model, soft), (IMAGES,))
    expected = run_masked(model, graph, plan, (IMAGES,), {})
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(IMAGES), rtol=1e-2)
    assert float(indicators.macs(soft)) == cost(graph, plan).macs


RESNET = trace(CifarResNet("B").eval(), IMAGES)


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_the_expected_cost_at_any_hard_indicators_is_the_cost(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = {g.name: rng.permutation(g.size) < rng.integers(1, g.size + 1) for g in RESNET.groups}
    plan = PruningPlan.from_masks(masks)
    indicators = Indicators(CifarResNet("B"), RESNET)
    assert float(indicators.macs(hard(RESNET, plan))) == costs(RESNET, [plan]).macs[0]
    assert indicators.widths(hard(RESNET, plan)).tolist() == list(plan.widths.values())


def test_a_tied_weight_is_scaled_once_for_all_its_uses() -> None:
    model = Tied().eval()
    images = torch.randn(4, 3)
    graph = trace(model, images)
    plan = half(graph)
    indicators = Indicators(model, graph)
    with torch.no_grad():
        found = functional_call(model, indicators.scaled(model, hard(graph, plan)), (images,))
    assert torch.allclose(found, run_masked(model, graph, plan, (images,), {}), atol=1e-6)


def test_groups_that_are_not_learned_keep_every_channel() -> None:
    model = CifarResNet("B").eval()
    indicators = Indicators(model, RESNET, ["layer2.conv1"])
    assert indicators.alpha.shape == (16,)
    zero = torch.zeros(16)
    assert indicators.scaled(model, zero).keys() == {"layer2.conv2.weight"}
    sizes = [0 if group.name == "layer2.conv1" else group.size for group in RESNET.groups]
    assert indicators.widths(zero).tolist() == sizes
    with pytest.raises(ValueError, match=r"no channel groups \['up'\]; the network has \['conv1'"):
        Indicators(model, RESNET, ["up"])


@given(st.floats(-5, 20))
def test_interpolation_is_numpys(x: float) -> None:
    xs, ys = [2.0, 4.0, 8.0, 16.0], [0.5, 0.4, 0.1, 0.0]
    value = interpolated(torch.tensor(x, dtype=torch.float64), xs, ys)
    assert float(value) == pytest.approx(np.interp(x, xs, ys))


def test_expected_latency_adds_up_what_the_groups_save_and_has_a_slope() -> None:
    indicators = Indicators(CifarResNet("B"), RESNET, ["layer2.conv1", "layer3.conv1"])
    savings = {"layer2.conv1": ([8.0, 16.0], [0.2, 0.0]), "layer3.conv1": ([16.0, 32.0], [0.3, 0.0])}
    soft = torch.full((48,), 0.75, requires_grad=True)
    latency = indicators.latency(soft, savings)
    assert latency.item() == pytest.approx(1 - 0.1 - 0.15)
    (slope,) = torch.autograd.grad(latency, soft)
    assert slope.tolist() == pytest.approx([0.2 / 8] * 16 + [0.3 / 16] * 32)


@pytest.mark.parametrize(("ratio", "sign"), [(0.9, -1), (0.26, 0), (0.24, 0), (0.1, 1)])
def test_the_cost_term_pulls_towards_the_target_from_both_sides(ratio: float, sign: int) -> None:
    """All indicators at 1/2 and inner widths only: about a quarter of the MACs."""
    model = PlainCNN()
    graph = trace(model, IMAGES)
    indicators = Indicators(model, graph)
    soft = torch.full_like(indicators.alpha, 0.5, requires_grad=True)
    quarter = (indicators.macs(soft) / indicators.macs(torch.ones_like(soft))).item()
    term = CostTerm(indicators, Settings(macs_ratio=ratio * quarter / 0.25))
    value = term(soft)
    assert value.item() == pytest.approx(abs(np.log(0.25 / ratio)) if sign else 0)
    (slope,) = torch.autograd.grad(value, soft)
    assert (torch.sign(slope) == sign).all()


def test_of_two_targets_the_one_missed_by_more_counts() -> None:
    indicators = Indicators(CifarResNet("B"), RESNET, ["layer2.conv1"])
    savings = json.dumps({"layer2.conv1": [[8, 16], [0.5, 0.0]]})
    both = Settings(macs_ratio=0.2, latency_ratio=0.7, savings=savings)
    soft = torch.full((16,), 0.75)
    assert float(CostTerm(indicators, both).excess(soft)) > np.log(0.75 / 0.7)
    slack = Settings(macs_ratio=1.0, latency_ratio=0.7, savings=savings)
    assert float(CostTerm(indicators, slack).excess(soft)) == pytest.approx(np.log(0.75 / 0.7))
    assert float(CostTerm(indicators, Settings())(soft)) == 0


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_alphas_begin_where_the_expected_cost_is_the_target(ratio: float) -> None:
    indicators = Indicators(CifarResNet("B"), RESNET)
    CostTerm(indicators, Settings(macs_ratio=ratio)).start()
    with torch.no_grad():
        whole = indicators.macs(torch.ones_like(indicators.alpha))
        assert float(indicators.macs(indicators.soft(1.0)) / whole) == pytest.approx(ratio, rel=1e-4)
    CostTerm(indicators, Settings()).start()
    assert not indicators.alpha.any()


def test_the_temperature_falls_from_1_to_the_coldest() -> None:
    exponential, harmonic = Settings(), Settings(annealing="harmonic")
    for kind in (exponential, harmonic):
        assert [kind.temperature(0), kind.temperature(1)] == pytest.approx([1, 0.02])
    assert exponential.temperature(0.5) == pytest.approx(0.02**0.5)
    assert harmonic.temperature(0.5) == pytest.approx(1 / 25.5)


# -- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workload() -> Classification:
    return digits(augment="shift")


@pytest.fixture(scope="module")
def small(workload: Classification) -> Classification:
    """The same with 320 training images."""
    few = digits(augment="shift")
    few.train = workload.train.first(320)
    return few


def network() -> nn.Module:
    """Two convolutions with batch norms."""
    torch.manual_seed(0)
    parts = {"first": nn.Conv2d(1, 8, 3, padding=1), "bn1": nn.BatchNorm2d(8), "bn2": nn.BatchNorm2d(8)}
    parts |= {"second": nn.Conv2d(8, 8, 3, padding=1), "head": nn.Linear(8 * 16, 10)}

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(m.bn2(m.second(F.relu(m.bn1(m.first(x))))))
        return m.head(F.max_pool2d(x, 2).flatten(1))

    return Net(run, **parts)


@pytest.fixture(scope="module")
def trained(small: Classification, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """The network, trained; then channel 3 of the first layer is made dead."""
    recipe = Recipe(epochs=10, lr=0.1, batch_size=32, autocast="fp32")
    checkpoint = tmp_path_factory.mktemp("trained") / "c"
    model = network()
    fit(model, small, small.train, recipe, seed=0, checkpoint=checkpoint, compute=CPU)
    with torch.no_grad():
        model.bn1.weight[3], model.bn1.bias[3] = 0, -1
    return model


def task(
    workload: Classification,
    folder: Path,
    report: Report = silent,
    epochs: float = 2,
    model: nn.Module | None = None,
    **options: float | str,
) -> Task:
    model = copy.deepcopy(model) if model is not None else network()
    recipe = FinetuneSection(epochs=epochs, lr=0.05, batch_size=32, autocast="fp32")
    graph = trace(model, workload.example_input())
    return Task(model, graph, workload, recipe, 1, CPU, folder / "learn.ckpt", report, options)


def same(a: Outcome, b: Outcome) -> bool:
    pairs: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = [(a.state, b.state)]
    tensors = all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)
    return tensors and all(np.array_equal(a.scores[name], b.scores[name]) for name in a.scores)


def test_the_indicator_of_a_dead_channel_falls(small: Classification, trained: nn.Module, tmp_path: Path) -> None:
    outcome = train(task(small, tmp_path, epochs=6, model=trained, lasso=0.03))
    first = outcome.scores["first"]
    assert first[3] < 0.05
    assert np.delete(first, 3).mean() > 0.3
    assert all(((score >= 0) & (score <= 1)).all() for score in outcome.scores.values())


def test_the_expected_macs_end_near_the_target_and_the_indicators_hard(small: Classification, tmp_path: Path) -> None:
    asked = task(small, tmp_path, epochs=12, macs_ratio=0.5)
    outcome = train(asked)
    soft = np.concatenate(list(outcome.scores.values()))
    assert np.mean((soft > 0.1) & (soft < 0.9)) < 0.3
    indicators = Indicators(asked.model, asked.graph)
    expected = indicators.macs(torch.from_numpy(soft)) / indicators.macs(torch.ones(len(soft)))
    assert float(expected) == pytest.approx(0.5, rel=0.2)


def test_the_weights_that_come_out_are_those_of_the_network_as_trained(small: Classification, tmp_path: Path) -> None:
    asked = task(small, tmp_path)
    outcome = train(asked)
    images, _ = small.batch(small.train, torch.arange(8), train=False, generator=None, device=CPU)
    full = PruningPlan.full(asked.graph.groups)
    dense = inherit(asked.model, asked.graph, full, outcome.state).eval()
    soft = torch.from_numpy(np.concatenate([outcome.scores[g.name] for g in asked.graph.groups])).float()
    trained = functional_call(asked.model, Indicators(asked.model, asked.graph).scaled(asked.model, soft), (images,))
    assert torch.allclose(dense(images), trained, atol=1e-5)
    assert not torch.allclose(dense(images), asked.model(images), atol=1e-2)
    assert outcome.images == 2 * len(small.train)


def test_weights_and_indicators_learn_on_different_images_each_once_an_epoch(
    small: Classification, tmp_path: Path
) -> None:
    halves = _halves(task(small, tmp_path), 0.7)
    assert [len(split) for split in halves] == [224, 96]
    assert sorted(np.concatenate([split.indices for split in halves])) == sorted(small.train.indices)
    batches = list(_interleaved(halves, 32, torch.Generator().manual_seed(0)))
    assert "".join("w" if is_weights else "i" for is_weights, _, _ in batches) == "wiwwwiwwiw"
    for kind, split in zip((True, False), halves, strict=True):
        seen = torch.cat([part for is_weights, _, part in batches if is_weights == kind])
        assert sorted(seen.tolist()) == list(range(len(split)))


def test_weights_are_trained_on_their_share_only(small: Classification, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    original = small.batch

    def batch(split: Split, indices: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        seen.append(tuple(split.indices.tolist()))
        return original(split, indices, **options)  # type: ignore[arg-type]

    asked = task(small, tmp_path, epochs=1)
    asked.workload.batch = batch  # type: ignore[method-assign, assignment]
    try:
        train(asked)
    finally:
        small.batch = original  # type: ignore[method-assign]
    halves = {tuple(half.indices.tolist()) for half in _halves(asked, 0.7)}
    assert set(seen) == halves


class KilledError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("die_at", [3, 11, 17])
def test_a_killed_training_continues_to_the_same_end(small: Classification, tmp_path: Path, die_at: int) -> None:
    def die(done: int, total: int, note: str = "") -> None:
        if done == die_at:
            raise KilledError

    expected = train(task(small, tmp_path, macs_ratio=0.5))
    with pytest.raises(KilledError):
        train(task(small, tmp_path, die, macs_ratio=0.5))
    assert (tmp_path / "learn.ckpt").exists() == (die_at > 10)
    resumed = train(task(small, tmp_path, macs_ratio=0.5))
    assert same(resumed, expected)
    assert resumed.images == expected.images
    assert not (tmp_path / "learn.ckpt").exists()


def test_errors_say_what_to_do(small: Classification, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown options \['lasoo'\] of indicators; known: groups, macs_ratio"):
        train(task(small, tmp_path, lasoo=1))
    wild = task(small, tmp_path, epochs=30)
    wild = Task(**{**vars(wild), "recipe": wild.recipe.model_copy(update={"lr": 1e6})})
    with pytest.raises(TrainingError, match="lower lr"):
        train(wild)
