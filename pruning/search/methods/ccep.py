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

The EA of a group, step by step, is in ``group_evolution``. Our choice: a group whose pruned individuals all lose too
much can be frozen (``freeze_drop``).

Our choices for a target and a budget, off with ``paper_compat``. Every round has its share of the way to the target:
equal factors of the cost. It splices, of all individuals that its EAs have met, those that lose least fitness per cost
saved, until its share is reached, so that a coarse width never takes a round beyond it. Rounds and
generations are as many as the budget lasts for; what the rounds cannot reach from the unpruned network, a warm start
takes ahead of them (``start``). The last splice, or what is unfinished when the budget ends, is brought to the target
channel by channel. One individual of every population drops the filters that ``informed`` ranks lowest. Survivors are
chosen by the run's reward, predicted latency included, and what a splice measures rescales the
prediction.

Least budget: 3 evaluations and 1 a group.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import ClassVar, Literal

import numpy as np

from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.group_evolution import Evolution, Individual, Settings, divided, fitness_of, reach
from secateur.pruning.search.landing import land_on, per_mean, settle
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    Budget,
    BudgetSpent,
    Candidate,
    Entry,
    FineTuned,
    FloatArray,
    Goal,
    Left,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import (
    Limit,
    Ratios,
    SearchError,
    bisect,
    check_groups,
    check_ranges,
    evaluate,
    fine_tune,
    included,
    limit_of,
    macs_ratios,
    predicted_latency,
    remaining,
    score,
)


