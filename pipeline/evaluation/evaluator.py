"""PruningPlan -> Evaluation: weights in, accuracy, MACs and measured latency out.

An ``Evaluator`` owns an accuracy evaluator, a latency oracle, a trainer and a saliency scorer, and delegates. By itself
it only remembers: a plan seen before is answered from memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.export.qdq import DEFAULT_SCHEME, most_careful
from secateur.export.quantize import file_word
from secateur.pipeline.config.schema import FinetuneSection, SearchSection
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation.accuracy import Accuracy, AccuracyEvaluator, AccuracyRequest, Key
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.fleet_latency import FleetLatencies
from secateur.pipeline.evaluation.latency import Figures, Latencies, LatencyOracle
from secateur.pipeline.evaluation.onnx_files import OnnxFiles, PreciseFiles
from secateur.pipeline.evaluation.precisions import FLOAT, Precisions
from secateur.pipeline.evaluation.saliency import SaliencyScorer
from secateur.pipeline.evaluation.timing import Timer
from secateur.pipeline.evaluation.trainer import Trained, Trainer
from secateur.pipeline.evaluation.worker_pool import WorkerPool
from secateur.pipeline.progress import ProgressView, Silent
from secateur.pipeline.training.curve import TrainingError
from secateur.pruning.channels import ChannelGraph
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan, SearchSpace
from secateur.pruning.search.protocol import (
    DENSE,
    AuxiliaryTrained,
    AuxiliaryTraining,
    Candidate,
    Distort,
    Evaluation,
    FineTune,
    FineTuned,
    MaskedLoss,
    Predict,
    Score,
    Time,
    on_images,
)

FULL_EVERY = 8
"""Where the search goes by a stand-in for the metric, one of so many plans gets the metric too, to see them agree."""


class Evaluator:
    """Answers a study's requests for one baseline network (the ``Oracle`` of ``secateur.pipeline.run.study``).

    Args:
        accuracy: evaluates networks on the search split; has the network and its weights.
        latencies: knows the plans' latencies on the run's device, or on all of them.
        trainer: fine-tunes candidates, and performs auxiliary trainings.
        saliency: scores channels.
        files: the plans' ONNX files, whose sizes count.
        workers: worker processes that evaluate candidates; they need a deterministic accuracy evaluator.
        precisions: which may ship, in the order of the run file, with who knows the plans' latencies in each; None =
            fp32 alone. ``latencies`` is that of fp32, which the unpruned network is in.
    """

    def __init__(
        self,
        accuracy: AccuracyEvaluator,
        latencies: LatencyOracle,
        trainer: Trainer,
        saliency: SaliencyScorer,
        files: OnnxFiles,
        workers: WorkerPool | None = None,
        precisions: Mapping[str, LatencyOracle] | None = None,
    ) -> None:
        self.precisions = precisions or {FLOAT: latencies}
        self._merit: Callable[[Evaluation], Any] | None = None
        self.accuracy, self.latencies, self.trainer, self.saliency = accuracy, latencies, trainer, saliency
        self.files, self.workers = files, workers
        self._known: dict[Key, Accuracy] = {}
        self._images_of_workers = self._image_macs_of_workers = 0

    @property
    def graph(self) -> ChannelGraph:
        """The channel groups that plans are about."""
        return self.accuracy.baseline.graph

    @property
    def spent(self) -> Mapping[str, int]:
        """Running totals: images forwarded and trained on, image-MACs (``Budget``), measurements.

        What a fast path saves, kept activations for example, counts as if it had been computed.
        """
        forwarded = self.accuracy.images_forwarded + self.saliency.images_forwarded + self._images_of_workers
        computed = self.accuracy.image_macs + self.saliency.image_macs + self._image_macs_of_workers
        return {
            "images_forwarded": forwarded,
            "images_trained": self.trainer.images_trained,
            "image_macs": computed + self.trainer.image_macs,
            "measurements": sum(oracle.num_measurements for oracle in self._oracles),
        }

    @property
    def _oracles(self) -> list[LatencyOracle]:
        """Each that knows latencies; that of fp32 times the unpruned network, whatever may ship."""
        return [self.latencies, *(oracle for name, oracle in self.precisions.items() if name != FLOAT)]

    def prefer(self, merit: Callable[[Evaluation], Any]) -> None:
        """From now on a candidate's precision is the one that is worth most, where its latency is asked for.

        Until then, and where accuracy alone is asked for, it is the first that the run file allows.
        """
        self._merit = merit

    def calibrate(self, reference: Evaluation) -> None:
        """Take the unpruned network's latency from an earlier evaluation, so that all candidates share one scale."""
        self.latencies.take(self.accuracy.baseline.full, reference.metrics)

    def network(self, plan: PruningPlan, base: str = DENSE) -> nn.Module:
        """The pruned network with weights cut from ``base``, on the compute device, in eval mode."""
        return self.accuracy.weights.network(plan, base)

    # -- candidates ----------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        candidate: Candidate,
        latency: bool,
        floor: float | None = None,
        *,
        exact: bool = False,
        precision: str | None = None,
    ) -> Evaluation:
        """Accuracy on the search split, MACs and params; with ``latency`` also file size and latency on the device.

        Args:
            exact: the workload's own metric, in float32; and the latency measured, even where a model would do.
            precision: of the network; None = the best of those that may ship.

        Raises:
            PlanError: the plan is of another network.
            DeviceError: a device cannot measure it.
            UserError: the workers, or the one forward pass of a deterministic search, cannot do this at all.
        """
        candidate.plan.validate(self.graph)
        scored: list[Evaluation] = []
        for name in [precision] if precision else self._tried(candidate.plan, latency):
            scored.append(self._evaluate(candidate, latency, floor, exact, name))
            if name == FLOAT and scored[-1].status == "infeasible":  # no precision is more accurate
                break
        usable = [evaluation for evaluation in scored if evaluation.status == "ok"]
        best = max(usable, key=self._merit) if self._merit and usable else (usable or scored)[0]
        seconds = {"seconds": sum(e["seconds"] for e in usable)} if len(usable) > 1 else {}
        return replace(best, scored=len(scored), metrics={**best.metrics, **seconds})

    def _tried(self, plan: PruningPlan, latency: bool) -> Sequence[str]:
        """The precisions in which a plan is evaluated; the unpruned network is in fp32."""
        if plan.is_full:
            return [FLOAT]
        return list(self.precisions)[: None if latency and self._merit else 1]

    def _evaluate(
        self, candidate: Candidate, latency: bool, floor: float | None, exact: bool, precision: str
    ) -> Evaluation:
        """A candidate's evaluation in one precision."""
        plan = candidate.plan
        totals = cost(self.graph, plan)
        metrics: dict[str, float] = {"macs": float(totals.macs), "params": float(totals.params)}
        accuracy = self._accuracy(self._request(candidate, latency, floor, exact=exact, precision=precision))
        metrics |= accuracy.metrics
        told = partial(Evaluation, metrics=metrics, forward=accuracy.forward, precision=precision)
        if accuracy.status != "ok":
            return told(accuracy.status, accuracy.reason)
        if not all(math.isfinite(value) for value in metrics.values()):
            return told("failed", "the network's outputs are not finite numbers (NaN)")
        started = time.perf_counter()
        if latency:
            try:
                metrics |= self.latency(plan, exact=exact, precision=precision)
            except torch.OutOfMemoryError as error:
                return told("failed", str(error).splitlines()[0])
        metrics["seconds"] = accuracy.seconds + time.perf_counter() - started
        return told()

    def exact(self, candidate: Candidate, precision: str = FLOAT) -> Evaluation:
        """Accuracy alone, by the workload's own metric: what final choices are made by.

        Args:
            precision: fp32 = in float32; else of the file in the precision that was chosen.
        """
        return self.evaluate(candidate, latency=False, exact=True, precision=precision)

    def ahead(self, candidates: Sequence[Candidate], latency: bool, floor: float | None = None) -> None:
        """Have the worker pool evaluate candidates that ``evaluate`` will be asked for next."""
        if self.workers is None:
            return
        requests: dict[Key, AccuracyRequest] = {}
        for candidate in candidates:
            candidate.plan.validate(self.graph)
            for name in self._tried(candidate.plan, latency):
                if self.workers.can(self.accuracy, name):
                    request = self._request(candidate, latency, floor, precision=name)
                    requests.setdefault(self.accuracy.key(request), request)
        self.workers.begin(self.accuracy, {key: request for key, request in requests.items() if key not in self._known})

    def remember(self, candidate: Candidate, latency: bool, evaluation: Evaluation, *, exact: bool = False) -> None:
        """Take an evaluation of an earlier process, so that its plan is answered from memory in this one too."""
        if metrics := on_images(evaluation.metrics):
            request = self._request(candidate, latency, None, exact=exact, precision=evaluation.precision)
            self._known[self.accuracy.key(request)] = Accuracy("ok", metrics=metrics, forward=evaluation.forward)

    def latency(self, plan: PruningPlan, *, exact: bool = True, precision: str = FLOAT) -> Figures:
        """Time the plan's ONNX on the device, interleaved with the unpruned network's; on all of them, for several.

        Args:
            exact: False = a model that has proven good may answer instead.

        Returns:
            ``latency_ratio`` (with ``_low`` and ``_high``, 95 %), ``p50_ms`` and ``p95_ms`` (ratio times the
            reference's milliseconds), ``size_bytes``, and ``latency_measured`` (1, or 0 where it was predicted). For
            several devices also each one's own (``secateur.pipeline.evaluation.fleet_latency.combined``).
        """
        oracle = self.latencies if precision == FLOAT else self.precisions[precision]
        found = oracle.of(plan, exact=exact)
        if "size_bytes" in found or (template := self.files.template()) is None:
            return found
        precisions, baseline = self.accuracy.precisions, self.accuracy.baseline
        if precision == FLOAT or precisions is None:
            content = template.slice(plan)
        else:
            content = precisions.network(precision, plan, None, lambda: baseline.cut(plan))
        return {**found, "size_bytes": float(len(content))}

    def latency_report(self) -> dict[str, Any]:
        """How plans came to their latencies in fp32, and under ``precisions`` in the others that may ship."""
        others = {name: oracle.report() for name, oracle in self.precisions.items() if name != FLOAT}
        return {**self.latencies.report(), **({"precisions": others} if others else {})}

    # -- trainings -----------------------------------------------------------------------------------------------------

    def finetune(self, request: FineTune) -> tuple[FineTuned, dict[str, str]]:
        """Train the candidate's network, and evaluate it with its new weights; where training fails, it failed."""
        candidate, started = request.candidate, time.perf_counter()
        try:
            trained = self.trainer.finetune(request)
        except TrainingError as error:
            return FineTuned(candidate.base, Evaluation("failed", str(error))), {}
        evaluation = self.evaluate(replace(candidate, base=trained.base), request.latency, exact=True)
        seconds = {"seconds": time.perf_counter() - started}
        evaluation = replace(evaluation, metrics={**evaluation.metrics, **seconds})
        return FineTuned(trained.base, evaluation), {"sha256": trained.sha256}

    def train_auxiliary(self, request: AuxiliaryTraining) -> tuple[AuxiliaryTrained, dict[str, str]]:
        """Train the unpruned network with something added, and evaluate it with its new weights.

        Raises:
            UserError: there is no such training, or it does not take these options.
        """
        try:
            trained: Trained = self.trainer.train_auxiliary(request)
        except TrainingError as error:
            return AuxiliaryTrained("", {}, Evaluation("failed", str(error))), {}
        whole = Candidate(0, self.accuracy.baseline.full, request.kind, (), trained.base)
        evaluation = self.evaluate(whole, latency=False)
        return AuxiliaryTrained(trained.base, trained.scores, evaluation), {"sha256": trained.sha256}

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        """Image-MACs of one epoch of a training."""
        return self.trainer.epoch_work(request)

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        """Make the weights of a journalled training usable again; False if the file is gone or altered."""
        return self.trainer.restore(request, base, checkpoint)

    # -- channels and devices ------------------------------------------------------------------------------------------

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        """Saliency of every channel of every group, or the distances between them.

        Raises:
            UserError: there is no such criterion, or it does not take these options.
        """
        return self.saliency.score(request)

    def masked_loss(self, request: MaskedLoss) -> np.ndarray:
        """Mean loss of each masked network, shape ``(plans,)``."""
        return self.saliency.masked_loss(request)

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        """Change of the next layers' outputs, per group of shape ``(batches,)``.

        Raises:
            UserError: the request names channels that the network does not have.
        """
        return self.saliency.distort(request)

    def time(self, request: Time) -> np.ndarray:
        """Latency ratios of plans in the first precision that may ship, shape ``(plans,)``."""
        first = next(iter(self.precisions))
        ratios = [self.latency(plan, precision=FLOAT if plan.is_full else first) for plan in request.plans]
        return np.array([figures["latency_ratio"] for figures in ratios])

    def predict(self, request: Predict) -> Mapping[str, np.ndarray]:
        """The arrays of the latency model of the first precision that may ship, if it is trusted.

        It measures plans for it first. None for several devices: their models answer for candidates, but no arrays say
        what all of them take.
        """
        del request
        first, latencies = next(iter(self.precisions.items()))
        what = f"  Model the latency on {', '.join(latencies.devices)}" + ("" if first == FLOAT else f" in {first}")
        with self.accuracy.progress.stage(what) as report:
            model = latencies.model(lambda done, total: report(done, total, ""))
            trust = latencies.report()
            for known in trust.get("devices", {"": trust}).values():
                if "median_error" in known:
                    used = "" if known["trusted"] else "; not trusted, plans are measured"
                    each = ", ".join(f"{m}: {error:.1%}" for m, error in known.get("errors", {}).items())
                    told = f"median error {known['median_error']:.1%}" + (f" (in multiples of {each})" if each else "")
                    report(known["samples"], known["samples"], f"{told}{used}")
        return model.to_arrays() if model else {}

    # -- the parts -----------------------------------------------------------------------------------------------------

    def _request(
        self,
        candidate: Candidate,
        latency: bool,
        floor: float | None,
        *,
        exact: bool = False,
        precision: str | None = None,
    ) -> AccuracyRequest:
        """What is asked of the accuracy evaluator; None = in the precision that is tried first."""
        plan, workload = candidate.plan, self.accuracy.baseline.workload
        full = exact or plan.is_full or workload.search_metric == workload.metric
        brief = not full and int(plan.digest[:8], 16) % FULL_EVERY > 0
        images = self.accuracy.recalibration_images(candidate.base, plan, final=exact)
        precision = precision or self._tried(plan, latency)[0]
        return AccuracyRequest(plan, candidate.base, floor, latency or exact, brief, images, precision)

    def _accuracy(self, request: AccuracyRequest) -> Accuracy:
        """From memory where the plan was met before, from a worker where it was asked ahead, else computed here."""
        key = self.accuracy.key(request)
        if key in self._known:
            return self._known[key]
        accuracy = None if self.workers is None else self.workers.answer(key)
        if accuracy is None:
            accuracy = self.accuracy.evaluate(request)
        else:
            self._images_of_workers += accuracy.images_forwarded
            macs = self.accuracy.baseline.macs(request.plan)
            self._image_macs_of_workers += accuracy.images_forwarded * macs
        if accuracy.status == "ok":
            self._known[key] = replace(accuracy, images_forwarded=0, seconds=0.0)
        return accuracy


