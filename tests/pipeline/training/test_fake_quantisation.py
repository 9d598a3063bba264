"""What a training believes of 8 bits is what the file does."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from secateur.export.qdq import SCHEMES, Calibration
from secateur.export.quantised import LayerSteps, QuantisedTemplate, Steps
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.training.fake_quantisation import fake_quantised
from secateur.pipeline.training.loop import fit
from secateur.pipeline.training.statistics import training_images
from secateur.pruning.surgery import prune
from secateur.pruning.trace import trace
from tests.export.nets import prepared, random_plan
from tests.export.test_quantised import images, outputs
from tests.pipeline.helpers import digits

Array = npt.NDArray[np.float32]


class Straight(nn.Module):
    """Layers one behind the other, with what is folded and what is clipped between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.project = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.project(self.depthwise(self.stem(x))), 1))


def oracle(file: bytes, x: Array) -> Array:
    """The file's arithmetic in NumPy: 8-bit numbers, sums of integers, 32-bit biases; x of shape (n, 3, 8, 8)."""
    graph = onnx.load_from_string(file).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer} | {"input": x}
    for node in graph.node:
        ins = [held[name] for name in node.input]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        match node.op_type:
            case "QuantizeLinear":
                limits = np.iinfo(ins[2].dtype)
                whole = np.rint(ins[0] / ins[1]) + ins[2].astype(np.float32)
                found = np.clip(whole, limits.min, limits.max).astype(ins[2].dtype)
            case "DequantizeLinear":
                shape = [1] * ins[0].ndim
                if ins[1].size > 1:
                    shape[attributes.get("axis", 1) % ins[0].ndim] = -1
                found = (ins[0].astype(np.int64) - ins[2].astype(np.int64).reshape(shape)) * ins[1].reshape(shape)
            case "Conv":
                groups, (_, _, size, _) = attributes["group"], ins[1].shape
                windows = np.lib.stride_tricks.sliding_window_view(ins[0], (size, size), (2, 3))
                parts = zip(np.split(windows, groups, 1), np.split(ins[1], groups), strict=True)
                found = np.concatenate([np.einsum("ncyxij,ocij->noyx", w, f) for w, f in parts], 1)
                found = found + ins[2].reshape(1, -1, 1, 1)
            case "Gemm":
                found = ins[0] @ ins[1].T + ins[2]
            case "Reshape" | "Flatten":
                found = ins[0].reshape(len(x), -1)
            case other:
                pytest.fail(f"the oracle does not know {other}")
        held[node.output[0]] = found
    return held[graph.output[0].name]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quantisation_is_the_files_arithmetic(scheme: str) -> None:
    model, x = prepared(Straight()), images(8, seed=1)
    graph = trace(model, torch.from_numpy(x[:1]))
    template = OnnxTemplate.export(model, torch.from_numpy(x[:1]), graph)
    quantised = QuantisedTemplate.make(template, Calibration(images(), scheme))
    plan = random_plan(graph)
    pruned = prune(model, graph, plan).eval()
    file = quantised.slice(plan, pruned.state_dict())
    expected = oracle(file, x)
    step = quantised.steps[-1].output
    assert step is not None and len(quantised.steps) == 4
    with torch.no_grad(), fake_quantised(pruned, quantised.steps) as layers:
        found = pruned(torch.from_numpy(x)).numpy()
        again = copy.deepcopy(pruned)(torch.from_numpy(x)).numpy()
    assert layers == 4 and np.array_equal(found, again)
    apart = np.abs(found - expected) / step.scale
    assert apart.mean() < 0.15 and apart.max() < 4  # roundings that tip over now and then; 8-bit noise is larger
    with torch.no_grad():
        plain = pruned(torch.from_numpy(x)).numpy()
    assert np.abs(plain - expected).mean() > 2 * np.abs(found - expected).mean()
    if scheme == "U8S8":
        assert np.abs(outputs(file, x) - expected).max() <= step.scale * 1.01


def test_weights_learn_and_nothing_of_it_stays() -> None:
    model = prepared(Straight())
    x = torch.from_numpy(images(4))
    graph = trace(model, x[:1])
    template = OnnxTemplate.export(model, x[:1], graph)
    quantised = QuantisedTemplate.make(template, Calibration(images()))
    names, plain = list(model.state_dict()), model(x)
    with fake_quantised(model, quantised.steps):
        model(x).square().sum().backward()
        assert list(model.state_dict()) == names
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert torch.equal(model(x), plain)


def test_a_network_learns_to_live_with_coarse_steps(tmp_path: Path) -> None:
    """With three values a weight it is lost; a training that knows them brings it back, one that does not cannot."""
    workload, compute = digits(image_size=8), torch.device("cpu")
    torch.manual_seed(0)
    model = workload.build_model()
    terms = {"seed": 0, "checkpoint": tmp_path / "a.ckpt", "compute": compute}
    recipe = Recipe(epochs=2, lr=0.1, batch_size=64, autocast="fp32")
    fit(model, workload, workload.train, recipe, **terms)  # type: ignore[arg-type]
    graph = trace(model, workload.example_input())
    template = OnnxTemplate.export(model, workload.example_input(), graph)
    seen = next(iter(training_images(workload, workload.train, 100, compute)))
    steps = [coarse(layer) for layer in QuantisedTemplate.make(template, Calibration(seen.contiguous().numpy())).steps]
    everything = torch.arange(len(workload.search))
    held, labels = workload.batch(workload.search, everything, train=False, generator=None, device=compute)

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad(), fake_quantised(network, steps):
            return workload.metrics(network(held), labels)["top1"]

    again = recipe.model_copy(update={"epochs": 1, "lr": 0.02})
    plain, aware = copy.deepcopy(model), copy.deepcopy(model)
    fit(plain, workload, workload.train, again, **terms)  # type: ignore[arg-type]
    with fake_quantised(aware, steps):
        fit(aware, workload, workload.train, again, **terms)  # type: ignore[arg-type]
    assert accuracy(aware) > accuracy(plain) + 0.2


def coarse(layer: LayerSteps) -> LayerSteps:
    """The same ranges: inputs and outputs in 3 bits, weights in three values."""

    def of(steps: Steps) -> Steps:
        low, high = ((end - steps.zero) * steps.scale for end in (steps.least, steps.most))
        scale = (high - low) / 7
        return Steps(scale, round(-low / scale), 0, 7)

    return replace(layer, input=of(layer.input), output=layer.output and of(layer.output), stored=Steps(0.0, 0, -1, 1))
