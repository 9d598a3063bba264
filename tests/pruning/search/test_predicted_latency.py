from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from secateur.device_profiles.latency_model import LatencyModel
from secateur.device_profiles.layers import LayerTable
from secateur.pruning.search.protocol import Answer, Goal, Predict, Request, Time
from secateur.pruning.search.support import latency_table, limit_of, predicted_latency
from secateur.pruning.search.testing import FakeStudy, chain, drive, study


def model_of(sizes: tuple[int, ...]) -> LatencyModel:
    """A chain's latency: group ``i`` costs (i + 1) per channel, relative to the unpruned network."""
    count = len(sizes)
    table = LayerTable(
        tuple(f"w{i}" for i in range(count)),
        ("linear",) * count,
        *(np.ones(count, dtype=np.int64) for _ in range(3)),
        tuple(group.name for group in chain(*sizes)),
        np.array([[1, 0]] * count, dtype=np.int64),
        np.stack([np.zeros((count, count)), np.eye(count)], axis=1).astype(np.int64),
    )
    terms = np.zeros((4, 90))
    terms[3, 0] = 1.0  # work of a linear layer
    costs = np.arange(1.0, count + 1)
    return LatencyModel(table, terms, costs / (costs @ sizes), np.array([0.0, 1.0]))


def answered(fake: FakeStudy, model: LatencyModel | None) -> Any:
    def answer(request: Request) -> Answer:
        if isinstance(request, Predict) and model is not None:
            fake.log.append((request, {}))
            return model.to_arrays()
        return fake(request)

    return answer


def test_a_trusted_model_answers_over_the_columns_of_the_space() -> None:
    sizes = (16, 24, 32, 8)
    fake = study(sizes, frozen=["layer1.conv1"])
    model = model_of(sizes)
    ratios = drive(predicted_latency(fake.problem()), answered(fake, model))
    assert fake.requests == [Predict()]
    rng = np.random.default_rng(0)
    widths = np.array([[rng.choice(fake.space.allowed[name]) for name in fake.space.names] for _ in range(20)])
    expected = [(w[0] + 2 * 24 + 3 * w[1] + 4 * w[2]) / (16 + 2 * 24 + 3 * 32 + 4 * 8) for w in widths]
    np.testing.assert_allclose(ratios(widths), expected)
    assert ratios(fake.space.encode(fake.space.full)[None]) == pytest.approx([1.0])


def test_without_a_trusted_model_plans_are_timed() -> None:
    fake, twin = study((16, 24, 32)), study((16, 24, 32))
    ratios = drive(predicted_latency(fake.problem(), 4), fake)
    assert [type(request) for request in fake.requests] == [Predict, Time]
    by_table = drive(latency_table(twin.problem(), 4), twin)
    assert fake.requests[1] == twin.requests[0]
    widths = np.array([[16, 24, 32], [8, 12, 16], [3, 24, 1]])
    np.testing.assert_array_equal(ratios(widths), by_table(widths))


def test_a_latency_target_is_bounded_by_the_model() -> None:
    fake = study((16, 24, 32))
    model = model_of((16, 24, 32))
    limit = drive(limit_of(fake.problem(Goal(latency_ratio=0.5))), answered(fake, model))
    assert (limit.name, limit.bound) == ("latency_ratio", 0.5)
    assert limit.of([8, 12, 16]) == pytest.approx(0.5)
    assert fake.requests == [Predict()]
    both = drive(limit_of(fake.problem(Goal(latency_ratio=0.5, macs_ratio=0.25))), answered(fake, model))
    macs = fake.macs(fake.plan_of([16, 1, 16])) / fake.macs(fake.space.full)
    assert both.of([16, 1, 16]) == pytest.approx(max(float(model.ratios(np.array([[16, 1, 16]]))[0]), 2 * macs))


def test_a_macs_target_needs_no_latency() -> None:
    fake = study((16, 24, 32))
    drive(limit_of(fake.problem(Goal(macs_ratio=0.5))), fake)
    assert fake.requests == []
