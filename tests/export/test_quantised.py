from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from secateur.export import ExportError, TemplateError, open_session
from secateur.export.folding import clean
from secateur.export.onnx_export import export_proto
from secateur.export.qdq import SCHEMES, Calibration, quantise
from secateur.export.quantised import QuantisedTemplate
from secateur.export.slicing import OnnxTemplate
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.export import nets
from tests.export.nets import prepared, random_plan

SHAPE = (1, 3, 8, 8)
Images = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


def images(count: int = 16, shape: tuple[int, ...] = SHAPE[1:], seed: int = 0) -> Images:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def templates(
    model: nn.Module, scheme: str = "U8S8"
) -> tuple[nn.Module, ChannelGraph, OnnxTemplate, QuantisedTemplate]:
    model, x = prepared(model), torch.from_numpy(images(1))
    graph = trace(model, x)
    template = OnnxTemplate.export(model, x, graph)
    return model, graph, template, QuantisedTemplate.make(template, Calibration(images(), scheme))


def initializers(data: bytes) -> dict[str, npt.NDArray[np.generic]]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}


def outputs(data: bytes | str, x: Images) -> Images:
    session = open_session(data)
    return np.concatenate([session.run(None, {"input": x[i : i + 1]})[0] for i in range(len(x))])


def distance(found: Images, expected: Images) -> float:
    """Relative to the expected numbers, over all of them: single ones may lie outside of the ranges."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["Flat", "Mobile", "Shuffle", "Attention"])
def test_the_whole_plan_has_the_quantisers_own_numbers(name: str, scheme: str):
    _, graph, template, quantised = templates(getattr(nets, name)(), scheme)
    theirs = quantise(clean(template.proto())[0], Calibration(images(), scheme))
    ours = initializers(quantised.slice(PruningPlan.full(graph.groups)))
    assert quantised.layers
    for tensor in theirs.graph.initializer:
        expected, found = numpy_helper.to_array(tensor), ours[tensor.name]
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.allclose(found.astype(np.float64), expected.astype(np.float64), rtol=1e-6, atol=0), tensor.name


@pytest.mark.parametrize("name", ["Flat", "Mobile", "Shuffle", "Follows"])
def test_a_cut_file_is_near_the_pruned_network(name: str):
    model, graph, _, quantised = templates(getattr(nets, name)())
    x = images(8, seed=1)
    for seed in range(2):
        plan = random_plan(graph, seed)
        pruned = prune(model, graph, plan)
        with torch.no_grad():
            expected = pruned(torch.from_numpy(x)).numpy()
        found = outputs(quantised.slice(plan, pruned.state_dict()), x)
        assert distance(found, expected) < 0.1
        assert np.array_equal(found, outputs(quantised.slice(plan), x))  # the template's own weights are the dense ones


def test_statistics_and_weights_of_the_current_state_count():
    """8-bit weights cut from the dense network's would keep its batch norm: accuracy falls to chance (measured)."""
    model, graph, _, quantised = templates(nets.Mobile())
    plan, x = random_plan(graph), images(8, seed=2)
    pruned = prune(model, graph, plan)
    with torch.no_grad():
        for module in pruned.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(4.0)  # type: ignore[union-attr]
                module.running_mean.add_(0.1)  # type: ignore[union-attr]
        expected = pruned(torch.from_numpy(x)).numpy()
    near, stale = (
        np.abs(outputs(quantised.slice(plan, state), x) - expected).max() for state in (pruned.state_dict(), None)
    )
    assert near < 0.1 * np.abs(expected).max() < stale


def test_the_bias_of_a_dead_channel_fits_into_32_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    with torch.no_grad():
        model[0].weight[1] = 1e-12  # a scale of its own would make the bias 1e12
        model[0].bias[1] = 0.7
        assert isinstance(model[0].weight, torch.Tensor)
    x = images(8)
    _, graph, _, quantised = templates(model)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    found = outputs(quantised.slice(PruningPlan.full(graph.groups)), x)
    assert distance(found, expected) < 0.05


def test_batch_norm_is_folded_and_bounds_are_initializers():
    _, graph, template, quantised = templates(nets.Mobile())
    network, folds = clean(template.proto())
    operators = [node.op_type for node in network.graph.node]
    assert len(folds) == 2 and "BatchNormalization" not in operators and "Constant" not in operators
    names = {tensor.name for tensor in network.graph.initializer}
    assert {"stem.0.weight", "stem.1.bias", "depthwise.weight"} <= names  # those of the state dict
    x = images(4)
    assert np.allclose(
        outputs(network.SerializeToString(), x), outputs(template.slice(PruningPlan.full(graph.groups)), x), atol=1e-5
    )
    left = [node.op_type for node in onnx.load_from_string(quantised.slice(PruningPlan.full(graph.groups))).graph.node]
    assert "Clip" not in left and "Relu" not in left  # the range of what follows says it


def test_layers_may_stay_in_float():
    model, graph, template, quantised = templates(nets.Mobile())
    first, full = quantised.layers[0], PruningPlan.full(graph.groups)
    mixed = QuantisedTemplate.make(template, Calibration(images(), floats=frozenset({first})))
    assert mixed.layers == quantised.layers[1:]
    plan, x = random_plan(graph), images(8, seed=1)
    pruned = prune(model, graph, plan)
    assert initializers(mixed.slice(plan, pruned.state_dict()))[first].dtype == np.float32
    exact = outputs(template.slice(full), x)
    errors = [np.abs(outputs(t.slice(full), x) - exact).mean() for t in (mixed, quantised)]
    assert errors[0] < errors[1]


