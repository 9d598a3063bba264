"""Evolution of one channel group's bit string: the small evolutionary algorithm (EA) inside CCEP.

Shang, Wu, Hong, Qian, "Neural Network Pruning by Cooperative Coevolution" (IJCAI 2022, arXiv 2204.05639). The EA of a
group with n filters, all other groups as they are:

    1. population: m individuals, the whole group and m - 1 that keep each filter with probability q, repaired to r n
    2. fitness: accuracy of the network with only this group cut, weights inherited, no fine-tuning
    3. G times: m offspring, each a mutated copy of a random member
    4. the best m of parents and offspring survive: accuracy first, then fewer filters
    5. optionally, one-point crossover before mutation
    6. result: the best individual that is pruned at all, so that every round makes progress

Our choices, where the source leaves room: ties left after step 4 fall to the bit string (determinism); crossover makes
offspring, which are scored, and never touches the population; a mask met before in its group is not evaluated again;
an individual is given up once it can no longer survive. Survivors may be chosen by the run's reward, and some of the
first individuals drop the filters of least saliency. Where the device restricts widths, see ``Subproblem``.

Not a method itself: ``ccep`` says which groups are evolved from which snapshot, and splices what they find.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import numpy as np

from secateur.pruning.plan import BoolArray, IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    LOWER_IS_BETTER,
    Answer,
    Candidate,
    Evaluation,
    FloatArray,
    Problem,
    Request,
    merit_of,
)
from secateur.pruning.search.support import Ratios, check_ranges, evaluate


@dataclass(frozen=True)
class Settings:
    """What CCEP lets a user set of the EA; its ``Options`` say what it means."""

    population: int = 5
    generations: int = 10
    mutation_rate: float = 0.1
    initial_keep: float = 0.95
    crossover_rate: float = 0.0
    survival: Literal["accuracy", "reward"] = "reward"
    accuracy_step: float = 0.0
    fitness: str = ""
    paper_compat: bool = False

    def __post_init__(self) -> None:
        chances = dict.fromkeys(("mutation_rate", "initial_keep", "crossover_rate", "accuracy_step"), (0.0, 1.0))
        check_ranges(self, population=(1, math.inf), generations=(1, math.inf), **chances)


Draft = tuple[BoolArray, tuple[int, ...]]
"""Bits of an individual to be, shape ``(n,)``, and its parents' ids."""


@dataclass(frozen=True, eq=False)
class Individual:
    """One bit string of a group.

    Args:
        bits: shape ``(n,)``, over the filters the snapshot still has, True = keep.
        fitness: accuracy on the search split; -inf where it could not be evaluated or cannot survive.
        id: of the candidate that was evaluated for it.
        step: accuracies are compared in steps of this size; 0 = exactly.
        saved: predicted latency saved, as a ratio to the unpruned network's; 0 where latency does not count.
        reward: what ranks it before all that; None where accuracy comes first.
    """

    bits: BoolArray
    fitness: float
    id: int
    step: float = 0.0
    saved: float = 0.0
    reward: float | None = None

    @property
    def removed(self) -> int:
        """Filters that go."""
        return int((~self.bits).sum())

    @property
    def level(self) -> float:
        """Accuracy, rounded down to a whole step."""
        if self.step == 0 or math.isinf(self.fitness):
            return self.fitness
        return math.floor(self.fitness / self.step + 1e-9) * self.step

    @property
    def rank(self) -> tuple[float, float, float, int, bytes]:
        """Smaller = better: reward, accuracy, latency saved descending; kept filters ascending (step 4); the bits."""
        reward = 0.0 if self.reward is None else self.reward
        return -reward, -self.level, -self.saved, int(self.bits.sum()), self.bits.tobytes()


