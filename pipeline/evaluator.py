"""PruningPlan -> Evaluation: weights in, accuracy, MACs and measured latency out.

What can be done once per run is done once: the trace, the ONNX template, the search images on the compute device, the
reference's latency. A plan seen before is answered from memory.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
from pipeline import learning
from pipeline.bases import Bases
from pipeline.config import Distillation, FinetuneSection, SearchSection
from pipeline.errors import UserError
from pipeline.inference import Inference
from pipeline.latency import Latencies
from pipeline.progress import ProgressView, Silent
from pipeline.study import digest_of
from pipeline.training import TrainingError, fit, move
from pipeline.workloads import Split, Workload
from pruning.channels import ChannelGraph
from pruning.cost import cost
from pruning.distortion import distortions
from pruning.feature_maps import feature_distance
from pruning.plan import PruningPlan, SearchSpace
from pruning.saliency import channel_saliency
from pruning.search.protocol import (
    DENSE,
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
)
from pruning.weights import inherit, silence

MAX_BATCH = 128
CACHED_BYTES = 2 << 30
"""Search images are kept on the compute device as float32 up to this size."""


SUPERNET_IMAGES = 1000
"""Training images for re-estimating batch-norm statistics of a supernet's candidate, where the run file names none."""
FULL_EVERY = 8
"""Where the search goes by a stand-in for the metric, one of so many plans gets the metric too, to see them agree."""
LATENCIES = (
    *("latency_ratio", "latency_ratio_low", "latency_ratio_high", "p50_ms", "p95_ms", "size_bytes"),
    "latency_measured",
)


