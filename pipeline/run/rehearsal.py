"""A search without its network: the same strategy and the same loop, answered by arithmetic, to count requests.

Every channel of a group is worth a fixed share of all accuracy, training wins back most of what was lost, and a
network's latency falls with its MACs. Where a search goes depends on its answers, so the counts are those of one
plausible search.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from secateur.pipeline.config.schema import RunFile
from secateur.pipeline.run.journal import Journal, Record
from secateur.pipeline.run.opening import make_strategy
from secateur.pipeline.run.ranking import rank_exactly
from secateur.pipeline.run.scope import STAGE, choose_scope
from secateur.pipeline.run.study import Study
from secateur.pipeline.training.statistics import RECALIBRATION_SHARE
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import costs
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import (
    DENSE,
    RANDOM,
    AuxiliaryTrained,
    AuxiliaryTraining,
    Budget,
    BudgetSpent,
    Candidate,
    Distort,
    Evaluation,
    FineTune,
    FineTuned,
    Goal,
    MaskedLoss,
    Predict,
    Score,
    Time,
)
from secateur.pruning.search.reward import make_reward
from secateur.pruning.search.scope import Spaces
from secateur.pruning.search.support import SearchError

ACCURACY, UNTRAINED = 0.9, 0.1
"""Of the unpruned network, and of one with random weights."""
REGAINED = 0.9
"""Share of the lost accuracy that training wins back."""
CHECK_EVERY = 10
"""One in so many plans of a trusted latency model is measured all the same, as ``secateur.pipeline.evaluation.latency``
does."""
CPU_SECONDS = 0.5
"""What a rehearsal may take; a search that has not ended by then is counted as far as it came."""
TRAIN_OVER_FORWARD = 3
"""MACs of a training step to those of a forward pass."""
SCORED_IMAGES = 128
"""Training images of a saliency that names no number."""
FREE = frozenset({"l1", "l2", "random", "uniform"})
"""Saliencies that look at no image."""

Work = dict[str, float]
"""How often each of ``secateur.pipeline.run.estimate``'s steps is taken; of images, in whole images of the unpruned
network."""


@dataclass(frozen=True)
class Counted:
    """What a search will ask for.

    Args:
        work: of the search, with the reference's measurement and the ranking in float32.
        finals: MACs ratio of each plan that goes on to fine-tuning.
        evaluations: candidates evaluated, fine-tuned ones included.
        epochs: of training during the search.
        complete: whether the search came to its end; else these are the least numbers.
    """

    work: Work
    finals: tuple[float, ...]
    evaluations: int
    epochs: float
    complete: bool


def share(macs_ratio: float) -> float:
    """Of the unpruned network's time that a network takes: small layers keep a processor less busy."""
    return (1 + macs_ratio) / 2


class OutOfTime(Exception):  # noqa: N818 - a signal
    """The rehearsal has taken as long as it may."""


def trained(accuracy: float) -> float:
    """What training makes of an accuracy."""
    return accuracy + REGAINED * (ACCURACY - accuracy)


class Pages:
    """A journal that is kept nowhere; the seconds of a record are those that its work is estimated to take."""

    path = Path("rehearsal")

    def __init__(self) -> None:
        self.records: list[Record] = []

    def append(self, record: Record) -> Record:
        spent = record["spent"]
        stored = {**record, "spent": {**spent, "seconds": spent["estimated_seconds"]}}
        return stored


