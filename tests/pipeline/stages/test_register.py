"""The compact model in the registry, and what MLflow is told of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from secateur.pipeline.run.facts import Speedup
from secateur.pipeline.stages.register import final_metrics, usage_tag
from secateur.pipeline.tracking.registry import MAX_TAG
from tests.pipeline.helpers import made_up_facts

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_the_timed_file_is_the_registered_one(finished: Any) -> None:
    import mlflow

    run, facts = finished
    assert facts.promote.promoted
    mlflow.set_tracking_uri(run.tracker.uri)
    pulled = mlflow.artifacts.download_artifacts("models:/tiny@champion/model.onnx")
    assert Path(pulled).read_bytes() == (run.directory / "compact.onnx").read_bytes()
    stored = onnx.load(pulled)
    told = {entry.key: entry.value for entry in stored.metadata_props}
    assert {"plan_digest", "precision", "run", "versions", "classes", "image_size"} <= set(told)
    assert not any(str(Path(place)) in value for value in told.values() for place in (run.directory, Path.home()))


def test_a_version_tells_the_gate_and_the_parity_as_they_were(finished: Any) -> None:
    run, facts = finished
    told = {name: json.loads((run.directory / f"version/{name}.json").read_text()) for name in ("gate", "parity")}
    known = facts.to_json()
    assert told["gate"] == {key: known["gate"][key] for key in ("passed", "metric", "checks", "models")}
    assert told["parity"]["compact"] == {**known["export"]["compact"]["parity"], "tolerance": 1e-4}
    assert told["parity"]["certificate"] == known["export"]["certificate"]


def test_every_accuracy_names_its_model_and_its_split() -> None:
    metrics = final_metrics(made_up_facts())
    assert metrics["baseline.test_top1"] == metrics["final.search_top1"] == 0.9
    assert metrics["final.p50_ms"] == 1.0
    assert metrics["final.peak_rss_bytes"] == 1e7
    assert metrics["search.images_forwarded"] == 256
    assert "final.energy_mj" not in metrics  # the device does not tell
    assert not [name for name in metrics if name.partition("_")[2] in ("p50_ms", "macs") and "cpu" not in name]


def test_a_speed_up_has_its_interval_where_there_is_one() -> None:
    assert {"speedup": 1.5, "speedup.low": 1.4, "speedup.high": 1.6}.items() <= final_metrics(made_up_facts()).items()
    unknown = made_up_facts(benchmark={"speedup": Speedup(low=None, high=None, value=1.5)})
    assert [name for name in final_metrics(unknown) if name.startswith("speedup")] == ["speedup"]


def test_a_tag_of_many_classes_says_where_their_names_are() -> None:
    usage = {"image_size": 8, "classes": [f"class {i}" for i in range(MAX_TAG)]}
    assert json.loads(usage_tag(usage))["classes"] == f"{MAX_TAG} names, in secateur/usage.json"
    assert json.loads(usage_tag({"image_size": 8})) == {"image_size": 8}
