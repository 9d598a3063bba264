"""Sizes written into a model's code: they follow the widths, are tied, or freeze what they touch with the line."""

from __future__ import annotations

import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.pruning import rules
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost, count
from secateur.pruning.lines import is_foreign
from secateur.pruning.plan import ChannelGroup, Member
from secateur.pruning.surgery import certify, load_pruned, prune, save_pruned
from secateur.pruning.trace import trace
from secateur.pruning.tracer import PruningError
from secateur.pruning.trial import Number, Source, trial_plan
from tests.pruning.models import Net, certified, half, randomise

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Self-attention that keeps its sizes as attributes, as most libraries write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class WidthFromInput(Attention):
    """The same, with the head's width computed from the input's."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = (q * (c // self.num_heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(b, n, c))


def transformer(attention: nn.Module) -> nn.Module:
    return randomise(
        Net(
            lambda m, x: m.head((y := m.stem(x)) + m.attention(m.norm(y))),
            stem=nn.Linear(6, 12),
            norm=nn.LayerNorm(12),
            attention=attention,
            head=nn.Linear(12, 2),
        )
    )


def test_an_attribute_follows_the_width() -> None:
    model = transformer(Attention(12, 2))
    graph, certificate = certified(model, TOKENS)
    assert {g.name: g.size for g in graph.groups} == {"stem": 12, "attention.qkv": 6}
    assert certificate.ok, certificate
    pruned = prune(model, graph, half(graph))
    assert (pruned.attention.head_dim, pruned.attention.num_heads) == (3, 2)
    assert model.attention.head_dim == 6 and type(pruned.attention.head_dim) is int
    assert cost(graph, half(graph)) == count(pruned, TOKENS)


def test_a_size_taken_from_an_input_ties_the_two() -> None:
    model = transformer(WidthFromInput(12, 2))
    graph, certificate = certified(model, TOKENS)
    assert {g.name: g.size for g in graph.groups} == {"stem": 6}
    assert graph.slices(half(graph))["attention.qkv.weight"][0].shape == (18,)
    assert certificate.ok, certificate


def test_followed_sizes_survive_saving(tmp_path: Any) -> None:
    model = transformer(Attention(12, 2))
    graph = trace(model, TOKENS)
    plan = half(graph)
    pruned = prune(model, graph, plan).eval()
    save_pruned(tmp_path, pruned, plan)
    fresh = transformer(Attention(12, 2))
    loaded, _ = load_pruned(tmp_path, fresh, trace(fresh, TOKENS))
    assert torch.equal(loaded.eval()(TOKENS), pruned(TOKENS))


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(1, 9)), min_size=1, max_size=40), st.integers(0, 9))
def test_groups_of_equal_size_are_tried_at_different_widths(groups: list[tuple[int, int]], seed: int) -> None:
    members = [tuple(Member("t", 0, np.zeros((size, 1), np.int64), False) for _ in range(n)) for size, n in groups]
    made = [ChannelGroup(f"g{i}", size, own) for i, ((size, _), own) in enumerate(zip(groups, members, strict=True))]
    plans = [trial_plan(SimpleNamespace(groups=made), seed + i) for i in range(2)]  # type: ignore[arg-type]
    for size in {size for size, _ in groups}:
        names = [group.name for group in made if group.size == size]
        possible = size - 1 if size < 5 else size - 2  # from 2 on; up to four channels may stay whole
        possible = 2 if size == 2 else possible
        widths = [tuple(plan.widths[name] for plan in plans) for name in names]
        if len(names) <= possible:
            assert all(len({pair[i] for pair in widths}) == len(names) for i in range(2))
        elif len(names) <= possible**2:
            assert len(set(widths)) == len(names)
        assert all(size == 2 or 2 <= width <= size for pair in widths for width in pair)


@pytest.mark.parametrize("seed", range(3))
def test_a_tie_between_groups_of_equal_size_is_always_seen(seed: int) -> None:
    """The code takes the size of one group for the other's."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        return m.head(torch.cat([a, b.reshape(b.shape[0], a.shape[1], 8, 8)], 1))

    torch.manual_seed(seed)
    model = Net(run, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), head=nn.Conv2d(12, 4, 1))
    graph = trace(randomise(model), IMAGES)
    a, b = (next(g for g in graph.groups if any(m.tensor == f"{n}.weight" for m in g.members)) for n in "ab")
    assert a is b
    for plan_seed in range(4):
        plan = half(graph, plan_seed)
        assert certify(model, prune(model, graph, plan), graph, plan, IMAGES).ok


