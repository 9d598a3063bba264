"""Seeds of images: whatever is drawn for an image follows from its own, wherever and beside whatever it is read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

BITS = 62
"""Of a seed."""


def draw(num: int, generator: torch.Generator | None = None) -> Tensor:
    """Seeds, shape (num,), int64.

    Args:
        generator: None = PyTorch's global one.
    """
    return torch.randint(1 << BITS, (num,), generator=generator)


def part_of(seeds: Tensor, which: int) -> Tensor:
    """A number in 0..1 of each seed, shape (n,), float64; parts 0, 1 and 2 do not depend on each other."""
    return ((seeds >> 20 * which) & 0xFFFFF).double() / (1 << 20)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All usual sources of randomness on the CPU begin anew from a seed, and go on after it as if nothing had been."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs as well
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
