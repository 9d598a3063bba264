"""Branches on sizes: guards cost nothing, and a branch that turns at some width is tried there or frozen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import certify, prune
from secateur.pruning.trace import trace
from tests.pruning.models import certified, half, randomise

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Guarded(nn.Module):
    """Checks its input against a size that it keeps."""

    def __init__(self, check: Callable[[Guarded, Tensor], bool]) -> None:
        super().__init__()
        self.channels, self.sizes, self.check = 8, [8, 6], check
        self.conv = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.check(self, x):
            raise ValueError(f"expected {self.channels} channels, got {x.shape[1]}")
        return self.conv(x)


GUARDS: dict[str, Callable[[Guarded, Tensor], bool]] = {
    "shape": lambda m, x: x.shape[1] != m.channels,
    "size": lambda m, x: x.size(1) != m.channels,
    "reversed": lambda m, x: m.channels != x.shape[1],
    "list": lambda m, x: x.shape[1] != m.sizes[0],
    "less": lambda m, x: x.shape[1] < m.channels,
    "unpacked": lambda m, x: [*x.shape][1] != m.channels,
}


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_is_no_reason_to_freeze(name: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Guarded(GUARDS[name]), nn.Conv2d(6, 4, 1)))
    graph, certificate = certified(model, IMAGES)
    assert {g.name: g.size for g in graph.groups} == {"0": 8, "1.conv": 6}, graph.report()
    assert certificate.ok, certificate
    pruned = prune(model, graph, half(graph))
    if name != "list":
        assert pruned[1].channels == 4 and type(pruned[1].channels) is int


class Branching(nn.Module):
    """Takes another way where two sizes are equal, or are not."""

    def __init__(self, form: str, a: int, b: int) -> None:
        super().__init__()
        self.form, self.a, self.b = form, a, b
        self.first, self.second = nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1)
        self.last = nn.Conv2d(b, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.first(x).reshape(n, self.a, h, w)
        z = self.second(y).reshape(n, self.b, h, w)
        turns = {
            "attributes": self.a != self.b,
            "shapes": y.shape[1] != z.shape[1],
            "whole shapes": y.shape != z.shape,
            "order": z.shape[1] > y.shape[1],
            "literal": z.shape[1] != 3,
        }
        return self.last(z.relu() if turns[self.form] else z.tanh())


@pytest.mark.parametrize("form", ["attributes", "shapes", "whole shapes", "order", "literal"])
@pytest.mark.parametrize(("a", "b"), [(6, 8), (8, 8)])
def test_a_branch_that_turns_at_some_width_is_never_wrong(form: str, a: int, b: int) -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(Branching(form, a, b), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))).eval()
    graph = trace(model, IMAGES)
    assert "1" in [group.name for group in graph.groups], graph.report()
    full = PruningPlan.full(graph.groups)
    sizes = {group.name: group.size for group in graph.groups if group.name in ("0.first", "0.second")}
    for first in range(1, sizes.get("0.first", 1) + 1):
        for second in range(1, sizes.get("0.second", 1) + 1):
            kept = {"0.first": range(first), "0.second": range(second)}
            plan = full.replace({name: kept[name] for name in sizes})
            certificate = certify(model, prune(model, graph, plan), graph, plan, IMAGES)
            assert certificate.ok, (first, second, certificate)


def test_a_branch_that_does_not_matter_freezes_nothing() -> None:
    class Same(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = self.second(y)
            return self.last(z.relu() if y.shape[1] != z.shape[1] else z.clamp_min(0))

    model = randomise(nn.Sequential(Same("", 6, 8), nn.Conv2d(4, 2, 1)))
    graph, certificate = certified(model, IMAGES)
    assert {g.name: g.size for g in graph.groups} == {"0.first": 6, "0.second": 8, "0.last": 4}
    assert certificate.ok, certificate
