"""What a search goes by: chosen once, before anything is evaluated, and from then on by everyone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.evaluation.accuracy import AccuracyEvaluator
from secateur.pipeline.lifecycle.rescore import rescore
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.metric import STAGE, settle
from secateur.pipeline.run.run import Run
from secateur.pipeline.training.checkpoints import save_weights
from secateur.pipeline.workloads import DIVERGENCE_SCORE, Workload
from tests.pipeline.helpers import digits, opened, perform, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own
CPU = torch.device("cpu")
IMAGES = 64


@pytest.mark.parametrize(
    ("is_open", "pretrained", "seen", "metric", "memorised"),
    [
        (True, True, (1.0, 0.96), DIVERGENCE_SCORE, True),
        (True, True, (1.0, 0.98), "top1", False),
        (True, True, (0.9, 0.95), "top1", False),
        (False, True, (1.0, 0.5), "top1", True),
        (True, False, None, "top1", False),
    ],
)
def test_the_metric_follows_from_what_the_weights_know_and_is_settled_once(
    tmp_path: Path, is_open: bool, pretrained: bool, seen: Any, metric: str, memorised: bool
) -> None:
    asked = SimpleNamespace(search_metric="top1", search_metric_is_open=is_open, pretrained=pretrained)
    workload, looks = cast(Workload, asked), iter([seen])
    with Journal(tmp_path / "journal.jsonl", "r", "c") as journal:
        found = settle(journal, workload, lambda: next(looks))
    assert (found.metric, found.memorised) == (metric, memorised)
    assert (found.accuracy, found.augmented) == (seen or (None, None))
    with Journal(tmp_path / "journal.jsonl", "r", "c") as journal:
        assert settle(journal, workload, lambda: next(looks)) == found
        assert [record.get("stage") for record in journal.records] == [None, STAGE]


def config_with(folder: Path, *, by_heart: bool) -> RunFile:
    """A run with weights that know the search images by heart, or that answer every image alike."""
    workload, file = digits(image_size=8), folder / "weights.safetensors"
    torch.manual_seed(0)
    model = workload.fresh_model()
    if by_heart:
        images, labels = workload.batch(workload.search, torch.arange(IMAGES), train=False, generator=None, device=CPU)
        optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    else:
        for parameter in model.linear.parameters():
            torch.nn.init.zeros_(parameter)
    save_weights(file, model.state_dict())
    search = {"method": "random", "options": {"num_plans": 3, "tolerance": 0.5}, "target": {"macs_ratio": 0.7}}
    return tiny_config(
        folder, workload={"model": {"weights": str(file)}}, search={**search, "images": IMAGES, "scope": "all"}
    )


@pytest.mark.parametrize("by_heart", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_search_goes_by_the_divergence_where_its_images_are_known_by_heart_and_a_resumed_one_too(
    by_heart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = DIVERGENCE_SCORE if by_heart else "top1"
    with opened(config_with(tmp_path, by_heart=by_heart)) as run:
        directory = run.directory
        facts = perform(run, "search").search
        stages = [record.get("stage") for record in run.journal.records]
        told = dict(run.tracker.labels)
        asked = [record for record in run.journal.records if record.get("stage") == "search"]
    split = facts.split
    assert split is not None and (split.metric, split.memorised) == (metric, by_heart)
    assert split.accuracy is not None and split.augmented is not None
    assert stages.index(STAGE) < stages.index("reference")
    assert told["secateur.search_metric"] == metric
    assert all((DIVERGENCE_SCORE in record["evaluation"]["metrics"]) == by_heart for record in asked)
    found = [entry.evaluation[metric] for entry in facts.archive]
    assert len(found) >= 3 and all(0 <= value <= 1 for value in found)
    assert rescore(directory, "amc", {}).metric == metric

    journal = directory / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: stages.index("search") + 1]))  # as if killed in mid-search
    monkeypatch.setattr(AccuracyEvaluator, "memorised", None)  # what was settled is not measured again
    with Run(directory, Silent()) as run:
        assert run.workload.search_metric == metric
        again = perform(run, "search").search
    assert again.split == split
    assert [entry.evaluation[metric] for entry in again.archive] == found
