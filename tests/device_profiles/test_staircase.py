from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.device_profiles import DeviceError, LocalTarget, Multiples, measure
from secateur.device_profiles.chains import DEPTH, chain
from secateur.device_profiles.layers import KINDS, LayerKind
from secateur.device_profiles.runtimes import onnxruntime
from secateur.device_profiles.staircase import (
    MULTIPLES,
    SLACK,
    WIDTHS,
    Staircase,
    fingerprint_of,
    losses_of,
    noise_floor,
    probe,
    step_of,
)
from tests.device_profiles.layered import LawTarget, padded
from tests.device_profiles.tiny import quick_profile


def curve_of(law: Callable[[int], float], noise: float = 0.0, seed: int = 0) -> dict[int, float]:
    rng = np.random.default_rng(seed)
    return {width: law(width) * float(np.exp(rng.normal(0, noise))) for width in WIDTHS}


def loss_by_hand(curve: Mapping[int, float], multiple: int) -> float:
    """What rounding every width up costs, from the definition."""
    extra = []
    for width in curve:
        rounded = next(w for w in sorted(curve) if w >= width and w % multiple == 0)
        extra.append(curve[rounded] / min(ms for w, ms in curve.items() if w >= width) - 1)
    return sum(extra) / len(extra)


curves = st.lists(st.floats(0.1, 100), min_size=32, max_size=32).map(lambda ms: dict(zip(WIDTHS, ms, strict=True)))


# -- from latencies to a multiple


@given(curves)
def test_losses_are_what_their_definition_says(curve: dict[int, float]):
    losses = losses_of(curve)
    assert list(losses) == list(MULTIPLES)
    for multiple, loss in losses.items():
        assert loss == pytest.approx(loss_by_hand(curve, multiple), abs=1e-9)
        assert loss >= -1e-12


@given(curves, st.floats(1e-3, 1e3))
def test_the_step_is_the_largest_multiple_that_loses_nearly_nothing_whatever_the_clock(curve, factor: float):
    losses, step = losses_of(curve), step_of(curve)
    assert losses[step] <= min(losses.values()) + SLACK
    assert all(loss > min(losses.values()) + SLACK for multiple, loss in losses.items() if multiple > step)
    assert losses_of({w: factor * ms for w, ms in curve.items()}) == pytest.approx(losses)


@given(st.sampled_from([2, 4, 8, 16]), st.floats(1, 3))
def test_an_exact_staircase_gives_its_step_and_multiples_of_it_lose_nothing(step: int, power: float):
    curve = curve_of(lambda width: padded(width, step) ** power)
    assert step_of(curve) == step
    losses = losses_of(curve)
    assert all(losses[m] == pytest.approx(0) for m in MULTIPLES if m <= step)
    assert all(losses[m] > 0 for m in MULTIPLES if m > step)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("step", [4, 8, 16])
def test_noise_does_not_hide_a_staircase(step: int, seed: int):
    assert step_of(curve_of(lambda width: padded(width, step), 0.01, seed)) == step


@pytest.mark.parametrize("seed", range(5))
def test_a_smooth_device_is_given_no_coarse_step(seed: int):
    assert step_of(curve_of(lambda width: width)) <= 2
    assert step_of(curve_of(lambda width: width**2)) == 1
    assert step_of(curve_of(lambda width: width**2, 0.005, seed)) <= 2


def test_a_device_on_which_width_costs_nothing_gets_the_largest_multiple():
    assert step_of(curve_of(lambda width: 1.0)) == max(MULTIPLES)


def test_the_steps_of_a_real_processor_are_found():
    # AVX-512: 17 channels of a 3 x 3 convolution take 2.05 times as long as 16, 46 depthwise ones 4.9 times 44.
    assert step_of(curve_of(lambda width: width**2 * (1.0 if width % 16 == 0 else 2.05))) == 16
    assert step_of(curve_of(lambda width: width * (1.0 if width % 4 == 0 else 4.9))) == 4
    assert losses_of(curve_of(lambda width: width * (1.0 if width % 4 == 0 else 4.9)))[1] > 1


def test_a_curve_of_few_widths_considers_only_the_multiples_of_its_largest():
    assert list(losses_of({10: 1.0, 11: 2.0, 12: 1.5})) == [1, 2, 4]


# -- the probe


LAWS: dict[str, Callable[[int], float]] = {
    "conv": lambda width: padded(width, 16) ** 2,
    "pointwise": lambda width: padded(width, 8),
    "depthwise": lambda width: width * (1.0 if width % 4 == 0 else 4.9),
    "linear": lambda width: width**2,
}
FOUND = Multiples(conv=16, pointwise=8, depthwise=4, linear=1)


def known_device(noise: float = 0.003, **changes: object) -> LawTarget:
    return LawTarget(lambda kind, width: 1e-3 * LAWS[kind](width), noise=noise, **changes)