def make_evaluator(
    baseline: Baseline,
    fleet: Fleet,
    folder: Path,
    search: SearchSection,
    recipe: FinetuneSection,
    *,
    progress: ProgressView | None = None,
    space: SearchSpace | None = None,
    deterministic: bool = False,
    workers: WorkerPool | None = None,
    precisions: Sequence[str] = (FLOAT,),
    schemes: Mapping[str, str] | None = None,
) -> Evaluator:
    """The evaluator of one baseline.

    Args:
        fleet: the devices where latency is measured; their targets are closed by the caller.
        folder: for candidates' ONNX files, trained weights and checkpoints.
        search: images, bounds, batch-norm recalibration, and how far the latency model is trusted.
        recipe: how ``FineTune`` requests are trained (``epochs`` comes with the request).
        space: where a latency model may draw plans to measure from; None = it gets none of its own.
        deterministic: candidates' metrics are the same bits in every process (see ``DeterministicInference``).
        workers: worker processes that evaluate candidates; they need a deterministic evaluator.
        precisions: those that may ship.
        schemes: device -> number types of int8, a name of ``secateur.export.qdq.SCHEMES``; accuracies are of the
            most careful one. None = U8S8 everywhere.
    """
    progress = progress or Silent()
    files = OnnxFiles(baseline, folder, progress)
    of_devices = schemes or dict.fromkeys(fleet.names, DEFAULT_SCHEME)
    of_schemes = {s: Precisions(baseline.workload, files.template, folder, s) for s in set(of_devices.values())}
    made = of_schemes[most_careful(of_schemes)]
    accuracy = AccuracyEvaluator(
        baseline, folder, search, files.template, progress=progress, deterministic=deterministic, precisions=made
    )
    trainer = Trainer(baseline, accuracy.weights, recipe, progress, made)

    def oracle(name: str, dense: Mapping[str, Latencies]) -> dict[str, Latencies]:
        kind = "" if name == FLOAT else f".{file_word(name)}"
        precise = {scheme: PreciseFiles(files, of, name) for scheme, of in of_schemes.items()} if kind else {}
        return {
            device.name: _latencies(
                precise[of_devices[device.name]] if kind else files,
                device,
                folder / fleet.file("latencies", f"{kind}.jsonl", device.name),
                search,
                space,
                dense,
            )
            for device in fleet
        }

    def joined(members: Mapping[str, Latencies]) -> LatencyOracle:
        return FleetLatencies(fleet, members) if len(fleet) > 1 else members[fleet.primary.name]

    dense = oracle(FLOAT, {})
    latencies = joined(dense)
    oracles = {name: latencies if name == FLOAT else joined(oracle(name, dense)) for name in precisions}
    return Evaluator(accuracy, latencies, trainer, SaliencyScorer(accuracy), files, workers, oracles)


def _latencies(
    files: OnnxFiles | PreciseFiles,
    device: Device,
    file: Path,
    search: SearchSection,
    space: SearchSpace | None,
    in_float: Mapping[str, Latencies],
) -> Latencies:
    """What knows the latencies on one device.

    Args:
        in_float: by device, what knows those of fp32, the unpruned network's among them; empty = this one does.
    """

    def dense() -> Figures:
        return in_float.get(device.name, latencies).of(files.baseline.full, exact=True)

    timer = Timer(device, files, dense, profiled=search.latency.mode != "measure")
    latencies = Latencies(
        files.layers,
        timer.measure,
        file,
        search.latency,
        space,
        files.baseline.seed,
        device.name,
        dense if device.name in in_float else None,
    )
    return latencies
