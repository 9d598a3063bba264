"""What telling MLflow costs a candidate, at thousands of candidates, on SQLite and on PostgreSQL.

    SECATEUR_DATA=... python benchmarks/tracking.py [--candidates 5000] [--stores sqlite postgresql] [--json PATH]

Records of real candidates go through the journal and the tracker as fast as it takes them: journal, delivery by the
tracker's thread, wait. ``delivery_ms`` is that thread's time per candidate; ``tail_ms`` is its median over the last
tenth, when the store is full; ``search_ms`` is what the search itself waits for (an fsync'd journal line and the
queue); ``cpu_ms`` is the CPU time of the search's process per candidate, ``beside_ms`` that of the process beside it.

``added_ms`` is what a search loses: forward passes of ResNet-20 on one thread, in turn with the same passes right after
a candidate was handed to journal and tracker, so that it is delivered beside them; the median of the differences, with
the store full. The evaluation it is compared with is a real one, of ResNet-20 on 1,000 images of CIFAR-10 on one thread
(the data of pipeline/runs/cifar10-resnet20.yaml).

Stores: ``sqlite`` and ``postgresql`` are written directly; ``http+sqlite`` and ``http+postgresql`` through an MLflow
server on this machine, whose own work then takes from the same cores.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from secateur.pruning.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from benchmarks.overhead import RUN_FILE, random_plan
from secateur.device_profiles import load_profile, open_target
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import make_evaluator
from secateur.pipeline.run.journal import Journal, Record
from secateur.pipeline.run.opening import open_workload
from secateur.pipeline.run.records import describe
from secateur.pipeline.tracking import Tracker
from secateur.pipeline.tracking import tracker as delivery
from secateur.pruning import PruningPlan
from secateur.pruning.search.protocol import Candidate
from tests.servers import database_url, mlflow_server, postgres, running

BOUND_MS, BOUND_SHARE, PAIRS = 20.0, 0.05, 60
STORES = ("sqlite", "postgresql", "http+sqlite", "http+postgresql")


class Timed(Tracker):
    """A tracker that notes how long each delivery takes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: list[float] = []

    def _deliver(self, client: Any, record: Record) -> None:
        started = time.perf_counter()
        super()._deliver(client, record)
        self.seconds.append(time.perf_counter() - started)


@contextmanager
def store(kind: str, folder: Path) -> Iterator[str | None]:
    """The address of a fresh store; None = SQLite in the home."""
    with ExitStack() as stack:
        database = None
        if kind.endswith("postgresql"):
            database = database_url(
                stack.enter_context(running(postgres(folder / "pg"))), "mlflow", "postgresql+psycopg2"
            )
        if not kind.startswith("http"):
            yield database
        else:
            yield stack.enter_context(running(mlflow_server(folder / "server", database))).url


def evaluation_s(plans: int) -> tuple[float, list[Record]]:
    """Median seconds of a real evaluation, and records of real candidates to send."""
    config = load_run_file(RUN_FILE)
    workload = open_workload(config)
    model = workload.build_model()
    graph = trace(model, workload.example_input())
    rng, profile = np.random.default_rng(0), load_profile("local")
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        target = open_target(profile)
        fleet = Fleet([Device(profile, target)])
        baseline = Baseline(model, graph, workload)
        evaluator = make_evaluator(baseline, fleet, Path(folder), config.search, config.finetune)
        evaluator.evaluate(Candidate(0, PruningPlan.full(graph.groups), "warm-up"), latency=False)
        for i in range(plans):
            candidate = Candidate(i, random_plan(graph, rng), "random")
            found = evaluator.evaluate(candidate, latency=False)
            evaluation = {"status": found.status, "reason": found.reason, "metrics": dict(found.metrics)}
            facts = {"stage": "search", "kind": "evaluation", "latency": False}
            records.append({**facts, "candidate": describe(candidate), "evaluation": evaluation, "spent": {}})
        target.close()
    return float(np.median([r["evaluation"]["metrics"]["seconds"] for r in records])), records


