"""A classifier of the user's own, on images of his own, from the command line: refused, trusted, validated, run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from secateur.pipeline.cli import app as cli
from secateur.pipeline.config import trust
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.errors import EXIT_USER
from tests.pipeline.helpers import opened, perform, quick_device

NETWORK = """
from torch import nn

from layers import block


def build(num_classes, width=16):
    return nn.Sequential(block(3, width), block(width, 2 * width), nn.Flatten(), nn.Linear(2 * width, num_classes))
"""
LAYERS = """
from torch import nn


def block(channels, out):
    pool = nn.AdaptiveAvgPool2d(4 if channels == 3 else 1)
    return nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU(), pool)
"""
RUN = {
    "name": "mine",
    "threads": 1,
    "workload": {
        "name": "classification",
        "model": {"name": "mynet.py:build", "options": {"width": 8}},
        "data": {"source": "folder", "path": "photos", "image_size": [12, 16]},
    },
    "baseline": {"epochs": 1, "batch_size": 16, "autocast": "fp32"},
    "search": {"method": "uniform", "images": 4, "target": {"macs_ratio": 0.5}},
    "finetune": {"top": 1, "epochs": 1, "batch_size": 16, "autocast": "fp32"},
    "export": {"parity_images": 4},
    "gate": {"max_drop": 1.0, "min_speedup": None, "promote": False},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes that a look tells apart, and a network of one's own."""
    rng = np.random.default_rng(0)
    for index in range(60):
        place = tmp_path / "mine/photos" / ("train", "test")[index % 3 == 0] / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (14, 20, 3), dtype=np.uint8) + np.uint8(120 * (index % 2))
        Image.fromarray(pixels).save(place / f"{index}.png")
    mine = tmp_path / "mine"
    (mine / "mynet.py").write_text(NETWORK)
    (mine / "layers.py").write_text(LAYERS)
    device = {"profile": str(quick_device(mine)), "probe": False}
    (mine / "run.yaml").write_text(yaml.safe_dump({**RUN, "device": device}))
    monkeypatch.chdir(mine)
    return mine


@pytest.fixture
def secateur(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run ``secateur ARGUMENTS`` in this process: exit code and what was printed."""
    path = list(sys.path)

    def run(*arguments: object) -> tuple[int, str]:
        trust.withdraw_all()  # as a new process
        sys.path[:] = path
        sys.modules.pop("layers", None)
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out + shown.err

    return run


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_of_ones_own_is_trusted_pruned_and_exported(
    folder: Path, secateur: Callable[..., tuple[int, str]]
) -> None:
    code, said = secateur("run", "run.yaml")
    assert code == EXIT_USER and "mynet.py:build" in said and f"secateur trust {folder}" in said
    assert secateur("trust", folder)[0] == 0
    code, said = secateur("validate", "run.yaml", "--no-estimate")
    assert code == 0, said
    trust.withdraw_all()
    config = trust.consented(lambda: load_run_file(folder / "run.yaml"), folder / "run.yaml")
    facts = perform(opened(config), until="export")
    assert facts.export.certificate.ok and facts.export.compact.parity.ok
    assert facts.export.usage["image_size"] == [12, 16] and facts.export.usage["classes"] == ["a", "b"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_same_from_the_command_line(folder: Path, tmp_path: Path, secateur: Callable[..., tuple[int, str]]) -> None:
    code, said = secateur("run", "run.yaml", "--trust")
    assert code == 0, said
    (run,) = (tmp_path / "home/runs").iterdir()
    assert secateur("resume", run)[0] == 0, "a run directory inherits the consent"
    code, said = secateur("pull", "mine@challenger", "-o", tmp_path / "model")
    assert code == 0 and (tmp_path / "model/model.onnx").is_file(), said


def test_a_network_with_other_outputs_is_told(folder: Path, secateur: Callable[..., tuple[int, str]]) -> None:
    (folder / "mynet.py").write_text(NETWORK.replace("2 * width, num_classes)", "2 * width, 7)"))
    code, said = secateur("validate", "run.yaml", "--trust", "--no-estimate")
    assert code == EXIT_USER and "(1, 7)" in said and "(1, 2)" in said and "num_classes" in said
