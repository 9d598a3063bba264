"""Evolution of width vectors on a supernet: what MetaPruning and Rewarded meta-pruning share.

A width vector is a NEV (network encoding vector): per group an index on the scale 0.10, 0.13, ... 1.00, moved to the
nearest allowed width before any cost is computed (3.2). Stage A trains one network for all widths (3.3); stage B
evolves NEVs inside a window below the target, scored with that network's weights and no fine-tuning (3.4); stage C,
the training of the best, is the run's fine-tuning of the archive (3.5).

Not a method itself: ``meta`` and ``rewarded_meta`` differ in the fitness they pass to ``evolve``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from secateur.pruning.plan import IntArray, PruningPlan, SearchSpace
from secateur.pruning.search.landing import per_mean, settle
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    Answer,
    BudgetSpent,
    Candidate,
    Entry,
    Evaluation,
    FloatArray,
    Goal,
    Left,
    Problem,
    Request,
    Strategy,
)
from secateur.pruning.search.support import (
    Limit,
    SearchError,
    check_ranges,
    evaluate,
    fine_tune,
    limit_of,
    remaining,
    score,
    time_plans,
    train_auxiliary,
)

SCALES: FloatArray = np.round(np.linspace(0.10, 1.00, 31), 2)
"""Keep ratio of each gene (3.2)."""
SPREAD = 6
"""Paper: initial genes of ResNet-50 come from [12, 24), so that random networks fall near the window."""
TRIES = 20
"""Mutants and children drawn per one wanted, before random vectors fill their places (our choice)."""
CHECKED = 8
"""Plans timed to correct the predicted latency, before the search (our choice)."""
MORE = 3
"""Times ``top`` candidates that are looked at while none measures within the latency target (our choice)."""
CHUNK = 64
"""Vectors drawn at once; part of what a seed finds."""
STAGE_A = 0.5
"""Share of the budget that stage A may spend, so that there is something left to search with (our choice)."""
LEAST_EPOCHS = 0.02
"""A supernet trained for less is worse than the pretrained network; then none is trained (our choice)."""
FINALS = 0.05
"""Share of the budget that is kept for the final pick (our choice)."""

Proposal = Callable[[int], tuple[IntArray, IntArray]]
"""A number of NEVs -> those, shape ``(number, groups)``, and the ids of their parents, shape ``(number, parents)``."""
Fitness = Callable[[Sequence[Evaluation]], Sequence[float]]
"""Evaluations of all candidates so far -> their fitness, higher = better; NaN and -inf = not worth keeping."""


@dataclass(frozen=True)
class Settings:
    """What both methods let a user set; their ``Options`` say what it means."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    weights: Literal["pruning_net", "shared"] | None = None
    epochs: float | None = None
    lr: float | None = None
    hidden: int = 32
    start: Literal["pretrained", "random"] | None = None
    iterations: int = 10
    population: int = 20
    parents: int = 5
    mutant_share: float = 0.5
    crossover_share: float = 0.5
    mutation_rate: float = 0.1
    step: float = 5.0
    tolerance: float = 0.05
    max_draws: int = 10_000
    top: int = 10
    pick_epochs: float = 0
    retrain: Literal["supernet", "inherit", "scratch"] | None = None
    paper_compat: bool = False

    def __post_init__(self) -> None:
        names = ("hidden", "iterations", "population", "parents", "max_draws", "top")
        shares = ("mutant_share", "crossover_share", "mutation_rate", "tolerance")
        ranges = dict.fromkeys(names, (1.0, math.inf)) | dict.fromkeys(shares, (0.0, 1.0))
        check_ranges(
            self, **ranges, epochs=(0, math.inf), lr=(1e-12, math.inf), step=(0.1, 30), pick_epochs=(0, math.inf)
        )
        if self.mutant_share + self.crossover_share > 1:
            raise ValueError(
                "mutant_share + crossover_share must not exceed 1 (the rest of the population is random), got "
                f"{self.mutant_share} + {self.crossover_share}"
            )
        if self.retrain == "inherit" and not self.pretrained:
            raise ValueError(
                "retrain 'inherit' needs start 'pretrained': a supernet that began with random weights says nothing "
                "about which channels of the pretrained network to keep; leave retrain out, or set it to 'scratch'"
            )
        if self.epochs == 0 and not (self.pretrained and self.source == "shared"):
            raise ValueError(
                "epochs 0 (no supernet training) means that candidates are cut from the pretrained network: it needs "
                "weights 'shared' and start 'pretrained'"
            )

    @property
    def pretrained(self) -> bool:
        """Whether stage A begins with the pretrained network (paper: random weights)."""
        return self.start == "pretrained" if self.start else not self.paper_compat

    @property
    def source(self) -> str:
        """Where a supernet's weights come from (paper: generators)."""
        return self.weights or ("pruning_net" if self.paper_compat else "shared")

    def epochs_within(self, left: Left) -> float:
        """Epochs of stage A, at most those that its share of the budget pays for; 0 = none are worth it.

        Paper: 32 (ResNet-50); ours 10. Only a supernet that begins with pretrained weights can be left untrained.
        """
        wanted = self.epochs if self.epochs is not None else 32.0 if self.paper_compat else 10.0
        afforded = wanted if self.paper_compat else min(wanted, left.trainable(STAGE_A))
        return afforded if afforded >= LEAST_EPOCHS or not self.pretrained else 0.0

    def retrained_from(self, supernet: str) -> str:
        """Base of stage C: the supernet's weights (ours), the pretrained network's, or random ones (paper)."""
        chosen = self.retrain or ("supernet" if self.pretrained else "scratch")
        return {"supernet": supernet, "inherit": DENSE, "scratch": RANDOM}[chosen]


