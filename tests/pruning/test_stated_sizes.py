"""Networks whose code states sizes: of made tensors, of repeats, of slices, twice by one attribute.

Each is traced, pruned by random plans, and compared with the masked network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.pruning.saliency import uniform_plan
from secateur.pruning.surgery import certify, prune
from secateur.pruning.trace import trace
from tests.pruning.models import Net, randomise


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IMAGE, CLIP, CODE = noise(2, 3, 8, 8), noise(2, 3, 3, 8, 8), noise(2, 10)


@dataclass(frozen=True)
class Case:
    """A network and its prunable groups as ``layer=channels``; the rest must be frozen."""

    groups: str
    build: Callable[[], nn.Module]
    example: Tensor = IMAGE


class Halves(nn.Module):
    """A block whose one attribute is the width of both halves (YOLOv8's C2f)."""

    def __init__(self, width: int, cut: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.half, self.cut = width // 2, cut
        self.first, self.middle = nn.Conv2d(width, width, 1), nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.last = nn.Conv2d(3 * self.half, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cut(self, self.first(x))
        return self.last(torch.cat([a, b, self.middle(b).relu()], 1))


def halves(cut: Callable[..., tuple[Tensor, ...]]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Halves(8, cut), Halves(8, cut), nn.ReLU(), nn.Conv2d(8, 2, 1))


HALVES = "0=8 1.first=4 1.middle=4 1.last=8 2.first=4 2.middle=4 2.last=8"


class Squeeze(nn.Module):
    """Two convolutions; a map of one channel; a function that makes it as wide as the second one."""

    def __init__(self, widen: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.width, self.widen = 12, widen
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1)
        self.one, self.head = nn.Conv2d(12, 1, 1), nn.Conv2d(12, 2, 1)
        self.register_buffer("blur", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        return self.head(self.widen(self, x, self.one(x).sigmoid()).relu())


def widened(widen: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Case:
    return Case("a=8 b=12", lambda: Squeeze(widen))


def depthwise(x: Tensor, kernel: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, kernel, padding=1, groups=groups)


class Memory(nn.Module):
    """A recurrent cell of convolutions (ConvLSTM); the state begins as zeros of a width that the module keeps."""

    def __init__(self, inputs: int, hidden: int, start: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.start = hidden, start
        self.gates = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def forward(self, frames: list[Tensor]) -> list[Tensor]:
        h, c = self.start(self, frames[0]), self.start(self, frames[0])
        out = []
        for x in frames:
            i, f, o, g = self.gates(torch.cat([x, h], 1)).split(self.hidden, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return out


def memory(start: Callable[[nn.Module, Tensor], Tensor]) -> Case:
    def run(m: nn.Module, clip: Tensor) -> Tensor:
        return m.head(m.second(m.first([m.enc(x) for x in clip.unbind(1)]))[-1])

    return Case(
        "enc=6 first.gates=8 second.gates=10",
        lambda: Net(
            run,
            enc=nn.Conv2d(3, 6, 1),
            first=Memory(6, 8, start),
            second=Memory(8, 10, start),
            head=nn.Conv2d(10, 2, 1),
        ),
        CLIP,
    )


class Gated(nn.Module):
    """Two maps weighed by single channels of a third (ASFF)."""

    def __init__(self, weigh: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weigh = weigh
        self.a, self.b, self.w = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 2, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x).relu()
        return self.head(self.weigh(a, b, self.w(torch.cat([a, b], 1)).softmax(1)))


class Involution(nn.Module):
    """Kernels made from the input, one per group of channels, on unfolded windows."""

    def __init__(self, channels: int, per_group: int, kernel: int) -> None:
        super().__init__()
        self.channels, self.per_group, self.groups = channels, per_group, channels // per_group
        self.kernel = kernel
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.span = nn.Conv2d(channels // 2, kernel * kernel * self.groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.span(self.reduce(x).relu()).view(b, self.groups, 1, self.kernel**2, h, w)
        windows = F.unfold(x, self.kernel, padding=self.kernel // 2)
        return (weight * windows.view(b, self.groups, c // self.groups, self.kernel**2, h, w)).sum(3).view(b, c, h, w)


class Part(nn.Module):
    """A convolution of some channels, written back among the others (FasterNet)."""

    def __init__(self, width: int, write: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.part, self.write = width // 4, write
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        self.write(self, x)
        return x


def part(groups: str, write: Callable[[nn.Module, Tensor], None]) -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(x + m.c(m.b(m.part(x)).relu()))

    return Case(
        groups,
        lambda: Net(
            run,
            a=nn.Conv2d(3, 16, 1),
            part=Part(16, write),
            b=nn.Conv2d(16, 12, 1),
            c=nn.Conv2d(12, 16, 1),
            head=nn.Conv2d(16, 2, 1),
        ),
    )


def write_first(m: nn.Module, x: Tensor) -> None:
    x[:, : m.part] = m.conv(x[:, : m.part])


def write_middle(m: nn.Module, x: Tensor) -> None:
    x[:, m.part : 2 * m.part, :, :] = m.conv(x[:, m.part : 2 * m.part, :, :])


def write_last(m: nn.Module, x: Tensor) -> None:
    x[:, -m.part :] = m.conv(x[:, -m.part :])


def write_nested(m: nn.Module, x: Tensor) -> None:
    x[:, m.part :][:, : m.part] = m.conv(x[:, m.part :][:, : m.part])


class Shift(nn.Module):
    """Frames exchange a share of their channels (TSM)."""

    def __init__(self, share: int, empty: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.share, self.empty = share, empty

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        clip, k = x.view(n // 2, 2, c, h, w), c // self.share
        out = self.empty(clip)
        out[:, :-1, :k] = clip[:, 1:, :k]
        out[:, 1:, k : 2 * k] = clip[:, :-1, k : 2 * k]
        out[:, :, 2 * k :] = clip[:, :, 2 * k :]
        return out.view(n, c, h, w)


def shift(share: int, empty: Callable[[Tensor], Tensor]) -> Case:
    layers = (lambda: nn.Conv2d(3, 12, 1), lambda: Shift(share, empty), lambda: nn.Conv2d(12, 2, 1))
    return Case(f"0={12 // share}", lambda: nn.Sequential(*(layer() for layer in layers)))


def decoder(unflatten: nn.Module) -> Case:
    layers = (lambda: nn.Linear(10, 8 * 16), lambda: unflatten, lambda: nn.Conv2d(8, 2, 3))
    return Case("0=8", lambda: nn.Sequential(*(layer() for layer in layers)), CODE)


class Queries(nn.Module):
    """Learned queries attend to an image (DETR, poolers): several rows of a parameter or an embedding."""

    def __init__(self, rows: int, *, batch_first: bool, of_embedding: bool) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, 2, 2)
        self.rows = nn.Embedding(rows, 16) if of_embedding else nn.Parameter(noise(rows, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.head, self.batch_first = nn.Linear(16, 4), batch_first

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows if isinstance(self.rows, Tensor) else self.rows.weight
        tokens = self.backbone(x).flatten(2)
        if self.batch_first:
            tokens, query = tokens.transpose(1, 2), rows[None].expand(len(x), -1, -1)
        else:
            tokens, query = tokens.permute(2, 0, 1), rows[:, None].repeat(1, len(x), 1)
        return self.head(query + self.attention(query, tokens, tokens)[0])


QUERIES = {
    f"{rows} learned queries, {'an embedding' if embedding else 'a parameter'}{', batch first' * batch_first}": Case(
        "backbone=8",
        lambda r=rows, e=embedding, b=batch_first: Queries(r, batch_first=b, of_embedding=e),  # type: ignore[misc]
    )
    for rows in (1, 5)
    for embedding in (False, True)
    for batch_first in (False, True)
}


CASES = QUERIES | {
    "one attribute, split by a tuple": Case(HALVES, halves(lambda m, y: y.split((m.half, m.half), 1))),
    "one attribute, split by a list": Case(HALVES, halves(lambda m, y: torch.split(y, [m.half] * 2, dim=1))),
    "one attribute, computed": Case(HALVES, halves(lambda m, y: y.split((m.half, 2 * m.half - m.half), 1))),
    "one attribute, narrow": Case(HALVES, halves(lambda m, y: (y.narrow(1, 0, m.half), y.narrow(1, m.half, m.half)))),
    "Unflatten": decoder(nn.Unflatten(1, (8, 4, 4))),
    "Unflatten of a size": decoder(nn.Unflatten(-1, torch.Size((8, 4, 4)))),
    "gates by slices": Case("a=8", lambda: Gated(lambda a, b, w: w[:, 0:1] * a + w[:, 1:2] * b)),
    "gates by slices from the end": Case("a=8", lambda: Gated(lambda a, b, w: w[:, :-1] * a + w[:, -1:] * b)),
    "gates by chunks": Case("a=8", lambda: Gated(lambda a, b, w: w.chunk(2, 1)[0] * a + w.chunk(2, 1)[1] * b)),
    "gates by a split": Case("a=8", lambda: Gated(lambda a, b, w: w.split(1, 1)[0] * a + w.split([1, 1], 1)[1] * b)),
    "gates by one place": Case("a=8", lambda: Gated(lambda a, b, w: w[:, 0, None] * a + w[:, 1].unsqueeze(1) * b)),
    "expand by sizes read": widened(lambda m, x, s: x * s.expand(x.size(0), x.size(1), *x.shape[2:])),
    "expand by an attribute": widened(lambda m, x, s: x * s.expand(-1, m.width, -1, -1)),
    "broadcast_to": widened(lambda m, x, s: x * torch.broadcast_to(s, x.shape)),
    "repeat": widened(lambda m, x, s: x * s.repeat(1, x.shape[1], 1, 1)),
    "repeat by an attribute": widened(lambda m, x, s: x * s.repeat((1, m.width, 1, 1))),
    "tile": widened(lambda m, x, s: x * s.tile(x.shape[1], 1, 1)),
    "a grid": widened(lambda m, x, s: x + torch.arange(64.0).view(1, 1, 8, 8).expand(x.shape) / 64),
    "ones": widened(lambda m, x, s: x * torch.ones(1, x.shape[1], 1, 1)),
    "full": widened(lambda m, x, s: x * torch.full((m.width, 1, 1), 0.5)),
    "new_zeros": widened(lambda m, x, s: x + x.new_zeros(x.size(0), m.width, 8, 8)),
    "a box kernel": widened(lambda m, x, s: depthwise(x, torch.ones(x.shape[1], 1, 3, 3) / 9, x.shape[1])),
    "eye": widened(lambda m, x, s: F.conv2d(x, torch.eye(x.shape[1])[:, :, None, None])),
    "a repeated kernel": widened(lambda m, x, s: depthwise(x, m.blur.repeat(m.width, 1, 1, 1), m.width)),
    "an expanded kernel": widened(lambda m, x, s: depthwise(x, m.blur.expand(x.size(1), -1, -1, -1), x.size(1))),
    "state of zeros": memory(lambda m, x: torch.zeros(x.shape[0], m.hidden, *x.shape[2:])),
    "state of new zeros": memory(lambda m, x: x.new_zeros((x.size(0), m.hidden, x.size(2), x.size(3)))),
    "state of one row": memory(lambda m, x: torch.zeros(m.hidden).view(-1, 1, 1).expand(len(x), -1, *x.shape[2:])),
    "unfolded windows": Case(
        "0=4 1.reduce=8",
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), Involution(16, 4, 3), nn.Conv2d(16, 2, 1)),
    ),
    "the first channels written": part("a=4 a#2=12 b=12", write_first),
    "channels in the middle written": part("a=4 a#2=8 b=12", write_middle),
    "the last channels written": part("a=12 a#2=4 b=12", write_last),
    "a slice of a slice written": part("a=4 a#2=8 b=12", write_nested),
    "frames shifted": shift(4, torch.zeros_like),
    "distances to a codebook": Case(
        "a=8 k=5 b=6",
        lambda: Net(
            lambda m, x: m.c(m.b(torch.cdist(m.a(x.flatten(2).mT), m.k).sigmoid())),
            a=nn.Linear(3, 8),
            k=nn.Parameter(noise(5, 8)),
            b=nn.Linear(5, 6),
            c=nn.Linear(6, 2),
        ),
    ),
    "distances among tokens": Case(
        "a=8",
        lambda: Net(
            lambda m, x: m.b(
                (-torch.cdist(m.a(x.flatten(2).mT), m.a(x.flatten(2).mT), p=1.0)).softmax(-1) @ x.flatten(2).mT
            ),
            a=nn.Linear(3, 8),
            b=nn.Linear(3, 2),
        ),
    ),
    "bilinear": Case(
        "a=8 b=10 both=12",
        lambda: Net(
            lambda m, x: m.out(m.both(m.a(x), m.b(x)).sigmoid()),
            a=nn.Linear(10, 8),
            b=nn.Linear(10, 10),
            both=nn.Bilinear(8, 10, 12),
            out=nn.Linear(12, 2),
        ),
        CODE,
    ),
    "frames shifted in new zeros": shift(3, lambda x: torch.zeros(x.shape)),
}


@pytest.mark.parametrize("name", CASES)
def test_all_of_it_can_go_by_random_plans(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = randomise(case.build()).eval()
    graph = trace(model, case.example)
    assert {g.name: g.size for g in graph.groups} == {n: int(k) for n, k in (g.split("=") for g in case.groups.split())}
    for seed, ratio in enumerate((0.3, 0.5, 0.7, 1e-9)):
        plan = uniform_plan(graph, ratio, saliency="random", seed=seed)
        pruned = prune(model, graph, plan)
        assert certify(model, pruned, graph, plan, case.example).ok
        with torch.no_grad():
            pruned(case.example)


def test_a_made_tensor_that_meets_channels_and_an_input_freezes_the_channels() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        one = torch.ones(1, 3, 1, 1)
        return m.b(m.a(x * one) * one)

    model = Net(run, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 2, 1))
    assert not trace(model, IMAGE).groups


def test_one_attribute_for_channels_and_for_a_fixed_size_freezes_the_channels() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = 8
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(2, self.n, 64).view(2, -1, self.n, 8))

    model = Both()
    graph = trace(model, IMAGE)
    assert not graph.groups and "size written in the code" in graph.frozen[0].reason


def test_small_groups_that_stay_whole_in_one_trial_lose_something_in_another() -> None:
    """Nine attentions whose heads have three channels each, all of a width that the module keeps."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all_heads = 6
            self.q, self.k, self.v = (nn.Linear(10, 6) for _ in range(3))
            self.out = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = (layer(x).view(b, n, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return x + self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.all_heads))

    tokens = noise(2, 5, 10)
    model = nn.Sequential(*(Heads() for _ in range(9)), nn.Linear(10, 2))
    graph = trace(model, tokens)
    plan = uniform_plan(graph, 0.5, saliency="random")
    assert certify(model, prune(model, graph, plan), graph, plan, tokens).ok


class Bins(nn.Module):
    """A head that predicts distances as distributions over bins, as detectors do; only expected values are returned."""

    def __init__(self, how: str, bins: int = 16) -> None:
        super().__init__()
        self.bins = bins
        self.stem, self.head, self.how = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4 * bins, 1), how
        self.expected = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.expected.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, -1, 1, 1)
        self.register_buffer("project", torch.linspace(0, 0.9, bins))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.stem(x).relu()).flatten(2)
        shares = x.view(x.shape[0], 4, self.bins, -1).softmax(2)
        if self.how == "a convolution":
            return self.expected(shares.transpose(1, 2)).squeeze(1)
        shares = shares.transpose(2, 3)
        if self.how == "a linear layer":
            return nn.functional.linear(shares, self.project[None]).squeeze(-1)
        if self.how == "a product of matrices":
            return shares @ self.project
        return (shares * self.project).sum(-1)


@pytest.mark.parametrize("how", ["a convolution", "a linear layer", "a product of matrices", "a product and a sum"])
def test_bins_of_a_distribution_stay(how: str) -> None:
    model, example = Bins(how).eval(), torch.randn(1, 3, 6, 6)
    graph = trace(model, example)
    assert [group.name for group in graph.groups] == ["stem"]
    assert "bins of a distribution" in graph.report()
    plan = uniform_plan(graph, 0.5, model=model)
    assert certify(model, prune(model, graph, plan), graph, plan, example).ok
