"""Criteria by hand, and the plans made from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pruning.channels import ChannelGraph
from pruning.plan import PruningPlan
from pruning.saliency import channel_saliency, uniform_plan
from tests.pruning.models import CifarResNet, TwoBranches

IMAGES = torch.randn(2, 3, 16, 16)


def test_norms_of_the_producing_rows() -> None:
    model = TwoBranches()
    graph = ChannelGraph.trace(model, IMAGES)
    rows = model.left.weight.detach().double().reshape(6, 3).numpy()
    assert np.allclose(channel_saliency(model, graph, "l1")["left"], np.abs(rows).sum(1))
    assert np.allclose(channel_saliency(model, graph, "l2")["left"], np.sqrt((rows**2).sum(1)))


def test_scores_are_summed_over_the_layers_of_a_group() -> None:
    model = CifarResNet("B")
    graph = ChannelGraph.trace(model, IMAGES)
    expected = sum(w.detach().abs().double().sum((1, 2, 3)) for w in (model.conv1.weight, model.layer1.conv2.weight))
    scores = channel_saliency(model, graph, "l1")
    assert np.allclose(scores["conv1"], expected.numpy())
    assert {n: s.shape for n, s in scores.items()} == {g.name: (g.size,) for g in graph.groups}
    assert all(s.dtype == np.float64 for s in scores.values())


def test_random_depends_on_the_seed_only() -> None:
    graph = ChannelGraph.trace(TwoBranches(), IMAGES)
    plans = [uniform_plan(graph, 0.5, saliency="random", seed=s) for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_uniform_plan_keeps_the_largest() -> None:
    model = TwoBranches()
    graph = ChannelGraph.trace(model, IMAGES)
    with torch.no_grad():
        model.left.weight[:] = torch.tensor([1.0, 9, 8, 2, 7, 3]).view(6, 1, 1, 1)
    plan = uniform_plan(graph, 0.5, model=model)
    assert plan.kept["left"] == (1, 2, 4)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert uniform_plan(graph, 1.0, model=model).is_full
    assert set(uniform_plan(graph, 0.01, model=model).widths.values()) == {1}


def test_wrong_arguments_name_the_right_ones() -> None:
    model = TwoBranches()
    graph = ChannelGraph.trace(model, IMAGES)
    with pytest.raises(ValueError, match=r"unknown saliency criterion 'l3'; known: \['l1', 'l2', 'random'\]"):
        channel_saliency(model, graph, "l3")
    with pytest.raises(ValueError, match="keep_ratio"):
        uniform_plan(graph, 0.0, model=model)
    with pytest.raises(ValueError, match="pass model="):
        uniform_plan(graph, 0.5)
