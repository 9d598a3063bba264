"""Clusterers against scikit-learn and by hand; calibration; the swarm's projection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN, AgglomerativeClustering
from sklearn.metrics import silhouette_score

from secateur.pruning.search.methods.clustering import (
    Grid,
    agglomerative,
    by_silhouette,
    calibrate,
    cluster,
    dbs,
    dbscan,
    jump,
    neighbours,
    num_kept,
    payoff,
    preferring,
    representatives,
    silhouette,
    swarm,
)
from secateur.pruning.search.support import Limit


def distances(vectors: np.ndarray) -> np.ndarray:
    """Cosine distances, shape (n, n)."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = np.clip(1 - unit @ unit.T, 0, 2)
    distance[distance < 1e-12] = 0
    np.fill_diagonal(distance, 0)
    return (distance + distance.T) / 2


def blobs(n: int, k: int, seed: int = 0, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Distances of n vectors around k directions, and which direction each belongs to."""
    rng = np.random.default_rng(seed)
    own = np.arange(n) % k
    return distances(rng.normal(size=(k, 20))[own] + spread * rng.normal(size=(n, 20))), own


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings are the same partition."""
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


@given(
    n=st.integers(1, 40),
    min_samples=st.integers(1, 8),
    radius=st.sampled_from([1e-9, 0.01, 0.05, 0.1, 0.3, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_dbscan_finds_the_clusters_of_scikit_learn(n, min_samples, radius, seed):
    rng = np.random.default_rng(seed)
    distance = distances(rng.normal(size=(n, 3)) + 2 * rng.integers(0, 3, size=(n, 1)))
    got = dbscan(distance, min_samples).at(radius)
    reference = DBSCAN(eps=radius, min_samples=min(min_samples, n), metric="precomputed").fit(distance)
    core = reference.core_sample_indices_
    assert same(got[core], reference.labels_[core]) or len(core) == 0
    assert ((got == -1) == (reference.labels_ == -1)).all()
    assert num_kept(got) == reference.labels_.max() + 1 + (reference.labels_ == -1).sum()
    for point in np.flatnonzero(got >= 0):  # a border point lies near a core point of its cluster
        assert distance[point, core[got[core] == got[point]]].min() <= radius


@pytest.mark.parametrize("copies", [1, 4, 5, 6, 9])
def test_five_copies_or_more_count_once_and_fewer_are_noise(copies):
    """Oracle of 2.14: with 5 samples, the number falls by copies - 1 at a radius of almost nothing."""
    vectors = np.random.default_rng(0).normal(size=(20, 10))
    vectors[:copies] = vectors[0]
    kept = num_kept(dbscan(distances(vectors)).at(1e-9))
    assert kept == (20 - copies + 1 if copies >= 5 else 20)


def test_a_group_of_fewer_channels_than_samples_can_still_become_one_cluster():
    distance, _ = blobs(3, 3)
    assert num_kept(dbscan(distance).at(0.0)) == 3
    assert num_kept(dbscan(distance).at(dbscan(distance).top)) == 1
    assert num_kept(dbscan(np.zeros((1, 1))).at(0.0)) == 1


def test_average_linkage_is_that_of_scikit_learn():
    distance, _ = blobs(30, 6, spread=0.4)
    tree = agglomerative(distance)
    for k in (1, 2, 5, 13, 30):
        reference = AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage="average").fit(distance)
        assert same(tree.into(k), reference.labels_)
    heights = np.linspace(0, tree.top, 50)
    widths = [num_kept(tree.at(h)) for h in heights]
    assert widths == sorted(widths, reverse=True)
    assert (widths[0], widths[-1]) == (30, 1)


@pytest.mark.parametrize("kind", ["dbscan", "agglomerative", "dbs"])
def test_every_clusterer_finds_well_separated_clusters_and_one_at_its_top(kind):
    distance, own = blobs(48, 4)
    clusters = cluster(kind, distance, np.random.default_rng(1))
    radii = np.linspace(0, clusters.top, 400)
    assert any(same(clusters.at(radius), own) for radius in radii)
    assert num_kept(clusters.at(clusters.top)) == 1
    labels = clusters.at(radii[7])
    firsts = [int(np.flatnonzero(labels == label)[0]) for label in range(labels.max() + 1)]
    assert firsts == sorted(firsts)  # numbered by first member


@pytest.mark.parametrize("kind", ["dbscan", "agglomerative", "dbs"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_tiny_and_equal_groups(kind, n):
    for distance in (np.zeros((n, n)), np.ones((n, n)) - np.eye(n)):
        clusters = cluster(kind, distance, np.random.default_rng(0))
        assert num_kept(clusters.at(clusters.top)) == 1
        assert clusters.at(0.0).shape == (n,)
    clusters = cluster(kind, np.zeros((n, n)), np.random.default_rng(0))
    assert num_kept(clusters.at(1e-9)) == 1


def test_silhouettes_are_those_of_scikit_learn_and_choose_the_number_of_clusters():
    distance, own = blobs(40, 8, spread=0.3)
    for labels in (own, agglomerative(distance).into(15)):
        assert silhouette(distance, labels) == pytest.approx(silhouette_score(distance, labels, metric="precomputed"))
    assert silhouette(distance, np.zeros(40, dtype=int)) == 0
    assert same(by_silhouette(agglomerative(distance), distance), own)  # 8 = 0.2 * 40


def test_representatives_are_medoids_and_noise_and_come_first():
    points = np.array([0.0, 0.1, 0.25, 5.0, 5.0, 9.0])
    distance = np.abs(points[:, None] - points)
    labels = np.array([0, 0, 0, 1, 1, -1])
    score = np.array([9.0, 1.0, 8.0, 2.0, 3.0, 0.0])
    chosen = representatives(labels, distance, score)
    assert chosen.tolist() == [False, True, False, False, True, True]  # of two equals the one with the higher score
    order = np.argsort(-preferring(chosen, score), kind="stable")
    assert order.tolist() == [4, 1, 5, 0, 2, 3]
    ties = preferring(np.array([False, True, True, False]), np.zeros(4))
    assert np.argsort(-ties, kind="stable").tolist() == [1, 2, 0, 3]


@settings(max_examples=25)
@given(bound=st.floats(0.1, 1.0), kind=st.sampled_from(["dbscan", "agglomerative"]), seed=st.integers(0, 99))
def test_the_calibrated_radius_meets_the_limit_and_a_little_less_does_not(bound, kind, seed):
    groups = {name: blobs(n, 5, seed, 0.5)[0] for name, n in (("a", 20), ("b", 30))}
    clusters = {name: cluster(kind, d, np.random.default_rng(0)) for name, d in groups.items()}

    def widths(radius):
        return [num_kept(c.at(radius)) for c in clusters.values()]

    limit = Limit("macs_ratio", lambda w: w.sum(axis=1) / 50, bound)
    radius = calibrate(clusters, limit, widths)
    assert limit.of(widths(radius)) <= bound
    if radius > 0:
        top = max(c.top for c in clusters.values())
        assert limit.of(widths(radius - top * 2.0**-39)) > bound


def test_unknown_clusterers_and_removed_channels_are_refused():
    with pytest.raises(ValueError, match="unknown clusterer 'kmeans'; known: dbscan, agglomerative, dbs"):
        cluster("kmeans", np.zeros((3, 3)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="leave out channels that were removed"):
        cluster("dbscan", np.array([[0, np.inf], [np.inf, 0]]), np.random.default_rng(0))


# -- databionic swarm --------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 3000))
def test_the_grid_has_the_stated_form(n):
    grid = Grid.of(n)
    assert grid.size >= 4 * n
    assert grid.lines % 4 == grid.columns % 4 == 0
    assert 0.7 < grid.lines / grid.columns < 1
    assert 1 <= grid.least_radius < grid.lines / 2


def test_the_payoff_by_hand():
    grid = Grid(12, 16)
    positions = np.array([0, 1, 15, 6 * 16 + 8])  # the third is the first one's neighbour round the torus
    D = np.array([[0, 0.5, 1.0, 9], [0.5, 0, 2, 9], [1, 2, 0, 9], [9, 9, 9, 0]])
    R = 1.0  # reaches to d^2 < pi: distance 1, but not 2
    h = 1 - 1 / np.pi
    got = payoff(D, np.arange(4), positions[:, None], positions, grid, R)[:, 0]
    assert got == pytest.approx([1 - (h * 0.5 + h * 1.0) / (2 * h), 1 - 0.5, 1 - 1.0, 1 - 9])
    far = payoff(D[:1], np.arange(1), np.array([[6 * 16 + 7, 3]]), positions, grid, R)
    assert far[0] == pytest.approx([1 - 9, 1 - (0.5 + 1.0 + 9) / 3])  # nobody is near the second: its mean distance


def test_bots_never_share_a_position_and_only_jump_where_they_are_happier():
    distance, _ = blobs(40, 4)
    D, grid, rng = distance / distance.max(), Grid.of(40), np.random.default_rng(0)
    positions = rng.choice(grid.size, 40, replace=False)
    for _ in range(50):
        moved, _ = jump(D, positions, grid, 4.0, 0.5, rng)
        assert len(set(moved.tolist())) == 40
        assert (moved != positions).sum() <= 20
        for bot in np.flatnonzero(moved != positions):
            both = payoff(D[[bot]], np.array([bot]), np.array([[positions[bot], moved[bot]]]), positions, grid, 4.0)[0]
            assert both[1] > both[0]
        positions = moved


def test_alike_channels_settle_near_one_another():
    distance, own = blobs(60, 3)
    grid = Grid.of(60)
    positions = swarm(distance, grid, np.random.default_rng(0))
    apart = np.abs(positions[:, None] // grid.columns - positions // grid.columns)
    down = np.minimum(apart, grid.lines - apart)
    apart = np.abs(positions[:, None] % grid.columns - positions % grid.columns)
    on_grid = np.hypot(down, np.minimum(apart, grid.columns - apart))
    alike = own[:, None] == own
    assert on_grid[alike].mean() < 0.75 * on_grid[~alike].mean()


def test_neighbours_reach_round_the_torus():
    grid = Grid(12, 16)
    positions = np.array([0, 15, 11 * 16, 6 * 16 + 8, 6 * 16 + 9])
    edges = {tuple(edge) for edge in neighbours(positions, grid).tolist()}
    assert {(0, 1), (0, 2), (3, 4)} <= edges
    assert all(a < b for a, b in edges)
    full = neighbours(np.arange(grid.size), grid)  # a full torus: every position has its four neighbours, at least
    assert all((min(p, q), max(p, q)) in set(map(tuple, full.tolist())) for p, q in [(0, 15), (0, 176), (17, 33)])


def test_the_swarm_depends_on_its_generator_only():
    distance, _ = blobs(30, 3)
    trees = [dbs(distance, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (trees[0].merges == trees[1].merges).all()
    assert (trees[0].merges != trees[2].merges).any()


def test_the_work_of_a_large_group_is_bounded(monkeypatch):
    from secateur.pruning.search.methods import clustering

    calls = []
    real = clustering.jump
    monkeypatch.setattr(clustering, "WORK", 200 * 200 * 20)
    monkeypatch.setattr(clustering, "jump", lambda *args: calls.append(1) or real(*args))
    distance, _ = blobs(200, 4)
    clustering.swarm(distance, Grid.of(200), np.random.default_rng(0))
    assert len(calls) <= 20
