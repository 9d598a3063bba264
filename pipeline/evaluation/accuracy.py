"""PruningPlan -> accuracy on the search split: the part of an evaluation that needs no device, so anyone may do it.

The driver of a run is a ``Scorer`` that also trains and measures (``evaluator``); a worker process is one and nothing
else (``worker``). Both must find the same numbers to the last bit: see ``SteadyInference``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from export.errors import TemplateError
from export.slicing import OnnxTemplate
from pipeline.config.schema import SearchSection
from pipeline.evaluation.inference import (
    BLOCKS,
    CHECK_IMAGES,
    CHUNKS,
    PLAIN,
    TOLERANCE,
    ForwardError,
    Inference,
    Run,
    State,
    Trial,
    first_line,
)
from pipeline.evaluation.weights import Bases
from pipeline.progress import ProgressView, Silent
from pipeline.training.loop import move
from pipeline.workloads import Split, Workload
from pruning.channels import ChannelGraph
from pruning.cost import cost
from pruning.plan import PruningPlan
from pruning.search.protocol import DENSE
from pruning.surgery import compare_outputs
from pruning.weights import inherit

MAX_BATCH = 128
CACHED_BYTES = 2 << 30
"""Search images are kept on the compute device as float32 up to this size."""
SUPERNET_IMAGES = 1000
"""Training images for re-estimating batch-norm statistics of a supernet's candidate, where the run file names none."""

Status = Literal["ok", "infeasible", "failed"]
NOTHING: Mapping[str, float] = {}
Way = Literal["onnx", "plain"]
Key = tuple[str, str, bool, bool]
"""Under which metrics are remembered: base, digest of the plan, in float32, the search's metric alone."""


class HopelessError(RuntimeError):
    """A candidate cannot reach the accuracy that was asked for."""


class GivenUpError(RuntimeError):
    """A candidate takes longer than the run file allows, or ends every process that tries it."""


@dataclass(frozen=True)
class Ask:
    """What is to be scored.

    Args:
        plan, base: the candidate's.
        floor: see ``Evaluate``.
        exact: in float32.
        brief: the metric that the search goes by, alone.
    """

    plan: PruningPlan
    base: str = DENSE
    floor: float | None = None
    exact: bool = True
    brief: bool = False


