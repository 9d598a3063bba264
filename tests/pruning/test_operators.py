"""One network per family of operators: what is prunable in it, and that the cut is right.

Each case says which channel groups a user should expect, with their sizes; everything else must be frozen. The
network is traced, pruned to half and to one channel per group, certified, and its cost is compared with counting.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from secateur.pruning.cost import cost, count
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.surgery import certify, prune
from secateur.pruning.trace import trace
from tests.pruning.models import CifarResNet, Net, randomise


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IMAGE, SEQUENCE, VOLUME, TOKENS = noise(2, 3, 8, 8), noise(2, 3, 16), noise(2, 3, 4, 4, 4), noise(2, 5, 6)
IDS = torch.arange(10).view(2, 5)
BOXES = torch.tensor([[0.0, 0, 5, 5], [2, 1, 7, 6]])


@dataclass(frozen=True)
class Case:
    """One network and what to expect of it.

    Args:
        groups: the prunable groups as ``layer=channels``; everything else must be frozen.
        build: makes the network.
        inputs: of its forward.
        kwargs: of its forward.
        tolerance: of the certificate.
    """

    groups: str
    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...] = (IMAGE,)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4


def between(
    groups: str, run: Callable[[Tensor], Tensor], *, width: int = 8, out: int | None = None, **options: Any
) -> Case:
    """conv ``a`` (3 -> width), a function, conv ``b`` (out -> 4)."""

    def build() -> nn.Module:
        return Net(
            lambda m, x: m.b(m.run_between(m.a(x))),
            a=nn.Conv2d(3, width, 1),
            b=nn.Conv2d(width if out is None else out, 4, 1),
            run_between=run,
        )

    return Case(groups, build, **options)


def chain(groups: str, *layers: Callable[[], nn.Module], inputs: Tensor = IMAGE, **options: Any) -> Case:
    """Layers one after the other; their names are their numbers."""
    return Case(groups, lambda: nn.Sequential(*(layer() for layer in layers)), (inputs,), **options)


def convs(dims: int, first: type[nn.Module], norm: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    """A convolution of 1, 2 or 3 dimensions with its norm, and two readers."""
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return lambda: nn.Sequential(
        plain(3, 8, 1),
        norm(8),
        nn.ReLU(),
        first(8, 8, 3, padding=1, **options),
        norm(8),
        plain(8, 6, 1),
        plain(6, 4, 1),
    )


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(noise(*shape))


# --- convolution -------------------------------------------------------------------------------------------------

CONVOLUTION = {
    f"{kind} {dims}d": Case(groups, convs(dims, layers[dims - 1], norms[dims - 1], **options), (inputs,))
    for norms in [(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    for kind, groups, layers, options in (
        ("conv", "0=8 3=8 5=6", (nn.Conv1d, nn.Conv2d, nn.Conv3d), {}),
        ("grouped conv", "0=4 3=4 5=6", (nn.Conv1d, nn.Conv2d, nn.Conv3d), {"groups": 2}),
        ("depthwise conv", "0=8 5=6", (nn.Conv1d, nn.Conv2d, nn.Conv3d), {"groups": 8}),
        ("transposed conv", "0=8 3=8 5=6", (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), {}),
        (
            "grouped transposed",
            "0=4 3=4 5=6",
            (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
            {"groups": 2},
        ),
        (
            "depthwise transposed",
            "0=8 5=6",
            (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
            {"groups": 8},
        ),
    )
    for dims, inputs in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME))
} | {
    "depthwise multiplier": chain(
        "0=4", lambda: nn.Conv2d(3, 4, 1), lambda: nn.Conv2d(4, 12, 3, groups=4), lambda: nn.Conv2d(12, 2, 1)
    ),
    "depthwise transposed multiplier": chain(
        "0=4", lambda: nn.Conv2d(3, 4, 1), lambda: nn.ConvTranspose2d(4, 12, 3, groups=4), lambda: nn.Conv2d(12, 2, 1)
    ),
    "one output per group": chain(
        "0=4", lambda: nn.Conv2d(3, 8, 1), lambda: nn.Conv2d(8, 2, 1, groups=2), lambda: nn.Conv2d(2, 2, 1)
    ),
    "one output per group, transposed": chain(
        "0=4", lambda: nn.Conv2d(3, 8, 1), lambda: nn.ConvTranspose2d(8, 2, 1, groups=2), lambda: nn.Conv2d(2, 2, 1)
    ),
    "grouped convs in a row": chain(
        "0=4 1=4 2=2",
        lambda: nn.Conv2d(3, 8, 1),
        lambda: nn.Conv2d(8, 16, 1, groups=2),
        lambda: nn.Conv2d(16, 8, 1, groups=4),
        lambda: nn.Conv2d(8, 2, 1),
    ),
    "padding modes": chain(
        "0=8 1=8 2=8",
        lambda: nn.Conv2d(3, 8, 3, padding="same"),
        lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, stride=2),
        lambda: nn.Conv2d(8, 4, 3),
    ),
    "circular padding": chain(
        "0=8",
        lambda: nn.Conv2d(3, 8, 1),
        lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    ),
    "deformable conv": Case(
        "a=8 b=6",
        lambda: Net(
            lambda m, x: m.c(m.b(y := m.a(x), m.offset(y))),
            a=nn.Conv2d(3, 8, 1),
            offset=nn.Conv2d(8, 18, 3, padding=1),
            b=torchvision.ops.DeformConv2d(8, 6, 3, padding=1),
            c=nn.Conv2d(6, 2, 1),
        ),
    ),
    "unfold": between("a=8", lambda x: F.fold(F.unfold(x, 2), (8, 8), 2)),
}

# --- linear, matrix products, attention --------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v


def heads(x: Tensor) -> Tensor:
    """(batch, length, 2 d) -> (batch, 2, length, d)."""
    return x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def qkv(run: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    """Separate projections of tokens, an attention, an output projection."""
    return lambda: Net(run, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 12), out=nn.Linear(12, 2))


def channel_attention(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return (torch.bmm(flat, flat.transpose(1, 2)).softmax(-1) @ flat).view(x.shape)


def non_local(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    weights = torch.bmm(m.f(x).flatten(2).transpose(1, 2), m.g(x).flatten(2)).softmax(-1)
    y = torch.bmm(m.h(x).flatten(2), weights.transpose(1, 2))
    return m.head(x + m.out(y.view(y.shape[0], y.shape[1], *x.shape[2:])))


def conv1x1s(**widths: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Conv2d(n, k, 1) for name, (n, k) in widths.items()}


def linears(**widths: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(n, k) for name, (n, k) in widths.items()}


MATRICES = {
    "linear": chain(
        "0=8 2=6",
        lambda: nn.Linear(6, 8),
        nn.GELU,
        lambda: nn.Linear(8, 6, False),
        lambda: nn.Linear(6, 2),
        inputs=TOKENS,
    ),
    "linear of vectors": chain("0=8", lambda: nn.Linear(6, 8), lambda: nn.Linear(8, 2), inputs=TOKENS[0, 0]),
    "matmul with a parameter": Case(
        "a=8 w=5",
        lambda: Net(lambda m, x: m.b(m.a(x) @ m.w), a=nn.Linear(6, 8), w=parameter(8, 5), b=nn.Linear(5, 2)),
        (TOKENS,),
    ),
    "baddbmm": Case(
        "q=8 v=12",
        qkv(
            lambda m, x: m.out(
                torch.baddbmm(x.new_ones(1), m.q(x), m.k(x).transpose(1, 2), beta=2).softmax(-1) @ m.v(x)
            )
        ),
        (TOKENS,),
    ),
    "attention": Case("q=8 v=12", qkv(lambda m, x: m.out(attend(m.q(x), m.k(x), m.v(x)))), (TOKENS,)),
    "attention with heads": Case(
        "q=4 v=6", qkv(lambda m, x: m.out(join(attend(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))))), (TOKENS,)
    ),
    "scaled_dot_product_attention": Case(
        "q=4 v=6",
        qkv(lambda m, x: m.out(join(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))))),
        (TOKENS,),
    ),
    "causal attention, scale written in the code": Case(
        "q=4 v=6",
        qkv(
            lambda m, x: m.out(
                join(
                    F.scaled_dot_product_attention(
                        heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), is_causal=True, scale=0.5
                    )
                )
            )
        ),
        (TOKENS,),
    ),
    "scaled_dot_product_attention, equal widths": Case(
        "q=4 v=4",
        lambda: Net(
            lambda m, x: m.out(join(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x))))),
            **linears(q=(6, 8), k=(6, 8), v=(6, 8), out=(8, 2)),
        ),
        (TOKENS,),
    ),
    "scaled_dot_product_attention, scale given": Case(
        "q=4 v=4",
        lambda: Net(
            lambda m, x: m.out(
                join(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), scale=0.5))
            ),
            **linears(q=(6, 8), k=(6, 8), v=(6, 8), out=(8, 2)),
        ),
        (TOKENS,),
    ),
    "attention mask": Case(
        "q=4 v=6",
        qkv(
            lambda m, x: m.out(
                join(
                    F.scaled_dot_product_attention(
                        heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), torch.ones(5, 5, dtype=torch.bool).tril()
                    )
                )
            )
        ),
        (TOKENS,),
    ),
    "packed qkv": Case(
        "qkv=4",
        lambda: Net(
            lambda m, x: m.out(join(attend(*m.qkv(x).view(2, 5, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)))),
            qkv=nn.Linear(6, 24),
            out=nn.Linear(8, 2),
        ),
        (TOKENS,),
    ),
    "chunked qkv": Case(
        "qkv=4",
        lambda: Net(
            lambda m, x: m.out(join(attend(*map(heads, m.qkv(x).chunk(3, -1))))),
            qkv=nn.Linear(6, 24),
            out=nn.Linear(8, 2),
        ),
        (TOKENS,),
    ),
    "non-local block": Case(
        "stem=8 f=4 h=6",
        lambda: Net(non_local, **conv1x1s(stem=(3, 8), f=(8, 4), g=(8, 4), h=(8, 6), out=(6, 8), head=(8, 2))),
    ),
    "attention between channels": between("a=8", channel_attention),
    "mlp mixer": Case(
        "up=10 tokens.0=9",
        lambda: Net(
            lambda m, x: m.head((x + m.tokens(x.transpose(1, 2)).transpose(1, 2)) + m.down(m.up(x).relu())),
            tokens=nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 5)),
            up=nn.Linear(6, 10),
            down=nn.Linear(10, 6),
            head=nn.Linear(6, 2),
        ),
        (TOKENS,),
    ),
    "MultiheadAttention": Case(
        "attention.out_proj=6 up=9",
        lambda: Net(
            lambda m, x: m.down(m.up(m.attention(x, x, x)[0])),
            attention=nn.MultiheadAttention(6, 2, batch_first=True),
            up=nn.Linear(6, 9),
            down=nn.Linear(9, 2),
        ),
        (TOKENS,),
    ),
    "TransformerEncoderLayer": chain(
        "0.linear1=10 1=7",
        lambda: nn.TransformerEncoderLayer(6, 2, 10, batch_first=True),
        lambda: nn.Linear(6, 7),
        lambda: nn.Linear(7, 2),
        inputs=TOKENS,
    ),
    "Transformer": Case(
        "encoder.layers.0.linear1=10 decoder.layers.0.linear1=10",
        lambda: nn.Transformer(6, 2, 1, 1, 10, batch_first=True),
        (TOKENS, TOKENS[:, :3]),
    ),
}

# --- norms -------------------------------------------------------------------------------------------------------


class L2Norm(nn.Module):
    """SSD's normalisation over channels with a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_weight = parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_weight.view(1, -1, 1, 1) * F.normalize(x)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def rms(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * m.scale)


