"""Both networks as verified ONNX files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from secateur.pipeline.progress import Silent
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages.export import export

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_parity_and_certificate_hold(finished: Any) -> None:
    _, facts = finished
    proofs = [facts.search.certificate, facts.export.certificate]
    for proof in [*proofs, *(network.parity for network in facts.export.networks)]:
        assert proof.ok
        assert proof.max_relative_error < 1e-5


def test_every_file_is_named_with_its_digest(finished: Any) -> None:
    _, facts = finished
    assert facts.export.files == {
        "baseline.onnx": facts.export.baseline.artifact.sha256,
        "compact.onnx": facts.export.compact.artifact.sha256,
    }


def test_files_say_where_they_are_from(finished: Any) -> None:
    run, facts = finished
    model = onnx.load(run.directory / "compact.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["run"] == run.run_id and told["precision"] == "fp32"
    assert told["plan_digest"] == facts.finetune.best.candidate.plan.digest
    assert json.loads(told["versions"]).keys() == {"secateur", "torch", "onnx", "onnxscript"}
    assert {
        name: json.loads(told[name]) for name in ("mean", "std", "image_size")
    }.items() <= facts.export.usage.items()
    assert [port.name for port in (*model.graph.input, *model.graph.output)] == ["input", "logits"]


def test_networks_that_a_template_was_exported_of_are_not_exported_again(
    finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, facts = finished
    shutil.copytree(run.directory, tmp_path / run.directory.name)
    monkeypatch.setenv("SECATEUR_HOME", str(run.directory.parents[1]))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported again"))
    with Run(tmp_path / run.directory.name, Silent()) as again:
        found = export(again, facts)
    assert found.files == facts.export.files
    assert (found.baseline.artifact.plan_digest, found.compact.artifact.plan_digest) == (
        "",
        facts.finetune.best.candidate.plan.digest,
    )
