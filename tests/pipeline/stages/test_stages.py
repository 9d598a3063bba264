"""The stages as plain functions: a whole run without Prefect, and what each refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.config.schema import RunFile
from pipeline.errors import JournalError, UserError
from pipeline.progress import Silent
from pipeline.report import final_table
from pipeline.run.opening import check_forward
from pipeline.run.run import Run, create_run_directory
from pipeline.stages import STAGES, load_baseline, load_benchmark, load_compact
from pruning.plan import PruningPlan
from tests.pipeline.helpers import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def perform(run: Run, until: str = "promote") -> dict[str, Any]:
    """All stages up to one, as the flow would, without Prefect."""
    facts: dict[str, Any] = {}
    for stage in STAGES:
        facts[stage.name] = json.loads(json.dumps(stage.function(run, facts)))
        if stage.name == until:
            break
    return facts


def opened(config: RunFile) -> Run:
    return Run(create_run_directory(config), Silent())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, dict[str, Any]]]:
    """One whole run, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_HOME", str(folder / "home"))
        config = tiny_config(folder, search={"target": {"macs_ratio": 0.8}})
        with opened(config) as run:
            run.tracker.start()
            yield run, perform(run)


def test_the_compact_model_is_smaller_and_its_costs_add_up(finished: Any) -> None:
    run, facts = finished
    base, compact = facts["judge"]["models"]["baseline"], facts["judge"]["models"]["compact"]
    assert compact["macs"] <= 0.8 * base["macs"]
    assert compact["params"] < base["params"]
    assert compact["size_bytes"] == (run.directory / "compact.onnx").stat().st_size
    model, graph = load_baseline(run)
    plan = PruningPlan.from_json((run.directory / "compact.plan.json").read_text())
    network = load_compact(run, model, graph, plan)
    assert sum(p.numel() for p in network.parameters()) == compact["params"]


def test_the_timed_file_is_the_judged_and_the_registered_one(finished: Any) -> None:
    import mlflow

    run, facts = finished
    digest = facts["export"]["compact"]["artifact"]["sha256"]
    assert load_benchmark(run.directory).sha256["compact"] == digest
    assert facts["promote"]["promoted"]
    mlflow.set_tracking_uri(run.tracker.uri)
    pulled = mlflow.artifacts.download_artifacts("models:/tiny@champion/model.onnx")
    assert Path(pulled).read_bytes() == (run.directory / "compact.onnx").read_bytes()
    stored = onnx.load(pulled)
    assert not stored.metadata_props


def test_parity_and_certificate_hold(finished: Any) -> None:
    _, facts = finished
    assert facts["search"]["certificate"]["ok"]
    assert facts["search"]["certificate"]["max_relative_error"] < 1e-5
    for name in ("baseline", "compact"):
        assert facts["export"][name]["parity"]["ok"]
        assert facts["export"][name]["parity"]["max_relative_error"] < 1e-5


def test_what_goes_on_to_fine_tuning_was_ranked_by_float32_accuracies(finished: Any) -> None:
    run, facts = finished
    again = [record for record in run.journal.records if record.get("stage") == "ranking"]
    assert again[0]["candidate"]["origin"] == "reference"
    best = facts["search"]["archive"][: len(again) - 1]
    evaluations = [facts["search"]["reference"], *(row["evaluation"] for row in best)]
    assert best and all(evaluation["forward"].endswith("fp32") for evaluation in evaluations)
    exact = {r["candidate"]["digest"] + r["candidate"]["base"]: r["exact"]["metrics"]["top1"] for r in again}
    assert all(
        exact[row["candidate"]["digest"] + row["candidate"]["base"]] == row["evaluation"]["metrics"]["top1"]
        for row in best
    )


def test_search_and_test_split_share_no_image(finished: Any) -> None:
    run, _ = finished
    assert not set(run.workload.search.indices) & set(run.workload.test.indices)


