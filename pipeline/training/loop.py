"""Training, fine-tuning and distillation: one loop, exact to resume.

Every random choice follows from the seed and the number of the epoch or step, and a checkpoint is written now and then,
so a killed training continues to the same weights on the same machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.pipeline.config.schema import Distillation, Recipe
from secateur.pipeline.progress import Report, Say, silent, unsaid
from secateur.pipeline.training.average import average_of
from secateur.pipeline.training.batches import batches_of, sizes_of
from secateur.pipeline.training.checkpoints import EVERY_S, Best, Checkpoint, State, save_weights
from secateur.pipeline.training.compiled import is_of_compiling, not_compiled
from secateur.pipeline.training.curve import EpochFacts, Fitted, Losses
from secateur.pipeline.training.distributed import ALONE, Group, begun
from secateur.pipeline.training.features import Features
from secateur.pipeline.training.judging import Judge
from secateur.pipeline.training.lesson import Lesson, move
from secateur.pipeline.training.precision import Precision
from secateur.pipeline.training.recipe import Schedule, optimizer_of
from secateur.pipeline.training.statistics import IMAGES_AT_ONCE, recalibrate, training_images
from secateur.pipeline.training.synchronised import synchronised
from secateur.pipeline.training.trials import is_compiled, precision_of
from secateur.pipeline.workloads import Split, Workload

VERSION = 3
"""Part of every content hash of trained weights; raise it when a change here changes the result."""


RECALIBRATION_IMAGES = 2048
"""Training images that batch-norm statistics are taken anew on at the end of a training."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt``."""


def fit(
    model: nn.Module,
    workload: Workload,
    split: Split,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Path,
    compute: torch.device,
    teacher: nn.Module | None = None,
    distill: Distillation | None = None,
    penalty: Callable[[float], Tensor] | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    held_out: Split | None = None,
    recalibration_images: int = RECALIBRATION_IMAGES,
    checkpoint_every_s: float = EVERY_S,
    compute_count: int = 1,
    last: Path | None = None,
    report: Report = silent,
    say: Say = unsaid,
) -> Fitted:
    """Train ``model`` in place by ``recipe``, and leave it in eval mode, with the batch-norm statistics of its weights.

    Args:
        model: the network; its weights are the starting point.
        split: the training images.
        checkpoint: file for the state of a training under way; removed at the end.
        teacher: the unpruned baseline, for distillation (Hinton et al. 2015, arXiv 1503.02531).
        penalty: called in every step with the share of training that is done (0..1); its scalar is added to the loss.
        part: which part of the learning-rate schedule this training is, as fractions of its whole.
        held_out: images for the metrics of the curve, and by which the best epoch is chosen; None = nothing is judged,
            and the last weights are kept.
        recalibration_images: training images that batch-norm statistics are taken anew on at the end (all, if there
            are fewer); 0 = they stay as training leaves them.
        checkpoint_every_s: how often the checkpoint is written.
        compute_count: how many processes train together, each on a GPU of its own or with its share of the threads;
            with a penalty it is this one alone.
        last: file for the weights of the last epoch, where those of the best one are kept.
        report: told (step, steps, note) after every step.
        say: told what a user should know of the training.

    Raises:
        TrainingError: the loss became NaN or infinite; says at which step and what to change. Or there are no features
            to be distilled.
        UserError: there are not as many GPUs.
        SurroundingsError: one of the other processes ended, or the disk is full.
    """
    move(model, compute)
    precision = precision_of(recipe, model, workload, split, compute)
    terms = Terms(model, workload, split, recipe, seed, checkpoint, checkpoint_every_s, compute, precision, part)
    compiled = is_compiled(recipe, model, workload, split, compute, precision, say)
    terms = replace(terms, teacher=teacher, distill=distill, compiled=compiled, say=say)
    if compute_count == 1 or penalty is not None:
        return _train(ALONE, terms, penalty, held_out, recalibration_images, last, report)
    with begun(compute_count, compute, partial(_train, terms=replace(terms, say=unsaid))) as group:
        return _train(group, terms, None, held_out, recalibration_images, last, report)


@dataclass(frozen=True)
class Terms:
    """What ``fit`` was given, as far as every process of a training has to know it."""

    model: nn.Module
    workload: Workload
    split: Split
    recipe: Recipe
    seed: int
    checkpoint: Path
    checkpoint_every_s: float
    compute: torch.device
    precision: Precision
    part: tuple[float, float]
    teacher: nn.Module | None = None
    distill: Distillation | None = None
    compiled: bool = False
    say: Say = unsaid


