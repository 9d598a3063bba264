"""On a problem whose best plan is known, every method beats random search at equal evaluations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search import METHODS
from secateur.pruning.search.protocol import Archive, Candidate, Goal, Score
from secateur.pruning.search.testing import BASELINE, FakeStudy, chain, drive, study

NAMES = sorted(set(METHODS.names()) - {"random"})
SEEDS = range(20)
FEW = range(8)
"""Seeds where only a warning is wanted: enough for p < 0.01 where a method beats random search clearly."""
CLUSTERING = ("acp", "icp")
SHORT = {
    "acp": {"cycles": 2},
    "ccep": {"outer_iterations": 8, "generations": 3, "finetune_epochs": 0},
    "evofc": {"generations": 8},
    "filter_ensemble": {"rounds": 1},
    "icp": {"noise_first": True},
    "meta": {"iterations": 4, "population": 20},
    "optuna": {"num_plans": 40},
    "rewarded_meta": {"iterations": 4, "population": 20},
}
"""Options that make a method's run short; everything else runs with its defaults."""


class Redundant(FakeStudy):
    """Channels come in families of five that do the same: accuracy is lost with a family's last channel only.

    What the clustering methods are made for; the norms of the channels say nothing.
    """

    family = 5

    def top1(self, candidate: Candidate) -> float:
        plan, accuracy = self.weights[candidate.base]
        return accuracy - (self.lost(candidate.plan) - self.lost(plan))

    def lost(self, plan: PruningPlan) -> float:
        """Accuracy lost with the families that are gone."""
        there = {name: {i // self.family for i in kept} for name, kept in plan.kept.items()}
        return sum(
            float(value[f * self.family])
            for name, value in self.value.items()
            for f in range(len(value) // self.family)
            if f not in there[name]
        )

    def saliency(self, request: Score) -> dict[str, np.ndarray]:
        answer = super().saliency(request)
        if request.criterion != "feature_distance":
            return answer
        families = {name: np.arange(len(value)) // self.family for name, value in self.value.items()}
        apart = {name: (f[:, None] != f[None]).astype(float) for name, f in families.items()}
        return {name: np.where(np.isinf(answer[name]), np.inf, apart[name]) for name in answer}


def make(method: str) -> FakeStudy:
    return Redundant(SearchSpace.of(chain(40, 50, 60))) if method in CLUSTERING else study((12, 16, 20))


def target(method: str) -> Goal:
    return Goal(macs_ratio=0.1 if method in CLUSTERING else 0.6)


def lost(fake: FakeStudy, plan: PruningPlan) -> float:
    """Accuracy that a plan loses as cut from the unpruned weights (what tuning won back is not the search's)."""
    return BASELINE - fake.top1(Candidate(0, plan, "x"))


def best(archive: Archive, fake: FakeStudy, macs_ratio: float) -> float:
    """Minus the loss of the best plan that meets the target."""
    within = macs_ratio * fake.macs(fake.space.full)
    plans = [e.candidate.plan for e in archive if fake.macs(e.candidate.plan) <= within]
    return -min((lost(fake, plan) for plan in plans), default=np.inf)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(SEEDS, marks=pytest.mark.long)], ids=["few", "many"])
@pytest.mark.parametrize("method", NAMES)
def test_it_beats_random_search_at_equal_evaluations(method, seeds, record_property):
    module, control, goal = METHODS.load(method), METHODS.load("random"), target(method)
    options = module.Options(**SHORT.get(method, {}))
    found, drawn = [], []
    for seed in seeds:
        fake, twin = make(method), make(method)
        found.append(best(drive(module.search(fake.problem(goal, seed), options), fake), fake, goal.macs_ratio))
        num_plans = max(1, len(fake.candidates))
        rivals = drive(control.search(twin.problem(goal, seed), control.Options(num_plans=num_plans)), twin)
        drawn.append(best(rivals, twin, goal.macs_ratio))
    p = mannwhitneyu(found, drawn, alternative="greater").pvalue
    record_property("rank_sum_p", float(p))
    print(f"{method}: median {np.median(found):.4f} against {np.median(drawn):.4f}, rank-sum p = {p:.1e}")
    assert p < 0.01
