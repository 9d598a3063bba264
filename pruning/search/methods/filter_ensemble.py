"""Linear filter ensembles: the loss under random masks, regressed on the masks, says what each channel is worth.

Sándor, Pável, Csató, "Pruning CNN's with Linear Filter Ensembles" (ECAI 2020, arXiv 2001.08142). The importance of a
filter is the change of the empirical loss by its presence or absence. Leaving out one filter at a time is costly and
blind to company, so random sets of filters (ensembles) are masked, the loss is fitted by a linear model of the masks,
and the filters with the smallest coefficients go::

    repeat for a few rounds:
        losses <- mean loss of the network under N random masks
        loss(mask) ~ b + sum_k beta_k [k removed]
        remove the filters of least beta, a part of the way to the target; fine-tune

Only the abstract could be read; what follows is our design.

*Sampling.* A mask keeps each filter with probability p. ``stratified`` (default) removes ``ceil((1 - p) n)`` of the n
filters of every group on average: were it always as many, the columns of a group would add up to a constant and no
regression could tell the level of one group from another's, so the number runs evenly over 0 .. twice that.
``antithetic`` follows each such mask with one whose removed filters are others; ``bernoulli`` draws every filter alone;
``layerwise`` removes from one group at a time, or from none (unbiased inside it, but every group needs masks of its
own). All masks see the same images. There is always one channel left in a group.

*Regression.* Ridge with the penalty of least generalised cross-validation (GCV) error, and standard errors. 2 masks per
filter are drawn, then 1 more at a time until the median standard error is below a quarter of the distance between the
25 % and the 50 % quantile of beta, up to 8. Every tenth mask is held out of a first fit; where that fit explains less
than 0.3 of their variance (R2), too much was removed for effects to add up: 1 - p is halved and the masks are drawn
anew, up to three times.

*Rounds.* What a channel is worth changes with its company, so the way to the target is gone in ``rounds`` of equal
factors of the cost, each with masks of its own on the network as it is by then. A round cuts by the in-order knapsack,
which keeps the most beta under the cost (or by ``ranking``: the least ``beta / cost^gamma`` goes first), bounded per
group and near to an even cut (``spread``: a sum of beta does not say that a group's last channels are worth more than
its first; a whole last layer stood beside half a residual stream), and fine-tunes; the weights go on from round to
round and begin the final training. Nothing here knows of convolutions: groups of a fully connected network are pruned
just so.

*Budget.* Sampling and training of all rounds get equal parts of it. Where it does not hold the masks of all images,
each sees fewer, down to 64; then neighbours in the order of their norms are masked together, in bundles of 2, 4 or 8.
What a mask costs is found by a few masks that are drawn for nothing else. When the budget ends the search within a
round, the network of that round goes to the target by the last beta.

With minutes of budget it ends about half a point below ``uniform`` (docs/reference/methods.md). Neither the unpruned
weights for the final training (-0.2 points in one try) nor a ridge that shrinks beta towards L1 norms (-0.4) changed
that.

Least budget: 1 evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar, Literal

import numpy as np

from secateur.pruning.plan import BoolArray, PruningPlan
from secateur.pruning.search.landing import land_on, near_even
from secateur.pruning.search.mask_regression import Fit, Sampling, Units, draw, explained, finite, ridge, typical
from secateur.pruning.search.methods.knapsack import at_least, knapsack
from secateur.pruning.search.protocol import (
    DENSE,
    Answer,
    Budget,
    BudgetSpent,
    Candidate,
    Entry,
    FineTuned,
    FloatArray,
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
    masked_losses,
    project,
    remaining,
    score,
)

MIN_R2 = 0.3
"""Share of the held-out variance the additive model has to explain."""
RAISES = 3
"""How often p is raised for want of it."""
MIN_MASKS = 50
"""Masks drawn at least, so that some are held out in a small network."""
MANY_UNITS = 2000
"""Channels from which on bundles are masked, unless ``bundle`` says otherwise."""
BUNDLES = (1, 2, 4, 8)
FEW_IMAGES, MANY_IMAGES = 64, 1000
"""Per mask, where the budget holds few masks, and where it holds plenty (4.3)."""
EPOCHS = 1.0
"""Of training after a round, where nothing limits it."""
PROBES = 4
"""Masks drawn to see what one costs."""


@dataclass(frozen=True)
class Options:
    """Options of linear filter ensembles. The paper's settings are unknown; all defaults are ours.

    Args:
        rounds: of sampling, cutting and fine-tuning, at most; fewer where the budget holds fewer evaluations. 1 =
            one-shot; 8 to 10 for the best result.
        finetune_epochs: epochs after each round; None = as the budget allows, 1 without one (10 to 20 for the best
            result).
        layer_share: fraction in 0..1 of a group that one round removes at most, the last one excepted. A group may
            always take one step of the allowed widths.
        min_keep: kept / width in 0..1 of every group, for good; at least 2 channels stay.
        spread: how far the widths of a round may lie from an even cut, which is one keep ratio for all groups and its
            square root for what several layers read, in 0..1; 0 = the even cut, 1 = anywhere.
        sampling: ``stratified``, ``bernoulli``, ``antithetic`` or ``layerwise``; see the module.
        keep: p, probability in 0..1 that a mask keeps a channel.
        min_masks: masks per channel (or bundle) drawn at least (and never fewer than 50).
        max_masks: masks per channel (or bundle) drawn at most.
        images: images of the search split per mask; None = as many as the run file gives candidates, or fewer where
            the budget does not hold them.
        bundle: channels masked together, neighbours in the order of their L1 norms. None = as the budget allows; 1, or
            8 in networks of more than 2,000 channels, without one.
        selection: how the target is met: ``knapsack`` (largest sum of beta it allows), or ``ranking`` (the least
            ``beta / cost^gamma`` goes first; with gamma 0 the paper's).
        cost_power: gamma; 0 = pure importance (paper), 1 = importance per MAC or per millisecond.
        batch: masks asked for in one request; does not change what is found.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rounds: int = 4
    finetune_epochs: float | None = None
    layer_share: float = 0.35
    min_keep: float = 0.1
    spread: float = 0.25
    sampling: Sampling = "stratified"
    keep: float = 0.9
    min_masks: float = 2.0
    max_masks: float = 8.0
    images: int | None = None
    bundle: int | None = None
    selection: Literal["knapsack", "ranking"] = "knapsack"
    cost_power: float = 0.0
    batch: int = 256

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("layer_share", "min_keep", "spread"), (0.0, 1.0))
        counts = dict.fromkeys(("rounds", "images", "bundle", "batch"), (1.0, math.inf))
        check_ranges(self, keep=(0.01, 0.99), min_masks=(0.1, math.inf), max_masks=(0.1, math.inf), **shares, **counts)
        check_ranges(self, finetune_epochs=(0, math.inf), cost_power=(0, 10))
        if self.max_masks < self.min_masks:
            raise ValueError(f"max_masks {self.max_masks:g} must not lie below min_masks {self.min_masks:g}")


