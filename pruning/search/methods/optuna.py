"""Optuna: any of its samplers over the keep ratios of groups, or of blocks of groups.

Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework" (KDD 2019, arXiv 1907.10902). It is told
the reward. The default sampler, TPE, draws where good plans are dense and bad ones are rare (Bergstra et al., NeurIPS
2011). It is a yardstick for the methods made for pruning: what a general optimiser finds with as many evaluations.

Our choices: with a target, what is sampled is a *profile*, keep ratios relative to each other, and the plan is the
largest multiple of it within the target, filled up with the channels worth most, so that every evaluation is spent at
the target and all plans compare. Latency predictions are corrected by the mean difference of the plans measured so far.
The first plan is the best uniform one that was measured, or keeps the same share of every group. A plan met again is
not evaluated again; its reward is told once more.

Least budget: 1 evaluation.
"""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from secateur.device_profiles.wording import command
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.landing import per_mean, settle
from secateur.pruning.search.protocol import (
    BudgetSpent,
    Candidate,
    Evaluation,
    FloatArray,
    Goal,
    Problem,
    Strategy,
)
from secateur.pruning.search.support import (
    Limit,
    SearchError,
    best_first,
    bisect,
    check_ranges,
    evaluate,
    limit_of,
    score,
)

SAMPLERS: dict[str, tuple[str, Mapping[str, object]]] = {
    "tpe": ("TPESampler", {}),
    "random": ("RandomSampler", {}),
    "cmaes": ("CmaEsSampler", {"warn_independent_sampling": False}),
    "nsga2": ("NSGAIISampler", {"population_size": 10}),
    "nsga3": ("NSGAIIISampler", {"population_size": 10}),
    "gp": ("GPSampler", {"deterministic_objective": True, "warn_independent_sampling": False}),
    "qmc": (
        "QMCSampler",
        {"scramble": True, "warn_independent_sampling": False, "warn_asynchronous_seeding": False},
    ),
}
"""Name -> Optuna's class and our defaults for its arguments (Optuna's populations of 50 are for longer searches).

Optuna itself is imported when a search begins: a run file is checked without it."""

NEEDS = {"cmaes": "cmaes", "gp": "torch"}
"""Packages that a sampler needs and Optuna does not bring."""


