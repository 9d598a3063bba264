"""What the pipeline adds to a candidate: journal, tracking, surgery and bookkeeping over bare forward passes.

    SECATEUR_DATA=... python benchmarks/overhead.py [--plans 24] [--json PATH]

ResNet-20 with pretrained weights on 1,000 images of CIFAR-10 (the data of pipeline/runs/cifar10-resnet20.yaml). Each
random plan is evaluated by the pipeline (surgery, forward passes, metrics, fsync'd journal, delivery to MLflow on
SQLite) and, in turn with it in the same process, the same pruned network runs bare over the same batches in the same
memory format. `candidate_overhead_ratio` is the sum of the pipeline's seconds, the wait for each delivery included,
over the sum of the bare seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.pruning.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._output import Figure, parser, present
from secateur.device_profiles import load_profile, open_target
from secateur.pipeline.config.reading import load_run_file
from secateur.pipeline.devices.fleet import Device, Fleet
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.evaluator import make_evaluator
from secateur.pipeline.run.journal import Journal
from secateur.pipeline.run.opening import open_workload
from secateur.pipeline.run.study import Study
from secateur.pipeline.tracking import Tracker
from secateur.pruning import ChannelGraph, PruningPlan
from secateur.pruning.search.protocol import Candidate, Evaluate

BOUND = 1.25
RUN_FILE = Path(__file__).parents[1] / "pipeline" / "runs" / "cifar10-resnet20.yaml"


def random_plan(graph: ChannelGraph, rng: np.random.Generator) -> PruningPlan:
    """Every group keeps a random share of random channels."""
    masks = {}
    for group in graph.groups:
        width = int(rng.integers(group.size // 2, group.size + 1))
        masks[group.name] = np.isin(np.arange(group.size), rng.permutation(group.size)[:width])
    return PruningPlan.from_masks(masks)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plans", type=int, default=24, help="how many random plans (default 24)")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    config = load_run_file(RUN_FILE)
    workload = open_workload(config)
    model = workload.build_model()
    graph = trace(model, workload.example_input())
    profile = load_profile("local")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        target = open_target(profile)
        fleet = Fleet([Device(profile, target)])
        evaluator = make_evaluator(Baseline(model, graph, workload), fleet, home / "c", config.search, config.finetune)
        tracker = Tracker(config.tracking, home, "overhead", "overhead", {})
        tracker.start()
        with Journal(home / "journal.jsonl", "overhead", config.digest) as journal:
            study = Study(journal, evaluator, tracker.candidate)
            study.answer(Evaluate((Candidate(0, random_plan(graph, rng), "warm-up"),)))  # migrations, image cache
            tracker.flush(300)
            for i in range(1, options.plans + 1):
                plan = random_plan(graph, rng)
                started = time.perf_counter()
                study.answer(Evaluate((Candidate(i, plan, "random"),)))
                if tracker.flush(300):  # a search does not wait for this; here no work may hide behind the bare run
                    sys.exit(f"MLflow did not take the candidates: {tracker.failure}")
                inside = time.perf_counter() - started
                network = evaluator.network(plan)
                batches = list(evaluator.accuracy._images())
                started = time.perf_counter()
                with torch.inference_mode():
                    for images, _ in batches:
                        network(images)
                bare = time.perf_counter() - started
                rows.append({"plan": i, "pipeline_s": inside, "bare_s": bare, "ratio": inside / bare})
        tracker.close()
        target.close()
    ratio = sum(r["pipeline_s"] for r in rows) / sum(r["bare_s"] for r in rows)
    figure = Figure("candidate_overhead_ratio", ratio, BOUND, ratio <= BOUND)
    present(
        f"ResNet-20, {len(evaluator.accuracy.split):,} CIFAR-10 images, {options.threads} thread(s)",
        rows,
        [figure],
        options.json,
    )


if __name__ == "__main__":
    main()