def evolve(
    problem: Problem, settings: Settings, fitness_of: Callable[[Evaluation], Fitness], *, latency: bool = False
) -> Strategy:
    """Stages A and B, and the pick for stage C.

    Stage A spends at most half of the budget; where that ends, the best candidates found so far are the archive.

    Args:
        fitness_of: the unpruned network with the supernet's weights -> how candidates are ranked.
        latency: time every candidate on the device, not only the last ones.

    Raises:
        SearchError: the target is out of reach, the window rejects every draw, or nothing could be evaluated.
        BudgetSpent: the budget ends before any candidate is evaluated.
    """
    draws = yield from Draws.of(problem, settings)
    births = draws.first(settings.population)  # before stage A: an empty window costs no training
    supernet = yield from stage_a(problem, settings, draws.table)
    fitness, ids, pool = fitness_of(supernet.whole), count(), Pool()
    try:
        for _ in range(settings.iterations):
            candidates = [
                Candidate(
                    next(ids), supernet.plan(problem.space, draws.widths(b.nev)), b.origin, b.parents, supernet.base
                )
                for b in births
            ]
            pool.add(births, candidates, (yield from evaluate(candidates, latency=latency)))
            if (yield from remaining()).share < FINALS:
                break
            births = draws.next_generation(pool.best(fitness, settings.parents), settings)
            if not births:  # every width vector of the window is known
                break
    except BudgetSpent:
        if not pool.best(fitness, 1):
            raise

    def brought(candidate: Candidate) -> Candidate:
        """A final candidate as near to a MACs target as the widths come; the paper takes what lies in its window.

        A predicted latency is left in its window: nearer to the target, every other plan would measure above it.
        """
        if draws.limit is None or draws.limit.name != "macs_ratio" or settings.paper_compat:
            return candidate
        settled = settle(problem, draws.limit, candidate.plan, supernet.worth)
        return replace(candidate, plan=settled.plan, projected_share=settled.projected_share)

    start = settings.retrained_from(supernet.base)
    return (yield from pick(problem, settings, ids, pool.best(fitness, None), start, brought, measured=latency))


@dataclass(frozen=True, eq=False)
class Supernet:
    """What stage A leaves.

    Args:
        base: its weights.
        order: group -> shape ``(size,)``; the channels that score highest stay at a width.
        whole: the unpruned network with these weights.
    """

    base: str
    order: Mapping[str, FloatArray]
    whole: Evaluation

    def plan(self, space: SearchSpace, widths: IntArray) -> PruningPlan:
        return space.decode(widths.tolist(), self.order)

    @property
    def worth(self) -> Mapping[str, FloatArray]:
        """The order as a saliency >= 0 that groups can be compared by: scores, or the places of leading channels."""
        positive = {name: order - min(0.0, float(order.min())) for name, order in self.order.items()}
        return per_mean(positive)