def forward_passes() -> Callable[[], float]:
    """A piece of a search's work, some 0.15 s of it; returns its seconds."""
    model, images = open_workload(load_run_file(RUN_FILE)).build_model().eval(), torch.randn(25, 3, 32, 32)

    def work() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(3):
                model(images)
        return time.perf_counter() - started

    return work


def deliver(
    kind: str, uri: str | None, home: Path, records: list[Record], count: int, work: Callable[[], float]
) -> dict[str, Any]:
    """Send ``count`` candidates; figures per candidate in ms."""
    os.environ.pop("SECATEUR_TRACKING_URI", None)
    if uri is not None:  # a run file would refuse the password in it
        os.environ["SECATEUR_TRACKING_URI"] = uri
    tracker = Timed(TrackingSection(), home, "bench", "bench", {})
    tracker.start()
    waits: list[float] = []
    with Journal(home / "journal.jsonl", "bench", "bench") as journal:
        tracker.candidate(journal.append(_numbered(records, 0)))  # migrations, the parent run
        if tracker.flush(300):
            sys.exit(f"MLflow did not take the first candidate: {tracker.failure}")
        started, cpu, beside = time.perf_counter(), time.process_time(), _beside()
        for i in range(1, count + 1):
            record, before = _numbered(records, i), time.perf_counter()
            tracker.candidate(journal.append(record))
            waits.append(time.perf_counter() - before)
            if tracker.flush(300):
                sys.exit(f"MLflow did not take the candidates: {tracker.failure}")
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        beside, num_deliveries = _beside() - beside, len(tracker.seconds)
        added = []
        for i in range(count + 1, count + 1 + PAIRS):
            alone = work()
            before = time.perf_counter()
            tracker.candidate(journal.append(_numbered(records, i)))
            told = time.perf_counter() - before
            added.append(told + work() - alone)
            tracker.flush(300)
    tracker.close()
    times = 1000 * np.array(tracker.seconds[1:num_deliveries])
    return {
        "store": kind,
        "candidates": count,
        "delivery_ms": float(np.median(times)),
        "p95_ms": float(np.percentile(times, 95)),
        "added_ms": 1000 * float(np.median(added)),
        "tail_ms": float(np.median(times[-max(1, count // 10) :])),
        "search_ms": 1000 * float(np.median(waits)),
        "cpu_ms": 1000 * cpu / count,
        "beside_ms": 1000 * beside / count,
        "per_s": count / seconds,
    }


def _beside() -> float:
    """CPU seconds of the process that tells MLflow."""
    told = (p.cpu_times() for p in psutil.Process().children() if "secateur.pipeline.tracking.delivery" in p.cmdline())
    return sum(times.user + times.system for times in told)


def _numbered(records: list[Record], i: int) -> Record:
    record = records[i % len(records)]
    return {**record, "candidate": {**record["candidate"], "id": i}}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--candidates", type=int, default=5000, help="how many (default 5000)")
    arguments.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES), help="which (default all)")
    arguments.add_argument("--plans", type=int, default=20, help="real evaluations to compare with (default 20)")
    arguments.add_argument("--thread", action="store_true", help="without the process beside the search, to compare")
    options = arguments.parse_args()
    if options.thread:
        delivery.MANY = sys.maxsize
    torch.set_num_threads(1)
    seconds, records = evaluation_s(options.plans)
    rows, figures, work = [], [], forward_passes()
    for kind in options.stores:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "home").mkdir()
            with store(kind, Path(folder)) as uri:
                row = deliver(kind, uri, Path(folder, "home"), records, options.candidates, work)
        row["share"] = (row["cpu_ms"] + row["beside_ms"]) / 1000 / seconds
        rows.append(row)
        figures += [
            Figure(f"{kind}_added_ms", row["added_ms"], BOUND_MS, row["added_ms"] <= BOUND_MS),
            Figure(f"{kind}_share_of_evaluation", row["share"], BOUND_SHARE, row["share"] <= BOUND_SHARE),
        ]
    present(f"evaluation of ResNet-20 on 1,000 CIFAR-10 images: {seconds:.2f} s", rows, figures, options.json)


if __name__ == "__main__":
    main()
