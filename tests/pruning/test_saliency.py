"""Criteria by hand, and the plans made from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.saliency import CRITERIA, channel_saliency, directions, distances, uniform_plan
from secateur.pruning.trace import trace
from tests.pruning.models import CifarResNet, Net, PlainCNN, TwoBranches, randomise

IMAGES = torch.randn(2, 3, 16, 16)
DATA_DRIVEN = [name for name, criterion in CRITERIA.items() if criterion.gradients]


def batches(num: int = 3, classes: int = 10, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 3, 16, 16, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(num)
    ]


def scored(model: nn.Module, graph: ChannelGraph, criterion: str, **options: float) -> dict[str, np.ndarray]:
    data = {"batches": batches(), "loss": F.cross_entropy} if criterion in DATA_DRIVEN else {}
    return channel_saliency(model, graph, criterion, options=options, **data)


def rows(weight: Tensor, dim: int = 0) -> np.ndarray:
    return weight.detach().movedim(dim, 0).flatten(1).double().numpy()


def resnet() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(3)
    model = randomise(CifarResNet("B"))
    return model, trace(model, IMAGES)


def test_norms_of_the_producing_rows() -> None:
    model = TwoBranches()
    graph = trace(model, IMAGES)
    left = rows(model.left.weight)
    assert np.allclose(channel_saliency(model, graph, "l1")["left"], np.abs(left).sum(1))
    assert np.allclose(channel_saliency(model, graph, "l2")["left"], np.sqrt((left**2).sum(1)))


def test_scores_are_summed_over_the_layers_of_a_group() -> None:
    model = CifarResNet("B")
    graph = trace(model, IMAGES)
    expected = sum(w.detach().abs().double().sum((1, 2, 3)) for w in (model.conv1.weight, model.layer1.conv2.weight))
    scores = channel_saliency(model, graph, "l1")
    assert np.allclose(scores["conv1"], expected.numpy())
    assert {n: s.shape for n, s in scores.items()} == {g.name: (g.size,) for g in graph.groups}
    assert all(s.dtype == np.float64 for s in scores.values())


def test_distances_to_the_other_filters_by_brute_force() -> None:
    model, graph = resnet()
    both = [rows(model.conv1.weight), rows(model.layer1.conv2.weight)]
    expected = sum(np.array([np.linalg.norm(w - w[k], axis=1).sum() for k in range(8)]) for w in both)
    assert np.allclose(channel_saliency(model, graph, "fpgm")["conv1"], expected)


def test_a_filter_among_its_likes_goes_first_by_distance() -> None:
    table = torch.tensor([[1.0, 0], [0, 1], [1.2, 0], [0, -1], [1.1, 0]]).double()
    assert distances(table).argmin() == 0
    assert distances(table)[2] > distances(table)[4]
    assert directions(table).tolist() == pytest.approx(  # lengths do not count
        [2 * 2**0.5, 3 * 2**0.5 + 2, 2 * 2**0.5, 3 * 2**0.5 + 2, 2 * 2**0.5]
    )
    assert directions(torch.zeros(3, 2).double()).tolist() == [0, 0, 0]


def test_scales_of_all_batch_norms_that_carry_the_channel() -> None:
    model, graph = resnet()
    scores = channel_saliency(model, graph, "bn_scale")
    expected = model.bn1.weight.abs() + model.layer1.bn2.weight.abs()
    assert np.allclose(scores["conv1"], expected.detach().double())
    with torch.no_grad():
        model.layer1.bn1.weight[:] *= -1
    assert np.allclose(channel_saliency(model, graph, "bn_scale")["layer1.conv1"], scores["layer1.conv1"])


def test_without_batch_norm_a_group_falls_back_to_relative_norms_and_a_network_is_refused() -> None:
    model = PlainCNN()
    scores = channel_saliency(model, trace(model, IMAGES), "bn_scale")
    norm = np.linalg.norm(rows(model.conv2.weight), axis=1)
    assert np.allclose(scores["conv1"], model.bn1.weight.detach().double())
    assert np.allclose(scores["conv2"], norm / norm.mean())
    bare = TwoBranches()
    with pytest.raises(ValueError, match=r"needs batch norms .* use l1, l2 or taylor"):
        channel_saliency(bare, trace(bare, IMAGES), "bn_scale")


def test_weight_dependency_by_hand() -> None:
    model, graph = resnet()
    own = [np.abs(rows(w)).mean(1) for w in (model.conv1.weight, model.layer1.conv2.weight)]
    read = [model.layer1.conv1.weight, model.layer2.conv1.weight, model.layer2.shortcut[0].weight]
    sides = [*own, *(np.abs(rows(w, 1)).mean(1) for w in read)]
    expected = sum(side / side.mean() for side in sides)
    assert np.allclose(channel_saliency(model, graph, "weight_dependency")["conv1"], expected)


def test_bn_dependency_by_hand_with_a_flatten() -> None:
    model = randomise(PlainCNN())
    scores = channel_saliency(model, trace(model, IMAGES), "bn_dependency")
    read = np.linalg.norm(rows(model.conv2.weight, 1), axis=1)
    assert np.allclose(scores["conv1"], model.bn1.weight.detach().abs().double().numpy() * read)
    blocks = rows(model.fc1.weight, 1).reshape(12, -1)  # a channel of conv2 is 16 inputs of fc1
    norm = np.linalg.norm(rows(model.conv2.weight), axis=1)
    assert np.allclose(scores["conv2"], norm / norm.mean() * np.linalg.norm(blocks, axis=1))


def gates(model: nn.Module, weight: str, *, training: bool) -> np.ndarray:
    """|dL/dmask| of a mask of ones on every weight of one tensor, mean over the batches: SNIP's definition."""
    model.train(training)
    found = []
    for images, labels in batches():
        mask = torch.ones_like(model.get_parameter(weight), requires_grad=True)
        outputs = torch.func.functional_call(model, {weight: model.get_parameter(weight).detach() * mask}, images)
        (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, labels), mask)
        found.append(gradient.abs().double())
    model.eval()
    return torch.stack(found).mean(0).reshape(len(mask), -1).numpy()


