"""A run whose network ships in int8, from its search to the gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from secateur.export.verify import predict
from secateur.pipeline.errors import UserError
from secateur.pipeline.files import sha256_of
from secateur.pipeline.lifecycle import promotion
from secateur.pipeline.report import final_table
from secateur.pipeline.run import schemes
from secateur.pipeline.run.facts import from_json, to_json
from secateur.pipeline.run.records import request_of
from secateur.pipeline.stages.benchmark import load_benchmark
from secateur.pipeline.stages.finetune import quantised_precision, tolerated
from tests.pipeline.helpers import QUICK_DEVICE, opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


@pytest.mark.parametrize(("drop", "again"), [(0.011, True), (0.009, False), (float("nan"), False)])
def test_training_for_int8_follows_where_it_costs_more_than_half_of_what_the_gate_allows(
    drop: float, again: bool
) -> None:
    assert (drop > tolerated(0.02)) == (drop > tolerated(None)) == again
    assert quantised_precision("fp32", ("fp32", "int8", "int8 except conv1")) == "int8"
    assert quantised_precision("int8 except conv1", ("fp32", "int8")) == "int8 except conv1"
    assert quantised_precision("fp32", ("fp32", "fp16")) is None


def test_training_for_int8_that_may_not_ship_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"finetune\.quantise: trains for int8, which may not ship"):
        opened(tiny_config(tmp_path, finetune={"quantise": "int8"}))


@pytest.mark.slow
def test_int8_is_searched_fine_tuned_timed_and_judged_as_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    search = {"method": "uniform", "options": {}, "target": {"macs_ratio": 0.6}}
    config = tiny_config(tmp_path, precision="int8", search=search, finetune={"top": 1, "quantise": "int8"})
    with opened(config) as run:
        facts = perform(run, until="gate")
        trained = [r for r in run.journal.records if r.get("stage") == "final" and r["kind"] == "finetune"]
        assert [(r.get("quantise"), r["epochs"]) for r in trained] == [(None, 1), ("int8", 0.25)]
        assert [request_of(r).lr for r in trained] == [None, pytest.approx(run.config.finetune.lr / 10)]  # type: ignore[union-attr]
        assert len(facts.finetune.finals) == 2
        best, compact = facts.finetune.best.evaluation, facts.export.compact
        assert best.precision == compact.artifact.precision == "int8"
        assert facts.search.reference.precision == "fp32"
        file = run.directory / "compact.onnx"
        kinds = {node.op_type for node in onnx.load(file).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
        assert compact.parity.ok and compact.parity.max_relative_error < 1e-5  # of the file it was made of
        assert compact.rounded is not None and compact.rounded.argmax_agreement > 0.9
        assert compact.artifact.size_bytes < 0.6 * facts.export.baseline.artifact.size_bytes
        ratios = facts.search.precision_latency
        assert ratios is not None and ratios["int8"]["quick"] > 0
        hops = facts.gate.hops
        assert hops is not None and facts.gate.broken is None
        assert [h.name for h in hops] == ["cut", "baseline as ONNX", "compact as ONNX", "compact in int8"]
        assert all(h.ok and h.samples and h.metric is not None for h in hops)
        told = facts.gate.models.compact.metrics["top1"]
        assert told == run.workload.test_metrics(*promotion.test_answers(run.workload, file))["top1"]
        assert abs(told - best["top1"]) < 0.15  # other images, the same network
        records = [r for r in run.journal.records if "candidate" in r and r["stage"] in ("search", "final")]
        assert records and all(r["evaluation"]["precision"] == "int8" for r in records)
        assert predict(file, np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)
    assert from_json("export", to_json(facts.export)) == facts.export
    assert ("precision", "fp32", "int8") in [row[:3] for row in final_table(facts)]


@pytest.mark.long
def test_devices_of_different_number_types_get_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(schemes, "candidates", lambda p: ("S8S8",) if p.name == "other" else ("U8S8",))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(QUICK_DEVICE))
    search = {"method": "uniform", "options": {}, "target": {"macs_ratio": 0.6}}
    device = {"others": [str(other)]}
    with opened(tiny_config(tmp_path, precision="int8", search=search, finetune={"top": 1}, device=device)) as run:
        facts = perform(run, until="benchmark")
        shared, own = run.directory / "compact.onnx", run.directory / "compact.S8S8.onnx"
        assert facts.export.schemes == {"other": "S8S8"} and own.name in facts.export.files
        assert [facts.export.file("compact", name) for name in ("quick", "other")] == [shared.name, own.name]
        measured = {name: load_benchmark(run.directory, f"benchmark{name}.json") for name in ("", ".other")}
        for name, file in (("", shared), (".other", own)):
            assert measured[name].sha256["compact"] == sha256_of(file)
        assert measured[""].sha256["baseline"] == measured[".other"].sha256["baseline"]
    assert from_json("export", to_json(facts.export)) == facts.export


def test_a_precision_that_there_is_not_is_a_fault_of_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"precision: unknown: int3; known: fp32, fp16, int8"):
        opened(tiny_config(tmp_path, precision=["fp32", "int3"]))