@pytest.fixture(scope="module")
def probed() -> tuple[Staircase, LawTarget, list[tuple[int, int, str]]]:
    target, seen = known_device(), []
    return probe(target, quick_profile(), progress=lambda *said: seen.append(said)), target, seen


def test_a_probe_finds_the_steps_of_every_kind_of_layer(probed):
    staircase, _, _ = probed
    assert staircase.multiples == FOUND
    assert {kind: list(curve) for kind, curve in staircase.curves.items()} == {kind: list(WIDTHS) for kind in KINDS}
    assert staircase.losses == {kind: losses_of(curve) for kind, curve in staircase.curves.items()}
    assert 0 < staircase.noise_floor < 0.02
    assert staircase.environment["cpu"] == "Abacus"
    assert staircase.environment["onnxruntime"] == "1.0"


def test_a_probe_says_how_far_it_is_and_what_it_found(probed):
    _, _, seen = probed
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 5) for i in range(5)]
    assert [note for *_, note in seen[:4]] == [f"{k}: multiples of {getattr(FOUND, k)}" for k in KINDS]
    assert seen[4][2].startswith("noise +-")


def test_widths_of_a_kind_are_timed_in_turn_in_one_process_and_within_the_time_given(probed):
    _, target, _ = probed
    by_kind = target.requests[: len(KINDS)]
    assert [len(request["models"]) for request in by_kind] == [len(WIDTHS)] * len(KINDS)
    assert sum(request["max_seconds"] for request in by_kind) <= 90


def test_only_what_is_asked_for_is_probed():
    staircase = probe(known_device(), quick_profile(), kinds=["depthwise"], widths=range(41, 49))
    assert staircase.multiples == Multiples(conv=1, pointwise=1, depthwise=4, linear=1)
    assert list(staircase.curves["depthwise"]) == list(range(41, 49))
    assert staircase.profile == "test"


def test_an_emulator_is_not_probed():
    target = known_device()
    with pytest.raises(DeviceError, match="timing: false") as caught:
        probe(target, quick_profile(timing=False))
    assert caught.value.code == "profile"
    assert not target.requests


@pytest.mark.parametrize("spread", [0.002, 0.02])
def test_the_noise_floor_is_how_far_a_network_is_from_itself(tmp_path: Path, spread: float):
    model = tmp_path / "conv-32.onnx"
    model.write_bytes(b"anything")
    floor = noise_floor(LawTarget(noise=spread), quick_profile(), model, processes=400)
    assert floor == pytest.approx(1.96 * np.sqrt(2) * spread, rel=0.1)  # the processes' own speed does not count


