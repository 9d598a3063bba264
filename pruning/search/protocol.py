"""What a search strategy and the study say to each other.

A strategy is a *generator of requests*: it yields ``Evaluate``, ``FineTune``, ``Score`` ... and receives the answer
to each, in ask order; at its end it returns its archive. It draws every random number from ``problem.rng`` and
its requests depend on nothing but that generator and earlier answers, so replaying the answers from a journal is
resuming the search. It never sees a model, a file, a tracker or a clock.

Each method is one module of ``secateur.pruning.search.methods``: its file name is its name in a run file, ``Options``
(a frozen dataclass) are its options, and ``search(problem, options)`` is the generator. A function
``least(problem, options) -> Budget`` may say what one round of it takes, the least that makes sense (default: one
evaluation); it asks ``problem`` for its space and goal only, and a line ``Least budget: ...`` of the module's docstring
says the same of its defaults, for lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace

FloatArray = npt.NDArray[np.float64]

COSTS = frozenset(
    {
        *("macs", "params", "size_bytes", "seconds", "p50_ms", "p95_ms"),
        *("latency_ratio", "latency_ratio_low", "latency_ratio_high", "latency_measured"),
    }
)
"""What an evaluation says of a network's costs; one device of several has its own, with its name behind a dot."""
LOWER_IS_BETTER = frozenset({"loss", "divergence"})
"""Metrics of which less is better; of all others more is, and they are fractions."""
DENSE = ""
"""``base`` of a candidate whose weights are cut from the unpruned baseline."""
RANDOM = "random"
"""``base`` of a candidate that begins with fresh random weights, drawn under the run's seed."""


@dataclass(frozen=True)
class Candidate:
    """A proposed plan.

    Args:
        id: position in ask order, from 0, over all requests of a run.
        plan: what to keep.
        origin: how the method came to propose it (``init``, ``mutation``, ``splice`` ...).
        parents: ids of the candidates it was derived from.
        base: whose weights are inherited: ``DENSE``, ``RANDOM``, or the ``base`` of an earlier ``FineTuned`` or
            ``AuxiliaryTrained``.
        projected_share: MACs that were moved to bring the plan to the target, over all MACs it removes, in 0..1: how
            much of it is no choice of the method's (``secateur.pruning.search.landing``).
    """

    id: int
    plan: PruningPlan
    origin: str
    parents: tuple[int, ...] = ()
    base: str = DENSE
    projected_share: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """What is known of a candidate.

    Args:
        status: ``ok``; ``infeasible`` = outside the window, not evaluated; ``failed`` = an expected error.
        reason: why it is not ``ok``.
        metrics: raw values, units in the names: what the workload says of images (``loss``, and accuracies as
            fractions), and ``COSTS``: ``macs``, ``params``, ``size_bytes``, ``p50_ms``, ``p95_ms``, ``latency_ratio``
            (to the unpruned baseline), ``seconds`` (spent on it).
        forward: the forward pass that the accuracy comes from, with its number type; empty if not known.
        precision: of the network that the metrics are of: the best of those that may ship.
        scored: how many precisions were tried for it; each counts as an evaluation.
    """

    status: Literal["ok", "infeasible", "failed"] = "ok"
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    forward: str = ""
    precision: str = "fp32"
    scored: int = 1

    def __getitem__(self, name: str) -> float:
        """A metric by name; NaN where it was not taken."""
        return self.metrics.get(name, float("nan"))


def merit_of(metric: str, value: float) -> float:
    """A metric's value, turned so that higher is better."""
    return -value if metric in LOWER_IS_BETTER else value


def as_fraction(metric: str, value: float) -> float:
    """A metric's value as a fraction, higher = better: exp(-value) in (0, 1] where less is better."""
    return math.exp(-value) if metric in LOWER_IS_BETTER else value


