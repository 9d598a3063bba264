from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.export.artifact import ExportedModel
from secateur.pipeline.run import hop_table
from secateur.pipeline.run.facts import ExportedNetwork, Hop, ParityFacts, ProofHop

METRICS = {
    hop_table.DENSE: 0.9,
    hop_table.PRUNED: 0.85,
    hop_table.BASELINE: 0.9,
    hop_table.COMPACT: 0.85,
    hop_table.ROUNDED: 0.80,
}


def parity(error: float = 1e-6, reason: str = "") -> ParityFacts:
    return ParityFacts(ok=not reason, max_relative_error=error, reason=reason, argmax_agreement=1.0, samples=64)


def network(precision: str = "fp32", **keys: Any) -> ExportedNetwork:
    named: dict[str, Any] = dict.fromkeys(ExportedModel.__dataclass_fields__)
    model = ExportedModel(**{**named, "path": Path("compact.onnx"), "precision": precision})
    return ExportedNetwork(**{"artifact": model, "parity": parity(), **keys})


def table(compact: ExportedNetwork, max_drop: float | None = 0.1) -> tuple[ProofHop, ...]:
    return hop_table.of_export(network(), compact, parity(2e-6), 1e-4, METRICS, max_drop, "Conv stem, tensor conv2d")


def test_every_step_has_its_error_its_tolerance_and_the_metric_of_the_very_file() -> None:
    hops = table(network("int8", rounded=parity(0.07)))
    assert [(hop.name, hop.error, hop.tolerance, hop.metric_expected, hop.metric) for hop in hops] == [
        ("cut", 2e-6, 1e-4, 0.9, 0.85),
        ("baseline as ONNX", 1e-6, 1e-4, 0.9, 0.9),
        ("compact as ONNX", 1e-6, 1e-4, 0.85, 0.85),
        ("compact in int8", 0.07, None, 0.85, 0.80),
    ]
    assert hop_table.first_broken(hops) is None and len(table(network())) == 3


def test_the_first_step_that_breaks_is_named_with_its_tensor() -> None:
    broken = hop_table.first_broken(table(network("int8", rounded=parity(0.07)), max_drop=0.02))
    assert broken is not None and broken.startswith("compact in int8: the metric falls by 0.0500, more than 0.02")
    assert broken.endswith("the first tensor that differs: Conv stem, tensor conv2d")
    wrong = network("int8", parity=parity(1.0, "relative error 1 exceeds 0.0001"), rounded=parity(0.07))
    broken = hop_table.first_broken(table(wrong, max_drop=0.02))
    assert broken == "compact as ONNX: relative error 1 exceeds 0.0001"
    apart = {hop_table.COMPACT: "Conv layer1.conv, tensor relu"}
    hops = hop_table.of_export(network(), wrong, parity(2e-6), 1e-4, METRICS, 0.02, "Conv stem", apart)
    told = (
        "compact as ONNX: relative error 1 exceeds 0.0001; the first tensor that differs: Conv layer1.conv, tensor relu"
    )
    assert hop_table.first_broken(hops) == told and [hop.tensor for hop in hops[:2]] == ["", ""]


@pytest.mark.parametrize("reason", ["", "cannot be run"])
def test_a_device_is_the_last_step(reason: str) -> None:
    at: dict[str, Any] = {"network": "compact", "device": "pi", "runtime": "ncnn", "error": 1e-7, "tolerance": 1e-4}
    hop = hop_table.of_device(Hop(**at, metric=0.7, metric_here=0.7, samples=8, reason=reason))
    assert (hop.name, hop.ok, hop.metric) == ("compact in ncnn on pi", not reason, 0.7)
