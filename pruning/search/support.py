"""What the methods share: requests with typed answers, a ranking, and errors that name the way out."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pruning.search.protocol import (
    DENSE,
    Answer,
    Archive,
    Candidate,
    Entry,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    Problem,
    Request,
    Score,
)


class SearchError(ValueError):
    """A search cannot do what its run file asks for, or found nothing that can be evaluated."""


def evaluate(
    candidates: Sequence[Candidate], *, latency: bool = False
) -> Generator[Request, Answer, tuple[Evaluation, ...]]:
    """``evaluations = yield from evaluate(candidates)``: ask for evaluations, in the order of the candidates."""
    answer = yield Evaluate(tuple(candidates), latency)
    assert isinstance(answer, tuple) and len(answer) == len(candidates), answer
    return answer


def fine_tune(candidate: Candidate, epochs: float) -> Generator[Request, Answer, FineTuned]:
    """``tuned = yield from fine_tune(candidate, epochs)``: ask for trained weights."""
    answer = yield FineTune(candidate, epochs)
    assert isinstance(answer, FineTuned), answer
    return answer


def score(criterion: str, base: str = DENSE) -> Generator[Request, Answer, Mapping[str, npt.NDArray[np.float64]]]:
    """``saliency = yield from score(criterion)``: ask for shape ``(size,)`` per group, higher = keep."""
    answer = yield Score(criterion, base)
    assert isinstance(answer, Mapping), answer
    return answer


def best_first(problem: Problem, candidates: Iterable[Candidate], evaluations: Iterable[Evaluation]) -> Archive:
    """The archive of every ``ok`` evaluation, highest reward first (ties: asked first).

    Raises:
        SearchError: nothing could be evaluated; gives the first reason.
    """
    pairs = [Entry(*pair) for pair in zip(candidates, evaluations, strict=True)]
    entries = [entry for entry in pairs if entry.evaluation.status == "ok"]
    if not entries:
        raise SearchError(
            f"none of {len(pairs)} candidates could be evaluated; the first: {pairs[0].evaluation.reason}"
        )
    return tuple(sorted(entries, key=lambda entry: -problem.reward(entry.evaluation)))


def check_reachable(problem: Problem) -> None:
    """Check, before any evaluation is paid for, that the smallest plan of the space meets the MACs target.

    Raises:
        SearchError: it does not; says the smallest ratio that can be reached and what would lower it.
    """
    wanted = problem.target.macs_ratio
    if wanted is None:
        return
    smallest = problem.macs(problem.space.smallest()) / problem.reference["macs"]
    if smallest > wanted:
        reachable = math.ceil(1000 * smallest) / 1000
        raise SearchError(
            f"target macs_ratio {wanted:g} is out of reach: with every group at its smallest allowed width the "
            f"network keeps {reachable:.3f} of its MACs. Raise the target to {reachable:.3f} or more, lower "
            "min_keep_ratio or the channel multiple, or freeze fewer groups."
        )


def check_ranges(options: object, **ranges: tuple[float, float]) -> None:
    """Check that each named option lies in its closed range; an option that is ``None`` is left unchecked.

    Raises:
        ValueError: lists every option outside its range.
    """
    values = {name: getattr(options, name) for name in ranges}
    faults = [
        f"{name} must lie in {low:g}..{high:g}, got {values[name]}"
        for name, (low, high) in ranges.items()
        if values[name] is not None and not low <= values[name] <= high
    ]
    if faults:
        raise ValueError("; ".join(faults))