def on_images(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those metrics of an evaluation that come from images: the loss, and whatever accuracies its workload has."""
    return {name: value for name, value in metrics.items() if name.partition(".")[0] not in COSTS}


@dataclass(frozen=True)
class Evaluate:
    """Request: evaluate these candidates on the search split. Answer: ``tuple[Evaluation, ...]`` in the same order.

    Args:
        latency: also time each candidate on the device (about a second each).
        floor: accuracy (fraction); a candidate that can no longer reach it is given up as ``infeasible`` before all
            images are seen. None = see all.
    """

    candidates: tuple[Candidate, ...]
    latency: bool = False
    floor: float | None = None


@dataclass(frozen=True)
class FineTune:
    """Request: train the network of ``candidate`` for ``epochs``. Answer: ``FineTuned``.

    Args:
        part: which part of the recipe's learning-rate schedule this training is, as fractions of its whole: (0, 1) = a
            training of its own; a training shared by many candidates gives each its part.
        write_back: the trained channels are written back into the weights they were cut from, so that the new base
            still has every channel (weight inheritance); else the new base has the candidate's channels only.
        distill: teach with the unpruned network; None = as the run file says.
        latency: also time the trained network on the device.
        lr: the largest learning rate; None = the recipe's.
        quantise: the precision of integers that the training computes with the steps of; empty = in floats.
    """

    candidate: Candidate
    epochs: float
    part: tuple[float, float] = (0.0, 1.0)
    write_back: bool = False
    distill: bool | None = None
    latency: bool = True
    lr: float | None = None
    quantise: str = ""


@dataclass(frozen=True)
class FineTuned:
    """Answer to ``FineTune``.

    Args:
        base: name of the trained weights, to be used as ``Candidate.base``.
        evaluation: metrics on the search split after training.
    """

    base: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Score:
    """Request: a saliency of every channel. Answer: group name -> shape ``(size,)``, higher = keep.

    Args:
        criterion: a name of ``secateur.pruning.saliency``. ``feature_distance`` answers cosine distances between the
            channels' mean feature maps instead, shape ``(size, size)``.
        base: whose weights are looked at.
        plan: the network is cut to this plan first (channels outside score -inf, distances to them are inf); None =
            the whole network.
        options: further arguments of the criterion (``images``, ``batches`` ...).
    """

    criterion: str
    base: str = DENSE
    plan: PruningPlan | None = None
    options: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskedLoss:
    """Request: mean loss of masked networks that are no candidates: any masks, not tracked. Answer: shape ``(plans,)``.

    Args:
        base: whose weights are masked.
        images: of the search split; None = as many as the run file gives candidates.
    """

    plans: tuple[PruningPlan, ...]
    base: str = DENSE
    images: int | None = None


@dataclass(frozen=True)
class Distort:
    """Request: how much the next layers' outputs change when channels go. Answer: group -> shape ``(batches,)``.

    Batch by batch of training images, the network of ``plan`` runs once as it is; for each group of ``removed[batch]``
    the outputs O of the layers that read the group are compared with the outputs O' they would have without those
    channels (alone, all other groups as they are): mean over images of ``|O - O'|^2 / |O|^2``, the largest over the
    layers. NaN where a group is not asked for in a batch.

    Args:
        plan: channels that are there.
        removed: per batch, group name -> channels of ``plan`` that go.
        base: whose weights are looked at.
        batch_size: training images per batch.
    """

    plan: PruningPlan
    removed: tuple[Mapping[str, tuple[int, ...]], ...]
    base: str = DENSE
    batch_size: int = 64


@dataclass(frozen=True)
class AuxiliaryTraining:
    """Request: train the whole network with something added that learns about its channels.

    Answer: ``AuxiliaryTrained``.

    Args:
        kind: a module of ``secateur.pipeline.training.auxiliary``: what is added (``pruning_net``, ``shared``,
            ``indicators``, ``sparsity`` ...).
        epochs: of the training split.
        base: whose weights training begins with.
        options: further arguments of the kind.
    """

    kind: str
    epochs: float
    base: str = DENSE
    options: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class AuxiliaryTrained:
    """Answer to ``AuxiliaryTraining``.

    Args:
        base: name of the weights, to be used as ``Candidate.base``; has every channel.
        scores: group name -> shape ``(size,)``, what was learned about each channel; empty for some kinds.
        evaluation: the unpruned network with these weights, on the search split.
    """

    base: str
    scores: Mapping[str, FloatArray]
    evaluation: Evaluation


@dataclass(frozen=True)
class Time:
    """Request: time plans on the device, without weights or accuracy. Answer: latency ratios, shape ``(plans,)``."""

    plans: tuple[PruningPlan, ...]


@dataclass(frozen=True)
class Predict:
    """Request: a model of the network's latency on the device, fitted to a few measurements.

    Answer: the arrays of ``secateur.device_profiles.latency_model.LatencyModel`` (over all groups of
    ``Problem.space.full``), or none where no model has proven good enough and plans must be measured.
    """


@dataclass(frozen=True)
class Remaining:
    """Request: what is left of the budget. Answer: ``Left``. It costs nothing and is no part of the journal."""


@dataclass(frozen=True)
class Left:
    """Answer to ``Remaining``, from what the journal says of earlier answers, so that a replay is told the same.

    Args:
        evaluations: candidates that may still be evaluated, without the one that is kept back for the end; inf = no
            limit, as in all others.
        seconds: of answering requests.
        epochs: of training, in passes over the training split.
        work: image-MACs (``Budget``).
        share: the smallest share of a limit that is left, in 0..1; 1 where there is no limit.
        spent: so far, by the same names.
        epoch: what an epoch of training of the unpruned network takes, ``work`` and ``seconds``; 0 = not known.
    """

    evaluations: float = math.inf
    seconds: float = math.inf
    epochs: float = math.inf
    work: float = math.inf
    share: float = 1.0
    spent: Mapping[str, float] = field(default_factory=dict)
    epoch: Mapping[str, float] = field(default_factory=dict)

    def trainable(self, share: float = 1.0) -> float:
        """Epochs that the unpruned network can be trained for with a share of the work and seconds; inf = no limit."""
        lasting = [share * float(getattr(self, name)) / cost for name, cost in self.epoch.items() if cost > 0]
        return min([self.epochs, *lasting])

    def rounds(self, before: Left) -> float:
        """How many rounds like the one since ``before`` fit into what is left; inf where nothing limits them."""
        costs = {name: self.spent[name] - before.spent[name] for name in self.spent}
        return min((getattr(self, name) / cost for name, cost in costs.items() if cost > 0), default=math.inf)


Request = Evaluate | FineTune | Score | MaskedLoss | Distort | AuxiliaryTraining | Time | Predict | Remaining
Answer = tuple[Evaluation, ...] | FineTuned | AuxiliaryTrained | Mapping[str, FloatArray] | FloatArray | Left


class BudgetSpent(Exception):  # noqa: N818 - a signal, like StopIteration
    """Thrown into a strategy, at its ``yield``, when the run's budget allows no further request of that kind.

    A strategy may catch it and return the archive it has; where it passes, everything evaluated so far is the archive.
    Where the run has a target, one evaluation is kept back: after the exception exactly one ``Evaluate`` is answered,
    for its first candidate, and the few ``Score``, ``Time``, ``Predict`` and ``MaskedLoss`` that a plan at the target
    needs. Any other request is answered by the same exception.
    """


@dataclass(frozen=True)
class Entry:
    """One plan of an archive, with its evaluation."""

    candidate: Candidate
    evaluation: Evaluation


Archive = tuple[Entry, ...]
"""What a search returns: the plans worth fine-tuning, in an order of its own."""


@dataclass(frozen=True)
class Goal:
    """When a search may stop. Ratios to the unpruned network; None = no such goal."""

    macs_ratio: float | None = None
    latency_ratio: float | None = None

    def met(self, evaluation: Evaluation, reference: Evaluation) -> bool:
        """Whether every part that is set is reached; False when none is set."""
        checks = []
        if self.macs_ratio is not None:
            checks.append(evaluation["macs"] <= self.macs_ratio * reference["macs"])
        if self.latency_ratio is not None:
            checks.append(evaluation["latency_ratio"] <= self.latency_ratio)
        return bool(checks) and all(checks)


@dataclass(frozen=True)
class Budget:
    """What a search may spend; None = no such limit. It is enforced outside the strategy (``BudgetSpent``).

    A training that would overrun it is shortened to what is left, as long as that is a tenth of what was asked for.

    Args:
        evaluations: candidates evaluated (fine-tuned ones included).
        seconds: spent answering requests.
        epochs: of training, in passes over the training split.
        work: image-MACs: images passed forward times the MACs of the network they pass; three times that in training.
    """

    evaluations: int | None = None
    seconds: float | None = None
    epochs: float | None = None
    work: float | None = None


@dataclass(frozen=True)
class Problem:
    """What a strategy is given.

    Args:
        space: groups and allowed widths.
        reference: evaluation of the unpruned network under the same protocol.
        reward: evaluation -> fitness, higher = better.
        costs: width vectors of shape ``(plans, groups)``, groups as in ``space.names`` -> ``macs``, ``params`` and
            ``activation_bytes`` at batch 1, each of shape ``(plans,)``, without building a network.
        goal: when to stop.
        rng: the only source of randomness.
        budget: what may be spent.
        metric: the accuracy metric of the workload (a fraction, higher = better).
        multiples: what all widths are multiples of in the uniform plans that are measured before the method begins
            (``secateur.pruning.search.beginning``); empty = none are.
        start: the best of those, evaluated already: a good plan to begin with. None = none was measured.
    """

    space: SearchSpace
    reference: Evaluation
    reward: Callable[[Evaluation], float]
    costs: Callable[[IntArray], Mapping[str, FloatArray]]
    goal: Goal
    rng: np.random.Generator
    budget: Budget = Budget()
    metric: str = "top1"
    multiples: tuple[int, ...] = ()
    start: PruningPlan | None = None

    def macs(self, plan: PruningPlan) -> float:
        """MACs of a plan at batch 1."""
        return float(self.costs(self.space.encode(plan)[None])["macs"][0])


Strategy = Generator[Request, Answer, Archive]