class Rehearsal:
    """Answers a study's requests (its ``Oracle``) without a network, and counts what they would take.

    Args:
        config: the run file.
        graph: the network's channel groups.
        images: of the training split, and of the search split that candidates are scored on.
        metrics: names of the accuracies that an evaluation has.
        seconds: of each step of ``Work``, for budgets of seconds.
    """

    def __init__(
        self,
        config: RunFile,
        graph: ChannelGraph,
        images: tuple[int, int],
        metrics: Sequence[str],
        seconds: Mapping[str, float],
    ) -> None:
        self.config, self.graph, self.metrics, self.seconds = config, graph, metrics, seconds
        self.num_train, self.num_scored = images
        self.work: Work = defaultdict(float)
        self.full = PruningPlan.full(graph.groups)
        rng = np.random.default_rng(7)
        drawn = {group.name: rng.random(group.size) for group in graph.groups}
        self.value = {name: values * ACCURACY / values.sum() for name, values in drawn.items()}
        self.weights = {DENSE: (self.full, ACCURACY), RANDOM: (self.full, UNTRAINED)}
        self.whole = self._costs(self.full)
        self._image_macs = 0.0
        self._met: set[tuple[str, str, bool]] = set()
        self._timed: set[str] = set()
        self._untimed = 0
        self._ends = time.process_time() + CPU_SECONDS

    @property
    def spent(self) -> Mapping[str, Any]:
        """Running totals, as a study asks for them.

        Raises:
            OutOfTime: the rehearsal has taken ``CPU_SECONDS``.
        """
        if time.process_time() > self._ends:
            raise OutOfTime
        seconds = sum(count * self.seconds.get(step, 0.0) for step, count in self.work.items())
        return {"estimated_seconds": seconds, "image_macs": self._image_macs}

    # -- the Oracle of a study -----------------------------------------------------------------------------------------

    def ahead(self, candidates: Sequence[Candidate], latency: bool, floor: float | None = None) -> None: ...

    def remember(self, candidate: Candidate, latency: bool, evaluation: Evaluation, *, exact: bool = False) -> None: ...

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        return True

    def evaluate(
        self, candidate: Candidate, latency: bool, floor: float | None = None, *, exact: bool = False
    ) -> Evaluation:
        plan, accuracy = candidate.plan, self._accuracy(candidate)
        ratio = self.macs_ratio(plan)
        given_up = floor is not None and accuracy < floor
        key = (plan.digest, candidate.base, exact)
        if key not in self._met:
            self._met.add(key)
            self.work["networks"] += 1
            way = "images_forwarded" if exact else "images_scored"
            wanted, seen = self.config.search.num_recalibration_images, self.num_scored * (0.5 if given_up else 1.0)
            recalibrated = wanted if exact else min(wanted, self.num_scored // RECALIBRATION_SHARE)
            self.work[way] += seen * share(ratio)
            self._image_macs += (seen + recalibrated) * ratio * self.whole["macs"]
            self.work["images_forwarded"] += recalibrated * share(ratio)
        if given_up:
            return Evaluation("infeasible", "cannot reach the floor")
        if latency:
            self._time(plan, exact=exact)
        return self._evaluation(plan, accuracy, latency=latency)

    def exact(self, candidate: Candidate, precision: str = "fp32") -> Evaluation:
        return self.evaluate(candidate, latency=False, exact=True)

    def finetune(self, request: FineTune) -> tuple[FineTuned, dict[str, str]]:
        candidate, recipe = request.candidate, self.config.finetune
        distilled = recipe.distill is not None if request.distill is None else request.distill
        self._train(request.epochs, self.macs_ratio(candidate.plan), distilled=distilled)
        self._image_macs += request.epochs * self.epoch_work(request)
        plan, accuracy = self.weights[candidate.base]
        tuned, base = trained(self._accuracy(candidate)), f"tuned-{len(self.weights)}"
        self.weights[base] = (plan, trained(accuracy)) if request.write_back else (candidate.plan, tuned)
        after = Candidate(candidate.id, candidate.plan, candidate.origin, candidate.parents, base)
        self.evaluate(after, request.latency, exact=True)
        return FineTuned(base, self._evaluation(candidate.plan, tuned, latency=request.latency)), {}

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, dict[str, str]]:
        self._train(request.epochs, 1.0, distilled=False)
        self._image_macs += request.epochs * self.epoch_work(request)
        base = f"learned-{len(self.weights)}"
        self.weights[base] = self.full, ACCURACY - 0.05
        return AuxiliaryTrained(
            base, self.value, self.evaluate(Candidate(0, self.full, "", (), base), latency=False)
        ), {}

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        ratio = self.macs_ratio(request.candidate.plan) if isinstance(request, FineTune) else 1.0
        return TRAIN_OVER_FORWARD * ratio * self.num_train * self.whole["macs"]

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        images = float(request.options.get("images", SCORED_IMAGES))
        by_features = request.criterion == "feature_distance"
        if request.criterion not in FREE:
            self.work["images_forwarded" if by_features else "images_trained"] += images
        found = {}
        for name, value in self.value.items():
            gone = ~(request.plan or self.full).mask(name)
            answer = np.abs(value[:, None] - value[None]) if by_features else value.copy()
            if by_features:
                answer[gone], answer[:, gone] = np.inf, np.inf
            else:
                answer[gone] = -np.inf
            found[name] = answer
        return found

    def masked_loss(self, request: MaskedLoss) -> np.ndarray:
        images = request.images or self.num_scored
        self.work["images_forwarded"] += len(request.plans) * images
        self._image_macs += images * sum(self.macs_ratio(plan) for plan in request.plans) * self.whole["macs"]
        return np.array([1 - self._accuracy(Candidate(0, plan, "", (), request.base)) for plan in request.plans])

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        passed = 2 * len(request.removed) * request.batch_size
        self.work["images_forwarded"] += passed
        self._image_macs += passed * self.whole["macs"]
        names = dict.fromkeys(name for removed in request.removed for name in removed)
        return {
            name: np.array([self.value[name][list(removed.get(name, ()))].sum() for removed in request.removed])
            for name in names
        }

    def time(self, request: Time) -> np.ndarray:
        for plan in request.plans:
            self._time(plan, exact=True)
        return np.array([self._latency(plan) for plan in request.plans])

    def predict(self, request: Predict) -> Mapping[str, np.ndarray]:
        """None is trusted here, and methods go on with measurements; those of a model are as many as it may make."""
        del request
        if self.config.search.latency.mode == "auto":
            self.work["measurements"] += max(0, self.config.search.latency.measurements - len(self._timed))
            self._untimed = 1  # a model is there from now on
        return {}

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _train(self, epochs: float, ratio: float, *, distilled: bool) -> None:
        images = epochs * self.num_train
        self.work["images_trained"] += images * share(ratio)
        self.work["images_taught"] += images if distilled else 0.0

    def _time(self, plan: PruningPlan, *, exact: bool) -> None:
        """Count a measurement, unless the plan was measured or a model would do."""
        if plan.digest in self._timed:
            return
        settings = self.config.search.latency
        modelled = self._untimed or len(self._timed) >= settings.measurements
        if modelled and settings.mode == "auto" and not exact:
            self._untimed += 1
            if self._untimed % CHECK_EVERY:
                return
        self._timed.add(plan.digest)
        self.work["measurements"] += 1

    def _accuracy(self, candidate: Candidate) -> float:
        plan, accuracy = self.weights[candidate.base]
        lost = sum(
            float(value[list(plan.kept[name])].sum() - value[list(candidate.plan.kept[name])].sum())
            for name, value in self.value.items()
        )
        return max(UNTRAINED, accuracy - lost)

    def _costs(self, plan: PruningPlan) -> Mapping[str, float]:
        found = costs(self.graph, np.array([[plan.widths[group.name] for group in self.graph.groups]]))
        return {"macs": float(found.macs[0]), "params": float(found.params[0])}

    def macs_ratio(self, plan: PruningPlan) -> float:
        """MACs of a plan, as a ratio to the unpruned network's."""
        return self._costs(plan)["macs"] / self.whole["macs"]

    def _latency(self, plan: PruningPlan) -> float:
        return math.sqrt(self.macs_ratio(plan))

    def _evaluation(self, plan: PruningPlan, accuracy: float, *, latency: bool) -> Evaluation:
        costs = self._costs(plan)
        metrics = dict.fromkeys(self.metrics, accuracy) | {"loss": 1 - accuracy}
        metrics |= {"macs": costs["macs"], "params": costs["params"], "size_bytes": 4 * costs["params"]}
        if latency:
            ratio = self._latency(plan)
            metrics |= {"latency_ratio": ratio, "p50_ms": ratio, "p95_ms": ratio, "latency_measured": 1.0}
        return Evaluation("ok", "", metrics)