def normed(groups: str, norm: Callable[[], nn.Module], **options: Any) -> Case:
    return chain(groups, lambda: nn.Conv2d(3, 8, 1), norm, nn.ReLU, lambda: nn.Conv2d(8, 4, 1), **options)


def token_norm(groups: str, norm: Callable[[], nn.Module], **options: Any) -> Case:
    return chain(groups, lambda: nn.Linear(6, 8), norm, lambda: nn.Linear(8, 4), inputs=TOKENS, **options)


NORMS = {
    "batch norm, not affine": normed("0=8", lambda: nn.BatchNorm2d(8, affine=False)),
    "batch norm, no running statistics": normed("0=8", lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    "batch norm, momentum None": normed("0=8", lambda: nn.BatchNorm2d(8, momentum=None)),
    "batch norm of vectors": chain(
        "0=8", lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), lambda: nn.Linear(8, 4), inputs=TOKENS[0]
    ),
    "sync batch norm": normed("0=8", lambda: nn.SyncBatchNorm(8)),
    "frozen batch norm": normed("0=8", lambda: torchvision.ops.FrozenBatchNorm2d(8)),
    "group norm": normed("0=4", lambda: nn.GroupNorm(2, 8)),
    "group norm, one group": normed("0=8", lambda: nn.GroupNorm(1, 8)),
    "group norm, channel by channel": normed("0=8", lambda: nn.GroupNorm(8, 8)),
    "group norm, not affine": normed("0=4", lambda: nn.GroupNorm(2, 8, affine=False)),
    "group norm, channel by channel, not affine": normed("", lambda: nn.GroupNorm(8, 8, affine=False)),
    "instance norm": normed("0=8", lambda: nn.InstanceNorm2d(8)),
    "instance norm, affine": normed("0=8", lambda: nn.InstanceNorm2d(8, affine=True)),
    "instance norm, running statistics": normed("0=8", lambda: nn.InstanceNorm2d(8, track_running_stats=True)),
    "instance norm 1d": chain(
        "0=8",
        lambda: nn.Conv1d(3, 8, 1),
        lambda: nn.InstanceNorm1d(8, affine=True),
        lambda: nn.Conv1d(8, 4, 1),
        inputs=SEQUENCE,
    ),
    "layer norm": token_norm("0=8", lambda: nn.LayerNorm(8)),
    "layer norm, no bias": token_norm("0=8", lambda: nn.LayerNorm(8, bias=False)),
    "layer norm, not affine": token_norm("", lambda: nn.LayerNorm(8, elementwise_affine=False)),
    "layer norm of channels": normed("0=8", lambda: LayerNorm2d(8)),
    "RMSNorm": token_norm("0=8", lambda: nn.RMSNorm(8)),
    "RMSNorm by hand": Case(
        "a=8", lambda: Net(rms, a=nn.Linear(6, 8), b=nn.Linear(8, 4), scale=parameter(8)), (TOKENS,)
    ),
    "L2Norm": normed("0=8", lambda: L2Norm(8)),
    "L2Norm of a map that another convolution reads too": Case(
        "a=8",
        lambda: Net(
            lambda m, x: (m.b(F.normalize(y := F.relu(m.a(x))) * m.scale.view(1, -1, 1, 1)), m.c(y)),
            **conv1x1s(a=(3, 8), b=(8, 4), c=(8, 5)),
            scale=parameter(8),
        ),
    ),
    "norm over channels that are not zero when they are masked": between("a=8", lambda x: F.normalize(x.sigmoid())),
    "local response norm": normed("", lambda: nn.LocalResponseNorm(3)),
    "softmax over channels": normed("0=8", lambda: nn.Softmax(1)),
    "standardised": between("a=8", lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-5)),
}

