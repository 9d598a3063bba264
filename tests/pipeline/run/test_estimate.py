"""What a run will take is counted as it will be asked for, and timing it leaves nothing behind."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.pipeline.cli import app as cli
from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.progress import Silent
from secateur.pipeline.run import rehearsal
from secateur.pipeline.run.estimate import Estimate, estimate
from secateur.pipeline.run.preflight import examine
from secateur.pipeline.run.rehearsal import Counted
from secateur.pipeline.run.run import Run, create_run_directory
from secateur.pruning.search import METHODS
from tests.pipeline.helpers import perform, tiny_config, write_tiny

Changes = dict[str, Any]
HALF = {"macs_ratio": 0.5}
SECONDS = {"images_trained": 0.01, "images_scored": 0.001, "networks": 0.1, "measurements": 1.0}
"""Made-up prices."""


def counted(config: RunFile, images: tuple[int, int] = (1000, 64)) -> Counted:
    network = examine(config).network
    assert network is not None
    return rehearsal.rehearse(config, network.graph, network.spaces, images, ("top1", "top1"), SECONDS)


# -- beside a real run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home, so that one baseline does for all."""
    return tmp_path_factory.mktemp("home")


REAL: dict[str, tuple[Changes, float]] = {
    "random": ({"options": {"num_plans": 4}, "latency": {"mode": "measure"}}, 1.0),
    "optuna": ({"options": {"num_plans": 4, "sampler": "random"}, "target": HALF, "budget": {"evaluations": 3}}, 1.0),
    "global": ({"options": {}, "target": HALF}, 1.0),
    "ccep": ({}, 1.5),
    "dafp": ({"options": {"epochs": 0.2}, "target": HALF}, 1.0),
}
"""Options of the search, and by which factor its own decisions may change the number of evaluations."""
LONG = ("optuna", "global")
"""Rehearsed like others of these."""


@pytest.mark.filterwarnings("ignore")  # MLflow's own
@pytest.mark.parametrize("method", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in REAL])
def test_counts_are_those_of_the_journal(
    method: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(home))
    changes, factor = REAL[method]
    config = tiny_config(tmp_path, search={"method": method, **changes}, finetune={"epochs": 0.2, "top": 1})
    found = examine(config)
    taken = estimate(found)
    assert taken is not None
    with Run(create_run_directory(config), Silent()) as run:
        perform(run, "finetune")
        records = [record for record in run.journal.records if record["kind"] != "run"]
    asked = [record for record in records if record["stage"] in ("search", "scope")]
    evaluations = sum(record["kind"] in ("evaluation", "finetune") for record in asked)
    assert evaluations / factor <= taken.counted.evaluations <= evaluations * factor
    assert taken.counted.epochs == pytest.approx(sum(record.get("epochs", 0.0) for record in asked), abs=1e-9)
    assert taken.counted.complete
    assert len(taken.counted.finals) == sum(record["stage"] == "final" for record in records)
    if factor == 1.0:
        assert taken.work["measurements"] == sum(
            record["spent"]["measurements"] for record in records if "spent" in record
        )


# -- rehearsed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_is_rehearsed(method: str, tmp_path: Path) -> None:
    found = counted(tiny_config(tmp_path, search={"method": method, "options": {}, "target": HALF}))
    assert found.work["networks"] > 0
    assert all(0 < ratio <= 1 for ratio in found.finals)


@pytest.mark.parametrize("method", ["ccep", "optuna", "random"])
def test_budgets_bound_a_rehearsal(method: str, tmp_path: Path) -> None:
    def of(budget: Changes) -> Counted:
        return counted(
            tiny_config(tmp_path, search={"method": method, "options": {}, "target": HALF, "budget": budget})
        )

    assert 4 <= of({"evaluations": 5}).evaluations <= 5  # one is kept back
    assert of({"epochs": 0}).epochs == 0
    whole, short = of({"evaluations": 40}), of({"evaluations": 40, "seconds": 3})
    assert 0 < short.evaluations < whole.evaluations


def test_a_search_that_takes_too_long_to_rehearse_is_counted_as_far_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "CPU_SECONDS", 0.0)
    assert not counted(tiny_config(tmp_path)).complete


def test_a_rehearsal_is_the_same_each_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert counted(config) == counted(config)


# -- timed ------------------------------------------------------------------------------------------------------------


def estimated(folder: Path, **changes: Any) -> Estimate:
    taken = estimate(examine(tiny_config(folder, **changes)))
    assert taken is not None
    return taken


def test_parts_sum_up(tmp_path: Path) -> None:
    taken = estimated(tmp_path)
    assert taken.seconds == pytest.approx(sum(part.seconds for part in taken.parts))
    assert taken.cpu_seconds == pytest.approx(sum(part.cpu_seconds for part in taken.parts))
    assert taken.memory_bytes == sum(taken.memory.values())
    assert all(part.seconds >= 0 for part in taken.parts)
    assert all(size > 0 for size in taken.memory.values())


def test_longer_runs_take_longer(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    images = examine(config).workload
    assert images is not None
    brief, long = (
        estimated(tmp_path, baseline={"epochs": epochs}, finetune={"top": top}) for epochs, top in ((1, 1), (3, 2))
    )
    assert long.work["images_trained"] > brief.work["images_trained"] + 2 * len(images.train) - 1
    assert len(long.counted.finals) == 2


def test_given_weights_need_no_baseline(tmp_path: Path) -> None:
    model = examine(tiny_config(tmp_path)).workload
    assert model is not None
    torch.save(model.build_model().state_dict(), tmp_path / "weights.pt")
    weights = {"model": {"name": "cifar/resnet8", "weights": str(tmp_path / "weights.pt")}}
    parts = {part.stage: part for part in estimated(tmp_path, workload=weights).parts}
    assert parts["Baseline"].seconds == 0


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    found = examine(tiny_config(tmp_path))
    torch.manual_seed(5)
    threads, files = torch.get_num_threads(), sorted(tmp_path.rglob("*"))
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert estimate(found) is not None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]
    assert torch.get_num_threads() == threads
    assert sorted(tmp_path.rglob("*")) == files


def test_a_faulty_run_has_no_estimate(tmp_path: Path) -> None:
    assert estimate(examine(tiny_config(tmp_path, search={"frozen": ["nope*"]}))) is None


# -- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False])
def test_validate_tells_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, wanted: bool
) -> None:
    def call(*more: str) -> str:
        arguments = ["secateur", "validate", str(write_tiny(tmp_path)), *more, *([] if wanted else ["--no-estimate"])]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    assert ("On this machine, about " in call()) is wanted
    told = json.loads(call("--json"))["estimate"]
    assert (told is not None) is wanted
    if wanted:
        assert told["seconds"] == pytest.approx(sum(part["seconds"] for part in told["parts"]), abs=0.5)
        assert told["memory_bytes"] == sum(told["memory"].values())
        assert told["evaluations"] > 0
