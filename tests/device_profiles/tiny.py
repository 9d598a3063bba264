"""Tiny ONNX models and synthetic measurements for the tests of this folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from secateur.device_profiles import BenchmarkResult, DeviceProfile, Tier
from secateur.device_profiles.measure import ModelSamples, Process

QUICK = Tier(processes=1, warmup=1, min_repeats=5, min_seconds=0.0)


EXTRAS = {"openvino": ("openvino",), "ncnn": ("ncnn", "pnnx")}
"""Runtimes and formats that an extra brings, with its packages."""


def skip_without(name: str) -> None:
    """Skip a test of a runtime or format whose extra is not installed here."""
    missing = [package for package in EXTRAS.get(name, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install 'secateur[{name}]'")


def quick_profile(**changes: object) -> DeviceProfile:
    return DeviceProfile.model_validate({"name": "test", "search": QUICK, "final": QUICK, **changes})


def write_conv(path: Path, channels: int = 4, batch: int | str = 1) -> Path:
    """One convolution, 8 x 8 pixels."""
    weight = np.random.default_rng(0).standard_normal((channels, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "weight"], ["output"], pads=[1] * 4)],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, channels, 8, 8])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def synthetic(
    true_ratio: float = 1.0,
    processes: int = 1,
    repeats: int = 60,
    offset: float = 0.0,
    noise: float = 0.02,
    seed: int = 0,
    **changes: object,
) -> BenchmarkResult:
    """Models ``a`` (10 ms) and ``b`` (``true_ratio`` times that).

    Args:
        offset: standard deviation of the log ratio between processes.
        noise: standard deviation of the log latency between calls.
    """
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(processes):
        shift = np.exp(rng.normal(0, offset))
        a = 10 * np.exp(rng.normal(0, noise, repeats))
        b = 10 * true_ratio * shift * np.exp(rng.normal(0, noise, repeats))
        models = {
            name: ModelSamples(tuple((1.01 * x).tolist()), tuple(x.tolist()), 5.0, 12.0, "00", 1000)
            for name, x in (("a", a), ("b", b))
        }
        runs.append(Process(models, {"cpu_pressure": 0.0}, 0.0, 1.0))
    fields = {"profile": "test", "tier": "final" if processes > 1 else "search", "names": ("a", "b")}
    fields |= {"sha256": {"a": "0", "b": "1"}, "statistic": "cpu", "processes": tuple(runs), "seed": seed}
    return BenchmarkResult(**{**fields, **changes})  # type: ignore[arg-type]