@dataclass(frozen=True)
class Options:
    """Options of the Optuna search.

    Args:
        num_plans: plans to evaluate (our choice).
        sampler: ``tpe``, ``random``, ``cmaes`` (needs the package cmaes), ``nsga2``, ``nsga3``, ``gp`` or ``qmc``.
        sampler_options: arguments of Optuna's sampler (``{n_startup_trials: 20}`` ...).
        blocks: the groups are split into so many runs of neighbours, each with one keep ratio; None = every group has
            its own.
        saliency: which channels stay: a criterion that ranks them.
        batch: plans asked for in one request; the sampler learns of all of them at once.
        max_repeats: proposals in a row that lead to plans met before, after which the search ends.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    num_plans: int = 100
    sampler: str = "tpe"
    sampler_options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    blocks: int | None = None
    saliency: str = "l1"
    batch: int = 1
    max_repeats: int = 30

    def __post_init__(self) -> None:
        counts = ("num_plans", "blocks", "batch", "max_repeats")
        check_ranges(self, **dict.fromkeys(counts, (1.0, math.inf)))
        if self.sampler not in SAMPLERS:
            close = difflib.get_close_matches(self.sampler, SAMPLERS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown sampler {self.sampler!r}{hint} Known samplers: {', '.join(sorted(SAMPLERS))}")
        if not self.sampler_options:
            return
        known = sorted(inspect.signature(_sampler(self.sampler)).parameters.keys() - {"seed"})
        if unknown := sorted(self.sampler_options.keys() - set(known)):
            raise ValueError(f"sampler {self.sampler!r} has no options {unknown}; it has {known}")


def search(problem: Problem, options: Options) -> Strategy:
    """Ask, evaluate with latency, tell; best reward first.

    Raises:
        SearchError: the target is out of reach, the sampler needs a package that is missing, or nothing was evaluated.
    """
    needed = NEEDS.get(options.sampler)
    if needed and find_spec(needed) is None:
        raise SearchError(
            f"sampler {options.sampler!r} needs the package {needed}: {command('pip', 'install', needed)}"
        )
    limit = None if problem.goal == Goal() else (yield from limit_of(problem))
    saliency = yield from score(options.saliency)
    blocks = blocks_of(problem.space, options.blocks)
    ratios = _distributions(problem.space, blocks)
    study = _study(options, int(problem.rng.integers(2**31)), ratios, _profile_of(problem, blocks, ratios))
    candidates: list[Candidate] = []
    evaluations: list[Evaluation] = []
    rewards: dict[str, float] = {}
    misses: list[float] = []
    repeats = 0
    while len(candidates) < options.num_plans and repeats < options.max_repeats:
        within = None if limit is None else _tightened(problem, limit, misses)
        asked: list[tuple[Any, str]] = []
        fresh: dict[str, Candidate] = {}
        for _ in range(min(options.batch, options.num_plans - len(candidates))):
            with quiet():
                trial = study.ask(ratios)
            profile = [trial.params[block] for block in blocks]
            plan = planned(problem, profile, within, saliency)
            asked.append((trial, plan.digest))
            if plan.digest not in rewards:
                fresh.setdefault(plan.digest, Candidate(len(candidates) + len(fresh), plan, options.sampler))
        if fresh:
            try:
                answers = yield from evaluate([*fresh.values()], latency=True)
            except BudgetSpent:
                candidates.append(next(iter(fresh.values())))
                evaluations += yield from evaluate(candidates[-1:], latency=True, last=True)
                rewards[candidates[-1].plan.digest] = _reward(problem, evaluations[-1])
                break
            rewards |= {digest: _reward(problem, e) for digest, e in zip(fresh, answers, strict=True)}
            candidates += fresh.values()
            evaluations += answers
            misses += [] if limit is None else _misses(problem, limit, [*fresh.values()], answers)
        repeats = 0 if fresh else repeats + len(asked)
        for trial, digest in asked:
            with quiet():
                _tell(study, trial, rewards[digest])
    usable = [i for i, c in enumerate(candidates) if math.isfinite(rewards[c.plan.digest])] or range(len(candidates))
    return best_first(problem, [candidates[i] for i in usable], [evaluations[i] for i in usable])


def rehearse(problem: Problem, options: Options) -> Strategy:
    """As many random plans within the target: what a search will ask for, without the engine.

    Raises:
        SearchError: the target is out of reach.
    """
    limit = None if problem.goal == Goal() else (yield from limit_of(problem))
    saliency = yield from score(options.saliency)
    candidates: list[Candidate] = []
    evaluations: list[Evaluation] = []
    while len(candidates) < options.num_plans:
        fresh = []
        for i in range(len(candidates), min(len(candidates) + options.batch, options.num_plans)):
            profile = (1.0 - 0.9 * problem.rng.random(len(problem.space.names))).tolist()
            fresh.append(Candidate(i, planned(problem, profile, limit, saliency), options.sampler))
        try:
            evaluations += yield from evaluate(fresh, latency=True)
            candidates += fresh
        except BudgetSpent:
            candidates.append(fresh[0])
            evaluations += yield from evaluate(fresh[:1], latency=True, last=True)
            break
    return best_first(problem, candidates, evaluations)


def blocks_of(space: SearchSpace, blocks: int | None) -> list[str]:
    """Per group the first group of its block, shape ``(groups,)``; blocks are runs of neighbours, nearly equally long.

    With as many blocks as groups, or more, every group is its own.
    """
    names, number = space.names, len(space.names)
    starts = np.arange(number) * min(blocks or number, number) // number
    return [names[int(np.flatnonzero(starts == start)[0])] for start in starts]


def planned(
    problem: Problem, profile: Sequence[float], limit: Limit | None, saliency: Mapping[str, FloatArray]
) -> PruningPlan:
    """The plan of a profile: its largest multiple within the limit, filled up with the best channels that still fit."""
    plan = problem.space.decode(fitted(problem.space, profile, limit), saliency)
    return plan if limit is None else settle(problem, limit, plan, per_mean(saliency), per_cost=False).plan


def fitted(space: SearchSpace, profile: Sequence[float], limit: Limit | None) -> list[int]:
    """Allowed widths, shape ``(groups,)``, of the largest multiple of a profile within the limit; none: as it is.

    Args:
        profile: keep ratio per group, shape ``(groups,)``, positive.
    """

    def widths(scale: float) -> list[int]:
        ratios = zip(space.names, profile, strict=True)
        return [space.snap(name, min(1.0, scale * ratio) * space.sizes[name]) for name, ratio in ratios]

    if limit is None:
        return widths(1.0)
    whole = 1 / min(profile)  # and 0 is the smallest plan of the space, which meets the limit
    return widths(bisect(limit, widths, meets=0.0, fails=whole))


def _sampler(name: str) -> Callable[..., Any]:
    """Optuna's class for a sampler."""
    import optuna

    found: Callable[..., Any] = getattr(optuna.samplers, SAMPLERS[name][0])
    return found


