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

- every particle is brought onto the target, from above or from below, its widths by one factor and the rest by norms
  (the source's fitness ignores cost and may drift to wide networks); so all of them cost the same, and the swarm
  compares nothing but how widths are spread;
- two particles begin elsewhere, at equal keep ratios in all groups and where Taylor's criterion alone would cut; the
  population spreads around the best of these three starts;
- 90 trainings of 3 epochs are days on a processor. Particles are scored as cut, which takes seconds, and half of the
  budget is left to training the best one, whose weights begin the final training. Particles are trained where the
  budget holds an epoch for all of them, and where networks as cut have lost so much that scores tell nothing (as those
  without batch norm may): then for as long as it holds ``TRAININGS`` of them;
- which channels stay is decided once, on these three starts: by the rule that loses least of medoids of the clusters,
  L1 norms and Taylor's criterion (the source keeps random filters);
- fitness is the run's reward, not the accuracy alone;
- velocities are updated before positions, for every group (the source's updates the first eight only, so that all
  others keep their first velocity for good), with random factors of their own; the moved groups are distinct and
  include the last;
- moves are rounded, and end at the full width, not one below it.

A position counts the allowed widths of a group from 1, so a step is one multiple of the device's channels; where every
width is allowed, it is the width. Particles that meet the same plan share its evaluation.

Least budget: 1 evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, product
from typing import ClassVar, Literal

import numpy as np

from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.landing import by_one_factor, settle
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
    BudgetSpent,
    Candidate,
    Evaluation,
    FloatArray,
    Goal,
    Left,
    Problem,
    Request,
    Strategy,
    as_fraction,
    merit_of,
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
    remaining,
    score,
)

CHI = 0.729
"""Constriction of the whole velocity, in addition to the inertia (2.6)."""
C1 = C2 = 2.0
COMPAT_MOVES = 8
"""Groups a particle moves in the source, drawn with replacement."""
PAPER_EPOCHS = 3.0
"""Of training before a particle is judged, in the source."""
RULES = ("taylor", "medoid", "l1")
"""Of inheritance, that are tried."""
SWARM_SHARE = 0.5
"""Of the budget, for judging particles without training; the rest trains the best one."""
TELLING = 0.05
"""Of the unpruned network's score: where no start as cut has so much, scores without training tell nothing."""
TAYLOR_IMAGES = 640
"""Training images that Taylor's criterion is averaged over."""
TRAININGS = 20
"""Particles that the budget is to hold where they have to be trained: 4 of them, for 4 cycles."""
MOST_EPOCHS = 1.0
"""Of training before a particle is judged, unless the run file says otherwise."""


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
        population: N, particles; fewer where the budget does not hold them.
        cycles: of the swarm, at most; fewer where the budget does not hold them.
        v_max: largest velocity, in steps of the allowed widths.
        move_share: fraction in 0..1 of the groups that a particle moves in a cycle (authors: 8 draws; VGG has 13).
        fitness_epochs: of training before a particle is judged (authors: 3); 0 = none; None = what the
            budget asks for (see the module).
        best_epochs: of training that the best particle gets at the end, as far as the budget goes (authors: the 3 of
            its fitness).
        inherit: which channels stay: ``medoid`` of the clusters and then the largest norms, the largest ``l1`` norms,
            ``taylor`` (what the loss needs), ``random`` (authors), or ``auto``, the one of the first three that loses
            least.
        start: ``pretrained`` weights are inherited, or each particle begins with ``random`` ones.
        paper_compat: the source's fitness, swarm, bounds and inheritance instead of ours (see the module).
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
    fitness_epochs: float | None = None
    best_epochs: float = 3.0
    inherit: Literal["auto", "medoid", "l1", "taylor", "random"] = "auto"
    start: Literal["pretrained", "random"] = "pretrained"
    paper_compat: bool = False

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("min_samples", "images", "concat", "population"), (1.0, math.inf))
        free = dict.fromkeys(("cycles", "v_max", "fitness_epochs", "best_epochs"), (0.0, math.inf))
        check_ranges(self, **counts, **free, epsilon=(0, 2), move_share=(0, 1))
        if self.start == "random" and self.epochs == 0:
            raise ValueError("start: random needs fitness_epochs > 0; untrained networks cannot be told apart")

    @property
    def epochs(self) -> float | None:
        """Epochs of a particle's fitness; None = to be found out."""
        if self.fitness_epochs is None and (self.paper_compat or self.start == "random"):
            return PAPER_EPOCHS
        return self.fitness_epochs

    @property
    def rules(self) -> tuple[str, ...]:
        """Rules of inheritance to choose from."""
        if self.inherit != "auto":
            return (self.inherit,)
        return ("random",) if self.paper_compat else RULES


