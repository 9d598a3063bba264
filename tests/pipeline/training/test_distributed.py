"""Several processes train as one does, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.guard import marked
from secateur.pipeline.training.curve import Fitted
from secateur.pipeline.training.loop import fit
from secateur.pipeline.workloads.classification import Classification
from tests.pipeline.helpers import digits

CPU = torch.device("cpu")
STEPS = 50


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm that stays in eval mode."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(False)
        return self


class Dying(nn.Identity):
    """Ends every process but the first, once it has seen enough."""

    seen = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        if self.seen > 2 and torch.distributed.is_initialized() and torch.distributed.get_rank():
            os._exit(7)
        return input


def network(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, stride=2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def workload() -> Classification:
    return digits(augment="shift")


def trained(workload: Any, norm: nn.Module, folder: Path, count: int, **keys: Any) -> tuple[nn.Module, Fitted]:
    """One batch an epoch, so that the curve holds the loss of every step."""
    model = network(norm)
    recipe = Recipe.model_validate(
        {"epochs": STEPS, "lr": 0.05, "batch_size": 64, "autocast": "fp32", "warmup_steps": 3, **keys}
    )
    split = workload.train.first(recipe.batch_size - 1 if recipe.batch_size == 64 else 2 * recipe.batch_size + 1)
    fitted = fit(model, workload, split, recipe, seed=1, checkpoint=folder / "c", compute=CPU, compute_count=count)
    return model, fitted


def losses(fitted: Fitted) -> list[float]:
    return [epoch.loss for epoch in fitted.curve]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group norm": partial(nn.GroupNorm, 2),
    "batch norm in eval mode": FrozenNorm,
    "live batch norm": nn.BatchNorm2d,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NORMS)
def test_two_processes_have_the_losses_of_one(kind: str, workload: Classification, tmp_path: Path) -> None:
    """63 images a batch, so that one process has one more than the other. Where batch norm lives, each process
    normalises its own part, which is what one process does with the parts of a batch."""
    _, two = trained(workload, NORMS[kind](8), tmp_path, 2)
    _, one = trained(workload, NORMS[kind](8), tmp_path, 1, accumulate=2 if kind == "live batch norm" else 1)
    assert len(losses(two)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert losses(one)[-1] < 0.7 * losses(one)[0]


@pytest.mark.long
def test_a_batch_smaller_than_the_group_is_learned_from_too(workload: Classification, tmp_path: Path) -> None:
    """Batches of 8, 8 and 1 images."""
    keys = {"batch_size": 8, "epochs": 2}
    one, curve = trained(workload, nn.GroupNorm(2, 8), tmp_path, 1, **keys)
    two, found = trained(workload, nn.GroupNorm(2, 8), tmp_path, 2, **keys)
    assert losses(found) == pytest.approx(losses(curve), rel=1e-4)
    other = two.state_dict()
    assert all(torch.allclose(tensor, other[name], rtol=1e-3, atol=1e-5) for name, tensor in one.state_dict().items())


@pytest.mark.slow
def test_a_process_that_dies_is_told(workload: Classification, tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=r"process 1 of the training ended \(7\)"):
        trained(workload, Dying(), tmp_path, 2, batch_size=8)


KILLED = """
import sys
from pathlib import Path
from torch import nn
from tests.pipeline.training.test_distributed import digits, trained
if __name__ == "__main__":
    trained(digits(augment="shift"), nn.GroupNorm(2, 8), Path(sys.argv[1]), 2, epochs=100_000)
"""


@pytest.mark.slow
def test_no_process_outlives_a_training_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "SECATEUR_HOME": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py"), str(tmp_path)], env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (mark := _mark(tmp_path)) or not marked(mark):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    while marked(mark):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _mark(home: Path) -> str:
    """Of what the process has started."""
    return next((file.stem for file in (home / "processes").glob("*.json")), "")