class Evaluator:
    """Answers a study's requests for one baseline network (the ``Oracle`` of ``pipeline.study``).

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
    ) -> None:
        self.device = device or torch.device("cpu")
        self.model, self.graph, self.workload = model.to(self.device).eval(), graph, workload
        self.profile, self.target, self.folder = profile, target, folder
        self.settings, self.recipe, self.seed = settings, recipe, seed
        self.progress = progress or Silent()
        self.split: Split = workload.search.first(settings.images)
        dense_bytes = cost(graph, PruningPlan.full(graph.groups)).activation_bytes
        self._batch_size = max(1, min(MAX_BATCH, (settings.memory_mb << 20) // max(1, dense_bytes)))
        self.bases = Bases(self.model, graph, self._fresh, folder / "weights", self.device)
        self.inference = Inference(
            self.model,
            graph,
            lambda: (images for images, _ in self._images()),
            self._template_once,
            device=self.device,
            cache_bytes=settings.memory_mb << 20,
        )
        self.spent = Counter({"images_forwarded": 0, "images_trained": 0, "measurements": 0})
        self._accuracies: dict[tuple[str, str, bool, bool], Mapping[str, float]] = {}
        self.noise_floor = noise_floor
        self.latencies = Latencies(
            self._layers,
            self._time,
            folder / "latencies.jsonl",
            settings.latency,
            space,
            seed,
        )
        self._batches: list[tuple[Tensor, Tensor]] | None = None
        self._template: OnnxTemplate | None = None
        self._template_tried = False
        self._table: LayerTable | None = None
        self._table_tried = False
        self._baseline_written = False

    def calibrate(self, reference: Evaluation) -> None:
        """Take the unpruned network's latency from an earlier evaluation, so that all candidates share one scale."""
        self.latencies.measured[PruningPlan.full(self.graph.groups).digest] = reference.metrics

    # -- the Oracle of a study ---------------------------------------------------------------------------------------

    def evaluate(
        self, candidate: Candidate, latency: bool, floor: float | None = None, *, exact: bool = False
    ) -> Evaluation:
        """Accuracy on the search split, MACs and params; with ``latency`` also file size and latency on the device.

        Args:
            exact: measure the latency, even where a model would do, and the workload's own metric.
        """
        started = time.perf_counter()
        plan = candidate.plan
        plan.validate(self.graph)
        totals = cost(self.graph, plan)
        metrics: dict[str, float] = {"macs": float(totals.macs), "params": float(totals.params)}
        try:
            full = exact or plan.is_full or self.workload.search_metric == self.workload.metric
            brief = not full and int(plan.digest[:8], 16) % FULL_EVERY > 0
            metrics |= self._accuracy(candidate.base, plan, started, floor, exact=latency, brief=brief)
            if not all(math.isfinite(value) for value in metrics.values()):
                return Evaluation("failed", "the network's outputs are not finite numbers (NaN)", metrics)
            if latency:
                found = self.latency(plan, exact=exact)
                metrics |= {name: found[name] for name in LATENCIES if name in found}
        except _HopelessError as error:
            return Evaluation("infeasible", str(error), metrics)
        except (_OutOfTimeError, torch.OutOfMemoryError) as error:
            return Evaluation("failed", str(error).splitlines()[0], metrics)
        metrics["seconds"] = time.perf_counter() - started
        return Evaluation("ok", "", metrics)

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
        tuned = Candidate(candidate.id, candidate.plan, candidate.origin, candidate.parents, base)
        evaluation = self.evaluate(tuned, request.latency, exact=True)
        seconds = {"seconds": time.perf_counter() - started}
        evaluation = Evaluation(evaluation.status, evaluation.reason, {**evaluation.metrics, **seconds})
        return FineTuned(base, evaluation), {"sha256": digest}

    def learn(self, request: Learn) -> tuple[Learned, dict[str, str]]:
        """Train the unpruned network with something added; what it leaves becomes a new base."""
        full, base = PruningPlan.full(self.graph.groups), _name(request.kind, request)
        recipe = self.recipe.model_copy(update={"epochs": request.epochs})
        with self.progress.stage(f"  learn {request.kind}") as report:
            try:
                kind = learning.load(request.kind)
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
        evaluation = self.evaluate(Candidate(0, full, request.kind, (), base), latency=False)
        return Learned(base, outcome.scores, evaluation), {"sha256": digest}

    def restore(self, request: FineTune | Learn, base: str, checkpoint: Mapping[str, str]) -> bool:
        """Make the weights of a journalled training usable again; False if the file is gone or altered."""
        if isinstance(request, Learn):
            return self.bases.restore_learned(base, request.kind, checkpoint)
        return self.bases.restore_tuned(base, request.candidate.plan, request.write_back, checkpoint)

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
        """The latency model's arrays, if it is trusted; measures plans for it first."""
        del request
        with self.progress.stage(f"  Model the latency on {self.profile.name}") as report:
            self.latencies.watch = lambda done, total: report(done, total, "")
            model = self.latencies.model()
            trust = self.latencies.report()
            if "median_error" in trust:
                used = "" if model else "; not trusted, plans are measured"
                report(trust["samples"], trust["samples"], f"median error {trust['median_error']:.1%}{used}")
        return model.to_arrays() if model else {}

    # -- the parts ---------------------------------------------------------------------------------------------------

    def network(self, plan: PruningPlan, base: str = DENSE) -> nn.Module:
        """The pruned network with weights cut from ``base``, on the compute device, in eval mode."""
        return move(inherit(self.model, self.graph, plan, self.bases.state(base, plan)), self.device).eval()

    def outputs(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Outputs and targets of the search images."""
        with torch.inference_mode():
            pairs = [(network(images).float(), labels) for images, labels in self._images()]
        return torch.cat([outputs for outputs, _ in pairs]), torch.cat([labels for _, labels in pairs])

    def latency(self, plan: PruningPlan, *, exact: bool = True) -> Mapping[str, float]:
        """Time the plan's ONNX on the device, interleaved with the unpruned network's.

        Args:
            exact: False = a model that has proven good may answer instead.

        Returns:
            ``latency_ratio`` (with ``_low`` and ``_high``, 95 %), ``p50_ms`` and ``p95_ms`` (ratio times the
            reference's milliseconds), ``size_bytes``, and ``latency_measured`` (1, or 0 where it was predicted).
        """
        found = self.latencies.of(plan, exact=exact)
        template = self._template_once() if "size_bytes" not in found else None
        return found if template is None else {**found, "size_bytes": float(len(template.slice(plan)))}

    def _accuracy(
        self, base: str, plan: PruningPlan, started: float, floor: float | None, *, exact: bool, brief: bool
    ) -> Mapping[str, float]:
        """Metrics on the search split, from memory where the plan was met before; ``brief`` = the search's alone."""
        workload = self.workload
        key = (base, plan.digest, exact or self.inference.is_exact, brief)
        if key in self._accuracies:
            return self._accuracies[key]
        answers, targets, seen, tried = [], [], 0, self.inference.trials
        for (_, labels), outputs in zip(self._images(), self._forward(base, plan, exact), strict=True):
            answers.append(workload.answers(outputs, labels, brief=brief))
            targets.append(labels)
            seen += len(labels)
            self.spent["images_forwarded"] += len(labels)
            if self.inference.trials is not tried:  # trying ways is nobody's candidate's time
                started, tried = time.perf_counter(), self.inference.trials
            if time.perf_counter() - started > self.settings.seconds_per_candidate:
                raise _OutOfTimeError(
                    f"more than {self.settings.seconds_per_candidate:g} s for one candidate; lower search.images "
                    "or raise search.seconds_per_candidate"
                )
            if floor is not None and seen < len(self.split):
                best = workload.bound(torch.cat(answers), torch.cat(targets), len(self.split) - seen)
                if best < floor:
                    raise _HopelessError(
                        f"{workload.search_metric} cannot reach {floor:.4f}: given up after {seen} of "
                        f"{len(self.split)} images"
                    )
        self._accuracies[key] = workload.metrics(torch.cat(answers), torch.cat(targets))
        return self._accuracies[key]

    def _forward(self, base: str, plan: PruningPlan, exact: bool = False) -> Iterator[Tensor]:
        """Outputs of a candidate for each batch of search images; ``exact`` = in float32."""
        num_images = self.settings.recalibrate_images
        if self.bases.is_supernet(base):
            num_images = num_images or SUPERNET_IMAGES
        if not num_images:
            tried = self.inference.trials
            yield from self.inference.outputs(plan, base, self.bases.state(base, plan), exact=exact)
            if self.inference.trials is not tried:
                with self.progress.stage("  Find the fastest forward pass") as report:
                    report(1, 1, self.inference.describe().partition("\n")[0])
            return
        network = self.network(plan, base)
        recalibrate(network, self.workload, num_images, self.device)
        self.spent["images_forwarded"] += num_images
        for images, _ in self._images():
            with torch.inference_mode():
                outputs: Tensor = network(images).float()
            yield outputs

    def _fresh(self) -> nn.Module:
        """The network with random weights, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.workload.fresh_model()

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
        if not self._table_tried:
            self._table_tried = True
            template = self._template_once()
            self._table = None if template is None else layer_table(template)
        return self._table

    def _time(self, plan: PruningPlan) -> tuple[dict[str, float], BenchmarkResult]:
        """One measurement at the search tier: figures, and the raw result."""
        full = PruningPlan.full(self.graph.groups)
        baseline = self.folder / "baseline.onnx"
        if not self._baseline_written:
            self._onnx(full, baseline.name)
            self._baseline_written = True
        if plan.is_full:
            result = self._measure({"baseline": baseline})
            tail = result.p95_ms("baseline") / result.p50_ms("baseline")
            idle = result.calibrated_ms("baseline")
            times = {"p50_ms": idle, "p95_ms": idle * tail}
            ratio, size = Ratio(1.0, 1.0, 1.0), baseline.stat().st_size
        else:
            dense = self.latency(full)
            path = self._onnx(plan, "candidate.onnx")
            result = self._measure({"baseline": baseline, "candidate": path})
            ratio = result.ratio("candidate", "baseline")
            times = {name: ratio.value * dense[name] for name in ("p50_ms", "p95_ms")}
            size = path.stat().st_size
            path.unlink()
        ratios = {"latency_ratio": ratio.value, "latency_ratio_low": ratio.low, "latency_ratio_high": ratio.high}
        return {**ratios, **times, "size_bytes": float(size)}, result

    def _measure(self, models: Mapping[str, Path]) -> BenchmarkResult:
        """Measure at the search tier, with a profile of the operators where a model can learn from it."""
        nodes = len(models) > 1 and self.settings.latency.mode != "measure" and self._layers() is not None
        result = measure(self.target, self.profile, models, "search", nodes=nodes, noise_floor=self.noise_floor)
        self.spent["measurements"] += 1
        return result

    def _onnx(self, plan: PruningPlan, name: str) -> Path:
        """The ONNX file of a plan: cut from the run's one exported template, or exported afresh where it cannot be."""
        example = self.workload.example_input()
        template = self._template_once()
        pruned = inherit(self.model, self.graph, plan).cpu()
        candidate_onnx(template, pruned, example, plan, self.folder / name)
        return self.folder / name

    def _template_once(self) -> OnnxTemplate | None:
        """The run's template, opened when first needed."""
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

    def _images(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of the search images, preprocessed; kept if they are small enough.

        Kept ones are in the order in which the unpruned network finds them difficult, the worst first: a candidate that
        cannot reach an accuracy any more shows it soon.
        """
        if self._batches is not None:
            return self._batches
        one = self.workload.example_input()
        if one.numel() * one.element_size() * len(self.split) > CACHED_BYTES:
            return self._batches_of(len(self.split))
        batches = list(self._batches_of(len(self.split)))
        with torch.inference_mode():
            outputs = torch.cat([self.model(images).float() for images, _ in batches])
        images, labels = torch.cat([i for i, _ in batches]), torch.cat([t for _, t in batches])
        order = torch.argsort(self.workload.ease(outputs, labels), stable=True)
        channels_last = images[order].contiguous(memory_format=torch.channels_last)
        self._batches = list(
            zip(torch.split(channels_last, self._batch_size), torch.split(labels[order], self._batch_size), strict=True)
        )
        return self._batches

    def _batches_of(self, num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the first search images, preprocessed, in the order of the split."""
        for indices in torch.split(torch.arange(min(num_images, len(self.split))), self._batch_size):
            yield self.workload.batch(self.split, indices, train=False, generator=None, device=self.device)


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


class _OutOfTimeError(RuntimeError):
    """A candidate took longer than the run file allows."""


class _HopelessError(RuntimeError):
    """A candidate cannot reach the accuracy that was asked for."""


def recalibrate(network: nn.Module, workload: Workload, num_images: int, device: torch.device) -> None:
    """Re-estimate batch-norm statistics in place: cumulative average over training images, without augmentation."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    split = workload.train.first(num_images)
    with torch.inference_mode():
        for chosen in torch.tensor_split(torch.arange(len(split)), math.ceil(len(split) / MAX_BATCH)):  # equal ones
            network(workload.batch(split, chosen, train=False, generator=None, device=device)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
