"""PruningPlan -> Evaluation: weights in, accuracy, MACs and measured latency out.

What can be done once per run is done once: the trace, the ONNX template, the search images on the compute device, the
reference's latency. A plan seen before is answered from memory.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from device_profiles import BenchmarkResult, DeviceProfile, Ratio, Target, measure
from device_profiles.layers import LayerTable
from export.errors import TemplateError
from export.layers import layer_table
from export.slicing import OnnxTemplate, candidate_onnx
from pipeline.config.schema import Distillation, FinetuneSection, SearchSection
from pipeline.devices.fleet import Device, Fleet
from pipeline.errors import UserError
from pipeline.evaluation.accuracy import Ask, Key, Scored, Scorer, recalibrate
from pipeline.evaluation.fleet_latency import FleetLatencies, SharedFiles
from pipeline.evaluation.latency import Latencies
from pipeline.evaluation.worker_pool import BaseFile, Crew
from pipeline.progress import ProgressView
from pipeline.training import auxiliary as learning
from pipeline.training.loop import TrainingError, fit, move
from pipeline.workloads import Workload
from pruning.channels import ChannelGraph
from pruning.cost import cost
from pruning.distortion import distortions
from pruning.feature_maps import feature_distance
from pruning.plan import PruningPlan, SearchSpace
from pruning.saliency import channel_saliency
from pruning.search.protocol import (
    Candidate,
    Distort,
    Evaluation,
    FineTune,
    FineTuned,
    Learn,
    Learned,
    Predict,
    Probe,
    Request,
    Score,
    Time,
    digest_of,
)
from pruning.weights import inherit, silence

__all__ = ["Evaluator", "recalibrate"]

FULL_EVERY = 8
"""Where the search goes by a stand-in for the metric, one of so many plans gets the metric too, to see them agree."""


class Evaluator(Scorer):
    """Answers a study's requests for one baseline network (the ``Oracle`` of ``pipeline.run.study``).

    Args:
        model: the trained, unpruned network; left as it is.
        graph: its channel groups.
        workload: images, loss and metric.
        profile: the device, and how long to measure on it.
        target: where latency is measured; closed by the caller.
        folder: for candidates' ONNX files, trained weights and checkpoints.
        settings: the ``search`` section (images, bounds, batch-norm recalibration).
        recipe: how ``FineTune`` requests are trained (``epochs`` comes with the request).
        seed: of fine-tuning.
        device: where networks are trained and evaluated.
        space: where a latency model may draw plans to measure from; None = it gets none of its own.
        noise_floor: of the device (see ``BenchmarkResult``).
        fleet: the devices, where there are several; ``profile`` and ``target`` are those of the first.
        steady: candidates' metrics are the same to the last bit in every process (see ``SteadyInference``).
        crew: worker processes that score candidates; they need a steady evaluator.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        workload: Workload,
        profile: DeviceProfile,
        target: Target,
        folder: Path,
        settings: SearchSection,
        recipe: FinetuneSection,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        progress: ProgressView | None = None,
        space: SearchSpace | None = None,
        noise_floor: float | None = None,
        fleet: Fleet | None = None,
        steady: bool = False,
        crew: Crew | None = None,
    ) -> None:
        super().__init__(
            model,
            graph,
            workload,
            folder,
            settings,
            self._template_once,
            seed=seed,
            device=device,
            progress=progress,
            steady=steady,
        )
        self.profile, self.target, self.recipe = profile, target, recipe
        self.crew = crew
        self._files_of_bases: dict[str, BaseFile] = {}
        self.fleet = fleet or Fleet([Device(profile, target, noise_floor=noise_floor)])
        self._exporting = threading.RLock()  # devices measure in threads of their own
        self._files = SharedFiles(self._onnx)
        self._members = {
            device.name: Latencies(
                self._layers,
                partial(self._time, device.name),
                folder / self.fleet.file("latencies", ".jsonl", device.name),
                settings.latency,
                space,
                seed,
            )
            for device in self.fleet
        }
        self.latencies: Latencies | FleetLatencies = self._members[profile.name]
        if len(self.fleet) > 1:
            self.latencies = FleetLatencies(self.fleet, self._members)
        self._template: OnnxTemplate | None = None
        self._template_tried = False
        self._table: LayerTable | None = None
        self._table_tried = False
        self._baseline_written = False

    def calibrate(self, reference: Evaluation) -> None:
        """Take the unpruned network's latency from an earlier evaluation, so that all candidates share one scale."""
        self.latencies.take(PruningPlan.full(self.graph.groups), reference.metrics)

    # -- the Oracle of a study ---------------------------------------------------------------------------------------

    def evaluate(
        self, candidate: Candidate, latency: bool, floor: float | None = None, *, exact: bool = False
    ) -> Evaluation:
        """Accuracy on the search split, MACs and params; with ``latency`` also file size and latency on the device.

        Args:
            exact: the workload's own metric, in float32; and the latency measured, even where a model would do.
        """
        plan = candidate.plan
        plan.validate(self.graph)
        totals = cost(self.graph, plan)
        metrics: dict[str, float] = {"macs": float(totals.macs), "params": float(totals.params)}
        scored = self._scored(self._ask(candidate, latency, floor, exact=exact))
        metrics |= scored.metrics
        if scored.status != "ok":
            return Evaluation(scored.status, scored.reason, metrics, scored.forward)
        if not all(math.isfinite(value) for value in metrics.values()):
            return Evaluation("failed", "the network's outputs are not finite numbers (NaN)", metrics, scored.forward)
        started = time.perf_counter()
        if latency:
            try:
                metrics |= self.latency(plan, exact=exact)
            except torch.OutOfMemoryError as error:
                return Evaluation("failed", str(error).splitlines()[0], metrics, scored.forward)
        metrics["seconds"] = scored.seconds + time.perf_counter() - started
        return Evaluation("ok", "", metrics, scored.forward)

    def exact(self, candidate: Candidate) -> Evaluation:
        """Accuracy alone, in float32 and by the workload's own metric: what final choices are made by."""
        return self.evaluate(candidate, latency=False, exact=True)

    def ahead(self, candidates: Sequence[Candidate], latency: bool, floor: float | None = None) -> None:
        """Have the crew score candidates that ``evaluate`` will be asked for next."""
        if self.crew is None:
            return
        asks: dict[Key, Ask] = {}
        for candidate in candidates:
            candidate.plan.validate(self.graph)
            ask = self._ask(candidate, latency, floor)
            asks.setdefault(self._key(ask), ask)
        new = {key: ask for key, ask in asks.items() if key not in self._accuracies}
        used = {ask.base for ask in new.values()}
        self.crew.begin(self, new, {base: file for base, file in self._files_of_bases.items() if base in used})

    def remember(self, candidate: Candidate, latency: bool, evaluation: Evaluation, *, exact: bool = False) -> None:
        """Take an evaluation of an earlier process, so that its plan is answered from memory in this one too."""
        names = {"loss", self.workload.metric, self.workload.search_metric}
        metrics = {name: value for name, value in evaluation.metrics.items() if name in names}
        if metrics:
            key = self._key(self._ask(candidate, latency, None, exact=exact))
            self._accuracies[key] = Scored("ok", metrics=metrics, forward=evaluation.forward)

    def finetune(self, request: FineTune) -> tuple[FineTuned, dict[str, str]]:
        """Train the candidate's network, by default with the baseline as teacher; its weights become a new base."""
        candidate, base = request.candidate, _name(f"{request.candidate.id}-tuned", request)
        student = self.network(candidate.plan, candidate.base)
        recipe = self.recipe.model_copy(update={"epochs": request.epochs})
        distill = (recipe.distill or Distillation()) if request.distill else recipe.distill
        distill = None if request.distill is False else distill
        started = time.perf_counter()
        with self.progress.stage(f"  fine-tune {candidate.origin} {candidate.id}") as report:
            try:
                fit(
                    student,
                    self.workload,
                    self.workload.train,
                    recipe,
                    seed=self.seed,
                    checkpoint=self.bases.path(base).with_suffix(".ckpt"),
                    device=self.device,
                    teacher=self.model if distill else None,
                    distill=distill,
                    part=request.part,
                    report=report,
                )
            except TrainingError as error:
                return FineTuned(candidate.base, Evaluation("failed", str(error))), {}
        self.spent["images_trained"] += round(request.epochs * len(self.workload.train))
        digest = self.bases.tuned(base, candidate.base, candidate.plan, student.state_dict(), request.write_back)
        self._know(request, base, digest)
        tuned = Candidate(candidate.id, candidate.plan, candidate.origin, candidate.parents, base)
        evaluation = self.evaluate(tuned, request.latency, exact=True)
        seconds = {"seconds": time.perf_counter() - started}
        evaluation = replace(evaluation, metrics={**evaluation.metrics, **seconds})
        return FineTuned(base, evaluation), {"sha256": digest}

    def learn(self, request: Learn) -> tuple[Learned, dict[str, str]]:
        """Train the unpruned network with something added; what it leaves becomes a new base."""
        full, base = PruningPlan.full(self.graph.groups), _name(request.kind, request)
        recipe = self.recipe.model_copy(update={"epochs": request.epochs})
        with self.progress.stage(f"  learn {request.kind}") as report:
            try:
                kind = learning.TRAININGS.load(request.kind)
                lesson = learning.Lesson(
                    move(inherit(self.model, self.graph, full, self.bases.state(request.base, full)), self.device),
                    self.graph,
                    self.workload,
                    recipe,
                    self.seed,
                    self.device,
                    self.bases.path(base).with_suffix(".ckpt"),
                    report,
                    request.options,
                )
                outcome = kind.learn(lesson)
            except TrainingError as error:
                return Learned("", {}, Evaluation("failed", str(error))), {}
            except ValueError as error:
                raise UserError(f"search: learning {request.kind}: {error}") from error
        self.spent["images_trained"] += outcome.images or round(request.epochs * len(self.workload.train))
        digest = self.bases.learned(base, request.kind, outcome.state)
        self._know(request, base, digest)
        evaluation = self.evaluate(Candidate(0, full, request.kind, (), base), latency=False)
        return Learned(base, outcome.scores, evaluation), {"sha256": digest}

    def restore(self, request: FineTune | Learn, base: str, checkpoint: Mapping[str, str]) -> bool:
        """Make the weights of a journalled training usable again; False if the file is gone or altered."""
        if isinstance(request, Learn):
            restored = self.bases.restore_learned(base, request.kind, checkpoint)
        else:
            restored = self.bases.restore_tuned(base, request.candidate.plan, request.write_back, checkpoint)
        if restored and checkpoint:
            self._know(request, base, checkpoint["sha256"])
        return restored

    def score(self, request: Score) -> Mapping[str, np.ndarray]:
        """Saliency of every channel of every group, or the distances between them."""
        full = PruningPlan.full(self.graph.groups)
        plan = request.plan or full
        state = self.bases.state(request.base, full)
        dense = move(inherit(self.model, self.graph, full, state), self.device).eval()
        silence(dense, self.graph, plan)
        try:
            if request.criterion == "feature_distance":
                options: dict[str, Any] = {**request.options}
                batches = self._train_batches(request, int(options.pop("images", 200)))
                scores = feature_distance(dense, self.graph, [images for images, _ in batches], **options)
            else:
                batches = self._train_batches(request, int(request.options.get("images", 128)))
                scores = channel_saliency(
                    dense,
                    self.graph,
                    request.criterion,
                    self.seed,
                    batches=batches,
                    loss=self.workload.loss,
                    options=request.options,
                )
        except ValueError as error:  # an unknown criterion: it lists the known ones
            raise UserError(f"search.options: {error}") from error
        return {name: _outside(values, plan.mask(name)) for name, values in scores.items()}

    def probe(self, request: Probe) -> np.ndarray:
        """Mean loss of each masked network, shape ``(plans,)``."""
        batches, losses = list(self._batches_of(request.images or len(self.split))), []
        for plan in request.plans:
            state = self.bases.state(request.base, plan)
            outputs = self.inference.outputs(plan, request.base, state, images=[images for images, _ in batches])
            pairs = zip(outputs, (labels for _, labels in batches), strict=True)
            answers = torch.cat([self.workload.answers(found, labels, brief=True) for found, labels in pairs])
            losses.append(self.workload.metrics(answers, torch.cat([labels for _, labels in batches]))["loss"])
            self.spent["images_forwarded"] += sum(len(labels) for _, labels in batches)
        return np.array(losses)

    def distort(self, request: Distort) -> Mapping[str, np.ndarray]:
        """Change of the next layers' outputs, per group of shape ``(batches,)``."""
        batches = self._train_batches(request, len(request.removed) * request.batch_size, request.batch_size)
        full = PruningPlan.full(self.graph.groups)
        state = self.bases.state(request.base, full)
        images = [images for images, _ in batches]
        try:
            return distortions(self.model, self.graph, request.plan, request.removed, images, state)
        except ValueError as error:
            raise UserError(f"search: {error}") from error

    def time(self, request: Time) -> np.ndarray:
        """Latency ratios of plans, shape ``(plans,)``."""
        return np.array([self.latency(plan)["latency_ratio"] for plan in request.plans])

    def predict(self, request: Predict) -> Mapping[str, np.ndarray]:
        """The latency model's arrays, if it is trusted; measures plans for it first.

        None for several devices: their models answer for candidates, but no arrays say what all of them take.
        """
        del request
        with self.progress.stage(f"  Model the latency on {', '.join(self.fleet.names)}") as report:
            self.latencies.watch = lambda done, total: report(done, total, "")
            model = self.latencies.model()
            trust = self.latencies.report()
            for known in trust.get("devices", {"": trust}).values():
                if "median_error" in known:
                    used = "" if known["trusted"] else "; not trusted, plans are measured"
                    report(known["samples"], known["samples"], f"median error {known['median_error']:.1%}{used}")
        return model.to_arrays() if model else {}

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _ask(self, candidate: Candidate, latency: bool, floor: float | None, *, exact: bool = False) -> Ask:
        plan = candidate.plan
        full = exact or plan.is_full or self.workload.search_metric == self.workload.metric
        brief = not full and int(plan.digest[:8], 16) % FULL_EVERY > 0
        return Ask(plan, candidate.base, floor, exact=latency or exact, brief=brief)

    def _scored(self, ask: Ask) -> Scored:
        """From memory where the plan was met before, from the crew where it was asked ahead, else computed here."""
        key = self._key(ask)
        if key in self._accuracies:
            return self._accuracies[key]
        scored = None if self.crew is None else self.crew.answer(key)
        if scored is None:
            scored = self.compute(ask)
        else:
            self.spent["images_forwarded"] += scored.images_forwarded
        if scored.status == "ok":
            self._accuracies[key] = replace(scored, images_forwarded=0, seconds=0.0)
        return scored

    def _know(self, request: FineTune | Learn, base: str, digest: str) -> None:
        """Note what another process needs to use a base: its file, and what the file means."""
        path = self.bases.path(base)
        if isinstance(request, Learn):
            self._files_of_bases[base] = BaseFile(digest, path, kind=request.kind)
        else:
            self._files_of_bases[base] = BaseFile(digest, path, None if request.write_back else request.candidate.plan)

    def latency(self, plan: PruningPlan, *, exact: bool = True) -> Mapping[str, float]:
        """Time the plan's ONNX on the device, interleaved with the unpruned network's; on all of them, for several.

        Args:
            exact: False = a model that has proven good may answer instead.

        Returns:
            ``latency_ratio`` (with ``_low`` and ``_high``, 95 %), ``p50_ms`` and ``p95_ms`` (ratio times the
            reference's milliseconds), ``size_bytes``, and ``latency_measured`` (1, or 0 where it was predicted). For
            several devices also each one's own (``pipeline.evaluation.fleet_latency.combined``).
        """
        found = self.latencies.of(plan, exact=exact)
        template = self._template_once() if "size_bytes" not in found else None
        return found if template is None else {**found, "size_bytes": float(len(template.slice(plan)))}

    def _train_batches(self, request: Request, num_images: int, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
        """Random training images without augmentation, the same for the same request."""
        split, generator = self.workload.train, torch.Generator().manual_seed(_seed(self.seed, request))
        order = torch.cat(
            [torch.randperm(len(split), generator=generator) for _ in range(1 + (num_images - 1) // len(split))]
        )[:num_images]
        self.spent["images_forwarded"] += num_images
        return [
            self.workload.batch(split, indices, train=False, generator=None, device=self.device)
            for indices in torch.split(order, batch_size)
        ]

    def _layers(self) -> LayerTable | None:
        """The network's layers, read once; None where there is no template to read them from."""
        with self._exporting:
            if not self._table_tried:
                self._table_tried = True
                template = self._template_once()
                self._table = None if template is None else layer_table(template)
            return self._table

    def _time(self, name: str, plan: PruningPlan) -> tuple[dict[str, float], BenchmarkResult]:
        """One measurement at the search tier on the device of a name: figures, and the raw result."""
        full = PruningPlan.full(self.graph.groups)
        baseline = self.folder / "baseline.onnx"
        with self._exporting:
            if not self._baseline_written:
                self._onnx(full, baseline.name)
                self._baseline_written = True
        if plan.is_full:
            result = self._measure(name, {"baseline": baseline})
            tail = result.compared_ms("baseline", 95) / result.compared_ms("baseline", 50)
            idle = result.calibrated_ms("baseline")
            times = {"p50_ms": idle, "p95_ms": idle * tail}
            ratio, size = Ratio(1.0, 1.0, 1.0), baseline.stat().st_size
        else:
            dense = self._members[name].of(full, exact=True)
            with self._files.of(plan) as path:
                result = self._measure(name, {"baseline": baseline, "candidate": path})
                size = path.stat().st_size
            ratio = result.ratio("candidate", "baseline")
            times = {figure: ratio.value * dense[figure] for figure in ("p50_ms", "p95_ms")}
        ratios = {"latency_ratio": ratio.value}
        if ratio.known:
            ratios |= {"latency_ratio_low": ratio.low, "latency_ratio_high": ratio.high}
        return {**ratios, **times, "size_bytes": float(size)}, result

    def _measure(self, name: str, models: Mapping[str, Path]) -> BenchmarkResult:
        """Measure at the search tier, with a profile of the operators where a model can learn from it."""
        nodes = len(models) > 1 and self.settings.latency.mode != "measure" and self._layers() is not None
        device = self.fleet[name]
        result = measure(device.target, device.profile, models, "search", nodes=nodes, noise_floor=device.noise_floor)
        with self._exporting:
            self.spent["measurements"] += 1
        return result

    def _onnx(self, plan: PruningPlan, name: str) -> Path:
        """The ONNX file of a plan: cut from the run's one exported template, or exported afresh where it cannot be."""
        with self._exporting:
            example = self.workload.example_input()
            template = self._template_once()
            pruned = inherit(self.model, self.graph, plan).cpu()
            candidate_onnx(template, pruned, example, plan, self.folder / name)
        return self.folder / name

    def _template_once(self) -> OnnxTemplate | None:
        """The run's template, opened when first needed."""
        with self._exporting:
            if not self._template_tried:
                self._template_tried = True
                self._template = self._open_template(self.workload.example_input())
            return self._template

    def _open_template(self, example: Tensor) -> OnnxTemplate | None:
        """The run's template, exported once and kept as a file; None where the network's cannot be cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "template.onnx"
        if file.exists():
            with contextlib.suppress(TemplateError):
                return OnnxTemplate.load(file, self.graph)
        with self.progress.stage("Export the template") as report:
            dense = inherit(self.model, self.graph, PruningPlan.full(self.graph.groups)).cpu()
            try:
                return OnnxTemplate.export(dense, example, self.graph, file)
            except TemplateError as error:
                report(1, 1, f"every candidate is exported afresh: {error}")
                return None


def _name(prefix: str, request: Request) -> str:
    """A name for what a request leaves behind; the same request gives the same name."""
    return f"{prefix}-{digest_of(request)[:12]}"


def _seed(seed: int, request: Request) -> int:
    return seed ^ int(digest_of(request)[:12], 16)


def _outside(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores with the channels outside the mask as ``Score`` wants them: -inf, or inf where they are distances."""
    values = values.copy()
    if values.ndim == 1:
        values[~mask] = -np.inf
    else:
        values[~mask], values[:, ~mask] = np.inf, np.inf
    return values
