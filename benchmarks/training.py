"""What our training loop costs over a bare one, and what bf16, distillation and a moving average change.

    python benchmarks/training.py [--steps 8] [--threads 1] [--only REGEX] [--json PATH]

Both sides run in one process, step by step in turn: one step of `fit` (augmentation, losses, progress, checkpoints,
the curve), one of a bare loop that takes the same batches as ready tensors, with the same optimizer, precision, memory
format and allocator. With one thread the times are CPU times, otherwise wall times. Images are random: they take as
long as real ones. A checkpoint is written every two minutes, so the seconds that one takes are charged as that share.

`fit_over_bare`: images per second of ours over those of the bare loop, the smallest of ResNet-20 and ResNet-56 (CIFAR,
batch 128) and MobileNetV2 (224 pixels, batch 16). `bf16_over_fp32`: bare steps of ResNet-56, where the processor
multiplies bf16 natively. Rows with `+` are ours with a moving average, and with a teacher of the same size.
`loader_blocked` and `loader_over_cached` (MobileNetV2 on JPEG files that two processes read, against ready tensors, by
the clock and by CPU time) are those of `_loading.py`; by the clock they need a machine that does nothing else.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import _loading
from benchmarks._output import Figure, parser, present
from secateur.pipeline.config.schema import Distillation, Recipe
from secateur.pipeline.progress import RichProgress
from secateur.pipeline.terminal import Terminal
from secateur.pipeline.training.checkpoints import EVERY_S, Checkpoint, State
from secateur.pipeline.training.curve import Losses
from secateur.pipeline.training.lesson import move
from secateur.pipeline.training.loop import fit, keep_freed_memory
from secateur.pipeline.training.precision import Precision, native_bf16
from secateur.pipeline.training.recipe import optimizer_of
from secateur.pipeline.workloads import classification
from secateur.pipeline.workloads.classification import Classification

CPU = torch.device("cpu")
FIT_OVER_BARE, BF16_OVER_FP32 = 0.95, 1.5
WARM_UP = 2
"""Steps that are not counted."""
LOADED = f"mobilenet_v2, {_loading.SIDE} pixels, batch {_loading.BATCH}, read by {_loading.WORKERS} processes : ready"
LOADED_STEPS = 20
"""Of a turn on what is read, and of one on ready tensors."""


@dataclass(frozen=True)
class Case:
    """A training that is timed."""

    network: str
    pixels: int
    batch: int
    extra: str = ""

    @property
    def name(self) -> str:
        return f"{self.network}, {self.pixels} pixels, batch {self.batch}{self.extra and ' + ' + self.extra}"


CASES = (
    Case("cifar/resnet20", 32, 128),
    Case("cifar/resnet56", 32, 128),
    Case("mobilenet_v2", 224, 16),
    Case("cifar/resnet20", 32, 128, "average"),
    Case("cifar/resnet20", 32, 128, "teacher"),
)


def bare(network: nn.Module, batches: list[tuple[Tensor, Tensor]], precision: Precision) -> Iterator[None]:
    """A training loop as one writes it."""
    sgd = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    network.train()
    for images, labels in cycle(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(network(images), labels)
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        yield


class Comparison:
    """Steps of ours and of the bare loop, in turn.

    Args:
        steps: of each that count.
        threads: of torch.
    """

    def __init__(self, steps: int, threads: int, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.precision: Precision = "bf16" if native_bf16(CPU) else "fp32"

    def workload(self, case: Case) -> Classification:
        """Random images, enough for one epoch of all steps."""
        rng, file = np.random.default_rng(0), self.folder / f"{case.network.replace('/', '-')}.npz"
        num = case.batch * (self.steps + WARM_UP) * 3 // 2
        if not file.exists():
            images = rng.integers(0, 256, (num, case.pixels, case.pixels, 3), dtype=np.uint8)
            np.savez(file, images=images, labels=np.arange(num) % 10)
        augment = {"augment": "flip_shift" if case.pixels < 64 else "random_resized_crop"}
        data = {"source": "arrays", "train": str(file), **augment}
        model = {"name": case.network}
        return classification.build(classification.Options.model_validate({"model": model, "data": data}))

    def row(self, case: Case) -> dict[str, Any]:
        """Both loops, one step of each at a time."""
        workload = self.workload(case)
        network = move(workload.build_model(), CPU)
        batches = ready(workload, case.batch)
        loop = bare(copy.deepcopy(network), batches, self.precision)
        ours, theirs, began = list[float](), list[float](), self.clock()

        def report(done: int, total: int, note: str = "", /) -> None:
            nonlocal began
            shown(done, total, note)
            ours.append(self.clock() - began)
            began = self.clock()
            next(loop)
            theirs.append(self.clock() - began)
            began = self.clock()

        steps = self.steps + WARM_UP
        split = workload.train.first(steps * case.batch)
        ema, distill = 0.999 if case.extra == "average" else 0.0, Distillation() if case.extra == "teacher" else None
        recipe = Recipe(epochs=1, batch_size=case.batch, autocast=self.precision, ema=ema)
        teacher = copy.deepcopy(network) if distill else None
        file = self.folder / "checkpoint"
        with Path("/dev/null").open("w") as nothing, RichProgress(Terminal(file=nothing)).stage("Train") as shown:
            began = self.clock()
            options: dict[str, Any] = {"seed": 0, "checkpoint": file, "compute": CPU, "recalibration_images": 0}
            fit(network, workload, split, recipe, teacher=teacher, distill=distill, report=report, **options)
        writing_s = self._writing(network, recipe)
        fit_s = float(np.sum(ours[WARM_UP:])) / self.steps / (1 - writing_s / EVERY_S)
        bare_s = float(np.sum(theirs[WARM_UP:])) / self.steps
        rates = {"fit_images_per_s": case.batch / fit_s, "bare_images_per_s": case.batch / bare_s}
        return {"training": case.name, "precision": self.precision, **rates, "checkpoint_s": writing_s} | {
            "ratio": bare_s / fit_s
        }

    def _writing(self, network: nn.Module, recipe: Recipe) -> float:
        """Seconds that a checkpoint takes."""
        began = self.clock()
        Checkpoint(self.folder / "written").write(State(network, optimizer_of(network, recipe), None, Losses("")))
        return self.clock() - began

    def precisions(self) -> dict[str, Any]:
        """Bare steps of ResNet-56 in both types, in turn."""
        case = CASES[1]
        workload = self.workload(case)
        network, batches = move(workload.build_model(), CPU), ready(workload, case.batch)
        kinds: tuple[Precision, ...] = ("bf16", "fp32")
        loops = {kind: bare(copy.deepcopy(network), batches, kind) for kind in kinds}
        times: dict[Precision, list[float]] = {kind: [] for kind in kinds}
        for _ in range(self.steps // 2 + WARM_UP):
            for kind, loop in loops.items():
                began = self.clock()
                next(loop)
                times[kind].append(self.clock() - began)
        bf16, fp32 = (case.batch / float(np.median(times[kind][WARM_UP:])) for kind in kinds)
        rates = {"fit_images_per_s": bf16, "bare_images_per_s": fp32}
        return {"training": f"{case.name}, bare", "precision": "bf16 : fp32", **rates, "checkpoint_s": 0.0} | {
            "ratio": bf16 / fp32
        }


def loading(folder: Path, turns: int) -> tuple[dict[str, Any], list[Figure]]:
    """Training on what worker processes read, over the same on ready tensors."""
    (read, cached), figures = _loading.figures(folder, turns, LOADED_STEPS, CPU)
    rates = {"fit_images_per_s": read["images/s"], "bare_images_per_s": cached["images/s"], "checkpoint_s": 0.0}
    over = next(figure.value for figure in figures if figure.name == "loader_over_cached")
    return {"training": LOADED, "precision": "auto", **rates, "ratio": over}, figures


def ready(workload: Classification, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Two batches as a step takes them."""
    chosen = torch.split(torch.arange(2 * batch), batch)
    return [workload.batch(workload.train, part, train=False, generator=None, device=CPU) for part in chosen]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=8, help="of each loop that count (default 8)")
    arguments.add_argument("--threads", type=int, default=1, help="of both (default 1)")
    arguments.add_argument("--turns", type=int, default=4, help="of reading and of ready tensors (default 4)")
    arguments.add_argument("--only", default="", help="of the rows, those that this regular expression finds")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows, figures = list[dict[str, Any]](), list[Figure]()
    with tempfile.TemporaryDirectory() as folder:
        both = Comparison(options.steps, options.threads, Path(folder))
        chosen = [case for case in CASES if re.search(options.only, case.name)]
        for case in chosen:
            rows.append(both.row(case))
        plain = [row["ratio"] for row, case in zip(rows, chosen, strict=True) if not case.extra]
        if plain:
            figures.append(Figure("fit_over_bare", min(plain), FIT_OVER_BARE, min(plain) >= FIT_OVER_BARE))
        if native_bf16(CPU) and re.search(options.only, f"{CASES[1].name}, bare"):
            rows.append(both.precisions())
            ratio = rows[-1]["ratio"]
            figures.append(Figure("bf16_over_fp32", ratio, BF16_OVER_FP32, ratio >= BF16_OVER_FP32))
        if re.search(options.only, LOADED):
            row, found = loading(Path(folder) / "photographs", options.turns)
            rows.append(row)
            figures += found
    title = f"Training, torch {torch.__version__}, {options.threads} thread(s), {options.steps} steps of each"
    present(title, rows, figures, options.json)


if __name__ == "__main__":
    main()
