from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.pruning.search.protocol import Evaluation
from secateur.pruning.search.reward import PRESETS, make_reward

REFERENCE = Evaluation(metrics={"top1": 0.93, "macs": 125e6, "params": 8.5e5, "latency_ratio": 1.0})
accuracies = st.floats(0.1, 1.0)
ratios = st.floats(0.05, 1.2)
factors = st.floats(1.001, 3.0)


def evaluation(top1=0.9, macs=0.5, latency=0.6, params=0.5, **more: float) -> Evaluation:
    """Costs as ratios to the reference."""
    metrics = {"top1": top1, "macs": macs * 125e6, "params": params * 8.5e5, "latency_ratio": latency, **more}
    return Evaluation(metrics={k: v for k, v in metrics.items() if v is not None})


def test_a_named_metric_takes_the_place_of_the_accuracy() -> None:
    both = replace(REFERENCE, metrics={**REFERENCE.metrics, "map50": 0.2, "loss_score": REFERENCE["top1"]})
    worse = replace(both, metrics={**both.metrics, "macs": 0.5 * both["macs"], "loss_score": 0.9 * both["loss_score"]})
    plain = replace(REFERENCE, metrics={**REFERENCE.metrics, "macs": worse["macs"], "top1": worse["loss_score"]})
    for preset in PRESETS:
        named = make_reward(preset, both, "loss_score")(worse)
        assert named == pytest.approx(make_reward(preset, REFERENCE)(plain))
        assert make_reward(preset, both, "map50")(worse) == make_reward(preset, both)(worse)
    with pytest.raises(ValueError, match="accuracy"):
        make_reward("device", both, "nothing_such")(worse)


@pytest.mark.parametrize("metric", ["loss", "divergence"])
@given(less=st.floats(0, 5), more=st.floats(1e-3, 5))
def test_of_a_metric_where_less_is_better_less_is_never_worth_less(metric: str, less: float, more: float) -> None:
    reference = replace(REFERENCE, metrics={**REFERENCE.metrics, metric: 0.0})
    for preset in PRESETS:
        reward = make_reward(preset, reference, metric)
        better, worse = (reward(evaluation(**{metric: value})) for value in (less, less + more))
        assert better >= worse
        assert reward(evaluation(**{metric: 0.5})) > reward(evaluation(**{metric: 2.0}))


def test_rewarded_meta_pruning_as_released():
    reference = Evaluation(metrics={"top1": 0.706, "macs": 4100.0})
    reward = make_reward("rewarded_v2", reference)
    assert reward(Evaluation(metrics={"top1": 0.5507, "macs": 2033.5})) == pytest.approx(14.49, abs=0.005)
    assert reward(Evaluation(metrics={"top1": 0.5507, "macs": 4200.0})) < 0
    other = make_reward("rewarded_v2", Evaluation(metrics={"top1": 0.9, "macs": 4100.0}), a0_pp=70.6)
    assert other(Evaluation(metrics={"top1": 0.5507, "macs": 2033.5})) == pytest.approx(14.49, abs=0.005)


def test_the_device_reward_by_hand():
    """A0 = 93 + 1, gap = 94 - 90 = 4, rho = (0.3 + 0.7) ln 2."""
    exact = make_reward("device", REFERENCE, latency_deadband=0.0)
    assert exact(evaluation(0.90, 0.5, 0.5)) == pytest.approx((94 / 4) ** 2 * math.log(2))
    assert exact.efficiency(evaluation(macs=1, latency=0.5)) == pytest.approx(0.485, abs=5e-4)
    assert exact.efficiency(evaluation(macs=0.5, latency=1)) == pytest.approx(0.208, abs=5e-4)
    budgeted = make_reward(
        "device", REFERENCE, latency_deadband=0.0, target_latency_ratio=0.25, target_macs_ratio=0.4, w_macs=2
    )
    assert budgeted(evaluation(0.90, 0.5, 0.5)) == pytest.approx(exact(evaluation(0.90, 0.5, 0.5)) / 2 / 1.25**2)
    assert budgeted(evaluation(0.90, 0.3, 0.2)) == exact(evaluation(0.90, 0.3, 0.2))


@given(a=accuracies, b=accuracies, macs=ratios, latency=ratios)
def test_never_falls_with_accuracy_and_rises_below_the_reference(a, b, macs, latency):
    low, high = sorted((a, b))
    reward = make_reward("device", REFERENCE)
    worse, better = (reward(evaluation(x, macs, latency)) for x in (low, high))
    assert worse <= better
    if low < 0.93 and high - low > 1e-6:
        assert worse < better


@given(
    accuracy=accuracies,
    macs=ratios,
    latency=ratios,
    params=ratios,
    k=factors,
    cost=st.sampled_from(["macs", "latency", "params"]),
)
def test_falls_with_every_cost_that_has_a_weight(accuracy, macs, latency, params, k, cost):
    reward = make_reward("device", REFERENCE, lambda_params=0.2, latency_deadband=0.0)
    costs = {"macs": macs, "latency": latency, "params": params}
    dearer = evaluation(accuracy, **{**costs, cost: costs[cost] * k})
    cheap = evaluation(accuracy, **costs)
    assert reward(dearer) <= reward(cheap)
    assume(reward.efficiency(dearer) > reward.rho_min)
    assert reward(dearer) < reward(cheap)