def spread(table: np.ndarray) -> np.ndarray:
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return np.array([np.linalg.norm(unit - row, axis=1).sum() for row in unit])


FOUR = {
    "l1": lambda G: G.sum(1),
    "l2": lambda G: np.linalg.norm(G, axis=1) / np.linalg.norm(G),
    "max": lambda G: G.max(1) / G.sum(),
    "fpgm": spread,
}


@pytest.mark.parametrize("name", FOUR)
def test_evofcs_criteria_on_gradients_of_masks_and_on_weights(name: str) -> None:
    model, graph = resnet()
    stage = ["conv1.weight", "layer1.conv2.weight"]
    expected = sum(FOUR[name](gates(model, weight, training=True)) for weight in stage)
    scores = scored(model, graph, f"snip_{name}")
    assert np.allclose(scores["conv1"], expected, rtol=1e-4)
    inner = FOUR[name](gates(model, "layer2.conv1.weight", training=True))
    assert np.allclose(scores["layer2.conv1"], inner, rtol=1e-4)
    expected = sum(FOUR[name](np.abs(rows(model.get_parameter(weight)))) for weight in stage)
    assert np.allclose(channel_saliency(model, graph, f"weight_{name}")["conv1"], expected)


def test_the_geometric_median_of_evofc_zeroes_all_but_the_kept_number() -> None:
    """Its score is the sum of G, 0 for the floor(C p) filters of smallest distance; ours is the distance."""
    G = torch.rand(13, 7).double() + 0.01
    for p in np.linspace(0, 0.9, 10):
        kept = max(1, int(np.ceil(13 * (1 - p) - 1e-9)))
        away = directions(G)
        source = G.sum(1).clone()
        source[away.argsort()[: int(np.floor(13 * p + 1e-9))]] = 0
        assert set(source.argsort(descending=True)[:kept].tolist()) == set(
            away.argsort(descending=True)[:kept].tolist()
        )


def test_taylor_counts_weights_scales_and_shifts_in_eval_mode() -> None:
    model, graph = resnet()
    names = [f"{a}.{b}" for a in ("layer2.conv1", "layer2.bn1") for b in ("weight", "bias")]
    expected = np.zeros(16)
    for name in set(names) - {"layer2.conv1.bias"}:
        expected += gates(model, name, training=False).reshape(16, -1).sum(1)
    assert np.allclose(scored(model, graph, "taylor")["layer2.conv1"], expected, rtol=1e-4)


def test_a_channel_that_nothing_reads_has_no_taylor_score() -> None:
    model, graph = resnet()
    with torch.no_grad():
        model.layer3.conv2.weight[:, 5] = 0
        model.layer3.bn1.bias.fill_(9)  # no other channel is dead
    scores = scored(model, graph, "taylor")["layer3.conv1"]
    assert np.flatnonzero(scores == 0).tolist() == [5]


def test_as_many_batches_as_asked_for() -> None:
    model, graph = resnet()
    one = channel_saliency(model, graph, "taylor", batches=batches()[:1], loss=F.cross_entropy)
    same = scored(model, graph, "taylor", batches=1, images=64)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.allclose(one["conv1"], scored(model, graph, "taylor")["conv1"])


