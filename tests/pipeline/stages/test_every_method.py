"""Every search method on real networks, real images and a real device: small, but from request to answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.device_profiles import Target as DeviceTarget
from secateur.device_profiles import load_profile, open_target
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.schema import FinetuneSection, Recipe, SearchSection
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import Evaluator, make_evaluator
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.opening import widths_costs
from secateur.pipeline.run.study import Oracle, Study
from secateur.pipeline.training.loop import fit
from secateur.pipeline.training.statistics import recalibrate, training_images
from secateur.pipeline.workloads import detection
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Budget, Candidate, Goal, Problem
from secateur.pruning.search.reward import make_reward
from secateur.pruning.trace import trace
from tests.pipeline.helpers import digits, quick_device

BRIEF: dict[str, dict[str, Any]] = {
    "acp": {"population": 2, "cycles": 1, "best_epochs": 0.1, "inherit": "l1", "images": 20},
    "aofp": {"batches": 2, "batch_size": 16, "stagger": 1, "threshold": 0.5, "finetune_epochs": 0.1},
    "ccep": {
        "outer_iterations": 3,
        "population": 2,
        "generations": 1,
        "finetune_epochs": 0.1,
        "initial_keep": 0.7,
        "ratio_bound": 0.5,
    },
    "dafp": {"epochs": 0.2},
    "dais": {"epochs": 0.3},
    "evofc": {"population": 2, "offspring": 2, "generations": 1, "epochs": 0.4, "best_epochs": 0.1, "images": 32},
    "filter_ensemble": {
        "rounds": 2,
        "finetune_epochs": 0.1,
        "max_masks": 1,
        "min_masks": 1,
        "bundle": 16,
        "images": 12,
    },
    "icp": {"rounds": 2, "finetune_epochs": 0.1, "images": 20},
    "meta": {"population": 4, "iterations": 1, "epochs": 0.2, "top": 2},
    "optuna": {"num_plans": 3},
    "random": {"num_plans": 3},
    "rewarded_meta": {"population": 4, "iterations": 1, "epochs": 0.2, "top": 2},
}
MACS = 0.6
BY_LOSS = ("ccep", "global", "rewarded_meta")
"""A method of every family: evolution on the network's own weights, saliency, a supernet."""
ON_DETECTOR = ("aofp", "dafp", "filter_ensemble")
"""A method for every other request: distances of feature maps, what the next layers see, a training, masks."""
CPU = torch.device("cpu")


