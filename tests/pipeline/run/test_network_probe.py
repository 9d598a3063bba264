"""Which widths pay in a run's own network: found on devices made of arithmetic, recorded, kept, and replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from secateur.device_profiles import DeviceError
from secateur.device_profiles.network_probe import MULTIPLES, NetworkProbe
from secateur.device_profiles.staircase import fingerprint_of
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.devices.device import RunDevice
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.progress import Silent
from secateur.pipeline.run import network_probe
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.network_probe import Cuts, Precise, Settled, probe_seconds, settle, settled
from secateur.pipeline.run.opening import spared_the_probe
from secateur.pipeline.run.widths import STREAM
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.trace import trace
from tests.device_profiles.layered import LawTarget, padded
from tests.device_profiles.tiny import quick_profile
from tests.pipeline.helpers import tiny_config

Blocks = Callable[[str], tuple[int, int]]
"""Name of a weight -> the blocks of inputs and of outputs that its layer computes whole."""


def all_of(block: int) -> Blocks:
    return lambda name: (block, block)


def inner_of(block: int) -> Blocks:
    """Only the widths inside blocks matter; those of the residual stream do not."""
    return lambda name: (block if name.startswith("up") else 1, block if name.startswith("down") else 1)


@dataclass
class NetworkTarget(LawTarget):
    """A device on which a convolution takes as long as its channels rounded up to blocks."""

    blocks: Blocks = field(default_factory=lambda: all_of(32))
    fault: BaseException | None = None
    after: int = 0
    timed: list[int] = field(default_factory=list)

    def run(self, request: Mapping[str, Any], timeout_s: float, progress: Any = None) -> dict[str, Any]:
        self.timed.append(len(request["models"]))
        if self.fault is not None and len(self.timed) > self.after:
            raise self.fault
        times = {model["name"]: self.ms(Path(model["path"])) for model in request["models"]}
        models = {
            name: {"wall_ms": [ms] * 5, "cpu_ms": [ms] * 5, "load_ms": 1.0, "first_ms": ms, "output_sha256": "00"}
            for name, ms in times.items()
        }
        return {"models": models, "environment": {}, "started": 0.0, "ended": 1.0}

    def ms(self, path: Path) -> float:
        """How long the network of a file takes."""
        total = 0.05
        for tensor in onnx.load(path).graph.initializer:
            if len(tensor.dims) == 4:
                outputs, inputs, *kernel = tensor.dims
                block_in, block_out = self.blocks(tensor.name)
                total += 1e-5 * padded(outputs, block_out) * padded(inputs, block_in) * kernel[0] ** 2
        return total


class Stream(nn.Module):
    """A residual stream of 96 channels with two blocks of 160, and a linear layer."""

    def __init__(self, stream: int = 96, inner: int = 160) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(stream, inner, 3, padding=1) for _ in range(2))
        self.up = nn.ModuleList(nn.Conv2d(inner, stream, 1) for _ in range(2))
        self.head = nn.Linear(stream, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(torch.relu(down(x)))
        return self.head(x.mean((2, 3)))


Cut = tuple[ChannelGraph, OnnxTemplate]


def cut(model: nn.Module) -> Cut:
    model.eval()
    example = torch.zeros(1, 3, 8, 8)
    graph = trace(model, example)
    return graph, OnnxTemplate.export(model, example, graph)


@pytest.fixture(scope="module")
def network() -> Cut:
    torch.manual_seed(0)
    return cut(Stream())


def fleet_of(*targets: LawTarget) -> Fleet:
    devices = []
    for i, target in enumerate(targets):
        profile = quick_profile(name=f"d{i}")
        facts = RunDevice(fingerprint_of(profile, target.prepare()), {"conv": 8}, None, {}, "a profile", {})
        devices.append(Device(profile, target, facts))
    return Fleet(devices)


def settle_in(
    folder: Path, network: Cut, *targets: LawTarget, spared: str = "", name: str = "run", seconds: float = 120.0
) -> Settled:
    """What a run finds out in its directory, under a home that later runs share."""
    graph, template = network
    with Journal(folder / name / "journal.jsonl", "run", "config") as journal:
        fleet, cuts, home = fleet_of(*targets), Cuts(graph), folder / "home"
        return settle(journal, fleet, lambda: template, cuts, home, Silent(), spared, lambda: seconds)


def test_whole_blocks_are_found(tmp_path: Path, network: Cut) -> None:
    probe = settle_in(tmp_path, network, NetworkTarget()).probes["d0"]
    assert probe.multiple == 32
    assert probe.losses[1].value > 0.1 > probe.losses[32].value
    assert set(probe.of_groups) == {group.name for group in network[0].groups}
    assert probe.multiples[STREAM] == 32


def test_what_costs_nothing_is_finer(tmp_path: Path, network: Cut) -> None:
    probe = settle_in(tmp_path, network, NetworkTarget(blocks=inner_of(32))).probes["d0"]
    inner = {name: multiple for name, multiple in probe.of_groups.items() if name.startswith("down")}
    assert set(inner.values()) == {32}
    assert probe.multiples[STREAM] == 1
    assert {trial.kind for trial in probe.trials} == set(probe.multiples)


def test_a_short_search_pays_for_few_networks_and_still_finds_the_blocks(tmp_path: Path, network: Cut) -> None:
    short, long = (probe_seconds(search) for search in (5.0, 3600.0))
    assert 10 <= short < long <= 120
    brief, whole = NetworkTarget(blocks=all_of(16)), NetworkTarget(blocks=all_of(16))
    for name, target, seconds in (("brief", brief, short), ("whole", whole, long)):
        probe = settle_in(tmp_path / name, network, target, seconds=seconds).probes["d0"]
        assert probe.multiple in (8, 16), "a cut in multiples of 8 may happen to be whole blocks"
        assert probe.losses[1].value > 0.05
    assert sum(brief.timed) < sum(whole.timed) / 2


def test_a_device_without_steps_leaves_every_width(tmp_path: Path, network: Cut) -> None:
    probe = settle_in(tmp_path, network, NetworkTarget(blocks=all_of(1))).probes["d0"]
    assert probe.multiple == 1
    assert set(probe.multiples.values()) == {1}
    assert not probe.trials, "nothing is finer than 1"


def test_what_was_found_is_recorded_kept_and_replayed(tmp_path: Path, network: Cut) -> None:
    target = NetworkTarget()
    first = settle_in(tmp_path, network, target)
    timed = len(target.timed)
    assert timed > 0
    assert settle_in(tmp_path, network, target) == first, "a resumed run sees the same"
    (tmp_path / "home").rename(tmp_path / "gone")
    assert settle_in(tmp_path, network, target) == first, "whatever becomes of the kept probe"
    (tmp_path / "gone").rename(tmp_path / "home")
    assert settle_in(tmp_path, network, target, name="another") == first
    assert len(target.timed) == timed
    settle_in(tmp_path, cut(Stream(96, 128)), target, name="another network")
    assert len(target.timed) > timed
    timed = len(target.timed)
    settle_in(tmp_path, network, NetworkTarget(version="2.0"), name="another runtime")
    with Journal(tmp_path / "another runtime" / "journal.jsonl", "run", "config") as journal:
        found = settled(journal.records)
    assert found is not None and found.probes["d0"].fingerprint != first.probes["d0"].fingerprint


def test_other_weights_are_the_same_network(network: Cut) -> None:
    torch.manual_seed(1)
    graph, template = cut(Stream())
    assert network_probe.network_of(template, Cuts(graph)) == network_probe.network_of(network[1], Cuts(network[0]))


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), DeviceError("gone", "unreachable")])
def test_what_ends_a_probe_leaves_nothing_and_the_next_run_probes_anew(
    tmp_path: Path, network: Cut, fault: BaseException
) -> None:
    for after in (0, 2, 4):
        with pytest.raises(type(fault)):
            settle_in(tmp_path, network, NetworkTarget(fault=fault, after=after))
    assert not (tmp_path / "home").exists()
    assert settle_in(tmp_path, network, NetworkTarget()).probes["d0"].multiple == 32


def test_a_device_that_cannot_hold_so_many_networks_keeps_its_own_steps(tmp_path: Path, network: Cut) -> None:
    target = NetworkTarget(fault=DeviceError("no memory", "worker-died"), after=1)
    found = settle_in(tmp_path, network, target)
    assert not found.probes and not found.of_groups
    assert "no memory" in found.reasons["d0"]
    assert settle_in(tmp_path, network, target) == found


def test_files_are_loaded_in_parts_that_fit(tmp_path: Path, network: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = NetworkTarget(), NetworkTarget()
    first = settle_in(tmp_path / "whole", network, whole)
    monkeypatch.setattr(network_probe, "LOADED_BYTES", 5_000_000)
    assert settle_in(tmp_path / "parts", network, parts).of_groups == first.of_groups
    assert max(parts.timed) < max(whole.timed) and len(parts.timed) > len(whole.timed)


def test_several_devices_get_widths_that_suit_all(tmp_path: Path, network: Cut) -> None:
    wide, fine = NetworkTarget(), NetworkTarget(blocks=all_of(8), version="8")
    found = settle_in(tmp_path, network, wide, fine)
    assert found.probes["d0"].multiple == 32 and found.probes["d1"].multiple == 8
    assert max(found.of_groups.values()) == 32
    assert {8, 32} <= set(found.best)


class Renamed:
    """Files of another precision, which this device tells by their weights' names."""

    def __init__(self, template: OnnxTemplate) -> None:
        self.template = template

    def write(self, plan: PruningPlan, path: str | Path) -> None:
        proto = onnx.load_model_from_string(self.template.slice(plan))
        for tensor in proto.graph.initializer:
            tensor.name = f"integers {tensor.name}"
        onnx.save(proto, path)