# --- activations and elementwise ---------------------------------------------------------------------------------

ELEMENTWISE = {
    "PReLU": normed("0=8", lambda: nn.PReLU(8)),
    "PReLU of one slope": normed("0=8", nn.PReLU),
    "activations": normed(
        "0=8", lambda: nn.Sequential(nn.SELU(), nn.CELU(), nn.Softsign(), nn.Tanhshrink(), nn.Threshold(0, 1))
    ),
    "in place": between("a=8", lambda x: x.relu_().mul_(2).add_(1).clamp_(0, 6).sigmoid_().sub_(x.mean((2, 3), True))),
    "dropouts": normed(
        "0=8", lambda: nn.Sequential(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout())
    ),
    "stochastic depth": normed("0=8", lambda: torchvision.ops.StochasticDepth(0.5, "row")),
    "addcmul, lerp, where": between(
        "a=8",
        lambda x: torch.where(x > 0, torch.addcmul(x, x, x), torch.lerp(x, x.relu(), 0.3)).masked_fill(x > 1, 0.5),
    ),
    "maximum, minimum, clamp": between("a=8", lambda x: torch.maximum(x, -x).minimum(x.square()).clamp(max=x.exp())),
    "maxout": between("a=4", lambda x: torch.max(*x.chunk(2, 1)), out=4),
    "maxout over a view": between("a=4", lambda x: x.view(2, 2, -1, 8, 8).amax(1), out=4),
    "glu": between("a=4", lambda x: F.glu(x, 1), out=4),
    "cumsum over space": between("a=8", lambda x: x.cumsum(2)),
    "fft over space": between("a=8", lambda x: torch.fft.irfft2(torch.fft.rfft2(x))),
    "sort over space": between("a=8", lambda x: x.flatten(2).sort(-1).values.view(x.shape)),
    "topk over space": between("a=8", lambda x: x.flatten(2).topk(3).values[..., None]),
    "topk over channels": between("", lambda x: x.topk(8, 1).values),
    "median over space": between("a=8", lambda x: x.flatten(2).median(-1).values[..., None, None]),
    "arg max over channels": Case(
        "b=6",
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x)) * m.a(x).argmax(1, True)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 6, 1),
            c=nn.Conv2d(6, 2, 1),
        ),
    ),
    "mean over channels": between("a=8", lambda x: x * x.mean(1, keepdim=True).sigmoid()),
    "CBAM": Case(
        "a=8",
        lambda: Net(
            lambda m, x: m.b((y := m.a(x)) * m.gate(torch.cat([y.amax(1, True), y.mean(1, True)], 1)).sigmoid()),
            **conv1x1s(a=(3, 8), b=(8, 4)),
            gate=nn.Conv2d(2, 1, 3, padding=1),
        ),
    ),
    "squeeze and excitation": normed("0=8 1.fc1=3", lambda: torchvision.ops.SqueezeExcitation(8, 3)),
    "squeeze and excitation, linear": Case(
        "a=8 fc.0=3",
        lambda: Net(
            lambda m, x: m.b((y := m.a(x)) * m.fc(y.mean((2, 3)))[:, :, None, None]),
            **conv1x1s(a=(3, 8), b=(8, 4)),
            fc=nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8), nn.Sigmoid()),
        ),
    ),
    "efficient channel attention": Case(
        "",
        lambda: Net(
            lambda m, x: m.b((y := m.a(x)) * m.eca(y.mean((2, 3))[:, None]).sigmoid().view(2, -1, 1, 1)),
            **conv1x1s(a=(3, 8), b=(8, 4)),
            eca=nn.Conv1d(1, 1, 3, padding=1),
        ),
    ),
}

