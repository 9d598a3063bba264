"""Clusters of channels by how alike they are: DBSCAN, agglomerative, databionic swarm; swept over a radius for free.

All clusterers read a matrix of distances, shape ``(n, n)`` (cosine distances between feature maps), do their work once,
and then answer for any radius: ``at(radius) -> labels``. Clusters and noise points are counted alike, as in ACP (Chang,
Lu, Xue, Xu, Wei, Applied Intelligence 2022, arXiv 2101.06407): a noise point is a channel like no other, and a cluster
of redundant channels counts once. Both together are the width suggested for the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path
from scipy.spatial import Delaunay
from scipy.spatial.distance import squareform

from secateur.pruning.plan import BoolArray, IntArray
from secateur.pruning.search.protocol import FloatArray
from secateur.pruning.search.support import Limit, bisect

Clusterer = Literal["dbscan", "agglomerative", "dbs"]

NOISE = -1
"""Label of a point that belongs to no cluster."""


class Clusters(Protocol):
    """The clusters of one group of channels, for any radius."""

    @property
    def top(self) -> float:
        """The radius from which on everything is one cluster."""

    def at(self, radius: float) -> IntArray:
        """Shape ``(n,)``: cluster of each channel, from 0; ``NOISE`` = none."""


def cluster(kind: Clusterer, distance: FloatArray, rng: np.random.Generator, min_samples: int = 5) -> Clusters:
    """Cluster channels.

    Args:
        distance: shape ``(n, n)``, symmetric, zero on the diagonal, finite.
        rng: of the swarm.
        min_samples: of DBSCAN: points (itself included) in the neighbourhood of a core point.

    Raises:
        ValueError: the kind is unknown, or distances are not finite.
    """
    if not np.isfinite(distance).all():
        raise ValueError("distances between channels must be finite; leave out channels that were removed")
    match kind:
        case "dbscan":
            return dbscan(distance, min_samples)
        case "agglomerative":
            return agglomerative(distance)
        case "dbs":
            return dbs(distance, rng)
        case _:
            raise ValueError(f"unknown clusterer {kind!r}; known: dbscan, agglomerative, dbs")


@dataclass(frozen=True, eq=False)
class Tree:
    """A hierarchy of clusters.

    Args:
        n: points.
        merges: shape ``(n - 1, 4)``, as of ``scipy.cluster.hierarchy.linkage``; heights never fall.
    """

    n: int
    merges: FloatArray

    @classmethod
    def of(cls, distance: FloatArray, method: str) -> Tree:
        """Build from distances, shape ``(n, n)``, by a linkage ``method`` (``single``, ``average``, ``ward``)."""
        n = len(distance)
        if n < 2:
            return cls(n, np.empty((0, 4)))
        return cls(n, np.asarray(linkage(squareform(distance, checks=False), method), dtype=np.float64))

    @property
    def top(self) -> float:
        return float(self.merges[-1, 2]) if len(self.merges) else 0.0

    def at(self, radius: float) -> IntArray:
        """The clusters whose merges lie no higher than the radius."""
        return self.into(self.n - int(np.count_nonzero(self.merges[:, 2] <= radius)))

    def into(self, k: int) -> IntArray:
        """Exactly ``k`` clusters in 1..n, numbered by their first member."""
        root = list(range(2 * self.n - 1))  # points, then one node per merge
        pairs = self.merges[: self.n - k, :2].astype(np.int64).tolist()
        for i in reversed(range(len(pairs))):
            for child in pairs[i]:
                root[child] = root[self.n + i]
        return _numbered(np.array(root[: self.n], dtype=np.int64))


def agglomerative(distance: FloatArray) -> Tree:
    """Average linkage: two clusters merge at the mean distance of their members."""
    return Tree.of(distance, "average")


@dataclass(frozen=True, eq=False)
class Dbscan:
    """DBSCAN for any radius (Ester, Kriegel, Sander, Xu, KDD 1996).

    At a radius the core points are those whose ``min_samples``-th neighbour lies within it, and clusters are what core
    points reach from one to the next. That is single linkage over the mutual reachability ``max(core_i, core_j,
    d_ij)``, cut at the radius, so one tree holds the answers for all radii. A border point joins its nearest core
    point.

    Args:
        distance: shape ``(n, n)``.
        core: shape ``(n,)``, the radius from which on a point is a core point.
        tree: single linkage over the mutual reachability.
    """

    distance: FloatArray
    core: FloatArray
    tree: Tree

    @property
    def top(self) -> float:
        return self.tree.top

    def at(self, radius: float) -> IntArray:
        labels, is_core = self.tree.at(radius), self.core <= radius
        if not is_core.any():
            return np.full(len(labels), NOISE)
        to_core = self.distance[:, is_core]
        nearest = labels[is_core][to_core.argmin(axis=1)]
        near = to_core.min(axis=1) <= radius
        return _numbered(np.where(is_core, labels, np.where(near, nearest, NOISE)))


def dbscan(distance: FloatArray, min_samples: int = 5) -> Dbscan:
    """DBSCAN; a group of fewer than ``min_samples`` channels needs only as many as it has, so that it can shrink."""
    k = min(min_samples, len(distance))
    core = np.partition(distance, k - 1, axis=1)[:, k - 1]  # the point itself is its first neighbour
    reach = np.maximum(distance, np.maximum(core[:, None], core[None]))
    np.fill_diagonal(reach, 0.0)
    return Dbscan(distance, core, Tree.of(reach, "single"))


def _numbered(labels: IntArray) -> IntArray:
    """The same clusters, numbered by their first member; noise stays noise."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.where(labels[first] == NOISE, -1, first))
    number = np.empty(len(first), dtype=np.int64)
    number[order] = np.arange(len(first)) - int((labels == NOISE).any())
    return number[inverse]