def test_widths_pay_in_every_precision_that_may_ship_and_each_is_kept_apart(tmp_path: Path, network: Cut) -> None:
    graph, template = network
    target = NetworkTarget(blocks=lambda name: (32, 32) if name.startswith("integers") else (8, 8))
    in_float = Precise("fp32", "", lambda: template)
    integers = Precise("int8", "U8S8", lambda: Renamed(template))

    def found(folder: str, *precise: Precise) -> Settled:
        journal = Journal(tmp_path / folder / "journal.jsonl", folder, "digest")
        home = tmp_path / "devices"
        answer = settle(
            journal, fleet_of(target), lambda: template, Cuts(graph), home, Silent(), precise={"d0": precise}
        )
        assert settled(journal.records) == answer
        journal.close()
        return answer

    both = found("both", in_float, integers)
    assert {name: probe.multiple for name, probe in both.probes.items()} == {"d0": 8, "d0 in int8": 32}
    assert {name: probe.precision for name, probe in both.probes.items()} == {"d0": "fp32", "d0 in int8": "int8"}
    assert set(both.of_groups.values()) == {32}
    timed = len(target.timed)
    assert set(found("float", in_float).of_groups.values()) == {8}
    assert set(found("integers", integers).of_groups.values()) == {32}
    assert len(target.timed) == timed, "both were kept"
    found("others", replace(integers, scheme="S8S8"))
    assert len(target.timed) > timed, "other number types are probed anew"
    missing = found("none", Precise("int8", "U8U8", lambda: None))
    assert missing.reasons == {"d0 in int8": "the network cannot be cut in int8"} and not missing.probes


