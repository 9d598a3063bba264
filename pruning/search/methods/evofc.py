"""EvoFC: NSGA-II evolves per group how much to prune and by which criterion, on shared weights.

"Evolving filter criteria for randomly initialised network pruning in image classification" (Neurocomputing 594, 2024).
One full-width parent network learns while the search goes on::

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
side by side; p ends at 0.9 (authors: 1, one filter left); scores are averages over 640 images, taken once per weights
(authors: 128, with new random weights each time); the cost is the ratio to the unpruned network, of MACs or, with a
latency target, of predicted latency; the learning-rate schedule counts the initial population too.

A training run from random weights is hours, so the parent network begins with the unpruned weights here, the criteria
look at these, and the winner keeps what it has learned. Half of random genomes miss a target: each one that does is
repaired, all its widths by one factor and the rest by its own criteria, and its genes follow. Genes stay near an even
cut to the target (``spread``): a budget of minutes trains some thirty genomes for a few steps each, too few to find out
which group can be a third as wide as another. Plans at the target count as equally costly. All trainings together take
what the budget allows but for ``FINAL_SHARE`` of it, in which the best plan is trained alone.

The authors' settings, as far as they are known, are ``PAPER``: ``{population: 10, offspring: 10, generations: 20,
epochs: 60, best_epochs: 0, repair: false, spread: 1, window: 0.3, criteria_on: random, start: random,
final: scratch}``.

With minutes of budget it ends below ``uniform`` (docs/reference/methods.md): some thirty short trainings through one
parent network tell genomes apart less well than an even cut does without trying, and leave weights that begin the final
training worse than the unpruned ones (0.5 points in one try).

Not here: bounds of p that change with depth.

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
from secateur.pruning.search.landing import by_one_factor, near_even, per_mean, settle
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
    as_fraction,
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
    remaining,
    score,
)


@dataclass(frozen=True)
class Options:
    """Options of EvoFC.

    Args:
        population: genomes that survive (authors: 10 for ResNet-56 on CIFAR, 40 for ImageNet and Places365).
        offspring: new genomes per generation (authors: as many as ``population``).
        generations: after the initial population, at most; fewer where the budget holds fewer evaluations (authors: 20
            on CIFAR, 30 otherwise).
        epochs: of training in all, shared by all genomes (authors with shared weights: 100 on ImageNet, 300 on
            Places365). None = what the budget allows; 3 without one.
        best_epochs: of training that the best plan gets alone at the end, as far as the budget goes.
        repair: genomes that miss the target's window are brought to the target (ours). Without, plans of the window
            come before smaller misses (Deb's rule).
        spread: how far the widths of genomes may lie from an even cut to the target, in 0..1; 1 = anywhere (authors).
            The even cut is one keep ratio for all groups and its square root for what several layers read. Only where
            genomes are repaired.
        window: how far below the target plans are still wanted, as a fraction of the target, in 0..1; 1 = as far as
            they go (authors, who have no target).
        min_ratio: smallest share p of a group that goes, in 0..1.
        max_ratio: largest share p of a group that goes, in 0..1 (authors: 1; ours 0.9).
        criteria: what the four criteria look at: sensitivities (``snip``) or magnitudes (``weight``) of weights.
        criteria_on: ``inherited`` weights, scored in every generation, or ``random`` ones, scored once (authors).
        images: training images that sensitivities are averaged over (authors: one batch of 128; ours five times that).
        start: the parent network's first weights: ``pretrained``, the unpruned network's, or ``random`` (authors).
        final: weights that the plans found begin their own training with: ``inherit`` those of the parent network, or
            from ``scratch`` (random; authors).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    population: int = 6
    offspring: int = 6
    generations: int = 4
    epochs: float | None = None
    best_epochs: float = 3.0
    repair: bool = True
    spread: float = 0.25
    window: float = 0.01
    min_ratio: float = 0.0
    max_ratio: float = 0.9
    criteria: Literal["snip", "weight"] = "snip"
    criteria_on: Literal["random", "inherited"] = "inherited"
    images: int = 640
    start: Literal["random", "pretrained"] = "pretrained"
    final: Literal["scratch", "inherit"] = "inherit"

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("population", "offspring", "images"), (1.0, math.inf))
        ratios = {"min_ratio": (0.0, self.max_ratio), "max_ratio": (0.0, 1.0)}
        check_ranges(self, **counts, window=(0, 1), **ratios, generations=(0, math.inf), epochs=(1e-6, math.inf))
        check_ranges(self, best_epochs=(0, math.inf), spread=(0, 1))
        choices = {
            "criteria": ("snip", "weight"),
            "criteria_on": ("random", "inherited"),
            "start": ("random", "pretrained"),
            "final": ("scratch", "inherit"),
        }
        wrong = [n for n, known in choices.items() if getattr(self, n) not in known]
        if wrong:
            raise ValueError("; ".join(f"{n} must be one of {choices[n]}, got {getattr(self, n)!r}" for n in wrong))


