from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx.reference import ReferenceEvaluator
from torch import nn

from secateur.export import TemplateError, export_onnx, open_session, verify_parity
from secateur.export.shapes import _gather, _reshape_target, _segments, _Side, _slice
from secateur.export.slicing import OnnxTemplate, _compare, candidate_onnx
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.export import nets
from tests.export.nets import prepared, random_plan

SMALL = (1, 3, 8, 8)


def traced(
    model: nn.Module, shape: tuple[int, ...] = SMALL
) -> tuple[nn.Module, torch.Tensor, ChannelGraph, OnnxTemplate]:
    model, x = prepared(model), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = trace(model, x)
    return model, x, graph, OnnxTemplate.export(model, x, graph)


def assert_slices_like_torch(model: nn.Module, x: torch.Tensor, graph: ChannelGraph, template: OnnxTemplate) -> None:
    for seed in range(3):
        plan = random_plan(graph, seed)
        assert not plan.is_full
        pruned = prune(model, graph, plan)
        parity = template.check(plan, pruned, x)
        assert parity.max_relative_error < 1e-5
        assert verify_parity(
            template.slice(plan), pruned, [x], 1e-5
        ).ok  # the template's own weights are the dense ones


@pytest.mark.parametrize("name", ["Flat", "Mobile", "Shuffle", "Attention", "Follows"])
def test_sliced_equals_pruned(name: str):
    assert_slices_like_torch(*traced(getattr(nets, name)()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_sliced_equals_pruned_on_torchvision_networks(name: str):
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    assert_slices_like_torch(*traced(model, (1, 3, 32, 32)))


class Normalised(nn.Module):
    """L2Norm as users of SSDs write it, on a map that another head reads as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.linspace(5, 20, 8))
        self.near, self.far = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        near = nn.functional.normalize(x, dim=1) * self.scale.view(1, -1, 1, 1)
        return torch.cat([self.near(near).flatten(1), self.far(x).flatten(1)], 1)


class Cosine(nn.Module):
    """A hidden layer of cosines (both sides of its weight are cut), and a gate of one number per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = (x * torch.sigmoid(self.gate(x)).expand_as(x)).mean((2, 3))
        weight = nn.functional.normalize(self.hidden.weight)
        return self.head(nn.functional.linear(nn.functional.normalize(x), weight))


@pytest.mark.parametrize("build", [Normalised, Cosine])
def test_what_is_expanded_to_a_width_in_the_code_follows_it(build: type[nn.Module], tmp_path: Path):
    model, x, graph, template = traced(build())
    assert_slices_like_torch(model, x, graph, template)
    plan = random_plan(graph)
    exported = export_onnx(prune(model, graph, plan), x, tmp_path / "export.onnx")
    cut = optimised_operators(template.slice(plan), tmp_path / "a.onnx")
    assert cut == optimised_operators(exported.path, tmp_path / "b.onnx")
    assert cut["Expand"]
    outputs = [open_session(data).run(None, {"input": x.numpy()})[0] for data in (template.slice(plan), exported.path)]
    assert np.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(("groups", "channels"), [(1, 8), (2, 8), (4, 16), (8, 16), (16, 32), (32, 64), (8, 8)])
@pytest.mark.parametrize("size", [8, 4])
def test_group_norms_keep_their_groups_and_follow_the_width(groups: int, channels: int, size: int):
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(channels, 4, 1)).eval()
    x = torch.randn(2, 3, size, size)
    graph = trace(model, x)
    template = OnnxTemplate.export(model, x, graph)
    group = graph.groups[0]
    for kept in (range(group.size), range(max(1, group.size // 2)), (group.size - 1,)):
        plan = PruningPlan.full(graph.groups).replace({group.name: kept})
        assert template.check(plan, prune(model, graph, plan), x).ok


def test_lists_and_mappings_in_and_several_outputs(tmp_path: Path):
    model = prepared(nets.Heads())
    example = ([torch.randn(SMALL), torch.randn(SMALL)], {"scale": torch.tensor(0.5)})
    graph = trace(model, *example)
    template = OnnxTemplate.export(model, example, graph)
    plan = random_plan(graph)
    pruned = prune(model, graph, plan)
    assert template.check(plan, pruned, example).max_relative_error < 1e-5
    assert len(candidate_onnx(template, pruned, example, plan, tmp_path / "c.onnx").outputs) == 4
    with torch.no_grad():
        pruned.scores.bias += 1e-2  # boxes are a thousand times larger and must not hide it
    with pytest.raises(TemplateError, match="computes something else"):
        _compare(template.slice(plan), pruned, example, 1e-5)


def optimised_operators(data: bytes | Path, path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    source = data if isinstance(data, bytes) else str(data)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_a_cut_file_is_fused_like_an_optimised_export(tmp_path: Path):
    """Else the search would time another graph than the one that is shipped."""
    model, x, graph, template = traced(nets.Mobile())
    plan = random_plan(graph)
    exported = export_onnx(prune(model, graph, plan), x, tmp_path / "export.onnx")
    cut = optimised_operators(template.slice(plan), tmp_path / "a.onnx")
    assert cut == optimised_operators(exported.path, tmp_path / "b.onnx")
    assert "BatchNormalization" not in cut


@pytest.fixture(scope="module")
def flat() -> tuple[nn.Module, torch.Tensor, ChannelGraph, OnnxTemplate]:
    return traced(nets.Flat())


def test_full_plan_changes_nothing(flat):
    model, x, graph, template = flat
    assert template.check(PruningPlan.full(graph.groups), model, x).max_relative_error < 1e-5


def test_other_weights_dense_or_pruned(flat):
    _, x, graph, template = flat
    other = prepared(nets.Flat(), seed=5)
    plan = random_plan(graph)
    pruned = prune(other, graph, plan)
    for state in (other.state_dict(), pruned.state_dict(), {k: v.numpy() for k, v in other.state_dict().items()}):
        assert verify_parity(template.slice(plan, state), pruned, [x], 1e-5).ok
    assert not verify_parity(template.slice(plan), pruned, [x], 1e-5).ok
    with pytest.raises(TemplateError, match=r"features\.0\.weight has shape \(3, 3\)"):
        template.slice(plan, {"features.0.weight": np.zeros((3, 3))})


def test_slices_are_independent_of_each_other(flat, tmp_path: Path):
    _, _, graph, template = flat
    first = template.slice(random_plan(graph, 1))
    template.slice(random_plan(graph, 2))
    template.write(random_plan(graph, 1), tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == first


def test_a_template_is_read_back_from_its_file_and_a_damaged_one_refused(flat, tmp_path: Path):
    model, x, graph, template = flat
    plan = random_plan(graph, 1)
    OnnxTemplate.export(model, x, graph, tmp_path / "t.onnx")
    again = OnnxTemplate.load(tmp_path / "t.onnx", graph)
    assert np.array_equal(
        open_session(again.slice(plan)).run(None, {"input": x.numpy()})[0],
        open_session(template.slice(plan)).run(None, {"input": x.numpy()})[0],
    )
    content = (tmp_path / "t.onnx").read_bytes()
    (tmp_path / "t.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(TemplateError, match=r"cannot read template"):
        OnnxTemplate.load(tmp_path / "t.onnx", graph)


def test_nothing_stale_in_the_file(flat):
    _, _, graph, template = flat
    proto = onnx.load_from_string(template.slice(random_plan(graph)))
    assert not proto.graph.value_info
    onnx.checker.check_model(proto, full_check=True)  # with strict shape inference


def test_check_refuses_another_model(flat):
    model, x, graph, template = flat
    with pytest.raises(TemplateError, match="neither the dense"):
        template.check(random_plan(graph), prune(model, graph, random_plan(graph, 9)), x)
    bad = prune(model, graph, random_plan(graph))
    bad.classifier[2].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(TemplateError, match="computes something else"):
        template.check(random_plan(graph), bad, x)


class FakeGraph:
    """Says what is told; for networks that the tracer would rather freeze."""

    def __init__(self, groups: Any, cuts: dict[str, int], scaled: tuple[str, ...] = ()) -> None:
        self.groups, self._cuts, self.scaled_groups = groups, cuts, scaled

    def slices(self, plan: PruningPlan) -> dict[str, dict[int, np.ndarray]]:
        kept = np.array(next(iter(plan.kept.values())))
        return {tensor: {dim: kept} for tensor, dim in self._cuts.items()}


def fake(cuts: dict[str, int]) -> FakeGraph:
    from secateur.pruning.plan import ChannelGroup

    return FakeGraph((ChannelGroup("conv", 8),), cuts)


def test_fixed_channels_cannot_follow():
    graph = fake({"conv.weight": 0, "conv.bias": 0})
    with pytest.raises(TemplateError, match="takes fixed positions of a pruned dimension"):
        OnnxTemplate.export(prepared(nets.Picks()), torch.randn(SMALL), graph)


def test_missing_initializer():
    with pytest.raises(TemplateError, match=r"no initializers \['other.weight'\]"):
        OnnxTemplate.export(prepared(nets.Picks()), torch.randn(SMALL), fake({"other.weight": 0}))


def test_shapes_that_do_not_fit_together():
    with pytest.raises(TemplateError, match="do not follow the widths"):  # only one of two tied tensors is cut
        OnnxTemplate.export(prepared(nets.Mobile()), torch.randn(SMALL), fake({"stem.1.weight": 0}))


def test_candidate_is_cut_where_possible(flat, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, x, graph, template = flat
    plan = random_plan(graph)
    pruned = prune(model, graph, plan)
    exported = candidate_onnx(template, pruned, x, plan, tmp_path / "c.onnx")
    assert exported.plan_digest == plan.digest
    assert exported.path.read_bytes() == template.slice(plan, pruned.state_dict())
    assert not caplog.records


class Broken:
    def slice(self, plan: PruningPlan, state: Any = None) -> bytes:
        raise TemplateError("a baked-in shape")


class Wrong:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def slice(self, plan: PruningPlan, state: Any = None) -> bytes:
        return self.data


@pytest.mark.parametrize("build", [nets.Flat, nets.Mobile, nets.Shuffle, nets.Attention])
def test_an_optimised_cut_file_has_the_operators_and_values_of_an_export(build: type[nn.Module], tmp_path: Path):
    model, x, graph, template = traced(build())
    plan = random_plan(graph)
    pruned = prune(model, graph, plan)
    cut = candidate_onnx(template, pruned, x, plan, tmp_path / "cut.onnx", optimised=True)
    exported = export_onnx(pruned, x, tmp_path / "export.onnx")
    operators = [Counter(node.op_type for node in onnx.load(file.path).graph.node) for file in (cut, exported)]
    assert operators[0] == operators[1]
    assert (cut.inputs, cut.outputs, cut.opset) == (exported.inputs, exported.outputs, exported.opset)
    outputs = [open_session(file).run(None, {"input": x.numpy()})[0] for file in (cut, exported)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_candidate_falls_back_to_an_export_and_says_why(
    flat, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    model, x, graph, template = flat
    plan = random_plan(graph)
    pruned = prune(model, graph, plan)
    exported = candidate_onnx(None, pruned, x, plan, tmp_path / "c.onnx")
    assert verify_parity(exported, pruned, [x]).ok
    assert exported.plan_digest == plan.digest
    monkeypatch.setattr("secateur.export.slicing.export_onnx", lambda *_, **__: exported)
    wrong_values = template.slice(plan, {"classifier.2.bias": np.ones(5, dtype=np.float32)})
    reasons = {"a baked-in shape": Broken(), "computes something else": Wrong(wrong_values), "cannot open": Wrong(b"?")}
    for reason, bad in reasons.items():
        with caplog.at_level(logging.WARNING):
            found = candidate_onnx(bad, pruned, x, plan, tmp_path / "d.onnx")  # type: ignore[arg-type]
        assert found is exported
        assert reason in caplog.records[-1].getMessage()
        assert plan.digest in caplog.records[-1].getMessage()
        assert not (tmp_path / "d.onnx").exists()


def test_session_shape_is_the_pruned_one(flat):
    _, _, graph, template = flat
    plan = random_plan(graph)
    proto = onnx.load_from_string(template.slice(plan))
    dims = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    assert dims["features.0.weight"][0] == plan.widths["features.0"]
    assert dims["classifier.0.weight"] == (plan.widths["classifier.0"], plan.widths["features.3"] * 16)
    assert open_session(template.slice(plan)).get_outputs()[0].shape == [1, 5]


@pytest.mark.parametrize(
    ("s", "s2", "t", "target"),
    [
        ((1, 512, 1, 1), (1, 511, 1, 1), (1, 512), [1, -1]),  # global pooling, flatten
        ((1, 512, 7, 7), (1, 511, 7, 7), (1, 25088), [1, -1]),  # flatten
        ((1, 16, 4, 4), (1, 15, 4, 4), (1, 2, 8, 4, 4), None),  # 15 channels in 2 rows: no plan of the tracer
        ((1, 16, 4, 4), (1, 14, 4, 4), (1, 2, 8, 4, 4), [1, 2, -1, 4, 4]),  # shuffle: rows stay, columns shrink
        ((1, 2, 8, 4, 4), (1, 2, 7, 4, 4), (1, 16, 4, 4), [1, -1, 4, 4]),
        ((1, 9, 24), (1, 9, 20), (1, 9, 6, 4), [1, 9, -1, 4]),  # one of six heads of four
        ((1, 9, 24), (1, 9, 18), (1, 9, 6, 4), [1, 9, 6, -1]),  # one channel in each of six heads
        ((1, 56, 56, 96), (1, 56, 56, 95), (1, 8, 7, 8, 7, 96), [1, 8, 7, 8, 7, -1]),  # windows, channels last
        ((4, 16, 5), (4, 15, 5), (4, 16, 5), [4, 0, 5]),
        ((1, 9, 64), (1, 9, 48), (1, 9, 4, 16), [1, 9, -1, 16]),  # one of four heads, though 48 = 4 x 12 too
        ((1008, 16, 2, 2), (992, 16, 2, 2), (1, 63, 256, 4), [1, -1, 256, 4]),  # patches unfolded: 62 channels
        ((40, 30, 1, 1), (39, 29, 1, 1), (1, 40, 30), [1, -1, -1]),  # two widths: computed from the input's shape
    ],
)
def test_reshape_targets(s, s2, t, target):
    if target is None:
        with pytest.raises(TemplateError, match="no single dimension"):
            _reshape_target(s, s2, t, "r")
    else:
        assert _reshape_target(s, s2, t, "r") == target


def test_segments():
    assert _segments((1, 512, 1, 1), (1, 512)) == [([0], [0]), ([1, 2, 3], [1])]
    assert _segments((1, 6, 4), (1, 4, 6)) == [([0], [0]), ([1, 2], [1, 2])]


def side(**values: list[int]) -> _Side:
    return _Side(20, {}, {name: np.array(value, dtype=np.int64) for name, value in values.items()})


def test_gathering_everything_in_order_is_a_reshape():
    node = onnx.helper.make_node("Gather", ["x", "i"], ["y"], axis=0)
    constants = _gather(node, side(i=np.arange(8).reshape(1, 8, 1, 1)), (8,), (7,))  # type: ignore[arg-type]
    assert (node.op_type, list(node.input)) == ("Reshape", ["x", "y_follow"])
    assert onnx.numpy_helper.to_array(constants[0].attribute[0].t).tolist() == [1, -1, 1, 1]
    with pytest.raises(TemplateError, match="picks fixed positions"):
        _gather(onnx.helper.make_node("Gather", ["x", "i"], ["y"]), side(i=[1, 0, 2, 3, 4, 5, 6, 7]), (8,), (7,))


@pytest.mark.parametrize(
    ("start", "end", "kept"), [(0, 24, (0, 21)), (0, 99, (0, 21)), (8, 16, (7, 14)), (-8, 24, (14, 21)), (2, 5, None)]
)
def test_slices_along_a_width(start: int, end: int, kept: tuple[int, int] | None):
    """All of it, the second and the third of three parts, fixed positions; 24 channels shrink to 21."""
    node = onnx.helper.make_node("Slice", ["x", "s", "e", "a"], ["y"])
    constants = side(s=[start], e=[end], a=[1])
    if kept is None:
        with pytest.raises(TemplateError, match="takes fixed positions"):
            _slice(node, constants, (1, 24), (1, 21))
        return
    nodes = [*_slice(node, constants, (1, 24), (1, 21)), node]
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    given = [onnx.numpy_helper.from_array(value, name) for name, value in constants.values.items()]
    graph = onnx.helper.make_graph(nodes, "slice", ports[:1], ports[1:], given)
    x = np.arange(21, dtype=np.float32)[None]
    found = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, {"x": x})[0]
    assert found.tolist() == x[:, slice(*kept)].tolist()
