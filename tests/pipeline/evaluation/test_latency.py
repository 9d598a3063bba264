"""Which plans are measured and which are predicted, on a device made of arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from secateur.device_profiles import BenchmarkResult
from secateur.device_profiles.latency_model import LatencyModel
from secateur.device_profiles.layers import LayerTable
from secateur.pipeline.config.schema import LatencySection
from secateur.pipeline.evaluation.latency import CHECK_EVERY, Latencies, plan_of, random_widths, widths_of
from secateur.pruning.plan import ChannelGroup, PruningPlan, SearchSpace
from tests.device_profiles.layered import Network, mobile, plain, table_of

BUDGET = 12


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few plans to choose from, and one thread: several only wait for each other at these sizes."""
    monkeypatch.setattr("secateur.pipeline.evaluation.latency.POOL", 200)
    with threadpool_limits(1):
        yield


@dataclass
class Device:
    """Measures plans of a network; remembers which.

    Args:
        worth_nothing: latencies are random numbers.
    """

    network: Network
    file: Path
    worth_nothing: bool = False
    plans: list[PruningPlan] = field(default_factory=list)

    @property
    def space(self) -> SearchSpace:
        return SearchSpace.of([ChannelGroup(name, size) for name, size in self.network.sizes.items()])

    @property
    def full(self) -> PruningPlan:
        return self.space.full

    def measure(self, plan: PruningPlan) -> tuple[dict[str, float], BenchmarkResult]:
        self.plans.append(plan)
        result = self.network.result(widths_of(plan))
        if self.worth_nothing:
            network = replace(self.network, law=lambda *_: float(self.network.rng.uniform(0.1, 10)))
            result = network.result(widths_of(plan))
        ratio = 1.0 if plan.is_full else result.ratio("candidate", "baseline").value
        return {"latency_ratio": ratio, "p50_ms": 10 * ratio, "p95_ms": 12 * ratio, "size_bytes": 7.0}, result

    def latencies(self, space: SearchSpace | None = None, **settings: Any) -> Latencies:
        section = LatencySection(**{"measurements": BUDGET, "max_error": 0.08, "min_spearman": 0.8, **settings})
        return Latencies(lambda: self.network.table, self.measure, self.file, section, space or self.space, seed=3)

    def random(self, count: int, seed: int = 9) -> list[PruningPlan]:
        """Different plans, none of them the full one."""
        drawn = [plan_of(self.full, w) for w in self.network.plans(2 * count + 10, np.random.default_rng(seed))]
        return list({plan.digest: plan for plan in drawn if not plan.is_full}.values())[:count]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(plain(5), tmp_path / "latencies.jsonl")


def ready(device: Device, **settings: Any) -> Latencies:
    """Latencies with the full plan measured and a model that was asked for."""
    latencies = device.latencies(**settings)
    latencies.of(device.full, exact=True)
    latencies.model()
    device.plans.clear()
    return latencies


# -- what the model may measure


def test_the_model_measures_as_many_plans_as_it_may_and_each_once(device: Device) -> None:
    seen: list[tuple[int, int]] = []
    latencies = device.latencies()
    assert latencies.model(lambda done, total: seen.append((done, total))) is not None
    assert len(device.plans) == BUDGET == len({plan.digest for plan in device.plans})
    assert seen == [(i, BUDGET) for i in range(BUDGET)]
    assert latencies.model() is not None
    assert len(device.plans) == BUDGET


def test_the_model_learns_from_plans_of_several_multiples_and_says_how_good_it_is_at_each(tmp_path: Path) -> None:
    latencies = Device(mobile(), tmp_path / "latencies.jsonl").latencies()
    latencies.model()
    counts = Counter(sample.multiple for sample in latencies.samples.values())
    assert len(counts) >= 4 and max(counts.values()) - min(counts.values()) <= 1
    assert set(latencies.report()["errors"]) == set(counts)


