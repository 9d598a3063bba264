"""Pruned networks: equal to the masked dense one, trainable, storable, and mistakes are caught."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from secateur.pruning.cost import cost, count
from secateur.pruning.plan import PruningPlan
from secateur.pruning.saliency import uniform_plan
from secateur.pruning.surgery import certify, compare_outputs, copied, load_pruned, prune, save_pruned, scatter
from secateur.pruning.trace import trace
from secateur.pruning.tracer import PruningError
from secateur.pruning.weights import inherit
from tests.pruning.models import CifarResNet, PlainCNN, Tied, TwoBranches, certified, half, randomise

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LARGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

TORCHVISION = {
    "resnet18": {},
    "resnet50": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "densenet121": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "squeezenet1_1": {},
    "efficientnet_b0": {},
    "regnet_y_400mf": {},
    "shufflenet_v2_x0_5": {},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_certificate_and_cost_on_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(getattr(torchvision.models, name)(weights=None, num_classes=10, **TORCHVISION[name]))
    graph = trace(model, LARGE)
    plan = half(graph)
    pruned = prune(model, graph, plan)
    certificate = certify(model, pruned, graph, plan, LARGE)
    assert certificate.ok, certificate
    assert cost(graph, plan) == count(pruned, LARGE)
    assert not graph.unknown
    assert sum(entry.macs_share for entry in graph.frozen) < 0.15


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg(batch_norm: bool) -> None:
    features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M", 32, 32, "M"], batch_norm)
    model = torchvision.models.VGG(features, num_classes=10)
    model.classifier = nn.Sequential(nn.Linear(32 * 49, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 10))
    graph, certificate = certified(randomise(model), LARGE)
    assert certificate.ok, certificate
    assert len(graph.groups) == 7


@pytest.mark.parametrize("option", ["A", "B"])
def test_cifar_resnet(option: str) -> None:
    assert certified(randomise(CifarResNet(option)), IMAGES)[1].ok


def test_surgery_updates_the_layers_own_sizes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1, groups=8), nn.GroupNorm(16, 16), nn.Conv2d(16, 4, 1)
    )
    graph, certificate = certified(model, IMAGES)
    assert certificate.ok, certificate
    pruned = prune(model, graph, PruningPlan.full(graph.groups).replace({"0": (1, 2, 5)}))
    assert (pruned[0].in_channels, pruned[0].out_channels) == (3, 3)
    assert pruned[1].num_features == 3
    assert (pruned[2].in_channels, pruned[2].out_channels, pruned[2].groups) == (3, 6, 3)
    assert (pruned[3].num_groups, pruned[3].num_channels) == (6, 6)
    assert type(pruned) is type(model) and list(pruned.state_dict()) == list(model.state_dict())


def test_pruned_copy_is_independent_and_trains() -> None:
    model = CifarResNet("B").train()
    model.conv1.weight.requires_grad_(False)
    graph = trace(model, IMAGES)
    pruned = prune(model, graph, half(graph))
    assert pruned.training
    assert {p.data_ptr() for p in pruned.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    F.cross_entropy(pruned(IMAGES), torch.tensor([0, 1])).backward()
    assert not pruned.conv1.weight.requires_grad
    assert all(
        p.grad is not None and p.grad.shape == p.shape for n, p in pruned.named_parameters() if n != "conv1.weight"
    )
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_is_what_deepcopy_would_make() -> None:
    class Own(nn.Identity):
        copies = 0

        def __deepcopy__(self, memo: object) -> Own:
            new = Own()
            new.copies = self.copies + 1
            return new

    shared, calls = nn.Linear(3, 3), []
    shared.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(shared, Own(), shared)
    model.settings = {"layers": [shared], "sizes": (3, 3)}  # type: ignore[assignment]
    new = copied(model, {})
    assert new[0] is new[2] is new.settings["layers"][0] and new[0] is not shared
    assert torch.equal(new[0].weight, shared.weight) and new[0].weight is not shared.weight
    assert new[1].copies == 1 and new.settings["sizes"] == (3, 3)
    shared._forward_hooks.clear()
    new(torch.zeros(1, 3))
    assert calls == [1, 1] and vars(new).keys() == vars(model).keys()


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    graph, certificate = certified(model, torch.randn(2, 3))
    assert certificate.ok
    pruned = prune(model, graph, half(graph))
    assert pruned.a.weight is pruned.b.weight
    assert (pruned.a.in_features, pruned.b.out_features) == (3, 3)


def test_prune_refuses_another_architecture() -> None:
    graph = trace(CifarResNet("B"), IMAGES)
    with pytest.raises(PruningError, match=r"layer2.shortcut.0.weight: expected \(16, 8, 1, 1\), got no such tensor"):
        prune(CifarResNet("A"), graph, half(graph))


def test_scatter_is_the_inverse_of_slicing() -> None:
    model = randomise(CifarResNet("A"))
    graph = trace(model, IMAGES)
    plan = half(graph)
    state = {
        n: torch.randn_like(t) if t.is_floating_point() else t
        for n, t in prune(model, graph, plan).state_dict().items()
    }
    dense = scatter(model, graph, plan, state)
    assert {n: t.shape for n, t in dense.items()} == {n: t.shape for n, t in model.state_dict().items()}
    again = inherit(model, graph, plan, dense).state_dict()
    assert all(torch.equal(again[n], state[n]) for n in state)


def test_pruning_twice_is_pruning_by_the_composed_plan() -> None:
    model = randomise(CifarResNet("B"))
    graph = trace(model, IMAGES)
    first = uniform_plan(graph, 0.75, model=model)
    second = first.replace({name: kept[::2] for name, kept in first.kept.items()})
    assert second.is_within(first)
    trained = prune(model, graph, first)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    composed = inherit(model, graph, second, scatter(model, graph, first, trained.state_dict()))
    regraph = trace(trained, IMAGES)
    sub = PruningPlan.full(regraph.groups).replace({n: range(0, s, 2) for n, s in first.widths.items()})
    direct = prune(trained, regraph, sub)
    assert all(
        torch.equal(a, b) for a, b in zip(composed.state_dict().values(), direct.state_dict().values(), strict=True)
    )


def test_wrong_states_are_refused() -> None:
    model = CifarResNet("B")
    graph = trace(model, IMAGES)
    with pytest.raises(PruningError, match="conv1"):
        scatter(model, graph, half(graph), model.state_dict())
    with pytest.raises(PruningError, match="conv1"):
        inherit(model, graph, half(graph), prune(model, graph, half(graph)).state_dict())


def test_save_and_load(tmp_path: Path) -> None:
    for model, x in ((randomise(CifarResNet("A")), IMAGES), (Tied(), torch.randn(2, 3))):
        graph = trace(model, x)
        plan = half(graph)
        pruned = prune(model, graph, plan).eval()
        save_pruned(tmp_path, pruned, plan)
        assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "weights.safetensors"}
        fresh = type(model)("A") if isinstance(model, CifarResNet) else Tied()
        loaded, loaded_plan = load_pruned(tmp_path, fresh, graph)
        assert loaded_plan == plan
        assert torch.equal(loaded.eval()(x), pruned(x))


def test_load_explains_what_does_not_fit(tmp_path: Path) -> None:
    model = CifarResNet("B")
    graph = trace(model, IMAGES)
    plan = half(graph)
    with pytest.raises(PruningError, match=r"cannot load .*plan\.json"):
        load_pruned(tmp_path, model, graph)
    save_pruned(tmp_path, prune(model, graph, plan), plan)
    with pytest.raises(PruningError, match="not the traced one"):
        load_pruned(tmp_path, CifarResNet("A"), graph)
    with pytest.raises(PruningError, match="another network"):
        load_pruned(tmp_path, TwoBranches(), trace(TwoBranches(), IMAGES))
    data = json.loads((tmp_path / "plan.json").read_text())
    data["groups"]["conv1"]["keep"] = "0-3"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PruningError, match="is not the plan of its weights"):
        load_pruned(tmp_path, model, graph)
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PruningError, match="cannot load"):
        load_pruned(tmp_path, model, graph)


def test_a_pruned_model_with_any_byte_changed_or_cut_there_is_loaded_or_refused(tmp_path: Path) -> None:
    model = PlainCNN()
    graph = trace(model, IMAGES)
    plan = half(graph)
    save_pruned(tmp_path, prune(model, graph, plan), plan)
    rng = np.random.default_rng(0)
    for name in ("plan.json", "weights.safetensors"):
        content = (tmp_path / name).read_bytes()
        for where in rng.integers(0, min(len(content), 1500), 60).tolist():
            changed = content[:where] + bytes([int(rng.integers(256))]) + content[where + 1 :]
            for damaged in (changed, content[:where]):
                (tmp_path / name).write_bytes(damaged)
                with contextlib.suppress(PruningError):
                    load_pruned(tmp_path, model, graph)
        (tmp_path / name).write_bytes(content)


ODD_PLANS = {
    "no UTF-8": b"\xff\xfe{}",
    "nested without end": b"[" * 100_000,
    "no channels": b'{"format": 1, "groups": {"a": {"of": 0, "keep": ""}}}',
    "infinitely many": b'{"format": 1, "groups": {"a": {"of": 1e400, "keep": "0"}}}',
    "half a channel": b'{"format": 1, "groups": {"a": {"of": 8.5, "keep": "0"}}}',
    "more than memory": b'{"format": 1, "groups": {"a": {"of": 8, "keep": "0-999999999999"}}}',
    "null": b"null",
}


@pytest.mark.parametrize("kind", ODD_PLANS)
def test_plans_that_are_none(kind: str, tmp_path: Path) -> None:
    model = PlainCNN()
    graph = trace(model, IMAGES)
    save_pruned(tmp_path, prune(model, graph, half(graph)), half(graph))
    (tmp_path / "plan.json").write_bytes(ODD_PLANS[kind])
    with pytest.raises(PruningError, match="cannot load"):
        load_pruned(tmp_path, model, graph)


def test_the_certificate_catches_wrong_weights_and_shapes() -> None:
    model = randomise(PlainCNN())
    graph = trace(model, IMAGES)
    plan = half(graph)
    pruned = prune(model, graph, plan)
    pruned.conv1.weight.data[0, 0, 0, 0] += 1
    certificate = certify(model, pruned, graph, plan, IMAGES)
    assert not certificate.ok and certificate.max_relative_error > 1e-4 and "differs by" in certificate.reason
    pruned.fc2 = nn.Linear(pruned.fc2.in_features, 7)
    assert "shapes differ: output is (2, 7) instead of (2, 5)" in certify(model, pruned, graph, plan, IMAGES).reason
    pruned.fc2 = nn.Linear(3, 5)
    assert "forward raised RuntimeError" in certify(model, pruned, graph, plan, IMAGES).reason
    assert "not the traced one" in certify(CifarResNet("B"), pruned, graph, plan, IMAGES).reason


def test_the_certificate_says_which_sizes_written_in_the_code_fail() -> None:
    class Baked(PlainCNN):
        def forward(self, x: Tensor) -> Tensor:
            x = F.adaptive_avg_pool2d(F.relu(self.conv2(self.bn1(self.conv1(x)))), 4)
            return self.fc2(self.fc1(x.view(-1, 12 * 16)))

    model = randomise(PlainCNN())
    graph = trace(model, IMAGES)
    baked = Baked()
    baked.load_state_dict(model.state_dict())
    certificate = certify(baked, prune(baked, graph, half(graph)), graph, half(graph), IMAGES)
    assert not certificate.ok and "the pruned model's forward raised" in certificate.reason


def test_rows_that_belong_together_are_compared_as_a_set() -> None:
    boxes, scores = torch.rand(5, 4), torch.rand(5)
    order = torch.tensor([2, 0, 1, 4, 3])
    expected = [{"boxes": boxes, "scores": scores}]
    assert compare_outputs([{"boxes": boxes[order], "scores": scores[order]}], expected).max_relative_error == 0
    assert not compare_outputs([{"boxes": boxes[order], "scores": scores}], expected).ok  # scores of other boxes
    moved = boxes[order].clone()
    moved[0, 0] += 0.1
    assert not compare_outputs([{"boxes": moved, "scores": scores[order]}], expected).ok
    assert "shapes differ" in compare_outputs([{"boxes": boxes[:4], "scores": scores[:4]}], expected).reason
    assert not compare_outputs(scores[order], scores).ok  # a tensor alone keeps its order


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm([8, 16, 16]), nn.Softmax(1)])
def test_normalised_channels_are_compared_over_the_kept_ones(norm: nn.Module) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 4, 1)))
    graph, certificate = certified(model, IMAGES)
    assert list(graph.normalising) == ["0"]
    assert certificate.ok and certificate.max_relative_error < 1e-5
    plan = half(graph)
    wrong = prune(model, graph, plan)
    with torch.no_grad():
        wrong[0].bias += 0.1 * torch.arange(4)
    assert not certify(model, wrong, graph, plan, IMAGES).ok


class WithExtraState(nn.Conv2d):
    """A convolution that keeps more than tensors."""

    extra: object = None

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"steps": [1, 2.5, "a"], "none": None}, 3, "text", None, []])
def test_extra_state_is_saved_and_loaded(tmp_path: Path, extra: object) -> None:
    model = nn.Sequential(WithExtraState(3, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    graph = trace(model, IMAGES)
    plan = half(graph)
    pruned = prune(model, graph, plan)
    pruned[0].set_extra_state(extra)
    save_pruned(tmp_path, pruned, plan)
    loaded, _ = load_pruned(tmp_path, model, graph)
    assert loaded[0].extra == extra and model[0].extra is None
    assert torch.equal(loaded(IMAGES), pruned(IMAGES))
    assert scatter(model, graph, plan, pruned.state_dict())["0._extra_state"] == extra


@pytest.mark.parametrize("extra", [torch.zeros(2), (1, 2), {1: 2}, b"bytes", {1}, object(), float("nan")])
def test_extra_state_that_no_file_holds_is_refused_by_name(tmp_path: Path, extra: object) -> None:
    model = nn.Sequential(WithExtraState(3, 8, 1), nn.Conv2d(8, 4, 1))
    graph = trace(model, IMAGES)
    plan = half(graph)
    pruned = prune(model, graph, plan)
    pruned[0].set_extra_state(extra)
    with pytest.raises(PruningError, match=r"extra state of 0 \(WithExtraState.get_extra_state\)"):
        save_pruned(tmp_path, pruned, plan)
    assert not list(tmp_path.iterdir())


def test_hooks_that_rename_a_state_dict_do_not_matter(tmp_path: Path) -> None:
    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}renamed.{name.removeprefix(prefix)}"] = state.pop(name)

    def drop(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
        state.pop(f"{prefix}bias", None)

    for hook in (rename, drop):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
        model[1].register_buffer("passing", torch.ones(8), persistent=False)
        graph = trace(model, IMAGES)
        plan = half(graph)
        model[0].register_state_dict_post_hook(hook)
        pruned = prune(model, graph, plan)
        with torch.no_grad():
            pruned[0].weight.mul_(2)
        save_pruned(tmp_path, pruned, plan)
        fresh = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
        fresh[1].register_buffer("passing", torch.ones(8), persistent=False)
        for dense in (model, fresh):
            loaded, _ = load_pruned(tmp_path, dense, graph)
            assert torch.equal(loaded(IMAGES), pruned(IMAGES))


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_weights_stay_channels_last(tmp_path: Path, dims: int) -> None:
    conv, layout = (nn.Conv2d, torch.channels_last) if dims == 2 else (nn.Conv3d, torch.channels_last_3d)
    model = nn.Sequential(conv(3, 8, 3, padding=1), conv(8, 6, 1), conv(6, 4, 3)).to(memory_format=layout).eval()
    x = torch.randn(1, 3, *(8,) * dims).to(memory_format=layout)
    graph = trace(model, x)
    plan = half(graph)
    pruned = prune(model, graph, plan)
    save_pruned(tmp_path, pruned, plan)
    for network in (pruned, load_pruned(tmp_path, model, graph)[0]):
        for i in (0, 2):
            assert network[i].weight.is_contiguous(memory_format=layout)
            assert not network[i].weight.is_contiguous()
    contiguous = nn.Sequential(conv(3, 8, 3), conv(8, 4, 3))
    graph = trace(contiguous, x)
    assert all(p.is_contiguous() for p in prune(contiguous, graph, half(graph)).parameters())
