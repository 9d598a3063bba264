"""The in-order knapsack: exact where costs add up, within the limit and no worse than greedy where they do not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.search.methods.knapsack import at_least, knapsack, programme
from secateur.pruning.search.protocol import Problem
from secateur.pruning.search.support import Limit, SearchError, macs_ratios, project
from secateur.pruning.search.testing import study

SIZES = st.lists(st.integers(2, 7), min_size=1, max_size=4)


def saliency_of(problem: Problem, seed: int) -> dict[str, np.ndarray]:
    """Skewed saliencies, whose level differs between groups."""
    rng = np.random.default_rng(seed)
    return {name: rng.random() * rng.random(size) ** 3 for name, size in problem.space.sizes.items()}


def kept(problem: Problem, saliency: dict[str, np.ndarray], widths) -> float:
    return sum(float(np.sort(saliency[n])[::-1][:w].sum()) for n, w in zip(problem.space.names, widths, strict=True))


def brute_force(problem: Problem, limit: Limit, saliency: dict[str, np.ndarray]) -> float:
    """The largest kept saliency of all plans within the limit."""
    every = np.array(list(product(*(problem.space.allowed[name] for name in problem.space.names))))
    return max(kept(problem, saliency, row) for row in every[limit.ratios(every) <= limit.bound])


@given(
    groups=st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    slack=st.integers(0, 60),
)
def test_the_programme_finds_the_best_choice_for_every_total(groups, slack):
    values = [np.array([float(v) for v, _ in group]) for group in groups]
    costs = [np.array([float(c) for _, c in group]) for group in groups]
    least = sum(c.min() for c in costs)
    answers = programme(values, costs, least + slack, bins=max(1, slack))
    for total in range(slack + 1):
        chosen = list(answers[total])
        assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= least + total
        best = max(
            sum(v[i] for v, i in zip(values, option, strict=True))
            for option in product(*(range(len(c)) for c in costs))
            if sum(c[i] for c, i in zip(costs, option, strict=True)) <= least + total
        )
        assert sum(v[i] for v, i in zip(values, chosen, strict=True)) == best


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=6), st.floats(0, 3))
def test_costs_between_bins_are_never_rounded_below_what_they_are(groups, slack):
    costs = [np.array(group) for group in groups]
    bound = sum(cost.min() for cost in costs) + slack
    answers = programme([np.sqrt(cost) for cost in costs], costs, bound, bins=10)
    for answer in answers[:11]:
        assert sum(cost[i] for cost, i in zip(costs, answer, strict=True)) <= bound + 1e-5


def test_the_programme_has_no_answer_where_the_cheapest_choices_exceed_the_bound():
    costs = [np.array([3.0, 5.0]), np.array([2.0])]
    assert programme([np.ones(2), np.ones(1)], costs, 4.9).shape == (0, 2)
    assert programme([np.ones(2), np.ones(1)], costs, 5.0)[-1].tolist() == [0, 0]


@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 999), share=st.floats(0, 1))
def test_additive_costs_are_solved_exactly(sizes, seed, share):
    problem, rng = study(sizes).problem(), np.random.default_rng(seed)
    tables = [np.concatenate([[0], np.cumsum(rng.integers(0, 9, size=size))]) for size in sizes]

    def ratios(widths):
        return sum(table[widths[:, g]] for g, table in enumerate(tables)).astype(float)

    least, most = (int(ratios(np.array([w]))[0]) for w in (np.ones(len(sizes), dtype=int), sizes))
    limit = Limit("latency_ratio", ratios, round(least + share * (most - least)))
    saliency = saliency_of(problem, seed)
    found = knapsack(problem, limit, saliency, bins=max(1, int(limit.bound) - least))
    assert limit.of(found) <= limit.bound
    assert kept(problem, saliency, found) == pytest.approx(brute_force(problem, limit, saliency))


@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 999), share=st.floats(0.01, 1), multiple=st.sampled_from([1, 2]))
def test_macs_meet_the_limit_and_keep_nearly_the_most(sizes, seed, share, multiple):
    fake = study(sizes, multiple)
    problem = fake.problem()
    ratios = macs_ratios(problem)
    least = float(ratios(problem.space.encode(problem.space.smallest())[None])[0])
    limit = Limit("macs_ratio", ratios, least + share * (1 - least))
    saliency = saliency_of(problem, seed)
    widths = knapsack(problem, limit, saliency)
    assert all(w in problem.space.allowed[name] for name, w in zip(problem.space.names, widths, strict=True))
    assert limit.of(widths) <= limit.bound
    value, best = kept(problem, saliency, widths), brute_force(problem, limit, saliency)
    assert value >= kept(problem, saliency, project(problem, limit, saliency)) - 1e-12
    assert 0.95 * best <= value <= best + 1e-12


def test_it_is_better_than_greedy_and_nearly_always_the_best():
    values = []
    for seed in range(40):
        problem = study((5, 8, 6)).problem()
        saliency = saliency_of(problem, seed)
        limit = Limit("macs_ratio", macs_ratios(problem), 0.4)
        best = brute_force(problem, limit, saliency)
        values.append(
            [
                kept(problem, saliency, w) / best
                for w in (knapsack(problem, limit, saliency), project(problem, limit, saliency))
            ]
        )
    found, greedy = np.array(values).T
    assert (found > 1 - 1e-9).mean() >= 0.9
    assert found.mean() > greedy.mean()


def test_a_window_of_widths_and_channels_that_are_gone_are_honoured():
    problem = study((8, 8)).problem()
    first, second = problem.space.names
    window = replace(problem.space, allowed={first: (4, 5, 6), second: (8,)})
    saliency = {first: np.array([-np.inf, 1, 2, 3, -np.inf, 4, 5, 6]), second: np.ones(8)}
    limit = Limit("num_channels", lambda widths: widths.sum(axis=1).astype(float), 13)
    assert knapsack(replace(problem, space=window), limit, saliency) == [5, 8]


def test_a_limit_out_of_reach_is_an_error():
    problem = study((8, 8), 2).problem()
    limit = Limit("macs_ratio", macs_ratios(problem), 0.01)
    with pytest.raises(SearchError, match=r"no plan of the space meets macs_ratio 0.01"):
        knapsack(problem, limit, {name: np.ones(8) for name in problem.space.names})


def test_at_least_keeps_a_share_of_every_group():
    problem = study((16, 24, 3)).problem()
    limit = Limit("macs_ratio", macs_ratios(problem), 0.6)
    space = at_least(problem, limit, 0.5, least=2).space
    assert [min(space.allowed[name]) for name in space.names] == [8, 12, 2]
    assert [max(space.allowed[name]) for name in space.names] == [16, 24, 3]
    assert at_least(problem, limit, 0.0).space == problem.space
    with pytest.raises(
        SearchError, match=r"out of reach with min_keep 0.9: .* reaches 0\.\d+. Lower min_keep or raise"
    ):
        at_least(problem, limit, 0.9)
