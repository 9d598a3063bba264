"""What a search strategy and the study say to each other.

A strategy is a *generator of requests*: it yields ``Evaluate``, ``FineTune`` or ``Score`` and receives the answer
to each, in ask order; at its end it returns its archive. It draws every random number from ``problem.rng`` and
its requests depend on nothing but that generator and earlier answers, so replaying the answers from a journal is
resuming the search. It never sees a model, a file, a tracker or a clock.

Each method is one module of this package: its file name is its name in a run file, ``Options`` (a frozen
dataclass) are its options, and ``search(problem, options)`` is the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pruning.plan import PruningPlan, SearchSpace

DENSE = ""
"""``base`` of a candidate whose weights are cut from the unpruned baseline."""


@dataclass(frozen=True)
class Candidate:
    """A proposed plan.

    Args:
        id: position in ask order, from 0, over all requests of a run.
        plan: what to keep.
        origin: how the method came to propose it (``init``, ``mutation``, ``splice`` ...).
        parents: ids of the candidates it was derived from.
        base: whose weights are inherited: ``DENSE`` or the ``base`` of an earlier ``FineTuned``.
    """

    id: int
    plan: PruningPlan
    origin: str
    parents: tuple[int, ...] = ()
    base: str = DENSE


@dataclass(frozen=True)
class Evaluation:
    """What is known of a candidate.

    Args:
        status: ``ok``; ``infeasible`` = outside the window, not evaluated; ``failed`` = an expected error.
        reason: why it is not ``ok``.
        metrics: raw values, units in the names: ``top1`` (fraction), ``loss``, ``macs``, ``params``, ``size_bytes``,
            ``p50_ms``, ``p95_ms``, ``latency_ratio`` (to the unpruned baseline), ``seconds`` (spent on it).
    """

    status: Literal["ok", "infeasible", "failed"] = "ok"
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """A metric by name; NaN where it was not taken."""
        return self.metrics.get(name, float("nan"))


@dataclass(frozen=True)
class Evaluate:
    """Request: evaluate these candidates on the search split. Answer: ``tuple[Evaluation, ...]`` in the same order.

    Args:
        latency: also time each candidate on the device (about a second each).
    """

    candidates: tuple[Candidate, ...]
    latency: bool = False


@dataclass(frozen=True)
class FineTune:
    """Request: train the network of ``candidate`` for ``epochs``. Answer: ``FineTuned``."""

    candidate: Candidate
    epochs: float


@dataclass(frozen=True)
class FineTuned:
    """Answer to ``FineTune``.

    Args:
        base: name of the trained weights, to be used as ``Candidate.base``.
        evaluation: metrics on the search split after training, with latency.
    """

    base: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Score:
    """Request: saliency of every channel under a criterion. Answer: group name -> shape ``(size,)``, higher = keep."""

    criterion: str
    base: str = DENSE


Request = Evaluate | FineTune | Score
Answer = tuple[Evaluation, ...] | FineTuned | Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Entry:
    """One plan of an archive, with its evaluation."""

    candidate: Candidate
    evaluation: Evaluation


Archive = tuple[Entry, ...]
"""What a search returns: the plans worth fine-tuning, in the order they were found."""


@dataclass(frozen=True)
class Target:
    """When a search may stop. Ratios to the unpruned network; None = no such target."""

    macs_ratio: float | None = None
    latency_ratio: float | None = None

    def met(self, evaluation: Evaluation, reference: Evaluation) -> bool:
        """Whether every target that is set is reached; False when none is set."""
        checks = []
        if self.macs_ratio is not None:
            checks.append(evaluation["macs"] <= self.macs_ratio * reference["macs"])
        if self.latency_ratio is not None:
            checks.append(evaluation["latency_ratio"] <= self.latency_ratio)
        return bool(checks) and all(checks)


@dataclass(frozen=True)
class Problem:
    """What a strategy is given.

    Args:
        space: groups and allowed widths.
        reference: evaluation of the unpruned network under the same protocol.
        reward: evaluation -> fitness, higher = better.
        macs: MACs of a plan at batch 1, without building it.
        target: when to stop.
        rng: the only source of randomness.
    """

    space: SearchSpace
    reference: Evaluation
    reward: Callable[[Evaluation], float]
    macs: Callable[[PruningPlan], float]
    target: Target
    rng: np.random.Generator


Strategy = Generator[Request, Answer, Archive]
