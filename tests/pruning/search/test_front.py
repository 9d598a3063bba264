"""The Pareto front against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from secateur.pruning.search.front import pareto_front
from secateur.pruning.search.protocol import Evaluation

few = st.integers(0, 4).map(float)
points = st.lists(st.tuples(few, few, few), max_size=12)


def evaluation(top1: float, latency: float, macs: float) -> Evaluation:
    return Evaluation(metrics={"top1": top1, "latency_ratio": latency, "macs": macs})


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] >= b[0] and a[1] <= b[1] and a[2] <= b[2] and a != b


@given(points)
def test_it_is_what_nothing_dominates_each_point_once(found: list[tuple[float, ...]]) -> None:
    front = pareto_front([evaluation(*p) for p in found])
    expected = {p for p in found if not any(dominates(q, p) for q in found)}
    assert {found[i] for i in front} == expected
    assert len(front) == len(expected)
    assert [found[i][0] for i in front] == sorted((p[0] for p in expected), reverse=True)


@given(points, st.tuples(few, few, few))
def test_it_never_loses_ground_as_candidates_come_in(found: list[tuple[float, ...]], new: tuple[float, ...]) -> None:
    before = {found[i] for i in pareto_front([evaluation(*p) for p in found])}
    together = [*found, new]
    after = {together[i] for i in pareto_front([evaluation(*p) for p in together])}
    assert all(any(a == b or dominates(a, b) for a in after) for b in before)


def test_failed_and_untimed_candidates_are_left_out_unless_none_is_timed() -> None:
    untimed = Evaluation(metrics={"top1": 0.99, "macs": 1.0})
    failed = Evaluation("failed", "x", {"top1": 1.0, "macs": 0.0, "latency_ratio": 0.0})
    assert pareto_front([untimed, failed, evaluation(0.5, 0.5, 2.0)]) == [2]
    assert pareto_front([untimed, failed]) == [0]
    assert pareto_front([failed]) == []
