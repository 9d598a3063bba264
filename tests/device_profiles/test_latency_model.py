from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits

from secateur.device_profiles.latency_model import (
    MIN_SAMPLES,
    LatencyModel,
    Sample,
    choose,
    layer_times,
    multiple_of,
    sample_of,
)
from secateur.device_profiles.layers import LayerTable
from secateur.device_profiles.measure import Node
from secateur.pipeline.run.records import pack, unpack
from secateur.pruning.plan import ChannelGroup, SearchSpace
from tests.device_profiles.layered import Network, blocked, integers_of, mobile, node_of, nodes_of, plain, table_of

NETWORKS = {"plain": plain, "mobile": mobile}
known: dict[str, np.ndarray] = {}


class Reordered(Network):
    """A network in which a layer pays for every neighbour whose channels are no whole blocks of 16."""

    def layer_ms(self, widths: np.ndarray) -> np.ndarray:
        channels = self.table.channels(widths[None])[0]
        broken = ((channels % 16 != 0) & self.table.varies).any(axis=1)
        common = [[bool((a != 0).any(0) @ (b != 0).any(0)) for a in self.table.per_width] for b in self.table.per_width]
        others = (np.array(common) & ~np.eye(len(common), dtype=bool)).astype(int)
        return super().layer_ms(widths) + 3e-6 * self.table.pixels * channels[:, 1] * (others @ broken)


