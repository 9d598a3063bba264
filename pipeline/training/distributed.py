"""One training in several processes: data-parallel, by torch's ``DistributedDataParallel``.

This process is the first of them. The others are started for one training with what it was given, see their parts of
every batch, and end with it. Gradients are averaged while they are computed; everything else that is said or written is
the first one's business.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.device_profiles.shelf import module_of, plugin_files
from secateur.pipeline.children import end_with, kept
from secateur.pipeline.errors import SurroundingsError, UserError
from secateur.pipeline.surroundings import home

LONGEST_WAIT = datetime.timedelta(hours=6)
"""How long a process waits for the others: the first one may be judging an epoch meanwhile."""
END_S = 5.0


@dataclass(frozen=True)
class Group:
    """The processes of a training, as one of them sees them.

    Args:
        rank: which one this is, from 0; the first one speaks and writes for all.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def compute(self, kind: torch.device) -> torch.device:
        """Where this process computes."""
        return torch.device("cuda", self.rank) if kind.type == "cuda" and self.size > 1 else kind

    def wrap(self, model: nn.Module, compute: torch.device) -> nn.Module:
        """The network whose gradients are those of all processes; weights and statistics are the first one's."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[compute] if compute.type == "cuda" else None)

    @contextlib.contextmanager
    def apart(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Gradients of a part of a batch, which stay in this process; those of the last part are averaged with all."""
        if last or not isinstance(model, DistributedDataParallel):
            yield
        else:
            with model.no_sync():
                yield

    def mean(self, value: float, compute: torch.device) -> float:
        """The mean over all processes, each of which has to ask for it."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=compute)
        dist.all_reduce(total)
        return float(total) / self.size


ALONE = Group()


def check_count(count: int, compute: torch.device) -> None:
    """See that there is a GPU for each process of a training; on a processor they share its cores.

    Raises:
        UserError: there are not as many GPUs.
    """
    if compute.type == "cuda" and (there := torch.cuda.device_count()) < count:
        raise UserError(f"compute_count is {count}, and PyTorch finds {there} CUDA devices here")


@contextlib.contextmanager
def begun(count: int, compute: torch.device, follow: Callable[[Group], object]) -> Iterator[Group]:
    """A group of processes for one training, of which this one is the first; the others end with the block.

    Args:
        follow: what the others do, with their group; it is pickled, with copies of everything in it.

    Raises:
        UserError: there are not as many GPUs.
        SurroundingsError: one of the others ended before the block did.
    """
    check_count(count, compute)
    threads = torch.get_num_threads()
    resource_tracker.ensure_running()  # which outlives the block
    with kept(home(), "training"), tempfile.TemporaryDirectory(prefix="secateur-training-") as name:
        folder = Path(name)
        job = pickle.dumps((compute, max(1, threads // count), follow))
        (folder / "job").write_bytes(pickle.dumps((plugin_files(), job)))
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_other, args=(name, Group(rank, count), os.getpid()), daemon=True)
            for rank in range(1, count)
        ]
        for process in others:
            process.start()
        torch.set_num_threads(max(1, threads // count))
        try:
            with _joined(folder, Group(0, count), compute):
                yield Group(0, count)
        except RuntimeError as error:
            raise _lost(folder, others) or error from error
        finally:
            torch.set_num_threads(threads)
            _end(others)


@contextlib.contextmanager
def _joined(folder: Path, group: Group, compute: torch.device) -> Iterator[None]:
    """Within the block this process is one of the group."""
    gpu = compute.type == "cuda"
    if gpu:
        torch.cuda.set_device(group.rank)
    elif sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), group.size)  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=group.rank, world_size=group.size, timeout=LONGEST_WAIT
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
    finally:
        dist.destroy_process_group()


def _other(folder: str, group: Group, parent: int) -> None:
    """What a process of the group does that is not the first."""
    end_with(parent)
    try:
        compute, threads, follow = _job(Path(folder))
        torch.set_num_threads(threads)
        with _joined(Path(folder), group, compute):
            follow(group)
    except Exception:
        (Path(folder) / f"{group.rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _job(folder: Path) -> Any:
    """What the first process pickled, once the files are loaded that define its classes."""
    files, job = pickle.loads((folder / "job").read_bytes())  # noqa: S301  written by who started this process
    for file in files:
        module_of(file)
    return pickle.loads(job)  # noqa: S301


def _lost(folder: Path, others: Sequence[BaseProcess]) -> Exception | None:
    """Why another process is gone; None = they all live."""
    for rank, process in enumerate(others, start=1):
        process.join(END_S)
        if process.exitcode:
            error = folder / f"{rank}.error"
            said = error.read_text(encoding="utf-8").strip().splitlines()[-1] if error.exists() else ""
            return SurroundingsError(f"process {rank} of the training ended ({process.exitcode}) {said}".strip())
    return None


def _end(others: Sequence[BaseProcess]) -> None:
    for process in others:
        process.join(END_S)
        if process.is_alive():
            process.kill()
            process.join()
