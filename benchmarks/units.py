"""What one candidate costs the driver, unit by unit: the figures that docs/how-to/scaling.md multiplies.

    python benchmarks/units.py [--candidates 256] [--json PATH]

Random plans of ResNet-20 (random weights, the bundled digits at 32x32 pixels). Bytes are those of JSON and of files;
``cpu_ms`` and ``wall_ms`` are medians per candidate in this process, on one thread. The journal's wall time is mostly
the disk's, which fsync waits for.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks._output import parser, present
from benchmarks.scaling import BATCH, Scene
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.evaluation import shipped_data
from secateur.pipeline.evaluation import worker as workers
from secateur.pipeline.evaluation.accuracy import AccuracyRequest
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.records import describe
from secateur.pruning.search.protocol import Candidate


class Weighed:
    """An engine whose one worker is this process; it weighs what would travel."""

    count, local = 1, True

    def __init__(self) -> None:
        self.spec = self.batch = self.answer = 0

    def perform(self, spec: Mapping[str, Any], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = workers.evaluate_batch(spec, batch)
        self.spec, self.batch, self.answer = (len(json.dumps(part)) for part in (spec, batch["asks"], answer))
        return answer

    def publish(self, sha256: str, path: Path) -> None:
        """Nothing to do: it sees every file."""


def timed(work: Callable[[Any], object], things: list[Any]) -> dict[str, float]:
    """Median CPU and wall milliseconds of doing something with a thing."""
    cpu, wall = [], []
    for thing in things:
        before = time.process_time(), time.perf_counter()
        work(thing)
        cpu.append(1e3 * (time.process_time() - before[0]))
        wall.append(1e3 * (time.perf_counter() - before[1]))
    return {"cpu_ms": statistics.median(cpu), "wall_ms": statistics.median(wall)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--candidates", type=int, default=256, help="how many random plans (default 256)")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def row(unit: str, size: float, cpu_ms: float = float("nan"), wall_ms: float = float("nan")) -> None:
        rows.append({"unit": unit, "bytes": int(size), "cpu_ms": cpu_ms, "wall_ms": wall_ms})

    with tempfile.TemporaryDirectory() as name:
        folder, engine = Path(name), Weighed()
        scene = Scene(folder / "scene", "cifar/resnet20", 32, 360)
        plans = scene.plans(options.candidates, 1)
        with closing(scene.pool(engine, BATCH)) as pool:
            scene.together(pool, plans[:BATCH])
        row("ask, of a batch", engine.batch / BATCH)
        row("answer", engine.answer / BATCH)
        row("description of the run, with each batch", engine.spec)
        row("weights, once per worker", scene.baseline.stat().st_size)
        row("template, once per worker", (scene.folder / "template.onnx").stat().st_size)
        accuracy = scene.accuracy
        images = shipped_data.pack(
            accuracy.baseline.workload, accuracy.num_recalibration_images, len(accuracy.split), folder / "images.npz"
        )
        row("images, once per worker", images.stat().st_size)

        template = OnnxTemplate.export(
            scene.model, accuracy.baseline.workload.example_input(), scene.graph, folder / "t.onnx"
        )
        row("ONNX file", statistics.median(len(template.slice(p)) for p in plans), **timed(template.slice, plans))

        metrics = dict(accuracy.evaluate(AccuracyRequest(plans[0])).metrics)
        with Journal(folder / "journal.jsonl", "units", "units") as journal:
            evaluation = {"status": "ok", "reason": "", "metrics": metrics}
            records = [
                {
                    "stage": "search",
                    "kind": "evaluation",
                    "latency": False,
                    "candidate": describe(Candidate(i, plan, "random")),
                    "evaluation": evaluation,
                    "spent": {},
                }
                for i, plan in enumerate(plans)
            ]
            before = journal.path.stat().st_size
            times = timed(journal.append, records)
            row("journal line, on disk", (journal.path.stat().st_size - before) / len(records), **times)
    present("What a candidate costs the driver", rows, [], options.json)


if __name__ == "__main__":
    main()
