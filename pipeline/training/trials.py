"""What is settled by trying a few steps of a training: the type of its numbers, and whether it is compiled."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.progress import Say
from secateur.pipeline.surroundings import home
from secateur.pipeline.training import compiled
from secateur.pipeline.training.batches import sizes_of
from secateur.pipeline.training.lesson import Lesson, move
from secateur.pipeline.training.precision import Precision, certain, faster, kept_for, remembered, to_be_timed
from secateur.pipeline.training.recipe import Schedule
from secateur.pipeline.workloads import Split, Workload


def precision_of(
    recipe: Recipe, model: nn.Module, workload: Workload, split: Split, compute: torch.device
) -> Precision:
    """The precision of a recipe; where it is ``auto`` and bf16 is native, what is faster for this network, tried once.

    Args:
        model: on ``compute``; a copy of it is timed.

    Raises:
        SurroundingsError: the choice cannot be kept.
    """
    if (known := certain(recipe.autocast, compute)) is not None:
        return known
    images, targets = to_be_timed(recipe, workload, split, compute)

    def choose() -> Precision:
        with torch.random.fork_rng():
            copied = move(copy.deepcopy(model), compute).train()
            return faster(partial(_seconds, Lesson(copied, workload, recipe, compute), images, targets))

    return remembered(kept_for(model, images.shape, compute), choose)


def _seconds(lesson: Lesson, images: Tensor, targets: Tensor, precision: Precision) -> float:
    """Of a step without its optimizer: on a processor those of this thread's process, however busy the machine is."""
    clock = time.process_time if lesson.compute.type == "cpu" else time.perf_counter
    lesson.bf16 = precision == "bf16"
    started = clock()
    lesson(images, targets, len(images), 0.0).item()
    return clock() - started


def is_compiled(
    recipe: Recipe,
    model: nn.Module,
    workload: Workload,
    split: Split,
    compute: torch.device,
    precision: Precision,
    say: Say,
) -> bool:
    """Whether the steps of a training are compiled: as its recipe says, or where trying found that this pays.

    What is found is kept for all runs, also that a network cannot be compiled.

    Args:
        model: on ``compute``; a copy of it is tried.
        precision: of the steps.
        say: told what is found, and why a network is not compiled.

    Raises:
        SurroundingsError: what was found cannot be kept.
    """
    if (known := compiled.certain(recipe, compute)) is not None:
        return known
    sizes = sizes_of(len(split), recipe.batch_size)
    steps, shape = Schedule(recipe, len(sizes)).steps, (sizes[0], *workload.example_input().shape[1:])
    file = home() / "compilations" / f"{kept_for(model, shape, compute).name}-{precision}"
    found = compiled.read(file)
    if found is None:
        try:
            lessons = _lessons(recipe, model, workload, compute, precision)
            batch = workload.batch(split, torch.arange(sizes[0]), train=False, generator=None, device=compute)
            with torch.random.fork_rng():
                found = compiled.timed(partial(_step, lessons, *batch), sizes[0], sizes[-1], steps)
        except Exception as error:
            if not compiled.is_of_compiling(error):
                raise
            found = compiled.NEVER
            say(compiled.not_compiled(error))
        else:
            if found is None:
                return False
            say(found.told())
        compiled.write(file, found)
    return found.pays(steps)


def _lessons(
    recipe: Recipe, model: nn.Module, workload: Workload, compute: torch.device, precision: Precision
) -> dict[bool, Lesson]:
    """One network's lessons, compiled and as they are."""
    copied, bf16 = move(copy.deepcopy(model), compute).train(), precision == "bf16"
    return {kind: Lesson(copied, workload, recipe, compute, bf16=bf16, compiled=kind) for kind in (False, True)}


def _step(
    lessons: Mapping[bool, Lesson], images: Tensor, targets: Tensor, compiled: bool, number: int
) -> tuple[float, float]:
    """Seconds and loss of a step without its optimizer, on the first ``number`` images."""
    started = time.perf_counter()
    loss = lessons[compiled](images[:number], targets[:number], number, 0.0).item()
    return time.perf_counter() - started, loss
