"""Which groups a search may cut: those inside blocks only, or the residual stream too.

The papers cut inner widths: CCEP the first convolution of a basic block and the first two of a bottleneck (Shang et al.
2022, arXiv 2204.05639, official code), as L1 pruning does (Li et al. 2017, arXiv 1608.08710, section 3.3). The stream
is read by every block of its stage, so that a channel of it costs much accuracy and saves many MACs; what it is worth
depends on the network (ResNet-56 and ResNet-20 differ), and so two cuts are compared that save equally much.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal

from secateur.device_profiles.wording import number_of
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.landing import per_mean, settle
from secateur.pruning.search.protocol import Answer, Candidate, Evaluation, FloatArray, Problem, Request
from secateur.pruning.search.support import Limit, bisect, evaluate, macs_ratios, score, time_plans

Asked = Literal["inner", "all", "auto"]
Name = Literal["inner", "all"]

USUAL = 0.5
"""MACs ratio that scopes are compared at where the search has no target."""
MARGIN = 0.05
"""The stream is opened where that does less harm by more than this fraction; a tie goes to the inner groups, as in the
papers."""
SHARE = 0.1
"""Of a budget of evaluations, at most, goes into the comparison."""


@dataclass(frozen=True)
class Spaces:
    """The widths a search may choose from, in either scope.

    Args:
        whole: every group that is not frozen.
        inner: those without the stream; None = there are none, or nothing else.
    """

    whole: SearchSpace
    inner: SearchSpace | None

    def of(self, scope: Name) -> SearchSpace:
        """The space of a scope that was chosen."""
        return self.inner if scope == "inner" and self.inner is not None else self.whole


@dataclass(frozen=True)
class ScopeTrial:
    """A uniform cut in one scope.

    Args:
        scope: its groups.
        macs_ratio: to the unpruned network.
        latency_ratio: the same, measured or predicted; None where the target is of MACs.
        loss: on the search images, without training; NaN where it could not be evaluated.
        harm: rise of the loss over the unpruned network's, per cost saved (a fraction of MACs, or of latency).
    """

    scope: Name
    macs_ratio: float
    latency_ratio: float | None
    loss: float
    harm: float


@dataclass(frozen=True)
class ScopeChoice:
    """What a search may cut, and why.

    Args:
        scope: of the search.
        reason: for people; empty where nothing was to be chosen.
        trials: the cuts that were compared.
    """

    scope: Name
    reason: str = ""
    trials: tuple[ScopeTrial, ...] = ()


def choose(asked: Asked, whole: Problem, inner: Problem | None) -> Generator[Request, Answer, ScopeChoice]:
    """``choice = yield from choose(asked, whole, inner)``: settle the scope, before a method begins.

    ``auto`` cuts both scopes uniformly by L1 to the same MACs and evaluates the cuts. Where inner groups alone cannot
    reach the target, the stream is opened, for ``inner`` too.

    Args:
        asked: ``search.scope``.
        whole: the search over every group.
        inner: the same over inner groups; None = there is nothing to choose.
    """
    if inner is None or asked == "all":
        return ScopeChoice("all")
    if missed := (yield from _missed(inner)):
        return ScopeChoice("all", f"{missed}, so that the residual stream is cut too")
    if asked == "inner":
        return ScopeChoice("inner")
    evaluations = whole.budget.evaluations
    if evaluations is not None and SHARE * evaluations < 2:
        return ScopeChoice(
            "inner", f"a budget of {number_of(evaluations, 'evaluation(s)')} is too small to compare scopes"
        )
    trials = yield from _compared(inner, whole)
    return _settled(*trials)


def _missed(inner: Problem) -> Generator[Request, Answer, str]:
    """What inner groups at their smallest widths miss; empty where they reach the target."""
    goal, smallest = inner.goal, inner.space.smallest()
    said = "with every inner group at its smallest width the network keeps {:.3f} of its {}, and the target is {:g}"
    ratio = inner.macs(smallest) / inner.reference["macs"]
    if goal.macs_ratio is not None and ratio > goal.macs_ratio:
        return said.format(ratio, "MACs", goal.macs_ratio)
    if goal.latency_ratio is not None:
        (measured,) = yield from time_plans([smallest])
        if measured > goal.latency_ratio:
            return said.format(measured, "latency", goal.latency_ratio)
    return ""


def _compared(inner: Problem, whole: Problem) -> Generator[Request, Answer, tuple[ScopeTrial, ScopeTrial]]:
    """A uniform cut of each scope, to the same MACs."""
    goal, saliency = whole.goal, (yield from score("l1"))
    timed = goal.latency_ratio is not None
    wanted = goal.macs_ratio or goal.latency_ratio or USUAL
    bound = max(wanted, inner.macs(inner.space.smallest()) / inner.reference["macs"])
    cuts: list[tuple[Name, Problem]] = [("inner", inner), ("all", whole)]
    plans = [_uniform(problem, bound, saliency) for _, problem in cuts]
    candidates = [Candidate(i, plan, f"scope {cuts[i][0]}") for i, plan in enumerate(plans)]
    evaluations = yield from evaluate(candidates, latency=timed)
    first, second = (_trial(name, e, whole, timed=timed) for (name, _), e in zip(cuts, evaluations, strict=True))
    return first, second


def _uniform(problem: Problem, bound: float, saliency: Mapping[str, FloatArray]) -> PruningPlan:
    """The largest keep ratio for all groups within a MACs ratio, filled up to it."""
    space, limit = problem.space, Limit("macs_ratio", macs_ratios(problem), bound)

    def widths(ratio: float) -> list[int]:
        return [space.snap(name, ratio * space.sizes[name]) for name in space.names]

    plan = space.decode(widths(bisect(limit, widths, meets=0.0, fails=1.0)), saliency)
    return settle(problem, limit, plan, per_mean(saliency), per_cost=False).plan


def _trial(name: Name, evaluation: Evaluation, problem: Problem, *, timed: bool) -> ScopeTrial:
    """What an evaluated cut comes to."""
    macs = evaluation["macs"] / problem.reference["macs"]
    latency = evaluation["latency_ratio"] if timed else None
    saved = 1 - (macs if latency is None else latency)
    loss = evaluation["loss"] if evaluation.status == "ok" else math.nan
    rise = loss - problem.reference["loss"]
    return ScopeTrial(name, macs, latency, loss, rise / saved if saved > 0 and math.isfinite(rise) else math.inf)


def _settled(inner: ScopeTrial, whole: ScopeTrial) -> ScopeChoice:
    """The scope that does less harm."""
    opened = whole.harm < inner.harm and not inner.harm - whole.harm <= MARGIN * abs(inner.harm)
    said = (
        f"cut uniformly to {inner.macs_ratio:.3f} of the MACs, inner groups alone bring the loss to {inner.loss:.3f} "
        f"({inner.harm:.3g} per cost saved), with the residual stream to {whole.loss:.3f} ({whole.harm:.3g})"
    )
    tied = not opened and whole.harm < inner.harm
    reason = f"{said}: less than {MARGIN:.0%} apart, so that the stream is left alone" if tied else said
    return ScopeChoice("all" if opened else "inner", reason, (inner, whole))