def test_candidates_that_were_measured_anyway_count_too(device: Device) -> None:
    latencies = device.latencies()
    for plan in device.random(4):
        latencies.of(plan, exact=True)
    latencies.model()
    assert len(device.plans) == BUDGET
    for plan in device.random(BUDGET + 3, seed=2):
        latencies.of(plan, exact=True)
    before = len(device.plans)
    latencies.model()
    assert len(device.plans) == before


def test_only_plans_of_the_space_are_measured(device: Device) -> None:
    groups = [ChannelGroup(name, size) for name, size in device.network.sizes.items()]
    space = SearchSpace.of(groups, channel_multiple=4, min_keep_ratio=0.25, frozen=["g1"])
    device.latencies(space).model()
    for plan in device.plans:
        assert plan.widths["g1"] == plan.sizes["g1"]
        assert all(plan.widths[name] in space.allowed[name] for name in space.names)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_network_of_few_groups_gets_its_measurements_too(tmp_path: Path, groups: int) -> None:
    device = Device(plain(groups), tmp_path / "latencies.jsonl")
    assert device.latencies().model() is not None
    assert len({plan.digest for plan in device.plans}) == len(device.plans) == BUDGET
    assert not any(plan.is_full for plan in device.plans)


def test_a_space_with_fewer_plans_than_measurements_comes_to_an_end(device: Device) -> None:
    groups = [ChannelGroup(name, size) for name, size in device.network.sizes.items()]
    space = SearchSpace.of(groups, channel_multiple=16, frozen=["g1", "g2", "g3"])
    assert device.latencies(space).model() is None
    plans = np.prod([len(space.allowed[name]) for name in space.names])
    assert plans - 3 <= len({plan.digest for plan in device.plans}) == len(device.plans) <= plans - 1


@pytest.mark.parametrize("table", [None, table_of(("conv", 9, 4, 3, "a"))], ids=["unknown", "known"])
def test_nothing_is_asked_of_a_model_where_there_can_be_none(device: Device, table: LayerTable | None) -> None:
    mode = "measure" if table is not None else "auto"
    latencies = Latencies(
        lambda: table, device.measure, device.file, LatencySection(mode=mode, measurements=6), device.space
    )
    assert latencies.model() is None
    assert not device.plans
    for plan in device.random(9):
        assert latencies.of(plan, exact=False)["latency_measured"] == 1
    assert len(device.plans) == 9
    assert latencies.report() == {"measured": 9, "predicted": 0, "trusted": False}


def test_a_network_without_layers_to_learn_from_is_measured(device: Device) -> None:
    table = device.network.table
    columns = len(table.groups)
    bare = replace(
        table,
        **{"names": (), "kinds": (), "taps": table.taps[:0], "pixels": table.pixels[:0]},
        **{"in_pixels": table.in_pixels[:0], "constant": np.zeros((0, 2), dtype=np.int64)},
        per_width=np.zeros((0, 2, columns), dtype=np.int64),
    )
    latencies = Latencies(lambda: bare, device.measure, device.file, LatencySection(measurements=6), device.space)
    assert latencies.model() is None
    for plan in device.random(8):
        assert latencies.of(plan, exact=False)["latency_measured"] == 1


def test_without_a_space_candidates_alone_teach_the_model(device: Device) -> None:
    latencies = Latencies(
        lambda: device.network.table, device.measure, device.file, LatencySection(measurements=BUDGET)
    )
    latencies.of(device.full, exact=False)
    assert latencies.model() is None
    figures = [latencies.of(plan, exact=False) for plan in device.random(BUDGET + 5)]
    assert [found["latency_measured"] for found in figures[:BUDGET]] == [1] * BUDGET
    assert [found["latency_measured"] for found in figures[BUDGET:]] == [0] * 5


# -- what is predicted and what is measured


