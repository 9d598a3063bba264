"""Which plans are fine-tuned, and what remains of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pipeline.stages.finetune import best_plans
from secateur.pipeline.stages.loading import load_baseline, load_compact
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import Candidate, Entry, Evaluation
from tests.pipeline.helpers import opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_of_equal_plans_the_first_is_taken_and_the_full_one_never() -> None:
    half, third, full = (PruningPlan({"a": 3}, {"a": range(n)}) for n in (2, 1, 3))
    archive = [Entry(Candidate(i, plan, "x"), Evaluation()) for i, plan in enumerate((full, half, third, half))]
    assert [candidate.id for candidate in best_plans(archive)] == [1, 2]


def test_the_compact_network_is_the_best_plan_with_the_trained_weights(finished: Any) -> None:
    run, facts = finished
    plan = PruningPlan.from_json((run.directory / "compact.plan.json").read_text())
    assert plan == facts.finetune.best.candidate.plan
    assert facts.finetune.best in facts.finetune.finals
    assert len(facts.finetune.finals) == run.config.finetune.top
    model, graph = load_baseline(run)
    network = load_compact(run, model, graph, plan)
    assert sum(p.numel() for p in network.parameters()) == facts.gate.models.compact.params
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_a_uniform_control_at_the_same_macs_stands_beside_the_chosen_plan(finished: Any) -> None:
    run, facts = finished
    control, best = facts.finetune.control, facts.finetune.best.candidate
    assert control.chosen.candidate.plan == best.plan and control.chosen.candidate.base == ""
    assert 0.9 * control.chosen.evaluation["macs"] < control.uniform.evaluation["macs"]
    assert control.uniform.evaluation["macs"] <= control.chosen.evaluation["macs"]
    metric = run.workload.search_metric
    assert 0 <= control.uniform.evaluation[metric] <= 1
    records = [record for record in run.journal.records if record.get("stage") == "control"]
    assert [record["kind"] for record in records] == ["score", "evaluation", "evaluation"]
    timed = [record for record in run.journal.records if record.get("stage") == "control latency"]
    assert [record["kind"] for record in timed] == ["time"]
    assert control.uniform_latency > 0 and control.chosen_latency > 0
    assert "uniform" in (run.directory / "report.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_finer_widths_than_the_devices_are_timed_beside_those(tmp_path: Path) -> None:
    search = {"method": "uniform", "options": {}, "target": {"macs_ratio": 0.6}, "channel_multiple": 1}
    with opened(tiny_config(tmp_path, search=search, finetune={"epochs": 0.2, "top": 1})) as run:
        found = perform(run, "finetune").finetune
        plan, told = found.best.candidate.plan, found.widths
        assert told is not None and told.groups > 0
        assert any(width % 4 for width in plan.widths.values()), "the device's multiple is 4"
        assert f"{told.latency_ratio:.3f}" in told.text and f"{told.rounded_latency_ratio:.3f}" in told.text
        timed = [record for record in run.journal.records if record.get("stage") == "widths"]
        assert [record["kind"] for record in timed] == ["time"]


def test_in_the_devices_own_widths_nothing_more_is_timed(finished: Any) -> None:
    run, facts = finished
    assert facts.finetune.widths is None
    assert not [record for record in run.journal.records if record.get("stage") == "widths"]