def rehearse(
    config: RunFile,
    graph: ChannelGraph,
    spaces: Spaces,
    images: tuple[int, int],
    metrics: tuple[str, str],
    seconds: Mapping[str, float],
) -> Counted:
    """Count what a run's search will ask for, by running it on made-up answers.

    Args:
        config: the run file.
        graph: the network's channel groups.
        spaces: the widths the search may choose from, in either scope.
        images: of the training split, and of the search split that candidates are scored on.
        metrics: the workload's own metric, and that of the search.
        seconds: of each step of ``Work``.
    """
    oracle = Rehearsal(config, graph, images, metrics, seconds)
    budget, target = Budget(**config.search.budget.model_dump()), Goal(**config.search.target.model_dump())
    reference = oracle.evaluate(Candidate(0, oracle.full, "reference"), latency=True)
    if target.latency_ratio is not None:
        oracle.evaluate(Candidate(0, spaces.whole.smallest(), "smallest"), latency=True)
    reward = make_reward(config.reward.preset, reference, metrics[1], **config.reward.options)
    pages = cast(Journal, Pages())
    study = Study(pages, oracle, budget=budget, closes=target != Goal())
    before = Study(pages, oracle, stage=STAGE, budget=budget)
    top, complete = config.finetune.top, True
    finals: tuple[float, ...] = ()

    def merit(evaluation: Evaluation) -> tuple[bool, float]:
        return target.met(evaluation, reference), reward(evaluation)

    try:
        scope = choose_scope(config, before, graph, spaces, reference, reward, metrics[1])
        study.charge(before.spent)
        strategy = make_strategy(config, graph, spaces.of(scope.scope), reference, reward, metrics[1], rehearsed=True)
        archive = study.run(strategy)
        again = Study(pages, oracle, stage="ranking")
        ranked, _ = rank_exactly(again, archive, reference, oracle.full, top, lambda against: merit)
        plans = {e.candidate.plan.digest: e.candidate.plan for e in ranked if not e.candidate.plan.is_full}
        finals = tuple(oracle.macs_ratio(plan) for plan in list(plans.values())[:top])
    except OutOfTime:
        complete = False
    except (SearchError, BudgetSpent):
        pass  # made-up answers lead nowhere: what was asked until then is what is known
    if not finals:
        finals = (target.macs_ratio or 0.5,) * top
    return Counted(oracle.work, finals, int(study.spent["evaluations"]), study.spent["epochs"], complete)