def test_a_network_of_few_channels_is_cut_without_doubles(tmp_path: Path) -> None:
    small = cut(Stream(16, 16))
    cuts = Cuts(small[0])
    assert {multiple for multiple, _ in cuts.alike()} <= {1, 2, 4, 8, 16}
    assert settle_in(tmp_path, small, NetworkTarget(blocks=all_of(8))).probes["d0"].multiple in (4, 8)


def test_plans_have_equal_macs_and_the_multiples_asked_for(network: Cut) -> None:
    cuts = Cuts(network[0], frozen=["stem"])
    for (multiple, ratio), plan in cuts.alike().items():
        assert cuts.macs_ratio(plan) <= ratio
        space = SearchSpace.of(network[0].groups, channel_multiple=multiple, frozen=["stem"])
        assert all(plan.widths[name] in space.allowed[name] for name in space.names)
        assert plan.widths["stem"] == 96
    assert {multiple for multiple, _ in cuts.alike()} <= set(MULTIPLES)


@pytest.mark.parametrize(
    ("changes", "probed"),
    [
        ({"reward": {"preset": "rewarded_v2"}}, False),
        ({"reward": {"preset": "device"}}, True),
        ({"search": {"target": {"macs_ratio": 0.5}}, "reward": {"preset": "rewarded_v2"}}, False),
        ({"search": {"target": {"latency_ratio": 0.5}}, "reward": {"preset": "rewarded_v2"}}, True),
        ({"search": {"channel_multiple": 8}, "reward": {"preset": "device"}}, False),
        ({"device": {"channel_multiple": 8}, "reward": {"preset": "device"}}, False),
        ({"device": {"probe": False}, "reward": {"preset": "device"}}, False),
    ],
)
def test_only_searches_that_look_at_latency_pay_for_a_probe(
    tmp_path: Path, changes: dict[str, Any], probed: bool
) -> None:
    changes = {**changes, "device": {"probe": True, **changes.get("device", {})}}
    assert (spared_the_probe(tiny_config(tmp_path, **changes)) == "") == probed


def test_a_run_that_is_spared_the_probe_uses_a_kept_one_and_writes_nothing_else(tmp_path: Path, network: Cut) -> None:
    target = NetworkTarget()
    assert settle_in(tmp_path, network, target, spared="MACs only") == network_probe.NOTHING
    assert not target.timed
    with Journal(tmp_path / "run" / "journal.jsonl", "run", "config") as journal:
        assert len(journal.records) == 1
    first = settle_in(tmp_path, network, target, name="probes")
    assert settle_in(tmp_path, network, target, spared="MACs only", name="later").of_groups == first.of_groups


def test_a_run_of_an_earlier_version_goes_on_with_its_widths(tmp_path: Path, network: Cut) -> None:
    with Journal(tmp_path / "run" / "journal.jsonl", "run", "config") as journal:
        journal.append({"stage": "reference", "kind": "evaluation"})
    target = NetworkTarget()
    assert settle_in(tmp_path, network, target) == network_probe.NOTHING
    assert not target.timed


def test_a_damaged_kept_probe_is_found_anew(tmp_path: Path, network: Cut) -> None:
    first = settle_in(tmp_path, network, NetworkTarget())
    (kept,) = (tmp_path / "home").glob("*.network.json")
    text = kept.read_text()
    for damaged in ("", text[:100], text.replace('"multiples": {', '"multiples": {"x": 0, '), json.dumps([1])):
        kept.write_text(damaged)
        again = settle_in(tmp_path, network, NetworkTarget(), name=f"run {len(damaged)}")
        assert again.of_groups == first.of_groups
    assert NetworkProbe.from_json(kept.read_text()).of_groups == first.probes["d0"].of_groups