@dataclass(frozen=True)
class Options(Settings):
    """Options of CCEP. "CIFAR-10" and "ImageNet" are the settings the authors give for those data sets.

    Numbers of rounds, generations and epochs are upper bounds: the budget is spread so that the target is reached.

    Args:
        outer_iterations: T, rounds of search, splice and fine-tune (authors' default 10; 20 for their results).
        population: m, individuals per group (authors: 5).
        generations: G, generations per group and round (authors: 10).
        mutation_rate: p, probability in 0..1 that a bit is considered for a flip (authors: 0.1).
        initial_keep: q, probability in 0..1 that an initial individual keeps a filter (CIFAR-10 0.95, ImageNet 0.90).
        ratio_bound: r, fraction in 0..1 of a group's filters that one round leaves, less one (CIFAR-10 0.90, ImageNet
            0.85). Where the budget allows fewer rounds than that needs, and no warm start is wanted, it is lowered.
        crossover_rate: probability in 0..1 that an offspring comes from two parents (authors: off; 0.3 where on).
        finetune_epochs: epochs after each splice; 0 = none (CIFAR-10 100, ImageNet 60; ours 1). Where half of the
            budget does not last for one epoch a round there is none at all: the weights stay those of the snapshot.
        start: the network that the rounds begin with: ``dense`` (authors); ``uniform`` or ``global`` = as those
            controls cut it, with L1, as far as the rounds that the budget allows cannot come. The control's own plan at
            the target is the first of the archive then.
        informed: saliency by which one individual of every initial population drops the lowest filters, and by which
            the projection onto the target ranks filters within a group; empty = none (authors), ``l1`` to project.
        survival: what ranks individuals: the run's ``reward``, with the predicted latency where there is one, or
            ``accuracy`` first and then fewer filters (authors). A ``fitness`` of your own is always ranked like the
            latter.
        freeze_drop: fraction in 0..1; a group is left alone for good once its best pruned individual loses more
            ``fitness`` than this, for example 0.03. None = never (authors).
        latency_aware: predict latency from a few plans timed before the search (``predicted_latency``), as it is done
            for a latency target anyway; among equally accurate individuals the one that saves most latency survives,
            and a group in whose reach nothing gets faster is skipped for the round (authors: off).
        accuracy_step: fraction in 0..1; accuracies are compared in steps of this size, the noise of the images, for
            example 0.001 = 0.1 percentage points. 0 = exactly (authors).
        adaptive_bound: give every group its own r, 1 - r in proportion to its share of the latency (``latency_aware``)
            or of the MACs, at most twice the common one, so that cheap groups are not eroded in vain (authors: off).
        fitness: metric that ranks individuals (of ``loss`` and ``divergence``, less is better); empty = the search's
            (authors: top-1).
        include: name patterns (``*``, ``?``) of the groups to prune. The authors prune inner widths of residual blocks
            only: ``["*.conv1"]`` in a ResNet of basic blocks.
        paper_compat: the authors' steps: mutate bits in index order (it removes low indices slightly more often, so the
            default is a random order); evaluate hopeless individuals to the end; ``start: dense``, nothing informed,
            ``survival: accuracy``; every round splices the best of all groups, and the last one oversteps. The budget
            is not spread.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    outer_iterations: int = 10
    ratio_bound: float = 0.9
    finetune_epochs: float = 1
    start: Literal["dense", "uniform", "global"] = "uniform"
    informed: str = "l1"
    freeze_drop: float | None = None
    latency_aware: bool = False
    adaptive_bound: bool = False
    include: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, outer_iterations=(1, math.inf), finetune_epochs=(0, math.inf))
        check_ranges(self, ratio_bound=(0, 1), freeze_drop=(0, 1))


def least(problem: Problem, options: Options) -> Budget:
    """One round of the smallest kind: the warm start, the snapshot, one individual a group, the splice."""
    return Budget(evaluations=len(included(problem.space, options.include)) + 3)


def search(problem: Problem, options: Options) -> Strategy:
    """The outer loop of CCEP; the archive holds the warm start's plan at the target, then every spliced network.

    A spliced network that could not be evaluated is dropped, and the next round starts from the same snapshot again.

    Raises:
        SearchError: the reference has no metric ``fitness``, ``include`` matches no group or not enough of them for the
            target, or nothing was spliced.
    """
    course, spent = _Course(problem, _settled(problem, options)), False
    try:
        yield from course.run()
    except BudgetSpent:
        spent = True
    if not course.met:
        yield from course.end()
    if not course.archive:
        if spent:
            raise BudgetSpent
        raise SearchError(
            "ccep spliced no network: in no round could a group be pruned and the result be evaluated. "
            "Raise outer_iterations, generations or mutation_rate, or raise freeze_drop if it is set."
        )
    return tuple(course.archive)


LIVELY = 3
"""Generations a round should have: there are as many rounds as the budget lasts for with so many."""
SLACK = 1.5
"""What the individuals of a round may save together, over what the round has to save: so that there is a choice."""
TRAINING = 0.5
"""Share of the budget that the fine-tuning of the rounds may take."""


class _Course:
    """A search on its way: the network so far, and what is known of its groups.

    Attributes:
        plan, base, parents: the network so far, its weights, and the candidate it comes from.
        active: names of the groups that may still be pruned.
        limit: the target; None = there is none, or it is the authors' loop that ends with it.
        latency: predicted latency ratios; None where latency does not count.
        known: of the round that is under way, group -> its pruned individuals, best first.
        whole: fitness of the round's snapshot.
        worth: group -> fitness lost per filter that went, as it was seen last.
    """

    def __init__(self, problem: Problem, options: Options) -> None:
        self.problem, self.options = problem, options
        self.names = self.active = included(problem.space, options.include)
        self.plan, self.base = problem.space.full, DENSE
        self.parents: tuple[int, ...] = ()
        self.archive: list[Entry] = []
        self.ids, self.pace, self.whole = count(), _Pace(), 0.0
        self.limit: Limit | None = None
        self.latency: Ratios | None = None
        self.known: dict[str, list[Individual]] = {}
        self.worth: dict[str, float] = {}
        self._scores: tuple[str, Mapping[str, FloatArray]] | None = None

    @property
    def met(self) -> bool:
        """Whether a network of the rounds meets the target."""
        spliced = [entry for entry in self.archive if entry.candidate.origin == "splice"]
        return any(self.problem.goal.met(entry.evaluation, self.problem.reference) for entry in spliced)

    def run(self) -> Generator[Request, Answer, None]:
        """Rounds until the target is met, nothing can be pruned any more, or there were T of them."""
        space, options = self.problem.space, self.options
        yield from self.prepare()
        if self.limit is not None and options.start != "dense":
            yield from self.start(self.limit)
        for done in range(options.outer_iterations):
            widths = self.plan.widths
            self.active = [name for name in self.active if space.below(name, widths[name]) < widths[name]]
            if not self.active:
                break
            yield from self.round(options.outer_iterations - done)
            if self.met:
                break

    def prepare(self) -> Generator[Request, Answer, None]:
        """What is predicted of latency, and the target as something to project onto."""
        problem, options = self.problem, self.options
        if problem.goal != Goal() and not options.paper_compat:
            self.limit = yield from limit_of(problem)
            check_groups(problem, self.limit, self.names)
            self.latency = self.limit.ratios if self.limit.name == "latency_ratio" else None
        if options.latency_aware and self.latency is None:
            self.latency = yield from predicted_latency(problem)

    def start(self, limit: Limit) -> Generator[Request, Answer, None]:
        """The warm start: the control's plan at the target, and of its cut as much as the rounds cannot do."""
        saliency = per_mean((yield from self.saliency()))
        first = Candidate(next(self.ids), self.control(limit, saliency), self.options.start)
        before = yield from remaining()
        (evaluation,) = yield from evaluate([first], latency=True)
        left = yield from remaining()
        self.pace.note(before, left)
        if evaluation.status == "ok":
            self.archive.append(Entry(first, evaluation))
        rounds = self.rounds(left, self.options.outer_iterations)
        begin = limit.bound * max(self.options.ratio_bound, 1e-9) ** -rounds
        if begin < 1:
            self.plan, self.parents = self.control(replace(limit, bound=begin), saliency), (first.id,)

    def control(self, limit: Limit, saliency: Mapping[str, FloatArray]) -> PruningPlan:
        """The plan at a limit that ``uniform`` or ``global`` gives."""
        space, plan = self.problem.space, self.problem.space.full

        def widths(ratio: float) -> list[int]:
            return [space.snap(n, ratio * space.sizes[n]) if n in self.names else space.sizes[n] for n in space.names]

        if self.options.start == "uniform":
            plan = space.decode(widths(bisect(limit, widths, meets=0.0, fails=1.0)), saliency)
        return settle(self.problem, limit, plan, saliency, names=self.names, per_cost=False).plan

    def round(self, most: int) -> Generator[Request, Answer, None]:
        """One round: the groups' EAs, the splice, its training.

        Args:
            most: rounds that there may be, with this one.
        """
        left = yield from remaining()
        rounds = self.rounds(left, most)
        snapshot = Candidate(next(self.ids), self.plan, "snapshot", self.parents, self.base)
        (evaluation,) = yield from evaluate([snapshot])
        self.whole, self.known = fitness_of(evaluation, self.options), {}
        bound = None if self.limit is None else self.share(self.limit, rounds)
        yield from self.evolve(snapshot, bound, rounds)
        if not self.known:
            return
        splice = self.splice(bound)
        if self.limit is not None and rounds == 1:
            splice = yield from self.landed(self.limit, splice)
        yield from self.tune(splice, rounds)

    def evolve(self, snapshot: Candidate, bound: float | None, rounds: int) -> Generator[Request, Answer, None]:
        """The EA of every group, one after the other; what they have found stays when the budget ends meanwhile."""
        ratio_bound, scores = self.bound_of_groups(bound), None
        options = _eager(self.options, ratio_bound)
        if options.informed and not options.paper_compat:
            scores = yield from self.saliency()
        parts = divided(self.problem, snapshot, self.ratio_bounds(ratio_bound), self.latency)
        for number, part in enumerate(parts):
            before = yield from remaining()
            effort = self.effort(before, rounds, len(parts) - number, len(parts))
            ea = Evolution(
                self.problem, options, self.ids, part, self.whole, None if scores is None else scores[part.name]
            )
            try:
                yield from ea.run(*effort)
            finally:
                self.take(part.name, ea.ranked)
            self.pace.note(before, (yield from remaining()))

    def take(self, name: str, ranked: list[Individual]) -> None:
        """Keep what the EA of a group has found; or leave the group alone for good, where that loses too much."""
        if not ranked:
            return
        drop = self.options.freeze_drop
        self.worth[name] = float(np.median([(self.whole - i.fitness) / i.removed for i in ranked]))
        if drop is not None and self.whole - max(i.fitness for i in ranked) > drop:
            self.active = [other for other in self.active if other != name]
        else:
            self.known[name] = ranked

    def splice(self, bound: float | None) -> Candidate:
        """The network with the chosen individuals of all groups.

        Args:
            bound: cost ratio that it should reach; None = the best of every group is taken, as by the authors.
        """
        chosen = {name: ranked[0] for name, ranked in self.known.items()}
        if self.limit is not None and bound is not None:
            chosen = _chosen(self.problem, replace(self.limit, bound=bound), self.plan, self.known, self.whole)
        kept = {name: np.array(self.plan.kept[name])[best.bits] for name, best in chosen.items()}
        parents = tuple(individual.id for individual in chosen.values()) or self.parents
        return Candidate(next(self.ids), self.plan.replace(kept), "splice", parents, self.base)

    def landed(self, limit: Limit, splice: Candidate) -> Generator[Request, Answer, Candidate]:
        """The splice at the target: groups by the fitness that their filters are worth, filters by their saliency."""
        scores = per_mean((yield from self.saliency()))
        typical = float(np.median([*self.worth.values()])) if self.worth else 1.0
        worth = {name: max(self.worth.get(name, typical), 1e-9) for name in scores}
        names = [n for n in self.names if n in self.active] or self.names
        ranking = {name: worth[name] * values for name, values in scores.items()}
        try:
            return (yield from land_on(self.problem, limit, splice, ranking, names=names))
        except SearchError:  # the groups that were left alone are needed after all
            return (yield from land_on(self.problem, limit, splice, ranking, names=self.names))

    def tune(self, splice: Candidate, rounds: int) -> Generator[Request, Answer, None]:
        """The spliced network fine-tuned, or as it is, with its latency; kept if it can be evaluated."""
        epochs = self.epochs((yield from remaining()), rounds)
        tuned = yield from _tune(splice, epochs)
        if tuned.evaluation.status != "ok":
            return
        self.plan, self.base, self.parents, self.known = splice.plan, tuned.base, (splice.id,), {}
        self.archive.append(Entry(replace(splice, base=tuned.base), tuned.evaluation))
        self.rescale(tuned.evaluation["latency_ratio"])

    def end(self) -> Generator[Request, Answer, None]:
        """What is unfinished, spliced and brought to the target, by the evaluation that is kept back for it."""
        if self.limit is None:
            return
        splice = yield from self.landed(self.limit, self.splice(self.limit.bound))
        (evaluation,) = yield from evaluate([splice], latency=True, last=True)
        if evaluation.status == "ok":
            self.archive.append(Entry(splice, evaluation))

    def saliency(self) -> Generator[Request, Answer, Mapping[str, FloatArray]]:
        """What ranks filters within a group: of all that the weights have."""
        if self._scores is None or self._scores[0] != self.base:
            plan = None if self.base == DENSE else self.plan
            self._scores = self.base, (yield from score(self.options.informed or "l1", self.base, plan))
        return self._scores[1]

    def rescale(self, measured: float) -> None:
        """Predicted savings from now on as they were measured to be."""
        if self.latency is None or math.isnan(measured):
            return
        predicted = float(self.latency(self.problem.space.encode(self.plan)[None])[0])
        if predicted >= 1 or measured >= 1:
            return
        scale, before = (1 - measured) / (1 - predicted), self.latency
        self.latency = lambda widths: 1 - scale * (1 - before(widths))
        if self.limit is not None and self.limit.name == "latency_ratio":
            macs, goal, latency = macs_ratios(self.problem), self.problem.goal, self.latency
            of_macs = 0.0 if goal.macs_ratio is None else self.limit.bound / goal.macs_ratio
            self.limit = replace(self.limit, ratios=lambda w: np.maximum(latency(w), of_macs * macs(w)))

    # -- how much of what ----------------------------------------------------------------------------------------------

    def rounds(self, left: Left, most: int) -> int:
        """Rounds yet to come: as many as the target needs and the budget lasts for, at least one."""
        if self.options.paper_compat:
            return most
        a_round = len(self.active) * (self.options.population * (1 + min(self.options.generations, LIVELY)) - 1) + 2
        lasting = self.evaluations(left, most) / a_round
        return max(1, int(min(most, lasting, self.rounds_needed(most))))

    def rounds_needed(self, most: int) -> int:
        """Rounds from here to the target, each with r of the cost left: coarse widths do not hasten them."""
        if self.limit is None:
            return most
        way, ratio_bound = (
            self.limit.bound / self.limit.of(self.problem.space.encode(self.plan)),
            self.options.ratio_bound,
        )
        if way >= 1 or ratio_bound == 0:
            return 1
        return most if ratio_bound == 1 else min(most, math.ceil(math.log(way) / math.log(ratio_bound) - 1e-9))

    def narrowest(self, widths: IntArray, ratio_bound: float) -> IntArray:
        """Widths that one round can come to."""
        space, result = self.problem.space, widths.copy()
        for name in self.active:
            column = space.names.index(name)
            result[column] = reach(space, name, int(widths[column]), ratio_bound)[1][0]
        return result

    def share(self, limit: Limit, rounds: int) -> float:
        """Cost ratio that a round is to reach: equal factors down to the target."""
        now = limit.of(self.problem.space.encode(self.plan))
        return max(limit.bound, now * (limit.bound / now) ** (1 / rounds)) if now > limit.bound else limit.bound

    def bound_of_groups(self, bound: float | None) -> float:
        """r, lowered as far as the round's share of the target needs."""
        ratio_bound = self.options.ratio_bound
        if self.limit is None or bound is None:
            return ratio_bound
        widths = self.problem.space.encode(self.plan)
        now = self.limit.of(widths)
        wanted = now - SLACK * (now - bound)
        while ratio_bound > 0 and self.limit.of(self.narrowest(widths, ratio_bound)) > wanted:
            ratio_bound = max(0.0, ratio_bound - 0.02)
        return ratio_bound

    def ratio_bounds(self, ratio_bound: float) -> dict[str, float]:
        """Group -> r of its own; the common one unless ``adaptive_bound`` is set."""
        if not self.options.adaptive_bound:
            return dict.fromkeys(self.active, ratio_bound)
        shares = _shares(self.problem, self.plan, self.active, self.latency)
        mean = sum(shares.values()) / len(shares)
        factors = {name: min(2.0, share / mean) if mean > 0 else 1.0 for name, share in shares.items()}
        return {name: max(0.0, 1 - factor * (1 - ratio_bound)) for name, factor in factors.items()}

    def epochs(self, left: Left, rounds: int) -> float:
        """Epochs of a round's training: all that are wanted, or as many as the budget lasts for; none below one."""
        wanted = self.options.finetune_epochs
        if self.options.paper_compat:
            return wanted
        affordable = left.trainable(TRAINING) / rounds
        return wanted if affordable >= wanted else affordable if affordable >= 1 else 0.0

    def evaluations(self, left: Left, rounds: int) -> float:
        """Evaluations that the budget lasts for, beside the trainings."""
        return self.pace.evaluations(left) * (1 - TRAINING if self.epochs(left, rounds) > 0 else 1)

    def effort(self, left: Left, rounds: int, groups: int, all_groups: int) -> tuple[int, int]:
        """Initial individuals and generations of the next EA: its part of what the budget lasts for.

        Args:
            groups: of the round, that are still to be searched.
            all_groups: of a round.
        """
        m, most = self.options.population, self.options.generations
        if self.options.paper_compat:
            return m - 1, most
        part = (self.evaluations(left, rounds) - 2 * rounds) / (groups + (rounds - 1) * all_groups)
        if not self.pace.known and min(left.work, left.seconds) < math.inf:
            part = min(part, 2 * m - 1)
        initial = int(np.clip(part, 1, max(1, m - 1)))
        return initial, round(float(np.clip((part - initial) / m, 0, most)))