def test_made_once_for_the_same_network_images_and_scheme(tmp_path: Path):
    _, graph, template, _ = templates(nets.Flat())
    full = PruningPlan.full(graph.groups)
    made = [
        QuantisedTemplate.make(template, Calibration(images(seed=s), k), tmp_path)
        for s, k in ((0, "U8S8"), (0, "U8S7"), (1, "U8S8"))
    ]
    files = sorted(tmp_path.iterdir())
    stamps = [file.stat().st_mtime_ns for file in files]
    again = QuantisedTemplate.make(template, Calibration(images()), tmp_path)
    assert len(files) == 3 and [file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())] == stamps
    assert again.slice(full) == made[0].slice(full)
    for file in files:
        file.write_bytes(file.read_bytes()[:200])  # a full disk
    assert QuantisedTemplate.make(template, Calibration(images()), tmp_path).slice(full) == made[0].slice(full)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda x: x[:0], "missing"),
        (lambda x: np.where(np.arange(len(x))[:, None, None, None] == 3, np.nan, x), "NaN .* image 3"),
        (lambda x: np.where(x > 0, np.inf, x), "infinite"),
        (lambda x: np.zeros_like(x), r"all the same number \(0\)"),
    ],
)
def test_bad_calibration_images_are_refused(spoil, told: str):
    with pytest.raises(ExportError, match=told):
        Calibration(spoil(images()).astype(np.float32))


def test_images_of_another_size_are_refused():
    _, _, template, _ = templates(nets.Flat())
    with pytest.raises(ExportError, match=r"shape \(3, 9, 9\).*\(3, 8, 8\)"):
        QuantisedTemplate.make(template, Calibration(images(4, (3, 9, 9))))
    with pytest.raises(ExportError, match="unknown int8 scheme 'U4S4'"):
        Calibration(images(), "U4S4")


def test_weights_that_are_not_finite_are_refused():
    model, graph, _, quantised = templates(nets.Flat())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["features.0.weight"][0] = float("nan")
    with pytest.raises(TemplateError, match=r"features\.0\.weight has NaN"):
        quantised.slice(PruningPlan.full(graph.groups), state)


# -- kernels without VNNI ------------------------------------------------------------------------------------------


def linear(made: onnx.ModelProto, x: Images, *, saturates: bool) -> Images:
    """What a quantised network of one linear layer gives, by the definition of its numbers.

    Args:
        saturates: each two 8-bit products are added up in 16 bits, as x86 without VNNI does (``vpmaddubsw``).
    """
    numbers = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}

    def of(name: str) -> tuple[npt.NDArray[np.float64], Numbers]:
        return numbers[f"{name}_scale"].astype(np.float64), numbers[f"{name}_zero_point"].astype(np.int64)

    (scale, zero), (scales, _), (out_scale, out_zero) = of("input"), of("weight"), of("logits")
    weight = numbers["weight_quantized"].astype(np.int64) - int(np.ravel(of("weight")[1])[0])
    stored = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    products = stored[:, None, :] * weight
    pairs = products.reshape(*products.shape[:2], -1, 2).sum(3)
    if saturates:
        pairs = np.clip(pairs, np.iinfo(np.int16).min, np.iinfo(np.int16).max)
    total = pairs.sum(2) - zero * weight.sum(1) + numbers["bias_quantized"]
    rounded = np.clip(np.rint(total * scale * scales / out_scale) + out_zero, 0, 255)
    return ((rounded - out_zero) * out_scale).astype(np.float32)


@pytest.mark.parametrize("scheme", ["U8S8", "U8S7", "U8U8"])
def test_files_compute_what_their_numbers_say_and_seven_bits_do_so_without_vnni_too(scheme: str):
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    with torch.no_grad():
        model.weight.copy_(torch.where(torch.rand(8, 16) < 0.9, 1.0, -1.0))  # sums of pairs as large as can be
    x = np.random.default_rng(0).uniform(0.5, 1.0, (8, 16)).astype(np.float32)
    network, _ = clean(export_proto(model, torch.from_numpy(x[:1]), optimize=False))
    made = quantise(network, Calibration(x, scheme))
    found = outputs(made.SerializeToString(), x)
    exact, clipped = (linear(made, x, saturates=saturates) for saturates in (False, True))
    step = 1.01 * float(next(numpy_helper.to_array(t) for t in made.graph.initializer if t.name == "logits_scale"))
    if scheme == "U8S8":
        assert np.abs(clipped - exact).max() > 20 * step
        assert min(np.abs(found - exact).max(), np.abs(found - clipped).max()) <= step
    else:
        assert np.abs(found - exact).max() <= step  # on any processor
    if scheme == "U8S7":
        assert np.array_equal(clipped, exact)


def test_what_brings_outputs_into_shape_stays_in_float():
    """Boxes and scores that are joined would share one range of 8 bits."""
    _, graph, _, quantised = templates(nets.Shuffle())
    nodes = onnx.load_from_string(quantised.slice(PruningPlan.full(graph.groups))).graph.node
    made = {name: node.op_type for node in nodes for name in node.output}
    assert made["logits"] == "ReduceMean"
    assert "Concat" in made.values() and made[next(n.input[0] for n in nodes if n.op_type == "Concat")] == (
        "DequantizeLinear"  # one that a layer reads is in 8 bits
    )