PAPER = Options(
    population=10,
    offspring=10,
    generations=20,
    epochs=60,
    best_epochs=0,
    repair=False,
    spread=1.0,
    window=0.3,
    criteria_on="random",
    start="random",
    final="scratch",
)
"""The authors' settings; the epochs, of one shared training on CIFAR, and the window are ours."""
EPOCHS = 3.0
"""Of training in all, where nothing limits it."""
FINALISTS = 4
"""Plans of equal cost that are evaluated again with the last weights."""
FINAL_SHARE = 0.35
"""Of the budget, for the training of the best plan alone."""

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
    """One genome trained, and the best plan evaluated with the last weights."""
    del problem
    return Budget(evaluations=2)


def search(problem: Problem, options: Options) -> Strategy:
    """The search; the archive holds the plans within the target that none beats, the knee (highest reward) first.

    Raises:
        SearchError: the target is out of reach, or no plan within it could be trained.
    """
    ids = count()
    limit = yield from _limit(problem)
    if options.repair and math.isfinite(limit.bound):
        problem = near_even(problem, limit, options.spread)
    trained, base = yield from _evolve(problem, options, limit, ids)
    best = _front_within(trained, limit)
    again = [
        replace(one.candidate, id=next(ids), origin="front", parents=(one.candidate.id,), base=base) for one in best
    ]
    evaluations: tuple[Evaluation, ...] = ()
    with suppress(BudgetSpent):
        evaluations = yield from evaluate(again, latency=True, last=True)
    pairs = [(c, e) for c, e in zip(again, evaluations, strict=False) if math.isfinite(_accuracy(problem, e))]
    pairs = pairs or [(one.candidate, one.evaluation) for one in best]
    archive = best_first(problem, *zip(*pairs, strict=True))
    if options.final == "scratch":
        return tuple(Entry(replace(entry.candidate, base=RANDOM), entry.evaluation) for entry in archive)
    return (*(yield from _train(problem, archive[0].candidate, options.best_epochs, next(ids))), *archive)


def _evolve(
    problem: Problem, options: Options, limit: Limit, ids: Iterator[int]
) -> Generator[Request, Answer, tuple[list[Individual], str]]:
    """Everything that was trained, and the parent network's last weights."""
    base, distill = (RANDOM, False) if options.start == "random" else (DENSE, None)
    nsga2, shares = _nsga2(problem, options), (yield from _shares(options))
    trained: list[Individual] = []
    with suppress(BudgetSpent):  # what has been trained so far has a front too
        scores = yield from _scores(options, RANDOM if options.criteria_on == "random" else base)
        for generation in range(1 + options.generations):
            if generation and options.criteria_on == "inherited":
                scores = yield from _scores(options, base)
            population = nsga2.ask()
            if population is None:  # mating finds no genome that is not there yet
                break
            genomes = population.get("X")
            for genome in genomes:
                share = next(shares, None)
                if share is None:
                    return trained, base
                plan, moved = expressed(problem, options, limit, genome, scores)
                candidate = Candidate(next(ids), plan, "offspring" if generation else "init", (), base, moved)
                tuned = yield from fine_tune(  # weight inheritance: cut, train for a share, write back
                    candidate, share[0], part=share[1], write_back=True, distill=distill, latency=False
                )
                trained.append(_individual(problem, options, limit, candidate, tuned.evaluation))
                base = tuned.base if trained[-1].trained else base
            population.set("X", genomes)
            _tell(nsga2, population, trained[-len(population) :])
    return trained, base


def _train(problem: Problem, best: Candidate, epochs: float, id_: int) -> Generator[Request, Answer, tuple[Entry, ...]]:
    """The best plan trained alone, if the budget allows it and its accuracy can be taken."""
    if epochs > 0:
        with suppress(BudgetSpent):
            candidate = replace(best, id=id_, origin="best", parents=(best.id,))
            most = 2 * (yield from remaining()).trainable()  # of the unpruned network; it is shortened to what is left
            tuned = yield from fine_tune(candidate, min(epochs, most))
            if math.isfinite(_accuracy(problem, tuned.evaluation)):
                return (Entry(replace(candidate, base=tuned.base), tuned.evaluation),)
    return ()


