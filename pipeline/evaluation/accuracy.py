"""PruningPlan -> accuracy on the search split: the part of an evaluation that needs no device, so anyone may do it.

The driver of a run owns an ``AccuracyEvaluator`` beside what trains and measures (``evaluator``); a worker process
holds one and nothing else (``worker``). Both must find the same bits: see ``DeterministicInference``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.device_profiles.wording import number_of
from secateur.export.batching import Predictor
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.schema import SearchSection
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.deterministic import BackendName, DeterministicInference
from secateur.pipeline.evaluation.inference import Inference
from secateur.pipeline.evaluation.precisions import FLOAT, Precisions
from secateur.pipeline.evaluation.weights import Weights
from secateur.pipeline.progress import ProgressView, Silent
from secateur.pipeline.training.statistics import (
    IMAGES_AT_ONCE,
    RECALIBRATION_SHARE,
    moving_norms,
    training_images,
)
from secateur.pipeline.workloads import DIVERGENCE_SCORE, Split
from secateur.pruning.cost import cost
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.protocol import DENSE

MAX_BATCH = 128
CACHED_BYTES = 2 << 30
"""Search images are kept on the compute device as float32 up to this size."""
SUPERNET_IMAGES = 1000
"""Training images for re-estimating batch-norm statistics of a supernet's candidate, where the run file names none."""
Status = Literal["ok", "infeasible", "failed"]
NOTHING: Mapping[str, float] = {}
Key = tuple[str, str, bool, bool, int, str]
"""Under which metrics are remembered: base, digest of the plan, in float32, the search's metric alone, training images
of its statistics, and precision."""


class HopelessError(RuntimeError):
    """A candidate cannot reach the accuracy that was asked for."""


class GivenUpError(RuntimeError):
    """A candidate takes longer than the run file allows, or ends every process that tries it."""


@dataclass(frozen=True)
class AccuracyRequest:
    """Whose accuracy is asked for.

    Args:
        plan, base: the candidate's.
        floor: see ``Evaluate``.
        exact: in float32.
        brief: the metric that the search goes by, alone.
        recalibration_images: training images on which its batch-norm statistics are taken anew; 0 = they are not.
        precision: of the network; in another one than fp32 it is the exported file that is run.
    """

    plan: PruningPlan
    base: str = DENSE
    floor: float | None = None
    exact: bool = True
    brief: bool = False
    recalibration_images: int = 0
    precision: str = FLOAT


@dataclass(frozen=True)
class Accuracy:
    """The answer to an ``AccuracyRequest``.

    Args:
        status, reason: as in ``Evaluation``.
        metrics: on the search split; empty where the status is not ``ok``.
        images_forwarded: through the candidate.
        seconds: they took.
        forward: the forward pass that the metrics come from (``Inference.used``).
    """

    status: Status
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    images_forwarded: int = 0
    seconds: float = 0.0
    forward: str = ""


@dataclass(frozen=True)
class Agreed:
    """What another process found with the same network and images, and this one has to do alike.

    Args:
        backend: of the forward pass; None = find it.
        order: of the search images, shape ``(images,)``; None = find it.
    """

    backend: BackendName | None = None
    order: Sequence[int] | None = None


