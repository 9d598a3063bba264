"""Rewarded meta-pruning: MetaPruning whose fitness trades accuracy against MACs.

Shibu et al., "Rewarded Meta-Pruning: Meta Learning with Rewards for Channel Pruning" (Mathematics 11(23):4849, 2023,
arXiv 2301.11063). Stages A and C are MetaPruning's (``meta``); in stage B a candidate with accuracy acc and F MACs gets

    R = (BA / (BA - acc))^alpha * -ln(F / BF)        (form V2 of the released code, alpha = 2)

BF are the MACs of the unpruned network. The authors' BA (70.6 % for ResNet-50, 69.76 % for MobileNetV1) is neither a
baseline nor a proxy accuracy and is nowhere explained; R is singular there and falls again above. Ours is the best
proxy accuracy seen, the unpruned network's among them, plus a margin, so no candidate reaches it; candidates are ranked
anew as it grows.

The other choices are those of ``meta``. Without a target there is no window: the reward alone decides.

Least budget: 2 evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.pruning.search.protocol import Budget, Evaluation, Problem, Strategy
from secateur.pruning.search.reward import Reward, make_reward
from secateur.pruning.search.support import check_ranges
from secateur.pruning.search.width_evolution import Settings, evolve

PAPER_BA = 70.6
"""Percentage points; the authors' BA for ResNet-50 and MobileNetV2 on ImageNet."""


@dataclass(frozen=True)
class Options(Settings):
    """Options of Rewarded meta-pruning. The authors' search evaluates about 1000 candidates; ours 200.

    Args:
        weights: ``pruning_net`` (generated; authors) or ``shared`` (one dense set, cut: cheaper; None).
        epochs: of supernet training, in passes over the training split, at most what half of the budget pays for
            (authors: 32 for ResNet-50, 64 for MobileNets; None = 10). 0 = none, with ``shared``: candidates are cut
            from the pretrained network; so they are where the budget pays for next to none.
        lr: learning rate of that training; None = the fine-tuning recipe's (authors: 0.1 and 0.25).
        hidden: units of a layer's generator (authors: 32; 64 for MobileNetV2).
        start: what that training begins with: ``pretrained`` (None) or ``random`` weights (authors).
        iterations: populations evaluated, the first one included (authors: 20).
        population: candidates per iteration (authors: 50).
        parents: the fittest so far, which mutants and children come from (authors: 10).
        mutant_share: share of a population that are mutants, in 0..1 (authors: 0.5).
        crossover_share: share of a population that are children of two parents (authors: 0.5). The rest is random.
        mutation_rate: probability in 0..1 that a gene moves (authors: 0.1).
        step: standard deviation of such a move, in genes of 0.03 keep ratio (our choice; authors: any other gene).
        tolerance: width of the window below the target, as a fraction of it, in 0..1 (authors: 0.05 for ResNet-50).
        max_draws: random draws per population before the window counts as empty; it then begins at the largest uniform
            plan within the target (our choice).
        top: candidates that are measured at the end; they are the archive (specification: 10).
        pick_epochs: epochs that each of them is trained for before the choice (specification: a tenth of the training).
        retrain: what the best are trained from: ``supernet`` = its weights at their widths, ``inherit`` = the
            pretrained network's channels, ``scratch`` = random weights. None = supernet where ``start`` is pretrained
            (authors: scratch).
        paper_compat: as in ``meta``; and BA = 70.6 with neither margin nor guards.
        fitness: ``rewarded`` = R; ``reward`` = the run's own reward.
        alpha: exponent of the accuracy coefficient (authors: 2).
        ba_pp: BA in percentage points; None = the best proxy accuracy seen + ``margin_pp``.
        margin_pp: percentage points between BA and the best proxy accuracy, and the smallest gap that counts.
        measure: time every candidate on the device (about a second each), for a ``reward`` with latency.
    """

    fitness: Literal["rewarded", "reward"] = "rewarded"
    alpha: float = 2.0
    ba_pp: float | None = None
    margin_pp: float = 1.0
    measure: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        tiny = 1e-6
        check_ranges(self, alpha=(tiny, 16), ba_pp=(tiny, 200), margin_pp=(tiny, 100))


def least(problem: Problem, options: Options) -> Budget:
    """A candidate to learn from, and the last one."""
    return Budget(evaluations=2)


def search(problem: Problem, options: Options) -> Strategy:
    """Stages A and B; the archive is what stage C trains, the fittest first.

    Raises:
        SearchError: the target is out of reach, the window rejects every draw, or nothing could be evaluated.
    """

    def fitness_of(whole: Evaluation) -> Rewards:
        return Rewards(problem, options, whole)

    return (yield from evolve(problem, options, fitness_of, latency=options.measure))


@dataclass(frozen=True, eq=False)
class Rewards:
    """Fitness of Rewarded meta-pruning; -inf where the accuracy is not known.

    Args:
        whole: the unpruned network with the supernet's weights.
    """

    problem: Problem
    options: Options
    whole: Evaluation

    def __call__(self, evaluations: Sequence[Evaluation]) -> list[float]:
        known = [e for e in evaluations if not math.isnan(e[self.problem.metric])]
        if not known:
            return [-math.inf] * len(evaluations)
        reward = self.problem.reward if self.options.fitness == "reward" else self.rewarded(known)
        return [-math.inf if math.isnan(e[self.problem.metric]) else reward(e) for e in evaluations]

    def ba_pp(self, known: Sequence[Evaluation]) -> float:
        """BA (3.8), percentage points."""
        if self.options.ba_pp is not None:
            return self.options.ba_pp
        if self.options.paper_compat:
            return PAPER_BA
        accuracies = [e[self.problem.metric] for e in (self.whole, *known)]
        return 100 * max(a for a in accuracies if not math.isnan(a)) + self.options.margin_pp

    def rewarded(self, known: Sequence[Evaluation]) -> Reward:
        """R as a reward (8.3); the guards of 3.4 are the smallest gap and a floor of the efficiency."""
        guards = {} if self.options.paper_compat else {"delta_pp": self.options.margin_pp, "rho_min": 1e-3}
        a0 = self.ba_pp(known)
        reference, metric = self.problem.reference, self.problem.metric
        return make_reward("rewarded_v2", reference, metric, a0_pp=a0, alpha=self.options.alpha, **guards)
