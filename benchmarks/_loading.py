"""What reading photographs costs a training: MobileNetV2 at 224, batch 16, JPEG files, worker processes.

``python benchmarks/_loading.py`` prints it alone; ``figures`` is for other benchmarks. Training on what worker
processes read and on the same number of ready batches take turns in one process. By the clock the figures mean
something on a machine that does nothing else; by CPU time (of this process and its workers) on any: where all cores are
busy, images per second are as 1 / CPU time.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.pipeline.config.schema import Recipe
from secateur.pipeline.training.batches import Batches, batches_of
from secateur.pipeline.training.lesson import move
from secateur.pipeline.training.loop import keep_freed_memory
from secateur.pipeline.training.precision import trains_in_bf16
from secateur.pipeline.workloads.classification import Classification, Options, build

MOST_BLOCKED, LEAST_OVER_CACHED = 0.05, 0.85
BATCH, SIDE, WORKERS = 16, 224, 2
AHEAD = 3 * WORKERS
"""Batches at the beginning of a turn that do not count: workers had read them before it."""


@dataclass
class Spent:
    """What steps of training took.

    Args:
        wall, blocked: seconds by the clock, and those of them in ``next``.
        cpu: seconds of CPU time of this process and those it has started.
    """

    images: int = 0
    wall: float = 0.0
    blocked: float = 0.0
    cpu: float = 0.0


@dataclass
class Loading:
    """Turns of training on what is read and on what is there.

    Args:
        workload: class folders of JPEG files.
        steps: that count, of each turn.
    """

    workload: Classification
    steps: int
    compute: torch.device
    read: Spent = field(default_factory=Spent)
    cached: Spent = field(default_factory=Spent)

    def run(self, turns: int) -> None:
        """Measure."""
        model, recipe = move(self.workload.build_model(), self.compute).train(), self._recipe()
        batches = batches_of(self.workload, self.workload.train, recipe, seed=0, compute=self.compute)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        with closing(batches):
            endless = _endless(batches)
            ready = [(images.clone(), targets.clone()) for images, targets in itertools.islice(endless, 4)]
            for _ in range(turns):
                self._turn(model, optimizer, endless, self.read)
                self._turn(model, optimizer, itertools.cycle(ready), self.cached)

    def _recipe(self) -> Recipe:
        return Recipe(batch_size=BATCH, num_workers=WORKERS, cache_mb=0)  # every image is decoded every time

    def _turn(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]], spent: Spent
    ) -> None:
        bf16 = trains_in_bf16(self._recipe().autocast, self.compute)
        for step in range(-AHEAD, self.steps):
            if step == 0:
                _wait(self.compute)
                began, cpu, blocked = time.perf_counter(), _cpu_s(), 0.0
            asked = time.perf_counter()
            images, targets = next(batches)
            if step >= 0:
                blocked += time.perf_counter() - asked
            with torch.autocast(self.compute.type, torch.bfloat16, enabled=bf16):
                loss = self.workload.loss(model(images), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        _wait(self.compute)
        spent.images += self.steps * BATCH
        spent.wall += time.perf_counter() - began
        spent.cpu += _cpu_s() - cpu
        spent.blocked += blocked


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for number in itertools.count():
        yield from batches.epoch(number)


def _wait(compute: torch.device) -> None:
    if compute.type == "cuda":
        torch.cuda.synchronize()


def _cpu_s() -> float:
    """CPU seconds of this process and of those it has started and that live."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def make_photographs(folder: Path, num: int) -> Path:
    """Class folders of JPEG files of 500 x 375 and 375 x 500 pixels, about 50 kB each: noise, blurred in patches."""
    rng = np.random.default_rng(0)
    for index in range(num):
        size = (375, 500, 3) if index % 4 else (500, 375, 3)
        fine = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(fine.size)
        file = folder / ("train" if index % 5 else "test") / "ab"[index % 2] / f"{index:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.blend(fine, coarse, 0.6).save(file, quality=90)
    return folder


def figures(
    folder: Path, turns: int, steps: int, compute: torch.device, photographs: int = 800
) -> tuple[list[dict[str, object]], list[Figure]]:
    """Rows for people, and the two figures with their bounds.

    Args:
        folder: empty; takes the files.
        turns, steps: turns of each kind, and steps of each that count.
        photographs: how many files.
    """
    model = {"name": "torchvision/mobilenet_v2"}
    data = {"source": "folder", "path": str(make_photographs(folder, photographs)), "image_size": SIDE}
    loading = Loading(build(Options.model_validate({"model": model, "data": data})), steps, compute)
    loading.run(turns)
    read, cached = loading.read, loading.cached
    rows: list[dict[str, object]] = [
        {
            "batches": name,
            "images/s": spent.images / spent.wall,
            "blocked share": spent.blocked / spent.wall,
            "CPU s/image": spent.cpu / spent.images,
        }
        for name, spent in (("read by workers", read), ("ready tensors", cached))
    ]
    blocked, over = read.blocked / read.wall, cached.wall / read.wall
    return rows, [
        Figure("loader_blocked", blocked, MOST_BLOCKED, blocked <= MOST_BLOCKED),
        Figure("loader_over_cached", over, LEAST_OVER_CACHED, over >= LEAST_OVER_CACHED),
        Figure(
            "loader_over_cached_cpu",
            cached.cpu / read.cpu,
            LEAST_OVER_CACHED,
            cached.cpu / read.cpu >= LEAST_OVER_CACHED,
        ),
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--turns", type=int, default=4, help="of each kind (default 4)")
    arguments.add_argument("--steps", type=int, default=20, help="of a turn (default 20)")
    arguments.add_argument("--photographs", type=int, default=800, help="JPEG files (default 800)")
    options = arguments.parse_args()
    keep_freed_memory()
    compute = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        rows, found = figures(Path(temporary), options.turns, options.steps, compute, options.photographs)
    present(f"MobileNetV2 at {SIDE}, batch {BATCH}, {WORKERS} workers, {compute}", rows, found, options.json)


if __name__ == "__main__":
    main()
