"""The search of a run, and what is refused before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.device_profiles.network_probe import Cut, Loss, NetworkProbe
from secateur.pipeline.devices.fleet import Device
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation.evaluator import Evaluator
from secateur.pipeline.progress import Silent
from secateur.pipeline.run import network_probe
from secateur.pipeline.run import run as run_module
from secateur.pipeline.run.facts import SearchFacts, from_json, to_json
from secateur.pipeline.run.network_probe import LEAST_SECONDS, Cuts, network_of
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pipeline.stages.loading import load_baseline
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import Candidate, Evaluation
from tests.pipeline.helpers import opened, perform, quick_device, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def test_what_goes_on_to_fine_tuning_was_ranked_by_float32_accuracies(finished: Any) -> None:
    run, facts = finished
    again = [record for record in run.journal.records if record.get("stage") == "ranking"]
    assert again[0]["candidate"]["origin"] == "reference"
    best = facts.search.archive[: len(again) - 1]
    evaluations = [facts.search.reference, *(entry.evaluation for entry in best)]
    assert best and all(evaluation.forward.endswith("fp32") for evaluation in evaluations)
    exact = {r["candidate"]["digest"] + r["candidate"]["base"]: r["exact"]["metrics"]["top1"] for r in again}
    for entry in best:
        assert exact[entry.candidate.plan.digest + entry.candidate.base] == entry.evaluation["top1"]


def test_search_and_test_split_share_no_image(finished: Any) -> None:
    run, _ = finished
    assert not set(run.workload.search.indices) & set(run.workload.test.indices)


def test_every_candidate_is_counted(finished: Any) -> None:
    run, facts = finished
    asked = [r for r in run.journal.records if r.get("stage") == "search" and r["kind"] in ("evaluation", "finetune")]
    assert facts.search.num_candidates == len(asked) > 2
    scope = facts.search.scope
    cuts = [r for r in run.journal.records if r.get("stage") == "scope" and r["kind"] == "evaluation"]
    assert scope is not None and scope.reason and len(cuts) == len(scope.trials) == 2
    assert facts.search.spent["evaluations"] == len(asked) + len(cuts), "both cuts count in the budget"


@pytest.mark.parametrize(
    ("search", "budgets", "said"),
    [
        ({"target": {"latency_ratio": 0.001}}, {}, r"latency_ratio 0\.001: the smallest reachable is \d"),
        ({}, {"p95_ms": 1e-6}, r"budget p95_ms 1e-06 of device quick"),
    ],
)
def test_what_no_network_can_meet_says_the_smallest_reachable(
    tmp_path: Path, search: dict[str, Any], budgets: dict[str, float], said: str
) -> None:
    config = tiny_config(tmp_path, search=search, baseline={"epochs": 0.2})
    quick_device(tmp_path, budgets=budgets)
    with opened(config) as run, pytest.raises(UserError, match=f"(?s)^no network in this search space.*{said}"):
        perform(run, "search")


@pytest.mark.long
def test_random_and_uniform_controls_run_through_the_same_stages(tmp_path: Path) -> None:
    for method, options in (("random", {"num_plans": 3, "tolerance": 0.5}), ("uniform", {})):
        search = {"method": method, "options": options, "target": {"macs_ratio": 0.7}}
        with opened(tiny_config(tmp_path, search=search, finetune={"epochs": 0.2})) as run:
            facts = perform(run, "finetune")
            macs = [entry.evaluation["macs"] for entry in facts.search.archive]
            assert macs
            assert np.max(macs) <= 0.7 * facts.search.reference["macs"]


def probed_as(multiple: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have the probe of a run's network find one multiple for all groups; returns the seconds it is given."""
    asked = []

    def probe(
        device: Device, template: Any, cuts: Cuts, fingerprint: str, progress: Any, seconds: float, *precise: Any
    ) -> NetworkProbe:
        asked.append(seconds)
        cut, loss = {multiple: (Cut(0.5, (0.6, 0.6, 0.6)),)}, {multiple: Loss(0.0, 0.0)}
        every, network = dict.fromkeys(cuts.kinds.values(), multiple), network_of(template, cuts)
        return NetworkProbe(device.name, fingerprint, network, multiple, every, cuts.kinds, cut, loss, (), 1.0, 2.0)

    monkeypatch.setattr(network_probe, "probe_network", probe)
    monkeypatch.setattr(run_module, "spared_the_probe", lambda config: "")
    return asked


class Said(Silent):
    """Keeps the sentences of a run."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def say(self, text: str) -> None:
        self.sentences.append(text)


@pytest.mark.parametrize("target", [{"macs_ratio": 0.2}, {"latency_ratio": 0.4}])
def test_targets_that_only_finer_widths_reach_get_them_and_a_resumed_run_sees_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: dict[str, float]
) -> None:
    probed_as(32, monkeypatch)
    measured = Evaluator.evaluate

    def kept(plan: PruningPlan) -> float:
        """What stands for latency here: the share of channels."""
        return sum(plan.widths.values()) / sum(plan.sizes.values())

    def evaluate(self: Evaluator, candidate: Candidate, latency: bool, *args: Any, **options: Any) -> Evaluation:
        found, ratio = measured(self, candidate, latency, *args, **options), kept(candidate.plan)
        times = {"latency_ratio": ratio, "latency_ratio_low": ratio} if latency else {}
        return replace(found, metrics={**found.metrics, **times})

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    monkeypatch.setattr(Evaluator, "time", lambda self, request: np.array([kept(plan) for plan in request.plans]))
    search = {"method": "random", "options": {"num_plans": 2, "tolerance": 0.5}, "target": target}
    config = tiny_config(tmp_path, search=search, baseline={"epochs": 0.2})
    said = Said()
    with Run(create_run_directory(config), said) as run:
        archive, written = perform(run, "search").search.archive, len(run.journal.records)
    assert sum("finer" in sentence for sentence in said.sentences) == 1
    assert archive, "the probe's widths alone would have been refused"
    with Run(run.directory, said) as again:
        assert perform(again, "search").search.archive == archive
        assert len(again.journal.records) == written
    assert sum("finer" in sentence for sentence in said.sentences) == 1


def test_the_widths_come_from_the_probe_with_the_runs_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = probed_as(8, monkeypatch)
    search = {"method": "random", "options": {"num_plans": 3, "tolerance": 0.5}, "target": {"macs_ratio": 0.7}}
    config = tiny_config(tmp_path, search=search, baseline={"epochs": 0.2})
    with opened(config) as run:
        facts = perform(run, "search")
        again = from_json("search", to_json(facts.search))
        sizes = facts.search.archive[0].candidate.plan.sizes
        assert run.spaces(*load_baseline(run)).whole.allowed == {n: tuple(range(8, s + 1, 8)) for n, s in sizes.items()}
    assert asked == [LEAST_SECONDS], "a search of seconds pays for the shortest probe"
    assert facts.search.probes is not None and facts.search.probes["quick"].multiple == 8
    assert isinstance(again, SearchFacts) and again.probes == facts.search.probes