@given(accuracy=accuracies, macs=ratios, latency=ratios, k=st.floats(1e-6, 1e6))
def test_units_of_macs_and_params_do_not_matter(accuracy, macs, latency, k):
    def scaled(e: Evaluation) -> Evaluation:
        return Evaluation(metrics={**e.metrics, "macs": e["macs"] * k, "params": e["params"] / k})

    x = evaluation(accuracy, macs, latency)
    weights = {"lambda_params": 0.2, "target_macs_ratio": 0.4}
    assert make_reward("device", scaled(REFERENCE), **weights)(scaled(x)) == pytest.approx(
        make_reward("device", REFERENCE, **weights)(x), rel=1e-6
    )


@given(a=accuracies, b=accuracies)
def test_a_network_dearer_than_the_reference_gains_nothing_from_losing_accuracy(a, b):
    reward = make_reward("device", REFERENCE)
    low, high = sorted((a, b))
    assert 0 < reward(evaluation(low, 1.3, 1.3)) <= reward(evaluation(high, 1.3, 1.3))


def test_latency_differences_inside_the_noise_do_not_count():
    reward = make_reward("device", REFERENCE)
    step = 1.02**-25
    assert reward(evaluation(latency=step * 1.005)) == reward(evaluation(latency=step * 0.995))
    assert reward(evaluation(latency=step * 1.03)) < reward(evaluation(latency=step))
    assert reward.efficiency(evaluation(macs=1.0, latency=1.005)) == 0


def test_without_latency_its_weight_moves_to_macs():
    reward = make_reward("device", REFERENCE, lambda_params=1.0)
    same = make_reward("device", REFERENCE, lambda_macs=1.0, lambda_latency=0.0, lambda_params=1.0)
    blind = evaluation(latency=None, params=0.7)
    assert reward(blind) == pytest.approx(same(blind))
    assert reward.efficiency(blind) == pytest.approx(-0.5 * math.log(0.5) - 0.5 * math.log(0.7))
    assert make_reward("device", REFERENCE, target_latency_ratio=0.1)(blind) > 0
    assert make_reward("mnasnet", REFERENCE)(blind) == make_reward("mnasnet", REFERENCE)(evaluation(latency=0.5))


def test_weights_count_relative_to_their_sum():
    small = make_reward("device", REFERENCE, lambda_macs=1.0, lambda_latency=1.0)
    large = make_reward("device", REFERENCE, lambda_macs=10.0, lambda_latency=10.0)
    assert small(evaluation()) == pytest.approx(large(evaluation()))


@pytest.mark.parametrize("preset", PRESETS)
def test_rejects_what_is_not_ok_or_below_the_floor(preset):
    reward = make_reward(preset, REFERENCE, floor_pp=80.0)
    assert reward(Evaluation("failed", "out of memory")) == -math.inf
    assert reward(Evaluation("infeasible", metrics={"macs": 1.0})) == -math.inf
    assert reward(evaluation(0.799)) == -math.inf
    assert math.isfinite(reward(evaluation(0.801)))


@pytest.mark.parametrize("preset", PRESETS)
def test_detection_is_judged_by_map50(preset):
    reference = Evaluation(metrics={**REFERENCE.metrics, "map50": 0.77})
    reward = make_reward(preset, reference)
    assert reward(evaluation(0.1, map50=0.7)) == reward(evaluation(0.5, map50=0.7))
    assert reward(evaluation(map50=0.7)) > reward(evaluation(map50=0.6))


def test_published_rewards_by_hand():
    def value(preset: str, candidate: Evaluation, **overrides: float) -> float:
        return make_reward(preset, REFERENCE, **overrides)(candidate)

    x = evaluation(0.9, 0.5, 0.6)
    assert value("mnasnet", x, target_ratio=0.5) == pytest.approx(0.9 * 1.2**-0.07)
    assert value("mnasnet", x, target_ratio=1.2) == pytest.approx(0.9 * 0.5**-0.07)
    assert value("mnasnet_hard", x, target_ratio=0.5) == pytest.approx(0.9 / 1.2)
    assert value("mnasnet_hard", x, target_ratio=0.7) == pytest.approx(0.9)
    assert value("tunas_abs", x, target_ratio=0.5) == pytest.approx(0.9 - 0.1 * 0.2)
    assert value("tunas_abs", x, target_ratio=1.2) == pytest.approx(0.9 - 0.1 * 0.5)
    assert value("amc", x) == pytest.approx(-0.1 * math.log(62.5e6))


def test_errors_name_the_way_out():
    with pytest.raises(
        ValueError, match=r"unknown reward 'devise'; did you mean 'device'\? Known: device, rewarded_v2"
    ):
        make_reward("devise", REFERENCE)
    with pytest.raises(
        ValueError, match=r"parameter of reward 'device': 'lambda_lat'; did you mean 'lambda_latency'\?"
    ):
        make_reward("device", REFERENCE, lambda_lat=1.0)
    with pytest.raises(ValueError, match="alpha must be > 0; delta_pp must be > 0"):
        make_reward("device", REFERENCE, alpha=0.0, delta_pp=0.0)
    with pytest.raises(ValueError, match="one of them > 0"):
        make_reward("device", REFERENCE, lambda_macs=0.0, lambda_latency=0.0)
    with pytest.raises(ValueError, match="target_ratio must be > 0"):
        make_reward("mnasnet", REFERENCE, target_ratio=0.0)
    with pytest.raises(ValueError, match="beta must be <= 0"):
        make_reward("tunas_abs", REFERENCE, beta=0.1)
    with pytest.raises(ValueError, match="needs the metric 'macs'; the evaluation has"):
        make_reward("device", REFERENCE)(Evaluation(metrics={"top1": 0.5}))
