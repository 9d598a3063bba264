"""Which channels stay under a cost limit: the in-order knapsack of latency-aware pruning.

Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (NeurIPS 2022, arXiv 2210.06659), known as HALP: a group
gives up its channels from the least important one, so choosing channels is choosing one width per group (a knapsack
with precedence), and the kept importance is to be as large as the cost allows. With costs that add up over the groups
a dynamic programme over discretised costs is exact (``programme``).

Our choice: the costs here do not add up (the MACs of a layer are a product of two widths), so the programme is given
the differences that each group alone makes to the best widths known, and is solved anew around what it finds. It
answers for every total at once; of these answers the most important one whose *true* cost meets the limit is taken,
then improved by single steps and exchanges. The result meets the limit and keeps no less than the greedy ``project``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from secateur.pruning.plan import IntArray
from secateur.pruning.search.protocol import FloatArray, Problem
from secateur.pruning.search.support import Limit, SearchError, project

BINS = 1000
"""Parts of the cost above the smallest widths (HALP: latency in thousandths)."""
ROUNDS = 5
"""How often the programme is solved around a better solution."""


def knapsack(problem: Problem, limit: Limit, saliency: Mapping[str, FloatArray], bins: int = BINS) -> list[int]:
    """Widths that meet a limit and keep as much saliency as they can.

    Args:
        problem: its space says which widths are allowed.
        limit: the cost, and how large it may be.
        saliency: group -> shape ``(size,)``, not negative (-inf for channels that are gone); comparable across groups.
        bins: parts of the cost in the dynamic programme.

    Returns:
        Allowed width per group, in the order of ``space.names``.

    Raises:
        SearchError: not even the smallest allowed widths meet the limit.
    """
    names, allowed = problem.space.names, problem.space.allowed
    choices = [np.array(allowed[name], dtype=np.int64) for name in names]
    kept = [np.concatenate([[0.0], np.cumsum(np.sort(saliency[name])[::-1])]) for name in names]
    task = _Task(limit, choices, [k[widths] for k, widths in zip(kept, choices, strict=True)])
    greedy = project(problem, limit, saliency, [int(widths[-1]) for widths in choices])
    best = task.improved(np.array([int(np.searchsorted(w, g)) for w, g in zip(choices, greedy, strict=True)]))
    for _ in range(ROUNDS):
        costs = task.differences(best)
        answers = programme(task.values, costs, limit.bound - limit.of(task.widths(best)), bins)
        better = np.array([row for row in np.unique(answers, axis=0) if task.value(row) > task.value(best)])
        fits = better[task.costs(better) <= limit.bound] if len(better) else better
        if len(fits) == 0:
            break
        other = task.improved(max(fits, key=task.value))
        if task.value(other) <= task.value(best):
            break
        best = other
    return [int(width) for width in task.widths(best)]


def programme(values: Sequence[FloatArray], costs: Sequence[FloatArray], bound: float, bins: int = BINS) -> IntArray:
    """The dynamic programme: one choice per group, the largest sum of values for every sum of costs.

    What a choice costs above its group's cheapest one is rounded up to whole bins; ``bins`` of them lie between the
    cheapest choices and the bound. The answer for ``bins`` meets the bound, and is the best of all where costs are
    whole bins. Half as many again are answered for, since rounded costs exceed the true ones.

    Args:
        values: per group, shape ``(choices,)``.
        costs: per group, shape ``(choices,)``; a selection costs their sum.
        bound: what it may cost.

    Returns:
        Shape ``(totals, groups)``, the position chosen per group, for a total of up to 0, 1, 2 ... bins; empty where
        the cheapest choices exceed the bound.
    """
    slack = bound - sum(float(cost.min()) for cost in costs)
    if slack < 0:
        return np.zeros((0, len(costs)), dtype=np.int64)
    totals = bins + bins // 2
    weights = [_in_bins(cost - cost.min(), slack / bins, totals) for cost in costs]
    best, picks = np.zeros(totals + 1), []
    for value, weight in zip(values, weights, strict=True):
        reached, pick = np.full(totals + 1, -np.inf), np.zeros(totals + 1, dtype=np.int64)
        for i in np.flatnonzero(weight <= totals):
            total = np.full(totals + 1, -np.inf)
            total[weight[i] :] = best[: totals + 1 - weight[i]] + value[i]
            better = total > reached
            reached[better], pick[better] = total[better], i
        best = reached
        picks.append(pick)
    answers, left = np.zeros((totals + 1, len(costs)), dtype=np.int64), np.arange(totals + 1)
    for group in reversed(range(len(costs))):
        answers[:, group] = picks[group][left]
        left = left - weights[group][answers[:, group]]
    return answers


def _in_bins(cost: FloatArray, unit: float, most: int) -> IntArray:
    """Costs in whole units, rounded up (a millionth of a unit is rounding error); more than ``most`` are one more."""
    whole = np.where(cost > 0, np.inf, 0.0) if unit <= 0 else np.ceil(cost / unit - 1e-6)
    weights: IntArray = np.clip(whole, 0, most + 1).astype(np.int64)
    return weights


@dataclass(frozen=True, eq=False)
class _Task:
    """One choice of width per group; positions of shape ``(groups,)`` stand for widths.

    Args:
        limit: the true cost.
        choices: per group, allowed widths in increasing order.
        values: per group, the importance kept at each of them.
    """

    limit: Limit
    choices: list[IntArray]
    values: list[FloatArray]

    def widths(self, at: IntArray) -> IntArray:
        """Width vectors of positions, shape ``(..., groups)`` -> ``(..., groups)``."""
        return np.stack([widths[at[..., g]] for g, widths in enumerate(self.choices)], axis=-1)

    def value(self, at: IntArray) -> float:
        return sum(float(value[i]) for value, i in zip(self.values, at, strict=True))

    def costs(self, rows: IntArray) -> FloatArray:
        """True costs, shape ``(rows, groups)`` -> ``(rows,)``."""
        return self.limit.ratios(self.widths(rows))

    def differences(self, at: IntArray) -> list[FloatArray]:
        """Per group, what each of its choices alone would change of the cost at ``at``; shape ``(choices,)``."""
        now, changes = self.limit.of(self.widths(at)), []
        for group, widths in enumerate(self.choices):
            rows = np.repeat(at[None], len(widths), axis=0)
            rows[:, group] = np.arange(len(widths))
            changes.append(self.costs(rows) - now)
        return changes

    def improved(self, at: IntArray) -> IntArray:
        """Positions after the best single steps up, and exchanges of a step down for one up, until none helps."""
        for _ in range(sum(len(widths) for widths in self.choices)):
            better = max(self._moves(at), key=lambda move: move[0], default=None)
            if better is None:
                return at
            at = better[1]
        return at

    def _moves(self, at: IntArray) -> Iterator[tuple[float, IntArray]]:
        """For no group and for each group stepped down: the best step up that fits and gains, with the gain."""
        tops = np.array([len(widths) - 1 for widths in self.choices])
        for down in [None, *np.flatnonzero(at > 0).tolist()]:
            start = at.copy()
            lost = 0.0
            if down is not None:
                start[down] -= 1
                lost = float(self.values[down][at[down]] - self.values[down][at[down] - 1])
            ups = np.array([g for g in np.flatnonzero(at < tops) if g != down], dtype=np.int64)
            gains = np.array([self.values[g][at[g] + 1] - self.values[g][at[g]] for g in ups]) - lost
            ups, gains = ups[gains > 1e-12 * abs(lost)], gains[gains > 1e-12 * abs(lost)]
            if len(ups) == 0:
                continue
            rows = np.repeat(start[None], len(ups), axis=0)
            rows[np.arange(len(ups)), ups] += 1
            fits = np.flatnonzero(self.costs(rows) <= self.limit.bound)
            if len(fits):
                best = fits[int(np.argmax(gains[fits]))]
                yield float(gains[best]), rows[best]


def at_least(problem: Problem, limit: Limit, min_keep: float, least: int = 1) -> Problem:
    """The problem with fewer allowed widths: those that keep a share of each group, and the full one.

    Args:
        min_keep: kept / width of every group, in 0..1.
        least: channels of every group, whatever the share.

    Raises:
        SearchError: with these widths the limit is out of reach.
    """
    space = problem.space
    floors = {name: max(least, math.ceil(min_keep * size - 1e-9)) for name, size in space.sizes.items()}
    allowed = {n: tuple(w for w in space.allowed[n] if w >= floors[n]) or space.allowed[n][-1:] for n in space.names}
    reached = limit.of([widths[0] for widths in allowed.values()])
    if reached > limit.bound:
        raise SearchError(
            f"target {limit.name} {limit.bound:g} is out of reach with min_keep {min_keep:g}: the narrowest network "
            f"it allows reaches {reached:.3f}. Lower min_keep or raise the target."
        )
    return replace(problem, space=replace(space, allowed=allowed))
