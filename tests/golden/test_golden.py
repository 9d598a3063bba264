"""What no processor changes and no redesign may: plans of the two controls on fixed weights, and what they cost.

Weights follow from a formula, and rankings by them are far from ties: noise in the saliencies, far beyond what
processors differ by, leaves the plans as they are. Who changes an expected value here says so in the commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.pipeline.run.opening import widths_costs
from secateur.pipeline.workloads.detection.networks import build_detector
from secateur.pipeline.workloads.networks import build_network
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.saliency import channel_saliency
from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Answer, Evaluate, Evaluation, Goal, Problem, Request, Score
from secateur.pruning.search.testing import drive
from secateur.pruning.trace import trace
from tests.golden import compare

NETWORKS = {
    "digits": (lambda: build_network("cifar/resnet8", 10, (1, 8, 8), {}), (1, 1, 8, 8)),
    "resnet20": (lambda: build_network("cifar/resnet20", 10, (3, 32, 32), {}), (1, 3, 32, 32)),
    "ssd": (lambda: build_detector("small_ssd", 10, {"width": 8}), (1, 3, 64, 64)),
}
WHOLE = {"digits": (747_136, 75_002), "resnet20": (40_551_040, 269_722), "ssd": (5_242_368, 137_516)}
"""Network -> MACs and parameters, unpruned."""
PLANS = {
    ("digits", "uniform"): ("bcee4f659bbc89b9", 353_072, 41_314),
    ("digits", "global"): ("47b53cadf68af173", 371_504, 42_474),
    ("resnet20", "uniform"): ("489a42480f2a8ad0", 20_128_304, 152_138),
    ("resnet20", "global"): ("468381694fc94aee", 20_238_896, 153_874),
    ("ssd", "uniform"): ("46165d39751b9ec7", 2_605_888, 75_260),
    ("ssd", "global"): ("32b068e2816ff129", 2_619_520, 75_256),
}
"""Network and method -> digest of the plan at half the MACs, its MACs and its parameters."""
NOISE = 1e-4
"""Largest relative error of a saliency that must change no plan; sums of another order differ by about 1e-16."""


def fixed(model: nn.Module) -> nn.Module:
    """The network with weights of a formula: within a layer no two filters, and no two layers, are nearly alike."""
    layers = [parameter.data for parameter in model.parameters() if parameter.ndim > 1]
    for number, weight in enumerate(layers, start=1):
        size = len(weight)
        rank = (7 * torch.arange(size) + 3) % size
        spread = 0.2 + 0.7 * number / len(layers)
        weight.copy_((1 + spread * rank / size).reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight))
    return model


@dataclass
class Network:
    """A traced network of fixed weights."""

    model: nn.Module
    graph: ChannelGraph
    space: SearchSpace

    def plan(self, method: str, noise: float = 0.0) -> PruningPlan:
        """The plan of a control at half the MACs.

        Args:
            noise: largest relative error of a saliency.
        """
        full = cost(self.graph, self.space.full)
        reference = Evaluation("ok", "", {"top1": 1.0, "macs": float(full.macs)})
        rng = np.random.default_rng(0)

        def answer(request: Request) -> Answer:
            if isinstance(request, Evaluate):
                return tuple(reference for _ in request.candidates)
            assert isinstance(request, Score)
            exact = channel_saliency(self.model, self.graph, request.criterion)
            return {name: scores * (1 + noise * rng.uniform(-1, 1, len(scores))) for name, scores in exact.items()}

        def costs(widths: Any) -> Any:
            return widths_costs(self.graph, self.space, widths)

        chosen: Any = METHODS.load(method)
        target = Goal(macs_ratio=0.5)
        problem = Problem(self.space, reference, lambda _: 1.0, costs, target, np.random.default_rng(0))
        (entry,) = drive(chosen.search(problem, chosen.Options()), answer)
        return entry.candidate.plan


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, Network]:
    build, shape = NETWORKS[request.param]
    model = fixed(build()).eval()
    graph = trace(model, torch.zeros(shape))
    return request.param, Network(model, graph, SearchSpace.of(graph.groups, channel_multiple=4, min_keep_ratio=0.1))


def test_macs_and_parameters_are_those_written_down(network: tuple[str, Network]) -> None:
    name, it = network
    found = cost(it.graph, it.space.full)
    assert (found.macs, found.params) == WHOLE[name]


@pytest.mark.parametrize("method", ["uniform", "global"])
def test_plans_of_fixed_weights_are_those_written_down(network: tuple[str, Network], method: str) -> None:
    name, it = network
    plan = it.plan(method)
    found = cost(it.graph, plan)
    assert (plan.digest, found.macs, found.params) == PLANS[name, method]
    assert it.plan(method, noise=NOISE).digest == plan.digest, "the ranking is near a tie"


def test_the_comparison_reads_meaning_and_not_bytes() -> None:
    """Order of keys, fields at their default, times, paths and old words do not count; an answer does."""
    weights = {"3-tuned-ab": "digest of the tensors"}
    old = {"kind": "judge", "part": [0.0, 1.0], "distill": None, "base": "3-tuned-ab", "time": 1.5}
    new = {"base": "7-tuned-cd", "spent": {"seconds": 2.0}, "kind": "gate"}
    metrics = {"top1": 0.5, "p50_ms": 1.0, "latency_ratio": 0.9}
    before = dict(compare.facts(old | {"evaluation": {"metrics": metrics}}, weights))
    after = dict(compare.facts(new | {"evaluation": {"metrics": {"top1": 0.5}}}, {"7-tuned-cd": weights["3-tuned-ab"]}))
    assert compare.differences(before, after) == []
    assert compare.differences(before, after | {"evaluation.metrics.top1": 0.25}) == [
        "evaluation.metrics.top1: 0.5 -> 0.25"
    ]
    assert not compare.report({"a run: answers": {}}, {"a run: answers": {}}), "nothing compared is no proof"
