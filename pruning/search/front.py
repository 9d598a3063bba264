"""The Pareto front: what no other evaluation beats in accuracy, latency and MACs at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.pruning.search.protocol import Evaluation

COSTS = ("latency_ratio", "macs")


def pareto_front(evaluations: Sequence[Evaluation], metric: str = "top1") -> list[int]:
    """Positions of the non-dominated evaluations, highest accuracy first (equals: the first one only).

    An evaluation dominates another if it is at least as accurate, as fast and as small, and better in one of them.
    Those that are not ``ok`` are left out, and so are those without a measured latency, unless none has one.

    Args:
        evaluations: in the order they were found.
        metric: the accuracy metric.
    """
    known = [i for i, e in enumerate(evaluations) if e.status == "ok" and not np.isnan(e[metric])]
    timed = [i for i in known if not np.isnan(evaluations[i]["latency_ratio"])]
    costs = COSTS if timed else COSTS[1:]
    chosen = timed or known
    if not chosen:
        return []
    points = np.array([[-evaluations[i][metric], *(evaluations[i][cost] for cost in costs)] for i in chosen])
    order = np.lexsort(points.T[::-1])  # nobody is dominated by a later one
    front: list[int] = []
    for i in order:
        if not any((points[j] <= points[i]).all() for j in front):
            front.append(int(i))
    return [chosen[i] for i in front]
