"""EvoFC: NSGA-II evolves per group how much to prune and by which criterion, on shared weights.

"Evolving filter criteria for randomly initialised network pruning in image classification" (Neurocomputing 594, 2024).
No trained network is needed: one full-width parent network learns while the search goes on::

    W <- random weights
    score every channel by four criteria
    repeat: ask NSGA-II for genomes; for each one
        cut W to the genome's plan, train it for its share of one training run, write it back into W
        tell NSGA-II its error and its cost
    return the plans no other plan beats in both

A genome has two real genes per group (p, q): the share p that goes, and the criterion ``min(3, floor(4 q))`` of 0 the
sum, 1 the relative norm, 2 the largest share and 3 the geometric median of the weights' sensitivities ``|dL/dmask|``
(``secateur.pruning.saliency``: ``snip_l1``, ``snip_l2``, ``snip_max``, ``snip_fpgm``).

As in the authors' code: binary tournament by dominance and crowding, two-point crossover, polynomial mutation (eta
3), no duplicates. Our choices: a group, not a convolution, has genes, so that none is idle; the genes of a group lie
side by side; p ends at 0.9 (authors: 1, one filter left); scores are averages over 640 images, taken once (authors:
128, with new random weights each time); the cost is the ratio to the unpruned network, of MACs or, with a latency
target, of predicted latency; plans over the target, or far below it, give way to plans of the window between (Deb's
rule: the smaller violation wins), without which most of the search goes into plans nobody asked for; the
learning-rate schedule counts the initial population too; the front is taken over everything trained (authors: the
last population) and evaluated again with the last weights, and with latency. Not here: bounds of p that change with
depth.

Least budget: 2 evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar, Literal

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.problem import Problem as Objectives
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.pntx import TwoPointCrossover
from pymoo.operators.mutation.pm import PM
from pymoo.problems.static import StaticProblem

from secateur.pruning.plan import BoolArray, PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    Answer,
    Budget,
    BudgetSpent,
    Candidate,
    Entry,
    Evaluation,
    FloatArray,
    Goal,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import (
    Limit,
    SearchError,
    best_first,
    check_ranges,
    evaluate,
    fine_tune,
    limit_of,
    macs_ratios,
    score,
)


@dataclass(frozen=True)
class Options:
    """Options of EvoFC.

    Args:
        population: genomes that survive (authors: 10 for ResNet-56 on CIFAR, 40 for ImageNet and Places365).
        offspring: new genomes per generation (authors: as many as ``population``).
        generations: after the initial population (authors: 20 on CIFAR, 30 otherwise).
        epochs: of training in all, shared by all genomes (authors with shared weights: 100 on ImageNet, 300 on
            Places365; ours 60).
        window: how far below the target plans are still wanted, as a fraction of the target, in 0..1; 1 = as far as
            they go (authors, who have no target).
        min_ratio: smallest share p of a group that goes, in 0..1.
        max_ratio: largest share p of a group that goes, in 0..1 (authors: 1; ours 0.9).
        criteria: what the four criteria look at: sensitivities (``snip``) or magnitudes (``weight``) of weights.
        criteria_on: ``random`` weights, scored once (authors), or ``inherited`` ones, scored in every generation.
        images: training images that sensitivities are averaged over (authors: one batch of 128; ours five times that).
        start: the parent network's first weights: ``random`` (authors), or ``pretrained``, the unpruned network's.
        final: weights that the plans found begin their own training with: from ``scratch`` (random), or ``inherit``
            those of the parent network.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    population: int = 10
    offspring: int = 10
    generations: int = 20
    epochs: float = 60
    window: float = 0.3
    min_ratio: float = 0.0
    max_ratio: float = 0.9
    criteria: Literal["snip", "weight"] = "snip"
    criteria_on: Literal["random", "inherited"] = "random"
    images: int = 640
    start: Literal["random", "pretrained"] = "random"
    final: Literal["scratch", "inherit"] = "scratch"

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("population", "offspring", "images"), (1.0, math.inf))
        ratios = {"min_ratio": (0.0, self.max_ratio), "max_ratio": (0.0, 1.0)}
        check_ranges(self, **counts, window=(0, 1), **ratios, generations=(0, math.inf), epochs=(1e-6, math.inf))
        choices = {
            "criteria": ("snip", "weight"),
            "criteria_on": ("random", "inherited"),
            "start": ("random", "pretrained"),
            "final": ("scratch", "inherit"),
        }
        wrong = [n for n, known in choices.items() if getattr(self, n) not in known]
        if wrong:
            raise ValueError("; ".join(f"{n} must be one of {choices[n]}, got {getattr(self, n)!r}" for n in wrong))


