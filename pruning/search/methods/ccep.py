"""CCEP: one small evolutionary search per channel group, spliced, fine-tuned, repeated.

Shang, Wu, Hong, Qian, "Neural Network Pruning by Cooperative Coevolution" (IJCAI 2022, arXiv 2204.05639). Filters are
selected over the whole network by dividing it into groups: each group is a bit string (1 = keep) that a tiny
evolutionary algorithm (EA) shortens a little while all other groups stay as they are::

    net <- pretrained
    repeat T times:
        sel_g <- EA(net, g) for every group g, all from the same snapshot `net`
        net <- fine-tune(splice(net, sel))
        record net
    return the recorded nets: a curve of accuracy against cost

The EA of a group with n filters:

    1. population: m individuals, the whole group and m - 1 that keep each filter with probability q, repaired to r n
    2. fitness: accuracy of the network with only this group cut, weights inherited, no fine-tuning
    3. G times: m offspring, each a mutated copy of a random member
    4. the best m of parents and offspring survive: accuracy first, then fewer filters
    5. optionally, one-point crossover before mutation
    6. result: the best individual that is pruned at all, so that every round makes progress

Our choices, where the source leaves room: ties left after step 4 fall to the bit string (determinism); crossover makes
offspring, which are scored, and never touches the population; a mask met before in its group is not evaluated again;
an individual is given up once it can no longer survive; a group whose pruned individuals all lose too much can be
frozen (``freeze_drop``); the search stops at its target, and the round that oversteps it is taken back where it costs
most accuracy. With ``latency_aware``, equally accurate individuals are ordered by the latency they save on the device.
Where the device restricts widths, see ``Subproblem``; with every width allowed, the algorithm is the paper's.

Least budget: 2 evaluations and 1 a group.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import count
from typing import ClassVar

import numpy as np

from secateur.pruning.plan import BoolArray, IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    Budget,
    Candidate,
    Entry,
    Evaluation,
    FineTuned,
    Problem,
    Request,
    Strategy,
    merit_of,
)
from secateur.pruning.search.support import (
    Ratios,
    SearchError,
    check_ranges,
    evaluate,
    fine_tune,
    macs_ratios,
    predicted_latency,
)


@dataclass(frozen=True)
class Options:
    """Options of CCEP. "CIFAR-10" and "ImageNet" are the settings the authors give for those data sets.

    Args:
        outer_iterations: T, rounds of search, splice and fine-tune (authors' default 10; 20 for their results).
        population: m, individuals per group (authors: 5).
        generations: G, generations per group and round (authors: 10).
        mutation_rate: p, probability in 0..1 that a bit is considered for a flip (authors: 0.1).
        initial_keep: q, probability in 0..1 that an initial individual keeps a filter (CIFAR-10 0.95, ImageNet 0.90).
        ratio_bound: r, fraction in 0..1 of a group's filters that one round leaves, less one (CIFAR-10 0.90, ImageNet
            0.85).
        crossover_rate: probability in 0..1 that an offspring comes from two parents (authors: off; 0.3 where on).
        finetune_epochs: epochs after each splice; 0 = none (CIFAR-10 100, ImageNet 60; ours 30).
        freeze_drop: fraction in 0..1; a group is left alone for good once its best pruned individual loses more
            ``fitness`` than this, for example 0.03. None = never (authors).
        latency_aware: predict latency from a few plans timed before the search (``predicted_latency``); among equally
            accurate individuals the one that saves most latency survives, and a group in whose reach nothing gets
            faster is skipped for the round (authors: off).
        accuracy_step: fraction in 0..1; accuracies are compared in steps of this size, the noise of the images, for
            example 0.001 = 0.1 percentage points. 0 = exactly (authors).
        adaptive_bound: give every group its own r, 1 - r in proportion to its share of the latency (``latency_aware``)
            or of the MACs, at most twice the common one, so that cheap groups are not eroded in vain (authors: off).
        fitness: metric that ranks individuals (of ``loss``, less is better); empty = the workload's accuracy (authors:
            top-1).
        include: name patterns (``*``, ``?``) of the groups to prune. The authors prune inner widths of residual blocks
            only: ``["*.conv1"]`` in a ResNet of basic blocks.
        paper_compat: mutate bits in index order as the authors do (it removes low indices slightly more often, so the
            default is a random order); evaluate hopeless individuals to the end; keep the last round as it overstepped.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    outer_iterations: int = 10
    population: int = 5
    generations: int = 10
    mutation_rate: float = 0.1
    initial_keep: float = 0.95
    ratio_bound: float = 0.9
    crossover_rate: float = 0.0
    finetune_epochs: float = 30
    freeze_drop: float | None = None
    latency_aware: bool = False
    accuracy_step: float = 0.0
    adaptive_bound: bool = False
    fitness: str = ""
    include: tuple[str, ...] = ("*",)
    paper_compat: bool = False

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("outer_iterations", "population", "generations"), (1.0, math.inf))
        chances = ("mutation_rate", "initial_keep", "ratio_bound", "crossover_rate", "freeze_drop", "accuracy_step")
        check_ranges(self, **counts, **dict.fromkeys(chances, (0.0, 1.0)), finetune_epochs=(0, math.inf))


