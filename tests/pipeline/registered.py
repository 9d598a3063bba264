"""Small real models and versions for the tests of the registry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LogisticRegression

from secateur.pipeline.tracking import Decision, Gate, Registry, Version
from tests.pipeline.helpers import TINY, digits, merged

EXAMPLE = np.zeros((1, 1, 8, 8), np.float32)
OUTPUTS = np.zeros((1, 10), np.float32)


def linear_model(file: Path, *, noise: float = 0.0, extra: int = 0, seed: int = 0) -> Path:
    """A logistic regression of the digits as ONNX.

    Args:
        noise: added to its weights, so that it is worse.
        extra: how many 256 x 256 matrices (a quarter of a megabyte each) come before it, so that it is slower.
    """
    weights, bias = fitted()
    weights = weights + noise * np.random.default_rng(seed).normal(size=weights.shape).astype(np.float32)
    tensors = {"weights": weights, "bias": bias, "shape": np.array([1, 64], np.int64)}
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["x0"])]
    if extra:  # x + 0 * (x @ A @ B ...): the same answers, with work
        tensors |= {"into": np.zeros((64, 256), np.float32), "out": np.zeros((256, 64), np.float32)}
        nodes.append(helper.make_node("MatMul", ["x0", "into"], ["m0"]))
        for i in range(extra):
            tensors[f"a{i}"] = np.full((256, 256), 1e-3 * i, np.float32)
            nodes.append(helper.make_node("MatMul", [f"m{i}", f"a{i}"], [f"m{i + 1}"]))
        nodes.append(helper.make_node("MatMul", [f"m{extra}", "out"], ["none"]))
        nodes.append(helper.make_node("Add", ["x0", "none"], ["x1"]))
    nodes.append(helper.make_node("Gemm", ["x1" if extra else "x0", "weights", "bias"], ["output"]))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file


_FITTED: list[Any] = []


def fitted() -> tuple[np.ndarray, np.ndarray]:
    """Weights (64, 10) and bias (10,) for normalised digits."""
    if not _FITTED:
        workload = digits(image_size=8)
        pixels = workload.train.source.read(workload.train.indices).astype(np.float32)
        flat = ((pixels - float(workload.mean)) / float(workload.std)).reshape(len(pixels), -1)
        model = LogisticRegression(max_iter=500).fit(flat, workload.train.source.labels[workload.train.indices])
        _FITTED.append((model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)))
    found: tuple[np.ndarray, np.ndarray] = _FITTED[0]
    return found


def add(
    registry: Registry,
    folder: Path,
    model: Path,
    run: str,
    device: str = "quick",
    own_gate: str = "passed",
    base: Mapping[str, Any] | None = None,
    **config: Any,
) -> Version:
    """A version as a run would register it; the challenger of its device.

    Args:
        base: its run file; None = the tiny one.
        config: changes of that.
    """
    workload = digits(image_size=8)
    parts = folder / f"parts-{run}"
    parts.mkdir(parents=True, exist_ok=True)
    tiny = {**merged(TINY, {"workload": {"data": {"augment": "none"}}}), "device": {"profile": "local"}}
    parity = {"ok": True, "max_relative_error": 1e-6, "tolerance": 1e-4}
    made = {
        "run.yaml": yaml.safe_dump(merged(dict(base or tiny), config)),
        "usage.json": json.dumps(dict(workload.usage)),
        "parity.json": json.dumps({"compact": parity}),
        "gate.json": json.dumps({"passed": own_gate == "passed", "metric": "top1", "checks": [], "models": {}}),
    }
    for name, text in made.items():
        (parts / name).write_text(text)
    version = registry.add(
        "net",
        device,
        model,
        run_key=run,
        example=EXAMPLE,
        outputs=OUTPUTS,
        experiment="tests",
        tags={"gate": own_gate, "precision": "fp32"},
        description="# net",
        files=[parts / name for name in made],
        facts={"data": workload.fingerprint, "device": {"name": device, "fingerprint": "f"}},
    )
    registry.challenge("net", version.version, device)
    return version


def decided(version: Version, champion: Version | None, device: str = "quick", ok: bool = True) -> Decision:
    """A decision that lets a version become the champion, or does not."""
    gates = (Gate("p50 ratio", 0.9, 1.05, ok, "made up", 0.88, 0.92),)
    return Decision(version.name, version.version, device, champion and champion.version, gates)


def crown(registry: Registry, version: Version, device: str = "quick") -> None:
    """Promote without measuring."""
    found = decided(version, registry.champion(version.name, device), device)
    registry.promote(version.name, version.version, device, found)


def migrated_home(folder: Path, template: Path) -> Path:
    """A SECATEUR_HOME with a fresh MLflow store (a copy: migrations take seconds)."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template, folder / "mlflow.db")
    return folder


def make_template(path: Path) -> Path:
    """A migrated, empty MLflow database."""
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def embedded(home: Path) -> Registry:
    return Registry(f"sqlite:///{home}/mlflow.db", home)
