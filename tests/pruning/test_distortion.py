"""Damage of removed channels, against two plain forward passes of the layer that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning.distortion import distortions
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.pruning.models import CifarResNet, Net, PlainCNN, TwoBranches, half, randomise

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Then = Callable[[nn.Module, Tensor], Tensor]
"""What follows a reading layer: its batch norm and activation."""


def naive(
    network: nn.Module, images: Tensor, reader: str, inputs: Sequence[int], then: Then = lambda net, x: x
) -> float:
    """Mean over images of |O - O'|^2 / |O|^2: the layer's input is caught, channels in it are zeroed, it runs again."""
    layer, caught = network.get_submodule(reader), []
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0].clone()))
    with torch.no_grad():
        network(images)
        handle.remove()
        x = caught[0]
        cut = x.clone()
        cut[:, list(inputs)] = 0
        before, after = (then(network, layer(v)).double() for v in (x, cut))
    change = (before - after).flatten(1).square().sum(1)
    return float((change / before.flatten(1).square().sum(1)).mean())


def one(model: nn.Module, removed: Mapping[str, Sequence[int]], plan: PruningPlan | None = None) -> dict[str, float]:
    graph = trace(model, IMAGES)
    found = distortions(model, graph, plan or PruningPlan.full(graph.groups), [removed], [IMAGES])
    return {name: float(values[0]) for name, values in found.items()}


def mobile() -> nn.Module:
    """conv-bn-relu6, depthwise-bn-relu6, pointwise-bn, linear."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu6(m.bn1(m.expand(x)))
        x = F.relu6(m.bn2(m.depth(x)))
        return m.head(m.bn3(m.point(x)).mean((2, 3)))

    parts = {"expand": nn.Conv2d(3, 8, 1), "depth": nn.Conv2d(8, 8, 3, padding=1, groups=8), "bn2": nn.BatchNorm2d(8)}
    parts |= {"bn1": nn.BatchNorm2d(8), "point": nn.Conv2d(8, 6, 1), "bn3": nn.BatchNorm2d(6), "head": nn.Linear(6, 4)}
    return randomise(Net(run, **parts)).eval()


def test_in_a_residual_net_the_norm_after_the_reader_counts_and_the_sum_after_it_does_not() -> None:
    model = randomise(CifarResNet("B")).eval()
    found = one(model, {"layer2.conv1": [1, 5, 6]})
    expected = naive(model, IMAGES, "layer2.conv2", [1, 5, 6], lambda net, x: net.layer2.bn2(x))
    assert found == {"layer2.conv1": pytest.approx(expected, rel=1e-5)}
    assert expected != pytest.approx(naive(model, IMAGES, "layer2.conv2", [1, 5, 6]), rel=0.01)  # norm matters


def test_of_several_readers_the_most_damaged_counts() -> None:
    model = randomise(CifarResNet("B")).eval()
    gone = [0, 3, 7]
    conv = naive(model, IMAGES, "layer3.conv1", gone, lambda net, x: F.relu(net.layer3.bn1(x)))
    short = naive(model, IMAGES, "layer3.shortcut.0", gone, lambda net, x: net.layer3.shortcut[1](x))
    assert conv != pytest.approx(short, rel=0.01)
    assert one(model, {"layer2.conv2": gone}) == {"layer2.conv2": pytest.approx(max(conv, short), rel=1e-5)}


def test_in_a_depthwise_net_the_pointwise_layer_is_the_next_one() -> None:
    model = mobile()
    expected = naive(model, IMAGES, "point", [2, 3], lambda net, x: net.bn3(x))
    assert one(model, {"expand": [2, 3]}) == {"expand": pytest.approx(expected, rel=1e-5)}


def test_in_a_linear_net_a_channel_before_a_flatten_is_several_inputs() -> None:
    model = PlainCNN().eval()
    inputs = [16 * c + i for c in (4, 11) for i in range(16)]
    assert one(model, {"conv2": [4, 11], "fc1": [3]}) == {
        "conv2": pytest.approx(naive(model, IMAGES, "fc1", inputs, lambda net, x: F.relu(x)), rel=1e-5),
        "fc1": pytest.approx(naive(model, IMAGES, "fc2", [3]), rel=1e-5),
    }


def test_inplace_activations_and_grouped_convolutions() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(True), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(True), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 10 * 10, 2)).eval()
    graph = trace(model, IMAGES)
    (group,) = (g for g in graph.groups if any(m.tensor == "2.weight" and m.reads for m in g.members))
    (member,) = (m for m in group.members if m.tensor == "2.weight" and m.reads)
    inputs = [half * 4 + int(i) for half in range(2) for i in member.index[1]]  # the same place in both halves
    expected = naive(model, IMAGES, "2", inputs, lambda net, x: F.relu(x))
    assert one(model, {group.name: [1]}) == {group.name: pytest.approx(expected, rel=1e-5)}