@pytest.mark.parametrize("build", [plain, mobile])
def test_a_trusted_model_predicts_and_one_in_ten_is_measured_all_the_same(
    tmp_path: Path, build: Callable[[int], Network]
) -> None:
    device = Device(build(4), tmp_path / "latencies.jsonl")
    latencies = ready(device, measurements=15)
    drawn = device.random(3 * CHECK_EVERY + 15)  # the model may have measured some of them
    plans = [plan for plan in drawn if plan.digest not in latencies.measured][: 3 * CHECK_EVERY]
    figures = [latencies.of(plan, exact=False) for plan in plans]
    measured = [i for i, found in enumerate(figures) if found["latency_measured"]]
    assert len(measured) == 3 == len(device.plans)
    errors = []
    for plan, found in zip(plans, figures, strict=True):
        if found["latency_measured"]:
            continue
        ratio = found["latency_ratio"]
        assert found["latency_ratio_low"] < ratio < found["latency_ratio_high"]
        assert (found["p50_ms"], found["p95_ms"]) == pytest.approx((10 * ratio, 12 * ratio))
        errors.append(abs(ratio / device.network.ratio(widths_of(plan)) - 1))
    assert np.median(errors) < 0.03
    report = latencies.report()
    assert report["predicted"] == len(plans) - len(measured)
    assert report["measured"] == 15 + 1 + len(measured)
    assert report["trusted"]
    assert report["median_error"] < 0.05


def test_what_is_fine_tuned_is_measured_whatever_the_model_says(device: Device) -> None:
    latencies = ready(device)
    for plan in device.random(5):
        assert latencies.of(plan, exact=True)["latency_measured"] == 1
    assert len(device.plans) == 5


def test_what_was_measured_is_neither_measured_nor_predicted_again(device: Device) -> None:
    latencies = ready(device)
    (plan,) = device.random(1)
    figures = latencies.of(plan, exact=True)
    assert latencies.of(plan, exact=False) == figures == latencies.of(plan, exact=True)
    assert device.plans == [plan]


def test_the_unpruned_network_is_measured_and_teaches_nothing(device: Device) -> None:
    latencies = device.latencies()
    latencies.model()
    assert latencies.of(device.full, exact=False)["latency_measured"] == 1
    assert device.plans[-1].is_full
    assert device.full.digest not in latencies.samples
    assert device.full.digest not in device.file.read_text()


def test_without_the_unpruned_networks_milliseconds_nothing_is_predicted(device: Device) -> None:
    latencies = device.latencies()
    assert latencies.model() is not None
    (plan,) = device.random(1)
    assert latencies.of(plan, exact=False)["latency_measured"] == 1


def test_milliseconds_in_another_precision_follow_from_those_of_the_unpruned_network_in_fp32(device: Device) -> None:
    def measure(plan: PruningPlan) -> tuple[dict[str, float], BenchmarkResult]:
        figures, result = device.measure(plan)
        return {name: value * 0.5 for name, value in figures.items()}, result

    section = LatencySection(measurements=BUDGET, max_error=0.08, min_spearman=0.8)
    in_float = {"latency_ratio": 1.0, "p50_ms": 10.0, "p95_ms": 12.0}
    latencies = Latencies(
        lambda: device.network.table, measure, device.file, section, device.space, seed=3, dense=lambda: in_float
    )
    assert latencies.of(device.full, exact=True)["latency_ratio"] == 0.5
    assert len(latencies.samples) == 1, "the unpruned network in integers is a plan like others"
    assert latencies.model() is not None
    figures = latencies.of(device.random(1)[0], exact=False)
    assert figures["latency_measured"] == 0
    assert figures["p50_ms"] == pytest.approx(10 * figures["latency_ratio"])
    assert figures["p95_ms"] == pytest.approx(12 * figures["latency_ratio"])


def test_a_model_that_is_not_good_enough_is_not_used(device: Device) -> None:
    device.worth_nothing = True
    latencies = ready(device)
    assert latencies.model() is None
    for plan in device.random(7):
        assert latencies.of(plan, exact=False)["latency_measured"] == 1
    assert not latencies.report()["trusted"]
    assert latencies.report()["median_error"] > 0.1


