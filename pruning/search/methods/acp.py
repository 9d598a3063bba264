"""ACP: clusters of alike channels suggest the widths, a particle swarm moves them, short trainings judge.

Chang, Lu, Xue, Xu, Wei, "ACP: Automatic Channel Pruning via Clustering and Swarm Intelligence Optimization for CNN"
(Applied Intelligence 2022, arXiv 2101.06407)::

    1. cluster each group's channels by their mean feature maps over 200 images
       suggested width c0 = clusters + noise points, for a radius epsilon
    2. population: particle 0 is c0, particle i lies up to i channels per group away from it
       fitness of a particle: inherit weights, train 3 epochs, look at the accuracy
    3. 8 cycles of particle swarm optimisation (PSO) over the width vectors
    4. the best network's weights begin the final training

The distances are asked for once, so every epsilon is free: without a given one, it is found by bisection so that c0
meets the run's target, in MACs or in measured latency.

Our choices, where the source leaves room or slips (``paper_compat`` has the source's):

- a particle outside the target is projected onto it (the source's fitness ignores cost and may drift to wide networks);
- fitness is the run's reward, not the accuracy alone;
- velocities are updated before positions, for every group (the source's updates the first eight only, so that all
  others keep their first velocity for good), with random factors of their own; the moved groups are distinct and
  include the last;
- moves are rounded, and end at the full width, not one below it;
- of each cluster the medoid stays, then the largest L1 norms decide (the source keeps random filters).

A position counts the allowed widths of a group from 1, so a step is one multiple of the device's channels; where every
width is allowed, it is the width. Particles that meet the same plan share its evaluation.

Least budget: 2 evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar, Literal

import numpy as np

from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.methods.clustering import (
    Clusterer,
    Tree,
    by_silhouette,
    calibrate,
    cluster,
    num_kept,
    preferring,
    representatives,
)
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    Answer,
    Budget,
    Candidate,
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
    meet,
    project,
    score,
)

CHI = 0.729
"""Constriction of the whole velocity, in addition to the inertia (2.6)."""
C1 = C2 = 2.0
COMPAT_MOVES = 8
"""Groups a particle moves in the source, drawn with replacement."""


@dataclass(frozen=True)
class Options:
    """Options of ACP. Defaults are the authors' unless said otherwise.

    Args:
        epsilon: radius of the clusters, in cosine distance 0..2; larger = narrower (authors: 0.005-0.3, by network).
            None = the smallest at which the suggested widths meet the run's target (ours). With ``paper_compat`` and an
            epsilon the target is not looked at.
        clusterer: ``dbscan`` (authors), ``agglomerative`` (average linkage) or ``dbs`` (databionic swarm). The last two
            need neither epsilon nor target: each group then has the clusters with the best silhouette.
        min_samples: of DBSCAN; fewer channels that are alike count as noise.
        images: training images the feature maps are averaged over (authors: test images).
        concat: parts the images are divided into; the maps are averaged within each and put side by side.
        after_activation: compare what the next layers read, instead of the layer's output before batch norm.
        population: N, particles.
        cycles: of the swarm.
        v_max: largest velocity, in steps of the allowed widths.
        move_share: fraction in 0..1 of the groups that a particle moves in a cycle (authors: 8 draws; VGG has 13).
        fitness_epochs: of training before a particle is judged; 0 = evaluate without training.
        inherit: which channels stay: ``medoid`` (ours), ``l1``, or ``random`` (authors).
        start: ``pretrained`` weights are inherited, or each particle begins with ``random`` ones.
        paper_compat: the source's fitness, swarm and bounds instead of ours (see the module).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epsilon: float | None = None
    clusterer: Clusterer = "dbscan"
    min_samples: int = 5
    images: int = 200
    concat: int = 1
    after_activation: bool = False
    population: int = 10
    cycles: int = 8
    v_max: float = 2.0
    move_share: float = 0.6
    fitness_epochs: float = 3
    inherit: Literal["medoid", "l1", "random"] = "medoid"
    start: Literal["pretrained", "random"] = "pretrained"
    paper_compat: bool = False

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("min_samples", "images", "concat", "population"), (1.0, math.inf))
        free = dict.fromkeys(("cycles", "v_max", "fitness_epochs"), (0.0, math.inf))
        check_ranges(self, **counts, **free, epsilon=(0, 2), move_share=(0, 1))
        if self.start == "random" and self.fitness_epochs == 0:
            raise ValueError("start: random needs fitness_epochs > 0; untrained networks cannot be told apart")