def stage_a(problem: Problem, settings: Settings, table: Sequence[IntArray]) -> Generator[Request, Answer, Supernet]:
    """Stage A (3.3): one training whose weights serve every width vector; none where ``epochs`` is 0.

    Where the budget allows next to none, candidates are cut from the pretrained network.

    Raises:
        SearchError: the training failed.
    """
    epochs = settings.epochs_within((yield from remaining()))
    if epochs == 0:
        return Supernet(DENSE, (yield from score("l1")), problem.reference)
    space = problem.space
    widths = {name: sorted(set(column.tolist())) for name, column in zip(space.names, table, strict=True)}
    options: dict[str, float | str] = {
        "widths": json.dumps(widths, separators=(",", ":")),
        "order": "l1" if settings.pretrained else "leading",
    }
    if settings.lr is not None:
        options["lr"] = settings.lr
    if settings.source == "pruning_net":
        options["hidden"] = settings.hidden
    base = DENSE if settings.pretrained else RANDOM
    learned = yield from train_auxiliary(settings.source, epochs, base, **options)
    if learned.evaluation.status == "failed":
        raise SearchError(f"the supernet could not be trained: {learned.evaluation.reason}")
    leading = {name: -np.arange(size, dtype=np.float64) for name, size in space.full.sizes.items()}
    return Supernet(learned.base, learned.scores or leading, learned.evaluation)


@dataclass(frozen=True, eq=False)
class Birth:
    """A NEV to be evaluated, shape ``(groups,)``, and how it came about."""

    nev: IntArray
    origin: str
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Member:
    """An evaluated NEV."""

    nev: IntArray
    candidate: Candidate
    evaluation: Evaluation


@dataclass(eq=False)
class Pool:
    """Everything evaluated so far. The paper keeps a running top 50; its best are the best of all."""

    members: list[Member] = field(default_factory=list)

    def add(self, births: Sequence[Birth], candidates: Sequence[Candidate], evaluations: Sequence[Evaluation]) -> None:
        born = zip(births, candidates, evaluations, strict=True)
        self.members += [Member(birth.nev, candidate, evaluation) for birth, candidate, evaluation in born]

    def best(self, fitness: Fitness, num: int | None) -> list[Member]:
        """The ``num`` fittest of those that could be evaluated, best first (ties: asked first); None = all."""
        alive = [m for m in self.members if m.evaluation.status == "ok"]
        values = np.array(fitness([m.evaluation for m in alive]), dtype=np.float64)
        order = np.argsort(-values, kind="stable")
        return [alive[i] for i in order if values[i] > -math.inf][:num]