@pytest.mark.parametrize("settings", [{"max_error": 1e-6}, {"min_spearman": 1.0}])
def test_the_run_file_says_what_is_good_enough(device: Device, settings: dict[str, float]) -> None:
    device.network.rng.bit_generator.state = np.random.default_rng(1).bit_generator.state
    noisy = Device(replace(device.network, noise=0.05), device.file)
    assert ready(noisy, max_error=10.0, min_spearman=0.5).model() is not None
    noisy.file.unlink()
    assert ready(noisy, **settings).model() is None


def test_the_model_is_not_fitted_again_until_there_is_more_to_learn(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[int] = []
    fit = LatencyModel.fit.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, table: Any, samples: Any, *, judge: bool = True) -> Any:
        if judge:
            fits.append(len(samples))
        return fit(cls, table, samples, judge=judge)

    monkeypatch.setattr(LatencyModel, "fit", classmethod(counted))
    latencies = ready(device)
    for plan in device.random(8):
        latencies.of(plan, exact=False)
    assert fits.count(BUDGET) == 1
    for plan in device.random(10, seed=4):
        latencies.of(plan, exact=True)
    latencies.model()
    assert fits[-1] >= BUDGET + 5


# -- a killed run


def test_a_killed_run_takes_up_its_measurements_and_gets_the_same_model(device: Device) -> None:
    first = device.latencies()
    model = first.model()
    assert model is not None
    with device.file.open("a") as file:
        file.write(device.file.read_text().splitlines()[0][:200])  # cut short by the kill
    device.plans.clear()
    again = device.latencies()
    resumed = again.model()
    assert not device.plans
    assert resumed is not None
    plans = device.network.plans(20, np.random.default_rng(0))
    np.testing.assert_array_equal(resumed.ratios(plans), model.ratios(plans))
    assert resumed.trust == model.trust


def test_a_run_killed_while_the_model_was_measuring_goes_on_where_it_was(device: Device) -> None:
    device.latencies().model()
    expected = [plan.digest for plan in device.plans]
    lines = device.file.read_text().splitlines(keepends=True)
    device.file.write_text("".join(lines[:6]) + lines[6][:100])
    device.plans.clear()
    device.latencies().model()
    assert [plan.digest for plan in device.plans] == expected[6:]
    device.plans.clear()
    device.latencies().model()  # killed a second time: nothing of what followed the cut line is lost
    assert not device.plans


def test_lines_that_are_no_measurements_are_left_out(device: Device) -> None:
    lines = ["", "{}", '{"plan": "x", "widths": [1], "result": {}}', '{"plan": "x", "result": "y"}', "5", "[]"]
    device.file.write_text("\n".join(lines) + "\n")
    device.latencies().model()
    assert len(device.plans) == BUDGET


# -- the pool


def test_random_widths_are_allowed_and_reach_from_small_to_whole(device: Device) -> None:
    groups = [ChannelGroup(name, size) for name, size in device.network.sizes.items()]
    space = SearchSpace.of(groups, channel_multiple={"g0": 8, "g2": 3}, min_keep_ratio=0.2, frozen=["g3"])
    found = random_widths(space, 400, np.random.default_rng(0))
    names = list(space.full.sizes)
    assert found.shape == (400, len(names))
    for column, name in enumerate(names):
        assert set(found[:, column]) <= set(space.allowed.get(name, (space.full.sizes[name],)))
    shares = found / np.array(list(space.full.sizes.values()))
    assert shares.mean(axis=1).min() < 0.45
    assert shares.mean(axis=1).max() > 0.9
    assert ((found[:, [0, 1, 2, 4]] % 8 == 0).all(axis=1)).mean() > 0.1  # whole plans in blocks
    np.testing.assert_array_equal(found, random_widths(space, 400, np.random.default_rng(0)))


def test_widths_and_plans_belong_together(device: Device) -> None:
    for w in device.network.plans(10, np.random.default_rng(1)):
        plan = plan_of(device.full, w)
        np.testing.assert_array_equal(widths_of(plan), w)
        assert all(kept == tuple(range(len(kept))) for kept in plan.kept.values())