def least(problem: Problem, options: Options) -> Budget:
    """A round: the snapshot, an individual of every group, and the splice."""
    return Budget(evaluations=2 + len(problem.space.names))


def search(problem: Problem, options: Options) -> Strategy:
    """The outer loop of CCEP; the archive holds every spliced network in the order it was found.

    A spliced network that could not be evaluated is dropped, and the next round starts from the same snapshot again.

    Raises:
        SearchError: the reference has no metric ``fitness``, ``include`` matches no group, or nothing was spliced.
    """
    options = replace(options, fitness=options.fitness or problem.metric)
    space, active = problem.space, _included(problem, options)
    latency = (yield from predicted_latency(problem)) if options.latency_aware else None
    ids = count()
    plan, base = space.full, DENSE
    parents: tuple[int, ...] = ()
    archive: list[Entry] = []
    for _ in range(options.outer_iterations):
        active = [name for name in active if space.below(name, plan.widths[name]) < plan.widths[name]]
        if not active:
            break
        snapshot = Candidate(next(ids), plan, "snapshot", parents, base)
        (evaluation,) = yield from evaluate([snapshot])
        whole_fitness = _fitness(evaluation, options)
        parts = _divided(problem, options, snapshot, active, latency)
        selected: dict[str, list[Individual]] = {}
        for part in parts:
            ranked = yield from evolve(problem, options, ids, part, whole_fitness)
            if not ranked:
                continue
            if options.freeze_drop is not None and whole_fitness - ranked[0].fitness > options.freeze_drop:
                active.remove(part.name)
            else:
                selected[part.name] = ranked
        if not selected:
            continue
        chosen = {name: ranked[0] for name, ranked in selected.items()}
        if not options.paper_compat:
            chosen = _within_target(problem, plan, selected, chosen)
        kept = {name: np.array(plan.kept[name])[best.bits] for name, best in chosen.items()}
        splice = Candidate(next(ids), plan.replace(kept), "splice", tuple(i.id for i in chosen.values()), base)
        tuned = yield from _tune(splice, options)
        if tuned.evaluation.status != "ok":
            continue
        plan, base, parents = splice.plan, tuned.base, (splice.id,)
        archive.append(Entry(replace(splice, base=base), tuned.evaluation))
        if problem.goal.met(tuned.evaluation, problem.reference):
            break
    if not archive:
        raise SearchError(
            "ccep spliced no network: in no round could a group be pruned and the result be evaluated. "
            "Raise outer_iterations, generations or mutation_rate, or raise freeze_drop if it is set."
        )
    return tuple(archive)


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
    """

    bits: BoolArray
    fitness: float
    id: int
    step: float = 0.0
    saved: float = 0.0

    @property
    def level(self) -> float:
        """Accuracy, rounded down to a whole step."""
        if self.step == 0 or math.isinf(self.fitness):
            return self.fitness
        return math.floor(self.fitness / self.step + 1e-9) * self.step

    @property
    def rank(self) -> tuple[float, float, int, bytes]:
        """Smaller = better: accuracy and latency saved descending, kept filters ascending (step 4), then the bits."""
        return -self.level, -self.saved, int(self.bits.sum()), self.bits.tobytes()


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
    """

    snapshot: Candidate
    name: str
    alive: IntArray
    bound: int
    widths: tuple[int, ...]
    saved: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, space: SearchSpace, snapshot: Candidate, name: str, ratio_bound: float) -> Subproblem:
        alive = np.array(snapshot.plan.kept[name])
        n = len(alive)
        bound = min(math.ceil(ratio_bound * n - 1e-9), space.below(name, n) + 1)
        return cls(snapshot, name, alive, bound, tuple(w for w in space.allowed[name] if bound - 1 <= w <= n))

    @property
    def n(self) -> int:
        return len(self.alive)


