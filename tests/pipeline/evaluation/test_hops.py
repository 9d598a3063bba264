"""Files on devices: the same answers, and the first tensor that is none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from secateur.device_profiles import LocalTarget
from secateur.device_profiles.runtime import runtime_named
from secateur.export.convert import in_format
from secateur.export.folding import clean
from secateur.export.onnx_export import export_onnx
from secateur.export.qdq import Calibration
from secateur.export.quantised import QuantisedTemplate
from secateur.pipeline.evaluation import hops
from secateur.pipeline.workloads.networks.small import CifarResNet
from secateur.pruning.plan import PruningPlan
from tests.device_profiles import arm
from tests.device_profiles.tiny import quick_profile, skip_without
from tests.export import nets
from tests.export.test_quantised import images as pixels
from tests.export.test_quantised import templates


class Counting:
    """A workload of which only the metric is asked: the share of rows whose largest entry is the label's."""

    metric = "accuracy"

    def answers(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(1)

    def metrics(self, answers: torch.Tensor, labels: torch.Tensor) -> Mapping[str, float]:
        return {"accuracy": float((answers == labels).float().mean())}


class Altered:
    """A device whose convolution of a name has other weights than the file says: a stand-in for a kernel that errs."""

    def __init__(self, target: Any, weight: str) -> None:
        self.target, self.weight = target, weight

    def put(self, path: Path) -> str:
        if path.suffix != ".onnx":
            return str(self.target.put(path))
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.name == self.weight:
                tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), tensor.name))
        onnx.save(model, path)  # whoever asked digests it after this
        return str(self.target.put(path))

    def run(self, *arguments: Any) -> Any:
        return self.target.run(*arguments)

    def fetch(self, path: str, to: Path) -> None:
        self.target.fetch(path, to)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[LocalTarget]:
    (tmp_path / "lock").mkdir()
    opened = LocalTarget(env={"SECATEUR_LOCKS": str(tmp_path / "lock"), "SECATEUR_AGENT_STORE": str(tmp_path / "s")})
    yield opened
    opened.close()


def images(count: int) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([arm.noise(seed) for seed in range(count)]))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "ncnn"])
def test_several_images_give_the_same_numbers_and_metric(name: str, target: LocalTarget, tmp_path: Path):
    skip_without(name)
    file = arm.write_resnet(tmp_path / "m.onnx")
    target.runtime = runtime_named(name)
    workload: Any = Counting()
    with closing(in_format(target, target.runtime.format)) as there:
        found = hops.compare(workload, there, quick_profile(runtime=name), file, images(3), torch.arange(3))
    assert found.samples == 3 and found.error < 1e-5
    assert found.metric == found.metric_here


@pytest.mark.parametrize("layer", ["conv2", "conv9"])
def test_the_first_tensor_that_differs_is_named(layer: str, target: LocalTarget, tmp_path: Path):
    file, image = arm.write_resnet(tmp_path / "m.onnx"), arm.noise(0)
    altered: Any = Altered(target, f"{layer}.weight")
    whole = hops.first_divergence(altered, quick_profile(), file, image, 1e-4)
    assert whole == f"Conv {layer}, tensor {layer}"
    assert hops.first_divergence(target, quick_profile(), file, image, 1e-4) == ""


@pytest.mark.parametrize("folded", [False, True], ids=["as exported", "batch norm folded"])
@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv1", "layer3.0.conv2", "linear"])
def test_the_first_layer_of_a_file_that_is_not_pytorchs_is_named(layer: str, folded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, file = CifarResNet(1).eval(), tmp_path / "m.onnx"
    image = torch.randn(1, 3, 32, 32)
    export_onnx(network, image, file)
    model = onnx.load(file)
    if folded:
        model, _ = clean(model)
        onnx.save(model, file)
    assert hops.first_apart(network, file, image.numpy(), 1e-4) == ""
    (tensor,) = [t for t in model.graph.initializer if t.name == f"{layer}.weight"]
    tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, file)
    named = hops.first_apart(network, file, image.numpy(), 1e-4)
    kind = "Gemm" if layer == "linear" else "Conv"
    assert named.startswith(f"{kind} {layer}, tensor ")
    assert ("all agree" in named) == (layer != "conv1")


def test_what_is_no_number_differs_infinitely():
    one = np.ones((1, 2), np.float32)
    assert hops.relative_error(np.array([[1, np.nan]], np.float32), one) == float("inf")
    assert hops.relative_error(np.ones((2, 1), np.float32), one) == float("inf")
    assert hops.relative_error(one * 1.5, one) == 0.5


def test_the_first_layer_that_8_bits_spoil_is_named() -> None:
    """Ranges of dark images clip a bright one at once."""
    _, graph, template, quantised = templates(nets.Mobile())
    dark = QuantisedTemplate.make(template, Calibration(pixels() / 100))
    full, image = PruningPlan.full(graph.groups), pixels(1)
    told = hops.first_rounded(template.slice(full), dark.slice(full), image)
    assert told == "Conv stem.0, tensor hardtanh"
    assert hops.first_rounded(template.slice(full), quantised.slice(full), image) == ""
