"""MetaPruning: one network learns weights for all widths, then evolution finds the widths.

Liu et al., "MetaPruning: Meta Learning for Automatic Neural Network Channel Pruning" (ICCV 2019, arXiv 1903.10258):

    A. train a PruningNet, whose generators make the weights of every layer for any width vector
    B. evolve width vectors whose cost lies in a window below the target; fitness = accuracy with generated weights
    C. train the best from scratch

Our choices: where the paper trains A and C from random weights, the default begins with the pretrained network, one
set of weights serves all widths, and the archive keeps them; the final ones are brought from the window up to the
target; the window may be one of predicted latency; mutation takes bounded steps. ``paper_compat`` restores all of
these. The search itself is in ``width_evolution``.

Least budget: 2 evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.pruning.search.protocol import Budget, Evaluation, Goal, Problem, Strategy
from secateur.pruning.search.support import SearchError
from secateur.pruning.search.width_evolution import Settings, evolve


@dataclass(frozen=True)
class Options(Settings):
    """Options of MetaPruning. The authors' search evaluates about 1000 candidates; ours 200.

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
        paper_compat: ``pruning_net``, 32 epochs, random ``start``, ``scratch``, mutation (g + U{1..30}) mod 31, widths
            rounded down, initial genes from 12 scales around the target, a strict window in which plans stay as they
            are drawn.
    """


def least(problem: Problem, options: Options) -> Budget:
    """A candidate to learn from, and the last one."""
    return Budget(evaluations=2)


def search(problem: Problem, options: Options) -> Strategy:
    """Stages A and B; the archive is what stage C trains, the fittest first.

    Raises:
        SearchError: there is no target or it is out of reach, the window rejects every draw, or nothing could be
            evaluated.
    """
    if problem.goal == Goal():
        raise SearchError(
            "meta ranks by accuracy alone, so it needs a target: set search.target.macs_ratio or latency_ratio"
        )

    def fitness_of(whole: Evaluation) -> Accuracies:
        return Accuracies(problem.metric)

    return (yield from evolve(problem, options, fitness_of))


@dataclass(frozen=True)
class Accuracies:
    """Fitness of MetaPruning: the proxy accuracy (the paper minimises the top-1 error)."""

    metric: str

    def __call__(self, evaluations: Sequence[Evaluation]) -> list[float]:
        return [evaluation[self.metric] for evaluation in evaluations]