def _eager(options: Options, ratio_bound: float) -> Options:
    """The options for a round whose r was lowered: individuals half-way to it, and mutations that reach it."""
    if ratio_bound >= options.ratio_bound:
        return options
    keep, rate = min(options.initial_keep, (1 + ratio_bound) / 2), max(options.mutation_rate, 1 - ratio_bound)
    return replace(options, initial_keep=keep, mutation_rate=rate)


@dataclass
class _Pace:
    """What an evaluation has cost, name of a limit -> amount; empty while it is not known."""

    costs: dict[str, float] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        return bool(self.costs)

    def note(self, before: Left, after: Left) -> None:
        """Learn from what was spent on evaluations."""
        spent = {name: after.spent[name] - before.spent[name] for name in after.spent}
        if spent.get("evaluations", 0) > 0 and spent.get("work", 0) > 0:
            self.costs = {name: spent[name] / spent["evaluations"] for name in ("work", "seconds")}

    def evaluations(self, left: Left) -> float:
        """How many more the budget lasts for."""
        lasting = [float(getattr(left, name)) / cost for name, cost in self.costs.items() if cost > 0]
        return min([left.evaluations, *lasting])


def _shares(problem: Problem, plan: PruningPlan, active: Sequence[str], latency: Ratios | None) -> dict[str, float]:
    """Cost that goes with each group alone when it falls to its smallest allowed width: its share of the network."""
    cost, space = latency or macs_ratios(problem), problem.space
    widths = np.repeat(space.encode(plan)[None], len(active) + 1, axis=0)
    for row, name in enumerate(active):
        widths[row, space.names.index(name)] = space.allowed[name][0]
    costs = cost(widths)
    return {name: max(0.0, float(costs[-1] - costs[row])) for row, name in enumerate(active)}


