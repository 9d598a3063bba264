"""The masked dense network is right where the pruned one is: kernels with conditions, views with an open size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning.cost import cost, count
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import certify, prune
from secateur.pruning.trace import trace
from tests.pruning.models import half, randomise

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


class Fused(nn.Module):
    """Attention by torch's function; sizes of the heads of q and k, and of v, are their own."""

    def __init__(self, options: Callable[[], dict[str, object]], value_dim: int = 8) -> None:
        super().__init__()
        self.options, self.head_dim, self.value_dim = options, 8, value_dim
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 2 * value_dim)
        self.out = nn.Linear(2 * value_dim, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = (layer(x).view(b, n, 2, self.head_dim).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).view(b, n, 2, self.value_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, **self.options())  # type: ignore[arg-type]
        return self.out(y.transpose(1, 2).flatten(2))


KERNELS: dict[str, Callable[[], dict[str, object]]] = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "scaled": lambda: {"scale": 0.3},
    "boolean mask": lambda: {"attn_mask": torch.ones(5, 5).tril() > 0},
    "added mask": lambda: {"attn_mask": torch.linspace(-2, 2, 25).view(5, 5)},
    "mask per head": lambda: {"attn_mask": torch.linspace(-2, 2, 50).view(1, 2, 5, 5)},
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value_dim", [8, 4])
@pytest.mark.parametrize("widths", [(3, 6), (6, 3), (4, 4), (1, 2)])
def test_fused_attention_with_heads_of_unequal_sizes(name: str, value_dim: int, widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Linear(6, 6), Fused(KERNELS[name], value_dim), nn.Linear(6, 2))).eval()
    graph = trace(model, TOKENS)
    sizes = {group.name: group.size for group in graph.groups}
    assert sizes["1.q"] == 8 and sizes["1.v"] == value_dim
    kept = {"1.q": range(widths[0]), "1.v": range(min(value_dim, widths[1]))}
    plan = PruningPlan.full(graph.groups).replace(kept)
    pruned = prune(model, graph, plan)
    certificate = certify(model, pruned, graph, plan, TOKENS)
    assert certificate.ok, certificate
    with torch.no_grad():  # the reference compares something: other weights are told
        pruned[1].v.weight.add_(0.1)
    assert not certify(model, pruned, graph, plan, TOKENS).ok


class OpenHeads(nn.Module):
    """Heads are as many as there is room for: the views infer their number, or the size of a head."""

    def __init__(self, form: str, heads: int = 3, head_dim: int = 8) -> None:
        super().__init__()
        width = heads * head_dim
        self.form, self.head_dim, self.num_heads = form, head_dim, heads
        self.stem, self.qkv, self.out = nn.Linear(6, 12), nn.Linear(12, 3 * width), nn.Linear(width, 6)

    def split(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.form == "heads":
            return x.view(b, n, -1, 8).transpose(1, 2)
        if self.form == "heads of an attribute":
            return x.reshape(b, n, -1, self.head_dim).transpose(1, 2)
        if self.form == "tuple":
            return x.reshape((b, n, -1, 8)).transpose(1, 2)
        return x.view(b, n, 3, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, self.qkv(self.stem(x)).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", ["heads", "heads of an attribute", "tuple", "size"])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (8, 3), (4, 4)])
def test_views_with_an_inferred_size(form: str, heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    model = OpenHeads(form, heads, head_dim)
    if form in ("heads", "tuple") and head_dim != 8:
        pytest.skip("the literal is 8")
    if form == "size" and heads != 3:
        pytest.skip("the literal is 3")
    model = randomise(nn.Sequential(model, nn.Linear(6, 2))).eval()
    graph = trace(model, TOKENS)
    assert "0.qkv" in [group.name for group in graph.groups], graph.report()
    for seed in range(2):
        plan = half(graph, seed)
        pruned = prune(model, graph, plan)
        certificate = certify(model, pruned, graph, plan, TOKENS)
        assert certificate.ok, certificate
        assert cost(graph, plan) == count(pruned, TOKENS)
