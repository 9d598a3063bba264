"""Supernets of small networks on the digits: they learn, resume exactly, and answer with weights for any plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.pipeline.config.schema import FinetuneSection
from secateur.pipeline.progress import silent
from secateur.pipeline.training import auxiliary as learning
from secateur.pipeline.training.auxiliary import Outcome, Task, pruning_net, shared
from secateur.pipeline.training.checkpoints import load_weights, save_weights
from secateur.pipeline.training.statistics import recalibrate, training_images
from secateur.pipeline.workloads.classification import Classification
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.saliency import channel_saliency
from secateur.pruning.supernet import scaled_space
from secateur.pruning.trace import trace
from secateur.pruning.weights import inherit
from tests.pipeline.helpers import digits

CPU = torch.device("cpu")
KINDS = [pruning_net, shared]
LEADING = "leading"


class KilledError(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def workload() -> Classification:
    return digits(augment="shift")


@pytest.fixture(scope="module")
def graph(workload: Classification) -> ChannelGraph:
    return trace(workload.build_model(), workload.example_input())


def fresh(workload: Classification) -> nn.Module:
    torch.manual_seed(0)
    return workload.build_model()


def teach(
    kind: ModuleType,
    workload: Classification,
    graph: ChannelGraph,
    path: Path,
    epochs: float = 1,
    die_at: int = -1,
    **options: float | str,
) -> Outcome:
    def report(done: int, total: int, note: str = "") -> None:
        if done == die_at:
            raise KilledError

    recipe = FinetuneSection(epochs=epochs, lr=0.1, batch_size=128, autocast="fp32")
    task = Task(fresh(workload), graph, workload, recipe, 1, CPU, path / "x.ckpt", report or silent, options)
    outcome: Outcome = kind.train(task)
    return outcome


def accuracy(workload: Classification, graph: ChannelGraph, state: Mapping[str, Tensor], plan: PruningPlan) -> float:
    network = inherit(fresh(workload), graph, plan, state).eval()
    recalibrate(network, training_images(workload, workload.train, 512, CPU))
    images, targets = workload.batch(
        workload.search, torch.arange(len(workload.search)), train=False, generator=None, device=CPU
    )
    with torch.no_grad():
        return workload.metrics(network(images), targets)["top1"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_weights_that_work_at_every_width(kind, workload, graph, tmp_path):
    outcome = teach(kind, workload, graph, tmp_path, epochs=4)
    assert outcome.images == 4 * len(workload.train)
    path = tmp_path / "w.safetensors"
    save_weights(path, dict(outcome.state))
    state, space = load_weights(path), scaled_space(graph)
    rng = np.random.default_rng(0)
    plans = [space.full]
    for _ in range(3):
        plans.append(space.decode([rng.choice(space.allowed[n][12:]) for n in space.names], outcome.scores))
    found = [accuracy(workload, graph, kind.weights(fresh(workload), graph, state, plan), plan) for plan in plans]
    assert min(found) > 0.3  # chance: 0.1
    untrained = [accuracy(workload, graph, fresh(workload).state_dict(), plan) for plan in plans]
    assert np.mean(found) > np.mean(untrained) + 0.3


def test_generated_weights_depend_on_the_widths_and_shared_ones_do_not(workload, graph, tmp_path):
    full = PruningPlan.full(graph.groups)
    narrow = full.replace({"layer1.0.conv1": range(8)})
    for kind in KINDS:
        state = teach(kind, workload, graph, tmp_path).state
        a, b = (kind.weights(fresh(workload), graph, state, plan) for plan in (full, narrow))
        assert a.keys() == fresh(workload).state_dict().keys()
        assert all(a[n].shape == t.shape and not a[n].requires_grad for n, t in fresh(workload).state_dict().items())
        changed = {n for n in a if not torch.equal(a[n], b[n])}
        assert changed == ({"layer1.0.conv1.weight", "layer1.0.conv2.weight"} if kind is pruning_net else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("die_at", [1, 11, 14])
def test_a_killed_training_continues_to_the_same_state(kind, die_at, workload, graph, tmp_path):
    expected = teach(kind, workload, graph, tmp_path, epochs=2)
    with pytest.raises(KilledError):
        teach(kind, workload, graph, tmp_path, epochs=2, die_at=die_at)
    resumed = teach(kind, workload, graph, tmp_path, epochs=2)
    assert resumed.images == expected.images
    assert resumed.state.keys() == expected.state.keys()
    assert all(torch.equal(resumed.state[n], t) for n, t in expected.state.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_are_the_order_in_which_channels_stay(kind, workload, graph, tmp_path):
    leading = teach(kind, workload, graph, tmp_path, epochs=0.1).scores
    assert all(scores.tolist() == [-i for i in range(len(scores))] for scores in leading.values())
    expected = channel_saliency(fresh(workload), graph, "l1")
    found = teach(kind, workload, graph, tmp_path, epochs=0.1, order="l1").scores
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n], s) for n, s in expected.items())


def test_only_the_given_widths_are_trained(workload, graph, tmp_path):
    widths = {"layer2.0.conv1": [8, 16]}
    before = fresh(workload).state_dict()
    after = teach(shared, workload, graph, tmp_path, epochs=0.5, widths=json.dumps(widths)).state
    moved = (after["layer2.0.conv1.weight"] - before["layer2.0.conv1.weight"]).abs().amax((1, 2, 3))
    decay = 1e-3 * before["layer2.0.conv1.weight"].abs().amax((1, 2, 3))
    assert (moved[:16] > 2 * decay[:16]).all()
    assert (moved[16:] <= decay[16:]).all()


def test_options_reach_the_training(workload, graph, tmp_path):
    plain = teach(pruning_net, workload, graph, tmp_path, epochs=0.2).state
    assert plain["layer1.0.conv1.weight@2.weight"].shape[1] == 32
    for options in ({"hidden": 8}, {"lr": 0.01}, {"label_smoothing": 0.0}, {"max_outputs": 0}):
        other = teach(pruning_net, workload, graph, tmp_path, epochs=0.2, **options).state
        assert other.keys() != plain.keys() or any(
            other[n].shape != t.shape or not torch.equal(other[n], t) for n, t in plain.items()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden": 3}, "hiden: no such option; known: widths, order"),
        ({"order": 1.0, "lr": "fast"}, r"order: expected text, got 1.0\n  lr: expected a number, got 'fast'"),
        ({"order": "taylor"}, "'leading' or 'l1', got 'taylor'"),
        ({"widths": '{"conv9": [4]}'}, "conv9"),
        ({"widths": '{"layer2.0.conv1": [4, 99]}'}, "fewer channels than the widths say"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_that_mean_nothing_are_refused(kind, options, message, workload, graph, tmp_path):
    with pytest.raises(ValueError, match=message):
        teach(kind, workload, graph, tmp_path, **options)


def test_the_kinds_are_found_by_name():
    assert learning.TRAININGS.load("pruning_net") is pruning_net
    assert learning.TRAININGS.load("shared") is shared