def _train(
    group: Group,
    terms: Terms,
    penalty: Callable[[float], Tensor] | None = None,
    held_out: Split | None = None,
    recalibration_images: int = 0,
    last: Path | None = None,
    report: Report = silent,
) -> Fitted:
    """The training of one process of a group; only the first one judges, writes and ends with weights of use."""
    workload, split, recipe, compute = terms.workload, terms.split, terms.recipe, group.compute(terms.compute)
    model = move(terms.model, compute)
    keep = recipe.keep if held_out is not None else "last"
    judge = None if held_out is None else Judge(workload, held_out, keep == "best", recipe.batch_size, compute)
    with contextlib.ExitStack() as resources:
        resources.enter_context(synchronised(model, recipe.sync_batchnorm and group.size > 1))
        features = _features(terms, compute)
        if features is not None:
            resources.callback(features.close)
        lesson = Lesson(
            *(model, workload, recipe, compute, group, terms.teacher, terms.distill, features, penalty),
            compiled=terms.compiled,
        )
        place = {"rank": group.rank, "world_size": group.size}
        batches = batches_of(workload, split, recipe, seed=terms.seed, compute=compute, **place)
        resources.callback(batches.close)
        schedule = Schedule(recipe, len(batches), terms.part)
        file = Checkpoint(terms.checkpoint, terms.checkpoint_every_s, writes=group.rank == 0)
        training = Training(lesson, schedule, judge, file, terms.precision, terms.seed, report, terms.say)
        state = training.state
        while state.step < schedule.steps:
            number, first = divmod(state.step, len(batches))
            model.train()
            for images, targets in itertools.islice(batches.epoch(number, first), schedule.steps - state.step):
                training.step(images, targets, len(split))
            training.end_epoch(len(split))

    def finish(keep: Literal["last", "best"]) -> None:
        training.finish(keep)
        if recalibration_images:
            at_once = min(recipe.batch_size, IMAGES_AT_ONCE)
            recalibrate(model, training_images(workload, split, recalibration_images, compute, at_once))

    if last is not None and keep == "best":
        finish("last")
        save_weights(last, model.state_dict())
    finish(keep)
    if group.rank == 0:
        terms.checkpoint.unlink(missing_ok=True)
    return training.fitted(keep)


def _features(terms: Terms, compute: torch.device) -> Features | None:
    """What is distilled besides outputs; None = nothing."""
    if terms.teacher is None or terms.distill is None or not terms.distill.features:
        return None
    image = terms.workload.example_input().to(compute)
    return Features(terms.model, move(terms.teacher, compute), image, terms.distill.feature_layers)


