"""Images that were decoded once, in memory that this process shares with those it forks."""

from __future__ import annotations

import math
import mmap
import multiprocessing
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from secateur.device_profiles.cores import usable_cores
from secateur.pipeline.workloads.data.decode import Pixels


class Decoded:
    """Room for decoded images; whichever process decodes one first, all find it.

    Args:
        sizes: width and height of the images that may be kept, in pixels, by index; (0, 0) = unknown, and not kept.
        channels: of every image.
        room: bytes; images that go beyond are not kept.
    """

    def __init__(self, sizes: Mapping[int, tuple[int, int]], channels: int, room: int) -> None:
        self._places: dict[int, tuple[int, tuple[int, int, int], int]] = {}
        end = 0
        for index, (wide, high) in sizes.items():
            shape = (high, wide, channels)
            if wide and end + math.prod(shape) <= room:
                self._places[index] = (end, shape, len(self._places))
                end += math.prod(shape)
        self._pixels, self._there = _shared(end), _shared(len(self._places))

    def get(self, index: int, decode: Callable[[], Pixels]) -> Pixels:
        """An image, shape (height, width, channels)."""
        if index not in self._places:
            return decode()
        start, shape, number = self._places[index]
        place = self._pixels[start : start + math.prod(shape)].reshape(shape)
        if not self._there[number]:
            pixels = decode()
            if pixels.shape != shape:
                return pixels  # the file is another one by now
            place[:] = pixels
            self._there[number] = 1
        return place


def _shared(size: int) -> npt.NDArray[np.uint8]:
    """Zeros; what a forked process writes there is seen by all. Pages that nobody writes to take no memory."""
    return np.frombuffer(mmap.mmap(-1, max(1, size)), dtype=np.uint8)


def threads() -> int:
    """Threads that decode images: as many as there are cores, but one in a process that is itself one of several."""
    return 1 if multiprocessing.parent_process() is not None else usable_cores()