# --- joining, cutting, moving ------------------------------------------------------------------------------------


def channel_shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def space_to_depth(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def windows(x: Tensor) -> Tensor:
    """Into windows of 4 x 4 tokens and back."""
    n, c, h, w = x.shape
    y = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c).softmax(1)
    return y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


SHAPES = {
    "concat": Case(
        "a=8 b=6 c=5",
        lambda: Net(
            lambda m, x: m.d(torch.cat([y := m.a(x), m.b(y), m.c(x), x], 1)),
            **conv1x1s(a=(3, 8), b=(8, 6), c=(3, 5), d=(22, 4)),
        ),
    ),
    "concat over space": Case(
        "a=8",
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 3)), **conv1x1s(a=(3, 8), b=(3, 8), c=(8, 4))),
    ),
    "dense block": Case(
        "a=8 b=4 c=4",
        lambda: Net(
            lambda m, x: m.d(torch.cat([y := torch.cat([z := m.a(x), m.b(z)], 1), m.c(y)], 1)),
            **conv1x1s(a=(3, 8), b=(8, 4), c=(12, 4), d=(16, 2)),
        ),
    ),
    "concat and add": Case(
        "a=3 a#2=5",
        lambda: Net(
            lambda m, x: m.d(m.a(x) + torch.cat([m.b(x), m.c(x)], 1)),
            **conv1x1s(a=(3, 8), b=(3, 3), c=(3, 5), d=(8, 2)),
        ),
    ),
    "split at numbers": between("", lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1)),
    "unequal chunks": between("", lambda x: torch.cat(x.chunk(3, 1)[::-1], 1)),
    "chunk": between("a=4", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "chunk in four": between("a=2", lambda x: sum(x.chunk(4, 1)), out=2),
    "chunk of a dim counted from the end": between("a=4", lambda x: torch.mul(*x.chunk(2, -3)), out=4),
    "split over space": between("a=8", lambda x: torch.cat(x.split(3, 2)[::-1], 2)),
    "stack": between("a=8", lambda x: torch.stack([x, x.relu(), -x], 1).amax(1)),
    "stack at the end": between("a=8", lambda x: torch.stack([x, x.relu()], -1).flatten(1).view(2, -1, 8, 16)),
    "unbind": between("a=4", lambda x: torch.mul(*x.unflatten(1, (2, -1)).unbind(1)), out=4),
    "unbind channels": between("", lambda x: torch.stack(x.unbind(1), 1)),
    "unbind space": between("a=8", lambda x: torch.stack(x.unbind(2), 2)),
    "select, narrow": between("a=8", lambda x: x.narrow(2, 1, 4).select(3, 2).unsqueeze(-1)),
    "pixel shuffle": between("a=2", lambda x: F.pixel_shuffle(x, 2), out=2),
    "pixel unshuffle": between("a=8", lambda x: F.pixel_unshuffle(x, 2), out=32),
    "space to depth": between("a=8", space_to_depth, out=32),
    "focus": between("a=8", focus, out=32),
    "channel shuffle": between("a=4", channel_shuffle),
    "channel shuffle, operator": between("a=4", lambda x: F.channel_shuffle(x, 2)),
    "flatten": chain(
        "0=8 2=6", lambda: nn.Conv2d(3, 8, 1), nn.Flatten, lambda: nn.Linear(512, 6), lambda: nn.Linear(6, 2)
    ),
    "flatten, channels last": chain(
        "0=8",
        lambda: nn.Conv2d(3, 8, 1),
        lambda: Net(lambda m, x: x.permute(0, 2, 3, 1).flatten(1)),
        lambda: nn.Linear(512, 6),
    ),
    "unflatten": chain(
        "0=8 3=5",
        lambda: nn.Linear(6, 32),
        lambda: Net(lambda m, x: x.unflatten(1, (-1, 2, 2))),
        lambda: nn.ReLU(),
        lambda: nn.ConvTranspose2d(8, 5, 2),
        lambda: nn.Conv2d(5, 3, 1),
        inputs=TOKENS[0],
    ),
    "unflatten to sizes that the module keeps": chain(
        "0=8",
        lambda: nn.Linear(6, 32),
        lambda: nn.Unflatten(1, (8, 2, 2)),
        lambda: nn.Conv2d(8, 3, 1),
        inputs=TOKENS[0],
    ),
    "heads of a size written in the code": Case(
        "",
        lambda: Net(
            lambda m, x: m.b(m.a(x).view(2, 5, 2, 4).transpose(1, 2).softmax(2).transpose(1, 2).reshape(2, 5, 8)),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 2),
        ),
        (TOKENS,),
    ),
    "views from the width": between("a=8", lambda x: x.reshape(x.shape[0], x.shape[1], -1).reshape(x.shape)),
    "windows": between("a=8", windows),
    "pad": between("a=8", lambda x: F.pad(F.pad(F.pad(x, (1, 2)), (1, 1, 1, 0), "replicate"), (-1, 0), value=3.0)),
    "pad channels": between("a=8", lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)) * 1, out=10),
    "option A": Case(
        "conv1=8 layer1.conv1=8 layer2.conv1=16 layer3.conv1=32", lambda: CifarResNet("A"), (noise(2, 3, 16, 16),)
    ),
    "movedim, swapaxes, mT": between(
        "a=8", lambda x: x.movedim(1, -1).swapaxes(1, 2).movedim(-1, 1).mT.mT.swapdims(2, 3)
    ),
    "squeeze and unsqueeze": between("a=8", lambda x: x.mean((2, 3), True).squeeze(2, 3)[..., None, None]),
    "expand, repeat, tile": between(
        "a=8", lambda x: x.mean((2, 3), True).expand(-1, -1, 4, 4).repeat(1, 1, 2, 1).tile(2)
    ),
    "repeat channels": between("a=8", lambda x: x.repeat(1, 2, 1, 1), out=16),
    "repeat_interleave": between("a=8", lambda x: x.repeat_interleave(2, 1), out=16),
    "roll and flip": between("a=8", lambda x: x.roll((1, 2), (2, 3)).flip(1, 3)),
    "rot90": between("a=8", lambda x: x.rot90(1, (2, 3))),
    "meshgrid constants": between("a=8", lambda x: x * torch.linspace(0, 1, 8) + torch.arange(8.0)[:, None]),
    "coordinates": between("a=8", lambda x: torch.cat([x, torch.linspace(0, 1, 8).expand(2, 1, 8, 8)], 1), out=9),
    "ellipsis and None": between("a=8", lambda x: x[..., None, 1:].squeeze(-2)[None, ..., ::2][0][:, :, [0, 2, 4]]),
    "reversed by index": between("a=8", lambda x: x[:, :, torch.arange(7, -1, -1)][..., [-1, 0]]),
    "indexed channels": between("", lambda x: x[:, [0, 2, 5]], out=3),
    "masked tokens": Case(
        "a=8", lambda: Net(lambda m, x: m.b(m.a(x)[x[..., 0] > 0]), a=nn.Linear(6, 8), b=nn.Linear(8, 2)), (TOKENS,)
    ),
    "index_select over space": between(
        "a=8",
        lambda x: x.index_select(2, torch.tensor([1, 3])),
    ),
    "first token": Case(
        "a=8", lambda: Net(lambda m, x: m.b(m.a(x)[:, 0]), a=nn.Linear(6, 8), b=nn.Linear(8, 2)), (TOKENS,)
    ),
    "einsum over channels": Case(
        "a=8 w=6",
        lambda: Net(
            lambda m, x: m.b(torch.einsum("nchw,oc->nohw", m.a(x), m.w)),
            **conv1x1s(a=(3, 8), b=(6, 4)),
            w=parameter(6, 8),
        ),
    ),
    "einsum over space": between("a=8", lambda x: torch.einsum("nchw,nhwk->nck", x, x.new_ones(2, 8, 8, 5))[..., None]),
    "einsum with heads": Case(
        "q=4 v=6",
        qkv(
            lambda m, x: m.out(
                join(
                    torch.einsum(
                        "bhqk,bhkd->bhqd",
                        torch.einsum("bhqd,bhkd->bhqk", heads(m.q(x)), heads(m.k(x))).softmax(-1),
                        heads(m.v(x)),
                    )
                )
            )
        ),
        (TOKENS,),
    ),
    "tensordot": Case(
        "a=8 w=6",
        lambda: Net(
            lambda m, x: m.b(torch.tensordot(m.a(x), m.w, ([2], [0]))),
            a=nn.Linear(6, 8),
            w=parameter(8, 6),
            b=nn.Linear(6, 2),
        ),
        (TOKENS,),
    ),
}

