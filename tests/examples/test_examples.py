"""The examples run: each folder as a user copies it, shortened, to the compact model's gate."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from secateur.pipeline.config import trust
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.errors import UserError
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.preflight import examine
from secateur.pipeline.run.run import Run, create_run_directory
from tests.pipeline.helpers import perform, quick_device

ROOT = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(file.parent.name for file in ROOT.glob("*/run.yaml"))
SMALLER: dict[str, dict[str, Any]] = {
    "classifier": {"model.options": {"width": 8}, "data.image_size": 16},
    "detection": {"options": {"size": 32, "scenes": 60, "width": 8}},
    "regression": {"options": {"size": 16, "digits": 60, "width": 8}},
    "segmentation": {"options": {"size": 16, "scenes": 60, "width": 8}},
    "timm": {"data.image_size": 64},
}
"""Keys of the workload with which the examples take seconds."""
EVERY_TIME = "regression"
"""The example that every test run takes to its gate; the others go the same way, and are long."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n != EVERY_TIME)) for n in EXAMPLES])
def test_an_example_runs_to_its_gate(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(folder)
    for script in scripts_of(folder):
        runpy.run_path(str(script))
    thin_out(folder / "images")
    overrides = [f"device.profile={quick_device(tmp_path)}", "device.probe=false", "threads=1"]
    overrides += ["baseline.epochs=1", "finetune.epochs=1", "search.images=2", "gate.min_speedup=null"]
    overrides += [f"workload.{key}={json.dumps(value)}" for key, value in SMALLER[name].items()]
    file = folder / "run.yaml"
    config = trust.consented(lambda: load_run_file(file, overrides), file, lambda found: True)
    assert not examine(load_run_file(file, overrides[:2])).faults  # as it stands
    with Run(create_run_directory(config), Silent()) as run:
        facts = perform(run, "report")
        metric = run.workload.metric
        assert facts.gate.metric == metric and 0 <= facts.gate.models.compact[metric] <= 1
        assert facts.gate.models.compact.macs <= 0.5 * facts.gate.models.baseline.macs
        page = (run.directory / facts.report.html).read_text()
        for other, (unit, better) in (facts.gate.others or {}).items():
            assert f"{other} (test split, {better} is better)" in page and unit in page
    if (folder / "task.py").exists():
        (folder / "task.py").write_text((folder / "task.py").read_text() + "\n# another task\n")
        with pytest.raises(UserError, match="the task's code differs"):
            Run(run.directory, Silent())


def scripts_of(folder: Path) -> list[Path]:
    """What an example's README says to run with Python before Secateur, in that order."""
    lines = (folder / "README.md").read_text().splitlines()
    return [folder / line.split()[1] for line in lines if line.startswith("python ")]


def thin_out(images: Path) -> None:
    """Leave one image in eight, where an example has image files."""
    for file in sorted(images.rglob("*.*g")):
        if int(file.stem) % 8:
            file.unlink()
