"""Compiled steps of a training: on a GPU, where trying finds that they pay; never on a processor.

What is compiled is a way to call a network. Its modules, tensors and names are its own, so nothing of it reaches a
checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.files import write_whole

Forward = Callable[[Tensor], Tensor]
"""Images to a network's outputs."""
CLEAR = 1.1
"""How many times as long a training has to take uncompiled, compiling included, so that no chance decides."""
ROUNDS = 3
"""Times each kind of step is timed; the fastest counts."""
LEAST_S = 300.0
"""Seconds of a training, uncompiled, below which nothing is tried: compiling takes one minute or more."""
SAME_LOSS = 0.1
"""Largest relative difference of the losses of one batch: more than rounding and dropout make of it."""


def compiled(network: nn.Module) -> Forward:
    """The forward pass of a network, compiled when it is called; what was compiled for others is forgotten.

    PyTorch keeps eight versions of one piece of code and then goes on without: candidates are of one class.
    """
    torch.compiler.reset()
    forward: Forward = torch.compile(network)
    return forward


def certain(recipe: Recipe, compute: torch.device) -> bool | None:
    """Whether steps are compiled; None where that has to be found by trying.

    With synchronised batch norm they never are: its processes speak with each other in mid-network.
    """
    if compute.type != "cuda" or recipe.compile == "off" or recipe.sync_batchnorm:
        return False
    return True if recipe.compile == "on" else None


@dataclass(frozen=True)
class Timed:
    """What trying has found for a network.

    Args:
        eager_s: seconds of a step as it is.
        compiled_s: of a compiled one.
        compile_s: of compiling, for whole batches and for the last one of an epoch.
    """

    eager_s: float
    compiled_s: float
    compile_s: float

    def pays(self, steps: int) -> bool:
        """Whether a training of so many steps is clearly shorter compiled."""
        return CLEAR * (self.compile_s + steps * self.compiled_s) <= steps * self.eager_s

    def told(self) -> str:
        """For people."""
        return (
            f"A compiled step of training takes {1000 * self.compiled_s:.1f} ms instead of {1000 * self.eager_s:.1f}, "
            f"and compiling {self.compile_s:.0f} s"
        )


NEVER = Timed(0.0, math.inf, math.inf)
"""Of a network that cannot be compiled."""

Step = Callable[[bool, int], tuple[float, float]]
"""(compiled?, images) -> seconds and loss of a step."""


def timed(step: Step, images: int, last: int, steps: int) -> Timed | None:
    """Try steps of both kinds in turn; None where the training is too short for any compiling to pay.

    Args:
        images: of a batch.
        last: of the last batch of an epoch; compiled code is made anew for it.
        steps: of the training.

    Raises:
        UnlikeError: the compiled step computes something else.
    """
    expected = step(False, images)[1]
    if steps * min(step(False, images)[0] for _ in range(ROUNDS)) < LEAST_S:
        return None
    (first_s, loss), (other_s, _) = step(True, images), step(True, last)
    if not abs(loss - expected) <= SAME_LOSS * max(abs(expected), SAME_LOSS):
        raise UnlikeError(f"the loss of a compiled step is {loss:.4g} instead of {expected:.4g}")
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for kind, seconds in times.items():
            seconds.append(step(kind, images)[0])
    return Timed(min(times[False]), min(times[True]), first_s + other_s)


class UnlikeError(RuntimeError):
    """A compiled step computes something else than the network does."""


def is_of_compiling(error: Exception) -> bool:
    """Whether an error says that a network cannot be compiled, or not with this much memory."""
    modules = [kind.__module__ for kind in type(error).__mro__]
    by_compiler = any(name.startswith(("torch._dynamo", "torch._inductor", "torch._functorch")) for name in modules)
    return by_compiler or isinstance(error, UnlikeError | torch.OutOfMemoryError)


def not_compiled(error: Exception) -> str:
    """The same for people."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"Steps of this training are not compiled (compile: on tries it again): {' '.join(lines[:2])}"


def read(file: Path) -> Timed | None:
    """What was found before; None where there is no such file, or it is damaged."""
    try:
        return Timed(**{name: float(value) for name, value in json.loads(file.read_text(encoding="ascii")).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write(file: Path, found: Timed) -> None:
    """Keep what was found for whoever asks next.

    Raises:
        SurroundingsError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(found)) + "\n")
