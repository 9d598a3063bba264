"""The report as a stage: of a whole run, and refused where the journal is cut off."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from secateur.pipeline.flow.compress import resume_tracking
from secateur.pipeline.report import final_table
from secateur.pipeline.report.document import untold
from secateur.pipeline.stages.register import candidate_table
from tests.pipeline.helpers import opened, perform, tiny_config

LIBRARIES, WEIGHTS = re.compile(rb"<script>.*?</script>", re.DOTALL), (".onnx", ".safetensors", ".parquet")
"""What has names of its own, which may be a machine's by chance."""
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_the_report_holds_everything_and_loads_nothing(finished: Any) -> None:
    run, facts = finished
    html = (run.directory / "report.html").read_text()
    shown = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)  # libraries name addresses that nobody asks for
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!#|data:)\w|@import|https?://""", shown)
    for text in ("checks hold", "secateur history tiny", "Speed-up", "<svg", "layer3.0.conv1"):
        assert text in html
    disturbed = bool(facts.benchmark.flags)
    assert len(final_table(facts)) == 7 + disturbed


def test_the_report_as_json_has_the_facts_of_the_stages_before_it(finished: Any) -> None:
    run, facts = finished
    told = json.loads((run.directory / "report.json").read_text())["facts"]
    known = facts.to_json()
    before = ["baseline", "search", "finetune", "export", "benchmark", "gate"]
    assert {name: told[name] for name in before} == untold({name: known[name] for name in before})
    assert told["judge"] == told["gate"]  # for one release
    assert set(told) == {*before, "judge", "report", "register", "promote"}
    latency = told["benchmark"]["latency"]["compact"]
    assert told["gate"]["models"]["compact"].items() >= latency.items()


def test_mlflow_shows_the_report_that_knows_what_became_of_the_model(finished: Any) -> None:
    run, facts = finished
    client = MlflowClient(run.tracker.uri, run.tracker.uri)
    version = client.get_model_version(facts.register.name, facts.register.version)
    logged = {
        name: Path(client.download_artifacts(version.run_id, name)).read_text(encoding="utf-8")
        for name in ("report.html", "report.json", "report.md", "CARD.md")
    }
    assert logged["report.html"] == (run.directory / "report.html").read_text(encoding="utf-8")
    said = f"Registered as {facts.register.name} version {facts.register.version}; its card is CARD.md"
    assert said in logged["report.html"] and said in logged["report.md"]
    assert json.loads(logged["report.json"])["facts"]["promote"]["promoted"] == facts.promote.promoted
    described = client.get_run(version.run_id).data.tags["mlflow.note.content"]
    assert described.startswith(f"Registered: {facts.register.name} version {facts.register.version}, alias ")
    assert described.count("\n# ") == 1, "the card follows, once"
    assert version.tags["report"] == f"runs:/{version.run_id}/report.html"


def test_nothing_that_is_shown_or_sent_names_the_machine_or_where_files_lay(finished: Any, tmp_path: Path) -> None:
    run, facts = finished
    client = MlflowClient(run.tracker.uri, run.tracker.uri)
    version = client.get_model_version(facts.register.name, facts.register.version)
    texts = {file.name: file.read_bytes() for file in run.directory.glob("report.*")}
    texts |= {file.name: file.read_bytes() for file in run.directory.glob("benchmark*.json")}
    run.tracker.registry.fetch(run.tracker.registry.version(version.name, str(version.version)), tmp_path / "version")
    for folder in (Path(client.download_artifacts(version.run_id, "")), tmp_path / "version"):
        files = [file for file in folder.rglob("*") if file.is_file()]
        texts |= {f"{folder.name}/{file.relative_to(folder)}": file.read_bytes() for file in files}
    parent = client.get_run(version.run_id)
    told = [parent.data.params, parent.data.tags, version.tags, version.description]
    for child in client.search_runs([parent.info.experiment_id]):
        told += [child.data.params, child.data.tags, {"user": child.info.user_id}]
    texts["MLflow"] = json.dumps(told).encode()
    texts = {name: LIBRARIES.sub(b"", text) for name, text in texts.items() if not name.endswith(WEIGHTS)}
    assert len(texts) > 20
    words = {platform.node(), str(Path.home()), str(run.directory)}
    patterns = {word: re.compile(rb"(?<![\w.])" + re.escape(word.encode()) + rb"(?![\w.])") for word in words - {"/"}}
    assert not {(name, word) for name, text in texts.items() for word, found in patterns.items() if found.search(text)}


@pytest.mark.long
def test_a_training_of_the_method_is_no_candidate_of_the_report_or_the_table(tmp_path: Path) -> None:
    search = {"method": "dafp", "options": {"epochs": 0.2}, "target": {"macs_ratio": 0.8}}
    with opened(tiny_config(tmp_path, search=search, finetune={"epochs": 0.2, "top": 1})) as run:
        facts = perform(run, "report")
        trained = [r for r in run.journal.records if r["kind"] == "learn"]
        assert trained and all("evaluation" in record for record in trained)
        table = pd.read_parquet(candidate_table(run))
        assert set(table["kind"]) == {"evaluation", "finetune"}
        assert len(table[table["stage"] == "search"]) == facts.search.num_candidates
        resume_tracking(run)
        assert not run.tracker.flush(timeout_s=60)