# --- pooling, resizing, regions ----------------------------------------------------------------------------------


def pooled(dims: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        pools = [getattr(F, f"{kind}_pool{dims}d") for kind in ("max", "avg")]
        adaptive = [getattr(F, f"adaptive_{kind}_pool{dims}d") for kind in ("max", "avg")]
        for pool in pools:
            x = pool(x, 2, 1)
        return sum(pool(x, size) for pool in adaptive for size in (1, 2))

    return run


def unpool(x: Tensor) -> Tensor:
    y, where = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, where, 2)


def through(run: Callable[[Tensor], Tensor], dims: int) -> Case:
    """The function between two convolutions of one, two or three dimensions."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return Case(
        "a=8",
        lambda: Net(lambda m, x: m.b(run(m.a(x))), a=conv(3, 8, 1), b=conv(8, 4, 1)),
        ({1: SEQUENCE, 2: IMAGE, 3: VOLUME}[dims],),
    )


REGIONS = {
    **{f"pooling {dims}d": through(pooled(dims), dims) for dims in (1, 2, 3)},
    "lp pooling": between("a=8", lambda x: F.lp_pool2d(x.relu(), 2, 2)),
    "max pooling with indices": between("a=8", lambda x: F.max_pool2d_with_indices(x, 2)[0]),
    "max unpooling": between("a=8", unpool),
    "global pooling": between(
        "a=8", lambda x: x.mean((-2, -1), True) + x.amax((2, 3), True) + x.flatten(2).max(2)[0][..., None, None]
    ),
    "interpolate 1d": through(lambda x: F.interpolate(F.interpolate(x, 5), scale_factor=2.0, mode="linear"), 1),
    "interpolate 3d": through(lambda x: F.interpolate(F.interpolate(x, 5), scale_factor=2.0, mode="trilinear"), 3),
    **{
        f"interpolate, {mode}": between("a=8", lambda x, mode=mode: F.interpolate(x, (5, 7), mode=mode))
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    },
    "interpolate, antialias": between("a=8", lambda x: F.interpolate(x, (5, 7), mode="bilinear", antialias=True)),
    "upsample layer": normed("0=8", lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
    "grid_sample": between(
        "a=8",
        lambda x: F.grid_sample(x, x.new_zeros(2, 4, 4, 2), align_corners=False),
    ),
    "roi_align": between("a=8", lambda x: torchvision.ops.roi_align(x, [BOXES, BOXES], 3)),
    "roi_pool": between("a=8", lambda x: torchvision.ops.RoIPool(3, 1.0)(x, [BOXES, BOXES[:1]])),
    "ps_roi_align": between("", lambda x: torchvision.ops.ps_roi_align(x, [BOXES, BOXES], 2), out=2),
    "feature pyramid": Case(
        "a=8 b=6 fpn.inner_blocks.1.0=5 fpn.layer_blocks.1.0=5",
        lambda: Net(
            lambda m, x: m.head(
                torchvision.ops.MultiScaleRoIAlign(["p", "q"], 2, 0)(
                    m.fpn(OrderedDict(p=(y := m.a(x)), q=m.b(F.max_pool2d(y, 2)))), [BOXES, BOXES], [(8, 8)] * 2
                )
            ),
            **conv1x1s(a=(3, 8), b=(8, 6), head=(5, 2)),
            fpn=torchvision.ops.FeaturePyramidNetwork([8, 6], 5),
        ),
    ),
    "boxes that survive": Case(
        "a=8",
        lambda: Net(
            lambda m, x: (b := m.b(m.a(x)).flatten(2).mT[0])[torchvision.ops.nms(b[:, :4].abs(), b[:, 4], 1.0)],
            **conv1x1s(a=(3, 8), b=(8, 5)),
        ),
    ),
}

# --- writes into tensors -----------------------------------------------------------------------------------------


def write_slices(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(2, 8, 8, 8)
    out[:, :4] = m.a(x)
    out[:, 4:] = m.b(x)
    return m.c(out)


def write_space(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    out = torch.zeros_like(y)
    out[:, :, ::2] = y[:, :, 1::2]
    out[..., 0] += 1
    return m.b(out)


def write_rows(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    out = torch.empty_like(y)
    for i, row in enumerate(y):
        out[i] = row * 2
    return m.b(out)


def write_rows_of_constant(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(2, 5, 8)
    for i, row in enumerate(x):
        out[i] = m.a(row)
    return m.b(out)


def write_index(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    out = torch.zeros_like(y)
    out[torch.tensor([1, 0])] = y
    return m.b(out)


def write_mask(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    y[x[..., 0] > 0] = 0.0
    return m.b(y)


def write_part(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[..., :3].mul_(2)
    return m.b(y)


def write_into_channels_late(m: Any, x: Tensor) -> Tensor:
    """The constant is joined with channels by a write through a view that was taken before."""
    base = x.new_ones(2, 5, 8)
    view = base.transpose(1, 2)
    view += m.a(x).transpose(1, 2)
    return m.b(base)


def index_add(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(torch.zeros_like(y).index_add(1, torch.tensor([0, 1, 1, 2, 2]), y))


def writing(groups: str, run: Callable[..., Any], **options: Any) -> Case:
    return Case(groups, lambda: Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 2)), (TOKENS,), **options)


WRITES = {
    "slices of channels": Case("", lambda: Net(write_slices, **conv1x1s(a=(3, 4), b=(3, 4), c=(8, 2)))),
    "slices of space": Case("a=8", lambda: Net(write_space, **conv1x1s(a=(3, 8), b=(8, 2)))),
    "rows": writing("a=8", write_rows),
    "rows of a constant": writing("", write_rows_of_constant),
    "index_put": writing("a=8", write_index),
    "masked write": writing("a=8", write_mask),
    "part of the channels": writing("", write_part),
    "through a view of a constant": writing("", write_into_channels_late),
    "index_add": writing("a=8", index_add),
}

# --- weights -----------------------------------------------------------------------------------------------------


def tied_mlp() -> nn.Module:
    model = Net(
        lambda m, x: m.head(m.b(m.a(m.stem(x)).relu()).relu()),
        stem=nn.Linear(6, 8),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
        head=nn.Linear(8, 2),
    )
    model.b.weight = model.a.weight
    return model


def tied_decoder() -> nn.Module:
    model = Net(
        lambda m, ids: m.decoder(m.b(m.a(m.embedding(ids)).relu())),
        embedding=nn.Embedding(10, 8),
        a=nn.Linear(8, 6),
        b=nn.Linear(6, 8),
        decoder=nn.Linear(8, 10),
    )
    model.decoder.weight = model.embedding.weight
    return model


def reparametrised(wrap: Callable[..., nn.Module], middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        wrap(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU(), wrap(middle()), nn.ReLU(), wrap(nn.Conv2d(8, 4, 3))
    )


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation: each filter has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FlatStandardisedConv2d(nn.Conv2d):
    """Weight standardisation as in BiT: through a batch norm of the flattened filters."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.weight.shape[0], -1)
        w = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def dynamic(m: Any, x: Tensor) -> Tensor:
    """One kernel per call, mixed from experts."""
    y = m.a(x)
    share = m.route(y.mean((0, 2, 3))).softmax(-1)
    return m.b(F.conv2d(y, (share.view(-1, 1, 1, 1, 1) * m.experts).sum(0)))


