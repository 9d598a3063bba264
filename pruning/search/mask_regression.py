"""Random masks of channels, and the linear model of the loss under them: what filter ensembles rest on.

Sándor, Pável, Csató, "Pruning CNN's with Linear Filter Ensembles" (ECAI 2020, arXiv 2001.08142): sets of channels are
masked at random, and the loss is regressed on the masks. How masks are drawn, and why, is in ``filter_ensemble``, which
is the method; here are the units that masks remove, the masks, and the fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from secateur.pruning.plan import BoolArray, IntArray, PruningPlan
from secateur.pruning.search.protocol import FloatArray
from secateur.pruning.search.support import SearchError

Sampling = Literal["stratified", "bernoulli", "antithetic", "layerwise"]

HELD_OUT = 10
"""Every so-manieth mask is held out."""


# -- what is masked, and the masks -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Units:
    """What masks remove: single channels, or bundles of them.

    Args:
        plan: channels that are there.
        parts: group -> its units, each an array of channel indices; groups with a single unit cannot be masked and are
            left out.
    """

    plan: PruningPlan
    parts: Mapping[str, tuple[IntArray, ...]]

    @classmethod
    def of(cls, plan: PruningPlan, names: Sequence[str], order: Mapping[str, FloatArray] | None, bundle: int) -> Units:
        """Units of ``bundle`` channels each (the last ones may differ by one), neighbours in ``order``."""
        parts = {}
        for name in names:
            alive = np.array(plan.kept[name], dtype=np.int64)
            if len(alive) > 1:
                ordered = alive if order is None else alive[np.argsort(order[name][alive], kind="stable")]
                parts[name] = tuple(np.array_split(ordered, max(2, round(len(alive) / bundle))))
        return cls(plan, parts)

    @cached_property
    def sizes(self) -> list[int]:
        """Units per group."""
        return [len(units) for units in self.parts.values()]

    def plans(self, removed: BoolArray) -> list[PruningPlan]:
        """Masked networks, one per row of shape ``(masks, units)``."""
        ends = np.cumsum(self.sizes)
        plans = []
        for row in removed:
            kept = {
                name: sorted(np.concatenate([u for u, gone in zip(units, part, strict=True) if not gone]).tolist())
                for (name, units), part in zip(self.parts.items(), np.split(row, ends[:-1]), strict=True)
            }
            plans.append(self.plan.replace(kept))
        return plans

    def spread(self, beta: FloatArray) -> dict[str, FloatArray]:
        """Group -> importance per channel, shape ``(size,)``, from that of the units, shape ``(units,)``.

        A unit's importance is divided evenly. Channels that are gone get -inf, and those of groups that cannot be
        masked the largest of all.
        """
        ends = np.cumsum(self.sizes)
        values = {}
        for (name, units), part in zip(self.parts.items(), np.split(beta, ends[:-1]), strict=True):
            values[name] = np.full(self.plan.sizes[name], -np.inf)
            for unit, value in zip(units, part, strict=True):
                values[name][unit] = value / len(unit)
        top = max((float(value.max()) for value in values.values()), default=1.0)
        for name, size in self.plan.sizes.items():
            if name not in values:
                values[name] = np.where(self.plan.mask(name), top, np.full(size, -np.inf))
        return values


def draw(sizes: Sequence[int], masks: int, keep: float, sampling: Sampling, rng: np.random.Generator) -> BoolArray:
    """Random masks: shape ``(masks, sum(sizes))``, True = removed; each group keeps one.

    Args:
        sizes: units per group, each 2 or more.
        keep: p.
    """
    parts = []
    if sampling == "layerwise":
        turns = _even(masks, len(sizes), rng)  # one turn is nobody's
    for group, size in enumerate(sizes):
        usual = typical(size, keep)
        if sampling == "bernoulli":
            part = rng.random((masks, size)) >= keep
            whole = np.flatnonzero(part.all(axis=1))
            part[whole, rng.integers(size, size=len(whole))] = False
        elif sampling == "layerwise":
            part = _some(size, np.where(turns == group, usual, 0), rng)
        elif sampling == "stratified":
            part = _some(size, _even(masks, min(2 * usual, size - 1), rng), rng)
        else:
            numbers = _even(-(-masks // 2), min(2 * usual, size - 1), rng)
            first = _some(size, numbers, rng)
            second = _some(size, np.minimum(numbers, size - numbers), rng, barred=first)
            part = np.stack([first, second], axis=1).reshape(-1, size)[:masks]
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _even(masks: int, most: int, rng: np.random.Generator) -> IntArray:
    """Shape ``(masks,)``: 0 .. ``most`` equally often, in random order."""
    return np.asarray(rng.permutation(np.arange(masks) % (most + 1)))


def typical(size: int, keep: float) -> int:
    """Units of a group that a mask removes: ``ceil((1 - p) n)``, but never all."""
    return min(math.ceil((1 - keep) * size - 1e-9), size - 1)


def _some(size: int, numbers: IntArray, rng: np.random.Generator, barred: BoolArray | None = None) -> BoolArray:
    """Shape ``(masks, size)``: in row i, ``numbers[i]`` random entries are True, ``barred`` ones last."""
    keys = rng.random((len(numbers), size)) + (0 if barred is None else barred)
    ranks = keys.argsort(axis=1).argsort(axis=1)
    return np.asarray(ranks < numbers[:, None])


# -- the linear model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fit:
    """A linear model of the loss.

    Args:
        level: loss at ``centre``.
        centre: mean mask, shape ``(units,)``.
        beta: loss added when a unit is removed, shape ``(units,)``.
        errors: standard errors of ``beta``, shape ``(units,)``.
        penalty: of the ridge.
    """

    level: float
    centre: FloatArray
    beta: FloatArray
    errors: FloatArray
    penalty: float

    def r2(self, removed: BoolArray, losses: FloatArray) -> float:
        """Share of the variance of other losses, shape ``(masks,)``, that the model explains."""
        spread = float(np.square(losses - losses.mean()).sum())
        left = float(np.square(losses - self.level - (removed - self.centre) @ self.beta).sum())
        return 1.0 - left / spread if spread > 0 else 1.0

    @property
    def settled(self) -> bool:
        """The stopping rule: errors are small beside the differences among the lesser half of the units."""
        low, middle = np.quantile(self.beta, [0.25, 0.5])
        return bool(np.median(self.errors) <= (middle - low) / 4)


def ridge(removed: BoolArray, losses: FloatArray, penalties: Sequence[float] | None = None) -> Fit:
    """Ridge regression of losses on centred masks, with the penalty of least GCV error.

    ``beta = argmin sum_i (y_i - b - z_i . beta)^2 + lambda |beta|^2``. One eigendecomposition, of the smaller of the
    two Gram matrices, answers for every penalty; masks are zeros and ones, so the larger products are exact in float32.

    Args:
        removed: shape ``(masks, units)``, True = removed.
        losses: shape ``(masks,)``.
        penalties: to choose from, relative to the largest eigenvalue; None = 0 and 1e-8 ... 10.
    """
    n, k = removed.shape
    centre, level = removed.mean(axis=0), float(losses.mean())
    y = losses - level
    moment = _product(removed, y[:, None])[:, 0]  # Z'y; y is centred, so Z needs not be
    if k <= n:
        s, V = np.linalg.eigh(_product(removed, removed) - n * np.outer(centre, centre))
    else:
        Z = removed - centre
        s, U = np.linalg.eigh(Z @ Z.T)
        V = Z.T @ U / np.sqrt(np.maximum(s, 1e-300))
    real = s > 1e-9 * max(float(s[-1]), 1e-300)
    s, V = s[real], V[:, real]
    a = V.T @ moment
    outside = max(0.0, float(y @ y - np.sum(a**2 / s)))  # what no beta explains
    grid = np.array([0.0, *np.logspace(-8, 1, 37)] if penalties is None else penalties) * (s[-1] if len(s) else 1.0)
    free = np.array([n - 1 - np.sum(s / (s + c)) for c in grid])
    rest = np.array([outside + np.sum(a**2 / s * (c / (s + c)) ** 2) for c in grid])
    gcv = np.where(free > 0.5, n * rest / np.maximum(free, 0.5) ** 2, np.inf)
    best = int(np.argmin(gcv)) if np.isfinite(gcv).any() else len(grid) - 1
    noise = rest[best] / max(free[best], 1.0)
    beta = V @ (a / (s + grid[best]))
    errors = np.sqrt(noise * (V**2 @ (s / (s + grid[best]) ** 2)))
    scale = float(np.abs(beta).max(initial=0.0))
    if scale > 0:  # so that ties stay ties whatever the order of summation
        beta = np.round(beta / scale, 9) * scale
    return Fit(level, centre, beta, errors, float(grid[best]))


def _product(left: BoolArray, right: FloatArray | BoolArray, rows: int = 8192) -> FloatArray:
    """``left.T @ right`` in float64, some rows at a time."""
    kind = np.float32 if right.dtype == bool else np.float64
    total = np.zeros((left.shape[1], right.shape[1]))
    for at in range(0, len(left), rows):
        total += left[at : at + rows].astype(kind).T @ right[at : at + rows].astype(kind)
    return total


def explained(removed: BoolArray, losses: FloatArray) -> float:
    """R2 on every tenth mask of a fit to the others.

    Args:
        removed: shape ``(masks, units)``, True = removed.
        losses: shape ``(masks,)``.

    Raises:
        SearchError: fewer than two losses are numbers.
    """
    removed, losses = finite(removed, losses)
    held = np.arange(len(losses)) % HELD_OUT == HELD_OUT - 1
    if held.sum() < 2:
        return -math.inf
    return ridge(removed[~held], losses[~held]).r2(removed[held], losses[held])


def finite(removed: BoolArray, losses: FloatArray) -> tuple[BoolArray, FloatArray]:
    """The masks whose loss is a number, shapes ``(masks, units)`` and ``(masks,)``, with these losses.

    Raises:
        SearchError: there are fewer than two.
    """
    good = np.isfinite(losses)
    if good.sum() < 2:
        raise SearchError(
            f"{len(losses) - int(good.sum())} of {len(losses)} masked networks have a loss that is not a number; raise "
            "keep so that masks remove less, or look whether the unpruned network's loss is finite"
        )
    return removed[good], losses[good]