def least(problem: Problem, options: Options) -> Budget:
    """One cut by what few masks say; as long as the run file does not ask for trainings, none is needed."""
    del problem
    return Budget(evaluations=1, epochs=options.finetune_epochs or None)


def search(problem: Problem, options: Options) -> Strategy:
    """Sample, fit, cut, fine-tune; the archive holds the network of every round, in the order found.

    A network that could not be evaluated is dropped, and the next round starts from the same weights again.

    Raises:
        SearchError: there is no target, it is out of reach with ``min_keep``, losses are not numbers, or no network
            could be evaluated.
        BudgetSpent: the budget ended before the first importances were known.
    """
    limit = yield from limit_of(problem)
    problem = at_least(problem, limit, options.min_keep, least=2)
    ids, archive, reason = count(), list[Entry](), ""
    plan, base, parents, beta = problem.space.full, DENSE, tuple[int, ...](), dict[str, FloatArray]()
    left = yield from _rounds(problem, options)
    while left > 0:
        left -= 1
        try:
            beta = yield from importance(problem, options, plan, base, parts=2 * left + 2)
        except BudgetSpent:
            if not beta:
                raise
            beta, left = _alive(beta, plan), 0
        candidate = Candidate(next(ids), plan, "ensemble", parents, base)
        candidate = yield from _cut(problem, options, limit, candidate, beta, left)
        tuned = yield from _tune(candidate, options, parts=2 * left + 1)
        if tuned.evaluation.status != "ok":
            reason = tuned.evaluation.reason
            continue
        plan, base, parents = candidate.plan, tuned.base, (candidate.id,)
        archive.append(Entry(replace(candidate, base=base), tuned.evaluation))
        if problem.goal.met(tuned.evaluation, problem.reference):
            break
    if not archive:
        raise SearchError(f"filter_ensemble found no network that can be evaluated; the last: {reason}")
    return tuple(archive)