def num_kept(labels: IntArray) -> int:
    """Suggested width (ACP, step 1): clusters plus noise points."""
    return int(labels.max(initial=NOISE)) + 1 + int(np.count_nonzero(labels == NOISE))


def representatives(labels: IntArray, distance: FloatArray, score: FloatArray) -> BoolArray:
    """The medoid of each cluster (ties: the higher score, then the lower index), and all noise; shape ``(n,)``."""
    chosen: BoolArray = labels == NOISE
    order = np.argsort(-score, kind="stable")
    for label in range(int(labels.max(initial=NOISE)) + 1):
        members = order[labels[order] == label]
        inside = distance[np.ix_(members, members)].sum(axis=1)
        chosen[members[int(np.argmin(np.round(inside, 12)))]] = True
    return chosen


def preferring(chosen: BoolArray, score: FloatArray) -> FloatArray:
    """Scores, shape ``(n,)``, under which the chosen channels come first, and each kind keeps its own order."""
    rank = np.unique(score, return_inverse=True)[1].astype(np.float64)
    preferred: FloatArray = rank + len(score) * chosen
    return preferred


def silhouette(distance: FloatArray, labels: IntArray) -> float:
    """Mean silhouette in -1..1 (Rousseeuw 1987): how much closer points are to their own cluster than to the next."""
    members = labels[:, None] == np.arange(labels.max() + 1)
    counts = members.sum(axis=0)
    if len(counts) < 2:
        return 0.0
    total = distance @ members
    own = counts[labels]
    a = total[np.arange(len(labels)), labels] / np.maximum(own - 1, 1)
    b = np.where(members, np.inf, total / counts).min(axis=1)
    values = np.where(own > 1, (b - a) / np.maximum(np.maximum(a, b), 1e-300), 0.0)
    return float(values.mean())


def by_silhouette(tree: Tree, distance: FloatArray, shares: Sequence[float] = tuple(np.arange(2, 10) / 10)) -> IntArray:
    """The clusters with the best silhouette among ``k = share * n`` (methods: 0.2 ... 0.9; ties: fewer clusters)."""
    ks = sorted({max(1, round(share * tree.n)) for share in shares})
    return max((tree.into(k) for k in ks), key=lambda labels: silhouette(distance, labels))


def calibrate(clusters: Mapping[str, Clusters], limit: Limit, widths: Callable[[float], list[int]]) -> float:
    """The radius at which the suggested widths meet a limit, by bisection (to 2^-40 of the largest radius).

    Widths need not fall everywhere as the radius grows (a border point may become a core point of its own), so a larger
    network within the limit may exist; the radius that comes back always meets it, if the largest one does.

    Args:
        clusters: of every group.
        widths: radius -> shape ``(groups,)``.
    """
    return bisect(limit, widths, meets=max(c.top for c in clusters.values()), fails=0.0)


# -- databionic swarm --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A torus of positions.

    Args:
        lines, columns: multiples of 4, more columns than lines, lines / columns > 0.7.
    """

    lines: int
    columns: int

    @classmethod
    def of(cls, num_bots: int) -> Grid:
        """The smallest grid with at least four positions per bot."""
        a = 3  # 12 / 16 is the first of these ratios above 0.7
        while 16 * a * (a + 1) < 4 * num_bots:
            a += 1
        return cls(4 * a, 4 * a + 4)

    @property
    def size(self) -> int:
        return self.lines * self.columns

    def weights(self, positions: IntArray, R: float) -> tuple[FloatArray, FloatArray]:
        """Two tables whose rows add up to ``1 - d^2 / (pi R^2)``, d = distance round the torus to each position.

        Returns:
            Shapes ``(lines, n)`` and ``(columns, n)``: a position's line and column pick the rows.
        """

        def squared(count: int, where: IntArray) -> FloatArray:
            apart = np.abs(np.arange(count)[:, None] - where)
            share: FloatArray = np.minimum(apart, count - apart) ** 2 / (math.pi * R * R)
            return share

        return 1 - squared(self.lines, positions // self.columns), -squared(self.columns, positions % self.columns)

    @property
    def least_radius(self) -> float:
        """The radius whose neighbourhood, a disc of radius R sqrt(pi), holds 5 % of the positions, at least 1."""
        return max(1.0, math.sqrt(0.05 * self.size) / math.pi)


WORK = 2 * 10**8
"""Bound on one swarm's work, in distances looked at."""