def evolve(
    problem: Problem, options: Options, ids: count[int], part: Subproblem, whole_fitness: float
) -> Generator[Request, Answer, list[Individual]]:
    """The EA of one group; returns its pruned individuals that were evaluated, best first (step 6 takes the first)."""
    rng, m, snapshot = problem.rng, options.population, part.snapshot
    whole = Individual(np.ones(part.n, dtype=bool), whole_fitness, snapshot.id, options.accuracy_step)
    known = {whole.bits.tobytes(): whole}

    def scored(
        drafts: list[Draft], origin: str, floor: float | None = None
    ) -> Generator[Request, Answer, list[Individual]]:
        """The drafts as individuals; masks not met before are asked for in one request."""
        fresh: dict[bytes, tuple[BoolArray, Candidate]] = {}
        for bits, parents in drafts:
            key = bits.tobytes()
            if key not in known and key not in fresh:
                plan = snapshot.plan.replace({part.name: part.alive[bits]})
                fresh[key] = bits, Candidate(next(ids), plan, origin, parents, snapshot.base)
        if fresh:
            evaluations = yield from evaluate([candidate for _, candidate in fresh.values()], floor=floor)
            for (key, (bits, candidate)), evaluation in zip(fresh.items(), evaluations, strict=True):
                saved = part.saved.get(int(bits.sum()), 0.0)
                fitness = _fitness(evaluation, options)
                known[key] = Individual(bits, fitness, candidate.id, options.accuracy_step, saved)
        return [known[bits.tobytes()] for bits, _ in drafts]

    drafts: list[Draft] = [(initial(part, options, rng), (whole.id,)) for _ in range(m - 1)]
    population = [whole, *(yield from scored(drafts, "init"))]  # steps 1 and 2
    for _ in range(options.generations):  # step 3
        drafts = []
        for _ in range(m):
            bits, parents = _parent(population, part, options, rng)
            drafts.append((mutate(bits, part, options, rng), parents))
        offspring = yield from scored(drafts, "mutation", _floor(problem, population, options))
        population = sorted(population + offspring, key=lambda i: i.rank)[:m]  # step 4
    # Step 6. Survivors are the best ever scored, so this is the best pruned member of the population, if it has one.
    return sorted((i for i in known.values() if not i.bits.all() and i.fitness > -math.inf), key=lambda i: i.rank)


def _floor(problem: Problem, population: list[Individual], options: Options) -> float | None:
    """The accuracy below which an individual neither survives nor becomes the result; None = there is none yet.

    Worse than all m members it is not among the best m; and a pruned member that is better outranks it in step 6.
    """
    worst = min(individual.level for individual in population)
    if options.paper_compat or options.fitness != problem.metric or math.isinf(worst):
        return None
    return worst if any(not individual.bits.all() for individual in population) else None


def _divided(
    problem: Problem, options: Options, snapshot: Candidate, active: list[str], latency: Ratios | None
) -> list[Subproblem]:
    """The groups' subproblems of one round, in network order."""
    space, plan = problem.space, snapshot.plan
    bounds = dict.fromkeys(active, options.ratio_bound)
    if options.adaptive_bound:
        shares = _shares(problem, plan, active, latency)
        mean = sum(shares.values()) / len(shares)
        factors = {name: min(2.0, share / mean) if mean > 0 else 1.0 for name, share in shares.items()}
        bounds = {name: max(0.0, 1 - factor * (1 - options.ratio_bound)) for name, factor in factors.items()}
    parts = [Subproblem.of(space, snapshot, name, bounds[name]) for name in active]
    if latency is None:
        return parts
    timed = [replace(part, saved=_saved(problem, part, latency)) for part in parts]
    return [part for part in timed if max(part.saved.values()) > 0] or timed


