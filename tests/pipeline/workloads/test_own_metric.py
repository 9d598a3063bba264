"""A workload with a metric of its own is one file: whatever shows or judges a metric knows it from the workload."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from secateur.pipeline.evaluation import shipped_data
from secateur.pipeline.run.journal import read_journal
from secateur.pipeline.workloads import Workload
from tests.pipeline.helpers import digits, write_tiny

ROOT = Path(__file__).parents[3]
PACKAGES = ("secateur", "pipeline", "export", "pruning", "device_profiles")
METRIC = "balanced_accuracy"
WORKLOAD = '''"""Digits judged by the mean recall of their classes."""

from typing import Literal

import torch

from secateur.pipeline.workloads import classification


class Options(classification.Options):
    name: Literal["balanced"] = "balanced"


def build(options, reading):
    return Balanced(options, reading)


class Balanced(classification.Classification):
    metric = search_metric = "balanced_accuracy"

    def metrics(self, answers, targets):
        right = (answers.argmax(1) == targets).float()
        recalls = [right[targets == label].mean() for label in targets.unique()]
        loss = super().metrics(answers, targets)["loss"]
        return {"balanced_accuracy": torch.stack(recalls).mean().item(), "loss": loss}

    test_metrics = metrics

    def bound(self, answers, targets, num_unseen):
        return 1.0
'''
SEARCH = {"method": "random", "options": {"num_plans": 6}, "target": {"macs_ratio": 0.7}, "images": 64}


def timeless(value: Any) -> Any:
    """A record without what depends on the clock and the device."""
    if isinstance(value, Mapping):
        varying = re.compile(r"time|seconds|line|spent|.*_ms|latency_.*")
        return {key: timeless(item) for key, item in value.items() if not varying.fullmatch(key)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_run_is_searched_resumed_rescored_reported_and_judged_by_a_new_workloads_metric(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / "tree" / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "tree" / "pipeline" / "workloads" / "balanced.py").write_text(WORKLOAD)
    home = tmp_path / "home"
    home.mkdir()
    workers = {"engine": "processes", "count": 1, "batch": 2}
    file = write_tiny(home, search=SEARCH, workers=workers, finetune={"top": 1}, gate={"max_drop": 0.9})
    file.write_text(file.read_text().replace("name: classification", "name: balanced"))
    env = {**os.environ, "SECATEUR_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    env |= {"PYTHONPATH": str(tmp_path / "tree"), "OMP_NUM_THREADS": "1"}

    def secateur(*arguments: str) -> str:
        command = [sys.executable, "-m", "secateur", *arguments]
        ended = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=500, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    secateur("run", str(file))
    (directory,) = (home / "runs").glob("tiny-*")
    journal = directory / "journal.jsonl"
    records = read_journal(journal)
    assert records[0]["metrics"] == [METRIC]
    searched = [r for r in records if r.get("stage") == "search"]
    assert len(searched) >= 4
    assert (directory / "workers" / "order.npy").exists()  # worker processes had their part in it
    assert all(set(r["evaluation"]["metrics"]) >= {METRIC, "loss"} for r in searched)
    assert not any("top1" in r.get("evaluation", {}).get("metrics", {}) for r in records)

    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))  # as if killed in mid-search
    shutil.rmtree(directory / "stages")
    secateur("resume", str(directory))
    assert [timeless(r) for r in read_journal(journal)] == [timeless(r) for r in records]

    secateur("rescore", str(directory), "--reward", "rewarded_v2")
    (best, *_) = json.loads((directory / "rescore-rewarded_v2.json").read_text())["candidates"]
    assert METRIC in best["evaluation"]["metrics"]
    facts = json.loads((directory / "report.json").read_text())["facts"]
    checks = [check for stage in facts.values() for check in stage.get("checks", ())]
    assert f"drop in {METRIC}" in {check["name"] for check in checks}
    assert METRIC in (directory / "report.html").read_text()
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{directory.name}'")
    told = {f"search.search_split.{METRIC}", f"baseline.test_{METRIC}", f"final.test_{METRIC}"}
    assert told <= set(run.data.metrics)


def test_images_sent_to_a_worker_are_judged_by_their_own_workloads_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import secateur.pipeline.workloads

    (tmp_path / "balanced.py").write_text(WORKLOAD)
    folders = [*secateur.pipeline.workloads.__path__, str(tmp_path)]
    monkeypatch.setattr(secateur.pipeline.workloads, "__path__", folders)
    monkeypatch.setattr(secateur.pipeline.workloads.__spec__, "submodule_search_locations", folders)
    section = {"name": "balanced", "model": {"name": "cifar/resnet8"}, "data": {"source": "digits", "image_size": 8}}
    own: Workload = shipped_data.open_section(section)
    sent = shipped_data.unpack(section, shipped_data.pack(own, 32, 48, tmp_path / "images.npz"))
    assert (sent.metric, len(sent.search)) == (METRIC, 48)
    answers, targets = torch.eye(10)[[0, 1, 1, 2]], torch.tensor([0, 1, 1, 1])
    assert sent.metrics(answers, targets) == own.metrics(answers, targets)
    assert METRIC not in digits(image_size=8).metrics(answers, targets)
    every = torch.arange(48)
    cpu = torch.device("cpu")
    images, labels = (w.batch(w.search.first(48), every, train=False, generator=None, device=cpu) for w in (own, sent))
    assert torch.equal(images[0], labels[0]) and torch.equal(images[1], labels[1])