def conditional(m: Any, x: Tensor) -> Tensor:
    """CondConv: one kernel per image, as a grouped convolution."""
    y = m.a(x)
    n, c, h, w = y.shape
    weights = m.route(y.mean((2, 3))).softmax(-1) @ m.experts.flatten(1)
    y = F.conv2d(y.reshape(1, n * c, h, w), weights.view(n * 6, c, 1, 1), groups=n)
    return m.b(y.view(n, 6, h, w))


def vision_transformer(m: Any, x: Tensor) -> Tensor:
    x = m.patches(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
    return m.head((x + m.gamma * m.down(m.up(x).relu()))[:, 0])


def standardised(conv: type[nn.Conv2d]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3, groups=8), nn.ReLU(), conv(8, 6, 3), nn.Conv2d(6, 2, 1)
    )


WEIGHTS = {
    "embedding": chain(
        "0=8 1=6",
        lambda: nn.Embedding(10, 8, padding_idx=0),
        lambda: nn.Linear(8, 6),
        lambda: nn.Linear(6, 2),
        inputs=IDS,
    ),
    "one conv applied twice": Case(
        "a=8", lambda: Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), **conv1x1s(a=(3, 8), b=(8, 8), c=(8, 2)))
    ),
    "shared head on two levels": Case(
        "a=8 b=6",
        lambda: Net(lambda m, x: m.c(m.b(y := m.a(x)) + m.b(F.relu(y))), **conv1x1s(a=(3, 8), b=(8, 6), c=(6, 2))),
    ),
    "tied linear": Case("stem=8", tied_mlp, (TOKENS,)),
    "tied decoder": Case("a=6 b=8", tied_decoder, (IDS,)),
    "weight_norm": Case(
        "0=8 2=8",
        reparametrised(parametrizations.weight_norm, lambda: nn.Conv2d(8, 8, 1)),
    ),
    "weight_norm, depthwise": Case(
        "0=8",
        reparametrised(parametrizations.weight_norm, lambda: nn.Conv2d(8, 8, 1, groups=8)),
    ),
    "spectral_norm": Case(
        "0=8 2=8",
        reparametrised(parametrizations.spectral_norm, lambda: nn.Conv2d(8, 8, 1)),
    ),
    "spectral_norm, depthwise": Case(
        "0=8",
        reparametrised(parametrizations.spectral_norm, lambda: nn.Conv2d(8, 8, 1, groups=8)),
    ),
    "weight_norm of linear": chain(
        "0=8",
        lambda: parametrizations.weight_norm(nn.Linear(6, 8)),
        lambda: nn.Linear(8, 2),
        inputs=TOKENS,
    ),
    "old weight_norm": Case(
        "0=8 2=8",
        reparametrised(nn.utils.weight_norm, lambda: nn.Conv2d(8, 8, 1)),
    ),
    "old spectral_norm": Case(
        "0=8 2=8",
        reparametrised(nn.utils.spectral_norm, lambda: nn.Conv2d(8, 8, 1)),
    ),
    "standardised weights": Case("0=8 4=6", standardised(StandardisedConv2d)),
    "standardised weights, flattened": Case(
        "0=8 4=6",
        standardised(FlatStandardisedConv2d),
    ),
    "dynamic conv": Case(
        "a=8 route=3 experts=6",
        lambda: Net(dynamic, **conv1x1s(a=(3, 8), b=(6, 2)), route=nn.Linear(8, 3), experts=parameter(3, 6, 8, 1, 1)),
    ),
    "conditional conv": Case(
        "route=3",
        lambda: Net(
            conditional, **conv1x1s(a=(3, 8), b=(6, 2)), route=nn.Linear(8, 3), experts=parameter(3, 6, 8, 1, 1)
        ),
    ),
    "vision transformer": Case(
        "patches=8 up=12",
        lambda: Net(
            vision_transformer,
            patches=nn.Conv2d(3, 8, 4, 4),
            token=parameter(1, 1, 8),
            positions=parameter(1, 5, 8),
            gamma=parameter(8),
            up=nn.Linear(8, 12),
            down=nn.Linear(12, 8),
            head=nn.Linear(8, 2),
        ),
    ),
    "scale of one number": Case(
        "a=8", lambda: Net(lambda m, x: m.b(m.a(x) * m.scale), **conv1x1s(a=(3, 8), b=(8, 2)), scale=parameter(1))
    ),
    "buffer per channel": Case(
        "a=8", lambda: Net(lambda m, x: m.b(m.a(x) * m.scale), **conv1x1s(a=(3, 8), b=(8, 2)), scale=noise(8, 1, 1))
    ),
    "buffers of the input": Case(
        "a=8",
        lambda: Net(
            lambda m, x: m.b(m.a((x - m.mean) / m.std)),
            **conv1x1s(a=(3, 8), b=(8, 2)),
            mean=noise(3, 1, 1),
            std=torch.ones(3, 1, 1),
        ),
    ),
    "relative position bias": Case(
        "q=4 v=6",
        lambda: Net(
            lambda m, x: m.out(
                join((heads(m.q(x)) @ heads(m.k(x)).mT + m.table[m.index].permute(2, 0, 1)).softmax(-1) @ heads(m.v(x)))
            ),
            q=nn.Linear(6, 8),
            k=nn.Linear(6, 8),
            v=nn.Linear(6, 12),
            out=nn.Linear(12, 2),
            table=parameter(9, 2),
            index=torch.arange(5)[:, None] - torch.arange(5) + 4,
        ),
        (TOKENS,),
    ),
}

