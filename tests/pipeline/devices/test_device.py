"""A run's device: probed once, the same until the run ends, and what its multiples mean for a network."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.device_profiles import DeviceProfile, Multiples
from secateur.device_profiles.calibration import load, path_of, probes_of
from secateur.device_profiles.layers import KINDS
from secateur.pipeline.devices.device import RunDevice, meet
from secateur.pipeline.errors import SurroundingsError
from secateur.pipeline.progress import Report, Silent
from secateur.pipeline.run.widths import group_multiples
from secateur.pruning.trace import trace
from tests.device_profiles.layered import LawTarget, padded
from tests.device_profiles.tiny import quick_profile
from tests.export import nets
from tests.pruning.models import CifarResNet, PlainCNN

BLOCKS = {"conv": 16, "pointwise": 8, "depthwise": 4, "linear": 8}
PROFILE = quick_profile(channel_multiple={"conv": 2, "pointwise": 3, "depthwise": 5, "linear": 7})


@pytest.fixture
def target() -> LawTarget:
    return LawTarget(lambda kind, width: padded(width, BLOCKS[kind]) / 1000)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunDevice]:
    """Meets a device in the run directory of a name."""

    def met(target: LawTarget, name: str = "run", profile: DeviceProfile = PROFILE, **options: Any) -> RunDevice:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        options = {"probing": True, "progress": Silent(), **options}
        return meet(target, profile, directory, tmp_path / "home", **options)

    return met


def test_a_device_is_probed_once_for_all_runs(run: Any, target: LawTarget, tmp_path: Path) -> None:
    found = run(target)
    timed = len(target.requests)
    assert timed > 0
    assert found.multiples == BLOCKS
    assert found.noise_floor == pytest.approx(0)
    assert found.origin == "a probe of the device"
    assert found.facts == {**target.facts, "onnxruntime": "1.0"}
    assert path_of(tmp_path / "home" / "devices", PROFILE).is_file()
    assert run(target, "another") == found
    assert run(target, "a third", probing=False) == found
    assert len(target.requests) == timed


def test_widths_suit_every_precision_that_may_ship_and_each_is_probed_once(
    run: Any, target: LawTarget, tmp_path: Path
) -> None:
    precise = {"fp32": "", "int8": "U8S8"}
    run(target)
    timed = len(target.requests)
    target.law = lambda kind, width: padded(width, 16 if kind == "depthwise" else 2) / 1000
    found = run(target, "integers", precise=precise)
    assert found.multiples == {**BLOCKS, "depthwise": 16}
    assert len(target.requests) < 2 * timed + 1, "what was probed in fp32 counts"
    assert found.origin == "probes of the device in fp32 and int8"
    assert set(found.curves) == {*KINDS, *(f"{kind} in int8" for kind in KINDS)}
    asked = len(target.requests)
    assert run(target, "again", precise=precise) == found and len(target.requests) == asked
    assert run(target, "int8 alone", precise={"int8": "U8S8"}).multiples["depthwise"] == 16
    assert len(target.requests) == asked
    assert {path.name for path in probes_of(tmp_path / "home" / "devices", PROFILE.name)} == {
        f"{PROFILE.name}.probe.json",
        f"{PROFILE.name}.probe-int8.json",
    }
    run(target, "other number types", precise={"int8": "S8S8"})
    assert len(target.requests) > asked


def test_a_runtime_that_loads_no_onnx_is_not_probed_in_integers(run: Any, target: LawTarget) -> None:
    found = run(target, profile=PROFILE.model_copy(update={"runtime": "ncnn"}), precise={"int8": "U8S8"})
    assert found.origin == "the profile, unprobed" and not target.requests


def test_a_resumed_run_knows_its_device_without_a_probe(run: Any, target: LawTarget, tmp_path: Path) -> None:
    found = run(target)
    path_of(tmp_path / "home" / "devices", PROFILE).unlink()
    again = LawTarget(facts=dict(target.facts, temperature_c=80.0, governor="powersave"))
    assert run(again) == found
    assert not again.requests


def test_an_unprobed_device_has_the_multiples_of_its_profile(run: Any, target: LawTarget) -> None:
    found = run(target, probing=False)
    assert found.multiples == PROFILE.multiples.model_dump()
    assert found.noise_floor is None
    assert "unprobed" in found.origin
    assert not target.requests
    assert run(target, probing=True) == found  # what a run began with stays
    assert run(target, "next").multiples == BLOCKS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu": "Slide rule"}, "cpu Abacus -> Slide rule"),
        ({"cpus": 8, "machine": "brass"}, "machine wood -> brass; cpus 4 -> 8"),
        ({"freq_max_mhz": 600.0}, "freq_max_mhz None -> 600.0"),
    ],
)
def test_a_run_does_not_go_on_on_another_device(
    run: Any, target: LawTarget, change: dict[str, Any], message: str
) -> None:
    run(target, probing=False)
    with pytest.raises(SurroundingsError, match=f"test is not the one this run began with .{message}.: latencies"):
        run(replace(target, facts={**target.facts, **change}))


def test_a_run_does_not_go_on_with_another_runtime_or_other_settings(run: Any, target: LawTarget) -> None:
    run(target, probing=False)
    with pytest.raises(SurroundingsError, match=r"onnxruntime 1\.0 -> 1\.1"):
        run(replace(target, version="1.1"))
    with pytest.raises(SurroundingsError, match="its settings changed"):
        run(target, profile=PROFILE.model_copy(update={"threads": 2}))
    run(target)  # restored


def test_another_device_of_the_same_name_is_probed_anew(run: Any, target: LawTarget, tmp_path: Path) -> None:
    run(target)
    other = LawTarget(lambda kind, width: padded(width, 2) ** 2 / 1000, facts={"cpu": "Slide rule"})
    found = run(other, "other")
    assert found.multiples == dict.fromkeys(KINDS, 2)
    kept = load(tmp_path / "home" / "devices", PROFILE)
    assert kept is not None and kept.fingerprint == found.fingerprint


def test_a_run_killed_while_it_writes_about_its_device_begins_again(
    run: Any, target: LawTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_short)
        patch.setattr(Path, "replace", cut_short)
        with pytest.raises(KeyboardInterrupt):
            run(target, probing=False)
    assert run(target, probing=False).multiples == PROFILE.multiples.model_dump()
    json.loads((tmp_path / "run" / "device.json").read_text())


def test_a_probe_says_how_far_it_is(run: Any, target: LawTarget) -> None:
    seen: list[tuple[int, int, str]] = []

    class View:
        @contextmanager
        def stage(self, title: str) -> Iterator[Report]:
            assert title == "Probe test"
            yield lambda done, total, note="": seen.append((done, total, note))

    run(target, progress=View())
    assert seen[0] == (1, 5, "conv: multiples of 16")
    assert seen[-1][:2] == (5, 5)


# -- what multiples per kind of layer mean for groups


def multiples_of(model: nn.Module, of: Multiples) -> dict[str, int]:
    graph = trace(model.eval(), torch.zeros(1, 3, 16 if isinstance(model, PlainCNN) else 8, 8))
    return group_multiples(graph, {name: tuple(t.shape) for name, t in model.state_dict().items()}, of)


PRIMES = Multiples(conv=2, pointwise=3, depthwise=5, linear=7)


def test_a_groups_multiple_suits_every_layer_that_makes_or_reads_it() -> None:
    found = multiples_of(CifarResNet("B"), PRIMES)
    assert found == {
        "conv1": 2 * 3,  # read by a 1 x 1 shortcut
        "layer1.conv1": 2,
        "layer2.conv1": 2,
        "layer2.conv2": 2 * 3,
        "layer3.conv1": 2,
        "layer3.conv2": 2 * 3 * 7,
    }


def test_depthwise_layers_are_known_and_one_input_channel_does_not_make_one() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(6, 1, 1),
        nn.Conv2d(1, 9, 3),
        nn.Conv2d(9, 2, 1),
    )
    found = multiples_of(model, PRIMES)
    assert found["0"] == 3 * 5
    assert found["2"] == 3
    assert found["4"] == 2 * 3


@pytest.mark.parametrize("of", [Multiples(conv=16, pointwise=8, depthwise=4, linear=8), PRIMES])
@pytest.mark.parametrize("name", ["Flat", "Mobile", "Shuffle", "Attention"])
def test_the_multiple_is_the_smallest_number_that_suits_every_layer(name: str, of: Multiples) -> None:
    model = getattr(nets, name)().eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    depthwise = {key for key, s in shapes.items() if len(s) == 4 and s[1] == 1}
    found = group_multiples(graph, shapes, of)
    for group in graph.groups:
        needs = set()  # channels of a layer per channel of the group, and what they should be a multiple of
        for member in group.members:
            shape = shapes[member.tensor]
            if len(shape) not in (2, 4):
                continue
            wide = "pointwise" if np.prod(shape[2:]) == 1 else "conv"
            kind = "linear" if len(shape) == 2 else "depthwise" if member.tensor in depthwise else wide
            needs.add((member.index.shape[1], getattr(of, kind)))
        suits = (w for w in itertools.count(1) if all(w * k % multiple == 0 for k, multiple in needs))
        assert found[group.name] == next(suits), group.name
