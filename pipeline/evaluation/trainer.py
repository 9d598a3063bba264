"""Trainings that a search asks for: candidates fine-tuned, and auxiliary trainings that learn about channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from secateur.export.quantised import LayerSteps
from secateur.pipeline.config.schema import Distillation, FinetuneSection
from secateur.pipeline.errors import UserError
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.precisions import Precisions
from secateur.pipeline.evaluation.weights import Checkpoint, Weights
from secateur.pipeline.progress import ProgressView
from secateur.pipeline.training import auxiliary
from secateur.pipeline.training.checkpoints import read_fitted, write_fitted
from secateur.pipeline.training.curve import Fitted
from secateur.pipeline.training.fake_quantisation import fake_quantised
from secateur.pipeline.training.loop import fit
from secateur.pipeline.training.precision import Precision, certain, remembered
from secateur.pipeline.training.trials import is_compiled, precision_of
from secateur.pruning.search.identity import draws_of
from secateur.pruning.search.protocol import AuxiliaryTraining, FineTune, FloatArray

OVER_FORWARD = 3
"""MACs of a training step to those of a forward pass: the backward pass has two products for each of its."""


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Args:
        base: the name of its weights.
        sha256: of their file.
        scores: what it learned about each channel, group name -> shape ``(size,)``.
    """

    base: str
    sha256: str
    scores: Mapping[str, FloatArray] = field(default_factory=dict)