# --- recurrent ---------------------------------------------------------------------------------------------------


def recurrent(layer: nn.Module, outputs: int) -> nn.Module:
    return Net(
        lambda m, x: m.d(m.c(m.rnn(m.b(m.a(x)))[0])),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 5),
        rnn=layer,
        c=nn.Linear(outputs, 9),
        d=nn.Linear(9, 2),
    )


RECURRENT = {
    **{
        f"{layer.__name__}{', two ways' * ways}": Case(
            "a=8 c=9",
            lambda layer=layer, ways=ways: recurrent(
                layer(5, 7, 2, batch_first=True, bidirectional=ways), 7 * (1 + ways)
            ),
            (TOKENS,),
        )
        for layer in (nn.RNN, nn.LSTM, nn.GRU)
        for ways in (False, True)
    },
    "LSTM with a projection": Case(
        "a=8 c=9", lambda: recurrent(nn.LSTM(5, 7, proj_size=3, batch_first=True), 3), (TOKENS,)
    ),
    "GRUCell": Case(
        "a=8 c=9",
        lambda: Net(
            lambda m, x: m.d(m.c(m.cell(m.b(m.a(x))))),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 5),
            cell=nn.GRUCell(5, 7),
            c=nn.Linear(7, 9),
            d=nn.Linear(9, 2),
        ),
        (TOKENS[0],),
    ),
}