FOUR = ("l1", "l2", "max", "fpgm")
"""The criteria, by their index in a genome."""

Scores = tuple[Mapping[str, FloatArray], ...]
"""Per criterion: group name -> shape ``(size,)``."""


FAILED = 1e6
"""Violation told for what could not be trained: more than any plan's, so that it loses to every one (Deb's rule)."""


@dataclass(frozen=True, eq=False)
class Individual:
    """A genome's plan, after its training.

    Args:
        candidate: the plan.
        evaluation: with the weights it was trained to.
        error: 1 - accuracy; NaN where it could not be trained.
        cost: ratio to the unpruned network.
        violation: how far the cost lies outside the window below the target, at least 0.
    """

    candidate: Candidate
    evaluation: Evaluation
    error: float
    cost: float
    violation: float

    @property
    def trained(self) -> bool:
        return math.isfinite(self.error)

    @property
    def objectives(self) -> tuple[float, float]:
        """What is minimised (a failure is kept out by its violation; its error is a number all the same)."""
        return (self.error if self.trained else 1.0), self.cost


def least(problem: Problem, options: Options) -> Budget:
    """A candidate to learn from, and the last one."""
    return Budget(evaluations=2)


def search(problem: Problem, options: Options) -> Strategy:
    """The search; the archive holds the plans within the target that none beats, the knee (highest reward) first.

    Raises:
        SearchError: the target is out of reach, or no plan within it could be trained.
    """
    limit, ids = (yield from _limit(problem)), count()
    nsga2, shares = _nsga2(problem, options), _shares(options)
    base, distill = (RANDOM, False) if options.start == "random" else (DENSE, None)
    scores = yield from _scores(options, RANDOM if options.criteria_on == "random" else base)
    trained: list[Individual] = []
    with suppress(BudgetSpent):  # what has been trained so far has a front too
        for generation in range(1 + options.generations):
            if generation and options.criteria_on == "inherited":
                scores = yield from _scores(options, base)
            population = nsga2.ask()
            if population is None:  # mating finds no genome that is not there yet
                break
            for genome in population.get("X"):
                plan = express(problem.space, genome, scores)
                candidate = Candidate(next(ids), plan, "offspring" if generation else "init", (), base)
                epochs, part = next(shares)
                tuned = yield from fine_tune(  # weight inheritance: cut, train for a share, write back
                    candidate, epochs, part=part, write_back=True, distill=distill, latency=False
                )
                trained.append(_individual(problem, options, limit, candidate, tuned.evaluation))
                base = tuned.base if trained[-1].trained else base
            _tell(nsga2, population, trained[-len(population) :])
    best = _front_within(trained, limit)
    again = [Candidate(next(ids), one.candidate.plan, "front", (one.candidate.id,), base) for one in best]
    evaluations: tuple[Evaluation, ...] = ()
    with suppress(BudgetSpent):
        evaluations = yield from evaluate(again, latency=True)
    pairs = [(c, e) for c, e in zip(again, evaluations, strict=False) if math.isfinite(_accuracy(problem, e))]
    pairs = pairs or [(one.candidate, one.evaluation) for one in best]
    archive = best_first(problem, *zip(*pairs, strict=True))
    start = RANDOM if options.final == "scratch" else base
    return tuple(Entry(replace(entry.candidate, base=start), entry.evaluation) for entry in archive)


def express(space: SearchSpace, genome: FloatArray, scores: Scores) -> PruningPlan:
    """The plan of a genome, shape ``(2 groups,)``: p and q of the first group, of the second ...

    Each group keeps the channels that rank first by its own criterion.
    """
    genes = dict(zip(space.names, genome.reshape(-1, 2), strict=True))
    widths = [space.snap(name, kept_width(space.sizes[name], p)) for name, (p, _) in genes.items()]
    return space.decode(widths, {name: scores[criterion_index(q)][name] for name, (_, q) in genes.items()})


def kept_width(size: int, p: float) -> int:
    """``max(1, ceil(C (1 - p)))`` channels stay of C."""
    return max(1, math.ceil(size * (1 - p) - 1e-9))