LAYERS = {
    "conv1d": (lambda: Net(lambda m, x: m.b(m.a(x)).mean(2), a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 5, 1)), (3, 9)),
    "conv3d": (
        lambda: Net(lambda m, x: m.b(m.a(x)).mean((2, 3, 4)), a=nn.Conv3d(3, 8, 1), b=nn.Conv3d(8, 5, 1)),
        (3, 2, 4, 4),
    ),
    "transposed": (
        lambda: Net(lambda m, x: m.b(m.a(x)).mean((2, 3)), a=nn.ConvTranspose2d(3, 8, 2), b=nn.Conv2d(8, 5, 1)),
        (3, 4, 4),
    ),
    "linear": (lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(3, 8), b=nn.Linear(8, 5)), (3,)),
    "grouped": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 12, 1, groups=2),
            c=nn.Conv2d(12, 5, 1),
        ),
        (3, 4, 4),
    ),
    "depthwise": (
        lambda: Net(
            lambda m, x: m.c(m.n(m.b(m.a(x)))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 8, 3, groups=8),
            n=nn.BatchNorm2d(8),
            c=nn.Conv2d(8, 5, 1),
        ),
        (3, 4, 4),
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer_is_scored_and_the_model_is_left_as_it_was(layer: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = build().train()
    model.a.weight.requires_grad_(False)
    graph = trace(model, torch.randn(2, *shape))
    data = [(torch.randn(4, *shape), torch.randint(5, (4,))) for _ in range(2)]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    for criterion in sorted(set(CRITERIA) - {"bn_scale"}):
        scores = channel_saliency(model, graph, criterion, batches=data, loss=F.cross_entropy)
        assert {n: s.shape for n, s in scores.items()} == {g.name: (g.size,) for g in graph.groups}
        assert all(np.isfinite(s).all() and s.dtype == np.float64 for s in scores.values())
        assert all(len(np.unique(s)) > 1 for s in scores.values() if len(s) > 2), criterion
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())
        assert all(module.training for module in model.modules())
        assert all(p.grad is None and p.requires_grad == (name != "a.weight") for name, p in model.named_parameters())


@pytest.mark.parametrize("criterion", DATA_DRIVEN)
def test_dropout_falls_the_same_under_the_same_seed(criterion: str) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.b(m.drop(F.relu(m.a(x)))), a=nn.Linear(3, 8), b=nn.Linear(8, 5), drop=nn.Dropout(0.5)
    ).eval()
    graph = trace(model, torch.randn(2, 3))
    data = [(torch.randn(4, 3), torch.randint(5, (4,)))]

    def score(seed: int) -> list[float]:
        return channel_saliency(model, graph, criterion, seed, batches=data, loss=F.cross_entropy)["a"].tolist()

    first = score(1)
    torch.rand(7)
    assert score(1) == first
    assert (score(2) == first) == (criterion == "taylor")  # the network as it is used drops nothing


def test_random_depends_on_the_seed_only() -> None:
    graph = trace(TwoBranches(), IMAGES)
    plans = [uniform_plan(graph, 0.5, saliency="random", seed=s) for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_uniform_plan_keeps_the_largest() -> None:
    model = TwoBranches()
    graph = trace(model, IMAGES)
    with torch.no_grad():
        model.left.weight[:] = torch.tensor([1.0, 9, 8, 2, 7, 3]).view(6, 1, 1, 1)
    plan = uniform_plan(graph, 0.5, model=model)
    assert plan.kept["left"] == (1, 2, 4)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert uniform_plan(graph, 1.0, model=model).is_full
    assert set(uniform_plan(graph, 0.01, model=model).widths.values()) == {1}


def test_wrong_arguments_name_the_right_ones() -> None:
    model = TwoBranches()
    graph = trace(model, IMAGES)
    with pytest.raises(ValueError, match=r"unknown saliency criterion 'l3'; known: \['bn_dependency', .*'random'"):
        channel_saliency(model, graph, "l3")
    with pytest.raises(ValueError, match="'taylor' is computed from gradients: pass batches= and loss="):
        channel_saliency(model, graph, "taylor")
    with pytest.raises(ValueError, match="there are no batches"):
        channel_saliency(model, graph, "taylor", batches=[], loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"no finite gradient with respect to \['left.weight'"):
        channel_saliency(model, graph, "taylor", batches=batches(1), loss=lambda out, _: out.sum() * float("nan"))
    with pytest.raises(
        ValueError, match=r"unknown options \['image'\] of saliency 'l1'; known: \['batches', 'images'\]"
    ):
        channel_saliency(model, graph, "l1", options={"image": 3})
    with pytest.raises(ValueError, match="keep_ratio"):
        uniform_plan(graph, 0.0, model=model)
    with pytest.raises(ValueError, match="pass model="):
        uniform_plan(graph, 0.5)