class Trainer:
    """Trains networks of one baseline.

    Args:
        baseline: the teacher, and what auxiliary trainings train a copy of.
        weights: where trainings begin, and where what they leave is kept.
        recipe: how networks are trained; ``epochs`` comes with the request.
        precisions: knows the steps of precisions of integers; None = no training is asked to compute with them.
    """

    def __init__(
        self,
        baseline: Baseline,
        weights: Weights,
        recipe: FinetuneSection,
        progress: ProgressView,
        precisions: Precisions | None = None,
    ) -> None:
        self.precisions = precisions
        self.baseline, self.weights, self.recipe, self.progress = baseline, weights, recipe, progress
        self.images_trained = 0
        self.image_macs = 0

    def finetune(self, request: FineTune) -> Trained:
        """Train the candidate's network, by default with the baseline as teacher.

        Raises:
            TrainingError: the loss became NaN or infinite.
        """
        candidate, base = request.candidate, _name(f"{request.candidate.id}-tuned", request)
        student, train = self.weights.network(candidate.plan, candidate.base), self.baseline.workload.train
        distill = self._distillation(request)
        steps = self._steps(request.quantise)
        title = f"  fine-tune {candidate.origin} {candidate.id}" + (f" in steps of {request.quantise}" if steps else "")
        with self.progress.stage(title) as report, fake_quantised(student, steps):
            fitted = fit(
                student,
                self.baseline.workload,
                train,
                self._recipe(request),
                seed=self.baseline.seed,
                checkpoint=self.weights.path(base).with_suffix(".ckpt"),
                compute=self.baseline.compute,
                teacher=self.baseline.model if distill else None,
                distill=distill,
                part=request.part,
                held_out=self.baseline.workload.search,
                compute_count=self.baseline.compute_count,
                last=self._last(base),
                report=report,
                say=self.progress.say,
            )
        write_fitted(self.weights.path(base).with_suffix(""), fitted)
        self.images_trained += round(request.epochs * len(train))
        self.image_macs += round(request.epochs * self.epoch_work(request))
        state = student.state_dict()
        return Trained(base, self.weights.save_tuned(base, candidate.base, candidate.plan, state, request.write_back))

    def train_auxiliary(self, request: AuxiliaryTraining) -> Trained:
        """Train the unpruned network with something added that learns about its channels.

        Raises:
            TrainingError: the loss became NaN or infinite.
            UserError: there is no such training, or it does not take these options.
        """
        base = _name(request.kind, request)
        with self.progress.stage(f"  auxiliary training {request.kind}") as report:
            try:
                training = auxiliary.TRAININGS.load(request.kind)
                task = auxiliary.Task(
                    self.weights.network(self.baseline.full, request.base),
                    self.baseline.graph,
                    self.baseline.workload,
                    self._recipe(request),
                    self.baseline.seed,
                    self.baseline.compute,
                    self.weights.path(base).with_suffix(".ckpt"),
                    report,
                    request.options,
                )
                outcome = training.train(task)
            except ValueError as error:
                raise UserError(f"search: auxiliary training {request.kind}: {error}") from error
        images = outcome.images or round(request.epochs * len(self.baseline.workload.train))
        self.images_trained += images
        self.image_macs += OVER_FORWARD * images * self.baseline.macs(self.baseline.full)
        return Trained(base, self.weights.save_learned(base, request.kind, outcome.state), outcome.scores)

    def fitted(self, base: str) -> Fitted | None:
        """How a fine-tuning went, by the name of its weights; None where nothing is kept of it."""
        return read_fitted(self.weights.path(base).with_suffix(""))

    def last(self, base: str) -> Path | None:
        """The weights of a fine-tuning's last epoch, where those of its best one were kept; None = there are none."""
        return self._last(base) if self._last(base).is_file() else None

    def _last(self, base: str) -> Path:
        return self.weights.path(base).with_suffix(".last.safetensors")

    def epoch_work(self, request: FineTune | AuxiliaryTraining) -> float:
        """Image-MACs of an epoch: three times those of the trained network's forward pass, and the teacher's."""
        images, whole = len(self.baseline.workload.train), self.baseline.macs(self.baseline.full)
        if isinstance(request, AuxiliaryTraining):
            return float(images * OVER_FORWARD * whole)
        teacher = whole if self._distillation(request) else 0
        return float(images * (OVER_FORWARD * self.baseline.macs(request.candidate.plan) + teacher))

    def restore(self, request: FineTune | AuxiliaryTraining, base: str, checkpoint: Mapping[str, str]) -> bool:
        """Make the weights of a journalled training usable again; False if the file is gone or altered."""
        if not checkpoint:  # the training failed; nothing was saved, nothing is needed
            return True
        path, sha256 = self.weights.path(base), checkpoint["sha256"]
        if isinstance(request, AuxiliaryTraining):
            return self.weights.restore(base, Checkpoint(sha256, path, training=request.kind))
        plan = None if request.write_back else request.candidate.plan
        return self.weights.restore(base, Checkpoint(sha256, path, plan))

    def _steps(self, precision: str) -> Sequence[LayerSteps]:
        """With which a training computes; none where it is in floats."""
        if not precision:
            return ()
        assert self.precisions is not None, "who asks for steps of integers has files in them"
        return self.precisions.steps(precision)

    def _recipe(self, request: FineTune | AuxiliaryTraining) -> FinetuneSection:
        update: dict[str, float | str] = {"epochs": request.epochs, "autocast": self._precision}
        if isinstance(request, FineTune) and request.lr is not None:
            update["lr"] = request.lr
        recipe = self.recipe.model_copy(update=update)
        return recipe.model_copy(update={"compile": "on" if self._is_compiled(request, recipe) else "off"})

    def _is_compiled(self, request: FineTune | AuxiliaryTraining, recipe: FinetuneSection) -> bool:
        """Whether a training's steps are compiled, by what was found for the unpruned network: no candidate is tried.

        Auxiliary trainings' are not: what they train may change its widths in every step.
        """
        if isinstance(request, AuxiliaryTraining):
            return False
        baseline = self.baseline
        terms = baseline.model, baseline.workload, baseline.workload.train, baseline.compute
        return is_compiled(recipe, *terms, self._precision, self.progress.say)

    @cached_property
    def _precision(self) -> Precision:
        """Of all trainings of a run: what the recipe says, else what is faster for the unpruned network here."""
        baseline = self.baseline

        def choose() -> Precision:
            workload, compute = baseline.workload, baseline.compute
            return precision_of(self.recipe, baseline.model, workload, workload.train, compute)

        file = self.weights.path("training").with_suffix(".precision")
        return certain(self.recipe.autocast, baseline.compute) or remembered(file, choose)

    def _distillation(self, request: FineTune) -> Distillation | None:
        if request.distill is False:
            return None
        return (self.recipe.distill or Distillation()) if request.distill else self.recipe.distill


def _name(prefix: str, request: FineTune | AuxiliaryTraining) -> str:
    """A name for what a request leaves behind; the same request gives the same name."""
    return f"{prefix}-{draws_of(request)}"
