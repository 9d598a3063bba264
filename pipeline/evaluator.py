"""PruningPlan -> Evaluation: weights in, accuracy, MACs and measured latency out.

What can be done once per run is done once: the trace, the ONNX template, the search images on the compute device, the
reference's latency. A plan seen before is answered from memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from device_profiles import BenchmarkResult, DeviceProfile, Ratio, Target, measure
from export.errors import TemplateError
from export.slicing import OnnxTemplate, candidate_onnx
from pipeline.config import FinetuneSection, SearchSection
from pipeline.errors import UserError
from pipeline.progress import ProgressView, Silent
from pipeline.training import TrainingError, fit, load_weights, move, save_weights, sha256_of
from pipeline.workloads import Split, Workload
from pruning.channels import ChannelGraph
from pruning.cost import cost
from pruning.plan import PruningPlan
from pruning.saliency import channel_saliency
from pruning.search.protocol import DENSE, Candidate, Evaluation, FineTuned
from pruning.surgery import scatter
from pruning.weights import inherit

MAX_BATCH = 256
CACHED_BYTES = 2 << 30
"""Search images are kept on the compute device as float32 up to this size."""


LATENCIES = ("latency_ratio", "latency_ratio_low", "latency_ratio_high", "p50_ms", "p95_ms", "size_bytes")


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
    ) -> None:
        self.device = device or torch.device("cpu")
        self.model, self.graph, self.workload = model.to(self.device).eval(), graph, workload
        self.profile, self.target, self.folder = profile, target, folder
        self.settings, self.recipe, self.seed = settings, recipe, seed
        self.progress = progress or Silent()
        self.split: Split = workload.search.first(settings.images)
        dense_bytes = cost(graph, PruningPlan.full(graph.groups)).activation_bytes
        self._batch_size = max(1, min(MAX_BATCH, (settings.memory_mb << 20) // max(1, dense_bytes)))
        self._states: dict[str, dict[str, Tensor] | None] = {DENSE: None}
        self._accuracies: dict[tuple[str, str], Mapping[str, float]] = {}
        self._latencies: dict[str, Mapping[str, float]] = {}
        self._batches: list[tuple[Tensor, Tensor]] | None = None
        self._template: OnnxTemplate | None = None
        self._template_tried = False

    def calibrate(self, reference: Evaluation) -> None:
        """Take the unpruned network's latency from an earlier evaluation, so that all candidates share one scale."""
        self._latencies[PruningPlan.full(self.graph.groups).digest] = reference.metrics

    # -- the Oracle of a study ---------------------------------------------------------------------------------------

    def evaluate(self, candidate: Candidate, latency: bool) -> Evaluation:
        """Accuracy on the search split, MACs and params; with ``latency`` also file size and time on the device."""
        started = time.perf_counter()
        plan = candidate.plan
        plan.validate(self.graph)
        totals = cost(self.graph, plan)
        metrics: dict[str, float] = {"macs": float(totals.macs), "params": float(totals.params)}
        try:
            metrics |= self._accuracy(candidate.base, plan, started)
            if latency:
                metrics |= {name: self.latency(plan)[name] for name in LATENCIES}
        except (_OutOfTimeError, torch.OutOfMemoryError) as error:
            return Evaluation("failed", str(error).splitlines()[0], metrics)
        metrics["seconds"] = time.perf_counter() - started
        return Evaluation("ok", "", metrics)

    def finetune(self, candidate: Candidate, epochs: float) -> tuple[FineTuned, dict[str, str]]:
        """Train the candidate's network with the baseline as teacher; its weights become a new base."""
        base = f"{candidate.id}-{candidate.plan.digest}"
        student = self.network(candidate.plan, candidate.base)
        recipe = self.recipe.model_copy(update={"epochs": epochs})
        path = self.folder / "weights" / f"{base}.safetensors"
        started = time.perf_counter()
        with self.progress.stage(f"  fine-tune {candidate.origin} {candidate.id}") as report:
            try:
                fit(
                    student,
                    self.workload,
                    self.workload.train,
                    recipe,
                    seed=self.seed,
                    checkpoint=path.with_suffix(".ckpt"),
                    device=self.device,
                    teacher=self.model if recipe.distill else None,
                    distill=recipe.distill,
                    report=report,
                )
            except TrainingError as error:
                return FineTuned(candidate.base, Evaluation("failed", str(error))), {}
        digest = save_weights(path, student.state_dict())
        self._adopt(base, candidate.plan, student.state_dict())
        tuned = Candidate(candidate.id, candidate.plan, candidate.origin, candidate.parents, base)
        evaluation = self.evaluate(tuned, latency=True)
        seconds = {"seconds": time.perf_counter() - started}
        evaluation = Evaluation(evaluation.status, evaluation.reason, {**evaluation.metrics, **seconds})
        return FineTuned(base, evaluation), {"path": f"weights/{path.name}", "sha256": digest}

    def restore(self, base: str, plan: PruningPlan, checkpoint: Mapping[str, str]) -> bool:
        """Load the weights of a journalled fine-tuning; False if the file is gone or altered."""
        if not checkpoint:  # the training failed; nothing was saved, nothing is needed
            return True
        path = self.folder / checkpoint["path"]
        if not path.is_file() or sha256_of(path) != checkpoint["sha256"]:
            return False
        self._adopt(base, plan, load_weights(path))
        return True

    def score(self, criterion: str, base: str) -> Mapping[str, np.ndarray]:
        """Saliency of every channel of every group, from the weights of ``base``."""
        dense = self.network(PruningPlan.full(self.graph.groups), base)
        try:
            return channel_saliency(dense, self.graph, criterion, self.seed)
        except ValueError as error:  # an unknown criterion: it lists the known ones
            raise UserError(f"search.options: {error}") from error

    # -- the parts ---------------------------------------------------------------------------------------------------

    def network(self, plan: PruningPlan, base: str = DENSE) -> nn.Module:
        """The pruned network with weights cut from ``base``, on the compute device, in eval mode."""
        return move(inherit(self.model, self.graph, plan, self._states[base]), self.device).eval()

    def outputs(self, network: nn.Module, started: float | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and targets of the search images, in batches within the memory and time bounds."""
        started = time.perf_counter() if started is None else started
        results, targets = [], []
        with torch.inference_mode():
            for images, labels in self._images():
                results.append(network(images).float())
                targets.append(labels)
                if time.perf_counter() - started > self.settings.seconds_per_candidate:
                    raise _OutOfTimeError(
                        f"more than {self.settings.seconds_per_candidate:g} s for one candidate; lower search.images "
                        "or raise search.seconds_per_candidate"
                    )
        return torch.cat(results), torch.cat(targets)

    def latency(self, plan: PruningPlan) -> Mapping[str, float]:
        """Time the plan's ONNX on the device, interleaved with the unpruned network's.

        Returns ``latency_ratio`` (with ``_low`` and ``_high``, 95 %), ``p50_ms`` and ``p95_ms`` (ratio times the
        reference's milliseconds) and ``size_bytes``.
        """
        if plan.digest not in self._latencies:
            self._latencies[plan.digest] = self._time(plan)
        return self._latencies[plan.digest]

    def _accuracy(self, base: str, plan: PruningPlan, started: float) -> Mapping[str, float]:
        key = (base, plan.digest)
        if key not in self._accuracies:
            network = self.network(plan, base)
            if self.settings.recalibrate_images:
                recalibrate(network, self.workload, self.settings.recalibrate_images, self.device)
            self._accuracies[key] = self.workload.metrics(*self.outputs(network, started))
        return self._accuracies[key]

    def _time(self, plan: PruningPlan) -> Mapping[str, float]:
        full = PruningPlan.full(self.graph.groups)
        baseline = self.folder / "baseline.onnx"
        if not self._template_tried:
            self._onnx(full, baseline.name)
        if plan.is_full:
            alone = self._measure({"baseline": baseline}, plan)
            times = {"p50_ms": alone.p50_ms("baseline"), "p95_ms": alone.p95_ms("baseline")}
            ratio, size = Ratio(1.0, 1.0, 1.0), baseline.stat().st_size
        else:
            dense = self.latency(full)
            path = self._onnx(plan, "candidate.onnx")
            ratio = self._measure({"baseline": baseline, "candidate": path}, plan).ratio("candidate", "baseline")
            times = {name: ratio.value * dense[name] for name in ("p50_ms", "p95_ms")}
            size = path.stat().st_size
            path.unlink()
        ratios = {"latency_ratio": ratio.value, "latency_ratio_low": ratio.low, "latency_ratio_high": ratio.high}
        return {**ratios, **times, "size_bytes": float(size)}

    def _measure(self, models: Mapping[str, Path], plan: PruningPlan) -> BenchmarkResult:
        """Measure at the search tier and keep every raw latency in ``latencies.jsonl``."""
        result = measure(self.target, self.profile, models, "search")
        with (self.folder / "latencies.jsonl").open("a", encoding="utf-8") as file:
            file.write(f'{{"plan":"{plan.digest}","result":{result.to_json()}}}\n')
        return result

    def _onnx(self, plan: PruningPlan, name: str) -> Path:
        """The ONNX file of a plan: cut from the run's one exported template, or exported afresh where it cannot be."""
        example = self.workload.example_input()
        if not self._template_tried:
            self._template_tried = True
            self._template = self._open_template(example)
        pruned = inherit(self.model, self.graph, plan).cpu()
        candidate_onnx(self._template, pruned, example, plan, self.folder / name)
        return self.folder / name

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
        """Batches of the search images, preprocessed; kept if they are small enough."""
        if self._batches is not None:
            return self._batches
        chosen = torch.split(torch.arange(len(self.split)), self._batch_size)
        batches = (
            self.workload.batch(self.split, indices, train=False, generator=None, device=self.device)
            for indices in chosen
        )
        one = self.workload.example_input()
        if one.numel() * one.element_size() * len(self.split) > CACHED_BYTES:
            return batches
        self._batches = list(batches)
        return self._batches

    def _adopt(self, base: str, plan: PruningPlan, state: Mapping[str, Tensor]) -> None:
        moved = {name: tensor.to(self.device) for name, tensor in state.items()}
        self._states[base] = scatter(self.model, self.graph, plan, moved)


class _OutOfTimeError(RuntimeError):
    """A candidate took longer than the run file allows."""


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
        for chosen in torch.split(torch.arange(len(split)), MAX_BATCH):
            network(workload.batch(split, chosen, train=False, generator=None, device=device)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