def least(problem: Problem, options: Options) -> Budget:
    """One particle: what the clusters suggest, judged."""
    del problem
    return Budget(evaluations=1, epochs=options.epochs or None)


def search(problem: Problem, options: Options) -> Strategy:
    """Cluster, calibrate, swarm; the archive holds every particle that was evaluated, highest reward first.

    Raises:
        SearchError: the target is out of reach, or neither ``epsilon`` nor a target is given, or nothing could be
            evaluated.
    """
    suggestion = yield from suggest(problem, options)
    swarm = Swarm(problem, options, suggestion)
    with suppress(BudgetSpent):  # what was judged until then is an archive too
        yield from swarm.populate()
        for t in range(swarm.cycles):
            w = 0.4 + 0.2 * (swarm.cycles - t) / swarm.cycles  # inertia: 0.600, 0.575 ... 0.425 in eight cycles
            for particle in swarm.particles:
                yield from swarm.move(particle, w)
        yield from swarm.train_best()
    return best_first(problem, swarm.candidates, swarm.evaluations)


@dataclass(frozen=True, eq=False)
class Suggestion:
    """What the clusters say.

    Args:
        start: allowed width per group, and how much of that is the projection's.
        limit: the target, with the bound at which it was measured to be met; None = none is looked at.
        saliencies: rule of inheritance -> group -> shape ``(size,)``, higher = keep.
        worth: the same, comparable across groups: by what positions are brought onto the target.
    """

    start: Position
    limit: Limit | None
    saliencies: Mapping[str, Mapping[str, FloatArray]]
    worth: Mapping[str, FloatArray]