# --- inputs, outputs, number formats -----------------------------------------------------------------------------


@dataclass
class Answer:
    """An output of a network."""

    logits: Tensor
    features: Tensor


@dataclass(slots=True)
class SlimAnswer:
    """An output without a ``__dict__``."""

    logits: Tensor
    features: Tensor


def answering(answer: Callable[..., Any], groups: str = "a=8", **options: Any) -> Case:
    """A network that gives its class scores and its features away."""
    return Case(
        groups,
        lambda: Net(lambda m, x: answer(m.head(y := m.b(m.a(x))), y), **conv1x1s(a=(3, 8), b=(8, 6), head=(6, 2))),
        **options,
    )


def two_inputs(m: Any, x: Tensor, y: Tensor, *, scale: Tensor | None = None) -> Tensor:
    z = m.a(x) + m.b(y)
    return m.c(z if scale is None else z * scale)


def plain(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(96, 5),
        nn.Linear(5, 2),
    ).to(dtype)


FORMATS = {
    "tuple": answering(lambda a, b: (a, b)),
    "list in a dict": answering(lambda a, b: {"out": [a, {"features": b}]}),
    "dataclass": answering(Answer),
    "dataclass with slots": answering(SlimAnswer),
    "None among outputs": answering(lambda a, b: (a, None, 3), "a=8 b=6"),
    "dict input": Case(
        "a=8",
        lambda: Net(lambda m, batch: m.b(m.a(batch["image"] * batch["more"][0])), **conv1x1s(a=(3, 8), b=(8, 2))),
        ({"image": IMAGE, "more": [torch.ones(2, 1, 1, 1)]},),
    ),
    "list of images": Case(
        "a=8",
        lambda: Net(lambda m, images: [m.b(m.a(i[None])) for i in images], **conv1x1s(a=(3, 8), b=(8, 2))),
        ([IMAGE[0], IMAGE[1]],),
    ),
    "dataclass input": Case(
        "a=8",
        lambda: Net(lambda m, batch: m.b(m.a(batch.logits)), **conv1x1s(a=(3, 8), b=(8, 2))),
        (Answer(IMAGE, IMAGE),),
    ),
    "two inputs": Case(
        "a=8", lambda: Net(two_inputs, **conv1x1s(a=(3, 8), b=(3, 8), c=(8, 2))), (IMAGE, IMAGE.flip(2))
    ),
    "keyword inputs": Case(
        "a=8",
        lambda: Net(two_inputs, **conv1x1s(a=(3, 8), b=(3, 8), c=(8, 2))),
        (IMAGE,),
        {"y": IMAGE.flip(2), "scale": torch.ones(1, 1, 8, 8)},
    ),
    "an input that faces the channels": Case(
        "", lambda: Net(two_inputs, **conv1x1s(a=(3, 8), b=(3, 8), c=(8, 2))), (IMAGE, IMAGE), {"scale": noise(8, 1, 1)}
    ),
    "bfloat16": Case("0=8 3=6 5=5", lambda: plain(torch.bfloat16), (IMAGE.bfloat16(),), tolerance=2e-2),
    "float64": Case("0=8 3=6 5=5", lambda: plain(torch.float64), (IMAGE.double(),), tolerance=1e-12),
    "autocast": Case(
        "net.0=8 net.3=6 net.5=5",
        lambda: Net(lambda m, x: torch.autocast("cpu", torch.bfloat16)(m.net)(x), net=plain(torch.float32)),
        tolerance=2e-2,
    ),
    "channels last": Case(
        "0=8 3=6 5=5",
        lambda: plain(torch.float32).to(memory_format=torch.channels_last),
        (IMAGE.contiguous(memory_format=torch.channels_last),),
    ),
    "gradients inside the forward": Case(
        "a=8 b=6",
        lambda: Net(
            lambda m, x: torch.utils.checkpoint.checkpoint(lambda y: m.c(m.b(y)), m.a(x), use_reentrant=False),
            **conv1x1s(a=(3, 8), b=(8, 6), c=(6, 2)),
        ),
    ),
    "a single image without a batch": Case(
        "0=8", lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), (IMAGE[0],)
    ),
    "a batch of one": Case("0=8 3=6 5=5", lambda: plain(torch.float32), (IMAGE[:1],)),
}

CASES = CONVOLUTION | MATRICES | NORMS | ELEMENTWISE | SHAPES | REGIONS | WRITES | WEIGHTS | RECURRENT | FORMATS


def test_no_name_is_used_twice() -> None:
    tables = (CONVOLUTION, MATRICES, NORMS, ELEMENTWISE, SHAPES, REGIONS, WRITES, WEIGHTS, RECURRENT, FORMATS)
    assert len(CASES) == sum(map(len, tables))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = randomise(case.build()).train()
    graph = trace(model, *case.inputs, **case.kwargs)
    assert {g.name: g.size for g in graph.groups} == {n: int(k) for n, k in (g.split("=") for g in case.groups.split())}
    for keep_ratio in (0.5, 1e-9):
        plan = uniform_plan(graph, keep_ratio, saliency="random")
        pruned = prune(model, graph, plan)
        assert pruned.training
        certificate = certify(model, pruned, graph, plan, *case.inputs, tolerance=case.tolerance, **case.kwargs)
        assert certificate.ok, certificate
        with torch.no_grad():
            pruned.eval()(*case.inputs, **case.kwargs)
        if min(plan.widths.values(), default=2) > 1:  # kernels may take other paths, with other copies, at width 1
            assert cost(graph, plan) == count(pruned, *case.inputs, **case.kwargs)
