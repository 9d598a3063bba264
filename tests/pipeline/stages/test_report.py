"""The report as a stage: of a whole run, and refused where the journal is cut off."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from secateur.pipeline.flow.compress import resume_tracking
from secateur.pipeline.report import final_table
from secateur.pipeline.report.document import untold
from secateur.pipeline.stages.register import candidate_table
from tests.pipeline.helpers import opened, perform, tiny_config

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
    assert set(told) == {*before, "judge"}
    latency = told["benchmark"]["latency"]["compact"]
    assert told["gate"]["models"]["compact"].items() >= latency.items()


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