def _shares(problem: Problem, plan: PruningPlan, active: list[str], latency: Ratios | None) -> dict[str, float]:
    """Cost that goes with each group alone when it falls to its smallest allowed width: its share of the network."""
    cost, space = latency or macs_ratios(problem), problem.space
    widths = np.repeat(space.encode(plan)[None], len(active) + 1, axis=0)
    for row, name in enumerate(active):
        widths[row, space.names.index(name)] = space.allowed[name][0]
    costs = cost(widths)
    return {name: max(0.0, float(costs[-1] - costs[row])) for row, name in enumerate(active)}


def _saved(problem: Problem, part: Subproblem, latency: Ratios) -> dict[int, float]:
    """Width -> latency that goes with it, all other groups as they are in the snapshot."""
    space = problem.space
    widths = np.repeat(space.encode(part.snapshot.plan)[None], len(part.widths) + 1, axis=0)
    widths[:-1, space.names.index(part.name)] = part.widths
    costs = latency(widths)
    return {width: max(0.0, float(costs[-1] - cost)) for width, cost in zip(part.widths, costs, strict=False)}


def _within_target(
    problem: Problem, plan: PruningPlan, ranked: Mapping[str, list[Individual]], chosen: Mapping[str, Individual]
) -> dict[str, Individual]:
    """The choice of a round that oversteps the MACs target, taken back as far as the target allows.

    Group by group, the one that lost most accuracy first, the most accurate individual is taken that still meets it;
    a group that may stay whole is left out of the splice.
    """
    target, result = problem.goal.macs_ratio, dict(chosen)
    if target is None:
        return result

    def macs(choice: Mapping[str, Individual]) -> float:
        return problem.macs(plan.replace({n: np.array(plan.kept[n])[i.bits] for n, i in choice.items()}))

    budget = target * problem.reference["macs"]
    if macs(result) > budget:
        return result
    for name in sorted(chosen, key=lambda n: chosen[n].fitness):
        without = {n: i for n, i in result.items() if n != name}
        if without and macs(without) <= budget:
            result = without
            continue
        meeting = [i for i in ranked[name] if macs({**without, name: i}) <= budget]
        result[name] = min(meeting, key=lambda i: (-i.fitness, i.rank))
    return result


def initial(part: Subproblem, options: Options, rng: np.random.Generator) -> BoolArray:
    """Step 1: shape ``(n,)``; every filter stays with probability q; missing ones are added until r n are kept."""
    bits = rng.random(part.n) < options.initial_keep
    return _fit(_grown(bits, part.bound, rng), part, [], rng)


def mutate(bits: BoolArray, part: Subproblem, options: Options, rng: np.random.Generator) -> BoolArray:
    """Step 3, bit-wise mutation with ratio bound: shape ``(n,)`` -> ``(n,)``; the parent's bits if none is left."""
    child, removed = bits.copy(), []
    kept = int(child.sum())
    considered = np.flatnonzero(rng.random(part.n) < options.mutation_rate)
    for i in considered if options.paper_compat else rng.permutation(considered):
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


def _parent(population: list[Individual], part: Subproblem, options: Options, rng: np.random.Generator) -> Draft:
    """What an offspring starts from, with the parents' ids: a random member, or the child of two (step 5)."""
    first = population[rng.integers(len(population))]
    if options.crossover_rate and rng.random() < options.crossover_rate:
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


def _tune(splice: Candidate, options: Options) -> Generator[Request, Answer, FineTuned]:
    """The spliced network fine-tuned; or as it is, with its latency, where no fine-tuning is wanted."""
    if options.finetune_epochs > 0:
        return (yield from fine_tune(splice, options.finetune_epochs))
    (evaluation,) = yield from evaluate([splice], latency=True)
    return FineTuned(splice.base, evaluation)


def _fitness(evaluation: Evaluation, options: Options) -> float:
    """Step 2: accuracy (or what else ranks, turned so that higher = better), -inf where it is not known: ranks last."""
    value = merit_of(options.fitness, evaluation[options.fitness])
    return value if evaluation.status == "ok" and not math.isnan(value) else -math.inf


def _included(problem: Problem, options: Options) -> list[str]:
    """Groups to prune, in network order."""
    if math.isnan(problem.reference[options.fitness]):
        known = ", ".join(sorted(problem.reference.metrics))
        raise SearchError(f"fitness {options.fitness!r} is not a metric of this workload; it has {known}")
    names = [n for n in problem.space.names if any(fnmatchcase(n, pattern) for pattern in options.include)]
    if not names:
        raise SearchError(f"include {list(options.include)} matches none of the groups {list(problem.space.names)}")
    return names