@dataclass(eq=False)
class Draws:
    """Draws NEVs that are new and lie in the window (3.4): duplicates and others are rejected and redrawn.

    Two NEVs with the same widths are duplicates: they are the same network.

    Args:
        table: per group, shape ``(31,)``: the allowed width of each gene.
        limit: cost and target; None = no window.
        lowest: the smallest cost ratio in the window.
        centre: the gene that, in all groups, comes closest to the target from below (30 without a target).
        known: width vectors drawn before, or rejected.
        costs: of the vectors that the window rejected: number, smallest and largest.
    """

    rng: np.random.Generator
    table: list[IntArray]
    max_draws: int
    paper_compat: bool
    limit: Limit | None = None
    lowest: float = 0.0
    centre: int = 30
    known: set[bytes] = field(default_factory=set)
    costs: tuple[int, float, float] = (0, math.inf, -math.inf)

    @classmethod
    def of(cls, problem: Problem, settings: Settings) -> Generator[Request, Answer, Draws]:
        """The space and the window of a problem; a predicted latency is checked against a few measured plans.

        Raises:
            SearchError: the target is out of reach, of the space or of the 31 scales.
        """
        space, compat = problem.space, settings.paper_compat
        table = [_column(space, name, compat) for name in space.names]
        draws = cls(problem.rng, table, settings.max_draws, compat)
        if problem.goal != Goal():
            limit = yield from limit_of(problem)
            draws._enter(limit, settings)
            if limit.name == "latency_ratio":
                draws._enter((yield from corrected(problem, draws, limit)), settings)
        return draws

    def _enter(self, limit: Limit, settings: Settings) -> None:
        """Set the window ``[target * (1 - tolerance), target]``."""
        uniform = limit.ratios(np.stack(self.table, axis=1))
        within = np.flatnonzero(uniform <= limit.bound)
        if len(within) == 0:
            raise SearchError(
                f"{limit.name} {limit.bound:g} is out of reach of the 31 scales: with every keep ratio at "
                f"{SCALES[0]:g} it is {uniform[0]:.3f}. Raise the target, lower min_keep_ratio or the channel "
                "multiple, or freeze fewer groups."
            )
        self.limit, self.centre, self.lowest = limit, int(within[-1]), limit.bound * (1 - settings.tolerance)
        self.known.clear()

    def first(self, num: int) -> list[Birth]:
        """The first population (``random``).

        Where widths are so coarse that the window is empty, it is made to begin at the uniform plan (our choice).

        Raises:
            SearchError: ``paper_compat``, and the window rejects every draw; says what was drawn.
        """
        births = self.random(num, "init")
        if births or self.limit is None:
            return births
        if self.paper_compat:
            raise SearchError(self.complaint(self.limit))
        self.lowest = self.limit.of(self.widths(np.full(len(self.table), self.centre)))
        self.known.clear()
        return self.random(num, "init")

    def widths(self, nevs: IntArray) -> IntArray:
        """Width vectors of NEVs, shape ``(..., groups) -> (..., groups)``."""
        return np.stack([column[nevs[..., g]] for g, column in enumerate(self.table)], axis=-1)

    def accepted(self, origin: str, propose: Proposal, num: int, tries: int) -> list[Birth]:
        """Up to ``num`` proposed NEVs that are new and in the window, from ``tries`` proposals at most."""
        births: list[Birth] = []
        for start in range(0, tries, CHUNK):
            if len(births) == num:
                break
            nevs, parents = propose(min(CHUNK, tries - start))
            widths = self.widths(nevs)
            fresh = {row.tobytes(): i for i, row in reversed([*enumerate(widths)]) if row.tobytes() not in self.known}
            rows = sorted(fresh.values())
            for i, fits in zip(rows, self._inside(widths[rows]), strict=True):
                if len(births) == num:
                    break
                self.known.add(widths[i].tobytes())
                if fits:
                    births.append(Birth(nevs[i], origin, tuple(sorted(parents[i].tolist()))))
        return births

    def _inside(self, widths: IntArray) -> npt.NDArray[np.bool_]:
        """Which width vectors lie in the window, shape ``(plans, groups) -> (plans,)``."""
        if self.limit is None or len(widths) == 0:
            return np.ones(len(widths), dtype=bool)
        costs = self.limit.ratios(widths)
        inside: npt.NDArray[np.bool_] = (costs >= self.lowest - 1e-12) & (costs <= self.limit.bound)
        rejected = costs[~inside]
        if len(rejected):
            drawn, low, high = self.costs
            self.costs = drawn + len(rejected), min(low, float(rejected.min())), max(high, float(rejected.max()))
        return inside

    def random(self, num: int, origin: str = "random") -> list[Birth]:
        """Random NEVs: genes uniform around the scale that meets the target everywhere.

        The authors draw each gene from 12 scales around it; ours are ``centre`` +- a spread that each vector draws,
        so that vectors of unequal widths come up as well; the first one has none: it is the uniform plan.
        """

        def propose(number: int) -> tuple[IntArray, IntArray]:
            spread = self.rng.integers(0, 31, (number, 1))
            spread[0] = 0
            low, high = self.centre - spread, self.centre + spread + 1
            if self.paper_compat:
                low[:], high[:] = self.centre - SPREAD, self.centre + SPREAD
            if self.limit is None:
                low[:], high[:] = 0, 31
            nevs = self.rng.integers(np.maximum(low, 0), np.minimum(high, 31), (number, len(self.table)))
            return nevs, np.zeros((number, 0), dtype=np.int64)

        return self.accepted(origin, propose, num, self.max_draws)

    def next_generation(self, parents: Sequence[Member], settings: Settings) -> list[Birth]:
        """Mutants, uniform-crossover children of two distinct parents, the rest random (3.4)."""
        num, births = settings.population, []
        if parents:
            births += self.mutants(parents, int(settings.mutant_share * num + 1e-9), settings)
        if len(parents) > 1:
            births += self.children(parents, int(settings.crossover_share * num + 1e-9))
        return births + self.random(num - len(births))

    def mutants(self, parents: Sequence[Member], num: int, settings: Settings) -> list[Birth]:
        """Each gene moves with the mutation rate: (g + U{1..30}) mod 31 in the paper; by default a bounded step."""
        rng, (nevs, ids) = self.rng, _stacked(parents)

        def propose(number: int) -> tuple[IntArray, IntArray]:
            chosen = rng.integers(len(parents), size=number)
            old = nevs[chosen]
            moved = rng.random(old.shape) < settings.mutation_rate
            if self.paper_compat:
                new = (old + rng.integers(1, 31, old.shape)) % 31
            else:
                size = np.maximum(1, np.rint(np.abs(rng.normal(0, settings.step, old.shape)))).astype(np.int64)
                new = np.clip(old + rng.choice(np.array([-1, 1]), old.shape) * size, 0, 30)
            return np.where(moved, new, old), ids[chosen, None]

        return self.accepted("mutation", propose, num, TRIES * num)

    def children(self, parents: Sequence[Member], num: int) -> list[Birth]:
        """Each gene from either of two distinct parents."""
        rng, (nevs, ids) = self.rng, _stacked(parents)

        def propose(number: int) -> tuple[IntArray, IntArray]:
            pairs = np.array([rng.choice(len(parents), 2, replace=False) for _ in range(number)])
            first, second = nevs[pairs[:, 0]], nevs[pairs[:, 1]]
            return np.where(rng.random(first.shape) < 0.5, first, second), ids[pairs]

        return self.accepted("crossover", propose, num, TRIES * num)

    def complaint(self, limit: Limit) -> str:
        """Why the window rejected every draw, and what to do."""
        drawn, low, high = self.costs
        return (
            f"none of {drawn} random width vectors has a {limit.name} of {self.lowest:.3f}..{limit.bound:.3f}; they "
            f"had {low:.3f}..{high:.3f}. Widen tolerance, move the target into that range, narrow the space "
            "(min_keep_ratio), or raise max_draws."
        )


