"""A task of one's own from the command line: run with workers, killed, resumed, rescored, promoted, pulled and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.pipeline.run.journal import read_journal
from tests.pipeline.helpers import write_tiny
from tests.pipeline.workloads.custom import tasks
from tests.pipeline.workloads.test_own_metric import ROOT, SEARCH, timeless

USE = "import numpy as np; from loader import Model; print(Model().predict(np.zeros((3, 1, 8, 8), np.float32)).shape)"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_task_goes_all_the_way(tmp_path: Path) -> None:
    shutil.copy(tasks.__file__, tmp_path / "task.py")
    workers = {"engine": "processes", "count": 1, "batch": 2}
    search = {**SEARCH, "images": 8}
    file = write_tiny(tmp_path, search=search, workers=workers, finetune={"top": 1}, gate={"promote": False})
    text = file.read_text()
    start = text.index("workload:")
    file.write_text(text[:start] + "workload: {name: custom, task: task.py:Task, options: {items: 80}}\n")
    env = {**os.environ, "SECATEUR_HOME": str(tmp_path / "home"), "PREFECT_HOME": str(tmp_path / "prefect")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def done(*words: str, folder: Path = tmp_path) -> str:
        ended = subprocess.run(
            [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=500
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    done("-m", "secateur", "run", str(file), "--trust")
    (directory,) = (tmp_path / "home" / "runs").glob("tiny-*")
    journal = directory / "journal.jsonl"
    records = read_journal(journal)
    assert records[0]["metrics"] == ["hits"] and (directory / "workers" / "order.npy").exists()
    searched = [record for record in records if record.get("stage") == "search"]
    assert len(searched) >= 4 and all({"hits", "misses", "loss"} <= r["evaluation"]["metrics"].keys() for r in searched)

    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))  # as if killed in mid-search
    shutil.rmtree(directory / "stages")
    done("-m", "secateur", "resume", str(directory))
    assert [timeless(r) for r in read_journal(journal)] == [timeless(r) for r in records]

    done("-m", "secateur", "rescore", str(directory), "--reward", "rewarded_v2")
    (best, *_) = json.loads((directory / "rescore-rewarded_v2.json").read_text())["candidates"]
    assert "hits" in best["evaluation"]["metrics"]
    gate = [
        check
        for stage in json.loads((directory / "report.json").read_text())["facts"].values()
        for check in stage.get("checks", ())
    ]
    assert "drop in hits" in {check["name"] for check in gate}
    done("-m", "secateur", "pull", "tiny@challenger", "-o", "pulled")
    assert done("-c", USE, folder=tmp_path / "pulled").strip() == "(3, 2)"
