"""Reading the images of a training: in worker processes where that takes long, and once where they fit memory.

Worker processes are forked, so that a data set need not be pickled and images decoded once are seen by all of them.
They end with this process, however it ends, and hear no Ctrl-C. What is read is the same in any number of processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from secateur.device_profiles.cores import usable_cores
from secateur.pipeline.children import leave_terminal
from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.foreign import FEWER_READERS
from secateur.pipeline.workloads import Split, Workload

Request = tuple[Tensor, Tensor]
"""Positions in the split, and the seeds of the images there, both of shape (n,)."""
Read = tuple[Tensor, Tensor, Tensor]
"""Images and targets as they are read, and the images' seeds."""
FEW_IMAGES = 2048
"""A training that reads fewer images starts no processes for it."""
MOST_WORKERS = 16
PREFETCHED = 2
"""Batches that a worker process reads ahead."""
DYING_S = 1.0
"""How long a process that has failed is watched for its end."""
SHARE_OF_MEMORY = 0.25
"""Of what is free, for images that are kept."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where processes hand over batches; nothing is written by a name of ours
PR_SET_PDEATHSIG = 1
"""Name of Linux's ``prctl``: which signal a process gets when its parent dies."""


class Reader(Protocol):
    """Reads images of one split."""

    def read(self, requests: Sequence[Request]) -> Iterator[Read]:
        """What was asked for, in that order."""

    def close(self) -> None: ...


def reader_of(workload: Workload, split: Split, recipe: Recipe, compute: torch.device, world_size: int = 1) -> Reader:
    """What reads the images of a training.

    Args:
        world_size: processes that train on this machine.
    """
    source: Any = split.source
    num_workers = _num_workers(workload, split, recipe, compute, world_size)
    reader: Reader = _Workers(workload, split, num_workers, compute) if num_workers else _Here(workload, split)
    in_memory = getattr(source, "in_memory", False)
    if not workload.reads_anew and not (in_memory and compute.type == "cpu"):
        return _Kept(reader, len(split), compute, _room(recipe, compute, world_size))
    if hasattr(source, "keep"):
        return _OfKept(reader, source, split.indices, _room(recipe, torch.device("cpu"), world_size))
    return reader


