"""Properties of random networks and random plans, and that the certificate catches rules broken on purpose."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from secateur.pruning import rules
from secateur.pruning.channels import ChannelGraph, assemble
from secateur.pruning.cost import cost, count
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import certify, load_pruned, prune, save_pruned, scatter
from secateur.pruning.trace import trace
from secateur.pruning.weights import inherit
from tests.pruning.models import CifarResNet, Net, PlainCNN, TwoBranches, certified, randomise

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SMALL = IMAGES[:, :, :4, :4]


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def attend(m: Net, x: Tensor) -> Tensor:
    """Two heads over the pixels."""
    tokens = x.flatten(2).mT
    q, k, v = (layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = m.out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + y.mT.view(x.shape)


def mlp(m: Net, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1)
    return (y + m.gamma * m.down(F.gelu(m.up(y)))).permute(0, 3, 1, 2)


Layer = tuple[nn.Module, int]
"""A layer and its number of output channels."""

LAYERS: dict[str, Callable[[int, int], Layer]] = {
    "conv": lambda w, k: (nn.Conv2d(w, 4 * k, 3, padding=1), 4 * k),
    "transposed": lambda w, k: (nn.ConvTranspose2d(w, 4 * k, 3, padding=1), 4 * k),
    "depthwise": lambda w, k: (nn.Conv2d(w, w * k, 3, padding=1, groups=w), w * k),
    "grouped": lambda w, k: (nn.Conv2d(w, 8 * k, 1, groups=2 if w % 2 == 0 else 1), 8 * k),
    "grouped transposed": lambda w, k: (nn.ConvTranspose2d(w, 8 * k, 1, groups=4 if w % 4 == 0 else 1), 8 * k),
    "batch norm": lambda w, k: (nn.BatchNorm2d(w), w),
    "frozen statistics": lambda w, k: (nn.Sequential(nn.BatchNorm2d(w, affine=False), nn.PReLU(w)), w),
    "relu": lambda w, k: (nn.ReLU(inplace=k == 1), w),
    "residual": lambda w, k: (
        Net(lambda m, x: x + m.b(m.a(x).sigmoid()), a=nn.Conv2d(w, 4 * k, 1), b=nn.Conv2d(4 * k, w, 1)),
        w,
    ),
    "concat": lambda w, k: (
        Net(lambda m, x: torch.cat([x, m.a(x)] if k % 2 else [m.a(x), x], 1), a=nn.Conv2d(w, 4 * k, 1)),
        w + 4 * k,
    ),
    "chunk": lambda w, k: (
        (Net(lambda m, x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0].tanh()], 1)), w) if w > 1 else (nn.ELU(), w)
    ),
    "gated halves": lambda w, k: (nn.GLU(1), w // 2) if w % 2 == 0 else (nn.GELU(), w),
    "squeeze and excitation": lambda w, k: (SqueezeExcitation(w, k + 1), w),
    "channel shuffle": lambda w, k: (Net(lambda m, x: shuffle(x)), w) if w % 2 == 0 else (nn.Tanh(), w),
    "pixel shuffle": lambda w, k: (
        (nn.Sequential(nn.PixelShuffle(2), nn.AvgPool2d(2)), w // 4) if w % 4 == 0 else (nn.SiLU(), w)
    ),
    "attention": lambda w, k: (
        Net(attend, q=nn.Linear(w, 4 * k), k=nn.Linear(w, 4 * k), v=nn.Linear(w, 8), out=nn.Linear(8, w)),
        w,
    ),
    "mlp": lambda w, k: (
        Net(mlp, up=nn.Linear(w, 4 * k), down=nn.Linear(4 * k, w), gamma=nn.Parameter(torch.rand(w))),
        w,
    ),
}
JOINS = ("add an earlier one", "concat an earlier one")


class Composed(nn.Module):
    """A random acyclic graph of layers on 4 x 4 pixels, and a head; ``kinds`` are drawn by hypothesis."""

    def __init__(self, kinds: list[tuple[str, int]]) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList()
        widths = [8]
        for kind, size in kinds:
            width, earlier = widths[-1], widths[size % len(widths)]
            if kind == JOINS[0]:
                layer: nn.Module = nn.Conv2d(earlier, width, 1)
            elif kind == JOINS[1]:
                layer, width = nn.Identity(), width + earlier
            else:
                layer, width = LAYERS[kind](width, size)
            self.layers.append(layer)
            widths.append(width)
        self.squash = nn.Conv2d(widths[-1], 6, 1)
        self.hidden = nn.Linear(6 * 16, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for (kind, size), layer in zip(self.kinds, self.layers, strict=True):
            x, earlier = found[-1].clone(), found[size % len(found)]
            if kind == JOINS[0]:
                x = x + layer(earlier)
            elif kind == JOINS[1]:
                x = torch.cat([layer(earlier), x], 1)
            else:
                x = layer(x)
            found.append(x)
        return self.head(self.hidden(self.squash(found[-1]).flatten(1)).sigmoid())


KINDS = st.lists(st.tuples(st.sampled_from([*LAYERS, *JOINS]), st.integers(1, 3)), min_size=1, max_size=7)
SEEDS = st.integers(0, 2**16)


def traced(kinds: list[tuple[str, int]], seed: int) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(seed)
    model = randomise(Composed(kinds), seed)
    return model, trace(model, SMALL)


def random_plan(graph: ChannelGraph, rng: np.random.Generator, least: int = 1) -> PruningPlan:
    """Any number of channels of each group, from ``least`` (if there are so many) to all."""
    plan = PruningPlan.full(graph.groups)
    widths = {g.name: int(rng.integers(min(least, g.size), g.size + 1)) for g in graph.groups}
    return plan.replace({g.name: sorted(rng.permutation(g.size)[: widths[g.name]]) for g in graph.groups})


@settings(max_examples=50, deadline=None)
@given(KINDS, SEEDS)
def test_random_graphs_and_plans(kinds: list[tuple[str, int]], seed: int) -> None:
    model, graph = traced(kinds, seed)
    assert {g.name for g in graph.groups} >= {"squash", "hidden"}
    assert not graph.unknown
    plan = random_plan(graph, np.random.default_rng(seed))
    pruned = prune(model, graph, plan)
    certificate = certify(model, pruned, graph, plan, SMALL)
    assert certificate.ok, certificate
    predicted, counted = cost(graph, plan), count(pruned, SMALL)
    assert (predicted.macs, predicted.params) == (counted.macs, counted.params)
    if min(plan.widths.values()) > 1:  # kernels may take other paths, with other copies, at width 1
        assert predicted == counted
    assert PruningPlan.from_json(plan.to_json()) == plan
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(folder, pruned, plan)
        loaded, loaded_plan = load_pruned(folder, Composed(kinds), graph)
    assert loaded_plan == plan and loaded_plan.digest == plan.digest
    assert torch.equal(loaded.eval()(SMALL), pruned.eval()(SMALL))


@settings(max_examples=25, deadline=None)
@given(KINDS, SEEDS)
def test_pruning_twice_is_pruning_by_the_composed_plan(kinds: list[tuple[str, int]], seed: int) -> None:
    model, graph = traced(kinds, seed)
    rng = np.random.default_rng(seed)
    first = random_plan(graph, rng, least=2)
    once = prune(model, graph, first)
    regraph = trace(once, SMALL)
    assert {g.name: g.size for g in regraph.groups} == first.widths
    second = random_plan(regraph, rng)
    composed = first.replace({n: [first.kept[n][i] for i in kept] for n, kept in second.kept.items()})
    assert composed.is_within(first)
    twice, direct = prune(once, regraph, second).state_dict(), prune(model, graph, composed).state_dict()
    assert twice.keys() == direct.keys()
    assert all(torch.equal(twice[name], direct[name]) for name in direct)


@settings(max_examples=15, deadline=None)
@given(KINDS, SEEDS)
def test_scatter_and_slicing_are_inverse(kinds: list[tuple[str, int]], seed: int) -> None:
    model, graph = traced(kinds, seed)
    plan = random_plan(graph, np.random.default_rng(seed))
    state = {
        n: torch.rand_like(t) if t.is_floating_point() else t for n, t in prune(model, graph, plan).state_dict().items()
    }
    again = inherit(model, graph, plan, scatter(model, graph, plan, state)).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


# --- rules broken on purpose -------------------------------------------------------------------------------------


def _swapped_cat(p: rules.Propagation, a: rules.Arguments, out: Tensor) -> None:
    rules.parts.cat(p, {**a, "tensors": a["tensors"][::-1]}, out)


def _same_labels(p: rules.Propagation, a: rules.Arguments, out: Tensor) -> None:
    p.set(out, p.of(a["self"]))


def _untied_batch_norm(p: rules.Propagation, a: rules.Arguments, out: tuple[Tensor, ...]) -> None:
    p.set(out[0], p.of(a["input"]))


def _space_first(p: rules.Propagation, a: rules.Arguments, out: Tensor) -> None:
    channels = p.of(a["self"])[1]
    assert channels is not None
    p.set(out, (None, np.tile(channels, 16)))


def _interleaved_halves(p: rules.Propagation, a: rules.Arguments, out: list[Tensor]) -> None:
    channels = p.of(a["self"])[1]
    assert channels is not None
    p.tie_rows(channels.reshape(-1, 2).T.ravel(), 2)
    for i, piece in enumerate(out):
        p.set(piece, (None, channels[i::2], None, None))


def _far_pixels(p: rules.Propagation, a: rules.Arguments, out: Tensor) -> None:
    channels = p.of(a["self"])[1]
    assert channels is not None
    p.tie_rows(channels, 4)
    p.set(out, (None, channels[: len(channels) // 4], None, None))


def around(run: Callable[[Tensor], Tensor], out: int = 8) -> nn.Module:
    return Net(lambda m, x: m.b(run(m.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(out, 4, 1))


MUTATIONS: dict[str, tuple[Callable[[], nn.Module], str, rules.Rule]] = {
    "concat in the other order": (TwoBranches, "cat", _swapped_cat),
    "sum of channels that are not tied": (lambda: CifarResNet("B"), "add", _same_labels),
    "batch norm that is not tied": (lambda: CifarResNet("B"), "native_batch_norm", _untied_batch_norm),
    "halves that are interleaved": (
        lambda: around(lambda x: torch.mul(*x.chunk(2, 1)), 4),
        "split",
        _interleaved_halves,
    ),
    "flatten with space first": (PlainCNN, "view", _space_first),
    "flip that leaves the order": (lambda: around(lambda x: x.flip(1)), "flip", _same_labels),
    "pixel shuffle of far channels": (lambda: around(lambda x: F.pixel_shuffle(x, 2), 2), "pixel_shuffle", _far_pixels),
    "softmax that does not say it normalises": (lambda: around(lambda x: x.softmax(1)), "_softmax", _same_labels),
    "mean over channels that does not say so": (
        lambda: around(lambda x: x * x.mean(1, True)),
        "mean",
        lambda p, a, out: None,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_certificate_catches_a_wrong_rule(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    build, operator, rule = MUTATIONS[name]
    torch.manual_seed(0)
    model = randomise(build())
    graph, certificate = certified(model, IMAGES)
    assert graph.groups and certificate.ok, certificate
    assert operator in rules.RULES or operator == "add"
    monkeypatch.setitem(rules.RULES, operator, rule)
    monkeypatch.setattr(
        sys.modules["secateur.pruning.trace"], "settle", lambda tracer, args, _: assemble(tracer, len(args[0])).graph
    )
    graph, certificate = certified(model, IMAGES)
    assert graph.groups
    assert not certificate.ok
    assert "differs by" in certificate.reason or "raised" in certificate.reason