def _rounds(problem: Problem, options: Options) -> Generator[Request, Answer, int]:
    """As many as the budget holds evaluations and, with half of it, masks of the largest bundles on a few images."""
    needed = FEW_IMAGES * max(MIN_MASKS, options.min_masks * sum(problem.space.sizes.values()) / BUNDLES[-1])
    masked = (yield from held_images(options, problem.space.full, DENSE)) / 2 / needed
    evaluated = (yield from remaining()).evaluations
    return int(max(1.0, min(options.rounds, masked, evaluated)))


# -- one round -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """How the masks of a round are drawn.

    Args:
        images: of the search split per mask; None = as many as the run file gives candidates.
        bundle: channels masked together.
        most: masks, at most.
    """

    images: int | None
    bundle: int
    most: float = math.inf


def importance(
    problem: Problem, options: Options, plan: PruningPlan, base: str, parts: int = 1
) -> Generator[Request, Answer, dict[str, FloatArray]]:
    """Loss added by the removal of each channel of ``plan``: group -> shape ``(size,)``.

    Args:
        parts: this sampling may take one of so many equal parts of what is left of the budget.
    """
    names = problem.space.names
    alive = [plan.widths[name] for name in names if plan.widths[name] > 1]
    sample = yield from affordable(options, plan, base, alive, parts)
    order = None if sample.bundle == 1 else (yield from score("l1", base, plan))
    units = Units.of(plan, names, order, sample.bundle)
    if not units.parts:
        return units.spread(np.zeros(0))
    fit = yield from estimate(problem, options, units, base, sample)
    return units.spread(fit.beta)


def affordable(
    options: Options, plan: PruningPlan, base: str, widths: Sequence[int], parts: int
) -> Generator[Request, Answer, Sample]:
    """The sample that the budget holds: first fewer images a mask, then larger bundles, then fewer masks.

    Args:
        widths: channels of the groups that can be masked, shape ``(groups,)``.
    """
    channels = sum(widths)
    bundle = options.bundle or (1 if channels <= MANY_UNITS else BUNDLES[-1])
    held = (yield from held_images(options, plan, base)) / parts
    if held == math.inf:
        return Sample(options.images, bundle)
    few = min(options.images or FEW_IMAGES, FEW_IMAGES)
    if options.bundle is None:
        enough = [b for b in BUNDLES if options.min_masks * channels / b * few <= held]
        bundle = max(bundle, min(enough, default=BUNDLES[-1]))
    images = held / max(MIN_MASKS, options.min_masks * channels / bundle)
    images = math.floor(min(max(images, few), options.images or MANY_IMAGES))
    return Sample(images, bundle, max(2.0, held / images))


def held_images(options: Options, plan: PruningPlan, base: str) -> Generator[Request, Answer, float]:
    """Images that could be passed through masked networks with all that is left of the budget; inf = no limit."""
    before = yield from remaining()
    if min(before.work, before.seconds) == math.inf:
        return math.inf
    few = min(options.images or FEW_IMAGES, FEW_IMAGES)
    yield from masked_losses([plan] * PROBES, base, few)
    return PROBES * few * (yield from remaining()).rounds(before)


def estimate(
    problem: Problem, options: Options, units: Units, base: str, sample: Sample | None = None
) -> Generator[Request, Answer, Fit]:
    """Draw masks until the stopping rule holds or the sample has no more, and fit them all."""
    sizes, keep = units.sizes, options.keep
    sample = sample or Sample(options.images, 1)
    num_units = sum(sizes)
    least = math.floor(min(sample.most, max(MIN_MASKS, math.ceil(options.min_masks * num_units))))
    most = math.floor(min(sample.most, max(least, math.ceil(options.max_masks * num_units))))
    drawn = 0

    def draw_more(masks: int) -> Generator[Request, Answer, tuple[BoolArray, FloatArray]]:
        nonlocal drawn
        drawn += masks
        removed = draw(sizes, masks, keep, options.sampling, problem.rng)
        losses = np.zeros(masks)
        for at in range(0, masks, options.batch):
            part = slice(at, at + options.batch)
            losses[part] = yield from masked_losses(units.plans(removed[part]), base, sample.images)
        return removed, losses

    for raises in count():
        removed, losses = yield from draw_more(least)
        enough = raises == RAISES or drawn + least > sample.most
        if enough or max(typical(n, keep) for n in sizes) == 1 or explained(removed, losses) >= MIN_R2:
            break
        keep = (1 + keep) / 2  # too many removed at once for effects to add up
    fit = ridge(*finite(removed, losses))
    while not fit.settled and len(losses) < most and drawn < sample.most:
        more = yield from draw_more(math.floor(min(num_units, most - len(losses), sample.most - drawn)) or 1)
        removed, losses = np.concatenate([removed, more[0]]), np.concatenate([losses, more[1]])
        fit = ridge(*finite(removed, losses))
    return fit


def _cut(
    problem: Problem,
    options: Options,
    limit: Limit,
    candidate: Candidate,
    beta: Mapping[str, FloatArray],
    left: int,
) -> Generator[Request, Answer, Candidate]:
    """The candidate cut as far as its round goes: by an equal factor of the cost, so that ``left`` more are to come."""
    plan, start = candidate.plan, [candidate.plan.widths[name] for name in problem.space.names]
    if left:
        bound = limit.of(start) * (limit.bound / limit.of(start)) ** (1 / (left + 1))
        limit = replace(limit, bound=max(bound, limit.bound))
    part = _window(near_even(problem, limit, options.spread), plan, options.layer_share if left else 1.0)
    space = part.space
    worth = {name: value for name, value in _positive(beta).items() if name in space.sizes}
    ranked = _per_cost(part, limit, start, worth, options.cost_power)
    reached = replace(limit, bound=max(limit.bound, limit.of(space.encode(space.smallest()))))

    def within(limit: Limit) -> PruningPlan:
        if options.selection == "knapsack":
            return space.decode(knapsack(part, limit, worth), worth)
        return space.decode(project(part, limit, ranked, start, per_cost=False), ranked)

    chosen = replace(candidate, plan=within(reached))
    return chosen if left else (yield from land_on(_window(problem, plan, 1.0), limit, chosen, worth))


def _window(problem: Problem, plan: PruningPlan, share: float) -> Problem:
    """The problem with the widths that one round may reach from ``plan``."""
    space, allowed = problem.space, {}
    for name in space.names:
        width = plan.widths[name]
        lowest = min(math.ceil((1 - share) * width - 1e-9), space.below(name, width))
        allowed[name] = tuple(w for w in space.allowed[name] if lowest <= w <= width) or (width,)
    return replace(problem, space=replace(space, allowed=allowed))


def _positive(beta: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Importance as something to keep: negative values are none at all, and next to nothing still orders channels.

    A millionth of the mean, more for a higher rank, is added to each: what seems to do no good stays while the target
    leaves room for it.
    """
    values = np.concatenate([value[np.isfinite(value)] for value in beta.values()])
    kept = np.maximum(values, 0.0)
    tiny = 1e-6 * (kept.mean() or 1.0)
    levels = np.unique(values)
    rank = {name: np.searchsorted(levels, value) / len(levels) for name, value in beta.items()}
    return {
        name: np.where(np.isfinite(value), np.maximum(value, 0.0) + tiny * (1 + rank[name]), -np.inf)
        for name, value in beta.items()
    }