def _num_workers(workload: Workload, split: Split, recipe: Recipe, compute: torch.device, world_size: int) -> int:
    """How many processes read: as the recipe says, else what suits data and machine."""
    if recipe.num_workers is not None:
        return recipe.num_workers
    cores = usable_cores() // world_size
    quick = hasattr(split.source, "in_memory") and not workload.reads_anew  # arrays, resized at most
    if cores < 2 or quick or recipe.epochs * len(split) < FEW_IMAGES or not _can_be_shared(split.source):
        return 0
    wanted = min(MOST_WORKERS, cores - 1 if compute.type == "cuda" else max(1, cores // 4))
    return min(wanted, _handed_over(workload, split, recipe.batch_size))


def _handed_over(workload: Workload, split: Split, batch_size: int) -> int:
    """How many processes can hand their batches over: in containers there is often little memory for that."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return MOST_WORKERS
    first = torch.zeros(1, dtype=torch.long)
    size = sum(tensor.nbytes for tensor in workload.read(split, first, first)) * batch_size
    return int(free // ((PREFETCHED + 2) * max(1, size)))


def _can_be_shared(source: Any) -> bool:
    """Whether forked processes may read a source at once: one that holds open files or connections, whose position they
    would share, cannot be pickled either."""
    try:
        _WithoutArrays(io.BytesIO()).dump(getattr(source, "dataset", source))
    except Exception:  # noqa: BLE001 - whatever a class of anybody's raises
        return False
    return True


class _WithoutArrays(pickle.Pickler):
    """Passes over what is large and harmless."""

    def persistent_id(self, obj: Any) -> Any:
        return 0 if isinstance(obj, np.ndarray | Tensor) else None


def _room(recipe: Recipe, compute: torch.device, world_size: int) -> int:
    """Bytes for images that are kept."""
    if recipe.cache_mb is not None:
        return recipe.cache_mb << 20
    free = torch.cuda.mem_get_info(compute)[0] if compute.type == "cuda" else psutil.virtual_memory().available
    return int(SHARE_OF_MEMORY * free / world_size)


@dataclass(frozen=True)
class _Here:
    """Reads in this process."""

    workload: Workload
    split: Split

    def read(self, requests: Sequence[Request]) -> Iterator[Read]:
        for indices, seeds in requests:
            yield (*self.workload.read(self.split, indices, seeds), seeds)

    def close(self) -> None:
        pass


# -- worker processes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Requested(Dataset[Any]):
    """What a worker process reads: an item is a whole batch, or the mistake in the user's data that prevents it."""

    workload: Workload
    split: Split

    def __getitem__(self, request: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> Read | UserError:
        indices, seeds = map(torch.from_numpy, request)
        try:
            return (*self.workload.read(self.split, indices, seeds), seeds)
        except UserError as error:
            return error


class _Workers:
    """Reads in processes of its own, which are started when they are first needed."""

    def __init__(self, workload: Workload, split: Split, num_workers: int, compute: torch.device) -> None:
        self._requests: list[Any] = []
        self._dataset, self._num_workers, self._pinned = (
            _Requested(workload, split),
            num_workers,
            compute.type == "cuda",
        )
        self._loader: DataLoader[Any] | None = None

    def read(self, requests: Sequence[Request]) -> Iterator[Read]:
        self._requests[:] = [(indices.numpy(), seeds.numpy()) for indices, seeds in requests]
        try:
            for found in self._begun():
                if isinstance(found, UserError):
                    raise found
                yield found
        except (RuntimeError, OSError, EOFError) as error:  # the last two: while it handed over a batch
            if not self._has_lost_one():
                raise
            raise SurroundingsError(f"a process that reads training images died ({error}); {FEWER_READERS}") from error

    def _has_lost_one(self) -> bool:
        """Whether a process has died, or does so just now: its connections end first."""
        reading: Any = None if self._loader is None else self._loader._iterator
        try:
            return reading is not None and bool(wait([worker.sentinel for worker in reading._workers], DYING_S))
        except RuntimeError:  # PyTorch's handler of SIGCHLD, which raises wherever this process is
            return True

    def _begun(self) -> Iterator[Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            if self._loader is None:
                self._loader = DataLoader(
                    self._dataset,
                    batch_size=None,
                    sampler=self._requests,
                    num_workers=self._num_workers,
                    collate_fn=_as_it_is,
                    pin_memory=self._pinned,
                    worker_init_fn=_begin,
                    multiprocessing_context="fork",
                    generator=torch.Generator(),  # else it draws from the one that dropout draws from
                    prefetch_factor=PREFETCHED,
                    persistent_workers=True,
                )
            return iter(self._loader)

    def close(self) -> None:
        reading: Any = None if self._loader is None else self._loader._iterator
        self._loader = None
        if reading is not None:
            with contextlib.suppress(RuntimeError):  # one has died, which was told where it was missed
                reading._shutdown_workers()  # else they live while anybody holds an epoch


def _as_it_is(found: Any) -> Any:
    return found


def _begin(worker: int) -> None:
    """In a worker process: end with the parent, and leave signals to it."""
    del worker
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_terminal()
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it died just now
            os._exit(0)


# -- what is kept ------------------------------------------------------------------------------------------------------


@dataclass
class _Kept:
    """Keeps images that are always read alike on the compute device, where all of them fit.

    Args:
        reader: of what is not there yet.
        num_images: of the split.
        room: bytes.
    """

    reader: Reader
    num_images: int
    compute: torch.device
    room: int
    images: Tensor | None = None
    targets: Tensor | None = None
    there: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.there = torch.zeros(self.num_images, dtype=torch.bool)

    def read(self, requests: Sequence[Request]) -> Iterator[Read]:
        if all(bool(self.there[indices].all()) for indices, _ in requests):
            yield from self._read_kept(requests)
            return
        for (indices, _), found in zip(requests, self.reader.read(requests), strict=True):
            images, targets, seeds = (tensor.to(self.compute, non_blocking=True) for tensor in found)
            self._keep(indices, images, targets)
            yield images, targets, seeds

    def _read_kept(self, requests: Sequence[Request]) -> Iterator[Read]:
        """One transfer for all of them."""
        if self.images is None or self.targets is None:
            return
        sizes = [len(indices) for indices, _ in requests]
        where, seeds = (torch.cat([one[i] for one in requests]).to(self.compute) for i in (0, 1))
        for indices, own in zip(torch.split(where, sizes), torch.split(seeds, sizes), strict=True):
            yield self.images[indices], self.targets[indices], own

    def _keep(self, indices: Tensor, images: Tensor, targets: Tensor) -> None:
        if self.images is None or self.targets is None:
            if self.num_images * (images[:1].nbytes + targets[:1].nbytes) > self.room:
                return
            self.images, self.targets = (t.new_empty((self.num_images, *t.shape[1:])) for t in (images, targets))
        where = indices.to(self.compute)
        self.images[where], self.targets[where] = images, targets
        self.there[indices] = True

    def close(self) -> None:
        self.reader.close()
        self.images = self.targets = None
        self.there[:] = False


@dataclass(frozen=True)
class _OfKept:
    """Has a source keep decoded images while it is read."""

    reader: Reader
    source: Any
    indices: npt.NDArray[np.int64]
    room: int

    def read(self, requests: Sequence[Request]) -> Iterator[Read]:
        self.source.keep(self.indices, self.room)
        return self.reader.read(requests)

    def close(self) -> None:
        self.reader.close()
        self.source.forget()
