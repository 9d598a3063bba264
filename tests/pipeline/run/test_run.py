"""Opening a run: what it refuses, and what it sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.pipeline.errors import JournalError, UserError
from secateur.pipeline.progress import Silent
from secateur.pipeline.run.opening import check_forward
from secateur.pipeline.run.run import Run, create_run_directory
from tests.pipeline.helpers import opened, quick_device, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": {"profile": "lokal"}}, r"(?s)lokal.*local"),
        ({"workload": {"model": {"name": "cifar/resnet8", "weights": "no.safetensors"}}}, "weights file not found"),
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
    config = tiny_config(tmp_path)
    quick_device(tmp_path, timing=False)
    with pytest.raises(UserError, match="timing: false"):
        opened(config)


def test_threads_follow_what_the_process_may_use_unless_the_run_file_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("secateur.pipeline.run.run.usable_cores", lambda: 2)
    try:
        for threads, expected in ((None, 2), (1, 1)):
            with opened(tiny_config(tmp_path, threads=threads)):
                assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