def criterion_index(q: float) -> int:
    """q in 0..1 -> 0..3, in four equal parts (the source leaves their bounds without a criterion)."""
    return min(3, math.floor(4 * q))


def non_dominated(points: FloatArray) -> BoolArray:
    """Which rows of shape ``(n, objectives)``, all minimised, no other row beats: shape ``(n,)``."""
    no_worse = (points[:, None] <= points[None]).all(axis=2)
    better = (points[:, None] < points[None]).any(axis=2)
    return np.logical_not((no_worse & better).any(axis=0))


def _front_within(trained: Sequence[Individual], limit: Limit) -> list[Individual]:
    """The non-dominated individuals of the window, each plan once (its last training), in the order they came.

    Where the window is empty, those below it.

    Raises:
        SearchError: none is within the limit.
    """
    alive = [one for one in trained if one.trained]
    within = [one for one in alive if one.violation == 0] or [one for one in alive if one.cost <= limit.bound]
    if not within:
        if not alive:
            reason = trained[0].evaluation.reason if trained else "the budget allowed no training"
            raise SearchError(f"none of {len(trained)} candidates could be trained; the first: {reason or 'NaN'}")
        least = min(one.cost for one in alive)
        raise SearchError(
            f"none of {len(trained)} candidates has a {limit.name} of {limit.bound:g} or less; the smallest has "
            f"{least:.3f}. Raise the target, raise generations, or raise min_ratio so that more channels go."
        )
    unlike = [*{one.candidate.plan.digest: one for one in within}.values()]
    free = non_dominated(np.array([one.objectives for one in unlike]))
    return [one for one, keep in zip(unlike, free, strict=True) if keep]


def _individual(
    problem: Problem, options: Options, limit: Limit, candidate: Candidate, evaluation: Evaluation
) -> Individual:
    cost = limit.of(problem.space.encode(candidate.plan))
    least = limit.bound * (1 - options.window) if math.isfinite(limit.bound) else 0.0
    violation = max(0.0, cost - limit.bound, least - cost)
    return Individual(candidate, evaluation, 1 - _accuracy(problem, evaluation), cost, violation)


def _accuracy(problem: Problem, evaluation: Evaluation) -> float:
    """The workload's accuracy, NaN where it could not be taken."""
    return evaluation[problem.metric] if evaluation.status == "ok" else math.nan


def _limit(problem: Problem) -> Generator[Request, Answer, Limit]:
    """The target; without one, MACs without a bound."""
    if problem.goal == Goal():
        return Limit("macs_ratio", macs_ratios(problem), math.inf)
    return (yield from limit_of(problem))


def _scores(options: Options, base: str) -> Generator[Request, Answer, Scores]:
    """The four criteria, each asked for once."""
    found = []
    for name in FOUR:
        found.append((yield from score(f"{options.criteria}_{name}", base, images=options.images)))
    return tuple(found)


def _shares(options: Options) -> Iterator[tuple[float, tuple[float, float]]]:
    """Epochs of each training in turn, and its part of the one learning-rate schedule."""
    trainings = options.population + options.offspring * options.generations
    for i in range(trainings):
        yield options.epochs / trainings, (i / trainings, (i + 1) / trainings)


def _nsga2(problem: Problem, options: Options) -> Any:
    """NSGA-II over genomes in [min_ratio, max_ratio] x [0, 1] per group; it has a generator of its own."""
    groups = len(problem.space.names)
    objectives = Objectives(
        n_var=2 * groups,
        n_obj=2,
        n_ieq_constr=1,
        xl=np.tile([options.min_ratio, 0.0], groups),
        xu=np.tile([options.max_ratio, 1.0], groups),
    )
    nsga2 = NSGA2(
        pop_size=options.population,
        n_offsprings=options.offspring,
        crossover=TwoPointCrossover(),
        mutation=PM(eta=3),
        eliminate_duplicates=True,
    )
    seed = int(problem.rng.integers(2**31))
    return nsga2.setup(objectives, termination=NoTermination(), seed=seed, verbose=False)


def _tell(nsga2: Any, population: Any, individuals: Sequence[Individual]) -> None:
    objectives = np.array([one.objectives for one in individuals])
    violations = np.array([[one.violation if one.trained else FAILED] for one in individuals])
    Evaluator().eval(StaticProblem(nsga2.problem, F=objectives, G=violations), population)
    nsga2.tell(infills=population)