def test_each_half_of_a_concatenation_is_looked_at_alone() -> None:
    model = TwoBranches().eval()
    found = one(model, {"left": [0, 5], "right": [1]})
    assert found["left"] == pytest.approx(naive(model, IMAGES, "merge", [0, 5]), rel=1e-5)
    assert found["right"] == pytest.approx(naive(model, IMAGES, "merge", [7]), rel=1e-5)


def test_with_a_plan_the_pruned_network_runs_and_channels_keep_their_numbers() -> None:
    model = randomise(CifarResNet("B")).eval()
    graph = trace(model, IMAGES)
    plan = half(graph)
    kept = plan.kept["layer3.conv1"]
    pruned = prune(model, graph, plan).eval()
    expected = naive(pruned, IMAGES, "layer3.conv2", [2, 6], lambda net, x: net.layer3.bn2(x))
    assert one(model, {"layer3.conv1": [kept[2], kept[6]]}, plan) == {"layer3.conv1": pytest.approx(expected, rel=1e-5)}


def test_a_zero_filter_and_no_filter_do_no_damage() -> None:
    model = randomise(CifarResNet("B")).eval()
    with torch.no_grad():
        model.layer1.conv1.weight[3] = 0
        model.layer1.bn1.weight[3] = 0
        model.layer1.bn1.bias[3] = -1  # ReLU makes it zero
        model.layer1.bn1.bias[2] = 5  # and cannot make this one zero
    graph = trace(model, IMAGES)
    full = PruningPlan.full(graph.groups)
    removed = [{"layer1.conv1": (3,)}, {"layer1.conv1": ()}, {"layer1.conv1": (2,)}, {"layer2.conv1": (0,)}]
    found = distortions(model, graph, full, removed, [IMAGES] * 4)
    assert found["layer1.conv1"][:2].tolist() == [0, 0]
    assert found["layer1.conv1"][2] > 0
    assert np.isnan(found["layer1.conv1"][3])
    assert np.isnan(found["layer2.conv1"][:3]).all()


def test_the_weights_of_a_base_are_looked_at_and_the_model_is_left_as_it_was() -> None:
    model, other = randomise(CifarResNet("B")).train(), randomise(CifarResNet("B"), seed=1).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model, IMAGES)
    full = PruningPlan.full(graph.groups)
    found = distortions(model, graph, full, [{"layer1.conv1": [0]}], [IMAGES], other.state_dict())
    assert found["layer1.conv1"][0] == pytest.approx(one(other, {"layer1.conv1": [0]})["layer1.conv1"])
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("small_first", [False, True])
def test_a_head_that_runs_on_several_maps_counts_its_most_damaged_run(small_first: bool) -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        a = F.relu(m.stem(x))
        maps = [F.max_pool2d(a, 4), a] if small_first else [a, F.max_pool2d(a, 4)]
        return m.out(torch.cat([m.head(x).mean((2, 3)) for x in maps], 1))

    model = Net(run, stem=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 4, 1), out=nn.Linear(8, 2)).eval()
    small = nn.Sequential(model.stem, nn.ReLU(), nn.MaxPool2d(4), model.head)
    big = nn.Sequential(model.stem, nn.ReLU(), model.head)
    damages = naive(small, IMAGES, "3", [1, 2]), naive(big, IMAGES, "2", [1, 2])
    assert damages[0] != pytest.approx(damages[1], rel=0.01)
    assert one(model, {"stem": [1, 2]}) == {"stem": pytest.approx(max(damages), rel=1e-5)}


def test_errors_name_the_group() -> None:
    model = TwoBranches().eval()
    with pytest.raises(ValueError, match=r"no channel group 'up'; the network has \['left', 'right'"):
        one(model, {"up": [0]})
    graph = trace(model, IMAGES)
    plan = PruningPlan.full(graph.groups).replace({"left": [0, 1]})
    with pytest.raises(ValueError, match=r"batch 0: channels \[4\] of group 'left' are not kept by the plan"):
        one(model, {"left": [1, 4]}, plan)
    attention = Net(
        lambda m, x: m.head(F.softmax(m.q(x) @ m.k(x).transpose(1, 2), -1) @ x),
        q=nn.Linear(16, 8),
        k=nn.Linear(16, 8),
        head=nn.Linear(16, 2),
    ).eval()
    tokens = torch.randn(2, 5, 16)
    graph = trace(attention, tokens)
    (name,) = [group.name for group in graph.groups if group.size == 8]
    with pytest.raises(ValueError, match=r"'q' is read by no linear layer and no convolution.*search.frozen"):
        distortions(attention, graph, PruningPlan.full(graph.groups), [{name: [0]}], [tokens])