class AccuracyEvaluator:
    """Evaluates plans of one baseline network on the search split; what can be done once is done once.

    Args:
        baseline: the unpruned network with its images, loss and metric.
        folder: for weights.
        settings: the ``search`` section (images, bounds, batch-norm recalibration).
        template: gives the network's ONNX template, or None where it has none.
        deterministic: numbers are the same bits in every process; else the fastest forward pass is looked for.
        agreed: what a deterministic evaluator takes from another process.
        precisions: makes files in other precisions than fp32; None = it evaluates none of them.
    """

    def __init__(
        self,
        baseline: Baseline,
        folder: Path,
        settings: SearchSection,
        template: Callable[[], OnnxTemplate | None],
        *,
        progress: ProgressView | None = None,
        deterministic: bool = False,
        agreed: Agreed = Agreed(),
        precisions: Precisions | None = None,
    ) -> None:
        self.precisions = precisions
        self.baseline, self.folder, self.settings = baseline, folder, settings
        self.progress = progress or Silent()
        self.weights = Weights(baseline, folder / "weights")
        self.split: Split = baseline.workload.search.first(settings.images)
        dense_bytes = cost(baseline.graph, baseline.full).activation_bytes
        self._batch_size = max(1, min(MAX_BATCH, (settings.memory_mb << 20) // max(1, dense_bytes)))
        options = {"compute": baseline.compute, "cache_bytes": settings.memory_mb << 20}
        images = lambda: (images for images, _ in self._images())  # noqa: E731
        self.inference = (
            DeterministicInference(baseline.model, baseline.graph, images, template, backend=agreed.backend, **options)
            if deterministic
            else Inference(baseline.model, baseline.graph, images, template, **options)  # type: ignore[arg-type]
        )
        self.images_forwarded = 0
        self.image_macs = 0
        self._recalibrates = bool(moving_norms(baseline.model))
        self._dense: list[Tensor] = []
        self._training: dict[int, Sequence[Tensor]] = {}
        self._batches: list[tuple[Tensor, Tensor]] | None = None
        self._order = agreed.order

    @property
    def deterministic(self) -> DeterministicInference:
        """Its inference, of which other processes must know the backend."""
        assert isinstance(self.inference, DeterministicInference), "worker processes need a deterministic evaluator"
        return self.inference

    @property
    def num_recalibration_images(self) -> int:
        """Training images that batch-norm statistics may be taken anew on, at most."""
        return max(self.settings.num_recalibration_images, self.settings.recalibrate_images or SUPERNET_IMAGES)

    def evaluate(self, request: AccuracyRequest) -> Accuracy:
        """The metrics of a candidate, computed now, or why it has none."""
        if request.precision != FLOAT and self.precisions is not None:
            self.precisions.prepare(request.precision)  # the first candidate's time is its own
        started, before = time.perf_counter(), self.images_forwarded

        def found(status: Status, reason: str = "", metrics: Mapping[str, float] = NOTHING) -> Accuracy:
            images = self.images_forwarded - before
            forward = self.inference.used if request.precision == FLOAT else f"ONNX Runtime, {request.precision}"
            return Accuracy(status, reason, metrics, images, time.perf_counter() - started, forward)

        deterministic = isinstance(self.inference, DeterministicInference) and self.baseline.compute.type == "cpu"
        try:
            with _one_thread() if deterministic else contextlib.nullcontext():
                return found("ok", "", self._metrics(request, started))
        except HopelessError as error:
            return found("infeasible", str(error))
        except (GivenUpError, torch.OutOfMemoryError) as error:
            return found("failed", str(error).splitlines()[0])

    def key(self, request: AccuracyRequest) -> Key:
        """Under which a candidate's metrics are remembered."""
        exact = request.exact or self.inference.precision == FLOAT or request.precision != FLOAT
        network = request.base, request.plan.digest
        return *network, exact, request.brief, request.recalibration_images, request.precision

    def recalibration_images(self, base: str, plan: PruningPlan, *, final: bool) -> int:
        """How many training images a candidate's batch-norm statistics are taken anew on; 0 = they are not.

        A network that was trained as it is has taken them at the end of its training.

        Args:
            final: the candidate may be fine-tuned next, and the cost does not matter.
        """
        if not self._recalibrates or self.weights.is_trained(base, plan):
            return 0
        if self.weights.is_supernet(base):
            return self.settings.recalibrate_images or SUPERNET_IMAGES
        wanted = self.settings.num_recalibration_images
        return wanted if final else min(wanted, max(1, len(self.split) // RECALIBRATION_SHARE))

    def order(self) -> Sequence[int] | None:
        """In which order the search images are gone through; None = as they come."""
        self._images()
        return self._order

    def outputs(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Outputs and targets of the search images."""
        with torch.inference_mode():
            pairs = [(network(images).float(), labels) for images, labels in self._images()]
        return torch.cat([outputs for outputs, _ in pairs]), torch.cat([labels for _, labels in pairs])

    def batches(
        self, num_images: int | None = None, *, augmented: bool | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the first search images, preprocessed, in the order of the split.

        Args:
            num_images: None = all of them.
            augmented: as in training, drawn under the run's seed, the same at every call; None = as the metric that the
                search goes by wants them.
        """
        workload, count = self.baseline.workload, min(num_images or len(self.split), len(self.split))
        alter = workload.search_augmented if augmented is None else augmented
        generator, compute = torch.Generator().manual_seed(self.baseline.seed), self.baseline.compute
        for indices in torch.split(torch.arange(count), self._batch_size):
            if alter:
                yield workload.augmented(self.split, indices, generator=generator, device=compute)
            else:
                yield workload.batch(self.split, indices, train=False, generator=None, device=compute)

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _metrics(self, request: AccuracyRequest, started: float) -> Mapping[str, float]:
        """Metrics on the search split.

        Raises:
            HopelessError: the floor cannot be reached any more.
            GivenUpError: it took too long.
        """
        workload = self.baseline.workload
        answers, targets, seen, tried = [], [], 0, self.inference.trials
        divergences, dense = [], self._dense_outputs() if workload.search_metric == DIVERGENCE_SCORE else None
        for (_, labels), outputs in zip(self._images(), self._forward(request), strict=True):
            answers.append(workload.answers(outputs, labels, brief=request.brief))
            targets.append(labels)
            if dense is not None:
                divergences.append(workload.divergence(outputs, next(dense)))
            seen += len(labels)
            self.images_forwarded += len(labels)
            self.image_macs += len(labels) * self.baseline.macs(request.plan)
            if self.inference.trials is not tried:  # trying backends is nobody's candidate's time
                started, tried = time.perf_counter(), self.inference.trials
            if time.perf_counter() - started > self.settings.seconds_per_candidate:
                raise GivenUpError(
                    f"more than {self.settings.seconds_per_candidate:g} s for one candidate; lower search.images "
                    "or raise search.seconds_per_candidate"
                )
            if request.floor is not None and seen < len(self.split):
                best = workload.bound(torch.cat(answers), torch.cat(targets), len(self.split) - seen)
                if best < request.floor:
                    raise HopelessError(
                        f"{workload.search_metric} cannot reach {request.floor:.4f}: given up after {seen} of "
                        f"{number_of(len(self.split), 'image(s)')}"
                    )
        found = dict(workload.metrics(torch.cat(answers), torch.cat(targets)))
        if divergences:
            divergence = torch.cat(divergences).mean().item()
            found |= {DIVERGENCE_SCORE: math.exp(-divergence), "divergence": divergence}
        return found

    def _dense_outputs(self) -> Iterator[Tensor]:
        """Of the unpruned network with its own statistics, for each batch of search images; kept if small enough."""
        for number, (images, _) in enumerate(self._images()):
            if number < len(self._dense):
                yield self._dense[number]
                continue
            with torch.inference_mode():
                outputs = self.baseline.model(images).float()
            if sum(kept.nbytes for kept in (*self._dense, outputs)) <= CACHED_BYTES:
                self._dense.append(outputs)
            yield outputs

    def memorised(self) -> tuple[float, float]:
        """Accuracy of the unpruned network on the search images as they are, and on augmented ones.

        Where the first is much higher, the weights know the images by heart: they were trained on them, and accuracy on
        them says little.
        """
        workload, found = self.baseline.workload, []
        for augmented in (False, True):
            with torch.inference_mode():
                pairs = [(self.baseline.model(i).float(), t) for i, t in self.batches(augmented=augmented)]
            answers = torch.cat([workload.answers(outputs, targets) for outputs, targets in pairs])
            found.append(workload.metrics(answers, torch.cat([targets for _, targets in pairs]))[workload.metric])
        return found[0], found[1]

    def _forward(self, request: AccuracyRequest) -> Iterator[Tensor]:
        """Outputs of a candidate for each batch of search images."""
        tried, plan, base = self.inference.trials, request.plan, request.base
        state, training = self.weights.state(base, plan), self.training(request.recalibration_images)
        num_images = sum(map(len, training))
        self.images_forwarded += num_images
        self.image_macs += num_images * self.baseline.macs(plan)
        if request.precision != FLOAT:
            yield from self._in_precision(request, state, training)
            return
        shared = None if self.weights.is_supernet(base) else base
        yield from self.inference.outputs(plan, shared, state, exact=request.exact, training=training)
        if self.inference.trials is not tried:
            with self.progress.stage("  Find the fastest forward pass") as report:
                report(1, 1, self.inference.describe().partition("\n")[0])

    def _in_precision(
        self, request: AccuracyRequest, state: Mapping[str, Tensor] | None, training: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Outputs of the very file that would ship, in batches that are proven equal to single images."""
        assert self.precisions is not None, "an evaluator without files evaluates in fp32 alone"
        weights = self.inference.recalibrated(request.plan, state, training) if training else state
        content = self.precisions.network(
            request.precision, request.plan, weights, lambda: self.baseline.cut(request.plan, weights)
        )
        threads = 1 if isinstance(self.inference, DeterministicInference) else torch.get_num_threads()
        predictor = Predictor(content, threads)
        for images, _ in self._images():
            found = predictor(images.float().contiguous().cpu().numpy())
            yield torch.from_numpy(found).to(self.baseline.compute)

    def training(self, num_images: int) -> Sequence[Tensor]:
        """Batches of the first training images, without augmentation; the same ones at every call if they are kept."""
        if num_images not in self._training:
            workload, at_once = self.baseline.workload, min(IMAGES_AT_ONCE, self._batch_size)
            batches = training_images(workload, workload.train, num_images, self.baseline.compute, at_once)
            kept = tuple(batches) if num_images else ()
            if sum(images.nbytes for images in kept) > CACHED_BYTES:
                return kept
            self._training[num_images] = kept
        return self._training[num_images]

    def _images(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of the search images, preprocessed; kept if they are small enough.

        Kept ones are in the order in which the unpruned network finds them difficult, the worst first: a candidate that
        cannot reach an accuracy any more shows it soon.
        """
        if self._batches is not None:
            return self._batches
        one = self.baseline.workload.example_input()
        if one.numel() * one.element_size() * len(self.split) > CACHED_BYTES:
            return self.batches()
        batches = list(self.batches())
        images, labels = torch.cat([i for i, _ in batches]), torch.cat([t for _, t in batches])
        if self._order is None:
            with torch.inference_mode():
                outputs = torch.cat([self.baseline.model(images).float() for images, _ in batches])
            self._order = torch.argsort(self.baseline.workload.ease(outputs, labels), stable=True).tolist()
        order = torch.tensor(self._order, device=self.baseline.compute)
        channels_last = images[order].contiguous(memory_format=torch.channels_last)
        self._batches = list(
            zip(torch.split(channels_last, self._batch_size), torch.split(labels[order], self._batch_size), strict=True)
        )
        return self._batches


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: sums of batch-norm statistics differ in their last bits with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