def _per_cost(
    part: Problem, limit: Limit, start: Sequence[int], worth: Mapping[str, FloatArray], power: float
) -> Mapping[str, FloatArray]:
    """``score_k = beta_k / cost_k^gamma``; the cost of a channel is what its group saves per channel."""
    if power == 0:
        return worth
    names, smallest = part.space.names, part.space.encode(part.space.smallest())
    rows = np.repeat(np.array(start)[None], len(names), axis=0)
    np.fill_diagonal(rows, smallest)
    steps = np.maximum(1, np.array(start) - smallest)
    costs = np.maximum(0.0, limit.of(start) - limit.ratios(rows)) / steps
    costs = np.maximum(costs / max(float(costs.mean()), 1e-300), 1e-3)
    return {name: worth[name] / cost**power for name, cost in zip(names, costs, strict=True)}


def _tune(candidate: Candidate, options: Options, parts: int) -> Generator[Request, Answer, FineTuned]:
    """The network of a round fine-tuned, or as it is where the budget or the run file allows no training.

    Args:
        parts: the training may take one of so many equal parts of what is left of the budget.
    """
    epochs = options.finetune_epochs
    if epochs is None:
        most = (yield from remaining()).trainable(1 / parts)  # of the unpruned network
        epochs = EPOCHS if most == math.inf else most if parts > 1 else 2 * most  # it is shortened to what is left
    if epochs > 0:
        with suppress(BudgetSpent):
            return (yield from fine_tune(candidate, epochs))
    (evaluation,) = yield from evaluate([candidate], latency=True, last=True)
    return FineTuned(candidate.base, evaluation)


def _alive(beta: Mapping[str, FloatArray], plan: PruningPlan) -> dict[str, FloatArray]:
    """Importance of an earlier round, -inf for the channels that are gone since."""
    return {name: np.where(plan.mask(name), values, -np.inf) for name, values in beta.items()}