def _chosen(
    problem: Problem, limit: Limit, plan: PruningPlan, known: Mapping[str, list[Individual]], whole: float
) -> dict[str, Individual]:
    """Individuals that bring the network to a limit, or as near as they can; groups without one stay whole.

    One by one, the exchange that loses least fitness per cost saved, all groups' losses added (a knapsack's greedy
    solution); then back, where the limit allows, the most that was lost first.
    """
    space = problem.space
    fronts = {name: _front(ranked) for name, ranked in known.items()}
    chosen: dict[str, Individual] = {}
    widths = space.encode(plan)
    now = limit.of(widths)

    def lost(name: str) -> float:
        return whole - chosen[name].fitness if name in chosen else 0.0

    while now > limit.bound:
        moves = [
            (name, i)
            for name, front in fronts.items()
            for i in front
            if i.removed > (chosen[name].removed if name in chosen else 0)
        ]
        if not moves:
            break
        rows = np.concatenate([_with(space, widths, *move) for move in moves])
        saved = np.maximum(now - limit.ratios(rows), 1e-12)
        rates = np.array([whole - i.fitness - lost(name) for name, i in moves]) / saved
        best = int(np.lexsort((-saved, rates))[0])
        name, individual = moves[best]
        chosen[name], widths = individual, rows[best]
        now = limit.of(widths)
    for name in sorted(chosen, key=lost, reverse=True):
        wider = [i for i in fronts[name] if i.removed < chosen[name].removed and whole - i.fitness < lost(name)]
        for individual in sorted(wider, key=lambda i: -i.fitness):
            row = _with(space, widths, name, individual)
            if limit.of(row[0]) <= limit.bound:
                chosen[name], widths = individual, row[0]
                break
    return chosen


