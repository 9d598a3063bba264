"""Every search method on a real network, real images and a real device: small, but from request to answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from device_profiles import Target as DeviceTarget
from device_profiles import load_profile, open_target
from pipeline.assemble import widths_costs
from pipeline.config import FinetuneSection, SearchSection
from pipeline.evaluator import Evaluator, recalibrate
from pipeline.journal import Journal
from pipeline.study import Study
from pruning.channels import ChannelGraph
from pruning.plan import SearchSpace
from pruning.reward import make_reward
from pruning.search import load, methods
from pruning.search.protocol import Budget, Candidate, Problem, Target

from .helpers import digits, quick_device

BRIEF: dict[str, dict[str, Any]] = {
    "acp": {"population": 2, "cycles": 1, "fitness_epochs": 0.1, "images": 20},
    "aofp": {"batches": 4, "finetune_epochs": 0.1},
    "ccep": {"outer_iterations": 4, "population": 2, "generations": 1, "finetune_epochs": 0.1, "ratio_bound": 0.7},
    "dafp": {"epochs": 0.2},
    "dais": {"epochs": 0.3},
    "evofc": {"population": 2, "offspring": 2, "generations": 1, "epochs": 0.4, "images": 32, "start": "pretrained"},
    "filter_ensemble": {"max_masks": 1, "min_masks": 1, "images": 32},
    "icp": {"rounds": 2, "finetune_epochs": 0.1, "images": 20},
    "meta": {"population": 4, "iterations": 1, "epochs": 0.2},
    "optuna": {"num_plans": 4},
    "random": {"num_plans": 3},
    "rewarded_meta": {"population": 4, "iterations": 1, "epochs": 0.2},
}
MACS = 0.6


@dataclass
class Network:
    """A small trained network with all that a search needs."""

    model: nn.Module
    graph: ChannelGraph
    workload: Any
    profile: Any
    target: DeviceTarget

    def oracle(self, folder: Path) -> Evaluator:
        recipe = FinetuneSection(epochs=1, batch_size=64, lr=0.02)
        settings = SearchSection(images=64)
        return Evaluator(
            self.model, self.graph, self.workload, self.profile, self.target, folder, settings, recipe, seed=1
        )


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    torch.manual_seed(0)
    workload = digits(image_size=8)
    model = workload.build_model()
    recalibrate(model, workload, 512, torch.device("cpu"))
    graph = ChannelGraph.trace(model, workload.example_input())
    profile = load_profile(quick_device(tmp_path_factory.mktemp("device")))
    target = open_target(profile)
    yield Network(model, graph, workload, profile, target)
    target.close()


def searched(method: str, network: Network, folder: Path, oracle: Any) -> tuple[Any, Study]:
    """The archive of a brief search, continued from the journal in ``folder`` if there is one."""
    module, space = load(method), SearchSpace.of(network.graph.groups, channel_multiple=4)
    with Journal(folder / "journal.jsonl", "run", "config") as journal:
        reference = Study(journal, oracle, stage="reference").evaluate(Candidate(0, space.full, "reference"), True)
        oracle.calibrate(reference)
        problem = Problem(
            space,
            reference,
            make_reward("rewarded_v2", reference),
            lambda widths: widths_costs(network.graph, space, widths),
            Target(macs_ratio=MACS),
            np.random.default_rng(0),
        )
        study = Study(journal, oracle, budget=Budget(seconds=1000))
        return study.run(module.search(problem, module.Options(**BRIEF.get(method, {})))), study


@pytest.mark.parametrize("method", sorted(methods()))
def test_it_finds_a_plan_within_the_target_and_resumes_to_it(method: str, network: Network, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    archive, study = searched(method, network, tmp_path, network.oracle(tmp_path))
    macs = [entry.evaluation["macs"] for entry in archive]
    full = widths_costs(
        network.graph, SearchSpace.of(network.graph.groups), np.array([[g.size for g in network.graph.groups]])
    )
    assert min(macs) <= MACS * full["macs"][0]
    assert study.spent["images_forwarded"] > 0
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{method} changed {name} of the unpruned network"
    oracle = network.oracle(tmp_path)  # a new process: everything from the journal and the files
    again, resumed = searched(method, network, tmp_path, oracle)
    assert [e.candidate for e in again] == [e.candidate for e in archive]
    assert resumed.spent == study.spent
    assert not any(oracle.spent.values())
    best = archive[0].candidate  # whatever it refers to can be trained on
    assert oracle.network(best.plan, best.base)(network.workload.example_input()).shape == (1, 10)