@dataclass(frozen=True, eq=False)
class Position:
    """Where a particle is.

    Args:
        widths: allowed width per group.
        share: ``Candidate.projected_share``.
    """

    widths: tuple[int, ...]
    share: float = 0.0


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
    taylor = (yield from score("taylor", images=TAYLOR_IMAGES)) if "taylor" in options.rules else norms
    clusters = {n: cluster(options.clusterer, distance[n], problem.rng, options.min_samples) for n in space.names}
    trees = {name: tree for name, tree in clusters.items() if isinstance(tree, Tree)}
    labels: dict[str, IntArray] = {}

    def widths(epsilon: float) -> list[int]:
        labels.update({name: clusters[name].at(epsilon) for name in space.names})
        return suggested(space, labels)

    worth, found = shares(norms), Position(())

    def cut(within: Limit) -> PruningPlan:
        nonlocal limit, found
        limit = within
        plan = space.decode(widths(calibrate(clusters, within, widths) if given is None else given), norms)
        found = Position(tuple(space.encode(plan).tolist()))
        if not options.paper_compat:
            settled = settle(problem, within, plan, worth)
            plan, found = settled.plan, Position(tuple(space.encode(settled.plan).tolist()), settled.projected_share)
        return plan

    if limit is not None:
        yield from meet(problem, limit, cut)
    elif given is not None:
        found = Position(tuple(widths(given)))
    else:
        labels.update({name: by_silhouette(tree, distance[name]) for name, tree in trees.items()})
        found = Position(tuple(suggested(space, labels)))
    medoids = {n: preferring(representatives(labels[n], distance[n], norms[n]), norms[n]) for n in space.names}
    return Suggestion(found, limit, {"medoid": medoids, "l1": norms, "taylor": taylor}, worth)


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
    """Steps 2 and 3 (2.4 and 2.6), and everything that was evaluated on the way.

    Attributes:
        rule: by which channels stay.
        epochs: of training before a particle is judged.
        size, cycles: of the swarm, as the budget has it.
        particles: so far.
        candidates, evaluations: what was judged.
    """

    def __init__(self, problem: Problem, options: Options, suggestion: Suggestion) -> None:
        self.problem, self.options, self.suggestion = problem, options, suggestion
        self.rule, self.epochs = options.rules[0], options.epochs or 0.0
        self.size, self.cycles = options.population, options.cycles
        self.steps = np.array([len(problem.space.allowed[name]) for name in problem.space.names])
        self.particles: list[Particle] = []
        self.candidates: list[Candidate] = []
        self.evaluations: list[Evaluation] = []
        self._known: dict[tuple[str, float], tuple[int, float]] = {}
        self._ids = count()

    @property
    def best(self) -> Particle:
        """The particle whose pbest is gbest (ties: the first)."""
        return max(self.particles, key=lambda particle: particle.best_fitness)

    def populate(self) -> Generator[Request, Answer, None]:
        """2.4: particle 0 is the clustering's result, those after it lie farther and farther away.

        Ours: two more known starts come next, and the others lie around the best of the three. Before, the rule of
        inheritance is chosen, whether particles are trained, and how many of them the budget holds.
        """
        starts = list(self._starts())
        if self.options.paper_compat:
            yield from self._join("cluster", starts[0][1])
        else:
            yield from self._begin(starts)
        centre = self.best.best
        for i in range(1, self.size - len(self.particles) + 1):
            s = self.problem.rng.integers(-1, 2, len(self.steps))
            yield from self._join("init", self.within(np.clip(centre + i * s, 1, self.steps)))

    def _starts(self) -> Iterator[tuple[str, Position]]:
        """Suggested widths; at the target also equal keep ratios, and where Taylor's criterion alone cuts.

        That one ranks channels by what they are worth per cost, and as they are.
        """
        space, limit = self.problem.space, self.suggestion.limit
        yield "cluster", self.suggestion.start
        if limit is None or self.options.paper_compat:
            return

        yield "uniform", self.within(self.steps)
        for per_cost in (True, False) if "taylor" in self.options.rules else ():
            taylor = self.suggestion.saliencies["taylor"]
            plan = settle(self.problem, limit, space.full, taylor, per_cost=per_cost).plan
            yield "taylor", Position(tuple(space.encode(plan).tolist()))  # no projection of anything else

    def _begin(self, starts: Sequence[tuple[str, Position]]) -> Generator[Request, Answer, None]:
        """Judge the starts as cut where that is to decide anything, and let them join."""
        rules, before, judged = self.options.rules, (yield from remaining()), 0
        if self.options.epochs is None or (len(rules) > 1 and self.options.start == "pretrained"):
            found = list[tuple[float, str]]()
            for rule, (origin, position) in product(rules, starts):
                if found and (yield from remaining()).share < 1 - SWARM_SHARE:
                    break
                self.rule = rule
                found.append(((yield from self._judge(position, origin, (), 0.0))[1], rule))
            self.rule = max(found, key=lambda pair: pair[0])[1]
            judged = len(self.evaluations)
        if self.options.epochs is None:
            self.epochs = self._affordable((yield from remaining()))
        if judged == 0 or self.epochs > 0:
            before, judged = (yield from remaining()), 1
            yield from self._join(*starts[0])
        left = yield from remaining()
        self._follow(left, judged * left.rounds(before))
        for start in starts[len(self.particles) : self.size]:
            yield from self._join(*start)

    def _affordable(self, left: Left) -> float:
        """Epochs of training before a particle is judged, 0 where scores as cut tell enough and a budget is short."""
        epochs, metric = left.trainable(), self.problem.metric
        best = max((as_fraction(metric, e[metric]) for e in self.evaluations if e.status == "ok"), default=0.0)
        if best >= TELLING * as_fraction(metric, self.problem.reference[metric]):
            enough = self.size * (1 + self.cycles) * MOST_EPOCHS <= epochs < math.inf
            return MOST_EPOCHS if enough else 0.0
        return min(MOST_EPOCHS, epochs / TRAININGS)

    def _follow(self, left: Left, particles: float) -> None:
        """Fewer particles and fewer cycles, where the budget holds no more than so many like those before."""
        if self.epochs == 0:
            swarm = max(0.0, left.share - (1 - SWARM_SHARE)) / max(left.share, 1e-9)  # of what is left
            particles = particles * swarm if swarm > 0 else 0.0
        if particles < self.size * (1 + self.cycles):
            self.size = max(1, min(self.size, round(math.sqrt(particles))))
            self.cycles = min(self.cycles, int(particles) // self.size)

    def _join(self, origin: str, position: Position) -> Generator[Request, Answer, None]:
        """One more particle."""
        velocity = self.problem.rng.uniform(-self.options.v_max, self.options.v_max, len(self.steps))
        id_, fitness = yield from self._judge(position, origin, (), self.epochs)
        ranks = self.ranks(position.widths)
        self.particles.append(Particle(ranks, velocity, id_, ranks, fitness, id_))

    def move(self, particle: Particle, w: float) -> Generator[Request, Answer, None]:
        """2.6: one particle moves and is judged; pbest and gbest change where it is strictly better."""
        best = self.best
        move = compat_move if self.options.paper_compat else ordered_move
        moved, particle.velocity = move(particle, best.best, self.steps, w, self.options, self.problem.rng)
        parents = tuple(dict.fromkeys((particle.id, particle.best_id, best.best_id)))
        position = self.within(moved)
        particle.position = self.ranks(position.widths)
        particle.id, fitness = yield from self._judge(position, "pso", parents, self.epochs)
        if fitness > particle.best_fitness:
            particle.best, particle.best_fitness, particle.best_id = particle.position, fitness, particle.id

    def train_best(self) -> Generator[Request, Answer, None]:
        """Step 4 begins: the best network is trained for as long as the budget goes."""
        epochs, best = self.options.best_epochs, self.best
        if epochs == 0 or self.options.paper_compat or best.best_fitness == -math.inf:
            return
        known = next(candidate for candidate in self.candidates if candidate.id == best.best_id)
        candidate = replace(known, id=next(self._ids), origin="best", parents=(known.id,))
        most = (
            2 * (yield from remaining()).trainable()
        )  # the unpruned network could be; it is shortened to what is left
        tuned = yield from fine_tune(candidate, min(epochs, most))
        self._note(replace(candidate, base=tuned.base), tuned.evaluation)

    def _judge(
        self, position: Position, origin: str, parents: tuple[int, ...], epochs: float
    ) -> Generator[Request, Answer, tuple[int, float]]:
        """2.5: id and fitness of a position; a plan met before is not judged again."""
        plan = self.problem.space.decode(position.widths, self._saliency())
        if (plan.digest, epochs) not in self._known:
            base = RANDOM if self.options.start == "random" else DENSE
            candidate = Candidate(next(self._ids), plan, origin, parents, base, position.share)
            if epochs > 0:
                tuned = yield from fine_tune(candidate, epochs)
                evaluation, base = tuned.evaluation, tuned.base
            else:
                (evaluation,) = yield from evaluate([candidate], latency=True, last=not self.candidates)
            self._known[plan.digest, epochs] = candidate.id, self._note(replace(candidate, base=base), evaluation)
        return self._known[plan.digest, epochs]

    def _saliency(self) -> Mapping[str, FloatArray]:
        """2.5, which channels stay: group -> shape ``(size,)``; drawn anew for each particle where it is random."""
        if self.rule == "random":
            return {name: self.problem.rng.random(size) for name, size in self.problem.space.sizes.items()}
        return self.suggestion.saliencies[self.rule]

    def _note(self, candidate: Candidate, evaluation: Evaluation) -> float:
        """Keep an evaluation; its fitness, -inf where it is not known, so that such particles are never the best."""
        fitness = -math.inf
        if evaluation.status == "ok":
            reward, accuracy = self.problem.reward(evaluation), evaluation[self.problem.metric]
            if math.isnan(reward) or math.isnan(accuracy):
                evaluation = Evaluation("failed", f"its {self.problem.metric} or reward is NaN", evaluation.metrics)
            else:
                fitness = merit_of(self.problem.metric, accuracy) if self.options.paper_compat else reward
        self.candidates.append(candidate)
        self.evaluations.append(evaluation)
        return fitness

    def widths(self, ranks: IntArray) -> list[int]:
        """Allowed width per group, of positions counted from 1, shape ``(groups,)``."""
        space = self.problem.space
        return [space.allowed[name][int(r) - 1] for name, r in zip(space.names, ranks, strict=True)]

    def ranks(self, widths: Sequence[int]) -> IntArray:
        """The inverse of ``widths``."""
        space = self.problem.space
        ranks = [space.allowed[name].index(w) + 1 for name, w in zip(space.names, widths, strict=True)]
        return np.array(ranks, dtype=np.int64)

    def within(self, ranks: IntArray) -> Position:
        """A position brought onto the target: all widths by one factor, then what rounding left by the norms."""
        limit, space, widths = self.suggestion.limit, self.problem.space, self.widths(ranks)
        if limit is None or self.options.paper_compat:
            return Position(tuple(widths))

        near, worth = by_one_factor(space, limit, widths), self.suggestion.worth
        settled = settle(self.problem, limit, space.decode(near, worth), worth)
        return Position(tuple(space.encode(settled.plan).tolist()), settled.projected_share)


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