def least(problem: Problem, options: Options) -> Budget:
    """A candidate to learn from, and the last one."""
    return Budget(evaluations=2)


def search(problem: Problem, options: Options) -> Strategy:
    """Cluster, calibrate, swarm; the archive holds every particle that was evaluated, highest reward first.

    Raises:
        SearchError: the target is out of reach, or neither ``epsilon`` nor a target is given, or nothing could be
            evaluated.
    """
    suggestion = yield from suggest(problem, options)
    swarm = Swarm(problem, options, suggestion)
    yield from swarm.populate()
    for t in range(options.cycles):
        w = 0.4 + 0.2 * (options.cycles - t) / options.cycles  # inertia: 0.600, 0.575 ... 0.425 in eight cycles
        for particle in swarm.particles:
            yield from swarm.move(particle, w)
    return best_first(problem, swarm.candidates, swarm.evaluations)


@dataclass(frozen=True, eq=False)
class Suggestion:
    """What the clusters say.

    Args:
        widths: allowed width per group, shape ``(groups,)``.
        limit: the target, with the bound at which it was measured to be met; None = none is looked at.
        medoids: group -> shape ``(size,)``, saliency: one channel of each cluster before all others.
        norms: group -> shape ``(size,)``, L1 norms.
    """

    widths: list[int]
    limit: Limit | None
    medoids: Mapping[str, FloatArray]
    norms: Mapping[str, FloatArray]


def suggest(problem: Problem, options: Options) -> Generator[Request, Answer, Suggestion]:
    """Step 1 (2.3): the distances, and the widths at the given radius or at the one that meets the target.

    Raises:
        SearchError: there is neither a radius nor a target.
    """
    space, given, has_target = problem.space, options.epsilon, problem.goal != Goal()
    if given is None and not has_target and options.clusterer == "dbscan":
        raise SearchError("acp needs epsilon (for example 0.03) or a search.target; neither is set")
    looked_at = has_target and not (options.paper_compat and given is not None)
    limit = (yield from limit_of(problem)) if looked_at else None
    distance = yield from score("feature_distance", DENSE, None, **feature_options(options))
    norms = yield from score("l1")
    clusters = {n: cluster(options.clusterer, distance[n], problem.rng, options.min_samples) for n in space.names}
    trees = {name: tree for name, tree in clusters.items() if isinstance(tree, Tree)}
    labels: dict[str, IntArray] = {}

    def widths(epsilon: float) -> list[int]:
        labels.update({name: clusters[name].at(epsilon) for name in space.names})
        return suggested(space, labels)

    def cut(within: Limit) -> PruningPlan:
        nonlocal limit
        limit = within
        if given is None:
            return space.decode(widths(calibrate(clusters, within, widths)), norms)
        return space.decode(project(problem, within, shares(norms), widths(given)), norms)

    if limit is not None:
        start = space.encode((yield from meet(problem, limit, cut))).tolist()
    elif given is not None:
        start = widths(given)
    else:
        labels.update({name: by_silhouette(tree, distance[name]) for name, tree in trees.items()})
        start = suggested(space, labels)
    medoids = {n: preferring(representatives(labels[n], distance[n], norms[n]), norms[n]) for n in space.names}
    return Suggestion(start, limit, medoids, norms)


