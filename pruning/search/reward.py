"""Evaluation -> one number, higher = better. Metrics are stored, rewards derived: a new reward re-scores old runs.

Every reward compares a candidate with the evaluation of the *unpruned* network under the same protocol. Accuracy A is
in percentage points (100 * the metric named, or ``map50`` where there is one, else ``top1``); MACs F, parameters P are
ratios to the reference; latency L is ``latency_ratio``, measured on the device against the reference, so L0 = 1. A
candidate that is not ``ok``, or whose accuracy is below ``floor_pp``, is rejected: -inf.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from secateur.pruning.search.protocol import Evaluation, as_fraction

MAX_EXPONENT = 16
LEAST = 1e-9
"""With these bounds no power of accuracies and ratios is too large for a float."""
FLOOR_RULE = "floor_pp must be at most 100: nothing is more accurate"


class Reward(Protocol):
    """Fitness of an evaluation, higher = better, -inf = rejected."""

    def __call__(self, evaluation: Evaluation, /) -> float: ...


@dataclass(frozen=True)
class GapReward:
    """Accuracy gap times efficiency, with the latency measured on the device::

        gap = max(A0 - A, delta)
        rho = - lambda_macs ln(F/F0) - lambda_latency ln(L/L0) - lambda_params ln(P/P0)
        R   = (A0 / gap)^alpha * max(rho, rho_min) * max(1, L/T_L)^-w_latency * max(1, F/T_F)^-w_macs

    With lambda_macs = 1, delta -> 0, no rho_min and no targets it is the reward of Rewarded meta-pruning (Shibu et al.,
    Mathematics 11(23):4849, 2023, arXiv 2301.11063): (BA / (BA - A))^2 * -ln(F/BF). The over-budget factor is the hard
    variant of MnasNet (arXiv 1807.11626). The rest is our choice: delta, because near A0 the gap would make the reward
    blind to cost (any A >= A0 - delta is equally good); rho_min, because a network slower than the reference must not
    gain from losing accuracy.

    Where the latency was not taken, lambda_latency is added to lambda_macs. Such rewards are comparable with each
    other, not with rewards that know the latency.

    Args:
        reference: evaluation of the unpruned network.
        alpha: exponent of the accuracy term.
        lambda_macs: weight of MACs. The three weights are >= 0 and divided by their sum.
        lambda_latency: weight of latency.
        lambda_params: weight of parameters.
        delta_pp: percentage points > 0; floor of the gap.
        a0_pp: percentage points; A0. None = accuracy of the reference + delta_pp.
        rho_min: floor of rho; None = no floor.
        target_latency_ratio: latency budget T_L as a ratio to the reference; None = no budget.
        target_macs_ratio: MACs budget T_F as a ratio to the reference; None = no budget.
        w_latency: exponent of the latency overshoot, >= 0.
        w_macs: exponent of the MACs overshoot, >= 0.
        floor_pp: percentage points; candidates with less accuracy are rejected. None = no floor.
        latency_deadband: fraction; latencies are rounded to steps of this relative size, so that smaller differences,
            which are noise, do not count. 0 = off.

    Raises:
        ValueError: a parameter is outside its range; lists all of them.
    """

    reference: Evaluation
    alpha: float = 2.0
    lambda_macs: float = 0.3
    lambda_latency: float = 0.7
    lambda_params: float = 0.0
    delta_pp: float = 1.0
    a0_pp: float | None = None
    rho_min: float | None = 1e-3
    target_latency_ratio: float | None = None
    target_macs_ratio: float | None = None
    w_latency: float = 1.0
    w_macs: float = 1.0
    floor_pp: float | None = None
    latency_deadband: float = 0.02

    def __post_init__(self) -> None:
        lambdas = self.lambda_macs, self.lambda_latency, self.lambda_params
        _check(
            {
                "alpha must be > 0": self.alpha > 0,
                "lambda_macs, lambda_latency and lambda_params must be >= 0, one of them > 0": (
                    min(lambdas) >= 0 and sum(lambdas) > 0
                ),
                "delta_pp must be > 0": self.delta_pp > 0,
                "a0_pp must be > 0": self.a0_pp is None or self.a0_pp > 0,
                "rho_min must be > 0": self.rho_min is None or self.rho_min > 0,
                "w_latency and w_macs must be >= 0": min(self.w_latency, self.w_macs) >= 0,
                "latency_deadband must be >= 0": self.latency_deadband >= 0,
                "target_latency_ratio must be > 0": self.target_latency_ratio is None or self.target_latency_ratio > 0,
                "target_macs_ratio must be > 0": self.target_macs_ratio is None or self.target_macs_ratio > 0,
            }
        )
        _check(
            {
                f"alpha must be at most {MAX_EXPONENT}": self.alpha <= MAX_EXPONENT,
                f"delta_pp must lie in {LEAST:g}..100": LEAST <= self.delta_pp <= 100,
                "a0_pp must be at most 200": self.a0_pp is None or self.a0_pp <= 200,
                "latency_deadband must be at most 1": self.latency_deadband <= 1,
                FLOOR_RULE: _floor_holds(self.floor_pp),
            }
        )

    def __call__(self, evaluation: Evaluation, /) -> float:
        if _rejected(evaluation, self.floor_pp):
            return -math.inf
        A0 = _accuracy_pp(self.reference) + self.delta_pp if self.a0_pp is None else self.a0_pp
        gap = max(A0 - _accuracy_pp(evaluation), self.delta_pp)
        rho = self.efficiency(evaluation)
        if self.rho_min is not None:
            rho = max(rho, self.rho_min)
        return math.pow(A0 / gap, self.alpha) * rho * self.budget_factor(evaluation)

    def efficiency(self, evaluation: Evaluation) -> float:
        """rho: weighted log of the savings; 0 for the reference, ln 2 where every weighted cost is halved."""
        weights = {"macs": self.lambda_macs, "latency": self.lambda_latency, "params": self.lambda_params}
        latency = _latency(evaluation, self.latency_deadband)
        if math.isnan(latency):
            weights["macs"] += weights.pop("latency")

        def saved(cost: str) -> float:
            return -math.log(latency if cost == "latency" else _ratio(evaluation, self.reference, cost))

        return sum(weight * saved(cost) for cost, weight in weights.items() if weight > 0) / sum(weights.values())

    def budget_factor(self, evaluation: Evaluation) -> float:
        """g: 1 within the budgets, below 1 outside; a latency that was not taken counts as within."""
        factor = 1.0
        if self.target_latency_ratio is not None:
            over = _latency(evaluation, self.latency_deadband) / self.target_latency_ratio
            factor *= 1.0 if math.isnan(over) else math.pow(max(1.0, over), -self.w_latency)
        if self.target_macs_ratio is not None:
            over = _ratio(evaluation, self.reference, "macs") / self.target_macs_ratio
            factor *= math.pow(max(1.0, over), -self.w_macs)
        return factor


@dataclass(frozen=True)
class MnasNetReward:
    """A * (C / T)^w with w = alpha within the budget and beta beyond it (MnasNet, CVPR 2019, arXiv 1807.11626).

    Args:
        reference: evaluation of the unpruned network.
        target_ratio: > 0; budget T of the cost C as a ratio to the reference. C is latency, or MACs where it was not
            taken.
        alpha: exponent within the budget, <= 0 (soft -0.07, hard 0).
        beta: exponent beyond the budget, <= 0 (soft -0.07, hard -1).
        floor_pp: percentage points; candidates with less accuracy are rejected. None = no floor.

    Raises:
        ValueError: a parameter is outside its range; lists all of them.
    """

    reference: Evaluation
    target_ratio: float = 1.0
    alpha: float = -0.07
    beta: float = -0.07
    floor_pp: float | None = None

    def __post_init__(self) -> None:
        _check(
            {
                f"target_ratio must be > 0, at least {LEAST:g}": self.target_ratio >= LEAST,
                "alpha, beta must be <= 0": max(self.alpha, self.beta) <= 0,
                f"alpha, beta must be at least -{MAX_EXPONENT}": min(self.alpha, self.beta) >= -MAX_EXPONENT,
                FLOOR_RULE: _floor_holds(self.floor_pp),
            }
        )

    def __call__(self, evaluation: Evaluation, /) -> float:
        if _rejected(evaluation, self.floor_pp):
            return -math.inf
        over = _cost(evaluation, self.reference) / self.target_ratio
        return _accuracy_pp(evaluation) / 100 * math.pow(over, self.alpha if over <= 1 else self.beta)


@dataclass(frozen=True)
class AbsoluteReward:
    """A + beta * abs(C / T - 1), TuNAS (CVPR 2020, arXiv 2008.06120): the target is approached from both sides.

    Args:
        reference: evaluation of the unpruned network.
        target_ratio: > 0; target T of the cost C as a ratio to the reference. C is latency, or MACs where it was not
            taken.
        beta: weight of the distance, <= 0 (source: -0.10).
        floor_pp: percentage points; candidates with less accuracy are rejected. None = no floor.

    Raises:
        ValueError: a parameter is outside its range; lists all of them.
    """

    reference: Evaluation
    target_ratio: float = 1.0
    beta: float = -0.10
    floor_pp: float | None = None

    def __post_init__(self) -> None:
        _check(
            {
                f"target_ratio must be > 0, at least {LEAST:g}": self.target_ratio >= LEAST,
                "beta must be <= 0": self.beta <= 0,
                FLOOR_RULE: _floor_holds(self.floor_pp),
            }
        )

    def __call__(self, evaluation: Evaluation, /) -> float:
        if _rejected(evaluation, self.floor_pp):
            return -math.inf
        return _accuracy_pp(evaluation) / 100 + self.beta * abs(
            _cost(evaluation, self.reference) / self.target_ratio - 1
        )


@dataclass(frozen=True)
class AmcReward:
    """-(1 - A) * ln(MACs): the accuracy-guaranteed reward of AMC (ECCV 2018, arXiv 1802.03494). MACs are absolute.

    Args:
        reference: evaluation of the unpruned network; not used.
        floor_pp: percentage points; candidates with less accuracy are rejected. None = no floor.

    Raises:
        ValueError: a parameter is outside its range.
    """

    reference: Evaluation
    floor_pp: float | None = None

    def __post_init__(self) -> None:
        _check({FLOOR_RULE: _floor_holds(self.floor_pp)})

    def __call__(self, evaluation: Evaluation, /) -> float:
        if _rejected(evaluation, self.floor_pp):
            return -math.inf
        return -(1 - _accuracy_pp(evaluation) / 100) * math.log(_metric(evaluation, "macs"))


PRESETS: Mapping[str, tuple[Callable[..., Reward], Mapping[str, float | None]]] = {
    "device": (GapReward, {}),
    "rewarded_v2": (
        GapReward,
        {"lambda_macs": 1.0, "lambda_latency": 0.0, "delta_pp": 1e-6, "rho_min": None, "w_latency": 0.0, "w_macs": 0.0},
    ),
    "mnasnet": (MnasNetReward, {}),
    "mnasnet_hard": (MnasNetReward, {"alpha": 0.0, "beta": -1.0}),
    "tunas_abs": (AbsoluteReward, {}),
    "amc": (AmcReward, {}),
}
"""Preset name -> its class and where it departs from the defaults of that class."""


def make_reward(preset: str, reference: Evaluation, metric: str = "", **overrides: float | None) -> Reward:
    """A reward by name, compared with ``reference``, the evaluation of the unpruned network.

    Args:
        metric: the accuracy it looks at; empty = ``map50`` where there is one, else ``top1``.

    Raises:
        ValueError: unknown preset, a parameter it does not have, or one outside its range.
    """
    if preset not in PRESETS:
        raise ValueError(_unknown("reward", preset, PRESETS))
    kind, settings = PRESETS[preset]
    known = [name for name in inspect.signature(kind).parameters if name != "reference"]
    for name in overrides:
        if name not in known:
            raise ValueError(_unknown(f"parameter of reward {preset!r}:", name, known))
    settings = {**settings, **overrides}
    if not metric:
        return kind(reference=reference, **settings)
    reward = kind(reference=_seen(reference, metric), **settings)
    return lambda evaluation: reward(_seen(evaluation, metric))


def _seen(evaluation: Evaluation, metric: str) -> Evaluation:
    """The evaluation with ``metric`` as its accuracy: a fraction, higher = better."""
    return replace(evaluation, metrics={**evaluation.metrics, "accuracy": as_fraction(metric, evaluation[metric])})


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known)}"


def _check(rules: Mapping[str, bool]) -> None:
    """Raise a ValueError that lists every rule which does not hold."""
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError("; ".join(broken))


def _floor_holds(floor_pp: float | None) -> bool:
    return floor_pp is None or floor_pp <= 100


def _rejected(evaluation: Evaluation, floor_pp: float | None) -> bool:
    return evaluation.status != "ok" or (floor_pp is not None and _accuracy_pp(evaluation) < floor_pp)


def _metric(evaluation: Evaluation, name: str) -> float:
    """A metric the reward cannot do without."""
    value = evaluation[name]
    if math.isnan(value):
        raise ValueError(f"the reward needs the metric {name!r}; the evaluation has {sorted(evaluation.metrics)}")
    return value


def _accuracy_pp(evaluation: Evaluation) -> float:
    """A: percentage points."""
    return 100 * _metric(evaluation, next((n for n in ("accuracy", "map50") if n in evaluation.metrics), "top1"))


def _ratio(evaluation: Evaluation, reference: Evaluation, name: str) -> float:
    """A cost as a ratio to the reference: free of its unit."""
    return _metric(evaluation, name) / _metric(reference, name)


def _latency(evaluation: Evaluation, deadband: float = 0.0) -> float:
    """L / L0, rounded to whole steps of relative size ``deadband``; NaN where it was not taken."""
    latency = evaluation["latency_ratio"]
    if math.isnan(latency) or deadband == 0:
        return latency
    step = math.log1p(deadband)
    return math.exp(round(math.log(latency) / step) * step)


def _cost(evaluation: Evaluation, reference: Evaluation) -> float:
    """Cost as a ratio to the reference: latency, or MACs where it was not taken."""
    latency = _latency(evaluation)
    return _ratio(evaluation, reference, "macs") if math.isnan(latency) else latency
