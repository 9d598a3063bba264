"""A whole run on a detector: both kinds of files, timed and compared, registered and pulled back, and drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from secateur.pipeline.evaluation import evaluator
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.lifecycle.rescore import rank_agreement, rescore
from secateur.pipeline.report import final_table
from secateur.pipeline.run.facts import Facts
from secateur.pipeline.run.run import Run
from secateur.pipeline.stages import gate
from secateur.pipeline.stages.loading import first_batch, load_baseline, load_compact, parity_images
from secateur.pipeline.stages.report import NUM_PICTURES
from secateur.pruning.plan import PruningPlan
from tests.pipeline.helpers import opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
WORKLOAD = {
    "name": "detection",
    "model": {"name": "small_ssd", "options": {"width": 8}},
    "data": {"source": "digits", "image_size": 64, "scenes": 400},
    "input": {"augment": "none"},
    "metrics": {"least_score": 0.05, "per_class": 50, "most": 20, "search": "loss"},
}
CHANGES: dict[str, Any] = {
    "workload": WORKLOAD,
    "baseline": {"epochs": 4, "lr": 0.05, "batch_size": 32, "clip_norm": 5.0, "ema": 0.9, "autocast": "fp32"},
    "search": {"method": "random", "options": {"num_plans": 7}, "images": 32, "target": {"macs_ratio": 0.8}},
    "finetune": {
        "top": 1,
        "epochs": 2,
        "lr": 0.02,
        "batch_size": 32,
        "clip_norm": 5.0,
        "ema": 0.9,
        "autocast": "fp32",
    },
    "export": {"dynamic_batch": True, "parity_images": 24},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Facts]]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_HOME", str(folder / "home"))
        patch.setattr(evaluator, "FULL_EVERY", 2)
        config = tiny_config(folder, **{k: v for k, v in CHANGES.items() if k != "workload"})
        config = config.model_copy(update={"workload": WORKLOAD})
        with opened(config) as run:
            run.tracker.start()
            yield run, perform(run)


def expected(run: Run, images: torch.Tensor) -> torch.Tensor:
    """What the compact network finds in torch."""
    model, graph = load_baseline(run)
    plan = PruningPlan.from_json((run.directory / "compact.plan.json").read_text())
    after = run.workload.postprocessing
    assert after is not None
    with torch.inference_mode():
        return after.apply(load_compact(run, model, graph, plan)(images))


def test_the_file_pulled_from_the_registry_finds_what_torch_finds(finished: Any) -> None:
    import mlflow

    run, facts = finished
    mlflow.set_tracking_uri(run.tracker.uri)
    pulled = mlflow.artifacts.download_artifacts(f"models:/tiny/{facts.register.version}/model.onnx")
    assert Path(pulled).read_bytes() == (run.directory / "compact.detections.onnx").read_bytes()
    images, _ = first_batch(run, run.workload.test)
    session = onnxruntime.InferenceSession(pulled, providers=["CPUExecutionProvider"])
    (found,) = session.run(["detections"], {"input": images.numpy()})  # the whole split at once: dynamic_batch
    wanted = expected(run, images)
    assert (wanted[..., 5] >= 0).sum() > 5
    agreement = run.workload.postprocessing.compare(torch.from_numpy(found), wanted)
    assert agreement.ok, agreement.reason
    moved = torch.where(wanted >= 0, wanted + 0.01, wanted)
    assert not run.workload.postprocessing.compare(torch.from_numpy(found), moved).ok


def test_a_version_says_how_to_prepare_images_and_what_the_classes_are(finished: Any) -> None:
    from mlflow import MlflowClient

    run, facts = finished
    version = MlflowClient(run.tracker.uri).get_model_version_by_alias("tiny", "champion")
    assert facts.promote.promoted
    usage = json.loads(version.tags["usage"])
    prepared = {"image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "resize": "stretch"}
    assert usage == {**prepared, "classes": [str(i) for i in range(10)]}
    assert "Classes from 0: 0, 1, 2" in (run.directory / "report.html").read_text()


def test_detections_were_compared_before_they_were_trusted(finished: Any) -> None:
    _, facts = finished
    for name, network in facts.export.networks.items():
        proof = network.postprocessing
        assert proof.ok, proof.reason
        assert proof.compared == sum(proof.counts) > 24 or name == "compact"
        assert proof.largest_error < 1e-3
    checks = {check.name: check for check in facts.gate.checks}
    assert checks["results of compact that differ"].ok


def test_results_that_differ_fail_the_gate(finished: Any) -> None:
    run, facts = finished
    compact = facts.export.compact
    differing = replace(compact, postprocessing=replace(compact.postprocessing, differing=1))
    broken = facts.plus(export=replace(facts.export, compact=differing))
    checks = gate.checks_of(run, broken, facts.gate.models)
    assert [check.name for check in checks if not check.ok] == ["results of compact that differ"]


def test_latency_is_known_with_and_without_suppression(finished: Any) -> None:
    run, facts = finished
    whole = facts.benchmark.postprocessing
    assert whole.name == "detections"
    for bare, timing in zip(facts.benchmark.latency, whole.latency, strict=True):
        assert 0 < timing.p50_ms != bare.p50_ms
    counts = facts.export.baseline.postprocessing.counts
    assert whole.found == sorted(counts)[len(counts) // 2]
    with np.load(run.directory / "benchmark-input.npz") as file:  # a real image, not noise
        images = parity_images(run).numpy()
        assert any(np.array_equal(file["input"][0], image) for image in images)
    titles = [row[0] for row in final_table(facts)]
    assert "p50 with detections" in titles
    assert "mAP50 (test split)" in titles


def test_the_report_shows_before_and_after_and_loads_nothing(finished: Any) -> None:
    run, _ = finished
    html = (run.directory / "report.html").read_text()
    sources = re.findall(r'<img src="([^"]*)" alt="search image', html)
    assert len(sources) == 2 * NUM_PICTURES
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    for text in ("with detections", "Precision and recall", "detections of ONNX", "(Spearman)", "loss_score"):
        assert text in html


def test_the_search_went_by_the_loss_and_says_how_well_it_ranks(finished: Any) -> None:
    run, facts = finished
    records = [r for r in run.journal.records if r.get("stage") == "search" and "evaluation" in r]
    metrics = [r["evaluation"]["metrics"] for r in records]
    assert all("loss_score" in found for found in metrics)
    final = facts.finetune.best.evaluation.metrics
    assert "map50" in final
    agreement = facts.search.agreement
    assert 3 <= agreement.candidates == sum("map50" in found for found in metrics) < len(metrics)
    assert -1 <= agreement.spearman <= 1
    assert rescore(run.directory, "amc", {}).metric == "loss_score"


def test_rank_agreement_is_spearmans() -> None:
    def record(i: int, loss_score: float, map50: float | None) -> dict[str, Any]:
        metrics = {"loss_score": loss_score} | ({} if map50 is None else {"map50": map50})
        plan = PruningPlan({"a": 4}, {"a": (0, 1)}).to_json()
        candidate = {"id": i, "plan": plan, "digest": "", "origin": "x", "parents": [], "base": ""}
        evaluation = {"status": "ok", "reason": "", "metrics": metrics}
        return {"stage": "search", "kind": "evaluation", "candidate": candidate, "evaluation": evaluation}

    records = [record(i, i / 10, (i * i) / 100) for i in range(5)]
    found = rank_agreement([*records, record(9, 0.5, None)], "map50", "loss_score")
    assert found is not None
    assert found["spearman"] == pytest.approx(1.0)
    assert found["candidates"] == 5
    assert rank_agreement(records[:2], "map50", "loss_score") is None
    assert rank_agreement([], "map50", "loss_score") is None


def test_the_test_split_is_read_in_parts(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, facts = finished
    monkeypatch.setattr(promotion, "CHUNK_BYTES", 1)
    again = run.workload.test_metrics(*promotion.test_answers(run.workload, run.directory / "compact.onnx"))
    known = facts.gate.models.compact
    assert again == pytest.approx({name: known[name] for name in again}, rel=1e-4)
    assert {"map50", "map", "map75", "loss"} <= set(again)
