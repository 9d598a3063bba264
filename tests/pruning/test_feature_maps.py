"""Distances between mean feature maps, against maps taken by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils.parametrizations import weight_norm

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.feature_maps import cosine_distance, feature_distance
from secateur.pruning.search.methods.clustering import dbscan, num_kept
from secateur.pruning.trace import trace
from tests.numerics import rounding
from tests.pruning.models import CifarResNet, Net, PlainCNN, TwoBranches, randomise

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NEAR = rounding(depth=4, terms=2 * IMAGES[:, 0].numel())
"""Of cosines of mean maps: two sums over all positions of two networks of two layers, in float32."""


def cosine(rows: Tensor) -> np.ndarray:
    """Cosine distances of rows without zeros, by the definition."""
    rows = rows.detach().double()
    return np.array([[float(1 - F.cosine_similarity(a, b, dim=0)) for b in rows] for a in rows])


def mean_rows(maps: Tensor) -> Tensor:
    return maps.double().mean(0).flatten(1)


def traced(model: nn.Module) -> tuple[nn.Module, ChannelGraph]:
    randomise(model).eval()
    return model, trace(model, IMAGES[:1])


def test_maps_are_taken_before_batch_norm_and_averaged_over_images() -> None:
    model, graph = traced(PlainCNN())
    found = feature_distance(model, graph, [IMAGES])
    assert found["conv1"] == pytest.approx(cosine(mean_rows(model.conv1(IMAGES))), abs=NEAR)
    assert {name: d.shape for name, d in found.items()} == {g.name: (g.size, g.size) for g in graph.groups}
    assert all(d.dtype == np.float64 and (d == d.T).all() and not d.diagonal().any() for d in found.values())


def test_batches_make_no_difference() -> None:
    model, graph = traced(PlainCNN())
    at_once = feature_distance(model, graph, [IMAGES], concat=2)
    in_turn = feature_distance(model, graph, [(IMAGES[:1],), (IMAGES[1:4],), (IMAGES[4:],)], concat=2)
    assert all(in_turn[name] == pytest.approx(at_once[name], abs=NEAR) for name in at_once)


def test_images_may_come_as_a_list_and_differ_in_size() -> None:
    model = Net(
        lambda m, images: [m.last(m.first(x[None])) for x in images], first=nn.Conv2d(3, 8, 1), last=nn.Conv2d(8, 4, 1)
    )
    graph = trace(model, [IMAGES[0]])
    small = F.avg_pool2d(IMAGES[1], 2)
    found = feature_distance(model, graph, [[IMAGES[0]], [small]], max_positions=64)["first"]
    maps = torch.stack([F.adaptive_avg_pool2d(model.first(x), 8) for x in (IMAGES[0], small)])
    assert found == pytest.approx(cosine(mean_rows(maps)), abs=NEAR)


def test_after_activation_the_maps_are_those_the_readers_get() -> None:
    model, graph = traced(PlainCNN())
    found = feature_distance(model, graph, [IMAGES], after_activation=True)
    read = F.max_pool2d(F.relu(model.bn1(model.conv1(IMAGES))), 2)
    assert found["conv1"] == pytest.approx(cosine(mean_rows(read)), abs=NEAR)
    flat = F.max_pool2d(torch.sigmoid(model.conv2(read)), 2)  # read through a flatten by a linear layer
    assert found["conv2"] == pytest.approx(cosine(mean_rows(flat)), abs=NEAR)


def test_a_layer_without_positions_is_described_by_its_values_on_single_images() -> None:
    model, graph = traced(PlainCNN())
    seen: list[Tensor] = []
    handle = model.fc1.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(IMAGES)
    handle.remove()
    found = feature_distance(model, graph, [IMAGES])
    assert found["fc1"] == pytest.approx(cosine(seen[0].T), abs=NEAR)


def test_parts_of_the_images_are_put_side_by_side() -> None:
    model, graph = traced(PlainCNN())
    maps = model.conv1(IMAGES)
    halves = torch.cat([mean_rows(maps[0::2]), mean_rows(maps[1::2])], dim=1)
    found = feature_distance(model, graph, [IMAGES], concat=2)["conv1"]
    assert found == pytest.approx(cosine(halves), abs=NEAR)
    assert np.abs(found - feature_distance(model, graph, [IMAGES])["conv1"]).max() > 0.01


@pytest.mark.parametrize(("most", "side"), [(256, 16), (255, 15), (64, 8)])
def test_large_maps_are_pooled(most: int, side: int) -> None:
    model, graph = traced(PlainCNN())
    maps = F.adaptive_avg_pool2d(model.conv1(IMAGES), side)
    found = feature_distance(model, graph, [IMAGES], max_positions=most)["conv1"]
    assert found == pytest.approx(cosine(mean_rows(maps)), abs=NEAR)


def test_maps_pooled_to_one_position_are_dealt_into_as_many_parts() -> None:
    model, graph = traced(PlainCNN())
    values = model.conv1(IMAGES).mean((2, 3))
    parts = torch.stack([values[p::3].mean(0) for p in range(3)], dim=1)
    found = feature_distance(model, graph, [IMAGES[:4], IMAGES[4:]], max_positions=3)["conv1"]
    assert found == pytest.approx(cosine(parts), abs=NEAR)


def test_oblong_maps_keep_to_the_bound() -> None:
    from secateur.pruning.feature_maps import _pooled

    for shape in [(300, 300), (1, 5000), (7, 900), (38, 38), (2000,), (9, 9, 99)]:
        assert 1 <= np.prod(_pooled(shape, 1444)) <= 1444
    assert _pooled((150, 150), 1444) == (38, 38)


def test_the_distances_of_several_producers_are_averaged() -> None:
    model, graph = traced(CifarResNet("B"))
    first = model.conv1(IMAGES)
    block = model.layer1
    second = block.conv2(F.relu(block.bn1(block.conv1(F.relu(model.bn1(first))))))
    expected = (cosine(mean_rows(first)) + cosine(mean_rows(second))) / 2
    assert feature_distance(model, graph, [IMAGES])["conv1"] == pytest.approx(expected, abs=NEAR)


def test_depthwise_convolutions_are_left_out() -> None:
    model = Net(
        lambda m, x: m.last(F.relu(m.depth(F.relu(m.first(x))))),
        first=nn.Conv2d(3, 8, 1),
        depth=nn.Conv2d(8, 8, 3, groups=8),
        last=nn.Conv2d(8, 4, 1),
    )
    graph = trace(model, IMAGES[:1])
    assert feature_distance(model, graph, [IMAGES])["first"] == pytest.approx(
        cosine(mean_rows(model.first(IMAGES))), abs=NEAR
    )


def test_transposed_convolutions_hold_their_channels_in_the_second_dimension() -> None:
    model = Net(lambda m, x: m.last(F.relu(m.up(x))), up=nn.ConvTranspose2d(3, 8, 2, stride=2), last=nn.Conv2d(8, 4, 1))
    graph = trace(model, IMAGES[:1])
    assert feature_distance(model, graph, [IMAGES])["up"] == pytest.approx(
        cosine(mean_rows(model.up(IMAGES))), abs=NEAR
    )


def test_a_layer_that_runs_twice_has_both_maps_side_by_side() -> None:
    model = Net(
        lambda m, x: m.last(m.head(x)) + m.last(m.head(F.avg_pool2d(x, 2))).mean(),
        head=nn.Conv2d(3, 8, 1),
        last=nn.Conv2d(8, 4, 1),
    )
    graph = trace(model, IMAGES[:1])
    both = [mean_rows(model.head(x)) for x in (IMAGES, F.avg_pool2d(IMAGES, 2))]
    assert feature_distance(model, graph, [IMAGES])["head"] == pytest.approx(cosine(torch.cat(both, 1)), abs=NEAR)


def test_a_parametrized_weight_is_followed_to_its_layer() -> None:
    model = TwoBranches()
    weight_norm(model.left)
    graph = trace(model, IMAGES[:1])
    expected = cosine(mean_rows(model.left(IMAGES)))
    assert feature_distance(model, graph, [IMAGES])["left"] == pytest.approx(expected, abs=NEAR)


def test_weights_outside_of_layers_are_compared_themselves() -> None:
    w = nn.Parameter(torch.randn(3, 8))
    model = Net(lambda m, x: m.last((x.mean((2, 3)) @ m.w).relu()), w=w, last=nn.Linear(8, 4))
    graph = trace(model, IMAGES[:1])
    assert feature_distance(model, graph, [IMAGES])["w"] == pytest.approx(cosine(w.detach().T), abs=NEAR)


def test_copies_of_a_channel_are_at_distance_zero_and_count_once() -> None:
    """Oracle: five copies lower the number of clusters by four, four copies count as noise."""
    for copies, width in [(5, 12 - 4), (6, 12 - 5), (4, 12)]:
        model, graph = traced(PlainCNN())
        with torch.no_grad():
            model.conv2.weight[:copies] = model.conv2.weight[0]
            model.conv2.bias[:copies] = model.conv2.bias[0]
        distance = feature_distance(model, graph, [IMAGES])["conv2"]
        assert not distance[:copies, :copies].any()
        assert num_kept(dbscan(distance).at(1e-9)) == width


def test_zero_maps_are_one_cluster_far_from_all_others() -> None:
    model, graph = traced(PlainCNN())
    with torch.no_grad():
        model.conv1.weight[[1, 4]] = 0
        model.conv1.bias[[1, 4]] = 0
    distance = feature_distance(model, graph, [IMAGES])["conv1"]
    others = [0, 2, 3, 5, 6, 7]
    assert distance[1, 4] == 0
    assert (distance[np.ix_([1, 4], others)] == 1).all()
    assert not cosine_distance(torch.zeros(3, 4)).any()


def test_opposite_maps_are_at_distance_two() -> None:
    assert cosine_distance(torch.tensor([[1.0, 2], [-1, -2], [2, 4]])) == pytest.approx(
        np.array([[0, 2, 0], [2, 0, 2], [0, 2, 0]])
    )


def test_the_model_comes_back_untouched() -> None:
    model = randomise(CifarResNet("A")).train()
    graph = trace(model, IMAGES[:1])
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    random, hooks = torch.random.get_rng_state(), len(nn_module._global_forward_hooks)
    feature_distance(model, graph, [IMAGES])
    with pytest.raises(RuntimeError):
        feature_distance(model, graph, [torch.zeros(2, 5, 16, 16)])
    assert torch.equal(torch.random.get_rng_state(), random)
    assert len(nn_module._global_forward_hooks) == hooks
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    after = model.state_dict(keep_vars=True)
    assert all(torch.equal(after[n], t) and after[n]._version == v for n, (t, v) in before.items())
    assert model(IMAGES).requires_grad


def test_errors_name_the_way_out() -> None:
    model, graph = traced(PlainCNN())
    with pytest.raises(ValueError, match="there is no batch"):
        feature_distance(model, graph, [])
    with pytest.raises(ValueError, match="must be 1 or more, got 0 and 1444"):
        feature_distance(model, graph, [IMAGES], concat=0)
    with torch.no_grad():
        model.conv2.weight[0] = torch.nan
    with pytest.raises(ValueError, match="feature maps of 'conv2' are not finite"):
        feature_distance(model, graph, [IMAGES])
