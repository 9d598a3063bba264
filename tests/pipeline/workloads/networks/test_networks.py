"""Every network that the papers name runs by name: it traces, can be halved, and is proven right; wrong names help."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from secateur.pipeline.errors import UserError
from secateur.pipeline.run.proof import prove
from secateur.pipeline.workloads import networks
from secateur.pipeline.workloads.networks import build_network, class_tensors, named
from secateur.pruning.cost import cost
from secateur.pruning.plan import SearchSpace
from secateur.pruning.trace import trace

CLASSIFIERS: dict[str, tuple[int, int, int]] = {
    "resnet50": (3, 32, 32),
    "cifar/resnet56": (3, 8, 8),
    "cifar/resnet110": (3, 8, 8),
    "mobilenet_v1": (3, 32, 32),
    "cifar/mobilenet_v1": (3, 32, 32),
    "torchvision/mobilenet_v2": (3, 32, 32),
    "cifar/mobilenet_v2": (3, 8, 8),
    "cifar/vgg16": (3, 16, 16),
    "cifar/vgg19": (3, 16, 16),
    "mlp": (1, 28, 28),
}
LONG = {"resnet50", "cifar/resnet110", "cifar/vgg19", "cifar/mobilenet_v1", "torchvision/mobilenet_v2"}
"""Those that are others once more, larger or with other strides."""
PARAMETERS = {
    "cifar/resnet20": (10, 269_722),  # He et al. 2016, table 6: 0.27 M
    "cifar/resnet110": (10, 1_727_962),  # 1.7 M
    "cifar/vgg16": (10, 14_724_042),  # Li et al. 2017, table 1: 1.5e7
    "mobilenet_v1": (1000, 4_231_976),  # Howard et al. 2017, table 8: 4.2 M
    "cifar/mobilenet_v2": (10, 2_236_682),
    "mlp": (10, 266_610),  # LeNet-300-100
}
"""Name -> classes and parameters."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in CLASSIFIERS])
def test_every_network_of_the_papers_can_be_pruned(name: str) -> None:
    torch.manual_seed(0)
    shape = CLASSIFIERS[name]
    model, example = build_network(name, 10, shape, {}), torch.randn(1, *shape)
    assert model.eval()(example).shape == (1, 10)
    graph = trace(model, example)
    space = SearchSpace.of(graph.groups, channel_multiple=1, min_keep_ratio=0.1, frozen=())
    assert prove(model, graph, space, example, seed=0).ok, "half of every group can go"
    assert cost(graph, space.smallest()).macs < 0.25 * cost(graph, space.full).macs


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_parameters_that_their_papers_say(name: str) -> None:
    classes, expected = PARAMETERS[name]
    with torch.device("meta"):
        model = build_network(name, classes, (1, 28, 28) if name == "mlp" else (3, 32, 32), {})
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_options_are_the_builders_own() -> None:
    assert [layer.out_features for layer in build_network("mlp", 4, (3, 8, 8), {"hidden": [20]}).hidden] == [20]  # type: ignore[operator, union-attr]
    narrow = build_network("mobilenet_v1", 4, (3, 32, 32), {"width": 0.25})
    assert narrow.classifier.in_features == 256
    with pytest.raises(UserError, match=r"does not take these options.*depth"):
        build_network("cifar/vgg16", 4, (3, 32, 32), {"depth": 3})


def test_a_factory_that_takes_no_number_of_classes_is_not_told_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pipeline.config.trust.factory", lambda name, options: lambda: None)
    with pytest.raises(UserError, match=r"does not take the number of classes.*0 positional"):
        build_network("own.py:make", 4, (3, 8, 8), {})


def test_grey_images_go_into_small_networks_and_timms() -> None:
    for name in ("cifar/resnet8", "cifar/vgg16", "cifar/mobilenet_v2", "timm/test_resnet"):
        assert build_network(name, 3, (1, 32, 32), {}).eval()(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    with pytest.raises(UserError, match="channels: 3"):
        build_network("resnet18", 3, (1, 32, 32), {})


def test_a_name_means_the_same_in_all_its_forms() -> None:
    assert named("resnet18") == named("torchvision/resnet18")
    assert named("cifar_resnet20") == named("cifar/resnet20"), "the name it had before"
    assert named("mine.py:Net").zoo == named("package.module:build").zoo == "own"


@pytest.mark.parametrize(
    ("wrong", "near"), [("resnet19", "'resnet1"), ("cifar/resnet21", "'cifar/resnet"), ("torchvision/x", ""), ("", "")]
)
def test_a_wrong_name_says_the_three_ways(wrong: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        named(wrong)
    for way in ("timm/NAME", "FILE.py:FACTORY", "PACKAGE.MODULE:FACTORY", near):
        assert way in str(caught.value)


def _looks_at_values(num_classes: int) -> nn.Module:
    return nn.Linear(4, num_classes) if torch.ones(1).item() else nn.Linear(4, 1)


HEADS: dict[str, tuple[Callable[[int], nn.Module], set[str]]] = {
    "torchvision": (
        lambda n: build_network("squeezenet1_1", n, (3, 64, 64), {}),
        {"classifier.1.weight", "classifier.1.bias"},
    ),
    "small": (lambda n: build_network("cifar/resnet8", n, (3, 8, 8), {}), {"linear.weight", "linear.bias"}),
    "timm": (lambda n: build_network("timm/test_resnet", n, (3, 8, 8), {}), {"fc.weight", "fc.bias"}),
    "a builder that looks at values": (_looks_at_values, {"weight", "bias"}),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_tensors_of_the_classes_are_found_by_their_shapes(case: str) -> None:
    build, expected = HEADS[case]
    before = torch.get_rng_state()
    assert set(class_tensors(build, 5)) == expected
    assert torch.equal(torch.get_rng_state(), before), "and nothing that is drawn later changes"


def test_nothing_of_ones_own_is_imported_by_asking_what_it_is(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\n")
    with pytest.raises(UserError, match="nobody has consented"):
        networks.build_network("mine.py:Net", 3, (3, 8, 8), {})