def _front(ranked: Sequence[Individual]) -> list[Individual]:
    """The fittest individual of every width."""
    best: dict[int, Individual] = {}
    for individual in ranked:
        rival = best.get(individual.removed)
        if rival is None or individual.fitness > rival.fitness:
            best[individual.removed] = individual
    return list(best.values())


def _with(space: SearchSpace, widths: IntArray, name: str, individual: Individual) -> IntArray:
    """The width vector with an individual in place of its group's, shape ``(1, groups)``."""
    row = widths.copy()
    row[space.names.index(name)] = int(individual.bits.sum())
    return row[None]


def _tune(splice: Candidate, epochs: float) -> Generator[Request, Answer, FineTuned]:
    """The spliced network fine-tuned; or as it is, with its latency, where no fine-tuning is wanted."""
    if epochs > 0:
        return (yield from fine_tune(splice, epochs))
    (evaluation,) = yield from evaluate([splice], latency=True)
    return FineTuned(splice.base, evaluation)


def _settled(problem: Problem, options: Options) -> Options:
    """The options with the search's metric where they name none.

    Raises:
        SearchError: the reference has no such metric.
    """
    options = replace(options, fitness=options.fitness or problem.metric)
    if math.isnan(problem.reference[options.fitness]):
        known = ", ".join(sorted(problem.reference.metrics))
        raise SearchError(f"fitness {options.fitness!r} is not a metric of this workload; it has {known}")
    return options