def test_the_report_holds_everything_and_loads_nothing(finished: Any) -> None:
    run, facts = finished
    html = (run.directory / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script|https?://""", html)
    for text in ("Gate:", "secateur history tiny", "Speed-up", "<svg", "layer3.0.conv1"):
        assert text in html
    data = json.loads((run.directory / "report.json").read_text())
    assert data["facts"]["judge"] == facts["judge"]
    disturbed = bool(facts["benchmark"]["flags"])
    assert len(final_table(facts)) == 7 + disturbed


def test_a_baseline_is_trained_once_per_content(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with opened(config) as run:
        assert "trained" in perform(run, "baseline")["baseline"]["origin"]
    with opened(config) as run:
        assert "reused" in perform(run, "baseline")["baseline"]["origin"]
    with opened(config.model_copy(update={"seed": 9})) as run:
        assert "trained" in perform(run, "baseline")["baseline"]["origin"]


@pytest.mark.parametrize(
    ("search", "budgets", "said"),
    [
        ({"target": {"latency_ratio": 0.001}}, {}, r"latency_ratio 0\.001: the smallest reachable is \d"),
        ({}, {"p95_ms": 1e-6}, r"budget p95_ms 1e-06 of device quick"),
    ],
)
def test_what_nobody_can_meet_says_the_smallest_reachable(
    tmp_path: Path, search: dict[str, Any], budgets: dict[str, float], said: str
) -> None:
    from tests.pipeline.helpers import quick_device

    config = tiny_config(tmp_path, search=search, baseline={"epochs": 0.2})
    quick_device(tmp_path, budgets=budgets)
    with opened(config) as run, pytest.raises(UserError, match=said):
        perform(run, "search")


def test_a_failed_gate_makes_a_challenger(tmp_path: Path, finished: Any) -> None:
    done, facts = finished
    config = tiny_config(tmp_path, gate={"max_macs_ratio": 0.05})
    with opened(config) as run:
        for file in done.directory.iterdir():
            if file.suffix in (".onnx", ".safetensors", ".json"):
                shutil.copy(file, run.directory)
        for record in done.journal.records[1:]:
            run.journal.append(record)
        run.tracker.start()
        again = dict(facts)
        for stage in STAGES[5:9]:
            again[stage.name] = stage.function(run, again)
        assert not again["judge"]["passed"]
        assert [c["name"] for c in again["judge"]["checks"] if not c["ok"]] == ["MACs ratio"]
        assert not again["promote"]["promoted"]
        champion = run.tracker.registry.champion("tiny", "quick")
        assert champion is None or champion.version != again["register"]["version"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": {"profile": "lokal"}}, r"(?s)lokal.*local"),
        ({"workload": {"model": {"name": "cifar_resnet8", "weights": "no.safetensors"}}}, "weights file not found"),
        ({"workload": {"data": {"source": "arrays", "train": "nowhere"}}}, "array file not found"),
        ({"compute": "cuda"}, "no CUDA device"),
    ],
)
def test_opening_a_run_with_bad_input_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    if changes.get("compute") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=said):
        opened(tiny_config(tmp_path, **changes))


def test_a_model_that_cannot_run_is_refused_with_its_own_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise IndexError("no such layer")

    with pytest.raises(UserError, match=r"\(1, 3, 8, 8\): IndexError: no such layer"):
        check_forward(Broken(), torch.zeros(1, 3, 8, 8))


def test_a_journal_of_another_configuration_is_refused(tmp_path: Path) -> None:
    directory = create_run_directory(tiny_config(tmp_path))
    with Run(directory, Silent()):
        pass
    file = directory / "run.yaml"
    file.write_text(file.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(JournalError, match=r"run\.yaml"):
        Run(directory, Silent())


def test_resuming_what_is_no_run_directory_lists_recent_runs(tmp_path: Path) -> None:
    directory = create_run_directory(tiny_config(tmp_path))
    with pytest.raises(UserError, match=re.escape(str(directory))):
        Run(tmp_path, Silent())


def test_latency_of_an_emulated_device_is_refused(tmp_path: Path) -> None:
    from tests.pipeline.helpers import quick_device

    config = tiny_config(tmp_path)
    quick_device(tmp_path, timing=False)
    with pytest.raises(UserError, match="timing: false"):
        opened(config)


def test_random_and_uniform_controls_run_through_the_same_stages(tmp_path: Path) -> None:
    for method, options in (("random", {"num_plans": 3, "tolerance": 0.5}), ("uniform", {})):
        search = {"method": method, "options": options, "target": {"macs_ratio": 0.7}}
        with opened(tiny_config(tmp_path, search=search, finetune={"epochs": 0.2})) as run:
            facts = perform(run, "finetune")
            ratios = [r["evaluation"]["metrics"]["macs"] for r in facts["search"]["archive"]]
            assert ratios
            assert np.max(ratios) <= 0.7 * facts["search"]["reference"]["metrics"]["macs"]


def test_threads_follow_what_the_process_may_use_unless_the_run_file_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("pipeline.run.run.usable_cores", lambda: 2)
    try:
        for threads, expected in ((None, 2), (1, 1)):
            with opened(tiny_config(tmp_path, threads=threads)):
                assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
