"""``search.scope`` of a run: recorded, replayed, counted in the budget of its search, written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.opening import device_space, head_prefixes_of, search_space, search_spaces
from secateur.pipeline.run.preflight import Network, examine
from secateur.pipeline.run.rehearsal import Rehearsal
from secateur.pipeline.run.scope import STAGE, choose_scope, write_down
from secateur.pipeline.run.study import Study
from secateur.pipeline.workloads.detection.networks import build_detector
from secateur.pruning.search.protocol import Candidate
from secateur.pruning.search.reward import make_reward
from secateur.pruning.search.scope import ScopeChoice
from secateur.pruning.trace import trace
from tests.pipeline.helpers import tiny_config


class Forgetful(Rehearsal):
    """Counts how often it is asked."""

    asked = 0

    def evaluate(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        return super().evaluate(*args, **options)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    found = examine(tiny_config(tmp_path_factory.mktemp("network"))).network
    assert found is not None
    return found


def settle(file: Path, network: Network, **search: Any) -> tuple[ScopeChoice, Study, int]:
    """The choice, its study, and how many candidates were evaluated anew."""
    config = tiny_config(file.parent, search=search)
    oracle = Forgetful(config, network.graph, (100, 50), ("top1",), {})
    reference = oracle.evaluate(Candidate(0, oracle.full, "reference"), latency=True)
    reward = make_reward(config.reward.preset, reference, "top1", **config.reward.options)
    with Journal(file, "run", "config") as journal:
        study, before = Study(journal, oracle, stage=STAGE), oracle.asked
        choice = choose_scope(config, study, network.graph, network.spaces, reference, reward, "top1")
        write_down(journal, choice)
    return choice, study, oracle.asked - before


def test_a_choice_is_recorded_counted_and_replayed_without_being_measured_again(
    tmp_path: Path, network: Network
) -> None:
    file = tmp_path / "journal.jsonl"
    first, study, asked = settle(file, network, target={"macs_ratio": 0.5})
    lines = file.read_bytes().count(b"\n")
    again, replayed, asked_again = settle(file, network, target={"macs_ratio": 0.5})
    assert again == first and first.reason
    assert (asked, asked_again) == (2, 0)
    assert study.spent["evaluations"] == replayed.spent["evaluations"] == 2
    assert file.read_bytes().count(b"\n") == lines, "a replay writes nothing"
    kinds = [record["kind"] for record in study.journal.records if record.get("stage") == STAGE]
    assert kinds == ["score", "evaluation", "evaluation", "choice"]


def test_what_another_study_spent_counts_in_the_budget(tmp_path: Path, network: Network) -> None:
    _, before, _ = settle(tmp_path / "journal.jsonl", network, target={"macs_ratio": 0.5})
    with Journal(tmp_path / "other.jsonl", "run", "config") as journal:
        study = Study(journal, before.oracle)
        study.charge(before.spent)
    assert study.spent["evaluations"] == 2


def test_inner_groups_of_a_residual_network_are_those_of_its_blocks(network: Network) -> None:
    assert network.spaces.inner is not None
    assert set(network.spaces.whole.names) - set(network.spaces.inner.names) == network.graph.summed & set(
        network.spaces.whole.names
    )


def test_what_a_detectors_heads_read_is_not_inner(tmp_path: Path) -> None:
    model = build_detector("small_ssd", 3, {}).eval()
    graph = trace(model, torch.zeros(1, 3, 64, 64))
    spaces = search_spaces(tiny_config(tmp_path), graph, 1, head_prefixes_of(model))
    assert spaces.inner is not None
    outer = set(spaces.whole.names) - set(spaces.inner.names)
    read = {g.name for g in graph.groups if any(m.reads and m.tensor.startswith("heads.") for m in g.members)}
    assert outer == graph.summed | read and read - graph.summed


def test_without_sums_and_heads_there_is_one_space(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 4, 3))
    assert search_spaces(tiny_config(tmp_path), trace(plain, torch.zeros(1, 3, 8, 8)), 1).inner is None


@pytest.mark.parametrize(
    ("search", "device", "step", "devices"), [(None, None, 8, 8), (1, None, 1, 8), (2, 4, 2, 4), (None, 4, 4, 4)]
)
def test_the_searchs_multiple_goes_before_the_devices(
    tmp_path: Path, network: Network, search: int | None, device: int | None, step: int, devices: int
) -> None:
    config = tiny_config(tmp_path, search={"channel_multiple": search}, device={"channel_multiple": device})
    for space_of, multiple in ((search_space, step), (device_space, devices)):
        space = space_of(config, network.graph, 8)
        assert {width % multiple for width in space.allowed["layer2.0.conv1"]} == {0}
        assert len(space.allowed["layer2.0.conv1"]) == len([w for w in range(multiple, 33, multiple) if w >= 3.2])
