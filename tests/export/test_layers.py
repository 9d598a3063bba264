"""The layer table against the networks it describes: really pruned, really run."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.device_profiles import LocalTarget, measure
from secateur.device_profiles.latency_model import sample_of
from secateur.device_profiles.layers import LayerTable
from secateur.export.layers import layer_table
from secateur.export.slicing import OnnxTemplate
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.device_profiles.tiny import quick_profile
from tests.export import nets
from tests.export.nets import prepared, random_plan

SHAPES = {"Grey": (1, 1, 16, 16)}


class Twice(nn.Module):
    """One convolution used by two layers, at two resolutions, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = nn.functional.max_pool2d(x + torch.relu(self.shared(x)), 2)
        return self.head(torch.relu(self.shared(x)).mean((2, 3)))


class Grey(nn.Module):
    """A one-channel image, 1 x 1, 1 x 7 and strided convolutions, a grouped one that is not depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 12, (1, 7), padding=(0, 3))
        self.grouped = nn.Conv2d(12, 8, 3, groups=2)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.grouped(x))).mean((2, 3))


BUILDERS = {
    "Flat": nets.Flat,
    "Mobile": nets.Mobile,
    "Shuffle": nets.Shuffle,
    "Attention": nets.Attention,
    "Twice": Twice,
    "Grey": Grey,
}
Case = tuple[nn.Module, Tensor, ChannelGraph, OnnxTemplate, LayerTable]
cases: dict[str, Case] = {}


def case(name: str) -> Case:
    if name not in cases:
        model = prepared(BUILDERS[name]())
        x = torch.randn(SHAPES.get(name, (1, 3, 8, 8)), generator=torch.Generator().manual_seed(0))
        graph = trace(model, x)
        template = OnnxTemplate.export(model, x, graph)
        cases[name] = model, x, graph, template, layer_table(template)
    return cases[name]


def calls_of(model: nn.Module, x: Tensor) -> list[tuple[str, int, int]]:
    """(weight, positions out, positions in) of every convolution and linear layer, in the order they run."""
    calls: list[tuple[str, int, int]] = []

    def positions(values: Tensor, module: nn.Module) -> int:
        return prod(values.shape[1:-1]) if isinstance(module, nn.Linear) else prod(values.shape[2:])

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, args, out, path=path: calls.append(
                    (f"{path}.weight", positions(out, m), positions(args[0], m))
                )
            )
    with torch.no_grad():
        model(x)
    return calls


@pytest.mark.parametrize("name", BUILDERS)
def test_channels_are_those_of_the_really_pruned_network(name: str) -> None:
    model, _, graph, _, table = case(name)
    plans = [PruningPlan.full(graph.groups), *(random_plan(graph, seed) for seed in range(4))]
    for group in graph.groups:  # one channel of one group alone
        plans.append(plans[0].replace({group.name: [group.size - 1]}))
    widths = np.array([list(plan.widths.values()) for plan in plans])
    for plan, found in zip(plans, table.channels(widths), strict=True):
        state = prune(model, graph, plan).state_dict()
        expected = [(state[layer].shape[1], state[layer].shape[0]) for layer in table.names]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_and_their_positions_are_those_that_run(name: str) -> None:
    model, x, _, _, table = case(name)
    found = sorted(zip(table.names, table.pixels.tolist(), table.in_pixels.tolist(), strict=True))
    assert found == sorted(calls_of(prepared(BUILDERS[name]()), x))
    state = model.state_dict()
    assert table.taps.tolist() == [prod(state[layer].shape[2:]) for layer in table.names]


def test_kinds() -> None:
    *_, table = case("Mobile")
    kinds = dict(zip(table.names, table.kinds, strict=True))
    assert kinds == {
        "stem.0.weight": "conv",
        "expand.weight": "pointwise",
        "depthwise.weight": "depthwise",
        "grouped.weight": "pointwise",
        "project.weight": "pointwise",
        "head.weight": "linear",
    }
    assert case("Grey")[4].kinds == ("conv", "conv", "conv", "pointwise")  # one input channel is not depthwise
    assert table.kinds_of("expand") == {"pointwise", "depthwise"}
    assert table.kinds_of("stem.0") == {"conv", "pointwise", "linear"}


def test_a_layer_used_twice_is_two_layers_of_the_same_channels() -> None:
    *_, table = case("Twice")
    assert table.names == ("stem.weight", "shared.weight", "shared.weight", "head.weight")
    assert table.pixels.tolist() == [64, 64, 16, 1]
    np.testing.assert_array_equal(table.channels(np.array([[5]]))[0], [[3, 5], [5, 5], [5, 5], [5, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Attention", "Twice"])
def test_a_profile_of_the_runtime_shows_every_layer(name: str, tmp_path) -> None:
    _, _, graph, template, table = case(name)
    plan = random_plan(graph, 3)
    template.write(PruningPlan.full(graph.groups), tmp_path / "baseline.onnx")
    template.write(plan, tmp_path / "candidate.onnx")
    target = LocalTarget()
    try:
        models = {name: tmp_path / f"{name}.onnx" for name in ("baseline", "candidate")}
        result = measure(target, quick_profile(), models, nodes=True)
    finally:
        target.close()
    sample = sample_of(table, np.array(list(plan.widths.values())), result, "candidate", "baseline")
    assert np.isfinite(sample.layer_ms).all()
    nodes = result.processes[0].models["candidate"].nodes
    assert sample.layer_ms.sum() == pytest.approx(sum(node.ms for node in nodes))