class Port:
    """An evaluator, but only what a study may ask of one."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __getattr__(self, name: str) -> Any:
        if name not in vars(Oracle):
            raise AttributeError(f"{name} is no part of the evaluator's port")
        return getattr(self._evaluator, name)


@dataclass
class Network:
    """A small trained network with all that a search needs."""

    model: nn.Module
    graph: ChannelGraph
    workload: Any
    profile: Any
    target: DeviceTarget
    template: Path
    images: int
    recipe: FinetuneSection

    @property
    def space(self) -> SearchSpace:
        return SearchSpace.of(self.graph.groups, channel_multiple=4)

    def oracle(self, folder: Path) -> Evaluator:
        shutil.copy(self.template, folder / "template.onnx")  # exported once: it takes seconds
        settings = SearchSection(images=self.images)
        baseline = Baseline(self.model, self.graph, self.workload, seed=1)
        return make_evaluator(baseline, Fleet([Device(self.profile, self.target)]), folder, settings, self.recipe)

    def costs(self, widths: IntArray) -> dict[str, Any]:
        return widths_costs(self.graph, self.space, widths)

    def macs(self, plan: PruningPlan) -> float:
        return float(self.costs(self.space.encode(plan)[None])["macs"][0])


def scenes(**metrics: Any) -> detection.Detection:
    options = {
        "data": {"source": "digits", "image_size": 64, "scenes": 150},
        "input": {"augment": "none"},
        "metrics": {"least_score": 0.05, "per_class": 20, "most": 20, **metrics},
    }
    return detection.build(detection.Options.model_validate(options))


@pytest.fixture(scope="module")
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network")
    workload: Any
    if request.param == "classifier":
        workload, images, recipe = (
            digits(image_size=8),
            64,
            FinetuneSection(epochs=1, batch_size=64, lr=0.02, autocast="fp32"),
        )
        model = workload.build_model()
        recalibrate(model, training_images(workload, workload.train, 512, CPU))
    else:
        workload, images = scenes(), 12
        recipe = FinetuneSection(epochs=1, batch_size=16, lr=0.01, clip_norm=5.0, autocast="fp32")
        model = workload.build_model()
        by_heart = Recipe(
            epochs=25, batch_size=images, lr=0.02, clip_norm=5.0, autocast="fp32"
        )  # the scenes that it is judged by
        few = workload.search.first(images)
        fit(model, workload, few, by_heart, seed=0, checkpoint=folder / "fit.ckpt", compute=CPU)
    example = workload.example_input()
    graph = trace(model.eval(), example)
    OnnxTemplate.export(model, example, graph, folder / "template.onnx")
    profile = load_profile(quick_device(folder))
    target = open_target(profile)
    yield Network(model, graph, workload, profile, target, folder / "template.onnx", images, recipe)
    target.close()


def searched(method: str, network: Network, folder: Path, oracle: Any) -> tuple[Any, Study]:
    """The archive of a brief search, continued from the journal in ``folder`` if there is one."""
    module, space, metric = METHODS.load(method), network.space, network.workload.search_metric
    with Journal(folder / "journal.jsonl", "run", "config") as journal:
        reference = Study(journal, oracle, stage="reference").evaluate(Candidate(0, space.full, "reference"), True)
        oracle.calibrate(reference)
        problem = Problem(
            space,
            reference,
            make_reward("rewarded_v2", reference, metric),
            network.costs,
            Goal(macs_ratio=MACS),
            np.random.default_rng(0),
            metric=metric,
        )
        study = Study(journal, Port(oracle), budget=Budget(seconds=1000))
        return study.run(module.search(problem, module.Options(**BRIEF.get(method, {})))), study


def check_a_search(method: str, network: Network, folder: Path) -> None:
    workload, dense = network.workload, network.model.state_dict()
    before = {name: tensor.clone() for name, tensor in dense.items()}
    archive, study = searched(method, network, folder, network.oracle(folder))
    assert min(entry.evaluation["macs"] for entry in archive) <= MACS * network.macs(network.space.full)
    assert all(0 <= entry.evaluation[workload.search_metric] <= 1 for entry in archive)
    assert study.spent["images_forwarded"] > 0
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{method} changed {name} of the unpruned network"
    oracle = network.oracle(folder)  # a new process: everything from the journal and the files
    again, resumed = searched(method, network, folder, oracle)
    assert [e.candidate for e in again] == [e.candidate for e in archive]
    assert resumed.spent == study.spent
    assert not any(oracle.spent.values())
    best = archive[0].candidate  # whatever it refers to can be trained on
    check_outputs(network, best.plan, oracle.network(best.plan, best.base))


def check_outputs(network: Network, plan: PruningPlan, pruned: nn.Module) -> None:
    """Its outputs are those of the unpruned network in kind, and what its last layers read is what the plan left."""
    example = network.workload.example_input()
    with torch.no_grad():
        outputs = pruned(example)
        assert outputs.shape == network.model(example).shape
    assert outputs.isfinite().all()
    left = {m.tensor: plan.widths[g.name] for g in network.graph.groups for m in g.members if m.reads}
    last = getattr(network.model, "head_prefixes", ("fc.",))
    whole = network.model.state_dict()
    for name, tensor in pruned.state_dict().items():
        if name.startswith(tuple(last)):
            assert tensor.shape[0] == whole[name].shape[0]
            assert tensor.ndim == 1 or tensor.shape[1] == left[name]


@pytest.mark.parametrize("network", ["classifier"], indirect=True)
@pytest.mark.parametrize("method", METHODS.names())
def test_it_finds_a_plan_within_the_target_and_resumes_to_it(method: str, network: Network, tmp_path: Path) -> None:
    check_a_search(method, network, tmp_path)


@pytest.mark.parametrize("network", ["detector"], indirect=True)
@pytest.mark.parametrize(
    "method", [pytest.param(n, marks=[pytest.mark.long] * (n not in ON_DETECTOR)) for n in METHODS.names()]
)
def test_it_does_so_on_a_detector(method: str, network: Network, tmp_path: Path) -> None:
    check_a_search(method, network, tmp_path)


@pytest.mark.parametrize("network", ["detector"], indirect=True)
@pytest.mark.parametrize("method", BY_LOSS)
def test_it_can_go_by_the_loss_where_precision_is_dear(method: str, network: Network, tmp_path: Path) -> None:
    by_loss = replace(network, workload=scenes(search="loss"))
    assert by_loss.workload.search_metric == "loss_score"
    check_a_search(method, by_loss, tmp_path)


@pytest.mark.parametrize("network", ["detector"], indirect=True)
def test_no_group_is_a_part_of_what_the_heads_give(network: Network, tmp_path: Path) -> None:
    oracle, space = network.oracle(tmp_path), network.space
    heads = {name for name in network.graph.shapes if name.startswith(("heads.box.", "heads.cls."))}
    assert len(heads) == 12  # weights and biases of two heads on three maps
    given = [m for g in network.graph.groups for m in g.members if m.tensor in heads and not m.reads]
    assert not given
    for group in network.graph.groups:
        plan = space.full.replace({group.name: range(space.allowed[group.name][0])})
        check_outputs(network, plan, oracle.network(plan))
    narrowest = space.full.replace({name: range(widths[0]) for name, widths in space.allowed.items()})
    whole, least = (oracle.evaluate(Candidate(0, plan, "test"), False)["map50"] for plan in (space.full, narrowest))
    assert least < 0.5 < whole  # so that plans can be told apart