def _distributions(space: SearchSpace, blocks: Sequence[str]) -> dict[str, Any]:
    """Per block the keep ratios to draw from: from the smallest allowed one of its groups to 1."""
    import optuna

    least: dict[str, float] = {}
    for name, block in zip(space.names, blocks, strict=True):
        least[block] = min(least.get(block, 1.0), space.allowed[name][0] / space.sizes[name])
    return {block: optuna.distributions.FloatDistribution(low, 1.0) for block, low in least.items()}


def _profile_of(problem: Problem, blocks: Sequence[str], ratios: Mapping[str, Any]) -> dict[str, float]:
    """Keep ratios to begin with, per block: of ``Problem.start``, the largest made 1; else the uniform profile."""
    space, start = problem.space, problem.start
    if start is None:
        return dict.fromkeys(ratios, 1.0)
    kept = {name: len(start.kept[name]) / space.sizes[name] for name in space.names}
    most = max(kept.values())
    return {block: min(1.0, max(ratios[block].low, kept[block] / most)) for block in blocks}


def _study(options: Options, seed: int, ratios: Mapping[str, Any], first: Mapping[str, float]) -> Any:
    """A study in memory.

    Args:
        first: the profile of its first trial.
    """
    import optuna

    sampler, defaults = _sampler(options.sampler), SAMPLERS[options.sampler][1]
    with quiet():
        study = optuna.create_study(
            sampler=sampler(**{**defaults, **options.sampler_options, "seed": seed}),
            study_name="secateur",
            direction="maximize",
        )
        study.enqueue_trial(dict(first))
    return study


def _tell(study: Any, trial: Any, reward: float) -> None:
    import optuna

    if math.isfinite(reward):
        study.tell(trial, reward)
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _reward(problem: Problem, evaluation: Evaluation) -> float:
    """The reward, NaN for what could not be evaluated."""
    return problem.reward(evaluation) if evaluation.status == "ok" else math.nan


def _tightened(problem: Problem, limit: Limit, misses: Sequence[float]) -> Limit:
    """The limit less the mean miss of the predictions, never below the smallest plan of the space.

    With a MACs target as well it is never raised, since its cost is then not latency alone.
    """
    smallest = limit.of(problem.space.encode(problem.space.smallest()))
    miss = float(np.mean(misses or [0.0]))
    bound = limit.bound - (miss if problem.goal.macs_ratio is None else max(0.0, miss))
    return Limit(limit.name, limit.ratios, max(smallest, bound))


def _misses(
    problem: Problem, limit: Limit, candidates: Sequence[Candidate], evaluations: Sequence[Evaluation]
) -> list[float]:
    """Measured less predicted latency ratios; MACs are never missed."""
    if problem.goal.latency_ratio is None:
        return []
    pairs = zip(candidates, evaluations, strict=True)
    misses = [e["latency_ratio"] - limit.of(problem.space.encode(c.plan)) for c, e in pairs]
    return [miss for miss in misses if math.isfinite(miss)]


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing meanwhile: neither of its trials nor that a sampler is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