@dataclass(frozen=True, eq=False)
class Subproblem:
    """One group of the snapshot network, as its EA sees it.

    The source keeps at least r n filters in the initial population and removes a filter only while the group has r n
    or more, so one round can leave ``ceil(r n) - 1``. Where the device allows only some widths, that bound is lowered,
    if need be, so that the next allowed width can be reached; and an individual of another width moves to the allowed
    width next below or above, at random (our choice). With every width allowed neither ever happens.

    Args:
        snapshot: the network all groups start from.
        name: the group.
        alive: shape ``(n,)``, channel indices the snapshot still has.
        bound: a filter is removed only while at least this many are kept.
        widths: allowed widths from ``bound - 1`` to n, increasing.
        saved: width -> predicted latency saved (ratio to the unpruned network's); empty where latency does not count.
        costs: width -> costs of the network with it, as an evaluation names them.
    """

    snapshot: Candidate
    name: str
    alive: IntArray
    bound: int
    widths: tuple[int, ...]
    saved: Mapping[int, float] = field(default_factory=dict)
    costs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, space: SearchSpace, snapshot: Candidate, name: str, ratio_bound: float) -> Subproblem:
        alive = np.array(snapshot.plan.kept[name])
        return cls(snapshot, name, alive, *reach(space, name, len(alive), ratio_bound))

    @property
    def n(self) -> int:
        return len(self.alive)


def evolve(
    problem: Problem, settings: Settings, ids: count[int], part: Subproblem, whole: float
) -> Generator[Request, Answer, list[Individual]]:
    """The EA of one group as the authors run it, G generations of m; its pruned individuals, best first.

    Args:
        whole: fitness of the snapshot.
    """
    evolution = Evolution(problem, settings, ids, part, whole)
    yield from evolution.run(settings.population - 1, settings.generations)
    return evolution.ranked


