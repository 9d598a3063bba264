"""Channel groups: what is found, what is frozen and why, and that the model is left alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from secateur.pruning.channels import ChannelGraph, components
from secateur.pruning.cost import cost, count
from secateur.pruning.plan import PlanError, PruningPlan
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from secateur.pruning.tracer import PruningError
from tests.pruning.models import CifarResNet, PlainCNN, Tied, TwoBranches, certified, half
from tests.pruning.models import Net as Parts


class Net(nn.Module):
    """conv(3 -> 8), a function under test, conv(-> 4)."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 8, out: int | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.between = between
        self.last = nn.Conv2d(out or channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def reasons(graph: ChannelGraph) -> dict[str, str]:
    return {entry.layer: entry.reason for entry in graph.frozen}


def test_importing_the_search_protocol_needs_no_torch() -> None:
    code = (
        "import sys, secateur.pruning, secateur.pruning.plan, secateur.pruning.search.protocol; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_groups_of_a_plain_network() -> None:
    graph = trace(PlainCNN(), IMAGES.repeat(1, 1, 2, 2))
    assert [(g.name, g.size) for g in graph.groups] == [("conv1", 8), ("conv2", 12), ("fc1", 20)]
    members = {(m.tensor, m.dim): m for m in graph.group("conv2").members}
    assert set(members) == {("conv2.weight", 0), ("conv2.bias", 0), ("fc1.weight", 1)}
    assert members["fc1.weight", 1].reads and not members["conv2.weight", 0].reads
    assert members["fc1.weight", 1].index.tolist() == np.arange(192).reshape(12, 16).tolist()
    assert reasons(graph) == {"fc2": "reaches the model's output"}


def test_slices_follow_concatenation() -> None:
    graph = trace(TwoBranches(), IMAGES)
    plan = PruningPlan.full(graph.groups).replace({"left": (0, 5), "right": (1, 2)})
    assert graph.slices(plan)["merge.weight"][1].tolist() == [0, 5, 7, 8]
    assert graph.slices(PruningPlan.full(graph.groups)) == {}


def test_slices_refuse_a_foreign_plan() -> None:
    graph = trace(TwoBranches(), IMAGES)
    with pytest.raises(PlanError, match="another network"):
        graph.slices(PruningPlan.full(trace(CifarResNet("B"), IMAGES).groups))


def test_slices_name_all_tied_tensors() -> None:
    graph = trace(Tied(), torch.randn(2, 3))
    slices = graph.slices(half(graph))
    assert slices["a.weight"] is slices["b.weight"]
    assert slices["a.weight"].keys() == {0, 1}


def test_option_a_shortcut_freezes_only_the_padded_positions() -> None:
    graph, certificate = certified(CifarResNet("A"), IMAGES)
    assert certificate.ok, certificate
    stem = graph.group("conv1")
    members = {(m.tensor, m.dim): m.index.ravel().tolist() for m in stem.members}
    assert stem.size == 8
    assert members["layer2.conv2.weight", 0] == list(range(4, 12))
    assert members["layer3.conv2.weight", 0] == list(range(12, 20))
    assert members["fc.weight", 1] == list(range(12, 20))
    assert "pads the channels" in reasons(graph)["layer2.conv2"]


def test_channel_order_is_that_of_the_producer() -> None:
    graph = trace(Net(lambda x: x.flip(1)), IMAGES)
    members = {(m.tensor, m.dim): m.index.ravel().tolist() for m in graph.group("first").members}
    assert members["first.weight", 0] == list(range(8))
    assert members["last.weight", 1] == list(reversed(range(8)))


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def chunked(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([a, b.sigmoid()], 1)


PRUNABLE = {
    "inplace": lambda x: x.relu_().mul_(2).add_(1),
    "scalars": lambda x: 1 - x / 2,
    "gate": lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid(),
    "expand_as": lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x),
    "activations": lambda x: F.mish(F.gelu(F.hardswish(F.silu(F.relu6(F.leaky_relu(F.elu(x))))))),
    "softmax over space": lambda x: x.flatten(2).softmax(-1).view(x.shape),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "resize": lambda x: F.interpolate(F.interpolate(x, scale_factor=2.0), size=(5, 5), mode="bilinear"),
    "pool": lambda x: F.avg_pool2d(F.max_pool2d(x, 2, 1), 2, 1),
    "pad": lambda x: F.pad(F.pad(x, (1, 1, 1, 1)), (1, 0, 0, 1), mode="reflect"),
    "crop": lambda x: x[:, :, 1:-1, ::2],
    "new_zeros": lambda x: x + x.new_zeros(1, 1, 8, 8),
    "glu": lambda x: F.glu(torch.cat([x, x], 1), 1),
    "roll": lambda x: x.roll(1, 2),
    "shuffle": shuffle,
    "channels last": lambda x: x * F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
    "chunk": chunked,
    "cat with itself, halved": lambda x: torch.cat([x, x], 1).chunk(2, 1)[0],
    "stack": lambda x: torch.stack([x, x.relu()]).sum(0),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "einsum over space": lambda x: torch.einsum("nchw,nchw->nc", x, x)[:, :, None, None],
    "squeeze": lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(2).unsqueeze(-1).unsqueeze(-1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(
        torch.cat([x] * 4, 1).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2
    ),
}


@pytest.mark.parametrize("name", PRUNABLE)
def test_labels_pass(name: str) -> None:
    graph, certificate = certified(Net(PRUNABLE[name]), IMAGES)
    assert [g.name for g in graph.groups] == ["first"]
    assert certificate.ok, certificate


FROZEN = {
    "slice": (lambda x: x[:, :5], 5, "cuts channels at a number"),
    "split": (lambda x: x.split([3, 5], 1)[1], 5, "cuts channels at a number"),
    "as_strided": (lambda x: x.as_strided((2, 8, 4, 4), (512, 64, 8, 1)), 8, "memory at positions"),
    "select": (lambda x: x[:, 3].unsqueeze(1), 1, "by position"),
    "index": (lambda x: x[:, [0, 2]], 2, "by position"),
    "constant": (lambda x: x + torch.arange(8.0).view(8, 1, 1), 8, "a dimension of fixed size"),
    "no rule": (lambda x: x.sort(1).values.cumsum(1), 8, "works along it"),
    "unknown": (lambda x: torch.cummax(x, 2).values, 8, "operator cummax in the model itself has no rule"),
    "unknown in place": (lambda x: x.index_fill_(1, torch.tensor([0]), 1.0), 8, "index_fill.* has no rule"),
    "spatial reading": (lambda x: x.transpose(1, 2), 8, "slides along it"),
    "mixed": (lambda x: x.transpose(0, 1).reshape(4, 4, 8, 8).reshape(2, 8, 8, 8), 8, "mixes it"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_followed_is_frozen_with_its_reason(name: str) -> None:
    between, out, reason = FROZEN[name]
    graph = trace(Net(between, out=out), IMAGES)
    assert graph.groups == ()
    assert re.search(reason, reasons(graph)["first"])


def test_unknown_operators_are_reported() -> None:
    graph = trace(Net(lambda x: torch.cummax(x, 2).values), IMAGES)
    assert graph.unknown == {"cummax": ("",)}
    report = graph.report()
    assert "operators without a rule" in report and "100.0% of the MACs" in report
    assert re.search(r"cummax +the model itself +first +42.9% \(1,536\)", report)


def test_unused_and_opaque_layers_are_frozen() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 8)
            self.memory = nn.GRU(8, 8, batch_first=True)
            self.hidden = nn.Linear(8, 6)
            self.last = nn.Linear(6, 2)
            self.auxiliary = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.hidden(x + self.memory(x)[0]))

    graph = trace(Odd(), torch.randn(2, 5, 3))
    assert [g.name for g in graph.groups] == ["hidden"]
    plan, x = half(graph), torch.randn(2, 5, 3)
    assert cost(graph, plan) == count(prune(Odd(), graph, plan), x)
    found = reasons(graph)
    assert "never used" in found["auxiliary"]
    assert "takes its sizes from its constructor" in found["first"]


def test_a_model_is_left_as_it_was() -> None:
    model = CifarResNet("B").train()
    model.layer2.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    modes = [m.training for m in model.modules()]
    before = {n: (t, t.clone(), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    graph, certificate = certified(model, IMAGES)
    assert certificate.ok
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept, value, version = before[name]
        assert tensor is kept and torch.equal(tensor, value) and tensor._version == version
    assert model.fc.weight.grad is not None and model.conv1.weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks
    assert torch.is_grad_enabled()
    assert graph.batch == 2


def test_a_failing_forward_is_explained() -> None:
    model = PlainCNN().train()
    with pytest.raises(
        PruningError, match=r"in module 'fc1' \(Linear\), given \[0\]\[0\] \(2, 3, 8, 8\): RuntimeError"
    ) as info:
        trace(model, IMAGES)
    assert isinstance(info.value.__cause__, RuntimeError)
    assert all(m.training for m in model.modules())
    assert not nn.modules.module._global_forward_pre_hooks


def test_report_of_a_network() -> None:
    report = trace(CifarResNet("B"), IMAGES).report()
    assert report.startswith("6 channel groups")
    assert "layer1.conv1" in report and "reaches the model's output" in report


def test_unknown_group_names_the_known_ones() -> None:
    with pytest.raises(PruningError, match="'left', 'right'"):
        trace(TwoBranches(), IMAGES).group("middle")


def test_components() -> None:
    rng = np.random.default_rng(0)
    path = rng.permutation(1000)
    assert set(components(1001, [(path[:-1], path[1:])]).tolist()) == {0, 1000}
    assert components(3, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d(), nn.LazyConvTranspose2d(8, 1)])
def test_lazy_layers_are_named_with_the_way_out(lazy: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), lazy, nn.LazyConv2d(4, 1))
    kind = type(lazy).__name__
    with pytest.raises(PruningError, match=rf"1 \({kind}\) has no sizes before .*; run the model once"):
        trace(model, IMAGES)
    model(IMAGES)
    _, certificate = certified(model, IMAGES)
    assert certificate.ok, certificate


def conv(inputs: int, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


SUMS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "a residual sum": (lambda: Parts(lambda m, x: m.b(m.a(x) + m.c(x)), a=conv(3), b=conv(8, 3), c=conv(3)), {"a"}),
    "in place": (lambda: Parts(lambda m, x: m.b(m.a(x).add_(m.c(x))), a=conv(3), b=conv(8, 3), c=conv(3)), {"a"}),
    "a difference": (lambda: Parts(lambda m, x: m.b(m.a(x) - m.c(x)), a=conv(3), b=conv(8, 3), c=conv(3)), {"a"}),
    "added to zeros": (
        lambda: Parts(lambda m, x: m.b(torch.zeros(1, 8, 8, 8) + m.a(x)), a=conv(3), b=conv(8, 3)),
        set(),
    ),
    "gating": (lambda: Parts(lambda m, x: m.b(m.a(x) * m.c(x)), a=conv(3), b=conv(8, 3), c=conv(3)), set()),
    "concatenation": (
        lambda: Parts(lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)), a=conv(3), b=conv(16, 3), c=conv(3)),
        set(),
    ),
    "a bias": (
        lambda: Parts(
            lambda m, x: m.b(m.a(x) + m.bias), a=conv(3), b=conv(8, 3), bias=nn.Parameter(torch.ones(8, 1, 1))
        ),
        set(),
    ),
    "a function of itself": (
        lambda: Parts(lambda m, x: m.b((h := m.a(x)) + h**3 - h.mean((2, 3), keepdim=True)), a=conv(3), b=conv(8, 3)),
        set(),
    ),
    "a fused sum": (
        lambda: Parts(
            lambda m, x: m.b(torch.addmm(m.a(x), m.c(x), m.d.weight.t())),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 2), "c": nn.Linear(4, 6), "d": nn.Linear(6, 8, bias=False)},
        ),
        {"a"},
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_stream_is_what_sums_of_activations_carry(name: str) -> None:
    make, summed = SUMS[name]
    example = torch.randn(3, 4) if name == "a fused sum" else torch.randn(1, 3, 8, 8)
    assert trace(make(), example).summed == summed


STREAMS = {
    "resnet18": ({"conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"}, {"layer1.0.conv1", "layer4.1.conv1"}),
    "resnet50": ({f"layer{i}.0.conv3" for i in (1, 2, 3, 4)}, {"conv1", "layer1.0.conv1", "layer1.0.conv2"}),
    "mobilenet_v2": (
        {f"features.{i}.conv.2" for i in (2, 4, 7, 11, 14)},
        {"features.0.0", "features.1.conv.1", "features.2.conv.0.0", "features.17.conv.2", "features.18.0"},
    ),
    "efficientnet_b0": (
        {f"features.{i}.0.block.3.0" for i in (2, 3, 4, 5, 6)},
        {"features.2.0.block.0.0", "features.2.0.block.2.fc1"},  # the expansion with its gate, and the gate's own
    ),
    "convnext_tiny": ({"features.0.0", "features.2.1", "features.4.1", "features.6.1"}, {"features.1.0.block.3"}),
    "vgg11_bn": (set(), {"features.0", "classifier.0"}),
    "densenet121": (set(), {"features.conv0", "features.denseblock1.denselayer1.conv2"}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_of_known_networks(name: str) -> None:
    stream, some_inner = STREAMS[name]
    graph = trace(torchvision.models.get_model(name, weights=None), torch.randn(1, 3, 32, 32))
    assert graph.summed == stream
    assert some_inner <= {group.name for group in graph.groups} - graph.summed


def test_the_hidden_layers_and_heads_of_a_transformer_are_inner() -> None:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=5)
    graph = trace(vit, torch.randn(1, 3, 32, 32))
    assert graph.summed == {"conv_proj"}  # the embedding, with the heads that have one size with it
    assert {f"encoder.layers.encoder_layer_{i}.mlp.0" for i in (0, 1)} <= {group.name for group in graph.groups}


@pytest.mark.parametrize("option", ["A", "B"])
def test_the_stream_of_cifar_networks(option: str) -> None:
    graph = trace(CifarResNet(option), IMAGES)
    assert graph.summed and not any(name.endswith(".conv1") and name != "conv1" for name in graph.summed)
    assert "carried by residual sums" in graph.report()