@dataclass(frozen=True)
class Scored:
    """The answer to an ``Ask``.

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


class SteadyInference(Inference):
    """Outputs that depend on the network, the plan and the images alone.

    ``Inference`` goes by the clock (which way is fastest, and from when on) and by what it has seen (candidates that
    differ in one group); each of its ways has last bits of its own. Here the way is chosen once, by a check that has
    no clock in it, and no candidate profits from another: so it does not matter who computes which candidate, and in
    which order. ONNX Runtime computes chunks of a fixed size on one thread each, so the number of threads does not
    matter either. A candidate for which that way fails is tried once more and then is an error: another forward pass
    would have other last bits, and nobody would know.

    Args:
        way: as another process found it with the same network; None = find it.
    """

    def __init__(self, *arguments: object, way: Way | None = None, **options: object) -> None:
        super().__init__(*arguments, **options, patience_s=0.0)  # type: ignore[arg-type]
        self._way = way

    @property
    def way(self) -> Way:
        """ONNX Runtime where it computes what the plain network does, else plain PyTorch."""
        if not self.trials:
            self._try_ways()
        return "onnx" if self._exact == self._onnx else "plain"

    def _try_ways(self) -> None:
        self._block, self._chunk = BLOCKS[0], CHUNKS[0]
        reason = "" if self.device.type == "cpu" and self._way != "plain" else "not asked for"
        error = math.nan
        if not reason:
            try:
                self._template = self._open_template()
                if self._way is None:
                    plan, images = self._random_plan(np.random.default_rng(0)), next(iter(self.images()))[:CHECK_IMAGES]
                    found, expected = (self._result(way, plan, images) for way in (self._onnx, self._plain))
                    certificate = compare_outputs(found, expected, TOLERANCE)
                    reason, error = certificate.reason, certificate.max_relative_error
                elif self._template is None:
                    raise TemplateError("the network's template was not handed over")
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as failure:
                if self._way is not None:
                    raise
                reason = first_line(failure)
        name = f"ONNX Runtime, blocks of {self._block} channels, {self._chunk} images at once"
        tried = Trial(name, math.nan, error, reason=reason)
        self.trials = (tried, Trial("PyTorch", math.nan, 0.0)) if reason else (tried,)
        self._fast = self._exact = self._plain if reason else self._onnx
        if reason:
            self._template = None

    def _instead(self, plan: PruningPlan, state: State | None, failure: Exception) -> Run:
        """The same way once more; what fails twice is an error, never another forward pass."""
        del failure  # it is shown if it comes again

        def failed(error: Exception) -> ForwardError:
            return ForwardError(
                f"{self.used} failed twice for {plan.digest}: {first_line(error)}. A deterministic search takes no "
                "other forward pass for one candidate: resume to try again, with more free memory or fewer threads; if "
                "that does not help, start a run with search.forward: auto and no workers"
            )

        try:
            run = self._fast(plan, state)
        except Exception as error:
            raise failed(error) from error

        def again(number: int, images: Tensor) -> object:
            try:
                return run(number, images)
            except Exception as error:
                raise failed(error) from error

        return again

    def _from_branch(self, plan: PruningPlan, base: str, state: State | None) -> Run | None:
        return None


class Scorer:
    """Scores plans of one baseline network on the search split; what can be done once is done once.

    Args:
        model: the trained, unpruned network; left as it is.
        graph: its channel groups.
        workload: images, loss and metric.
        folder: for weights.
        settings: the ``search`` section (images, bounds, batch-norm recalibration).
        template: gives the network's ONNX template, or None where it has none.
        seed: of random weights.
        device: where networks run.
        steady: numbers are the same to the last bit in every process; else the fastest forward pass is looked for.
        way: of a steady scorer, where another process has found it.
        order: of the search images, shape ``(images,)``, where another process has found it.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        workload: Workload,
        folder: Path,
        settings: SearchSection,
        template: Callable[[], OnnxTemplate | None],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        progress: ProgressView | None = None,
        steady: bool = False,
        way: Way | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.model, self.graph, self.workload = model.to(self.device).eval(), graph, workload
        self.folder, self.settings, self.seed = folder, settings, seed
        self.progress = progress or Silent()
        self.split: Split = workload.search.first(settings.images)
        dense_bytes = cost(graph, PruningPlan.full(graph.groups)).activation_bytes
        self._batch_size = max(1, min(MAX_BATCH, (settings.memory_mb << 20) // max(1, dense_bytes)))
        self.bases = Bases(self.model, graph, self._fresh, folder / "weights", self.device)
        options = {"device": self.device, "cache_bytes": settings.memory_mb << 20}
        images = lambda: (images for images, _ in self._images())  # noqa: E731
        self.inference = (
            SteadyInference(self.model, graph, images, template, way=way, **options)
            if steady
            else Inference(self.model, graph, images, template, **options)  # type: ignore[arg-type]
        )
        self.spent = Counter({"images_forwarded": 0, "images_trained": 0, "measurements": 0})
        self._accuracies: dict[Key, Scored] = {}
        self._batches: list[tuple[Tensor, Tensor]] | None = None
        self._order = order

    @property
    def steady(self) -> SteadyInference:
        """Its inference, of which other processes must know the way."""
        assert isinstance(self.inference, SteadyInference), "a crew needs a steady scorer"
        return self.inference

    @property
    def num_recalibration_images(self) -> int:
        """Training images that batch-norm statistics may be taken anew on."""
        return self.settings.recalibrate_images or SUPERNET_IMAGES

    def compute(self, ask: Ask) -> Scored:
        """The metrics of a candidate, computed now, or why it has none."""
        started, before = time.perf_counter(), self.spent["images_forwarded"]

        def scored(status: Status, reason: str = "", metrics: Mapping[str, float] = NOTHING) -> Scored:
            images = self.spent["images_forwarded"] - before
            forward = PLAIN if self._num_recalibrated(ask.base) else self.inference.used
            return Scored(status, reason, metrics, images, time.perf_counter() - started, forward)

        steady = isinstance(self.inference, SteadyInference) and self.device.type == "cpu"
        try:
            with _one_thread() if steady else contextlib.nullcontext():
                return scored("ok", "", self._metrics(ask, started))
        except HopelessError as error:
            return scored("infeasible", str(error))
        except (GivenUpError, torch.OutOfMemoryError) as error:
            return scored("failed", str(error).splitlines()[0])

    # -- the parts ---------------------------------------------------------------------------------------------------

    def network(self, plan: PruningPlan, base: str = DENSE) -> nn.Module:
        """The pruned network with weights cut from ``base``, on the compute device, in eval mode."""
        return move(inherit(self.model, self.graph, plan, self.bases.state(base, plan)), self.device).eval()

    def outputs(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Outputs and targets of the search images."""
        with torch.inference_mode():
            pairs = [(network(images).float(), labels) for images, labels in self._images()]
        return torch.cat([outputs for outputs, _ in pairs]), torch.cat([labels for _, labels in pairs])

    def _key(self, ask: Ask) -> Key:
        """Under which a candidate's metrics are remembered."""
        return ask.base, ask.plan.digest, ask.exact or self.inference.precision == "fp32", ask.brief

    def _metrics(self, ask: Ask, started: float) -> Mapping[str, float]:
        """Metrics on the search split.

        Raises:
            HopelessError: the floor cannot be reached any more.
            GivenUpError: it took too long.
        """
        workload, base, plan = self.workload, ask.base, ask.plan
        answers, targets, seen, tried = [], [], 0, self.inference.trials
        for (_, labels), outputs in zip(self._images(), self._forward(base, plan, ask.exact), strict=True):
            answers.append(workload.answers(outputs, labels, brief=ask.brief))
            targets.append(labels)
            seen += len(labels)
            self.spent["images_forwarded"] += len(labels)
            if self.inference.trials is not tried:  # trying ways is nobody's candidate's time
                started, tried = time.perf_counter(), self.inference.trials
            if time.perf_counter() - started > self.settings.seconds_per_candidate:
                raise GivenUpError(
                    f"more than {self.settings.seconds_per_candidate:g} s for one candidate; lower search.images "
                    "or raise search.seconds_per_candidate"
                )
            if ask.floor is not None and seen < len(self.split):
                best = workload.bound(torch.cat(answers), torch.cat(targets), len(self.split) - seen)
                if best < ask.floor:
                    raise HopelessError(
                        f"{workload.search_metric} cannot reach {ask.floor:.4f}: given up after {seen} of "
                        f"{len(self.split)} images"
                    )
        return workload.metrics(torch.cat(answers), torch.cat(targets))

    def _num_recalibrated(self, base: str) -> int:
        """Training images on which a candidate's batch-norm statistics are taken anew; 0 = they are not."""
        return self.settings.recalibrate_images or (SUPERNET_IMAGES if self.bases.is_supernet(base) else 0)

    def _forward(self, base: str, plan: PruningPlan, exact: bool = False) -> Iterator[Tensor]:
        """Outputs of a candidate for each batch of search images; ``exact`` = in float32."""
        num_images = self._num_recalibrated(base)
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

    def order(self) -> Sequence[int] | None:
        """In which order the search images are gone through; None = as they come."""
        self._images()
        return self._order

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
        images, labels = torch.cat([i for i, _ in batches]), torch.cat([t for _, t in batches])
        if self._order is None:
            with torch.inference_mode():
                outputs = torch.cat([self.model(images).float() for images, _ in batches])
            self._order = torch.argsort(self.workload.ease(outputs, labels), stable=True).tolist()
        order = torch.tensor(self._order, device=self.device)
        channels_last = images[order].contiguous(memory_format=torch.channels_last)
        self._batches = list(
            zip(torch.split(channels_last, self._batch_size), torch.split(labels[order], self._batch_size), strict=True)
        )
        return self._batches

    def _batches_of(self, num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the first search images, preprocessed, in the order of the split."""
        for indices in torch.split(torch.arange(min(num_images, len(self.split))), self._batch_size):
            yield self.workload.batch(self.split, indices, train=False, generator=None, device=self.device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: sums of batch-norm statistics differ in their last bits with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