def dbs(distance: FloatArray, rng: np.random.Generator, method: str = "ward") -> Tree:
    """Databionic swarm (Thrun, Ultsch, "Swarm intelligence for self-organized clustering", AIJ 2021), our reading.

    Bots, one per channel, project the distances onto a torus. The points' Delaunay graph, its edges weighted with the
    distances, gives the paths along which clusters are linked.

    Our choices: the smallest grid that has the stated form, whatever the spread of distances; bots jump at the same
    time, to free positions no two of them try; a bot without neighbours gets its mean distance; the rule for one
    cluster of more than 95 % is left out, since single channels count as clusters here; work is bounded by ``WORK``.

    Args:
        distance: shape ``(n, n)``.
        method: ``ward`` for compact clusters, ``single`` for connected ones.
    """
    n = len(distance)
    if n < 4 or not distance.any():
        return Tree.of(distance, method)
    grid = Grid.of(n)
    positions = swarm(distance, grid, rng)
    edges = neighbours(positions, grid)
    weights = np.maximum(distance[edges[:, 0], edges[:, 1]], 1e-12)  # a graph knows no edge of length 0
    paths = shortest_path(csr_array((weights, (edges[:, 0], edges[:, 1])), shape=(n, n)), directed=False)
    return Tree.of(paths, method)


def swarm(distance: FloatArray, grid: Grid, rng: np.random.Generator) -> IntArray:
    """Where the bots settle: one position of the grid each, shape ``(n,)``."""
    n = len(distance)
    D = distance / distance.max()
    positions = rng.choice(grid.size, n, replace=False)
    largest, least = grid.lines / 2, grid.least_radius
    radii = np.arange(largest, least - 1e-9, -1.0)
    most = int(np.clip(WORK // (n * n * len(radii)), 1, 100))
    for R in radii:
        jumping = 0.05 + (0.5 - 0.05) * (R - least) / max(largest - least, 1e-9)  # share of bots that may jump
        happiness: list[float] = []
        while len(happiness) < most:
            positions, total = jump(D, positions, grid, float(R), jumping, rng)
            happiness.append(total)
            if len(happiness) > max(math.ceil(1 / jumping), 2) and _slope(happiness[-20:]) < 0.01:
                break  # weak Nash equilibrium
    return positions


def jump(
    D: FloatArray, positions: IntArray, grid: Grid, R: float, share: float, rng: np.random.Generator
) -> tuple[IntArray, float]:
    """One iteration: chosen bots try four free positions each. Returns the new positions and the total payoff."""
    n = len(positions)
    bots = rng.choice(n, max(1, round(share * n)), replace=False)
    free = np.setdiff1d(np.arange(grid.size), positions, assume_unique=True)
    tried = rng.choice(free, (len(bots), min(4, len(free) // len(bots))), replace=False)
    options = np.concatenate([positions[bots, None], tried], axis=1)
    best = payoff(D[bots], bots, options, positions, grid, R).argmax(axis=1)  # ties: stay
    moved = positions.copy()
    moved[bots] = options[np.arange(len(bots)), best]
    everyone = np.arange(n)
    return moved, float(payoff(D, everyone, moved[:, None], moved, grid, R).sum())


def payoff(D: FloatArray, bots: IntArray, at: IntArray, positions: IntArray, grid: Grid, R: float) -> FloatArray:
    """``1 - sum(h D) / sum(h)`` with ``h = max(0, 1 - d^2 / (pi R^2))`` for bots at each of some positions.

    Args:
        D: shape ``(bots, n)``, distances of these bots to all.
        at: shape ``(bots, options)``, positions to look at.
        positions: shape ``(n,)``, where everybody is.

    Returns:
        Shape ``(bots, options)``.
    """
    lines, columns = grid.weights(positions, R)
    alone = D.sum(axis=1) / (len(positions) - 1)
    result = np.empty(at.shape)
    for option, place in enumerate(at.T):
        h = np.maximum(0.0, lines[place // grid.columns] + columns[place % grid.columns])
        h[np.arange(len(bots)), bots] = 0.0
        felt = h.sum(axis=1)
        around = np.einsum("bn,bn->b", h, D) / np.maximum(felt, 1e-300)
        result[:, option] = 1 - np.where(felt > 0, around, alone)
    return result


def _slope(values: Sequence[float]) -> float:
    """Of the straight line through the values, per step."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return float(x @ np.asarray(values) / (x @ x))


def neighbours(positions: IntArray, grid: Grid) -> IntArray:
    """Edges of the Delaunay graph on the torus, shape ``(edges, 2)``, each once, the lower index first."""
    n = len(positions)
    points = np.stack([positions // grid.columns, positions % grid.columns], axis=1).astype(np.float64)
    tiles = [(i * grid.lines, j * grid.columns) for i in (0, -1, 1) for j in (0, -1, 1)]
    triangles = Delaunay(np.concatenate([points + tile for tile in tiles])).simplices
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [0, 2]]])
    edges = np.sort(edges[(edges < n).any(axis=1)] % n, axis=1)  # those that touch the middle tile
    return np.asarray(np.unique(edges[edges[:, 0] < edges[:, 1]], axis=0), dtype=np.int64)