class Training:
    """A training under way, step by step.

    Args:
        lesson: what is learned from a batch.
        judge: takes the curve's metrics; None = nothing is judged.
        file: of its state: where it goes on from, if there is one.
        precision: of a training that begins; one that goes on has that of its checkpoint.
        seed: of what is random inside the network.
        report: told (step, steps, note) after every step.
        say: told where it goes on in another way.
    """

    def __init__(
        self,
        lesson: Lesson,
        schedule: Schedule,
        judge: Judge | None,
        file: Checkpoint,
        precision: Precision,
        seed: int,
        report: Report,
        say: Say = unsaid,
    ) -> None:
        self.lesson, self.schedule, self.judge, self.file = lesson, schedule, judge, file
        self.seed, self.report, self.say = seed, report, say
        recipe, model = lesson.recipe, lesson.model
        losses = Losses(f"lower lr (now {recipe.lr}) or set clip_norm: 1.0 in the recipe")
        average = average_of(model, recipe.ema) if recipe.ema and lesson.group.rank == 0 else None
        self.state = State(model, optimizer_of(model, recipe), average, losses)
        file.read(self.state, lesson.compute)
        if self.state.precision is None:
            self.state.precision = precision
        lesson.bf16 = self.state.precision == "bf16"
        lesson.join()

    @property
    def network(self) -> nn.Module:
        """The network that training would end with now."""
        average = self.state.average
        return self.lesson.model if average is None else average.module

    def step(self, images: Tensor, targets: Tensor, num_images: int) -> None:
        """Learn from a batch.

        Args:
            images: this process's part of it.
            num_images: of an epoch.

        Raises:
            TrainingError: the loss became NaN or infinite, now or in one of the steps before.
        """
        state, steps = self.state, self.schedule.steps
        self.schedule.set(state.optimizer, state.step)
        sizes = sizes_of(num_images, self.lesson.recipe.batch_size)
        whole = sizes[state.step % self.schedule.steps_per_epoch]
        loss = self._learned(images, targets, whole, state.step / steps)
        state.optimizer.step()
        if state.average is not None:
            state.average.update_parameters(self.lesson.model)
        state.losses.add(loss, whole)
        state.step += 1
        if state.step % self.schedule.steps_per_epoch == 0 or state.step == steps:
            return
        if state.losses.due or self.file.due:
            state.losses.read(state.step, steps)
        if self.file.due:
            self.file.write(state)
        self.report(state.step, steps, self._note())

    def _learned(self, images: Tensor, targets: Tensor, whole: int, done: float) -> Tensor:
        """What ``Lesson`` gives; where a compiled network fails, once more as it is, and so from then on."""
        seed = step_seed(self.seed, self.state.step, self.lesson.group.rank)  # of dropout inside the model
        torch.manual_seed(seed)
        try:
            return self.lesson(images, targets, whole, done)
        except Exception as error:
            if not (self.lesson.compiled and is_of_compiling(error)):
                raise
            self.say(not_compiled(error))
        self.lesson.compile(False)
        torch.manual_seed(seed)
        return self.lesson(images, targets, whole, done)

    def end_epoch(self, images: int) -> None:
        """Enter an epoch, or what there is of it, into the curve.

        Args:
            images: of an epoch.

        Raises:
            TrainingError: the loss became NaN or infinite.
        """
        state, steps = self.state, self.schedule.steps
        state.losses.read(state.step, steps)
        epoch = state.step / self.schedule.steps_per_epoch
        before = state.curve[-1].epoch if state.curve else 0.0
        metrics: Mapping[str, float] = {}
        if self.judge is not None and (state.step == steps or self.judge.is_due(before * images, epoch * images)):
            metrics = self.judge.metrics(self.network, self.lesson.bf16)
            if self.judge.chooses:
                self._keep_best(epoch, metrics.get(self.judge.metric, -math.inf))
        loss = self.lesson.group.mean(state.losses.mean, self.lesson.compute)
        state.curve.append(EpochFacts(epoch, loss, self.schedule.lr(state.step - 1), metrics))
        note = self._note()
        state.losses.begin_epoch()
        if self.file.due and state.step < steps:
            self.file.write(state)
        self.report(state.step, steps, note)

    def finish(self, keep: Literal["last", "best"]) -> None:
        """Give the network the weights that are kept, and bring it into eval mode."""
        state, model = self.state, self.lesson.model
        if keep == "best" and state.best is not None:
            model.load_state_dict(state.best.state)
        elif state.average is not None:
            model.load_state_dict(state.average.module.state_dict())
        model.eval()

    def fitted(self, keep: Literal["last", "best"]) -> Fitted:
        """How it went."""
        state = self.state
        assert state.precision is not None
        best = state.best if keep == "best" else None
        kept = state.step / self.schedule.steps_per_epoch if best is None else best.epoch
        return Fitted(state.precision, keep, kept, tuple(state.curve))

    def _keep_best(self, epoch: float, value: float) -> None:
        """Keep the weights of an epoch if they are better than all before."""
        best = self.state.best
        if best is None or value > best.value:
            weights = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
            self.state.best = Best(epoch, value, weights)

    def _note(self) -> str:
        """For people: where it is, how fast, and how well."""
        state, schedule = self.state, self.schedule
        epoch, epochs = state.step / schedule.steps_per_epoch, schedule.steps / schedule.steps_per_epoch
        parts = [f"epoch {math.ceil(epoch)} of {math.ceil(epochs)}"]
        if state.losses.images_per_s:
            parts += [f"{state.losses.images_per_s:,.0f} images/s", f"loss {state.losses.mean:.3f}"]
        judged = [found.metrics for found in state.curve if found.metrics]
        if self.judge is not None and judged and (value := judged[-1].get(self.judge.metric)) is not None:
            parts.append(f"{self.judge.metric} {value:.3f}")
        return ", ".join(parts)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """What all randomness of a step inside the network begins with, in one of the processes that train."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free, for the next ones; without effect where it is not glibc.

    By default every large tensor is given back to the kernel and faulted in again, which costs a step of training a
    fifth of its time on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