class Evolution:
    """The EA of one group.

    Args:
        part: the group, as the round's snapshot has it.
        whole: fitness of the snapshot.
        saliency: of all filters of the group, shape ``(size,)``; None = nothing is informed.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        ids: count[int],
        part: Subproblem,
        whole: float,
        saliency: FloatArray | None = None,
    ) -> None:
        self.problem, self.settings, self.ids, self.part, self.saliency = problem, settings, ids, part, saliency
        self.whole = self.individual(np.ones(part.n, dtype=bool), whole, part.snapshot.id)
        self.met = {self.whole.bits.tobytes(): self.whole}

    @property
    def ranked(self) -> list[Individual]:
        """Its pruned individuals that were evaluated, best first; step 6 takes the first.

        Survivors are the best ever scored, so that is the best pruned member of the population, if it has one.
        """
        pruned = [i for i in self.met.values() if not i.bits.all() and i.fitness > -math.inf]
        return sorted(pruned, key=lambda i: i.rank)

    def run(self, size: int, generations: int) -> Generator[Request, Answer, None]:
        """Steps 1 to 4.

        Args:
            size: individuals of the population beside the whole group.
            generations: how many there are.
        """
        rng, m, part = self.problem.rng, self.settings.population, self.part
        first: list[Draft] = [(bits, (self.whole.id,)) for bits in self.informed(size)]
        while len(first) < size:
            first.append((initial(part, self.settings, rng), (self.whole.id,)))
        population = [self.whole, *(yield from self.scored(first, "init"))]  # steps 1 and 2
        for _ in range(generations):  # step 3
            drafts = []
            for _ in range(m):
                bits, parents = _parent(population, part, self.settings, rng)
                drafts.append((mutate(bits, part, self.settings, rng), parents))
            offspring = yield from self.scored(drafts, "mutation", self.floor(population))
            population = sorted(population + offspring, key=lambda i: i.rank)[:m]  # step 4

    def scored(
        self, drafts: list[Draft], origin: str, floor: float | None = None
    ) -> Generator[Request, Answer, list[Individual]]:
        """The drafts as individuals; masks not met before are asked for in one request."""
        part, fresh = self.part, dict[bytes, tuple[BoolArray, Candidate]]()
        for bits, parents in drafts:
            key = bits.tobytes()
            if key not in self.met and key not in fresh:
                plan = part.snapshot.plan.replace({part.name: part.alive[bits]})
                fresh[key] = bits, Candidate(next(self.ids), plan, origin, parents, part.snapshot.base)
        if fresh:
            evaluations = yield from evaluate([candidate for _, candidate in fresh.values()], floor=floor)
            for (key, (bits, candidate)), evaluation in zip(fresh.items(), evaluations, strict=True):
                self.met[key] = self.individual(bits, fitness_of(evaluation, self.settings), candidate.id)
        return [self.met[bits.tobytes()] for bits, _ in drafts]

    def individual(self, bits: BoolArray, fitness: float, id_: int) -> Individual:
        """A bit string with what ranks it."""
        saved, kept = self.part.saved.get(int(bits.sum()), 0.0), int(bits.sum())
        reward = self.reward(kept, fitness) if self.rewarded else None
        return Individual(bits, fitness, id_, self.settings.accuracy_step, saved, reward)

    @property
    def rewarded(self) -> bool:
        """Whether the run's reward ranks individuals."""
        settings = self.settings
        return settings.survival == "reward" and not settings.paper_compat and settings.fitness == self.problem.metric

    def reward(self, kept: int, fitness: float) -> float:
        """The run's reward of a width of the group with a fitness; the latency is the predicted one."""
        metric = self.problem.metric
        metrics = {metric: merit_of(metric, fitness), **self.part.costs[kept]}
        reward = self.problem.reward(Evaluation(metrics=metrics)) if fitness > -math.inf else -math.inf
        return -math.inf if math.isnan(reward) else reward

    def floor(self, population: list[Individual]) -> float | None:
        """The accuracy below which an individual neither survives nor becomes the result; None = there is none yet.

        Worse than all m members it is not among the best m; and a pruned member that is better outranks it in step 6.
        """
        settings, worst = self.settings, max(population, key=lambda i: i.rank)
        fraction = settings.fitness == self.problem.metric and settings.fitness not in LOWER_IS_BETTER
        if settings.paper_compat or not fraction or math.isinf(worst.level):
            return None
        if all(individual.bits.all() for individual in population):
            return None
        return self.least_fitness(worst) if self.rewarded else worst.level

    def least_fitness(self, worst: Individual) -> float | None:
        """The fitness with which the cheapest individual has as much reward as the worst, to 2^-20; None = any."""
        cheapest, wanted = self.part.widths[0], worst.reward
        low, high = 0.0, max(worst.fitness, self.whole.fitness)
        if wanted is None or self.reward(cheapest, low) >= wanted or self.reward(cheapest, high) < wanted:
            return None
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if self.reward(cheapest, middle) >= wanted else (middle, high)
        return low

    def informed(self, size: int) -> list[BoolArray]:
        """Individuals that keep the most salient filters: the narrowest, and one half-way to it if there is room."""
        if self.saliency is None:
            return []
        order = np.argsort(-self.saliency[self.part.alive], kind="stable")
        found = []
        for width in dict.fromkeys((self.part.widths[0], self.part.widths[len(self.part.widths) // 2])):
            bits = np.zeros(self.part.n, dtype=bool)
            bits[order[:width]] = True
            found.append(bits)
        return [bits for bits in found if not bits.all()][: max(1, size // 2)]


def divided(
    problem: Problem, snapshot: Candidate, ratio_bounds: Mapping[str, float], latency: Ratios | None
) -> list[Subproblem]:
    """The groups' subproblems of one round, in the order of ``ratio_bounds``.

    Args:
        snapshot: the network all groups start from.
        ratio_bounds: group -> r, in 0..1.
        latency: predicted latency ratios; groups in whose reach nothing gets faster are left out then, unless none
            does. None = latency does not count.
    """
    parts = [Subproblem.of(problem.space, snapshot, name, bound) for name, bound in ratio_bounds.items()]
    parts = [replace(part, costs=_costs(problem, part, latency)) for part in parts]
    if latency is None:
        return parts
    timed = [replace(part, saved=_saved(part)) for part in parts]
    return [part for part in timed if max(part.saved.values()) > 0] or timed


def _costs(problem: Problem, part: Subproblem, latency: Ratios | None) -> dict[int, dict[str, float]]:
    """Width -> costs of the network with it, as an evaluation names them, all other groups as they are."""
    widths = _alone(problem.space, part.snapshot.plan, part.name, part.widths)
    costs = {name: values for name, values in problem.costs(widths).items() if name in ("macs", "params")}
    if latency is not None:
        costs["latency_ratio"] = latency(widths)
    return {w: {name: float(values[row]) for name, values in costs.items()} for row, w in enumerate(part.widths)}


def _saved(part: Subproblem) -> dict[int, float]:
    """Width -> latency that goes with it."""
    whole = part.costs[part.widths[-1]]["latency_ratio"]
    return {width: max(0.0, whole - costs["latency_ratio"]) for width, costs in part.costs.items()}


def _alone(space: SearchSpace, plan: PruningPlan, name: str, widths: Sequence[int]) -> IntArray:
    """Width vectors of the plan with other widths of one group, shape ``(widths, groups)``."""
    rows = np.repeat(space.encode(plan)[None], len(widths), axis=0)
    rows[:, space.names.index(name)] = widths
    return rows


def reach(space: SearchSpace, name: str, width: int, ratio_bound: float) -> tuple[int, tuple[int, ...]]:
    """The bound of a group in one round, and the allowed widths from ``bound - 1`` to its own, increasing."""
    bound = min(math.ceil(ratio_bound * width - 1e-9), space.below(name, width) + 1)
    return bound, tuple(w for w in space.allowed[name] if bound - 1 <= w <= width)


def initial(part: Subproblem, settings: Settings, rng: np.random.Generator) -> BoolArray:
    """Step 1: shape ``(n,)``; every filter stays with probability q; missing ones are added until r n are kept."""
    bits = rng.random(part.n) < settings.initial_keep
    return _fit(_grown(bits, part.bound, rng), part, [], rng)


def mutate(bits: BoolArray, part: Subproblem, settings: Settings, rng: np.random.Generator) -> BoolArray:
    """Step 3, bit-wise mutation with ratio bound: shape ``(n,)`` -> ``(n,)``; the parent's bits if none is left."""
    child, removed = bits.copy(), []
    kept = int(child.sum())
    considered = np.flatnonzero(rng.random(part.n) < settings.mutation_rate)
    for i in considered if settings.paper_compat else rng.permutation(considered):
        if not child[i]:
            child[i] = True
            kept += 1
        elif kept >= part.bound:
            child[i] = False
            kept -= 1
            removed.append(int(i))
    return _fit(child, part, removed, rng) if kept else bits


def crossover(first: BoolArray, second: BoolArray, part: Subproblem, rng: np.random.Generator) -> BoolArray:
    """Step 5, one-point crossover: shapes ``(n,)`` -> ``(n,)``, repaired to r n like an initial individual."""
    cut = int(rng.integers(1, part.n))
    return _fit(_grown(np.concatenate([first[:cut], second[cut:]]), part.bound, rng), part, [], rng)


def _parent(population: list[Individual], part: Subproblem, settings: Settings, rng: np.random.Generator) -> Draft:
    """What an offspring starts from, with the parents' ids: a random member, or the child of two (step 5)."""
    first = population[rng.integers(len(population))]
    if settings.crossover_rate and rng.random() < settings.crossover_rate:
        second = population[rng.integers(len(population))]
        return crossover(first.bits, second.bits, part, rng), (first.id, second.id)
    return first.bits, (first.id,)


def _grown(bits: BoolArray, width: int, rng: np.random.Generator) -> BoolArray:
    """The bits with random missing filters added until at least ``width`` are kept."""
    grown, missing = bits.copy(), np.flatnonzero(~bits)
    grown[rng.choice(missing, max(0, width - int(bits.sum())), replace=False)] = True
    return grown


def _fit(bits: BoolArray, part: Subproblem, removed: Iterable[int], rng: np.random.Generator) -> BoolArray:
    """The bits at an allowed width: unchanged where theirs is, else the next below or above, at random.

    Up re-adds the filters ``removed`` last, then random missing ones; down removes random kept ones.
    """
    kept = int(bits.sum())
    if kept in part.widths:
        return bits
    width = int(rng.choice([*[w for w in part.widths if w < kept][-1:], *[w for w in part.widths if w > kept][:1]]))
    fitted = bits.copy()
    if width < kept:
        fitted[rng.choice(np.flatnonzero(bits), kept - width, replace=False)] = False
        return fitted
    fitted[[*reversed(list(removed))][: width - kept]] = True
    return _grown(fitted, width, rng)


def fitness_of(evaluation: Evaluation, settings: Settings) -> float:
    """Step 2: accuracy (or what else ranks, turned so that higher = better), -inf where it is not known: ranks last."""
    value = merit_of(settings.fitness, evaluation[settings.fitness])
    return value if evaluation.status == "ok" and not math.isnan(value) else -math.inf