def expressed(
    problem: Problem, options: Options, limit: Limit, genome: FloatArray, scores: Scores
) -> tuple[PruningPlan, float]:
    """The plan of a genome, and how much of it the repair moved; the genes p of a repaired genome change in place."""
    plan, space = express(problem.space, genome, scores), problem.space
    if not options.repair or _violation(options, limit, limit.of(space.encode(plan))) == 0:
        return plan, 0.0
    chosen = {name: scores[criterion_index(q)][name] for name, q in zip(space.names, genome[1::2], strict=True)}
    near = space.decode(by_one_factor(space, limit, space.encode(plan)), chosen)
    settled = settle(problem, limit, near, per_mean(chosen))
    genome[::2] = [1 - settled.plan.widths[name] / space.sizes[name] for name in space.names]
    return settled.plan, settled.projected_share


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

    Where the window is empty, those below it; where all were brought to the target, those of least error.

    Raises:
        SearchError: none is within the limit.
    """
    alive = [one for one in trained if one.trained]
    within = [one for one in alive if one.violation == 0] or [one for one in alive if one.cost <= limit.bound]
    if not within:
        if not alive:
            reason = trained[0].evaluation.reason if trained else "the budget allowed no training"
            raise SearchError(f"no candidate could be trained ({len(trained)} tried); the first: {reason or 'NaN'}")
        least = min(one.cost for one in alive)
        raise SearchError(
            f"no candidate of {len(trained)} has a {limit.name} of {limit.bound:g} or less; "
            "the smallest has "
            f"{least:.3f}. Raise the target, raise generations, or raise min_ratio so that more channels go."
        )
    unlike = [*{one.candidate.plan.digest: one for one in within}.values()]
    if all(one.cost == limit.bound for one in unlike):  # repaired; errors are of weights of different age
        return sorted(unlike, key=lambda one: one.error)[:FINALISTS]
    free = non_dominated(np.array([one.objectives for one in unlike]))
    return [one for one, keep in zip(unlike, free, strict=True) if keep]


def _individual(
    problem: Problem, options: Options, limit: Limit, candidate: Candidate, evaluation: Evaluation
) -> Individual:
    cost = limit.of(problem.space.encode(candidate.plan))
    violation = _violation(options, limit, cost)
    if options.repair and violation == 0 and math.isfinite(limit.bound):
        cost = limit.bound  # as near to the target as is wanted: nobody wins by being nearer
    return Individual(candidate, evaluation, 1 - _accuracy(problem, evaluation), cost, violation)


def _violation(options: Options, limit: Limit, cost: float) -> float:
    """How far a cost lies outside the window below the target."""
    least = limit.bound * (1 - options.window) if math.isfinite(limit.bound) else 0.0
    return max(0.0, cost - limit.bound, least - cost)


def _accuracy(problem: Problem, evaluation: Evaluation) -> float:
    """The search's metric as a fraction, NaN where it could not be taken."""
    return as_fraction(problem.metric, evaluation[problem.metric]) if evaluation.status == "ok" else math.nan


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


def _shares(options: Options) -> Generator[Request, Answer, Iterator[tuple[float, tuple[float, float]]]]:
    """Epochs of each training in turn, and its part of the one learning-rate schedule."""
    left, trainings = (yield from remaining()), options.population + options.offspring * options.generations
    if left.evaluations < math.inf:  # two are for the best plan
        trainings = int(max(1, min(trainings, left.evaluations - 1)))
    epochs = options.epochs or min(EPOCHS, left.trainable(1 - FINAL_SHARE if options.best_epochs else 1.0))
    return ((epochs / trainings, (i / trainings, (i + 1) / trainings)) for i in range(trainings))


def _nsga2(problem: Problem, options: Options) -> Any:
    """NSGA-II over genomes in [min_ratio, max_ratio] x [0, 1] per group, as far as a group's widths go; it has a
    generator of its own.
    """
    space, groups = problem.space, len(problem.space.names)
    widest, narrowest = ([1 - space.allowed[n][end] / space.sizes[n] for n in space.names] for end in (-1, 0))
    low = np.maximum(options.min_ratio, widest)
    high = np.maximum(low, np.minimum(options.max_ratio, narrowest))
    objectives = Objectives(
        n_var=2 * groups,
        n_obj=2,
        n_ieq_constr=1,
        xl=np.column_stack([low, np.zeros(groups)]).ravel(),
        xu=np.column_stack([high, np.ones(groups)]).ravel(),
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