def feature_options(options: Options) -> dict[str, float]:
    """Arguments of ``feature_distance``: the images, and what is not as usual."""
    asked: dict[str, float] = {"images": options.images}
    if options.concat != 1:
        asked["concat"] = options.concat
    if options.after_activation:
        asked["after_activation"] = True
    return asked


def suggested(space: SearchSpace, labels: Mapping[str, IntArray]) -> list[int]:
    """Clusters plus noise points of each group, at the nearest allowed width."""
    return [space.snap(name, num_kept(labels[name])) for name in space.names]


def shares(norms: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Each channel's share of its group's norm, so that groups can be compared."""
    return {name: values / max(float(values.sum()), 1e-300) for name, values in norms.items()}


@dataclass
class Particle:
    """A point of the swarm.

    Args:
        position: shape ``(groups,)``, which of the allowed widths, from 1.
        velocity: shape ``(groups,)``, in steps.
        id: of the candidate its position was evaluated as.
        best: pbest, its best position so far; ``best_fitness`` and ``best_id`` belong to it.
    """

    position: IntArray
    velocity: FloatArray
    id: int
    best: IntArray
    best_fitness: float
    best_id: int


class Swarm:
    """Steps 2 and 3 (2.4 and 2.6), and everything that was evaluated on the way."""

    def __init__(self, problem: Problem, options: Options, suggestion: Suggestion) -> None:
        self.problem, self.options, self.suggestion = problem, options, suggestion
        self.worth = shares(suggestion.norms)
        self.steps = np.array([len(problem.space.allowed[name]) for name in problem.space.names])
        self.particles: list[Particle] = []
        self.candidates: list[Candidate] = []
        self.evaluations: list[Evaluation] = []
        self._known: dict[str, tuple[int, float]] = {}
        self._ids = count()

    @property
    def best(self) -> Particle:
        """The particle whose pbest is gbest (ties: the first)."""
        return max(self.particles, key=lambda particle: particle.best_fitness)

    def populate(self) -> Generator[Request, Answer, None]:
        """2.4: particle 0 is the clustering's result, those after it lie farther and farther away."""
        rng, v_max = self.problem.rng, self.options.v_max
        c0 = self.position(self.suggestion.widths)
        for i in range(self.options.population):
            s = rng.integers(-1, 2, len(self.steps))
            position = self.within(np.clip(c0 + i * s, 1, self.steps))
            velocity = rng.uniform(-v_max, v_max, len(self.steps))
            id_, fitness = yield from self.judge(position, "init" if i else "cluster", ())
            self.particles.append(Particle(position, velocity, id_, position, fitness, id_))

    def move(self, particle: Particle, w: float) -> Generator[Request, Answer, None]:
        """2.6: one particle moves and is judged; pbest and gbest change where it is strictly better."""
        best = self.best
        move = compat_move if self.options.paper_compat else ordered_move
        moved, particle.velocity = move(particle, best.best, self.steps, w, self.options, self.problem.rng)
        parents = tuple(dict.fromkeys((particle.id, particle.best_id, best.best_id)))
        particle.position = self.within(moved)
        particle.id, fitness = yield from self.judge(particle.position, "pso", parents)
        if fitness > particle.best_fitness:
            particle.best, particle.best_fitness, particle.best_id = particle.position, fitness, particle.id

    def judge(
        self, position: IntArray, origin: str, parents: tuple[int, ...]
    ) -> Generator[Request, Answer, tuple[int, float]]:
        """2.5: id and fitness of a position; a plan met before is not trained again."""
        plan = self.problem.space.decode(self.widths(position), self._saliency())
        if plan.digest not in self._known:
            base = RANDOM if self.options.start == "random" else DENSE
            candidate = Candidate(next(self._ids), plan, origin, parents, base)
            if self.options.fitness_epochs > 0:
                tuned = yield from fine_tune(candidate, self.options.fitness_epochs)
                evaluation, base = tuned.evaluation, tuned.base
            else:
                (evaluation,) = yield from evaluate([candidate], latency=True)
            self._known[plan.digest] = candidate.id, self._note(replace(candidate, base=base), evaluation)
        return self._known[plan.digest]

    def _saliency(self) -> Mapping[str, FloatArray]:
        """2.5, which channels stay: group -> shape ``(size,)``; drawn anew for each particle where it is random."""
        if self.options.inherit == "random":
            return {name: self.problem.rng.random(size) for name, size in self.problem.space.sizes.items()}
        return self.suggestion.medoids if self.options.inherit == "medoid" else self.suggestion.norms

    def _note(self, candidate: Candidate, evaluation: Evaluation) -> float:
        """Keep an evaluation; its fitness, -inf where it is not known, so that such particles are never the best."""
        fitness = -math.inf
        if evaluation.status == "ok":
            reward, accuracy = self.problem.reward(evaluation), evaluation[self.problem.metric]
            if math.isnan(reward) or math.isnan(accuracy):
                evaluation = Evaluation("failed", f"its {self.problem.metric} or reward is NaN", evaluation.metrics)
            else:
                fitness = accuracy if self.options.paper_compat else reward
        self.candidates.append(candidate)
        self.evaluations.append(evaluation)
        return fitness

    def widths(self, position: IntArray) -> list[int]:
        """Allowed width per group."""
        space = self.problem.space
        return [space.allowed[name][int(r) - 1] for name, r in zip(space.names, position, strict=True)]

    def position(self, widths: Sequence[int]) -> IntArray:
        """The inverse of ``widths``."""
        space = self.problem.space
        ranks = [space.allowed[name].index(w) + 1 for name, w in zip(space.names, widths, strict=True)]
        return np.array(ranks, dtype=np.int64)

    def within(self, position: IntArray) -> IntArray:
        """The position, projected onto the target where it lies outside."""
        limit = self.suggestion.limit
        if limit is None or self.options.paper_compat:
            return position
        return self.position(project(self.problem, limit, self.worth, self.widths(position)))


Moved = tuple[IntArray, FloatArray]
"""A new position and velocity, both of shape ``(groups,)``."""


def ordered_move(
    p: Particle, gbest: IntArray, steps: IntArray, w: float, options: Options, rng: np.random.Generator
) -> Moved:
    """2.6 as chosen: the velocity first, in every group, then the position of some groups."""
    L, c = len(steps), p.position
    D = rng.choice(L, max(1, math.floor(options.move_share * L + 0.5)), replace=False)
    R1, R2 = rng.random((2, L))
    v = CHI * (w * p.velocity + C1 * R1 * (p.best - c) + C2 * R2 * (gbest - c))
    v = np.clip(v, -options.v_max, options.v_max)
    moved = c.copy()
    moved[D] = np.clip(np.floor(c[D] + 2 * v[D] + 0.5).astype(np.int64), 1, steps[D])
    return moved, v


def compat_move(
    p: Particle, gbest: IntArray, steps: IntArray, w: float, options: Options, rng: np.random.Generator
) -> Moved:
    """2.6 as in the source's code: position first, one scalar R, velocities of the first eight groups only."""
    L, c = len(steps), p.position
    D = rng.integers(0, max(1, L - 1), COMPAT_MOVES)  # never draws the last group
    R = rng.random()
    moved = c.copy()
    for l in D:  # noqa: E741 - the layer; one drawn twice moves twice
        moved[l] = int(moved[l] + 2 * p.velocity[l])
        if moved[l] < 1:
            moved[l] = 1
        elif moved[l] > steps[l]:
            moved[l] = max(1, steps[l] - 1)
    first = slice(0, COMPAT_MOVES)  # the index slip
    v = p.velocity.copy()
    v[first] = CHI * (w * v + C1 * R * (p.best - c) + C2 * R * (gbest - c))[first]
    return moved, np.clip(v, -options.v_max, options.v_max)
