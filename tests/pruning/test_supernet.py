"""Weights for any widths: crops, gradients, and the same network in training as in evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.supernet import Frame, PruningNet, Supernet, involved, scaled_space, weights_for
from secateur.pruning.trace import trace
from secateur.pruning.weights import inherit
from tests.pruning.models import BasicBlock, Net, PlainCNN, half, randomise


def residual() -> nn.Module:
    def forward(m, x):
        return m.fc(m.second(m.first(F.relu(m.conv(x)))).mean((2, 3)))

    first, second = BasicBlock(8, 8, 1, "A"), BasicBlock(8, 16, 2, "A")
    return Net(forward, conv=nn.Conv2d(3, 8, 3, padding=1), first=first, second=second, fc=nn.Linear(16, 5))


def depthwise() -> nn.Module:
    parts = [nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 16, 3, groups=4)]
    return nn.Sequential(*parts, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def tied() -> nn.Module:
    def forward(m, x):
        return m.head(m.b(F.relu(m.a(m.stem(x)))).mean((2, 3)))

    model = Net(
        forward, stem=nn.Conv2d(3, 8, 1), a=nn.Conv2d(8, 8, 3), b=nn.Conv2d(8, 8, 3, bias=False), head=nn.Linear(8, 5)
    )
    model.b.weight = model.a.weight
    return model


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 5))


def group_norm() -> nn.Module:
    parts = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.GroupNorm(12, 12)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": PlainCNN,
    "residual": residual,
    "depthwise": depthwise,
    "tied": tied,
    "layer norm": layer_norm,
    "group norm": group_norm,
}


def example(n: int = 4, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def traced(name: str) -> tuple[nn.Module, ChannelGraph, torch.Tensor]:
    torch.manual_seed(0)
    x = example(side=16 if name == "plain" else 8)
    model = randomise(NETWORKS[name]()).eval()
    return model, trace(model, x), x


def state_of(model: nn.Module, graph: ChannelGraph, net: PruningNet, plan: PruningPlan) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        dense = net.weights_for(plan)
    return {n: dense[graph.aliases.get(n, n)] for n in model.state_dict()}


@pytest.mark.parametrize("max_outputs", [1e6, 0], ids=["generated", "shared"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_runs_the_very_network_that_is_evaluated(name, max_outputs):
    model, graph, x = traced(name)
    net = PruningNet(model, graph, max_outputs=max_outputs)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for plan in (PruningPlan.full(graph.groups), half(graph), scaled_space(graph).smallest()):
        expected = inherit(model, graph, plan, state_of(model, graph, net, plan)).eval()(x)
        torch.testing.assert_close(Frame(model, graph).run(net, plan, x, training=False), expected)
        Frame(model, graph).run(net, plan, x, training=True).sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    kept = {n: t for n, t in net.tensors().items() if n in before and not t.requires_grad}
    assert all(torch.equal(t, before[n]) for n, t in kept.items()), "batch norms of one width leak into the others"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frame_that_has_run_at_other_widths_runs_as_a_new_one(name):
    model, graph, x = traced(name)
    net, frame, space = PruningNet(model, graph, max_outputs=0), Frame(model, graph), scaled_space(graph)
    order = {n: -np.arange(size, dtype=float) for n, size in space.sizes.items()}
    rng = np.random.default_rng(0)
    for plan in (space.smallest(), space.full, half(graph), space.full):
        torch.testing.assert_close(frame.run(net, plan, x), Frame(model, graph).run(net, plan, x), rtol=0, atol=0)
    for _ in range(5):
        plan = space.decode([rng.choice(space.allowed[n]) for n in space.names], order)
        torch.testing.assert_close(frame.run(net, plan, x), Frame(model, graph).run(net, plan, x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_shared_weights_are_the_models_own_at_every_width(name):
    model, graph, x = traced(name)
    net, plan = PruningNet(model, graph, max_outputs=0), half(graph)
    torch.testing.assert_close(Frame(model, graph).run(net, plan, x, training=False), inherit(model, graph, plan)(x))


def test_the_crop_of_the_full_widths_is_the_whole_generated_tensor():
    model, graph, _ = traced("residual")
    net, full = PruningNet(model, graph), PruningPlan.full(graph.groups)
    state = state_of(model, graph, net, full)
    parts = net.tensors()
    network = inherit(model, graph, full, state)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, state[name])
        if f"{name}@1.weight" in parts:
            first, offset, second, last = (parts[f"{name}@{p}"] for p in ("1.weight", "1.bias", "2.weight", "2.bias"))
            made = second @ F.relu(first.sum(1) + offset) + last  # every keep ratio is 1
            torch.testing.assert_close(weight, made.view_as(weight).detach())


def test_a_generator_sees_the_keep_ratios_of_the_groups_its_layer_touches():
    model, graph, _ = traced("residual")
    names = involved(graph)
    assert len(names["first.conv1.weight"]) == 2  # own outputs, and the stream it reads
    assert len(names["conv.weight"]) == 1
    net = PruningNet(model, graph, hidden=7)
    parts = net.tensors()
    weight = model.get_parameter("first.conv1.weight")
    assert parts["first.conv1.weight@1.weight"].shape == (7, 2)
    assert parts["first.conv1.weight@2.weight"].shape == (weight.numel(), 7)
    space = scaled_space(graph)

    def made(group: str, width: int) -> torch.Tensor:
        return weights_for(parts, graph, space.full.replace({group: range(width)}))["first.conv1.weight"]

    whole = made("first.conv1", 8)
    assert not torch.equal(whole, made("first.conv1", 4))
    other = next(g.name for g in graph.groups if g.name not in names["first.conv1.weight"])
    assert torch.equal(whole, made(other, 3))
    assert all(torch.equal(parts[n], t) for n, t in model.named_parameters() if t.ndim == 1), "vectors are shared"


def test_a_generator_begins_near_the_weights_it_was_given():
    model, graph, _ = traced("residual")
    for seed in (0, 1):
        state = state_of(model, graph, PruningNet(model, graph, seed=seed), half(graph))
        old = model.get_parameter("second.conv2.weight")
        change = (state["second.conv2.weight"] - old).norm() / old.norm()
        assert 0.005 < change < 0.3


def test_large_layers_are_shared():
    model, graph, _ = traced("plain")
    generated = {n.partition("@")[0] for n in PruningNet(model, graph, max_outputs=900).tensors() if "@" in n}
    assert generated == {"conv1.weight", "conv2.weight", "fc2.weight"}  # fc1 has 20 * 192 weights
    assert not [n for n in PruningNet(model, graph, max_outputs=0).tensors() if "@" in n]


def test_gradients_reach_the_generators_and_stay_inside_the_crop():
    model, graph, x = traced("plain")
    full = PruningPlan.full(graph.groups)
    plan = full.replace({name: range(size // 2) for name, size in full.sizes.items()})
    net = PruningNet(model, graph)
    Frame(model, graph).run(net, plan, x).square().sum().backward()
    parts = net.tensors()
    for name in ("conv1.weight", "conv2.weight", "fc1.weight"):
        assert parts[f"{name}@1.weight"].grad.abs().sum() > 0
    shared = PruningNet(model, graph, max_outputs=0)
    Frame(model, graph).run(shared, plan, x).square().sum().backward()
    grad = shared.tensors()["conv2.weight"].grad
    rows, columns = plan.widths["conv2"], plan.widths["conv1"]
    assert (grad[:rows, :columns] != 0).any()
    assert (grad[rows:] == 0).all()
    assert (grad[:, columns:] == 0).all()


def test_frozen_parameters_stay_frozen():
    model, graph, x = traced("plain")
    model.conv1.weight.requires_grad_(False)
    net = PruningNet(model, graph)
    Frame(model, graph).run(net, half(graph), x).sum().backward()
    assert not net.tensors()["conv1.weight"].requires_grad
    assert "conv1.weight@1.weight" not in net.tensors()


def supernet(seed: int = 3, order: str = "leading") -> tuple[Supernet, torch.Tensor]:
    model, graph, x = traced("plain")
    space = scaled_space(graph)
    rank = {n: np.arange(s, dtype=float) * (-1 if order == "leading" else 1) for n, s in space.sizes.items()}
    return Supernet(model, PruningNet(model, graph), space, rank, seed=seed), x


def test_steps_draw_allowed_widths_uniformly_from_the_seed_and_the_step():
    net, x = supernet()
    net.train()
    plans = [net.draw(step) for step in range(400)]
    again, other = supernet()[0], supernet(seed=4)[0]
    assert plans[:20] == [again.draw(step) for step in range(20)]
    assert plans[:20] != [other.draw(step) for step in range(20)]
    for name, allowed in net.space.allowed.items():
        drawn, counts = np.unique([plan.widths[name] for plan in plans], return_counts=True)
        assert tuple(drawn) == allowed
        assert counts.min() > 0.4 * 400 / len(allowed)
        assert all(plan.kept[name] == tuple(range(plan.widths[name])) for plan in plans)
    torch.testing.assert_close(net(x), net.frame.run(net.weights, plans[0], x))
    torch.testing.assert_close(net(x), net.frame.run(net.weights, plans[1], x))
    assert int(net.images) == 8
    assert [k for k in net.state_dict() if not k.startswith("weights.")] == ["steps", "images"]


def test_the_channels_that_rank_highest_stay():
    net, _ = supernet(order="trailing")
    for name, kept in net.draw(0).kept.items():
        size = net.space.sizes[name]
        assert kept == tuple(range(size - len(kept), size))


def test_in_eval_mode_it_is_the_whole_network():
    net, x = supernet()
    net.eval()
    torch.testing.assert_close(net(x), net.frame.run(net.weights, net.space.full, x, training=False))
    assert int(net.steps) == 0