class Parts(nn.Module):
    """Splits channels at sizes kept in a tuple, a list, or one number."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.sizes, self.listed, self.first = form, (3, 5), [3, 5], 3

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "slice":
            a, b = x[:, : self.first], x[:, self.first :]
        else:
            a, b = x.split(self.sizes if self.form == "tuple" else self.listed, dim=1)
        return torch.cat([b, a.tanh()], 1)


@pytest.mark.parametrize("form", ["tuple", "list", "slice"])
def test_parts_follow_the_width(form: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Parts(form), nn.Conv2d(8, 4, 1)))
    graph, certificate = certified(model, IMAGES)
    assert sum(g.size for g in graph.groups) == 8
    assert certificate.ok, certificate


LITERALS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, 8, 64).view(2, 8, 8, 8),
    "split": lambda x: torch.cat(x.split([3, 5], 1), 1),
    "slice": lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
    "group norm of a function": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "groups of a function": lambda x: F.conv2d(x, torch.ones(8, 1, 1, 1), groups=8),
    "checked by the code": lambda x: x if x.view(2, 8, -1).shape[1] == 8 else None,  # type: ignore[return-value]
}


@pytest.mark.parametrize("name", LITERALS)
def test_a_number_in_the_code_freezes_what_it_touches(name: str) -> None:
    model = Net(
        lambda m, x: m.last(m.run_between(m.first(m.stem(x)))),
        stem=nn.Conv2d(3, 6, 1),
        first=nn.Conv2d(6, 8, 1),
        last=nn.Conv2d(8, 4, 1),
        run_between=LITERALS[name],
    )
    graph, certificate = certified(randomise(model), IMAGES)
    assert [g.name for g in graph.groups] == ["stem"]
    assert certificate.ok, certificate
    if name in ("view", "split", "slice"):
        assert "test_trial.py:" in next(f.reason for f in graph.frozen if f.layer == "first")


def test_a_check_in_the_code_freezes_its_module() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.conv = 8, nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).reshape(2, -1, 8, 8)
            if y.shape[1] != 8:
                raise ValueError(f"expected 8 channels, got {y.shape[1]}")
            return y

    strict = Strict()
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), strict, nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)))
    graph, certificate = certified(model, IMAGES)
    assert "2" in [g.name for g in graph.groups] and certificate.ok, certificate


def test_an_attribute_that_has_to_follow_and_to_stay_freezes_what_it_followed() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 4
            self.free, self.fixed, self.other = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            fixed = self.fixed(x) + torch.ones(8, 1, 1)
            a, b = self.free(x).split([self.width, self.width], 1)
            c, d = fixed.split([self.width, self.width], 1)
            return torch.cat([a * b, c * d, self.other(x)], 1)

    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), Halves(), nn.Conv2d(16, 4, 1)))
    graph, certificate = certified(model, IMAGES)
    assert {g.name: g.size for g in graph.groups} == {"0": 6, "1.other": 8}
    assert certificate.ok, certificate


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "vit_b_16", "maxvit_t", "convnext_tiny"])
def test_transformers_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name, weights=None, num_classes=10))
    x = torch.randn(1, 3, 224, 224)
    graph, certificate = certified(model, x)
    assert certificate.ok, certificate
    assert sum({f.layer: f.macs_share for f in graph.frozen}.values()) < 0.02
    plan = half(graph)
    assert cost(graph, plan) == count(prune(model, graph, plan), x)


def test_nothing_is_kept_of_tensors_that_are_gone() -> None:
    known: rules.TensorMap[Tensor] = rules.TensorMap()
    last = weakref.ref(whole := torch.zeros(3))
    known[view := whole[1:]] = whole
    del whole, view
    for _ in range(2):
        kept = [torch.zeros(1) for _ in range(rules.TensorMap.SLACK)]
        for tensor in kept:
            known[tensor] = tensor
    assert last() is None and known.get(kept[0]) is kept[0]


def test_numbers_know_their_sources() -> None:
    width, heads = (Number.of(n, (Source("a", name, None, n),), n) for name, n in (("width", 12), ("heads", 3)))
    head = 2 * (width // heads)
    assert head == 8 and isinstance(head, Number)
    assert [s.name for s in head.sources] == ["width", "heads"] and not head.exact and width.exact


def two_layers() -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)))


def test_layers_are_frozen_by_name_or_pattern() -> None:
    assert [g.name for g in trace(two_layers(), IMAGES, freeze=["1"]).groups] == ["0"]
    graph = trace(two_layers(), IMAGES, freeze=("[01]",))
    assert graph.groups == ()
    assert {f.layer: f.reason for f in graph.frozen}["0"] == "frozen by name ([01])"
    with pytest.raises(PruningError, match="'head' matches no layer; the network has 0, 1, 2"):
        trace(two_layers(), IMAGES, freeze=("head",))


def test_a_user_adds_a_rule_without_touching_the_table() -> None:
    def cummax(p: rules.Propagation, a: rules.Arguments, out: Any) -> None:
        for result in out:
            p.set(result, p.of(a["self"]))

    model = randomise(Net(lambda m, x: m.b(torch.cummax(m.a(x), 2).values), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1)))
    assert trace(model, IMAGES).groups == ()
    graph = trace(model, IMAGES, rules={"cummax": cummax})
    plan = half(graph)
    assert [g.name for g in graph.groups] == ["a"] and not graph.unknown
    assert certify(model, prune(model, graph, plan), graph, plan, IMAGES).ok
    assert "cummax" not in rules.RULES


def test_a_grouped_convolution_loses_whole_groups_where_that_is_finer() -> None:
    def grouped(groups: int) -> ChannelGraph:
        layers = (nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=groups), nn.Conv2d(32, 4, 1))
        model = randomise(nn.Sequential(*layers))
        graph, certificate = certified(model, IMAGES)
        assert certificate.ok, certificate
        assert cost(graph, half(graph)) == count(prune(model, graph, half(graph)), IMAGES)
        return graph

    many, few = grouped(8), grouped(2)
    assert {g.name: g.size for g in many.groups} == {"0": 8}
    assert {g.name: g.size for g in few.groups} == {"0": 8, "1": 16}
    assert np.array_equal(many.groups[0].members[0].index[1], [2, 3])


def leaving(form: str, y: Tensor) -> Tensor:
    """Values of ``y``, shape ``(batch, channels, h, w)``, go through Python and come back."""
    pooled = y.mean((2, 3))
    if form == "numpy":
        return y * torch.from_numpy(pooled.numpy().copy()).view(2, -1, 1, 1)
    if form == "asarray":
        return y + torch.as_tensor(np.asarray(pooled).max(1)).view(2, 1, 1, 1)
    if form == "tolist":
        return y * max(pooled[0].tolist())
    if form == "item":
        return y / y.abs().max().item()
    if form == "float":
        return y * float(pooled.square().sum())
    if form == "int":
        return y[:, :, : 4 + int(pooled.argmax()) % 2]
    if form == "sum over channels":
        return y * float(np.asarray(y.sum(1)).std())
    return y


@pytest.mark.parametrize("form", ["numpy", "asarray", "tolist", "item", "float", "int", "sum over channels"])
def test_values_that_leave_torch_freeze_what_they_came_from(form: str) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.last(leaving(form, m.first(m.stem(x)))),
        stem=nn.Conv2d(3, 6, 1),
        first=nn.Conv2d(6, 8, 1),
        last=nn.Conv2d(8, 4, 1),
    )
    graph, certificate = certified(randomise(model), IMAGES)
    assert [g.name for g in graph.groups] == ["stem"]
    assert certificate.ok, certificate
    reason = next(f.reason for f in graph.frozen if f.layer == "first")
    assert reason.startswith("its values leave torch: test_trial.py:") or form in ("numpy", "int"), reason


def test_values_of_constants_may_leave_torch() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        sizes = torch.tensor([[8, 8], [4, 4]]).tolist()
        return m.last(m.first(x) * float(m.scale) * sizes[0][0] * (x.mean().item() + 1))

    model = Net(run, first=nn.Conv2d(3, 8, 1), last=nn.Conv2d(8, 4, 1), scale=torch.tensor(0.5))
    graph, certificate = certified(randomise(model), IMAGES)
    assert [g.name for g in graph.groups] == ["first"]
    assert certificate.ok, certificate


@pytest.mark.parametrize("library", ["einops", "opt_einsum"])
def test_freezes_inside_a_library_between_name_the_line_that_calls_it(library: str, tmp_path: Path) -> None:
    file = tmp_path / "site-packages" / library / "ops.py"
    file.parent.mkdir(parents=True)
    file.write_text("def regroup(x):\n    return x.view(2, 8, 64).view(2, 8, 8, 8)\n")
    found = runpy.run_path(str(file))
    model = Net(
        lambda m, x: m.last(found["regroup"](m.first(x))),
        first=nn.Conv2d(3, 8, 1),
        last=nn.Conv2d(8, 4, 1),
    )
    graph = trace(randomise(model), IMAGES)
    reason = next(f.reason for f in graph.frozen if f.layer == "first")
    assert "test_trial.py:" in reason and "regroup" in reason
    assert is_foreign(str(file)) and not is_foreign(str(tmp_path / "model.py"))
