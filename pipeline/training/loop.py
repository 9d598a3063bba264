"""Training, fine-tuning and distillation: one loop, exact to resume.

Every random choice of an epoch (order of images, augmentation) is drawn from the seed and the epoch's number, and a
checkpoint is written after each epoch, so a killed training continues to the same weights on the same machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import itertools
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from secateur.pipeline.config.schema import Distillation, Recipe
from secateur.pipeline.files import write_whole
from secateur.pipeline.progress import Report, silent
from secateur.pipeline.training.batches import batches_of, epoch_seed
from secateur.pipeline.training.precision import trains_in_bf16
from secateur.pipeline.training.statistics import IMAGES_AT_ONCE, recalibrate, training_images
from secateur.pipeline.workloads import Split, Workload

VERSION = 3
"""Part of every content hash of trained weights; raise it when a change here changes the result."""


RECALIBRATION_IMAGES = 2048
"""Training images that batch-norm statistics are taken anew on at the end of a training."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt``."""


UNUSABLE = (
    *(RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError),
    *(EOFError, OSError, pickle.UnpicklingError),
)
"""What torch raises for a checkpoint that was cut short, is damaged or is another network's."""


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not a finite number."""


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
    recalibration_images: int = RECALIBRATION_IMAGES,
    report: Report = silent,
) -> nn.Module:
    """Train ``model`` in place by ``recipe`` and return it in eval mode, with the batch-norm statistics of its weights.

    Args:
        model: the network; its weights are the starting point.
        split: the training images.
        checkpoint: file for the state after each epoch; removed at the end.
        teacher: the unpruned baseline, for distillation (Hinton et al. 2015, arXiv 1503.02531).
        penalty: called in every step with the share of training that is done (0..1); its scalar is added to the loss.
        part: which part of the learning-rate schedule this training is, as fractions of its whole.
        recalibration_images: training images that batch-norm statistics are taken anew on at the end (all, if there
            are fewer); 0 = they stay as training leaves them.
        report: told (step, steps, note) as it goes.

    Raises:
        TrainingError: the loss became NaN or infinite; says at which step and what to change.
    """
    move(model, compute)
    if teacher is not None:
        move(teacher, compute).eval()
    batches = batches_of(workload, split, recipe, seed=seed, compute=compute)
    steps_per_epoch = len(batches)
    steps = max(1, round(recipe.epochs * steps_per_epoch))
    start, whole = part[0] * steps / (part[1] - part[0]), steps / (part[1] - part[0])
    warmup = max(1.0, min(recipe.warmup_epochs * steps_per_epoch, whole / 2))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    average = Average(model, recipe.ema) if recipe.ema else None
    step = _load_checkpoint(checkpoint, model, optimizer, average, compute)
    bf16 = trains_in_bf16(recipe.precision, compute)
    note = ""
    with contextlib.closing(batches):
        while step < steps:
            epoch = step // steps_per_epoch
            torch.manual_seed(epoch_seed(seed, epoch))  # dropout inside the model
            model.train()
            total_loss = 0.0
            first = step % steps_per_epoch
            for images, targets in itertools.islice(batches.epoch(epoch, first), steps - step):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * _schedule(start + step, whole, warmup)
                with torch.autocast(compute.type, torch.bfloat16, enabled=bf16):
                    outputs = model(images)
                    loss = workload.loss(outputs, targets, recipe.label_smoothing)
                    if teacher is not None and distill is not None:
                        with torch.no_grad():
                            taught = teacher(images)
                        learned = workload.distillation(outputs, taught, distill.temperature)
                        loss = (1 - distill.weight) * loss + distill.weight * learned
                if penalty is not None:
                    loss = loss + penalty(step / steps)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if recipe.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                optimizer.step()
                if average is not None:
                    average.update(model, step)
                total_loss += loss.item()
                if not math.isfinite(total_loss):
                    raise TrainingError(
                        f"the training loss is {loss.item()} at step {step} of {steps}; "
                        f"lower lr (now {recipe.lr}) or set clip_norm: 1.0 in the recipe"
                    )
                step += 1
                note = f"loss {total_loss / ((step - 1) % steps_per_epoch - first + 1):.3f}"
                report(step, steps, note)
            if step < steps:
                _save_checkpoint(checkpoint, model, optimizer, average, step)
    if average is not None:
        model.load_state_dict(average.state)
    model.eval()
    if recalibration_images:
        at_once = min(recipe.batch_size, IMAGES_AT_ONCE)
        recalibrate(model, training_images(workload, split, recalibration_images, compute, at_once))
    checkpoint.unlink(missing_ok=True)
    return model


class Average:
    """Exponential moving average of a network's weights and batch-norm statistics (Polyak and Juditsky 1992).

    Args:
        model: whose state it begins with.
        decay: share of the old average that a late step keeps; early steps keep (1 + step) / (10 + step).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the network after ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, 1 - decay)
            else:
                self.state[name].copy_(tensor)


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free, for the next ones; without effect where it is not glibc.

    By default every large tensor is given back to the kernel and faulted in again, which costs a step of training a
    fifth of its time on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def move(model: nn.Module, compute: torch.device) -> nn.Module:
    """The same module, on ``compute`` and in channels-last memory."""
    return model.to(compute).to(memory_format=torch.channels_last)


def _schedule(step: float, steps: float, warmup: float) -> float:
    """Factor on the learning rate: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))


def _save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None, step: int
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    save_checkpoint(path, state | ({} if average is None else {"average": average.state}))


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write what a training goes on from, whole.

    Raises:
        SurroundingsError: the disk is full or fails; names the file and how much it needs.
    """
    content = io.BytesIO()  # not into the file: what PyTorch says of a full disk names neither
    torch.save(dict(state), content)
    write_whole(path, content.getbuffer())


def _load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None, compute: torch.device
) -> int:
    """The step to continue at; 0 where there is no usable checkpoint."""
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(path, map_location=compute, weights_only=True)
        averaged: dict[str, Tensor] = {} if average is None else state["average"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.state = averaged
        return int(state["step"])
    except UNUSABLE:
        return 0  # cut short or of another network: begin again


def save_weights(path: Path, state: dict[str, Tensor]) -> str:
    """Write a state dict as safetensors, whole; returns its sha256."""
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors state dict onto the CPU, into memory of its own.

    Tensors in a file are not aligned, and kernels may then add in another order: the same weights gave other outputs.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}
