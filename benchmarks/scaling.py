"""Candidates per second on 1 and 2 worker processes of this machine against one process, and what an engine costs.

    python benchmarks/scaling.py [--engines processes dask ray] [--rounds 3] [--candidates 24] [--images 360]
                                 [--side 32] [--json PATH]

One process is the deterministic evaluator of a run without workers, on one thread; a worker has one thread too. All get
the same random plans of ResNet-20 on the bundled digits, new ones in every round, in turn within one process; each
engine is started, and its workers have loaded everything, before the clock starts (``start_s``). All must find the
same losses to the last bit, or the benchmark ends with an error.

``per_s`` is candidates per second of wall time, the median over rounds; ``speedup`` the median of the rounds' ratios to
one process, ``lowest`` the smallest of them. ``score_ms`` is what a candidate took in the process that scored it.
``batch1_ms`` and ``batch32_ms`` are what handing a candidate out costs, in batches of 1 and of 32: of candidates of
next to no work (ResNet-8 on 16 images of 8x8 pixels), wall time less the time in the worker, per candidate.
``load`` is the machine's load average when the round began: with more than its idle cores busy, two workers
cannot be twice as fast as one.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from secateur.pruning.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks._output import Figure, parser, present
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.config.schema import RunFile, WorkersSection
from secateur.pipeline.evaluation.accuracy import AccuracyEvaluator, AccuracyRequest
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.shipped_data import open_section
from secateur.pipeline.evaluation.worker_pool import WorkerPool
from secateur.pipeline.flow import runtime_env
from secateur.pipeline.flow.worker_engines import open_engine
from secateur.pipeline.training.checkpoints import save_weights
from secateur.pipeline.training.statistics import recalibrate, training_images
from secateur.pruning import PruningPlan
from secateur.pruning.saliency import uniform_plan

BATCH = WorkersSection().batch
SPEEDUP = 1.7
"""Least speed-up of two workers on two idle cores."""


class Scene:
    """A network with random weights, ready to be scored here and by workers."""

    def __init__(self, folder: Path, network: str, side: int, images: int) -> None:
        data = {"source": "digits", "image_size": side, "search_fraction": 0.3}
        section = {"name": "classification", "model": {"name": network}, "data": data}
        search = {"images": images, "forward": "deterministic"}
        self.config = RunFile.model_validate({"name": "scaling", "workload": section, "search": search, "threads": 1})
        self.folder = folder
        folder.mkdir()
        workload = open_section(section)
        torch.manual_seed(0)
        self.model = workload.fresh_model()
        recalibrate(self.model, training_images(workload, workload.train, 256, torch.device("cpu")))
        self.graph = trace(self.model, workload.example_input())
        self.baseline = folder / "baseline.safetensors"
        save_weights(self.baseline, self.model.state_dict())
        template = OnnxTemplate.export(self.model, workload.example_input(), self.graph, folder / "template.onnx")
        baseline = Baseline(self.model, self.graph, workload)
        self.accuracy = AccuracyEvaluator(baseline, folder, self.config.search, lambda: template, deterministic=True)

    def pool(self, engine: Any, batch: int) -> WorkerPool:
        config = self.config.model_copy(update={"workers": WorkersSection(batch=batch)})
        return WorkerPool(engine, config, self.baseline, self.folder / "workers")

    def plans(self, number: int, seed: int) -> list[PruningPlan]:
        ratios = np.random.default_rng(seed).uniform(0.5, 0.9, number)
        return [
            uniform_plan(self.graph, float(ratio), model=self.model, saliency="random", seed=1000 * seed + i)
            for i, ratio in enumerate(ratios)
        ]

    def alone(self, plans: Sequence[PruningPlan]) -> tuple[float, float, list[float]]:
        """Wall seconds, seconds of scoring, losses."""
        started = time.perf_counter()
        found = [self.accuracy.evaluate(AccuracyRequest(plan)) for plan in plans]
        return time.perf_counter() - started, sum(s.seconds for s in found), [s.metrics["loss"] for s in found]

    def together(self, pool: WorkerPool, plans: Sequence[PruningPlan]) -> tuple[float, float, list[float]]:
        asks = {("", plan.digest, True, False): AccuracyRequest(plan) for plan in plans}
        started = time.perf_counter()
        pool.begin(self.accuracy, asks)
        found = [scored for key in asks if (scored := pool.answer(key)) is not None]
        return time.perf_counter() - started, sum(s.seconds for s in found), [s.metrics["loss"] for s in found]


def measure(folder: Path, engines: Sequence[str], options: Any) -> tuple[list[dict[str, Any]], list[Figure]]:
    heavy = Scene(folder / "heavy", "cifar/resnet20", options.side, options.images)
    light = Scene(folder / "light", "cifar/resnet8", 8, 16)
    for scene in (heavy, light):
        scene.alone(scene.plans(2, 99))
    rows: list[dict[str, Any]] = []
    for name in engines:
        with ExitStack() as stack:
            pools: dict[int, WorkerPool] = {}
            overheads: dict[int, float] = {}
            starts: dict[int, float] = {}
            for count in (2,) if name == "ray" else (1, 2):  # a process has one Ray at a time
                started = time.perf_counter()
                engine = stack.enter_context(open_engine(WorkersSection(engine=name, count=count)))
                pools[count] = stack.enter_context(closing(heavy.pool(engine, BATCH)))
                heavy.together(pools[count], heavy.plans(4 * count, 98))
                starts[count] = time.perf_counter() - started
                if not overheads:
                    overheads = {batch: overhead(light, engine, batch) for batch in (1, BATCH)}
            rows += compare(name, heavy, pools, starts, overheads, options)
    figures = [
        Figure(f"speedup_2_{row['engine']}", row["speedup"], SPEEDUP, row["speedup"] >= SPEEDUP)
        for row in rows
        if row["workers"] == 2
    ]
    return rows, figures


def overhead(light: Scene, engine: Any, batch: int) -> float:
    """Milliseconds per candidate that are not spent on it."""
    pool = light.pool(engine, batch)
    light.together(pool, light.plans(2, 97))
    number = 24 if batch == 1 else 2 * batch
    plans = light.plans(number, 96)
    wall, scoring, _ = light.together(pool, plans)
    return 1e3 * (wall - scoring / engine.count) / number


def compare(
    name: str,
    scene: Scene,
    pools: dict[int, WorkerPool],
    starts: dict[int, float],
    overheads: dict[int, float],
    options: Any,
) -> list[dict[str, Any]]:
    times: dict[int, list[tuple[float, float]]] = {0: [], **{count: [] for count in pools}}
    load = os.getloadavg()[0]
    for number in range(options.rounds):
        plans = scene.plans(options.candidates, number)
        expected = None
        for count in times:
            wall, scoring, losses = scene.alone(plans) if count == 0 else scene.together(pools[count], plans)
            times[count].append((wall, scoring))
            expected = losses if expected is None else expected
            if losses != expected:
                raise SystemExit(f"{name} with {count} workers finds other losses than one process")
    rows = []
    for count, found in times.items():
        ratios = [alone / wall for (alone, _), (wall, _) in zip(times[0], found, strict=True)]
        rows.append(
            {
                "engine": name if count else "none",
                "workers": count,
                "per_s": options.candidates / statistics.median(wall for wall, _ in found),
                "speedup": statistics.median(ratios),
                "lowest": min(ratios),
                "score_ms": 1e3 * statistics.median(scoring for _, scoring in found) / options.candidates,
                "batch1_ms": overheads.get(1, float("nan")) if count else 0.0,
                "batch32_ms": overheads.get(BATCH, float("nan")) if count else 0.0,
                "start_s": starts.get(count, 0.0),
                "load": load,
            }
        )
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--engines", nargs="+", default=["processes"], choices=["processes", "dask", "ray"])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--candidates", type=int, default=24)
    arguments.add_argument("--images", type=int, default=360)
    arguments.add_argument("--side", type=int, default=32)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SECATEUR_HOME"] = folder
        runtime_env(Path(folder))
        rows, figures = measure(Path(folder), options.engines, options)
    present("Candidates scored by worker processes", rows, figures, options.json)


if __name__ == "__main__":
    main()