def reordered() -> Network:
    network = mobile()
    return Reordered(network.table, network.sizes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of the linear algebra only wait for each other at these sizes."""
    with threadpool_limits(1):
        yield


def chosen_plans(network: Network, count: int = 15, seed: int = 1) -> np.ndarray:
    """The plans that ``choose`` wants measured."""
    key = f"{network.sizes} {count} {seed}"
    if key not in known:
        known[key] = choose_plans(network, count, seed)
    return known[key]


def choose_plans(network: Network, count: int, seed: int) -> np.ndarray:
    pool = network.plans(120, np.random.default_rng(seed))
    chosen = np.empty((0, pool.shape[1]), dtype=np.int64)
    for _ in range(count):
        chosen = np.vstack([chosen, pool[choose(network.table, pool, chosen)]])
    return chosen


def fitted(network: Network, **options: bool) -> LatencyModel:
    model = LatencyModel.fit(network.table, [network.sample(w) for w in chosen_plans(network)], **options)
    assert model is not None
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_fifteen_measurements_predict_plans_that_were_never_measured(name: str):
    network = NETWORKS[name]()
    plans = chosen_plans(network)
    samples = [network.sample(w) for w in plans]
    model = LatencyModel.fit(network.table, samples)
    assert model is not None and model.trust is not None
    held_out = network.plans(80, np.random.default_rng(5))
    truth = np.array([network.ratio(w) for w in held_out])
    errors = np.abs(model.ratios(held_out) / truth - 1)
    line = np.polyfit(network.macs(plans), [s.ratio for s in samples], 1)
    by_macs = np.polyval(line, network.macs(held_out))
    assert np.median(errors) < 0.02
    assert np.median(errors) < 0.2 * np.median(np.abs(by_macs / truth - 1))
    assert spearmanr(model.ratios(held_out), truth).statistic > 0.99
    assert spearmanr(model.ratios(held_out), truth).statistic > spearmanr(by_macs, truth).statistic
    assert model.trust.median_error < 0.05 and model.trust.spearman > 0.95 and model.trust.samples == 15


@pytest.mark.parametrize("name", NETWORKS)
def test_most_errors_are_smaller_than_the_model_says(name: str):
    covered = []
    for seed in range(2):
        network = replace(NETWORKS[name](), noise=0.02, rng=np.random.default_rng(seed))
        model, held_out = fitted(network), network.plans(60, np.random.default_rng(seed + 5))
        assert model.trust is not None
        truth = np.array([network.ratio(w) for w in held_out])
        covered.append((np.abs(model.ratios(held_out) / truth - 1) < model.trust.half_width).mean())
    assert np.mean(covered) > 0.85


def test_plans_of_equal_macs_are_told_apart():
    network = mobile()
    model = fitted(network)
    pool = network.plans(3000, np.random.default_rng(8))
    share = network.macs(pool) / network.macs(network.whole[None])
    equal = pool[np.abs(share - 0.4) < 0.02]
    truth = np.array([network.ratio(w) for w in equal])
    assert len(equal) > 50 and truth.max() / truth.min() > 1.3
    assert spearmanr(model.ratios(equal), truth).statistic > 0.97


@pytest.mark.parametrize("seed", range(2))
def test_a_model_of_random_times_says_that_it_is_worth_nothing(seed: int):
    network, rng = plain(6), np.random.default_rng(seed)
    layers = len(network.table.names)
    samples = [
        Sample(w, float(np.exp(rng.normal(0, 0.5))), np.exp(rng.normal(0, 1, layers))) for w in chosen_plans(network)
    ]
    model = LatencyModel.fit(network.table, samples)
    assert model is not None and model.trust is not None
    assert model.trust.median_error > 0.1
    assert model.trust.spearman < 0.6
    assert model.trust.half_width > 0.4


def test_what_a_model_is_worth_is_found_on_measurements_left_out():
    network = replace(plain(6), noise=0.05)
    samples = [network.sample(w) for w in chosen_plans(network, 7)]
    model, errors = LatencyModel.fit(network.table, samples), []
    for i, sample in enumerate(samples):
        others = LatencyModel.fit(network.table, samples[:i] + samples[i + 1 :], judge=False)
        assert others is not None
        errors.append(abs(others.ratios(sample.widths[None])[0] / sample.ratio - 1))
    assert model is not None and model.trust is not None
    assert model.trust.median_error == pytest.approx(np.median(errors))
    assert model.trust.half_width == pytest.approx(1.96 * np.sqrt(np.mean(np.square(errors))))


def test_measurements_that_never_differ_are_not_trusted():
    network = plain()
    w = network.whole
    model = LatencyModel.fit(network.table, [Sample(w, 1.0, network.layer_ms(w))] * 8)
    assert model is not None and model.trust is not None
    assert not np.isfinite(model.trust.median_error)
    assert model.trust.spearman == 0


def test_few_measurements_make_no_model():
    network = plain(3)
    samples = [network.sample(w) for w in network.plans(MIN_SAMPLES, np.random.default_rng(0))]
    assert LatencyModel.fit(network.table, samples[:-1]) is None
    assert LatencyModel.fit(network.table, samples, judge=False) is not None


@given(st.floats(0.01, 100))
@settings(max_examples=5)
def test_the_clock_of_a_profile_does_not_matter(factor: float):
    network = plain(4)
    samples = [network.sample(w) for w in network.plans(8, np.random.default_rng(2))]
    slower = [Sample(s.widths, s.ratio, s.layer_ms * factor) for s in samples]
    plans = network.plans(20, np.random.default_rng(3))
    a, b = (LatencyModel.fit(network.table, s, judge=False) for s in (samples, slower))
    assert a is not None and b is not None
    np.testing.assert_allclose(a.ratios(plans), b.ratios(plans), rtol=1e-6)


def test_a_layer_that_a_profile_did_not_show_is_done_without():
    network = plain(6)
    samples = [network.sample(w) for w in chosen_plans(network)]
    samples[0].layer_ms[2] = samples[7].layer_ms[0] = np.nan
    model = LatencyModel.fit(network.table, samples)
    assert model is not None and model.trust is not None
    held_out = network.plans(40, np.random.default_rng(5))
    truth = np.array([network.ratio(w) for w in held_out])
    assert np.median(np.abs(model.ratios(held_out) / truth - 1)) < 0.05


def test_a_plan_alone_and_among_others_gets_the_same_latency():
    network = mobile(3)
    model, plans = fitted(network, judge=False), network.plans(30, np.random.default_rng(4))
    alone = np.concatenate([model.ratios(w[None]) for w in plans])
    np.testing.assert_allclose(model.ratios(plans), alone, rtol=1e-12)
    assert (model.ratios(plans) > 0).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_journal_brings_back_the_same_model(name: str):
    network = NETWORKS[name]()
    model = fitted(network, judge=False)
    text = json.dumps(pack(model.to_arrays()))
    again = LatencyModel.from_arrays(unpack(json.loads(text)))
    plans = network.plans(100, np.random.default_rng(4))
    np.testing.assert_allclose(again.ratios(plans), model.ratios(plans), rtol=1e-5)


def test_a_table_survives_json():
    table = mobile(2).table
    again = LayerTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.to_dict() == table.to_dict()
    assert again.kinds_of("e0") == {"pointwise", "depthwise"}
    assert again.kinds_of("s0") == {"conv", "pointwise"}


# -- from a profile to layers


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_operator_is_found_even_where_channels_are_reported_padded(name: str, block: int):
    network = NETWORKS[name]()
    for widths in network.plans(20, np.random.default_rng(block)):
        times = network.times(widths)
        channels = network.table.channels(widths[None])[0]
        found = layer_times(network.table, channels, nodes_of(network.table, widths, times, block))
        np.testing.assert_array_equal(found, times)


@given(st.lists(st.integers(0, 13), max_size=12), st.sampled_from([1, 16]))
def test_operators_in_between_count_with_the_layer_before_them(places: list[int], block: int):
    network = plain()
    widths = network.plans(1, np.random.default_rng(0))[0]
    times = network.times(widths)
    nodes = nodes_of(network.table, widths, times, block)
    expected = times.copy()
    for place in sorted(places, reverse=True):
        nodes.insert(place, Node("Pool", "MaxPool", 0.25, ((1, 16, 1, 1024),), ((1, 16, 1, 256),)))
        expected[max(place - 1, 0)] += 0.25
    found = layer_times(network.table, network.table.channels(widths[None])[0], nodes)
    np.testing.assert_allclose(found, expected)


def test_a_layer_that_is_not_in_the_profile_has_no_time():
    network = plain(4)
    widths = np.array([32, 8, 24, 40])
    nodes = nodes_of(network.table, widths, np.arange(1.0, 6.0))
    del nodes[1]
    found = layer_times(network.table, network.table.channels(widths[None])[0], nodes)
    np.testing.assert_array_equal(found, [1, np.nan, 3, 4, 5])
    assert np.isnan(layer_times(network.table, network.table.channels(widths[None])[0], [])).all()


def turned(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """With channels first."""
    return tuple((s[0], s[3], s[1], s[2]) if len(s) == 4 else s for s in shapes)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_profiles_of_integers_are_read_without_their_weights(name: str, first: bool):
    network = NETWORKS[name]()
    for widths in network.plans(10, np.random.default_rng(3)):
        times = network.times(widths)
        nodes = integers_of(network.table, widths, times)
        if first:
            nodes = [
                replace(n, input_shapes=turned(n.input_shapes), output_shapes=turned(n.output_shapes)) for n in nodes
            ]
        found = layer_times(network.table, network.table.channels(widths[None])[0], nodes)
        np.testing.assert_allclose(found, times)


def test_a_convolution_of_integers_is_told_by_its_input_its_output_and_its_kernel_where_that_is_known():
    table = table_of(("conv", 9, 64, 6, "a"), ("pointwise", 1, 64, "a", 8), ("depthwise", 9, 64, 1, 8))
    channels = table.channels(np.array([[16]]))[0]
    real = integers_of(table, np.array([16]), np.array([1.0, 2.0, 4.0]))

    def conv(read: tuple[int, ...], written: tuple[int, ...], *more: tuple[int, ...]) -> Node:
        return Node("other", "QLinearConv", 10.0, ((1, 1, *read), (), (), *more), ((1, 1, *written),))

    strangers = [conv((64, 5), (64, 16)), conv((64, 6), (64, 12)), conv((64, 6), (32, 16)), conv((16, 6), (64, 16))]
    strangers.append(conv((64, 6), (64, 16), (16, 6, 1, 25)))
    strangers.append(Node("sum", "QLinearAdd", 10.0, ((1, 1, 64, 6), ()), ((1, 1, 64, 16),)))
    np.testing.assert_array_equal(layer_times(table, channels, [*strangers, *real]), [61, 2, 4])
    grouped = conv((64, 12), (64, 16))  # two groups of 6 channels
    np.testing.assert_array_equal(layer_times(table, channels, [grouped, *real[1:]]), [10, 2, 4])


def remaining(kind: str, taps: int, pixels: int, inputs: int, outputs: int) -> float:
    """On this device a depthwise layer takes what is left of its blocks of 16 one by one."""
    if kind == "depthwise":
        return 3e-8 * taps * pixels * (outputs // 16 * 16 + 12 * (outputs % 16)) + 0.003
    return blocked(kind, taps, pixels, inputs, outputs)


def test_what_depthwise_layers_pay_for_broken_blocks_is_learned():
    network = replace(mobile(), law=remaining)
    model = LatencyModel.fit(network.table, [network.sample(w) for w in chosen_plans(mobile(), 15)])
    assert model is not None
    held_out = network.plans(80, np.random.default_rng(5))
    truth = np.array([network.ratio(w) for w in held_out])
    assert np.median(np.abs(model.ratios(held_out) / truth - 1)) < 0.015


def test_a_model_that_was_kept_before_there_were_so_many_features_says_what_it_said():
    network = mobile()
    arrays = fitted(network).to_arrays()
    new = 4
    earlier = {**arrays, "coefficients": arrays["coefficients"][:, :-new]}
    zeros = {**arrays, "coefficients": np.pad(earlier["coefficients"], [(0, 0), (0, new)])}
    plans = network.plans(5, np.random.default_rng(0))
    said = LatencyModel.from_arrays(earlier).ratios(plans)
    np.testing.assert_allclose(said, LatencyModel.from_arrays(zeros).ratios(plans))


def test_equal_layers_are_taken_in_their_order():
    table = table_of(*[("conv", 9, 64, "a", "a")] * 3)
    found = layer_times(table, table.channels(np.array([[8]]))[0], nodes_of(table, np.array([8]), np.array([3, 1, 2])))
    np.testing.assert_array_equal(found, [3, 1, 2])


@given(st.permutations(range(4)), st.sampled_from([1, 16]))
def test_parallel_branches_may_run_in_any_order(order: list[int], block: int):
    table = table_of(
        ("conv", 9, 64, "stem", 8),
        ("pointwise", 1, 64, "stem", 24),
        ("conv", 25, 64, "stem", 8),
        ("conv", 9, 64, 8, 40),
    )
    widths = np.array([12])
    nodes = nodes_of(table, widths, np.array([1.0, 2, 4, 8]), block)
    found = layer_times(table, table.channels(widths[None])[0], [nodes[i] for i in order])
    np.testing.assert_array_equal(found, [1, 2, 4, 8])


def test_what_only_looks_like_a_layer_is_none():
    table = table_of(("conv", 9, 64, 3, "a"), ("linear", 1, 1, "a", 10))
    channels = table.channels(np.array([[8]]))[0]
    real = [node_of(table, i, channels[i], 1.0) for i in range(2)]
    strangers = [
        Node("add", "Add", 1.0, ((1, 8, 1, 64), (8, 3, 1, 9)), ((1, 8, 1, 64),)),
        Node("wide", "Conv", 1.0, ((1, 3, 1, 64), (40, 3, 1, 9)), ((1, 40, 1, 64),)),
        Node("small", "Conv", 1.0, ((1, 3, 1, 64), (8, 3, 1, 1)), ((1, 8, 1, 64),)),
        Node("strided", "Conv", 1.0, ((1, 3, 1, 64), (8, 3, 1, 9)), ((1, 8, 1, 16),)),
        Node("bare", "Conv", 1.0),
        Node("scores", "MatMul", 1.0, ((1, 4), (4, 11)), ((1, 11),)),
    ]
    np.testing.assert_array_equal(layer_times(table, channels, [*strangers, real[0], real[1]]), [7, 1])


def test_a_sample_takes_the_ratio_and_each_layers_shortest_time():
    network = plain(3)
    widths = np.array([16, 16, 8])
    first, second = network.result(widths), network.result(widths)
    sample = sample_of(
        network.table,
        widths,
        replace(first, processes=(*first.processes, *second.processes)),
        "candidate",
        "baseline",
    )
    assert sample.ratio == pytest.approx(network.ratio(widths))
    times = [[node.ms for node in r.processes[0].models["candidate"].nodes] for r in (first, second)]
    np.testing.assert_array_equal(sample.layer_ms, np.min(times, axis=0))


# -- what to measure next


@given(st.integers(0, 20))
@settings(max_examples=5)
def test_the_choice_is_always_the_same_and_never_repeats_itself(seed: int):
    network = mobile(1)
    pool = np.unique(network.plans(40, np.random.default_rng(seed)), axis=0)
    chosen = np.empty((0, pool.shape[1]), dtype=np.int64)
    for _ in range(6):
        index = choose(network.table, pool, chosen)
        assert index == choose(network.table, pool, chosen)
        assert not (pool[index] == chosen).all(axis=1).any()
        chosen = np.vstack([chosen, pool[index]])


def test_a_direction_that_nobody_looked_into_comes_first():
    table = table_of(("conv", 9, 256, 3, "a"), ("conv", 9, 256, "a", 32), ("pointwise", 1, 256, 32, "b"))
    line = np.array([[w, 32] for w in range(4, 33, 4)])
    pool = np.vstack([line, [[32, 4]]])
    assert choose(table, pool, line) == len(line)


def test_the_first_choices_explore_more_than_random_ones():
    network = plain(6)

    def span(plans: np.ndarray) -> float:
        return float(np.linalg.slogdet(np.cov(plans.T / network.whole[:, None]) + 1e-6 * np.eye(6)).logabsdet)

    random = [span(network.plans(12, np.random.default_rng(seed))) for seed in range(20)]
    assert span(chosen_plans(network, 12)) > np.median(random)


# -- layouts, and errors by multiple


def test_what_a_layer_pays_for_its_neighbours_widths_is_learned():
    network, alone = reordered(), mobile()
    model = LatencyModel.fit(network.table, [network.sample(w) for w in chosen_plans(network, 20)])
    assert model is not None
    held_out = network.plans(80, np.random.default_rng(5))
    true, without = (np.array([of.ratio(w) for w in held_out]) for of in (network, alone))
    assert np.std(np.log(true / without)) > 0.15, "it is much that they pay"
    assert np.median(np.abs(model.ratios(held_out) / true - 1)) < 0.04


def test_neighbours_share_channels_and_no_layer_is_its_own():
    ends = ("conv", 9, 64, 3, "a"), ("conv", 9, 64, "a", "b"), ("linear", 1, 1, "b", 10), ("conv", 1, 64, 3, 4)
    table = table_of(*ends)
    assert table.neighbours.tolist() == [[0, 0.5, 0, 0], [1, 0, 1, 0], [0, 0.5, 0, 0], [0, 0, 0, 0]]
    assert table.varies.tolist() == [[False, True], [True, True], [True, False], [False, False]]


def test_errors_of_each_multiple_are_those_of_its_measurements():
    network = mobile()
    plans = chosen_plans(network)
    samples = [replace(network.sample(w), multiple=multiple_of(w, network.whole)) for w in plans]
    model = LatencyModel.fit(network.table, samples)
    assert model is not None and model.trust is not None
    errors = model.trust.errors
    assert set(errors) == {sample.multiple for sample in samples} and len(errors) > 2
    assert min(errors.values()) <= model.trust.median_error <= max(errors.values())
    unknown = LatencyModel.fit(network.table, [replace(sample, multiple=0) for sample in samples])
    assert unknown is not None and unknown.trust is not None and unknown.trust.errors == {}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.data())
def test_widths_of_a_multiple_are_recognised(sizes: list[int], multiple: int, data: st.DataObject):
    groups = [ChannelGroup(f"g{i}", size) for i, size in enumerate([64, *sizes])]
    space = SearchSpace.of(groups).in_multiples(multiple)
    widths = {name: data.draw(st.sampled_from(space.allowed[name])) for name in space.names}
    every = np.array([widths.get(group.name, group.size) for group in groups])
    found = multiple_of(every, np.array([group.size for group in groups]))
    assert found >= multiple and found in (1, 2, 4, 8, 16, 32, 64)
