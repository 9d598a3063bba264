"""Costs computed from widths equal those counted on the built network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from secateur.pruning.cost import Cost, cost, costs, count
from secateur.pruning.plan import PlanError, PruningPlan
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.pruning.models import CifarResNet, PlainCNN, TwoBranches

IMAGES = torch.randn(2, 3, 16, 16)


def test_cost_by_hand() -> None:
    model = TwoBranches()
    graph = trace(model, IMAGES)
    pixels = 256
    assert cost(graph, PruningPlan.full(graph.groups)) == Cost(
        macs=pixels * (3 * 10 + 10 * 5), params=3 * 10 + 10 + 10 * 5 + 5, activation_bytes=4 * pixels * (10 + 10 + 5)
    )


def test_known_networks() -> None:
    for name, macs, params in (("resnet18", 1_814_073_344, 11_689_512), ("mobilenet_v2", 300_774_272, 3_504_872)):
        found = count(getattr(torchvision.models, name)(weights=None), torch.zeros(1, 3, 224, 224))
        assert (found.macs, found.params) == (macs, params)


@pytest.mark.parametrize("option", ["A", "B"])
def test_costs_equal_counts_for_random_plans(option: str) -> None:
    model = CifarResNet(option)
    graph = trace(model, IMAGES)
    plans = [uniform_plan(graph, ratio, saliency="random", seed=k) for k, ratio in enumerate((0.1, 0.4, 0.8, 1.0))]
    found = costs(graph, plans)
    for i, plan in enumerate(plans):
        counted = count(prune(model, graph, plan), IMAGES)
        assert (found.macs[i], found.params[i], found.activation_bytes[i]) == (
            counted.macs,
            counted.params,
            counted.activation_bytes,
        )
        assert cost(graph, plan) == counted
    widths = np.array([[plan.widths[g.name] for g in graph.groups] for plan in plans])
    assert np.array_equal(costs(graph, widths).macs, found.macs)


def test_matrix_products_are_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(3, 8, False), nn.Linear(3, 8, False), nn.Linear(3, 6, False)
            self.out = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x))

    model, x = Attention(), torch.randn(2, 5, 3)
    graph = trace(model, x)
    assert [(g.name, g.size) for g in graph.groups] == [("q", 8), ("v", 6)]
    plan = PruningPlan.full(graph.groups).replace({"q": (0, 3, 4), "v": (1, 5)})
    found = cost(graph, plan)
    assert found == count(prune(model, graph, plan), x)
    assert found.macs == 5 * 3 * (3 + 3 + 2) + 5 * 5 * 3 + 5 * 5 * 2 + 5 * 2 * 2


def test_batch_does_not_matter() -> None:
    model = PlainCNN()
    full = [trace(model, torch.randn(n, 3, 16, 16)) for n in (1, 4)]
    assert len({cost(graph, PruningPlan.full(graph.groups)) for graph in full}) == 1


def test_a_foreign_plan_is_refused() -> None:
    graph = trace(PlainCNN(), IMAGES)
    with pytest.raises(PlanError, match="another network"):
        cost(graph, PruningPlan({"x": 1}, {"x": (0,)}))