def _stacked(parents: Sequence[Member]) -> tuple[IntArray, IntArray]:
    """NEVs of members, shape ``(members, groups)``, and their candidates' ids, shape ``(members,)``."""
    return np.stack([m.nev for m in parents]), np.array([m.candidate.id for m in parents], dtype=np.int64)


def _column(space: SearchSpace, name: str, paper_compat: bool) -> IntArray:
    """Shape ``(31,)``: the allowed width of each gene (paper: the integer below, then the nearest allowed)."""
    sizes = SCALES * space.sizes[name]
    wanted = np.floor(sizes + 1e-9) if paper_compat else sizes
    return np.array([space.snap(name, float(w)) for w in wanted], dtype=np.int64)


def corrected(problem: Problem, draws: Draws, limit: Limit) -> Generator[Request, Answer, Limit]:
    """The limit with its predicted latency moved by the median error on a few plans of the window (3.9).

    With a MACs target as well the prediction is only made larger: the MACs in it are exact.
    """
    widths = draws.widths(np.stack([birth.nev for birth in draws.first(CHECKED)]))
    names = problem.space.names
    plans = [problem.space.full.replace({n: range(int(w)) for n, w in zip(names, row, strict=True)}) for row in widths]
    error = float(np.median((yield from time_plans(plans)) - limit.ratios(widths)))
    if problem.goal.macs_ratio is not None:
        error = max(0.0, error)
    return replace(limit, ratios=lambda w: limit.ratios(w) + error)


def pick(
    problem: Problem,
    settings: Settings,
    ids: count[int],
    ranked: Sequence[Member],
    start: str,
    brought: Callable[[Candidate], Candidate],
    *,
    measured: bool,
) -> Strategy:
    """The final pick (3.8): the fittest, brought to the target and evaluated there with their latency.

    While a latency target is set and none of them measures within, up to ``MORE`` times as many follow. With
    ``pick_epochs`` each is trained that long from where stage C begins (the specification: a tenth of its epochs).

    Args:
        start: the weights that stage C begins with.
        brought: a candidate -> the same, at the target.
        measured: the latencies of ``ranked`` are known, and stand.

    Raises:
        SearchError: ``ranked`` is empty.
    """
    if not ranked:
        raise SearchError(
            "no candidate could be evaluated; the reasons are in the journal. Check search.images, memory_mb and "
            "seconds_per_candidate, or train the supernet longer or with a smaller lr."
        )
    target, top = problem.goal, settings.top
    archive: list[Entry] = []
    if measured:
        ranked = [m for m in ranked if target.met(m.evaluation, problem.reference)] or ranked
    first = tuple(_entry(start, m.candidate, m.evaluation) for m in ranked[:top])
    if measured and not settings.pick_epochs:
        return first
    try:
        for member in ranked:
            met = any(target.met(entry.evaluation, problem.reference) for entry in archive)
            if len(archive) >= (top if met or target.latency_ratio is None else MORE * top):
                break
            candidate = brought(member.candidate)
            candidate = replace(candidate, id=next(ids), origin="final", parents=(member.candidate.id,))
            if settings.pick_epochs:
                candidate = replace(candidate, base=start)
                evaluation = (yield from fine_tune(candidate, settings.pick_epochs)).evaluation
            else:
                (evaluation,) = yield from evaluate([candidate], latency=True)
            if evaluation.status == "ok" and not math.isnan(evaluation[problem.metric]):
                archive.append(_entry(start, candidate, evaluation))
    except BudgetSpent:  # what was found is worth more than what there is no budget left to look at again
        pass
    return tuple(archive) or first


def _entry(start: str, candidate: Candidate, evaluation: Evaluation) -> Entry:
    """A plan as stage C begins with it."""
    return Entry(replace(candidate, base=start), evaluation)