@pytest.mark.parametrize("kind", KINDS)
def test_probe_networks_are_valid_and_of_one_kind(kind: str):
    model = chain(kind, 20)
    onnx.checker.check_model(model, full_check=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert len(model.graph.node) == len(shapes) == DEPTH[kind]
    size = {"conv": (20, 20, 3, 3), "pointwise": (20, 20, 1, 1), "depthwise": (20, 1, 3, 3), "linear": (20, 20)}
    assert set(shapes.values()) == {size[kind]}
    assert model.SerializeToString() == chain(kind, 20).SerializeToString()


@pytest.mark.parametrize("scheme", ["U8S8", "U8U8", "S8S8"])
@pytest.mark.parametrize("kind", KINDS)
def test_probe_networks_of_integers_compute_in_integers(kind: LayerKind, scheme: str, tmp_path: Path):
    model = chain(kind, 20, scheme)
    onnx.checker.check_model(model, full_check=True)
    file, shape = tmp_path / "m.onnx", [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    file.write_bytes(model.SerializeToString())
    feeds = {"x0": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    nodes = onnxruntime.profile(str(file), 1, "CPUExecutionProvider", feeds, str(tmp_path))
    layers = [node for node in nodes if "Conv" in node["op"] or "MatMul" in node["op"]]
    assert len(layers) == DEPTH[kind]
    assert all({"uint8", "int8"} & set(node["input_types"]) and node["op"].startswith("QLinear") for node in layers)


def test_a_probe_in_integers_times_those_and_has_a_fingerprint_of_its_own():
    target, profile = LawTarget(), quick_profile()
    kinds: list[LayerKind] = ["linear"]
    found = probe(target, profile, seconds=1, kinds=kinds, widths=(15, 16), precision="int8", scheme="U8S8")
    assert Staircase.from_json(found.to_json()) == found
    assert found.precision == "int8" and found.fingerprint == fingerprint_of(profile, target.prepare(), "int8 U8S8")
    assert found.fingerprint not in {
        fingerprint_of(profile, target.prepare()),
        fingerprint_of(profile, target.prepare(), "int8 S8S8"),
    }


@pytest.mark.long
def test_this_machine_can_be_probed_and_keeps_its_fingerprint(tmp_path: Path):
    target, profile, model = LocalTarget(), quick_profile(), tmp_path / "m.onnx"
    model.write_bytes(chain("linear", 8).SerializeToString())
    try:
        staircase = probe(target, profile, seconds=0.4, kinds=["depthwise"], widths=(31, 32))
        result = measure(target, profile, {"a": model})
    finally:
        target.close()
    assert all(value in MULTIPLES for value in staircase.multiples.model_dump().values())
    assert all(ms > 0 for curve in staircase.curves.values() for ms in curve.values())
    assert np.isfinite(staircase.noise_floor)
    assert Staircase.from_json(staircase.to_json()) == staircase
    assert [kind for kind, _ in staircase.summary()] == ["depthwise", "noise"]
    assert staircase.fingerprint == fingerprint_of(profile, result.environment)


# -- what is kept


def test_json_brings_back_the_same_probe(probed):
    staircase, _, _ = probed
    again = Staircase.from_json(staircase.to_json())
    assert again == staircase
    assert "\n" not in staircase.to_json()
    assert again.summary() == staircase.summary()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: [],
        lambda data: None,
        lambda data: {},
        lambda data: data | {"format": 2},
        lambda data: data | {"surprise": 1},
        lambda data: data | {"multiples": {"conv": 0}},
        lambda data: data | {"curves": {"conv": {"wide": 1.0}}},
        lambda data: data | {"losses": 3},
        lambda data: {key: value for key, value in data.items() if key != "fingerprint"},
    ],
)
def test_text_that_is_no_probe_is_refused(probed, change):
    text = json.dumps(change(json.loads(probed[0].to_json())))
    with pytest.raises(DeviceError, match=r"Staircase\.to_json") as caught:
        Staircase.from_json(text)
    assert caught.value.code == "profile"
    with pytest.raises(DeviceError, match=r"Staircase\.to_json"):
        Staircase.from_json(text[:-1])


def test_the_summary_names_kinds_multiples_and_what_a_wrong_width_costs(probed):
    rows = dict(probed[0].summary())
    assert list(rows) == [*KINDS, "noise"]
    assert rows["conv"].startswith("multiples of 16")
    assert "x the time of" in rows["depthwise"]
    assert rows["linear"].startswith("multiples of 1")
    quiet = replace(probed[0], noise_floor=None)
    assert "noise" not in dict(quiet.summary())


def test_the_summary_gives_the_worst_width_and_the_one_to_take_instead():
    curve = {width: 1.0 if width % 4 == 0 else 2.0 for width in range(37, 41)} | {38: 4.9}
    staircase = Staircase(
        "p", "f", Multiples(depthwise=4), {"depthwise": curve}, {"depthwise": losses_of(curve)}, None, {}, 0.0
    )
    (_, text) = staircase.summary()[0]
    assert text.startswith("multiples of 4; 38 channels take 4.90x the time of 40; any width costs")


# -- whose probe it is


ANSWER = {"device": {"cpu": "A", "machine": "m", "cpus": 4, "board": "b"}, "runtime": {"onnxruntime": "1.31"}}


def answer(**device: object) -> dict[str, dict[str, object]]:
    runtime = {key: device.pop(key) for key in ("onnxruntime", "numpy") if key in device}
    return {"device": {**ANSWER["device"], **device}, "runtime": {**ANSWER["runtime"], **runtime}}


@pytest.mark.parametrize(
    "change",
    [{"cpu": "B"}, {"onnxruntime": "1.32"}, {"cpus": 8}, {"board": "c"}, {"machine": "n"}, {"freq_max_mhz": 1500.0}],
)
def test_another_device_or_runtime_has_another_fingerprint(change: dict[str, object]):
    assert fingerprint_of(quick_profile(), answer(**change)) != fingerprint_of(quick_profile(), ANSWER)


@pytest.mark.parametrize("change", [{"threads": 2}, {"provider": "XExecutionProvider"}, {"batch": 4}])
def test_other_settings_have_another_fingerprint(change: dict[str, object]):
    assert fingerprint_of(quick_profile(**change), ANSWER) != fingerprint_of(quick_profile(), ANSWER)


def test_what_changes_from_hour_to_hour_is_not_in_the_fingerprint():
    now = answer(temperature_c=71.0, freq_mhz=600.0, governor="powersave", loadavg=[9, 9, 9], host="x", numpy="9")
    plain = fingerprint_of(quick_profile(), ANSWER)
    assert fingerprint_of(quick_profile(), now) == plain
    assert fingerprint_of(quick_profile(description="renamed", max_temperature_c=60), ANSWER) == plain
    flat = {**ANSWER["device"], **ANSWER["runtime"], "cpu_pressure": 0.3}
    assert fingerprint_of(quick_profile(), flat) == plain
    assert len(plain) == 16 and int(plain, 16) >= 0
